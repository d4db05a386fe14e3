"""Triton quantization: rows, loss and gradients against plain PyTorch in float64."""

import pytest
import torch
from vq_bound import UNIT_ROUNDOFF, wide
from vq_cases import DTYPES, METRICS, make_inputs, same_bits

import vqkernels
from vqkernels.triton.nearest_code import nearest_code
from vqkernels.triton.vector_quantize import vector_quantize, vector_quantize_backward

GRADIENTS = ("straight_through", "rotation", "none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 12, 65])
def test_rows_and_error(dim, dtype, device):
    for codes in (1, 7, 70):
        z, codebook = torch.randn(2, 35, dim).to(dtype), torch.randn(2, codes, dim).to(dtype)
        quantized, indices, mse, valid_rows = (
            t.cpu() for t in vector_quantize(z.to(device), codebook.to(device), "l2", None)
        )
        assert torch.equal(indices, nearest_code(z.to(device), codebook.to(device), "l2", None)[0].cpu())
        assert torch.equal(quantized, torch.stack([codebook[h][indices[h]] for h in range(2)]))
        assert (mse.shape, mse.dtype, valid_rows.dtype) == ((), wide(dtype), torch.int64)
        assert valid_rows == 70
        expected = (z.double() - quantized.double()).square().mean()
        # A difference counts twice, the square once, then the additions of a row and the quotient.
        assert (mse - expected).abs() <= (dim + 6) * UNIT_ROUNDOFF[wide(dtype)] * expected


@pytest.mark.parametrize("codebook_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype, codebook_dtype, device):
    z, codebook = torch.randn(1, 20, 6).to(dtype), torch.randn(1, 9, 6).to(codebook_dtype)
    quantized, indices, mse, _ = (t.cpu() for t in vector_quantize(z.to(device), codebook.to(device), "l2", None))
    assert torch.equal(quantized, codebook[0][indices].to(dtype))
    assert mse.dtype == (torch.float64 if torch.float64 in (dtype, codebook_dtype) else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_code(dtype, device):
    z, codebook = torch.randn(1, 40, 5).to(dtype), torch.randn(1, 6, 5).to(dtype)
    good = vqkernels.vector_quantize(z.to(device), codebook.to(device), backend="triton")
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, [2, 3, 30]] = False
    z[0, 3], z[0, 7, 1], z[0, 8, 4] = torch.nan, torch.nan, -torch.inf
    quantized, indices, mse, valid_rows = (
        t.cpu() for t in vector_quantize(z.to(device), codebook.to(device), "l2", mask.to(device))
    )
    rest = torch.tensor([n for n in range(40) if n not in (2, 3, 7, 8, 30)])
    assert quantized[0, [2, 3, 30]].tolist() == [[0.0] * 5] * 3
    assert quantized[0, [7, 8]].isnan().all()
    assert indices[0, [2, 3, 7, 8, 30]].tolist() == [-1] * 5
    assert valid_rows == 35
    assert same_bits(quantized[0, rest], good.quantized[0, rest].detach().cpu())
    expected = (z[0, rest].double() - quantized[0, rest].double()).square().mean()
    assert (mse - expected).abs() <= 11 * UNIT_ROUNDOFF[wide(dtype)] * expected


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_quantize(rows, device):
    z = torch.full((1, rows, 3), torch.nan, device=device)
    codebook = torch.randn(1, 6, 3, device=device)
    quantized, indices, mse, valid_rows = vector_quantize(z, codebook, "l2", None)
    assert (quantized.shape, indices.tolist(), mse.item(), valid_rows.item()) == (z.shape, [[-1] * rows], 0, 0)
    ones = torch.ones((), device=device)
    grad_z = vector_quantize_backward(torch.ones_like(z), ones, z, codebook, indices, valid_rows, "rotation")
    assert torch.equal(grad_z, torch.zeros_like(z))


def run(z, codebook, grad, **options):
    """Result, and gradients of (quantized . grad + loss)."""
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    result = vqkernels.vector_quantize(z, codebook, commitment_weight=0.25, codebook_weight=2.0, **options)
    objective = (torch.where(result.indices.unsqueeze(-1) >= 0, result.quantized, 0) * grad).sum() + result.loss
    return result, *torch.autograd.grad(objective, (z, codebook))


def tolerance_of_rows(z, codebook, indices, grad, gradient, dtype):
    """A priori bound of the error of z's gradient: all sums have at most D + 1 terms of at most these magnitudes."""
    c = codebook[indices.clamp(min=0)]
    norm_z, norm_c, norm_g = (x.norm(dim=-1, keepdim=True) for x in (z, c, grad))
    size = norm_g
    if gradient == "rotation":
        # The sum of two directions loses digits where they nearly cancel; where they do so exactly it is exact.
        sum_norm = (z / norm_z + c / norm_c).norm(dim=-1, keepdim=True)
        size = norm_c / norm_z * norm_g * (1 + 16 / torch.where(sum_norm > 0, sum_norm, 1))
    size = size + 2 * 0.25 / z.numel() * (norm_z + norm_c)
    return (2 * z.shape[-1] + 16) * UNIT_ROUNDOFF[wide(dtype)] * size


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 12, 65])
def test_gradients_against_reference(dim, dtype, gradient, device):
    z, codebook = torch.randn(50, dim).to(dtype), torch.randn(7, dim).to(dtype)
    grad = torch.randn(50, dim).to(dtype)
    options = {"gradient": gradient, "metric": METRICS[dim % 3], "mask": torch.rand(50) < 0.9}
    expected, expected_z, expected_codebook = run(
        z.double(), codebook.double(), grad.double(), **options, backend="reference"
    )
    options["mask"] = options["mask"].to(device)
    actual, grad_z, grad_codebook = run(
        z.to(device), codebook.to(device), grad.to(device), **options, statistics=True, backend="triton"
    )
    assert torch.equal(actual.indices.cpu(), expected.indices)
    assert torch.equal(actual.quantized.cpu(), expected.quantized.to(dtype))
    assert grad_z.dtype == grad_codebook.dtype == dtype

    u, out = UNIT_ROUNDOFF[wide(dtype)], UNIT_ROUNDOFF[dtype]
    assert (actual.loss.cpu() - expected.loss).abs() <= (dim + 10) * u * expected.loss
    tolerance = tolerance_of_rows(z.double(), codebook.double(), expected.indices, grad.double(), gradient, dtype)
    assert ((grad_z.cpu() - expected_z).abs() <= 2 * tolerance + out * expected_z.abs()).all()
    # Sums of at most 50 rows, then a product and a difference with the code.
    largest = z.double().abs().amax() + codebook.double().abs().amax()
    tolerance = 50 * 60 * u * (4 / z.numel() * largest + grad.double().abs().amax()) + out * expected_codebook.abs()
    assert ((grad_codebook.cpu() - expected_codebook).abs() <= tolerance).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_options(gradient, device):
    """Absent gradients are zero; heads and views."""
    z, codebook = torch.randn(5, 33, 2, device=device).permute(2, 1, 0), torch.randn(2, 9, 5, device=device)
    grad = torch.randn(2, 5, 33, device=device).mT
    _, indices, mse, valid_rows = vector_quantize(z, codebook, "l2", None)
    weight = torch.ones_like(mse)

    def backward(g, w):
        return vector_quantize_backward(g, w, z, codebook, indices, valid_rows, gradient)

    commitment = backward(None, weight)
    codes = torch.stack([codebook[h][indices[h]] for h in range(2)])
    exact = 2 / z.numel() * (z.double() - codes.double())
    assert ((commitment - exact).abs() <= 4 * UNIT_ROUNDOFF[torch.float32] * exact.abs()).all()
    assert same_bits(backward(torch.zeros_like(grad), weight), commitment) or gradient == "rotation"
    assert torch.equal(backward(None, None), torch.zeros_like(z))
    through = backward(grad, None)
    if gradient == "straight_through":
        assert torch.equal(through, grad)
    elif gradient == "none":
        assert torch.equal(through, torch.zeros_like(z))
    else:
        ratio = codes.double().norm(dim=-1) / z.double().norm(dim=-1)
        assert torch.allclose(through.double().norm(dim=-1), ratio * grad.double().norm(dim=-1), rtol=1e-5)


def test_repeats_and_wild_indices(device):
    z, codebook = (t.unsqueeze(0).to(device) for t in make_inputs("normal", 100, 20, 12))
    first, second = (vector_quantize(z, codebook, "l2", None) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    _, indices, mse, valid_rows = first
    grads = [vector_quantize_backward(z, mse, z, codebook, indices, valid_rows, "rotation") for _ in range(2)]
    assert same_bits(*grads)
    # Nothing outside the codebook is read: such rows have no code.
    wild = indices.clone()
    wild[0, ::2] = 2**40
    grad_z = vector_quantize_backward(z, mse, z, codebook, wild, valid_rows, "rotation")
    assert torch.equal(grad_z[0, ::2], torch.zeros_like(grad_z[0, ::2]))
    assert same_bits(grad_z[0, 1::2], grads[0][0, 1::2])
