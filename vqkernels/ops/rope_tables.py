"""Cosines and sines of rotary position embeddings, as `qk_norm_rope` takes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels import reference
from vqkernels.reference._checks import check_numbers, check_sizes, describe


def rope_tables(
    sizes: Sequence[int],
    dim: int,
    *,
    theta: float = 10000.0,
    axes_dims: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Tables of rotary position embeddings (arXiv 2104.09864) on a grid of one or more axes.

    Axis a turns pair j of its d_a / 2 pairs at position p by the angle p theta^(-2 j / d_a). The pairs of the first
    axis come first. Angles are computed in float64 and their cosines and sines rounded once.

    Args:
        sizes: positions on each axis: (L,), (H, W), (T, H, W) or more; the last axis varies fastest.
        dim: how many dimensions of a head are rotated, even.
        theta: base of the frequencies, above 0.
        axes_dims: d_a, even numbers that add up to dim. None: equal parts, and what is left to the first axis:
            72 of (H, W) is 36 + 36, 128 of (T, H, W) is 44 + 42 + 42 (the split of Wan).
        device: where the tables lie; None is torch's default.

    Returns:
        cos and sin, float32 [prod(sizes), dim / 2], one value a pair.

    Raises:
        TypeError: an argument has an unexpected type.
        ValueError: sizes, dim, theta or axes_dims do not fit.
    """
    if not isinstance(sizes, Sequence) or not sizes:
        raise TypeError(f"sizes: expected a sequence of integers, one an axis, got {describe(sizes)}")
    for axis, size in enumerate(sizes):
        if not isinstance(size, int | torch.SymInt) or size < 0:
            raise ValueError(f"sizes[{axis}]: expected an integer of at least 0, got {size!r}")
    check_sizes(dim=dim)
    check_numbers(theta=theta)
    if dim % 2 or dim < 2 * len(sizes):
        raise ValueError(f"dim: expected an even number of at least {2 * len(sizes)}, two an axis, got {dim}")
    if not theta > 0:
        raise ValueError(f"theta: expected a number above 0, got {theta!r}")
    if axes_dims is not None:
        if len(axes_dims) != len(sizes) or any(not isinstance(d, int) or d < 0 or d % 2 for d in axes_dims):
            raise ValueError(f"axes_dims: expected {len(sizes)} even numbers, one an axis, got {list(axes_dims)}")
        if sum(axes_dims) != dim:
            raise ValueError(f"axes_dims: expected a sum of {dim} to match dim, got {list(axes_dims)}")
    return reference.rope_tables(sizes, dim, theta=theta, axes_dims=axes_dims, device=device)
