"""Options of vector-quantize-pytorch's layers, fused and compared with the originals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import HierarchicalVQ, ResidualVQ, SimVQ, VectorQuantize

from benchmarks.fuse_models import Autoencoder, Subject
from benchmarks.fuse_truth import compare_subject, recorded
from vqkernels import fuse

DIM, CODES = 16, 61
LEARNABLE = {"learnable_codebook": True, "ema_update": False}

OPTIONS = {
    "projection": {"codebook_dim": 8},
    "heads": {"heads": 2, "codebook_dim": 8},
    "separate_heads": {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True},
    "straight_through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True, "threshold_ema_dead_code": 2},
    "expiry": {"threshold_ema_dead_code": 2},
    "affine": {"affine_param": True},
    "kmeans": {"kmeans_init": True},
    "learnable": LEARNABLE,
    "synchronous": {**LEARNABLE, "sync_update_v": 0.1},
    "orthogonal": {"orthogonal_reg_weight": 0.1, "orthogonal_reg_active_codes_only": True, "ema_update": False},
    "in_place_optimizer": {
        **LEARNABLE,
        "in_place_codebook_optimizer": lambda codes: torch.optim.SGD(codes, lr=0.1),
        "threshold_ema_dead_code": 1,
    },
    "frozen": {"freeze_codebook": True},
    "bridge": {**LEARNABLE, "vq_bridge": nn.Linear(DIM, DIM)},
    "manual_ema": {"manual_ema_update": True},
}
MATRIX_NEEDED = {
    "diversity": {"codebook_diversity_loss_weight": 0.1},
    "cross_entropy": {"commitment_use_cross_entropy_loss": True},
    "sampling": {"stochastic_sample_codes": True},
    "gumbel": {"straight_through": True, "rotation_trick": False},
}
MASK = torch.arange(50) < torch.tensor([[50], [31]])
CALLS = {
    "mask": {"mask": MASK},
    "lens": {"lens": torch.tensor([50, 31])},
    "weights": {"ema_update_weight": lambda sums, counts: (counts > 1).float()},
    "frozen": {"freeze_codebook": True},
    "no_ema": {"ema_update": False},
}


class Call(nn.Module):
    """A layer that is always called with these arguments."""

    def __init__(self, layer, **arguments):
        super().__init__()
        self.layer = layer
        self.arguments = arguments

    def forward(self, x):
        return self.layer(x, **self.arguments)


def subject(layer, x=None, **arguments):
    x = torch.randn(2, 50, DIM) if x is None else x
    model = Autoencoder(Call(layer, **arguments), DIM)
    return Subject(model, (x,), lambda result: (result[0], result[1].sum()), True)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("steps", [0, 5])
def test_options(option, steps):
    layer = VectorQuantize(DIM, CODES, **OPTIONS[option])
    layer(torch.randn(2, 200, DIM))  # what starts from data has started
    assert compare_subject(subject(layer), steps).ties <= 1


def test_cosine_with_codes_of_any_length():
    single = VectorQuantize(DIM, CODES, use_cosine_sim=True)
    stack = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, use_cosine_sim=True)
    for layer in (single, *stack.layers):
        layer._codebook.embed.mul_(torch.rand(1, CODES, 1) + 0.5)
    for layer in (single, stack):
        assert compare_subject(subject(layer), 0).ties <= 1


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("steps", [0, 5])
def test_calls(call, steps):
    layer = VectorQuantize(DIM, CODES, threshold_ema_dead_code=1)
    assert compare_subject(subject(layer, **CALLS[call]), steps).ties <= 1


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (30, DIM)),
        ({"channel_last": False}, (2, DIM, 30)),
        ({"accept_image_fmap": True}, (2, DIM, 5, 6)),
        ({"accept_3d_fmap": True}, (2, DIM, 5, 2, 3)),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_shapes(arguments, shape, training):
    layer = VectorQuantize(DIM, CODES, **arguments).train(training)
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    x = torch.randn(shape)
    for result, expected in zip(fused(x), layer(x), strict=True):
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "make",
    [lambda: VectorQuantize(DIM, CODES, heads=2), lambda: ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3)],
)
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch(make, training):
    layer = make().train(training)
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    x = torch.randn(0, 5, DIM)
    for result, expected in zip(fused(x), layer(x), strict=True):
        torch.testing.assert_close(result, expected, equal_nan=True)
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, layer.state_dict()[name])


def same_without_searches(layer, x, **arguments):
    """A fused layer takes the original's way, and its results."""
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    results = []
    for each in (layer, fused):
        torch.manual_seed(0)
        with recorded() as searches:
            results.append(each(x, **arguments))
        assert not searches
    expected, result = ([t for t in torch.utils._pytree.tree_leaves(r) if t is not None] for r in results)
    assert all(map(torch.equal, result, expected))
    assert all(map(torch.equal, fused.state_dict().values(), layer.state_dict().values()))


@pytest.mark.parametrize("option", MATRIX_NEEDED)
def test_what_needs_the_matrix_stays(option):
    layer = VectorQuantize(DIM, CODES, **MATRIX_NEEDED[option])
    same_without_searches(layer, torch.randn(2, 30, DIM))
    fuse(layer, verbose=False)
    with recorded() as searches:
        layer.eval()(torch.randn(2, 30, DIM))
    assert len(searches) == 1


@pytest.mark.parametrize("arguments", [{"topk": 3}, {"indices": torch.zeros(2, 30, dtype=torch.int64)}])
@pytest.mark.parametrize("training", [False, True])
def test_calls_that_need_the_matrix_stay(arguments, training):
    same_without_searches(VectorQuantize(DIM, CODES).train(training), torch.randn(2, 30, DIM), **arguments)


