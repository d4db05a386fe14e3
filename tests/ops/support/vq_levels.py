"""Residual quantization and top-k codes, composed of operations on one level or one code."""

import torch
from torch import Tensor

import vqkernels  # noqa: F401 (loads the native library)

ops = torch.ops.vqkernels


def wide_type(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def of_heads(x: Tensor) -> list[Tensor]:
    return list(x.split(1))


def gather_codes(level: Tensor, indices: Tensor) -> Tensor:
    """Of a level [H, K, D], for indices [H, N] -> [H, N, D]; any code where the index is -1."""
    return level.gather(1, indices.clamp(min=0).unsqueeze(-1).expand(-1, -1, level.shape[-1]))


def residual_quantize(
    z: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    metric: str,
    mask: Tensor | None = None,
    num_levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As torch.ops.vqkernels.residual_quantize without given indices."""
    residual = z.to(wide_type(z))
    quantized = torch.zeros_like(residual)
    runs = torch.ones(z.shape[:2], dtype=torch.bool) if mask is None else mask
    indices, mse, valid_rows = [], [], []
    for q, level in enumerate(codebooks.to(residual.dtype).split(sizes, 1)):
        runs = runs if num_levels is None else runs & (q < num_levels)
        per_head = [
            ops.vector_quantize(*one, metric, one_runs)
            for *one, one_runs in zip(*map(of_heads, (residual, level, runs)), strict=True)
        ]
        codes, found, level_mse, level_valid = zip(*per_head, strict=True)
        indices.append(torch.cat(found))
        mse.append(torch.stack(level_mse))
        valid_rows.append(torch.stack(level_valid))
        codes = torch.cat(codes)
        quantized = torch.where(runs.unsqueeze(-1), codes if q == 0 else quantized + codes, quantized)
        runs = indices[-1] >= 0
        residual = torch.where(runs.unsqueeze(-1), residual - codes, residual)
    return quantized.to(z.dtype), torch.stack(indices, -1), torch.stack(mse, -1), torch.stack(valid_rows, -1)


def residual_quantize_backward(
    grad_quantized: Tensor | None,
    grad_mse: Tensor | None,
    z: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    indices: Tensor,
    valid_rows: Tensor,
    gradient: str,
) -> Tensor:
    residual = z.to(wide_type(z))
    grad = None if grad_quantized is None else grad_quantized.to(residual.dtype)
    total, begun = torch.zeros_like(residual), torch.zeros(z.shape[:2], dtype=torch.bool)
    for q, level in enumerate(codebooks.to(residual.dtype).split(sizes, 1)):
        term = torch.cat(
            [
                ops.vector_quantize_backward(
                    None if grad is None else grad[h : h + 1],
                    None if grad_mse is None else grad_mse[h, q],
                    residual[h : h + 1],
                    level[h : h + 1],
                    indices[h : h + 1, :, q].contiguous(),
                    valid_rows[h, q],
                    gradient,
                )
                for h in range(len(z))
            ]
        )
        has_code = indices[..., q] >= 0
        total = torch.where(has_code.unsqueeze(-1), torch.where(begun.unsqueeze(-1), total + term, term), total)
        begun = begun | has_code
        rest = residual - gather_codes(level, indices[..., q])
        residual = torch.where(has_code.unsqueeze(-1), rest, residual)
    return total.to(z.dtype)


def residual_statistics(z: Tensor, codebooks: Tensor, sizes: list[int], indices: Tensor) -> tuple[Tensor, Tensor]:
    residual = z.to(wide_type(z))
    counts, sums = [], []
    for q, level in enumerate(codebooks.to(residual.dtype).split(sizes, 1)):
        found = indices[..., q].contiguous()
        for values, out in zip(ops.code_statistics(residual, found, sizes[q]), (counts, sums), strict=True):
            out.append(values)
        rest = residual - gather_codes(level, found)
        residual = torch.where((found >= 0).unsqueeze(-1), rest, residual)
    return torch.cat(counts, 1), torch.cat(sums, 1)


def topk_codes(z: Tensor, codebook: Tensor, k: int, metric: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every code is searched alone, which gives its score; a stable sort keeps the lower of equal ones first."""
    scores = torch.stack([ops.nearest_code(z, code.contiguous(), metric, mask)[1] for code in codebook.split(1, 1)], -1)
    best, indices = scores.sort(dim=-1, descending=True, stable=True)
    missing = max(k - codebook.shape[1], 0)
    best = torch.nn.functional.pad(best[..., :k], (0, missing), value=-torch.inf)
    indices = torch.nn.functional.pad(indices[..., :k], (0, missing))
    return indices.masked_fill(best == -torch.inf, -1), best
