"""Inputs that are hard on a search, and the instruction sets to meet them with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vqkernels import _C

LEVELS = _C.cpu_capabilities()
DIMS = (1, 3, 8, 12, 16, 17, 65, 257)
CODES = (1, 5, 6, 7, 63, 64, 65, 300)
ROWS = (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1025)
METRICS = ("l2", "cosine", "dot")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ("normal", "integers", "duplicates", "one_ulp", "subnormal", "zeros", "large", "broken")


@contextmanager
def cpu_level(level: str) -> Iterator[None]:
    """The native kernels read the variable at every call."""
    before = os.environ.get("VQKERNELS_CPU_CAPABILITY")
    os.environ["VQKERNELS_CPU_CAPABILITY"] = level
    try:
        assert _C.cpu_capability() == level
        yield
    finally:
        if before is None:
            del os.environ["VQKERNELS_CPU_CAPABILITY"]
        else:
            os.environ["VQKERNELS_CPU_CAPABILITY"] = before


def make_inputs(kind: str, rows: int, codes: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float32 z [rows, dim] and codebook [codes, dim]."""
    g = torch.Generator().manual_seed(seed)
    z, c = torch.randn(rows, dim, generator=g), torch.randn(codes, dim, generator=g)
    if kind == "integers":  # exact arithmetic: most scores are ties
        z, c = z.round().clamp(-1, 1), c.round().clamp(-1, 1)
        c[::2] = -0.0 * c[::2] if codes > 2 else c[::2]
    elif kind == "duplicates":
        c = c[torch.randint(0, max(1, codes // 3), (codes,), generator=g)]
        z = c[torch.randint(0, codes, (rows,), generator=g)] + 0.01 * z
    elif kind == "one_ulp":
        c = c[:1].expand(codes, dim).clone()
        c.view(torch.int32).add_(torch.randint(-1, 2, (codes, dim), generator=g, dtype=torch.int32))
        z = c[:1] + z * 1e-6
    elif kind == "subnormal":
        z, c = z * 1e-20, c * torch.tensor([1e-19, 1e-25, 1e-40])[torch.arange(codes) % 3, None]
    elif kind == "zeros":
        z[::2], c[::3] = 0, 0
        z[::4] = -0.0
    elif kind == "large":  # norms around the bound of validity
        z, c = z * (2e19 / dim**0.5), c * (2e19 / dim**0.5)
    elif kind == "broken":
        for x, step in ((z, 5), (c, 3)):
            bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e20])[torch.arange(len(x[::step])) % 4]
            x[::step, dim // 2] = bad
    return z, c


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit but for NaN, whose payload nobody promises; zeros of different sign differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    signs = torch.equal(torch.signbit(a) & ~a.isnan(), torch.signbit(b) & ~b.isnan())
    return (
        signs
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0))
    )
