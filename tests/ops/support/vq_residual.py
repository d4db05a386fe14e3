"""Inputs of residual quantization, and its emulation for one head in numpy, level by level from `vq_emulation`."""

import numpy as np
import torch
import vq_emulation
from vq_cases import make_inputs, same_bits


def residual_quantize(z, codebooks, metric="l2", mask=None, num_levels=None):
    """float32 z [n, dim] and codebooks [k, dim] -> quantized, indices [n, Q], mse [Q], valid rows [Q], residuals."""
    residual = z.copy()
    runs = np.ones(len(z), bool) if mask is None else mask.copy()
    quantized = np.zeros_like(z)
    indices, mse, valid, residuals = [], [], [], []
    for level, codes in enumerate(codebooks):
        if num_levels is not None:
            runs = runs & (level < num_levels)
        residuals.append(residual.copy())
        found = np.where(runs, vq_emulation.nearest_code(residual, codes, metric)[0], -1)
        _, error = vq_emulation.vector_quantize(residual, codes, found)
        chosen = found >= 0
        gathered = codes[np.maximum(found, 0)]
        quantized[runs & ~chosen] = np.nan
        with np.errstate(all="ignore"):
            total = gathered if level == 0 else quantized + gathered
            quantized = np.where(chosen[:, None], total, quantized)
            residual = np.where(chosen[:, None], residual - gathered, residual)
        runs = chosen
        indices.append(found)
        mse.append(error)
        valid.append(chosen.sum())
    return quantized, np.stack(indices, 1), np.array(mse, np.float32), np.array(valid), residuals


def level_inputs(kind, rows, sizes, dim, dtype=torch.float32, codebook_dtype=None):
    z = make_inputs(kind, rows, sizes[0], dim)[0].to(dtype)
    codes = [make_inputs(kind, rows, size, dim, seed=q)[1] * 0.7**q for q, size in enumerate(sizes)]
    return z, [c.to(codebook_dtype or dtype) for c in codes]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        if isinstance(a, tuple):
            assert_same(a, b)
        else:
            assert (a is None and b is None) or same_bits(a.detach(), b.detach())
