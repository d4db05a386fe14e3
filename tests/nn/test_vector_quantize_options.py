"""Options beside the common path against vector-quantize-pytorch: outputs, losses, gradients and state over steps."""

import functools

import pytest
import torch
from vector_quantize_pytorch import VectorQuantize as Upstream
from vq_truth import CODES, DIM, EPS, assert_as_upstream, assert_close, assert_same_state, pair, step

from vqkernels import nn, reference

SHARED = {"heads": 2, "codebook_dim": 4}
SEPARATE = {**SHARED, "separate_codebook_per_head": True}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
ENTROPY = {"commitment_use_cross_entropy_loss": True}
DIVERSITY = {"codebook_diversity_loss_weight": 0.7, "codebook_diversity_temperature": 2.0}
ORTHOGONAL = {"orthogonal_reg_weight": 10.0}
SOFT = {"straight_through": True, "rotation_trick": False}
SGD = functools.partial(torch.optim.SGD, lr=0.05)
DIVEQ = {"directional_reparam": True, "threshold_ema_dead_code": 1e-9, "directional_reparam_variance": 0.1}


def bridge():
    """The same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Linear(DIM, DIM)


OPTIONS = {
    "entropy": ENTROPY,
    "entropy_shared": {**ENTROPY, **SHARED},
    "entropy_separate": {**ENTROPY, **SEPARATE},
    "entropy_cosine": {**ENTROPY, "use_cosine_sim": True},
    "entropy_learnable": {**ENTROPY, **LEARNABLE},
    "entropy_orthogonal": {**ENTROPY, **ORTHOGONAL},
    "diversity": DIVERSITY,
    "diversity_sharp": {"codebook_diversity_loss_weight": 1.0},
    "diversity_shared": {**DIVERSITY, **SHARED},
    "diversity_separate": {**DIVERSITY, **SEPARATE},
    "diversity_cosine": {**DIVERSITY, "use_cosine_sim": True},
    "diversity_learnable": {**DIVERSITY, **LEARNABLE, "commitment_weight": 0.0},
    "orthogonal": ORTHOGONAL,
    "orthogonal_unrouted": {**ORTHOGONAL, "route_gradients_to_input": False},
    "orthogonal_active": {**ORTHOGONAL, "orthogonal_reg_active_codes_only": True},
    "orthogonal_some": {**ORTHOGONAL, "orthogonal_reg_max_codes": CODES},
    "orthogonal_separate": {**ORTHOGONAL, **SEPARATE},
    "orthogonal_cosine": {**ORTHOGONAL, "use_cosine_sim": True},
    "affine": {"affine_param": True},
    "affine_learnable": {"affine_param": True, **LEARNABLE},
    "affine_heads": {
        "affine_param": True,
        **SEPARATE,
        "affine_param_batch_decay": 0.5,
        "affine_param_codebook_decay": 0.6,
    },
    "bridge": {"vq_bridge": bridge()},
    "synchronous": {"sync_update_v": 0.4, **LEARNABLE},
    "synchronous_straight": {"sync_update_v": 1.0, "rotation_trick": False, **LEARNABLE},
    "in_place": {"in_place_codebook_optimizer": functools.partial(torch.optim.Adam, lr=0.05), **LEARNABLE},
    "in_place_bridge": {"in_place_codebook_optimizer": SGD, "vq_bridge": bridge()},
    "in_place_manual": {"in_place_codebook_optimizer": SGD, "manual_in_place_optimizer_update": True, **LEARNABLE},
    "in_place_affine": {"in_place_codebook_optimizer": SGD, "affine_param": True, **LEARNABLE},
    "soft": {**SOFT, "route_gradients_to_input": False},
    "soft_routed": SOFT,
    "soft_cold": {**SOFT, "route_gradients_to_input": False, "sample_codebook_temp": 0.0},
    "soft_orthogonal": {**SOFT, "route_gradients_to_input": False, "sample_codebook_temp": 0.3, **ORTHOGONAL},
    "soft_cosine": {**SOFT, "route_gradients_to_input": False, "use_cosine_sim": True},
    "everything": {**ENTROPY, **DIVERSITY, **ORTHOGONAL, "codebook_dim": 5, "orthogonal_reg_active_codes_only": True},
}


def follows_by_hand(options):
    """Upstream overwrites codes that the gradient of distances still needs, unless they follow the averages later."""
    options = dict(options)
    needs_distances = options.keys() & {*ENTROPY, *DIVERSITY, "straight_through"}
    if needs_distances and not options.get("learnable_codebook"):
        options["manual_ema_update"] = True
    return options


def after_step(layer):
    if layer._codebook.manual_ema_update:
        layer._codebook.update_ema()
    if layer.manual_in_place_optimizer_update:
        layer.update_in_place_optimizer()


def inputs(num=3, shape=(3, 20, DIM)):
    return [torch.randn(shape) for _ in range(num)]


@pytest.mark.parametrize("layer_class", [nn.VectorQuantize, reference.VectorQuantize], ids=["nn", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_steps(options, layer_class):
    upstream, layer = pair(layer_class, **follows_by_hand(options))
    assert_as_upstream(upstream, layer, inputs(), inputs(), optimize=True, after=after_step)
    if not options.get("affine_param"):
        assert_as_upstream(upstream.eval(), layer.eval(), inputs(1))
    fresh = Upstream(DIM, CODES, **follows_by_hand(options))
    if options.get("affine_param"):  # upstream cannot load its own states either
        with pytest.raises(RuntimeError, match="batch_mean"):
            fresh.load_state_dict(upstream.state_dict(), strict=True)
        fresh(inputs(1)[0])
    fresh.load_state_dict(layer.state_dict(), strict=True)
    ours = layer_class(DIM, CODES, **options)
    ours.load_state_dict(upstream.state_dict(), strict=True)
    assert_same_state(ours, upstream, factor=0)


@pytest.mark.parametrize("name", ["entropy", "diversity", "soft"])
def test_gradients_of_distances_are_those_of_the_codes_in_use(name):
    """Not of what the moving averages make of them, as upstream's."""
    grads = []
    for options in (OPTIONS[name], follows_by_hand(OPTIONS[name])):
        _, layer = pair(**options)
        torch.manual_seed(2)
        grads.append(step(layer, torch.randn(3, 20, DIM))["x.grad"])
    assert torch.equal(*grads)


