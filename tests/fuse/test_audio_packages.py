"""encodec, descript-audio-codec and moshi: the classes of the packages, fused and as they are."""

import packages
import pytest
import torch
from agreement import compare, count_ties, leaves
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels import fuse, unfuse


class Call(nn.Module):
    """A quantizer that takes more than its input."""

    def __init__(self, quantizer, *arguments):
        super().__init__()
        self.quantizer, self.arguments = quantizer, arguments

    def forward(self, x):
        return self.quantizer(x, *self.arguments)


def encodec(**options):
    options = {"dim": 8, "codebook_size": 16, "kmeans_init": False, **options}
    return packages.encodec.ResidualVectorQuantization(num_quantizers=3, **options)


def moshi(split=False, **options):
    """Initialised, as k-means would leave it."""
    cls = packages.moshi_vq.SplitResidualVectorQuantizer if split else packages.moshi_vq.ResidualVectorQuantizer
    model = cls(dimension=8, n_q=3, bins=16, **options)
    for module in model.modules():
        if isinstance(module, packages.moshi.EuclideanCodebook):
            module.embedding_sum.normal_()
            module.cluster_usage.uniform_(0.5, 2)
            module._initialized.fill_(1)
    return model


def dac(dropout=0.0):
    return packages.dac.ResidualVectorQuantize(
        input_dim=8, n_codebooks=3, codebook_size=16, codebook_dim=4, quantizer_dropout=dropout
    )


CODEBOOKS = ["EuclideanCodebook"] * 3
LEVELS = [*CODEBOOKS, "ResidualVectorQuantization"]
MODELS = {
    "encodec": (encodec, LEVELS),
    "encodec_without_expiry": (lambda: encodec(threshold_ema_dead_code=0), LEVELS),
    "encodec_projected": (lambda: encodec(codebook_dim=5, threshold_ema_dead_code=0), LEVELS),
    "encodec_two_levels": (lambda: Call(encodec(), 2), LEVELS),
    "dac": (dac, ["VectorQuantize"] * 3),
    "dac_dropout": (lambda: dac(0.5), ["VectorQuantize"] * 3),
    "moshi": (lambda: Call(moshi(), 12.5), LEVELS),
    "moshi_split": (lambda: Call(moshi(split=True), 12.5), [*LEVELS, "ResidualVectorQuantization"]),
    "moshi_projected": (lambda: Call(moshi(input_dimension=8, force_projection=True), 12.5), LEVELS),
}


def twins(make, count):
    """Equal models: weight normalisation does not let them be copied."""
    models = []
    for _ in range(count):
        torch.manual_seed(5)
        models.append(make())
    return models


def fused_twins(make, count):
    models = twins(make, count)
    fuse(models[1], verbose=False)
    return models


def inputs():
    return torch.randn(4, 8, 30)


@pytest.mark.parametrize("synchronised", [True, False], ids=["step_by_step", "on_its_own"])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_in_training_and_evaluation(name, synchronised):
    compare(*fused_twins(MODELS[name][0], 3), inputs, synchronised=synchronised)


@pytest.mark.parametrize(("make", "kinds"), MODELS.values(), ids=MODELS)
def test_fuse_keeps_state_and_unfuse_restores(make, kinds):
    original, model = twins(make, 2)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state = model.state_dict(keep_vars=True)
    random = torch.get_rng_state()
    report = fuse(model, verbose=False)
    assert sorted(m.kind for m in report.fused) == sorted(kinds)
    assert not report.left
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    unfuse(model)
    for name, module in model.named_modules():
        assert list(module.__dict__) == list(before[name])
        assert all(module.__dict__[key] is value for key, value in before[name].items())
    x = inputs()
    for training in (True, False):
        results = []
        for twin in (original, model):
            torch.manual_seed(0)
            results.append(leaves(twin.train(training)(x)))
        for value, expected in zip(*(r.values() for r in results), strict=True):
            assert torch.equal(value, expected)


ENCODERS = {
    "encodec": lambda: packages.encodec.ResidualVectorQuantization(
        num_quantizers=4, dim=32, codebook_size=256, kmeans_init=False
    ),
    "moshi": lambda: moshi_encoder(),
}


def moshi_encoder():
    model = packages.moshi.ResidualVectorQuantization(num_quantizers=4, codebook_offset=0, dim=32, codebook_size=256)
    for layer in model.layers:
        nn.init.kaiming_uniform_(layer._codebook.embedding_sum)
    return model


def codes_of(layer):
    return layer._codebook.embedding if isinstance(layer, packages.moshi.VectorQuantization) else layer._codebook.embed


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_codes_of_residual_levels(make, levels):
    """A code that differs is a tie in the original's arithmetic; what follows such a code is another residual."""
    original, fused = fused_twins(make, 2)
    x = torch.randn(2, 32, 500)
    with torch.no_grad():
        expected, found = original.eval().encode(x, levels), fused.eval().encode(x, levels)
        quantized, codes, losses, *_ = fused(x, levels)
        reference = original(x, levels)
    assert found.shape == expected.shape == (levels or 4, 2, 500)
    assert found.is_contiguous()
    assert torch.equal(found, codes)
    assert losses.shape == reference[2].shape
    assert torch.equal(losses, reference[2])
    residual, same = x.mT.reshape(-1, 32), torch.ones(1000, dtype=torch.bool)
    for layer, theirs, ours in zip(original.layers, expected.flatten(1), found.flatten(1), strict=False):
        codebook = codes_of(layer)
        count_ties(residual[same], codebook, theirs[same], ours[same])
        residual, same = residual - codebook[ours], same & (theirs == ours)
    # Sums of as many float32 terms as there are levels, which round once each.
    total = sum(
        nn.functional.embedding(indices, codes_of(layer)).double()
        for layer, indices in zip(original.layers, found, strict=False)
    )
    bound = 4 * torch.finfo(torch.float32).eps * total.abs().max()
    assert (quantized.mT.double() - total).abs().max() <= bound
    assert quantized.shape == reference[0].shape
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_few_rows_have_the_codes_that_they_have_among_many(make):
    """However levels are searched: a few rows level by level, many in one call."""
    _, fused = fused_twins(make, 2)
    x = torch.randn(1, 32, 500)
    with torch.no_grad():
        many = fused.eval().encode(x)
        for start in range(0, 60, 3):
            assert torch.equal(fused.encode(x[..., start : start + 3]), many[..., start : start + 3])


