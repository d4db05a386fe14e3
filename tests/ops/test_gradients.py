"""Gradients: numerically in double, against closed formulas, against an emulation bit for bit, and invariances."""

import itertools

import pytest
import torch
import vq_emulation
from vq_cases import DIMS, DTYPES, LEVELS, METRICS, cpu_level, same_bits

import vqkernels

GRADIENTS = ("straight_through", "rotation", "none")


def separated(rows, codes, dim, dtype=torch.float64):
    """Rows near codes far apart: a step of gradcheck changes no choice."""
    codebook = torch.randn(codes, dim, dtype=dtype) * 3
    z = codebook[torch.arange(rows) % codes] + 0.2 * torch.rand(rows, dim, dtype=dtype)
    return z, codebook


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradcheck_of_the_loss(metric, masked, backend):
    """The losses stop a gradient each, so numerical differences see them one at a time: one input, one weight."""
    z, codebook = separated(6, 3, 4)
    mask = torch.tensor([True, False, True, True, True, False]) if masked else None

    def commitment(z):
        return vqkernels.vector_quantize(
            z, codebook, metric=metric, mask=mask, commitment_weight=0.7, backend=backend
        ).loss

    def codebook_loss(codebook):
        return vqkernels.vector_quantize(
            z, codebook, metric=metric, mask=mask, commitment_weight=0.0, codebook_weight=1.3, backend=backend
        ).loss

    assert torch.autograd.gradcheck(commitment, z.clone().requires_grad_())
    assert torch.autograd.gradcheck(codebook_loss, codebook.clone().requires_grad_())


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradcheck_of_gathered_rows(heads, backend):
    z, codebook = separated(5, 3, 4)
    if heads:
        z, codebook = torch.stack([z, z + 1e-3]), torch.stack([codebook, codebook])

    def gathered(codebook):
        return vqkernels.vector_quantize(z, codebook, gradient="none", backend=backend).quantized.square()

    assert torch.autograd.gradcheck(gathered, codebook.clone().requires_grad_())


def gradients_of(z, codebook, g, gradient, g_loss=1.0, **options):
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    result = vqkernels.vector_quantize(z, codebook, gradient=gradient, **options)
    torch.autograd.backward([result.quantized, result.loss], [g, torch.tensor(g_loss, dtype=result.loss.dtype)])
    return z.grad, codebook.grad, result


