"""LFQ and its residual layers against vector-quantize-pytorch, sign bits, entropies in float64, and their promises."""

import math
import subprocess
import sys

import pytest
import torch
import vector_quantize_pytorch as theirs
from vq_upstream import (
    EPS,
    LargestTensor,
    NoHostSync,
    assert_close,
    assert_same_signatures,
    assert_same_step,
    flat,
    pair,
    step,
)

from vqkernels import nn, reference
from vqkernels.reference import _checks, lookup_free

OPTIONS = {
    "default": {},
    "commitment": {"commitment_loss_weight": 0.3},
    "projected": {"dim": 7},
    "projected_without_bias": {"dim": 7, "projection_has_bias": False},
    "projected_on_demand": {"has_projections": True},
    "cosine_projected": {"dim": 7, "cosine_sim_project_in": True},
    "cosine_projected_scale": {"dim": 7, "cosine_sim_project_in": True, "cosine_sim_project_in_scale": 2.0},
    "codebooks": {"num_codebooks": 2, "commitment_loss_weight": 0.3},
    "codebooks_projected": {"num_codebooks": 2, "dim": 5},
    "kept_dimension": {"keep_num_codebooks_dim": True},
    "scale": {"codebook_scale": 0.5},
    "diversity": {"diversity_gamma": 0.4, "entropy_loss_weight": 1.0},
    "soft_clamp": {"soft_clamp_input_value": 1.5},
    "softplus": {"experimental_softplus_entropy_loss": True, "entropy_loss_offset": 2.0},
    "spherical": {"spherical": True, "commitment_loss_weight": 0.3},
    "spherical_scale": {"spherical": True, "codebook_scale": 0.5},
    "rotated": {"orthogonal_rotation": True},
    "activation": {"straight_through_activation": torch.nn.Tanh()},
    "unforced": {"force_quantization_f32": False},
}
RESIDUAL_OPTIONS = {
    "default": {},
    "projected": {"dim": 7},
    "soft_clamp": {"soft_clamp_input_value": 1.5},
    "commitment": {"commitment_loss_weight": 0.3, "spherical": True},
}
SIZE = 16

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def inputs(layer, *positions, channel_first=False):
    # Small, so that probabilities are neither 0 nor 1.
    x = 0.1 * torch.randn(*positions, layer.dim)
    return x.movedim(-1, 1) if channel_first else x


def entropies(z, mask=None, inv_temperature=100.0):
    """Per sample and of the mean distribution, by the definition, in float64; codes are all corners of the cube."""
    bits = z.shape[-1]
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * bits).reshape(-1, bits)
    z = z.detach().double().reshape(-1, bits)
    if mask is not None:
        z = z[mask.flatten()]
    share = (-inv_temperature * torch.cdist(z, codes).square()).softmax(-1)

    def entropy(p):
        return -(p * p.clamp(min=1e-5).log()).sum(-1)

    return entropy(share).mean(), entropy(share.mean(0))


def test_signatures_agree():
    assert_same_signatures(nn.LFQ, theirs.LFQ, identities=("straight_through_activation",))
    assert_same_signatures(nn.ResidualLFQ, theirs.ResidualLFQ, extra=("num_levels",))
    assert_same_signatures(nn.GroupedResidualLFQ, theirs.GroupedResidualLFQ)
    assert nn.LFQ is reference.LFQ


@each_option
@pytest.mark.parametrize("train", [True, False])
def test_equals_upstream(options, train):
    layer, upstream = pair(nn.LFQ, theirs.LFQ, codebook_size=SIZE, **options)
    layer.train(train), upstream.train(train)
    x = inputs(layer, 3, 20)
    # The loss and its gradient come from exponentials of numbers of up to 2 * 100 |x|_1, wrong by so many roundings.
    factor = 2 * 100 * 4
    results = assert_same_step(layer, upstream, x, factor, return_loss_breakdown=True, inv_temperature=100.0)
    assert_close(layer.indices_to_codes(results[1]), upstream.indices_to_codes(results[1]))
    assert_close(layer.indices_to_codes(results[1], False), upstream.indices_to_codes(results[1], False))
    assert torch.equal(layer.codebook, upstream.codebook)


