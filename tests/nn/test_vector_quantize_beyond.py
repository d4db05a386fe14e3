"""What the options promise beyond upstream: masks, invalid rows, bounded memory, accumulation, saved codes, errors."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vq_truth import EPS, assert_close, step

from vqkernels import nn, reference
from vqkernels.reference import distances, synchronization

DIM, CODES = 8, 32
SEPARATE = {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}
ENTROPY = {"commitment_use_cross_entropy_loss": True}
DIVERSITY = {"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 2.0}
ORTHOGONAL = {"orthogonal_reg_weight": 10.0, "orthogonal_reg_active_codes_only": True}
SOFT = {"straight_through": True, "route_gradients_to_input": False}
DIVEQ = {"directional_reparam": True, "threshold_ema_dead_code": 1e-9}

# Per-row options: what a masked row could take part in.
OPTIONS = {
    "entropy": ENTROPY,
    "entropy_separate": {**ENTROPY, **SEPARATE},
    "orthogonal": ORTHOGONAL,
    "affine": {"affine_param": True},
    "affine_learnable": {"affine_param": True, "learnable_codebook": True},
    "bridge": {"vq_bridge": torch.nn.Linear(DIM, DIM)},
    "soft": SOFT,
    "synchronous": {"sync_update_v": 0.5, "learnable_codebook": True},
    "in_place": {
        "learnable_codebook": True,
        "in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    },
}
each_layer = pytest.mark.parametrize(
    "layer_class", [nn.VectorQuantize, reference.VectorQuantize], ids=["nn", "reference"]
)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def copies(layer, num=2):
    return [copy.deepcopy(layer) for _ in range(num)]


def assert_same_steps(first, second, factor=64):
    """Results of two steps, but for the gradient of x, the quantized vectors and the indices."""
    for name, value in second.items():
        if name not in ("quantized", "indices", "x.grad"):
            assert_close(first[name].float(), value.float(), factor)


@each_layer
@each_option
def test_a_masked_batch_is_its_unmasked_rows(layer_class, options):
    layer, alone = copies(layer_class(DIM, CODES, **options))
    x, mask = torch.randn(3, 20, DIM), torch.rand(3, 20) < 0.5
    x[~mask] = torch.nan
    for _ in range(2):
        ours = step(layer, x, weight=mask.unsqueeze(-1).expand_as(x).float(), mask=mask)
        expected = step(alone, x[mask].unsqueeze(0))
        assert torch.equal(ours["indices"][mask], expected["indices"][0])
        assert_close(ours["quantized"][mask], expected["quantized"][0])
        assert_close(ours["x.grad"][mask], expected["x.grad"][0], factor=64)
        assert (ours["x.grad"][~mask] == 0).all()
        assert_same_steps(ours, expected)


@each_layer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), DIVERSITY, DIVEQ, {"stochastic_sample_codes": True}],
    ids=[*OPTIONS, "diversity", "directional", "sampling"],
)
def test_an_invalid_row_touches_nothing(layer_class, options, bad):
    """Apart from its own output: nothing that is finite without it stops being so."""
    layer, without = copies(layer_class(DIM, CODES, **options))
    x = torch.randn(2, 20, DIM)
    x[1, 7] = bad
    weight = torch.ones_like(x)
    weight[1, 7] = 0
    quantized, indices, loss = layer(x.requires_grad_())
    assert quantized[1, 7].isnan().all()
    assert (indices[1, 7] == -1).all()
    assert loss.isfinite()
    torch.where(weight > 0, quantized, 0).sum().add(loss).backward()
    for value in [*layer.state_dict().values(), *(p.grad for p in layer.parameters() if p.grad is not None)]:
        assert value.isfinite().all()
    others = torch.ones(2, 20, dtype=torch.bool)
    others[1, 7] = False
    assert x.grad[others].isfinite().all()
    if not options.keys() & {"directional_reparam", "stochastic_sample_codes"}:
        expected, expected_indices, expected_loss = without(x.detach(), mask=others)
        assert torch.equal(indices[others], expected_indices[others])
        assert_close(quantized[others].detach(), expected[others].detach())
        assert_close(loss.detach(), expected_loss.detach())


@pytest.mark.parametrize("heads", [{}, {"heads": 2, "codebook_dim": 4}, SEPARATE], ids=["one", "shared", "separate"])
def test_diversity_of_a_masked_batch(heads):
    """Per position the entropy of the average softmax of its rows, in float64."""
    layer = nn.VectorQuantize(DIM, CODES, ema_update=False, **DIVERSITY, **heads)
    x, mask = torch.randn(5, 6, DIM), torch.rand(5, 6) < 0.6
    mask[:, 3] = False
    actual = layer(x, mask=mask, return_loss_breakdown=True)[3].codebook_diversity
    codes = layer._codebook.embed.double().expand(layer.heads, -1, -1)
    entropies = []
    for n in range(6):
        rows = x[mask[:, n], n].double().reshape(-1, layer.heads, layer._codebook.embed.shape[-1])
        if len(rows) == 0:
            continue
        share = torch.stack([(-2 * torch.cdist(rows[:, h], codes[h])).softmax(-1) for h in range(layer.heads)])
        average = share.mean((0, 1))
        entropies.append(-(average * average.clamp(min=1e-5).log()).sum())
    assert actual.item() == pytest.approx(-torch.stack(entropies).mean().item(), rel=64 * EPS)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest result of any operation."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


BLOCKED = {
    "entropy": ENTROPY,
    "entropy_separate": {**ENTROPY, **SEPARATE},
    "entropy_learnable": {**ENTROPY, "learnable_codebook": True},
    "diversity": DIVERSITY,
    "diversity_shared": {**DIVERSITY, "heads": 2},
    "diversity_separate": {**DIVERSITY, **SEPARATE},
    "diversity_learnable": {**DIVERSITY, "learnable_codebook": True},
    "soft": SOFT,
    "soft_cosine": {**SOFT, "use_cosine_sim": True},
    "sampling": {"stochastic_sample_codes": True},
    "sampling_separate": {"stochastic_sample_codes": True, **SEPARATE},
    "orthogonal": ORTHOGONAL,
}


@pytest.mark.parametrize("shape", [(4, 150, DIM), (600, DIM), (1, 600, DIM)], ids=["sequences", "tokens", "sequence"])
@pytest.mark.parametrize("options", BLOCKED.values(), ids=BLOCKED)
def test_blocks_change_nothing_and_bound_the_memory(options, shape, monkeypatch):
    whole, blocked = copies(nn.VectorQuantize(DIM, 256, **options))
    x, results = torch.randn(shape), []
    for layer, size in ((whole, 2**24), (blocked, 2**13)):
        monkeypatch.setattr(distances, "BLOCK", size)
        torch.manual_seed(5)
        with LargestTensor() as largest:
            results.append(step(layer, x))
        stores_scores = largest.elements >= 600 * 256
        assert stores_scores == (size == 2**24 and options is not ORTHOGONAL)
    assert largest.elements <= 2**14
    assert torch.equal(results[0]["indices"], results[1]["indices"])
    for name, value in results[0].items():
        assert_close(results[1][name].float(), value.float(), factor=64)


@pytest.mark.parametrize("options", [ENTROPY, DIVERSITY, SOFT], ids=["entropy", "diversity", "soft"])
def test_blocks_in_one_graph(options, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 2**11)
    torch._dynamo.reset()
    eager, compiled = copies(nn.VectorQuantize(DIM, 64, **options))
    x = torch.randn(2, 50, DIM)
    expected = step(eager, x)
    actual = step(torch.compile(compiled, fullgraph=True, backend="aot_eager"), x)
    assert_close(actual["loss"], expected["loss"])
    assert_close(actual["x.grad"], expected["x.grad"], factor=64)


@each_layer
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cosine_sim": True}, SEPARATE, {"ema_update": False, "threshold_ema_dead_code": 1e-9}],
    ids=["default", "cosine", "separate", "without_ema"],
)
def test_accumulated_batches_are_one(layer_class, options):
    parts, whole, ended = copies(layer_class(DIM, CODES, **options), 3)
    batches = [torch.randn(2, 20, DIM) for _ in range(3)]
    batches[1][0, 4] = torch.nan
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    for x in batches:
        parts(x, accum_ema_update=True)
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())
    parts.apply_statistics_()
    for number, x in enumerate(batches):
        ended(x, accum_ema_update=number < 2)
    whole(torch.cat(batches))
    for other in (parts, ended):
        for name, value in whole.state_dict().items():
            assert_close(other.state_dict()[name].float(), value.float())
    after = {name: value.clone() for name, value in parts.state_dict().items()}
    parts.apply_statistics_()
    assert all(torch.equal(value, after[name]) for name, value in parts.state_dict().items())


@each_layer
def test_accumulated_batches_replace_dead_codes(layer_class):
    layer = layer_class(DIM, CODES, threshold_ema_dead_code=2)
    layer._codebook.cluster_size.zero_()
    batches = [torch.randn(1, 40, DIM) for _ in range(2)]
    for x in batches:
        layer(x, accum_ema_update=True)
    layer.double().float()
    layer.apply_statistics_()
    size = layer._codebook.cluster_size[0]
    assert (size >= 2).all()
    replaced = layer.codebook[size == 2]
    assert len(replaced) > 8
    assert ((replaced.unsqueeze(1) == batches[1][0]).all(-1).sum(-1) == 1).all()


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_from_saved_codes(layer_class, dtype):
    codes = torch.randn(CODES, 5, dtype=dtype)
    layer = layer_class.from_codebook(codes)
    assert type(layer) is layer_class
    assert (layer.dim, layer.codebook_size, layer.has_projections) == (5, CODES, False)
    assert torch.equal(layer.codebook, codes.float())
    x = codes.float() + 1e-3
    assert torch.equal(layer.eval()(x)[1], torch.arange(CODES))
    assert torch.equal(layer.train()(x)[1], torch.arange(CODES))
    assert_close(layer.codebook, 0.8 * codes.float() + 0.2 * x, factor=2e4)  # up to the smoothing

    codes = torch.randn(3, CODES, 4, dtype=dtype)
    layer = layer_class.from_codebook(codes, dim=7, use_cosine_sim=True, kmeans_init=True, channel_last=False)
    assert layer.has_projections
    expected = torch.nn.functional.normalize(codes.float(), dim=-1)
    assert_close(layer.codebook, expected)
    quantized, indices, _ = layer.eval()(torch.randn(2, 7, 6))
    assert (quantized.shape, indices.shape) == ((2, 7, 6), (2, 6, 3))
    assert_close(layer.codebook, expected)
    with pytest.raises(ValueError, match=r"codes: expected shape \[K, D\] or \[H, K, D\], got \[4\]"):
        layer_class.from_codebook(torch.zeros(4))
    with pytest.raises(TypeError, match="codes: expected a tensor of float32"):
        layer_class.from_codebook([[1.0]])


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_options_compute_in_float32(layer_class, dtype):
    options = {**ENTROPY, **DIVERSITY, **ORTHOGONAL, "affine_param": True}
    layer, wide = copies(layer_class(DIM, CODES, **options))
    layer.to(dtype)
    x = torch.randn(2, 20, DIM, dtype=dtype)
    for _ in range(2):
        ours, expected = step(layer, x), step(wide, x.float())
    assert all(value.dtype in (torch.float32, torch.bool) for value in layer.state_dict().values())
    assert torch.equal(ours["indices"], expected["indices"])
    assert_same_steps(ours, {name: value for name, value in expected.items() if not name.startswith("x")}, factor=128)
    bridge = layer_class(DIM, CODES, vq_bridge=torch.nn.Linear(DIM, DIM)).to(dtype)
    assert bridge(x)[0].dtype == dtype
    assert bridge._codebook.vq_bridge.weight.dtype == torch.float32


@each_layer
def test_affine_states_go_both_ways(layer_class):
    fresh, trained = (layer_class(DIM, CODES, affine_param=True) for _ in range(2))
    before = list(fresh.state_dict())
    for _ in range(2):
        trained(torch.randn(2, 20, DIM))
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    assert set(state) - set(before) == {"_codebook.batch_mean", "_codebook.batch_variance"}
    other = layer_class(DIM, CODES, affine_param=True)
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    trained.load_state_dict(fresh.state_dict(), strict=True)
    assert list(trained.state_dict()) == before
    x = torch.randn(2, 20, DIM)
    assert torch.equal(trained.eval()(x)[0], fresh.eval()(x)[0])


@each_layer
@pytest.mark.parametrize("call", [{}, {"topk": 3}, {"indices": torch.zeros(2, 5, dtype=torch.int64)}], ids=str)
def test_meta_tensors_give_shapes(layer_class, call):
    options = {**ENTROPY, **DIVERSITY, **ORTHOGONAL, "affine_param": True, "stochastic_sample_codes": True}
    layer = layer_class(DIM, CODES, **options).to("meta")
    layer.train("topk" not in call)
    if "indices" in call:
        call = {"indices": call["indices"].to("meta")}
    results = layer(torch.randn(2, 5, DIM, device="meta"), **call)
    more = (3,) if "topk" in call else ()
    assert results[0].shape == (2, 5, *more, DIM)
    assert results[1].shape == (() if "indices" in call else (2, 5, *more))


def test_loss_has_a_gradient_whatever_the_input():
    for options in ({}, {"commitment_weight": 0.0}):
        nn.VectorQuantize(DIM, CODES, **options)(torch.randn(2, 5, DIM))[2].backward()


def test_who_shares_a_codebook(monkeypatch):
    assert not nn.VectorQuantize(DIM, CODES)._codebook.sync_codebook
    monkeypatch.setattr(synchronization, "is_distributed", lambda: True)
    for given, expected in ((None, True), (False, False), (True, True)):
        codebook = nn.VectorQuantize(DIM, CODES, sync_codebook=given, reproducible=True)._codebook
        assert (codebook.sync_codebook, codebook.reproducible) == (expected, True)


def test_in_place_step_by_hand():
    """The gradient of the mean squared error waits in the codes; nothing happens where there is no optimizer."""
    layer = nn.VectorQuantize(DIM, CODES, **OPTIONS["in_place"], manual_in_place_optimizer_update=True)
    before, x = layer.codebook.detach().clone(), torch.randn(2, 20, DIM)
    indices = layer(x)[1].flatten()
    assert torch.equal(layer.codebook, before)
    error = (before[indices] - x.reshape(-1, DIM)).double()
    expected = torch.zeros(CODES, DIM, dtype=torch.float64).index_add_(0, indices, 2 * error / error.numel())
    assert_close(layer._codebook.embed.grad[0], expected.float())
    layer.update_in_place_optimizer()
    assert_close(layer.codebook.detach(), before - 0.1 * expected.float())
    plain = nn.VectorQuantize(DIM, CODES)
    before = plain.codebook.clone()
    plain.update_in_place_optimizer()
    assert torch.equal(plain.codebook, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learnable_codebook": True, "straight_through": True}, "learnable_codebook, straight_through: expected at"),
        ({"rotation_trick": True, "straight_through": True}, "straight_through, rotation_trick, directional_reparam: "),
        ({"affine_param": True, "use_cosine_sim": True}, "affine_param, use_cosine_sim: expected at most one"),
        ({"directional_reparam": True}, "directional_reparam: expected only with threshold_ema_dead_code, got thres"),
        ({"vq_bridge": torch.nn.Identity(), "learnable_codebook": False}, "vq_bridge: expected only with learnable_co"),
        (
            {"vq_bridge": torch.nn.Identity(), "ema_update": True},
            "learnable_codebook, ema_update: expected at most one",
        ),
        ({"sync_update_v": 0.5}, "sync_update_v: expected only with learnable_codebook, got learnable_codebook=False"),
        ({"sync_update_v": 1.5, "learnable_codebook": True}, "sync_update_v: expected a number from 0 to 1, got 1.5"),
        ({"in_place_codebook_optimizer": torch.optim.SGD}, "in_place_codebook_optimizer: expected only with learnable"),
        ({"orthogonal_reg_max_codes": 0}, "orthogonal_reg_max_codes: expected an integer of at least 1, got 0"),
        ({"sample_codebook_temp": -1.0}, "sample_codebook_temp: expected a number of at least 0, got -1.0"),
        ({"affine_param_batch_decay": 2}, "affine_param_batch_decay: expected a number from 0 to 1, got 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nn.VectorQuantize(DIM, CODES, **options)


SEQUENCE = torch.zeros(2, 5, DIM)


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"heads": 2}, {"topk": 2}, ValueError, "topk: expected only with one head, got 2 heads"),
        ({}, {"topk": 0}, ValueError, "topk: expected an integer of at least 1, got 0"),
        (ENTROPY, {"topk": 2}, ValueError, "topk: expected only without commitment_use_cross_entropy_loss in training"),
        (OPTIONS["in_place"], {"topk": 2}, ValueError, "topk: expected only without in_place_codebook_optimizer in"),
        ({}, {"indices": torch.zeros(2, 4).long()}, ValueError, r"indices: expected shape \[2, 5\] to match x"),
        ({}, {"indices": torch.zeros(2, 5)}, TypeError, "indices: expected a tensor of int64 or int32, got float32"),
        ({}, {"indices": torch.full((2, 5), 32)}, IndexError, "indices: expected values from -1 to 31, got 32"),
        (
            {},
            {"ema_update_weight": torch.ones(4)},
            ValueError,
            r"ema_update_weight: expected shape \[32\] or \[1, 32\]",
        ),
        (
            {},
            {"ema_update_weight": 1.0},
            TypeError,
            "ema_update_weight: expected a tensor of float32 or .* got float 1",
        ),
        ({"vq_bridge": torch.nn.Linear(8, 4)}, {}, ValueError, r"vq_bridge: expected codes of shape \[1, 32, 8\], got"),
    ],
)
def test_bad_calls(options, call, error, message):
    with pytest.raises(error, match=message):
        nn.VectorQuantize(DIM, CODES, **options)(SEQUENCE, **call)