def closed_formulas(z, codebook, indices, g, gradient, g_loss, commitment_weight, codebook_weight):
    """In float64, one row at a time; the rotation as a matrix (arXiv 2410.06424, section 4.2)."""
    z, codebook, g = z.double(), codebook.double(), g.double()
    grad_z, grad_codebook = torch.zeros_like(z), torch.zeros_like(codebook)
    elements = max(int((indices >= 0).sum()) * z.shape[1], 1)
    for i, k in enumerate(indices.tolist()):
        if k < 0:
            continue
        e, c = z[i], codebook[k]
        grad_z[i] = g_loss * commitment_weight * 2 / elements * (e - c)
        grad_codebook[k] += g_loss * codebook_weight * 2 / elements * (c - e)
        if gradient == "straight_through":
            grad_z[i] += g[i]
        elif gradient == "none":
            grad_codebook[k] += g[i]
        else:
            u, q = e / e.norm(), c / c.norm()
            r = (u + q) / (u + q).norm()
            rotation = torch.eye(len(e), dtype=e.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(q, u)
            assert torch.allclose(rotation @ e * (c.norm() / e.norm()), c)
            grad_z[i] += c.norm() / e.norm() * rotation.T @ g[i]
    return grad_z, grad_codebook


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_closed_formulas(gradient, backend, z_dtype, codebook_dtype):
    weights = {"commitment_weight": 0.25, "codebook_weight": 1.5}
    z, codebook, g = (
        torch.randn(60, 12).to(z_dtype),
        torch.randn(9, 12).to(codebook_dtype),
        torch.randn(60, 12).to(z_dtype),
    )
    grad_z, grad_codebook, result = gradients_of(z, codebook, g, gradient, 2.0, backend=backend, **weights)
    assert (grad_z.dtype, grad_codebook.dtype) == (z_dtype, codebook_dtype)
    expected = closed_formulas(z, codebook, result.indices, g, gradient, 2.0, **weights)
    accumulation = torch.float64 if torch.float64 in (z_dtype, codebook_dtype) else torch.float32
    for actual, wanted in zip((grad_z, grad_codebook), expected, strict=True):
        # Chains of about rows + dim operations on terms of the size of the largest, then one rounding of the result,
        # which among subnormals is absolute.
        result_type = torch.finfo(actual.dtype)
        bound = (
            100 * torch.finfo(accumulation).eps * (1 + wanted.abs().max())
            + result_type.eps * wanted.abs()
            + result_type.eps * result_type.smallest_normal
        )
        assert torch.all((actual.double() - wanted).abs() <= bound)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dim", DIMS)
def test_levels_equal_emulation(gradient, dim):
    z, codebook, g = torch.randn(70, dim), torch.randn(9, dim), torch.randn(70, dim)
    z[3], z[4], codebook[2] = 0, torch.nan, 0
    indices, _ = vq_emulation.nearest_code(z.numpy(), codebook.numpy())
    chosen = indices >= 0
    coefficient = 0.75 * 2 / (int(chosen.sum()) * dim)
    e, c = torch.where(torch.from_numpy(chosen)[:, None], z, 0).numpy(), codebook.numpy()[indices.clip(0)]
    if gradient == "rotation":
        expected = vq_emulation.rotation_gradient(e, c, g.numpy(), coefficient)
    else:
        expected = (g.numpy() if gradient == "straight_through" else 0) + torch.tensor(coefficient).numpy() * (e - c)
    expected = torch.from_numpy(expected).masked_fill(~torch.from_numpy(chosen)[:, None], 0)
    for level, threads in itertools.product(LEVELS, (1, 2, 3)):
        torch.set_num_threads(threads)
        with cpu_level(level):
            assert same_bits(gradients_of(z, codebook, g, gradient, 0.75)[0], expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_threads_and_runs_agree(gradient, dtype):
    for rows, codes, dim in [(5, 40, 9), (600, 7, 65), (40, 30, 8)]:
        z, codebook, g = (
            torch.randn(rows, dim).to(dtype),
            torch.randn(codes, dim).to(dtype),
            torch.randn(rows, dim).to(dtype),
        )
        results = []
        for level, threads in itertools.product(LEVELS, (1, 2, 3, 1)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                results.append(gradients_of(z, codebook, g, gradient, codebook_weight=0.5)[:2])
        for grad_z, grad_codebook in results[1:]:
            assert same_bits(grad_z, results[0][0])
            assert same_bits(grad_codebook, results[0][1])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_statistics_change_no_gradient(gradient):
    z, codebook, g = torch.randn(600, 8), torch.randn(3, 8), torch.randn(600, 8)
    without = gradients_of(z, codebook, g, gradient, codebook_weight=1.0)
    with_statistics = gradients_of(z, codebook, g, gradient, codebook_weight=1.0, statistics=True)
    assert same_bits(without[0], with_statistics[0])
    assert same_bits(without[1], with_statistics[1])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_strided_and_missing_gradients(gradient):
    z, codebook, g = torch.randn(40, 12), torch.randn(9, 12), torch.randn(12, 40).t()
    assert same_bits(gradients_of(z, codebook, g, gradient)[0], gradients_of(z, codebook, g.contiguous(), gradient)[0])
    expanded = torch.ones(()).expand(40, 12)
    assert same_bits(
        gradients_of(z, codebook, expanded, gradient)[1], gradients_of(z, codebook, expanded.clone(), gradient)[1]
    )
    rows = z.clone().requires_grad_()
    vqkernels.vector_quantize(rows, codebook, gradient=gradient).loss.backward()
    assert same_bits(rows.grad, gradients_of(z, codebook, torch.zeros(40, 12), gradient)[0])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_one_input_at_a_time(gradient):
    z, codebook, g = torch.randn(40, 12), torch.randn(9, 12), torch.randn(40, 12)
    both = gradients_of(z, codebook, g, gradient, codebook_weight=1.0)
    for wanted in (0, 1):
        inputs = [z.clone(), codebook.clone()]
        inputs[wanted].requires_grad_()
        result = vqkernels.vector_quantize(*inputs, gradient=gradient, codebook_weight=1.0)
        torch.autograd.backward([result.quantized, result.loss], [g, torch.tensor(1.0)])
        assert same_bits(inputs[wanted].grad, both[wanted])
        assert inputs[1 - wanted].grad is None


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_second_derivative_rather_than_a_wrong_one(gradient):
    z, codebook = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    result = vqkernels.vector_quantize(z, codebook, gradient=gradient, codebook_weight=1.0)
    grads = torch.autograd.grad(result.quantized.square().sum() + result.loss, [z, codebook], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        sum(grad.square().sum() for grad in grads).backward()


def test_outputs_that_need_no_gradient():
    result = vqkernels.vector_quantize(torch.randn(6, 4, requires_grad=True), torch.randn(5, 4), statistics=True)
    assert result.quantized.requires_grad
    assert result.loss.requires_grad
    assert not any(t.requires_grad for t in (result.indices, result.counts, result.sums))
    assert not vqkernels.nearest_code(torch.randn(6, 4, requires_grad=True), torch.randn(5, 4)).requires_grad


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_codebook_gradient_far_from_the_origin(backend):
    """Rows lie a thousand times farther from zero than from their codes: differences of sums would cancel."""
    z = 1000 + torch.randn(4096, 16)
    codebook = (z[:32] + 0.1 * torch.randn(32, 16)).requires_grad_()
    result = vqkernels.vector_quantize(z, codebook, commitment_weight=0.0, codebook_weight=1.0, backend=backend)
    result.loss.backward()
    members = torch.nn.functional.one_hot(result.indices, 32).double()
    differences = codebook.detach().double()[result.indices] - z.double()
    truth = members.T @ differences * (2 / z.numel())
    # Every row adds a product of two roundings to a sum of up to n_k terms.
    terms = members.T @ differences.abs() * (2 / z.numel())
    bound = (members.sum(0).clamp(max=256) + 8).unsqueeze(1) * torch.finfo(torch.float32).eps * terms
    assert torch.all((codebook.grad.double() - truth).abs() <= bound)


def test_statistics_are_the_callers():
    z = torch.randn(20, 3, requires_grad=True)
    codebook = torch.randn(5, 3, requires_grad=True)
    result = vqkernels.vector_quantize(z, codebook, codebook_weight=1.0, statistics=True)
    expected = torch.autograd.grad(result.loss, (z, codebook), retain_graph=True)
    result.counts.add_(1)
    result.sums.mul_(2)
    for actual, wanted in zip(torch.autograd.grad(result.loss, (z, codebook)), expected, strict=True):
        assert torch.equal(actual, wanted)
