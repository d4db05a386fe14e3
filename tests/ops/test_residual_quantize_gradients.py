"""Gradients of residual quantization: numerically in double, level by level, and invariances."""

import itertools

import pytest
import torch
from vq_cases import DTYPES, LEVELS, cpu_level
from vq_residual import assert_same, level_inputs

import vqkernels

GRADIENTS = ("straight_through", "rotation", "none")


def separated(rows, dim=4, levels=3):
    """Codes far apart at every level and rows near their sums: a step of gradcheck changes no choice."""
    codebooks = torch.stack([torch.randn(4, dim, dtype=torch.float64) * 3 * 8.0**-q for q in range(levels)])
    z = sum(c[torch.randint(0, 4, (rows,))] for c in codebooks) + 1e-3 * torch.rand(rows, dim, dtype=torch.float64)
    return z, codebooks


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_losses(backend, masked):
    """One input and weight at a time, and one level: the residual counts as constant to the other codes."""
    z, codebooks = separated(6)
    options = {"num_levels": torch.tensor([3, 2, 0, 3, 1, 3]), "mask": torch.arange(6) != 3} if masked else {}

    def commitment(z):
        return vqkernels.residual_quantize(z, codebooks, commitment_weight=0.7, backend=backend, **options).losses

    assert torch.autograd.gradcheck(commitment, z.clone().requires_grad_())
    for level in range(3):

        def codebook_loss(codes, level=level):
            levels = [*codebooks[:level], codes, *codebooks[level + 1 :]]
            return vqkernels.residual_quantize(
                z, levels, commitment_weight=0.0, codebook_weight=1.3, backend=backend, **options
            ).losses[level]

        assert torch.autograd.gradcheck(codebook_loss, codebooks[level].clone().requires_grad_())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("heads", [False, True])
def test_gradcheck_of_gathered_rows(backend, heads):
    z, codebooks = separated(5)
    if heads:
        z, codebooks = torch.stack([z, z + 1e-4]), torch.stack([codebooks, codebooks])

    def gathered(codebooks):
        return vqkernels.residual_quantize(z, codebooks, gradient="none", backend=backend).quantized.square()

    assert torch.autograd.gradcheck(gathered, codebooks.clone().requires_grad_())


def gradients_of(z, codebooks, g, g_losses, **options):
    z, codebooks = z.clone().requires_grad_(), [c.clone().requires_grad_() for c in codebooks]
    result = vqkernels.residual_quantize(z, codebooks, **options)
    torch.autograd.backward([result.quantized, result.losses], [g, g_losses.to(result.losses.dtype)])
    return z.grad, *(c.grad for c in codebooks)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_gradients_are_sums_of_the_levels(gradient, z_dtype, codebook_dtype):
    """Of `vector_quantize` in float64 on the residuals, which has tests of its own."""
    z, codebooks = level_inputs("normal", 60, (9, 9, 5), 12, z_dtype, codebook_dtype)
    g, g_losses = torch.randn(60, 12).to(z_dtype), torch.tensor([1.0, -0.5, 2.0])
    weights = {"gradient": gradient, "commitment_weight": 0.25, "codebook_weight": 1.5}
    actual = gradients_of(z, codebooks, g, g_losses, **weights)
    wide = torch.float64 if torch.float64 in (z_dtype, codebook_dtype) else torch.float32
    indices = vqkernels.residual_quantize(z, codebooks).indices
    expected = [torch.zeros(60, 12, dtype=torch.float64)]
    residual = z.to(wide)
    for q, codes in enumerate(codebooks):
        rows, level = (t.detach().double().clone().requires_grad_() for t in (residual, codes))
        result = vqkernels.vector_quantize(rows, level, **weights)
        assert torch.equal(result.indices, indices[:, q])
        torch.autograd.backward([result.quantized, result.loss], [g.double(), g_losses[q].double()])
        expected[0] += rows.grad if rows.grad is not None else 0
        expected.append(level.grad)
        residual = residual - codes.detach()[indices[:, q]].to(wide)
    for value, wanted in zip(actual, expected, strict=True):
        result_type = torch.finfo(value.dtype)
        bound = (
            100 * torch.finfo(wide).eps * (1 + wanted.abs().max())
            + result_type.eps * wanted.abs()
            + result_type.eps * result_type.smallest_normal
        )
        assert torch.all((value.double() - wanted).abs() <= bound)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_equal_specification(gradient):
    z, codebooks = separated(40, levels=4)
    z[3] = torch.nan
    g, g_losses = torch.randn(40, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    options = {
        "gradient": gradient,
        "codebook_weight": 0.3,
        "num_levels": torch.arange(40) % 5,
        "mask": torch.arange(40) != 7,
    }
    actual = gradients_of(z, codebooks, g, g_losses, **options)
    expected = gradients_of(z, codebooks, g, g_losses, backend="reference", **options)
    for value, wanted in zip(actual, expected, strict=True):
        bound = 1000 * torch.finfo(torch.float64).eps * (1 + wanted.abs().max())
        assert torch.all((value - wanted).abs() <= bound)
    assert torch.equal(actual[0][3], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_agree_between_levels_and_threads(gradient, dtype):
    for rows, sizes, dim in [(5, (40, 7), 9), (600, (7, 7, 7), 65), (40, (30, 8), 8)]:
        z, codebooks = level_inputs("normal", rows, sizes, dim, dtype)
        g, g_losses = torch.randn(rows, dim).to(dtype), torch.randn(len(sizes))
        results = []
        for level, threads in itertools.product(LEVELS, (1, 2, 3, 1)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                results.append(gradients_of(z, codebooks, g, g_losses, gradient=gradient, codebook_weight=0.5))
        for result in results[1:]:
            assert_same(result, results[0])