def test_results_have_names():
    layer = nn.LFQ(dim=4)
    result, breakdown = layer(inputs(layer, 2, 5), return_loss_breakdown=True)
    assert result._fields == ("quantized", "indices", "entropy_aux_loss")
    assert breakdown._fields == ("per_sample_entropy", "batch_entropy", "commitment")


@pytest.mark.parametrize("options", [{}, {"num_codebooks": 2, "dim": 5}], ids=["one", "codebooks"])
@pytest.mark.parametrize(
    ("channel_first", "positions"),
    [(True, (2, 6)), (None, (2, 3, 4)), (True, (2, 3, 4)), (None, (1, 2, 3, 4)), (False, (2, 6))],
)
def test_layouts(options, channel_first, positions):
    layer, upstream = pair(nn.LFQ, theirs.LFQ, codebook_size=SIZE, channel_first=channel_first, **options)
    first = len(positions) > 2 if channel_first is None else channel_first
    x = inputs(layer, *positions, channel_first=first)
    quantized, indices, _ = assert_same_step(layer, upstream, x, factor=800)
    assert quantized.shape == x.shape
    assert_close(layer.indices_to_codes(indices), quantized)
    assert torch.equal(layer.indices_to_codes(indices), upstream.indices_to_codes(indices))


def test_indices_are_the_sign_bits():
    layer = nn.LFQ(dim=6)
    x = torch.randn(1, 300, 6)
    x[0, 0] = 0.0
    quantized, indices, _ = layer(x)
    for row, index, code in zip(x[0].tolist(), indices[0].tolist(), quantized[0].tolist(), strict=True):
        assert index == int("".join("1" if value > 0 else "0" for value in row), 2)
        assert code == [1.0 if value > 0 else -1.0 for value in row]
    assert (layer.indices_to_codes(torch.tensor([[-1]])) == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 20.0, 100.0])
def test_entropies_in_float64(temperature):
    layer, upstream = pair(nn.LFQ, theirs.LFQ, dim=5)
    x = inputs(layer, 4, 30)
    expected = torch.stack(entropies(x, inv_temperature=temperature))
    errors = []
    for module in (layer, upstream):
        breakdown = module(x, inv_temperature=temperature, return_loss_breakdown=True)[1]
        errors.append((torch.stack(breakdown[:2]).double() - expected).abs().max())
    assert errors[0] <= 2 * errors[1] + 4 * EPS * expected.max()


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 6, 5)])
@pytest.mark.parametrize("options", [{}, {"num_codebooks": 2}], ids=["one", "codebooks"])
def test_a_masked_batch_has_the_loss_of_its_unmasked_rows(shape, options):
    layer = nn.LFQ(codebook_size=SIZE, commitment_loss_weight=0.5, entropy_loss_weight=1.0, **options)
    x = inputs(layer, 4, 6, 5, channel_first=True)
    mask = torch.arange(math.prod(shape)).reshape(shape) % 3 > 0
    rows = x.movedim(1, -1)[mask].reshape(1, -1, layer.dim)
    padded = x.movedim(1, -1).clone()
    padded[~mask] = torch.nan
    padded = padded.movedim(-1, 1).requires_grad_()
    rows.requires_grad_()
    masked, alone = layer(padded, mask=mask), layer(rows)
    assert_close(masked.entropy_aux_loss, alone.entropy_aux_loss, factor=800)
    masked.entropy_aux_loss.backward()
    alone.entropy_aux_loss.backward()
    grad = padded.grad.movedim(1, -1)
    assert_close(grad[mask].reshape(rows.shape), rows.grad, factor=800)
    assert (grad[~mask] == 0).all()


