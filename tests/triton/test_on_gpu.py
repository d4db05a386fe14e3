"""What only a GPU shows: it is not waited for, sizes need no new compilation, offsets pass 32 bits, fma rounds once."""

import pytest
import torch

import vqkernels
from vqkernels.triton import (
    code_statistics,
    ema_update,
    nearest_code,
    residual_quantize,
    topk_codes,
    vector_quantize,
)

pytestmark = pytest.mark.gpu


def step(rows, codes, device):
    z = torch.randn(rows, 64, device=device, requires_grad=True)
    state = [torch.randn(codes, 64, device=device), torch.ones(codes, device=device)]
    result = vqkernels.vector_quantize(z, state[0], gradient="rotation", statistics=True, backend="triton")
    (result.quantized.sum() + result.loss).backward()
    vqkernels.ema_update_(*state, state[0].clone(), result.counts, result.sums, decay=0.99, eps=1e-5, backend="triton")
    levels = [torch.randn(size, 64, device=device, requires_grad=True) for size in (codes, 5)]
    options = {"mask": torch.rand(rows, device=device) < 0.9, "statistics": True, "backend": "triton"}
    options["num_levels"] = torch.randint(0, 3, (rows,), device=device)
    for gradient, beam_size in (("rotation", None), ("none", 3)):
        result = vqkernels.residual_quantize(z, levels, gradient=gradient, beam_size=beam_size, **options)
        (result.quantized.sum() + result.losses.sum()).backward()


def test_never_waits_for_the_device(device):
    step(100, 70, device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(100, 70, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_once_for_all_sizes(device):
    kernels = [
        nearest_code._search_kernel,
        nearest_code._squared_norm_kernel,
        code_statistics._sum_runs_kernel,
        code_statistics._sum_codes_kernel,
        ema_update._update_sizes_kernel,
        ema_update._update_codes_kernel,
        vector_quantize._quantize_kernel,
        vector_quantize._quantize_backward_kernel,
        residual_quantize._residual_quantize_kernel,
        residual_quantize._residual_backward_kernel,
        topk_codes._topk_kernel,
    ]
    step(128, 64, device)
    cached = [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]
    for rows, codes in ((1, 1), (7, 3), (1000, 77), (4096, 2048)):
        step(rows, codes, device)
    assert [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels] == cached


def test_offsets_beyond_32_bits(device):
    """The last rows of more than 2^31 elements, against the same rows alone."""
    rows, dim = 2**25 + 100, 64
    z = torch.randn(1000, dim, device=device, dtype=torch.bfloat16).repeat(rows // 1000 + 1, 1)[:rows]
    codebook = torch.randn(20, dim, device=device)
    whole = vqkernels.vector_quantize(z, codebook, statistics=True, backend="triton")
    last = vqkernels.vector_quantize(z[-1000:].clone(), codebook, backend="triton")
    assert torch.equal(whole.indices[-1000:], last.indices)
    assert torch.equal(whole.quantized[-1000:], last.quantized)
    assert whole.counts.sum() == rows
    expected = torch.zeros(20, dim, dtype=torch.float64, device=device)
    for part, indices in zip(z.split(2**20), whole.indices.split(2**20), strict=True):
        expected.index_add_(0, indices, part.double())
    # Runs of 256 rows in float32, each element at most 8, then one rounding.
    assert ((whole.sums - expected).abs() <= 2.0**-24 * (256 * 8 * whole.counts.unsqueeze(-1) + expected.abs())).all()


@pytest.mark.parametrize("dim", [8, 128, 200])
def test_residual_quantize_equals_native(dim, device):
    """Products and sums come in the order of the contract, and a GPU rounds a multiply-add once."""
    z, codebooks = torch.randn(2, 500, dim), torch.randn(2, 4, 300, dim)
    options = {"num_levels": torch.randint(0, 5, (2, 500)), "statistics": True, "gradient": "rotation"}
    results, gradients = [], []
    for backend, where in ((None, "cpu"), ("triton", device)):
        rows = z.to(where).requires_grad_()
        moved = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        results.append(vqkernels.residual_quantize(rows, codebooks.to(where), **moved, backend=backend))
        gradients.append(torch.autograd.grad(results[-1].quantized.square().sum() + results[-1].losses.sum(), rows)[0])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*results, strict=True))
    assert torch.equal(gradients[0], gradients[1].cpu())


def test_topk_codes_equal_native(device):
    z, codebook = torch.randn(500, 33), torch.randn(300, 33).round()
    expected = vqkernels.topk_codes(z, codebook, 20)
    actual = vqkernels.topk_codes(z.to(device), codebook.to(device), 20, backend="triton")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, actual, strict=True))


def test_long_residuals_beyond_32_bits(device):
    """Residuals in a work tensor of more than 2^31 elements: the last rows, against the same rows alone."""
    rows, dim = 2**24 + 100, 136
    z = torch.randn(1000, dim, device=device, dtype=torch.bfloat16).repeat(rows // 1000 + 1, 1)[:rows]
    codebooks = torch.randn(2, 20, dim, device=device)
    whole = vqkernels.residual_quantize(z, codebooks, backend="triton")
    last = vqkernels.residual_quantize(z[-1000:].clone(), codebooks, backend="triton")
    assert torch.equal(whole.indices[-1000:], last.indices)
    assert torch.equal(whole.quantized[-1000:], last.quantized)


def test_ema_update_equals_native(device):
    """A GPU rounds a multiply-add once, and the order of all operations is that of the native kernels."""
    codes, dim = 1000, 65
    counts = torch.randint(0, 40, (codes,)) * (torch.rand(codes) < 0.7)
    sums = torch.randn(codes, dim) * counts.unsqueeze(-1)
    before = (torch.randn(codes, dim), 10 * torch.rand(codes), torch.randn(codes, dim), counts, sums)
    native, triton = ([t.to(d, copy=True) for t in before] for d in ("cpu", device))
    vqkernels.ema_update_(*native, decay=0.99, eps=1e-5)
    vqkernels.ema_update_(*triton, decay=0.99, eps=1e-5, backend="triton")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(triton, native, strict=True))


def test_operator_serves_cuda_tensors(device):
    """Through torch.ops: these kernels where the native library has none for CUDA, else its own."""
    z, codebook = torch.randn(1, 50, 8, device=device), torch.randn(1, 30, 8, device=device)
    indices, _ = torch.ops.vqkernels.nearest_code(z, codebook, "l2", None)
    assert torch.equal(indices.cpu(), torch.ops.vqkernels.nearest_code(z.cpu(), codebook.cpu(), "l2", None)[0])