def test_affine_parameters_in_evaluation():
    upstream, layer = pair(affine_param=True)
    for x in inputs():
        upstream(x), layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    codes = layer.eval()._codebook.search_codes()[0].double()
    x = torch.randn(3, 20, DIM)
    quantized, indices, _ = layer(x)
    assert torch.equal(indices, torch.cdist(x.double(), codes.expand(3, -1, -1)).argmin(-1))
    assert torch.equal(quantized, codes.float()[indices])
    assert torch.equal(layer.get_output_from_indices(indices), quantized)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    book = upstream._codebook
    scale = (book.batch_variance / book.codebook_variance).sqrt()
    expected = (book.embed - book.codebook_mean) * scale + book.batch_mean
    assert_close(codes.float(), expected[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 5}, {"sample_codebook_temp": 0.1}], ids=str)
def test_directional_reparametrisation(options, masked, monkeypatch):
    noise = torch.randn(3 * 20 * DIM)
    # Ours draws rows for dead codes before the noise, upstream only where there are dead codes.
    monkeypatch.setattr(torch, "randn_like", lambda t: noise[: t.numel()].reshape(t.shape).to(t))
    upstream, layer = pair(**DIVEQ, **options)
    call = {"mask": torch.rand(3, 20) < 0.6} if masked else {}
    assert_as_upstream(upstream, layer, inputs(), inputs(), optimize=True, **call)


@pytest.mark.parametrize("temperature", [None, 0.2, 0.0])
@pytest.mark.parametrize(
    "options",
    [{}, SEPARATE, {"use_cosine_sim": True}, {**SOFT, "route_gradients_to_input": False}, LEARNABLE],
    ids=["default", "separate", "cosine", "soft", "learnable"],
)
def test_sampling(options, temperature):
    upstream, layer = pair(stochastic_sample_codes=True, manual_ema_update=True, **options)
    for x in inputs():
        results = []
        for module in (layer, upstream):
            torch.manual_seed(7)
            results.append(step(module, x, sample_codebook_temp=temperature))
        ours, theirs = results
        assert torch.equal(ours["indices"], theirs["indices"])
        for name, value in theirs.items():
            assert_close(ours[name].float(), value.float(), factor=128)
    layer.eval(), upstream.eval()
    assert torch.equal(layer(x)[1], upstream(x)[1])