def test_masks_of_whole_samples_equal_upstream():
    layer, upstream = pair(nn.LFQ, theirs.LFQ, dim=4, commitment_loss_weight=0.5)
    x, mask = inputs(layer, 4, 6, 5, channel_first=True), torch.tensor([True, False, True, True])
    assert_same_step(layer, upstream, x, factor=800, mask=mask, return_loss_breakdown=True)


def test_a_fully_masked_batch_has_no_loss():
    layer = nn.LFQ(dim=4, commitment_loss_weight=1.0)
    x = torch.full((2, 5, 4), torch.nan, requires_grad=True)
    loss = layer(x, mask=torch.zeros(2, 5, dtype=torch.bool)).entropy_aux_loss
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_entropies_of_a_share_of_the_rows(share, masked, monkeypatch):
    layer = nn.LFQ(dim=5, frac_per_sample_entropy=share)
    x, mask = inputs(layer, 4, 30), torch.rand(4, 30) < 0.7 if masked else None
    keys = torch.randperm(120) / 120
    monkeypatch.setattr(torch, "rand", lambda *size, **options: keys.clone())
    breakdown = layer(x, mask=mask, return_loss_breakdown=True)[1]
    possible = torch.ones(120, dtype=torch.bool) if mask is None else mask.flatten()
    num = int(possible.sum() * share)
    chosen = keys.masked_fill(~possible, -1).topk(num).indices
    expected = entropies(x.reshape(-1, 5)[chosen])
    for actual, value in zip(breakdown[:2], expected, strict=True):
        assert_close(actual.double(), value, factor=800)


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_rows_change_neither_values_nor_gradients(masked, monkeypatch):
    layer = nn.LFQ(codebook_size=256, num_codebooks=2, dim=11, entropy_loss_weight=1.0)
    x, arguments = inputs(layer, 2, 500), {"return_loss_breakdown": True}
    if masked:
        arguments["mask"] = torch.rand(2, 500) < 0.7
    sizes, results = [], []
    for pairs in (2**24, 2**13):
        monkeypatch.setattr(lookup_free, "PAIRS_AT_A_TIME", pairs)
        with LargestTensor() as largest:
            results.append(step(layer, x, **arguments))
        sizes.append(largest.elements)
    assert sizes[0] == 1000 * 2 * 256
    assert sizes[1] <= max(2**13, x.numel() * 2)
    (whole, whole_grads), (chunks, chunk_grads) = results
    for a, b in zip(flat(chunks) + chunk_grads, flat(whole) + whole_grads, strict=True):
        assert_close(a, b, factor=800)