@pytest.mark.parametrize(("make", "kinds"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_of_results(make, kinds, dtype):
    """Of a quantizer that was converted after it was fused."""
    original, fused = (model.to(dtype) for model in fused_twins(make, 2))
    x = inputs().to(dtype)
    compared = 0
    for training in (False, True):
        try:
            torch.manual_seed(0)
            expected = leaves(original.train(training)(x))
        except RuntimeError:  # some originals have no kernels or no common type then
            continue
        torch.manual_seed(0)
        found = leaves(fused.train(training)(x))
        compared += 1
        assert list(found) == list(expected)
        for path, value in expected.items():
            assert found[path].shape == value.shape, path
            assert found[path].dtype == value.dtype, path
            if dtype == torch.float64:
                assert torch.equal(found[path], value), path  # only the search differs
    assert compared


def test_codes_of_dac():
    original, fused = fused_twins(lambda: packages.dac.VectorQuantize(32, 512, 8), 2)
    x = torch.randn(2, 32, 500)
    with torch.no_grad():
        original.codebook.weight[3] = fused.codebook.weight[3] = 0  # its distance is 1, less than that of most codes
        expected, found = original(x)[3].flatten(), fused(x)[3].flatten()
        rows = original.in_proj(x).mT.reshape(-1, 8).double()
    codes = nn.functional.normalize(original.codebook.weight.detach().double(), dim=1)
    rows = nn.functional.normalize(rows, dim=1)
    count_ties(rows, codes, expected, found)
    assert torch.equal(found, torch.cdist(rows, codes).argmin(1))
    assert (found == expected).float().mean() > 0.99
    with torch.no_grad():
        original.codebook.weight[4:], fused.codebook.weight[4:] = 0, 0
    assert torch.equal(original(x)[3], fused(x)[3])
    assert (fused(x)[3] == 3).any()


def test_encodec_is_initialised_by_its_own_kmeans():
    original, fused = fused_twins(lambda: encodec(kmeans_init=True, codebook_size=8, kmeans_iters=5), 2)
    x = inputs()
    for model in (original, fused):
        torch.manual_seed(0)
        model.eval()(x)  # in evaluation, too
    for (name, value), expected in zip(fused.state_dict().items(), original.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    assert all(layer._codebook.inited for layer in fused.layers)


def test_moshi_initialises_level_after_level():
    def make():
        return packages.moshi.ResidualVectorQuantization(
            num_quantizers=2, codebook_offset=0, dim=8, codebook_size=8, check_unused_every=1
        )

    original, fused = fused_twins(make, 2)
    for step in range(3):
        x = inputs()
        for model in (original, fused):
            torch.manual_seed(step)
            metrics = model(x).metrics
        assert "rvq_expired_1" in metrics
        found = [layer.initialized for layer in fused.layers]
        assert found == [layer.initialized for layer in original.layers] == [True, step > 0]


@pytest.mark.parametrize("name", ["encodec", "moshi"])
def test_rows_of_nan_leave_the_codebook_alone(name):
    _, fused = fused_twins(lambda: MODELS[name][0](), 2)
    x = inputs()
    x[1, :, 3] = torch.nan
    fused.train()(x)
    assert all(value.isfinite().all() for value in fused.state_dict().values())
    codes = [v for v in leaves(fused.eval()(x)).values() if v.dtype == torch.int64]
    assert codes
    assert all((indices >= 0).all() for indices in codes)


def test_a_level_that_is_watched_or_of_another_kind():
    model = encodec()
    calls = []
    model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    fuse(model, verbose=False)
    model.eval()(inputs())
    assert calls

    class Louder(packages.encodec.VectorQuantization):
        pass

    for spoil, reason in (
        (lambda m: setattr(m.layers[1], "__class__", Louder), "a level has a Louder"),
        (lambda m: m.layers[0].__dict__.update(decode=lambda indices: None), "decode() of a level has been replaced"),
    ):
        model = encodec()
        spoil(model)
        report = fuse(model, verbose=False)
        assert len(report.fused) == 3
        assert reason in {m.name: m.reason for m in report.left}[""]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [*ENCODERS.values(), lambda: packages.dac.VectorQuantize(32, 256, 8)])
def test_memory_is_not_rows_by_codes(make, training):
    found = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [v for v in leaves(result).values() if isinstance(v, torch.Tensor)]
            found.extend(function for v in tensors if v.numel() >= 1000 * 256)
            return result

    original, fused = fused_twins(make, 2)
    for model in (fused, original):
        found.clear()
        for part in model.modules():
            if isinstance(part, packages.moshi.EuclideanCodebook):
                part._initialized.fill_(1)
        with Largest():
            model.train(training)(torch.randn(2, 32, 500))
        assert bool(found) == (model is original)