def test_samples_are_distributed_as_the_softmax():
    layer = nn.VectorQuantize(4, 6, stochastic_sample_codes=True, sample_codebook_temp=0.5, ema_update=False)
    num, x = 20000, torch.randn(1, 1, 4)
    counts = torch.bincount(layer(x.expand(1, num, 4))[1].flatten(), minlength=6).double()
    share = (-torch.cdist(x[0].double(), layer.codebook.double())[0] / 0.5).softmax(-1)
    deviation = (share * (1 - share) * num).sqrt()
    assert ((counts - share * num).abs() <= 5 * deviation).all()


LAYOUTS = {
    "sequence": ({}, (3, 20, DIM)),
    "token": ({}, (30, DIM)),
    "channel_first": ({"channel_last": False}, (3, DIM, 20)),
    "image": ({"accept_image_fmap": True}, (3, DIM, 4, 5)),
    "volume": ({"accept_3d_fmap": True}, (2, DIM, 2, 3, 5)),
}
TOPK_OPTIONS = {
    "default": {},
    "projected": {"codebook_dim": 5},
    "straight_through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "learnable": LEARNABLE,
    "weighted": {"commitment_weight": 0.25},
    "without_commitment": {"commitment_weight": 0.0},
    "diversity": {**DIVERSITY, "manual_ema_update": True},
    "orthogonal": ORTHOGONAL,
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("topk", [1, 3, CODES + 5])
@pytest.mark.parametrize("options", TOPK_OPTIONS.values(), ids=TOPK_OPTIONS)
def test_topk(options, topk, train):
    upstream, layer = pair(**options)
    assert_as_upstream(upstream.train(train), layer.train(train), inputs(2), optimize=train, topk=topk)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_topk_layouts(layout, shape, train):
    upstream, layer = pair(**layout)
    upstream.train(train), layer.train(train)
    x = torch.randn(shape)
    ours, theirs = step(layer, x, topk=3), step(upstream, x, topk=3)
    for name, value in theirs.items():
        if name == "commitment":  # upstream leaves it as a sequence
            value = value.reshape(ours[name].shape)
        assert_close(ours[name].float(), value.float())
    assert ours["commitment"].shape == ours["indices"].shape


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("zeros", [True, False])
def test_topk_masks(zeros, train):
    upstream, layer = pair(return_zeros_for_masked_padding=zeros)
    mask = torch.rand(3, 20) < 0.6
    assert_as_upstream(upstream.train(train), layer.train(train), inputs(2), mask=mask, topk=4)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_topk_samples_without_replacement(temperature):
    upstream, layer = pair(stochastic_sample_codes=True, sample_codebook_temp=temperature)
    x = torch.randn(3, 20, DIM)
    indices = []
    for module in (layer, upstream):
        torch.manual_seed(3)
        indices.append(module(x, topk=5)[1])
    assert torch.equal(*indices)
    assert (indices[0].sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [{}, LEARNABLE, {"use_cosine_sim": True}, {"codebook_dim": 5}, SHARED, SEPARATE, {"channel_last": False}],
    ids=["default", "learnable", "cosine", "projected", "shared", "separate", "channel_first"],
)
def test_cross_entropy_of_given_indices(options, train):
    upstream, layer = pair(manual_ema_update=True, **options)
    upstream.train(train), layer.train(train)
    x = torch.randn(3, 20, DIM)
    targets = torch.randint(-1, CODES, (3, 20, 2) if options.get("heads") else (3, 20))
    results = []
    for module in (layer, upstream):
        z = x.mT.clone() if "channel_last" in options else x.clone()
        quantized, loss = module(z.requires_grad_(), indices=targets)
        loss.backward()
        results.append((quantized, loss, z.grad))
    (quantized, loss, grad), (expected, expected_loss, expected_grad) = results
    assert quantized.shape == z.shape
    if options in ({}, LEARNABLE, {"use_cosine_sim": True}):
        assert_close(quantized, expected)
    assert_close(loss, expected_loss)
    assert_close(grad, expected_grad, factor=128)
    assert_same_state(layer, upstream)


def test_cross_entropy_of_indices_of_an_image():
    upstream, layer = pair(accept_image_fmap=True)
    x, targets = torch.randn(2, DIM, 4, 5), torch.randint(CODES, (2, 4, 5))
    upstream.eval(), layer.eval()
    expected = upstream(x, indices=targets.flatten(1))[1]
    for shape in ((2, 4, 5), (2, 20)):
        assert_close(layer(x, indices=targets.reshape(shape))[1], expected)


class Transform(torch.nn.Module):
    """Codes that depend on the vector: each is moved by something of its own."""

    def __init__(self, batch, rows, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.shift = torch.nn.Parameter(torch.randn(batch, rows, 1, 1))
        self.mix = torch.nn.Parameter(torch.eye(DIM) + 0.3 * torch.randn(DIM, DIM))

    def forward(self, codes):
        return (codes @ self.mix)[:, None, None] + self.shift


@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [LEARNABLE, {**LEARNABLE, **ENTROPY}, {**LEARNABLE, **DIVERSITY}, {"use_cosine_sim": True}, {}],
    ids=["learnable", "entropy", "diversity", "cosine", "default"],
)
def test_transformed_codes(options, train, topk):
    if topk and train:  # which this loss does not go with
        options = {**options, "commitment_use_cross_entropy_loss": False}
    upstream, layer = pair(**options)
    x, results = torch.randn(3, 20, DIM), []
    for module in (layer, upstream):
        transform = Transform(3, 20, seed=4)
        out = step(module.train(train), x, codebook_transform_fn=transform, topk=topk)
        if train and options.get("learnable_codebook"):
            out.update({name: p.grad for name, p in transform.named_parameters()})
        results.append(out)
    ours, theirs = results
    assert torch.equal(ours["indices"], theirs["indices"])
    for name, value in theirs.items():
        assert_close(ours[name].float(), value.float(), factor=256)


def test_transformed_codes_of_heads():
    for options in (SHARED, SEPARATE):
        upstream, layer = pair(**options)
        x = torch.randn(3, 20, DIM)
        shift = torch.randn(1 if options is SHARED else 2, 6 if options is SHARED else 3, 20, 1, 1)
        results = [
            module.eval()(x, codebook_transform_fn=lambda codes: codes[:, None, None] + shift)  # noqa: B023
            for module in (layer, upstream)
        ]
        assert torch.equal(results[0][1], results[1][1])
        assert_close(results[0][0], results[1][0])


WEIGHTS = {
    "vector": torch.rand(CODES),
    "matrix": torch.rand(1, CODES),
    "function": lambda sums, counts: (counts / 5).clamp(max=1) + 0 * sums.sum(-1),
}


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"ema_update": False}, {"manual_ema_update": True}])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_a_step(weight, options):
    upstream, layer = pair(threshold_ema_dead_code=1e-9, **options)
    for x in inputs():
        layer(x, ema_update_weight=weight), upstream(x, ema_update_weight=weight)
        assert_same_state(layer, upstream)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, SEPARATE])
