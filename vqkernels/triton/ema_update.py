"""The EMA update: the formula and the order of sums of csrc/cpu/ema_update.h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton._checks import check_base, check_like
from vqkernels.triton.arithmetic import column_sum, divide, tile

_BLOCK = 512


@triton.jit(do_not_specialize=["codes"])
def _update_sizes_kernel(
    cluster_size: tl.tensor, counts: tl.tensor, codes: tl.int64, weight: tl.float32, BLOCK: tl.constexpr
) -> None:
    code = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = code < codes
    size = tl.load(cluster_size + code, mask=inside, other=0.0)
    count = tl.load(counts + code, mask=inside, other=0).to(tl.float32)
    tl.store(cluster_size + code, tl.fma(tl.zeros_like(size) + weight, count - size, size), mask=inside)


@triton.jit(do_not_specialize=["heads", "codes"])
def _update_codes_kernel(
    codebook: tl.tensor,  # [heads, codes, dim]
    cluster_size: tl.tensor,  # [heads, codes]
    code_sum: tl.tensor,
    sums: tl.tensor,
    total_size: tl.tensor,  # [heads], float64
    heads: tl.int64,
    codes: tl.int64,
    dim: tl.int64,
    weight: tl.float32,
    eps: tl.float32,
    codes_eps: tl.float32,
    BLOCK_CODES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(dim, BLOCK_COLUMNS)
    code = program // column_blocks * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
    column = program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    code_inside = code < heads * codes
    size = tl.load(cluster_size + code, mask=code_inside, other=0.0)
    n = tl.load(total_size + code // codes, mask=code_inside, other=1.0).to(tl.float32)
    smoothed = divide(size + eps, n + codes_eps) * n

    place = (code * dim)[:, None] + column[None, :]
    inside = code_inside[:, None] & (column < dim)[None, :]
    old = tl.load(code_sum + place, mask=inside, other=0.0)
    new = tl.load(sums + place, mask=inside, other=0.0)
    moved = tl.fma(tl.zeros_like(old) + weight, new - old, old)
    tl.store(code_sum + place, moved, mask=inside)
    changes = (smoothed > 0)[:, None]
    divisor = tl.where(changes, smoothed[:, None], 1.0) + tl.zeros_like(moved)
    tl.store(codebook + place, divide(moved, divisor), mask=inside & changes)


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
) -> None:
    """Updates codebook [H, K, D], cluster_size [H, K] and code_sum [H, K, D] with counts [H, K] and sums [H, K, D]."""
    check_base("codebook", codebook, (torch.float32,), "[H, K, D]")
    heads, codes, dim = codebook.shape
    for name, value, shape, dtype in (
        ("cluster_size", cluster_size, (heads, codes), torch.float32),
        ("code_sum", code_sum, (heads, codes, dim), torch.float32),
        ("counts", counts, (heads, codes), torch.int64),
        ("sums", sums, (heads, codes, dim), torch.float32),
    ):
        check_like(name, value, (dtype,), shape, "codebook", codebook)

    # Views that are not contiguous are updated in a copy and written back.
    state = (codebook, cluster_size, code_sum)
    dense_codebook, dense_size, dense_sum = dense = tuple(t.contiguous() for t in state)
    weight = 1.0 - decay
    block, block_columns = tile(dim)
    with torch.cuda.device_of(codebook):
        _update_sizes_kernel[(triton.cdiv(heads * codes, _BLOCK),)](
            dense_size, counts.contiguous(), heads * codes, weight, BLOCK=_BLOCK
        )
        _update_codes_kernel[(triton.cdiv(heads * codes, block) * triton.cdiv(dim, block_columns),)](
            dense_codebook,
            dense_size,
            dense_sum,
            sums.contiguous(),
            column_sum(dense_size),
            heads,
            codes,
            dim,
            weight,
            eps,
            codes * eps,
            BLOCK_CODES=block,
            BLOCK_COLUMNS=block_columns,
        )
    for tensor, updated in zip(state, dense, strict=True):
        if updated is not tensor:
            tensor.copy_(updated)
    # A direct call does not pass the dispatcher, which does this for torch.ops.
    torch.autograd.graph.increment_version(state)
