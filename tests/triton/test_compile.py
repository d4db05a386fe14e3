"""Every kernel, as the operations launch it, compiles for NVIDIA GPUs; no GPU is needed for that."""

import re

import pytest
import torch

from vqkernels.triton.code_statistics import code_statistics
from vqkernels.triton.ema_update import ema_update_
from vqkernels.triton.residual_quantize import residual_quantize, residual_quantize_backward, residual_statistics
from vqkernels.triton.topk_codes import topk_codes
from vqkernels.triton.vector_quantize import vector_quantize, vector_quantize_backward


@pytest.mark.parametrize(
    ("capability", "dtype", "dim"),
    [
        (90, torch.float32, 64),
        (90, torch.float32, 130),
        (90, torch.bfloat16, 8),
        (90, torch.float64, 12),
        (80, torch.float16, 3),
    ],
)
def test_compiles(capability, dtype, dim, compiled):
    programs = compiled(capability)
    z, codebook = torch.zeros(2, 40, dim, dtype=dtype), torch.zeros(2, 70, dim, dtype=dtype)
    for mask in (None, torch.ones(2, 40, dtype=torch.bool)):
        _, _, mse, valid_rows = vector_quantize(z, codebook, "l2", mask)
    indices = torch.zeros(2, 40, dtype=torch.int64)
    for gradient in ("straight_through", "rotation", "none"):
        vector_quantize_backward(z, mse, z, codebook, indices, valid_rows, gradient)
    code_statistics(z, indices, 70)
    topk_codes(z, codebook, 5, "l2", None)
    levels, sizes = torch.zeros(2, 40, 3, dtype=torch.int64), [20, 1, 49]
    for mask, given in ((None, None), (torch.ones(2, 40, dtype=torch.bool), None), (None, levels)):
        _, _, mse, valid_rows = residual_quantize(z, codebook, sizes, "cosine", mask, None, given)
    for gradient in ("straight_through", "rotation", "none"):
        residual_quantize_backward(z, mse, z, codebook, sizes, levels, valid_rows, gradient)
    residual_statistics(z, codebook, sizes, levels)
    state, size = torch.zeros(2, 70, dim), torch.zeros(2, 70)
    ema_update_(state, size, state.clone(), size.long(), state.clone(), 0.9, 1e-5)
    assert {key[0] for key in programs} == {
        "_column_sum_kernel",
        "_quantize_backward_kernel",
        "_quantize_kernel",
        "_residual_backward_kernel",
        "_residual_quantize_kernel",
        "_search_kernel",
        "_squared_norm_kernel",
        "_sum_codes_kernel",
        "_sum_runs_kernel",
        "_topk_kernel",
        "_update_codes_kernel",
        "_update_sizes_kernel",
    }
    for program in programs.values():
        instructions = set(re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.:]*)\s", program.ptx, re.MULTILINE))
        assert any(i.startswith("st.global") for i in instructions)
        # Neither tensor cores, nor atomics, nor anything approximate or flushed to zero.
        assert not [i for i in instructions if re.search(r"mma|tf32|^atom|^red\.|approx|ftz|div\.full", i)]