def test_accumulation(options):
    upstream, layer = pair(**options)
    for number, x in enumerate(inputs(7)):
        for module in (layer, upstream):
            module(x, accum_ema_update=number % 3 < 2)
        assert_same_state(layer, upstream)


def test_codes_for_orthogonality_are_drawn():
    """As upstream draws them; of active codes all are drawn in time, and no others."""
    upstream, layer = pair(**ORTHOGONAL, orthogonal_reg_max_codes=5)
    x, results = torch.randn(3, 20, DIM), []
    for module in (layer, upstream):
        torch.manual_seed(5)
        results.append(step(module, x))
    assert_close(results[0]["_codebook.embed.grad"], results[1]["_codebook.embed.grad"])
    assert_close(results[0]["orthogonal_reg"], results[1]["orthogonal_reg"])

    _, layer = pair(**ORTHOGONAL, orthogonal_reg_max_codes=5, orthogonal_reg_active_codes_only=True, ema_update=False)
    drawn = torch.zeros(CODES)
    for _ in range(60):
        layer.zero_grad()
        out = step(layer, x)
        chosen = (out["_codebook.embed.grad"] != 0).any(-1)[0]
        assert chosen.sum() == 5
        unit = torch.nn.functional.normalize(layer.codebook[chosen].double(), dim=-1)
        expected = (unit @ unit.mT).square().sum() / 25 - 1 / 5
        assert out["orthogonal_reg"].item() == pytest.approx(expected.item(), abs=16 * EPS)
        drawn += chosen
    assert torch.equal(drawn > 0, torch.bincount(out["indices"].flatten(), minlength=CODES) > 0)