def test_gradients_in_float64():
    layer = nn.LFQ(dim=3, commitment_loss_weight=0.5, entropy_loss_weight=1.0).double()
    x = 0.3 * torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: layer(z, inv_temperature=2.0).entropy_aux_loss, x)
    assert layer(x).entropy_aux_loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_modules(dtype):
    for layer in (nn.LFQ(dim=5, spherical=True), nn.ResidualLFQ(dim=5, codebook_size=32, num_quantizers=4)):
        x = torch.randn(2, 100, 5).to(dtype)
        expected, indices, loss = layer(x.float())
        quantized, low_indices, low_loss = layer.to(dtype)(x)
        assert torch.equal(low_indices, indices)
        assert torch.equal(low_loss, loss)
        assert torch.equal(quantized, expected.to(dtype))
    projected = nn.ResidualLFQ(dim=7, codebook_size=32, num_quantizers=4).to(dtype)
    quantized, indices, _ = projected(torch.randn(2, 20, 7, dtype=dtype))
    assert quantized.dtype == dtype
    assert torch.equal(projected.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("options", RESIDUAL_OPTIONS.values(), ids=RESIDUAL_OPTIONS)
@pytest.mark.parametrize("train", [True, False])
def test_residual_equals_upstream(options, train):
    options = {"dim": 4, **options}
    layer, upstream = pair(nn.ResidualLFQ, theirs.ResidualLFQ, codebook_size=SIZE, num_quantizers=3, **options)
    layer.train(train), upstream.train(train)
    results = step(layer, x := inputs(layer, 3, 20))[0]
    arguments = {"mask": torch.tensor([True, False, True])} if train else {}
    if layer.layers[0].spherical:
        assert_same_step(layer, upstream, x, factor=800, **arguments)
    else:
        assert_same_step(layer, upstream, x, factor=800, return_all_codes=True, **arguments)
        assert_close(layer.codebooks, upstream.codebooks)
    assert_close(layer.get_output_from_indices(results[1]), results[0])


@pytest.mark.parametrize(("cutoff", "multiple"), [(0, 1), (1, 1), (0, 2), (2, 3)])
def test_residual_dropout_with_a_seed_equals_upstream(cutoff, multiple):
    layer, upstream = pair(
        nn.ResidualLFQ,
        theirs.ResidualLFQ,
        dim=6,
        codebook_size=SIZE,
        num_quantizers=5,
        quantize_dropout=True,
        quantize_dropout_cutoff_index=cutoff,
        quantize_dropout_multiple_of=multiple,
    )
    x = inputs(layer, 2, 10)
    for seed in range(8):
        results = assert_same_step(
            layer, upstream, x, factor=800, return_all_codes=True, rand_quantize_dropout_fixed_seed=seed
        )
        assert_close(layer.get_output_from_indices(results[1]), results[0])


def test_residual_images():
    layer, upstream = pair(nn.ResidualLFQ, theirs.ResidualLFQ, dim=4, codebook_size=SIZE, num_quantizers=3)
    x = inputs(layer, 2, 3, 5, channel_first=True)
    quantized, indices, _ = assert_same_step(layer, upstream, x, factor=800)
    assert indices.shape == (2, 3, 5, 3)
    assert_close(layer.get_output_from_indices(indices), quantized.movedim(1, -1))
    projected = nn.ResidualLFQ(dim=7, codebook_size=SIZE, num_quantizers=3, quantize_dropout=True)
    x = inputs(projected, 2, 3, 5)
    quantized, indices, losses = projected(x.movedim(-1, 1), rand_quantize_dropout_fixed_seed=1)
    expected = projected(x.flatten(1, 2), rand_quantize_dropout_fixed_seed=1)
    assert_close(quantized.movedim(1, -1).flatten(1, 2), expected[0])
    assert torch.equal(indices.flatten(1, 2), expected[1])
    assert_close(losses, expected[2], factor=800)


def test_groups_equal_upstream():
    layer, upstream = pair(
        nn.GroupedResidualLFQ, theirs.GroupedResidualLFQ, dim=12, groups=2, codebook_size=SIZE, num_quantizers=3
    )
    results = assert_same_step(layer, upstream, inputs(layer, 2, 10), factor=800, return_all_codes=True)
    assert_close(layer.get_output_from_indices(results[1]), upstream.get_output_from_indices(results[1]))
    assert_close(layer.codebooks, upstream.codebooks)
    images = nn.GroupedResidualLFQ(dim=8, groups=2, accept_image_fmap=True, codebook_size=SIZE, num_quantizers=3)
    x = inputs(images, 2, 3, 5, channel_first=True)
    quantized, indices, _ = images(x)
    assert quantized.shape == x.shape
    assert_close(images.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("train", [True, False])
def test_no_step_waits_for_the_device(train, monkeypatch):
    # A check of index values that leaves tensors of other devices alone. Here all are on the CPU.
    monkeypatch.setattr(_checks, "check_index_range", lambda indices, num_codes: None)
    residual = {"codebook_size": SIZE, "num_quantizers": 3, "quantize_dropout": True}
    layers = [
        nn.LFQ(dim=4, frac_per_sample_entropy=0.5, commitment_loss_weight=0.5),
        nn.ResidualLFQ(dim=4, **residual),
        nn.GroupedResidualLFQ(dim=8, groups=2, **residual),
    ]
    for layer in layers:
        x = inputs(layer.train(train), 2, 10).requires_grad_()
        with NoHostSync():
            quantized, indices, loss = layer(x, mask=torch.rand(2, 10) < 0.7)
            if train:
                (quantized.sum() + loss.sum()).backward()
            decode = layer.indices_to_codes if isinstance(layer, nn.LFQ) else layer.get_output_from_indices
            decode(indices)


PROCESS = """
import sys, torch
from vqkernels import nn
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
layer, x, mask = torch.load(f"{folder}/inputs.pt", weights_only=False)
part = x.chunk(world)[rank].clone().requires_grad_()
breakdown = layer(part, mask=mask.chunk(world)[rank], return_loss_breakdown=True)[1]
breakdown.batch_entropy.backward()
torch.manual_seed(rank)
dropping = nn.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=5, quantize_dropout=True)
levels = torch.stack([(dropping(part)[1] >= 0).sum(-1).flatten() for _ in range(10)])
torch.save((breakdown.batch_entropy.detach(), part.grad, levels), f"{folder}/{rank}.pt")
"""


def test_processes_share_the_mean_distribution_and_the_dropped_levels(tmp_path):
    layer = nn.LFQ(dim=4)
    x, mask = inputs(layer, 4, 15).requires_grad_(), torch.rand(4, 15) < 0.8
    mask[:2, 3:] = False
    expected = layer(x, mask=mask, return_loss_breakdown=True)[1].batch_entropy
    expected.backward()
    torch.save((layer, x.detach(), mask), tmp_path / "inputs.pt")
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    (first, grad_0, levels_0), (second, grad_1, levels_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert_close(first, expected.detach(), factor=800)
    # Every process has the same loss, so that its gradient counts for each of them.
    assert_close(torch.cat([grad_0, grad_1]), 2 * x.grad, factor=800)
    assert torch.equal(levels_0, levels_1)
    assert len(levels_0.unique()) > 1


BAD_ARGUMENTS = {
    "nothing": ("dim, codebook_size", {}),
    "power": ("codebook_size", {"codebook_size": 12}),
    "one": ("codebook_size", {"codebook_size": 1}),
    "dim": ("dim", {"dim": 0}),
    "share": ("frac_per_sample_entropy", {"dim": 4, "frac_per_sample_entropy": 0}),
    "share_range": ("frac_per_sample_entropy", {"dim": 4, "frac_per_sample_entropy": 1.5}),
    "clamp": ("soft_clamp_input_value", {"dim": 4, "soft_clamp_input_value": 0.5}),
    "projections": ("has_projections", {"dim": 5, "codebook_size": 16, "has_projections": False}),
    "kept": ("keep_num_codebooks_dim", {"dim": 4, "num_codebooks": 2, "keep_num_codebooks_dim": False}),
}


@pytest.mark.parametrize(("name", "options"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(name, options):
    with pytest.raises(ValueError, match=f"^{name}"):
        nn.LFQ(**options)


def test_bad_input():
    layer = nn.LFQ(dim=4)
    for x in (torch.randn(2, 3, 5), torch.randn(4), torch.randn(2, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"^x: expected shape"):
            layer(x)
    with pytest.raises(TypeError, match=r"^x: expected a tensor"):
        layer(torch.zeros(2, 3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^mask"):
        layer(torch.zeros(2, 3, 4), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^mask"):
        layer(torch.zeros(2, 3, 4), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(IndexError, match=r"^indices"):
        layer.indices_to_codes(torch.tensor([[16]]))
    for name, options in (("num_codebooks", {"num_codebooks": 2}), ("has_projections", {"has_projections": True})):
        with pytest.raises(ValueError, match=f"^{name}"):
            nn.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=2, **options)