def test_the_codebook_itself_stays():
    layer = VectorQuantize(DIM, CODES)
    fuse(layer, verbose=False)
    x = torch.randn(1, 30, DIM)
    _, indices, distances = layer.eval()._codebook(x)
    expected = -torch.cdist(x, layer.codebook)
    torch.testing.assert_close(distances[0], expected)
    assert torch.equal(indices, distances[0].argmax(-1))


def test_a_hook_of_the_codebook_sees_distances():
    layer = VectorQuantize(DIM, CODES).eval()
    fuse(layer, verbose=False)
    seen = []
    layer._codebook.register_forward_hook(lambda module, inputs, output: seen.append((module, output[2])))
    layer(torch.randn(1, 30, DIM))
    assert seen[0][0] is layer._codebook
    assert seen[0][1].isfinite().all()


def test_accumulated_statistics():
    layer = VectorQuantize(DIM, CODES)
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    batches = torch.randn(3, 2, 50, DIM)
    for each in (layer, fused):
        for x in batches[:2]:
            each(x, accum_ema_update=True)
        each(batches[2])
    assert torch.equal(fused._codebook.cluster_size, layer._codebook.cluster_size)
    torch.testing.assert_close(fused._codebook.embed, layer._codebook.embed)
    truth = torch.full((CODES,), 0.8, dtype=torch.float64)
    assert torch.allclose(fused._codebook.cluster_size.sum().double(), truth.sum() + 0.2 * 300)


def test_rows_of_nan_do_not_reach_the_codebook():
    layer = VectorQuantize(DIM, CODES)
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    x = torch.randn(2, 50, DIM)
    x[1, 7] = torch.nan
    _, indices, _ = fused(x)
    assert indices[1, 7] == layer(x)[1][1, 7] == 0
    assert fused._codebook.embed.isfinite().all()
    assert layer._codebook.embed.isnan().any()


RESIDUAL = {
    "sizes": {"codebook_size": (61, 40, 17)},
    "projection": {"codebook_dim": 8, "codebook_size": CODES, "num_quantizers": 3},
    "cosine": {"use_cosine_sim": True, "codebook_size": CODES, "num_quantizers": 3},
    "shared": {"shared_codebook": True, "codebook_size": CODES, "num_quantizers": 3},
    "dropout": {"quantize_dropout": True, "codebook_size": CODES, "num_quantizers": 3},
    "learnable": {**LEARNABLE, "codebook_size": CODES, "num_quantizers": 3},
    "influence": {"quant_grad_frac": 0.5, "codebook_size": CODES, "num_quantizers": 3},
}


@pytest.mark.parametrize("option", RESIDUAL)
@pytest.mark.parametrize("steps", [0, 5])
def test_residual_options(option, steps):
    assert compare_subject(subject(ResidualVQ(dim=DIM, **RESIDUAL[option])), steps).ties <= 1


@pytest.mark.parametrize("training", [False, True])
def test_residual_results(training):
    layer = ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=CODES).train(training)
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    x = torch.randn(2, 50, DIM)
    for arguments in ({}, {"return_all_codes": True}, {"mask": MASK}):
        results, expected = fused(x, **arguments), layer(x, **arguments)
        for a, b in zip(results, expected, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def test_residual_gradient_of_codebooks_in_evaluation():
    layer = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, **LEARNABLE).eval()
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    x = torch.randn(1, 50, DIM)
    for each in (layer, fused):
        each(x)[0].square().sum().backward()
    for a, b in zip(fused.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_beams_and_neural_codebooks_stay():
    x = torch.randn(1, 20, DIM)
    for arguments in ({"beam_size": 2}, {"implicit_neural_codebook": True}):
        layer = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, **arguments).eval()
        fused = copy.deepcopy(layer)
        fuse(fused, verbose=False)
        for a, b in zip(fused(x), layer(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rotation_trick": False},
        {"channel_first": True},
        {"frozen_codebook_dim": 8},
        {"codebook_transform": nn.Sequential(nn.Linear(DIM, 24), nn.ReLU(), nn.Linear(24, DIM))},
    ],
)
def test_sim_vq(arguments):
    layer = SimVQ(DIM, CODES, **arguments)
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    x = torch.randn(2, DIM, 5, 6) if "channel_first" in arguments else torch.randn(2, 30, DIM)
    gradients = []
    for each in (layer, fused):
        z = x.clone().requires_grad_()
        quantized, indices, loss = each(z)
        gradients.append(
            [quantized, indices, loss, *torch.autograd.grad(quantized.sum() + loss, [z, *each.parameters()])]
        )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_hierarchical_vq_through_its_layers():
    layer = HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(2, 4, 8), kmeans_init=False).eval()
    fused = copy.deepcopy(layer)
    assert fuse(fused, verbose=False).fused
    x = torch.randn(2, DIM, 8)
    with recorded() as searches:
        results = fused(x)
    assert len(searches) == 3
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(results), leaves(layer(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_layer():
    layer = VectorQuantize(DIM, CODES)
    x = torch.randn(2, 50, DIM).bfloat16()
    fused = copy.deepcopy(layer)
    fuse(fused, verbose=False)
    quantized, indices, _ = fused.eval()(x)
    distances = (x.double().unsqueeze(2) - layer.codebook.double()).square().sum(-1)
    assert torch.equal(indices, distances.argmin(-1))
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(quantized, F.embedding(indices, layer.codebook).bfloat16())
