"""Residual quantization: every level quantizes what the levels before it have left over, all of them in one pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import ResidualArguments, check_choice, residual_arguments, wide_type
from vqkernels.ops.vector_quantize import GRADIENTS
from vqkernels.reference._beam_search import beam_search
from vqkernels.reference._checks import check_numbers, check_sizes, describe
from vqkernels.reference.residual_quantize import stack_levels


class ResidualQuantizeResult(NamedTuple):
    """What `residual_quantize` returns."""

    quantized: Tensor
    indices: Tensor
    losses: Tensor
    counts: Tensor | tuple[Tensor, ...] | None
    sums: Tensor | tuple[Tensor, ...] | None


def _shape_rule(
    z: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    metric: str,
    mask: Tensor | None,
    num_levels: Tensor | None,
    indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, rows, _ = z.shape
    return (
        z.new_empty(z.shape),
        z.new_empty((heads, rows, len(sizes)), dtype=torch.int64),
        z.new_empty((heads, len(sizes)), dtype=wide_type(z, codebooks)),
        z.new_empty((heads, len(sizes)), dtype=torch.int64),
    )


def _backward_shape_rule(
    grad_quantized: Tensor | None,
    grad_mse: Tensor | None,
    z: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    indices: Tensor,
    valid_rows: Tensor,
    gradient: str,
) -> Tensor:
    return z.new_empty(z.shape)


def _statistics_shape_rule(z: Tensor, codebooks: Tensor, sizes: list[int], indices: Tensor) -> tuple[Tensor, Tensor]:
    shape = codebooks.shape
    return z.new_empty(shape[:2], dtype=torch.int64), z.new_empty(shape, dtype=wide_type(z, codebooks))


_backend.define(
    "residual_quantize(Tensor z, Tensor codebooks, int[] sizes, str metric, Tensor? mask, Tensor? num_levels, "
    "Tensor? indices) -> (Tensor quantized, Tensor indices, Tensor mse, Tensor valid_rows)",
    _shape_rule,
)
_backend.define(
    "residual_quantize_backward(Tensor? grad_quantized, Tensor? grad_mse, Tensor z, Tensor codebooks, int[] sizes, "
    "Tensor indices, Tensor valid_rows, str gradient) -> Tensor grad_z",
    _backward_shape_rule,
)
_backend.define(
    "residual_statistics(Tensor z, Tensor codebooks, int[] sizes, Tensor indices) -> (Tensor counts, Tensor sums)",
    _statistics_shape_rule,
)


class _ResidualQuantize(torch.autograd.Function):
    """Takes and returns the shapes of the kernels: z [H, N, D], codebooks [H, sum(sizes), D], indices [H, N, Q]."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebooks: Tensor,
        sizes: tuple[int, ...],
        mask: Tensor | None,
        num_levels: Tensor | None,
        chosen: Tensor | None,
        metric: str,
        gradient: str,
        commitment_weight: float,
        codebook_weight: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        quantize = _backend.implementation("residual_quantize", backend)
        quantized, indices, mse, valid_rows = quantize(z, codebooks, sizes, metric, mask, num_levels, chosen)
        ctx.save_for_backward(z, codebooks, indices, valid_rows)
        ctx.options = (sizes, gradient, commitment_weight, codebook_weight, backend)
        ctx.mark_non_differentiable(indices)
        return quantized, indices, mse * (commitment_weight + codebook_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_quantized, _, grad_losses = grads
        z, codebooks, indices, valid_rows = ctx.saved_tensors
        sizes, gradient, commitment_weight, codebook_weight, backend = ctx.options
        grad_z = grad_codebooks = None
        if ctx.needs_input_grad[0]:
            row_gradient = _backend.implementation("residual_quantize_backward", backend)
            grad_mse = grad_losses * commitment_weight
            grad_z = row_gradient(grad_quantized, grad_mse, z, codebooks, sizes, indices, valid_rows, gradient)
        if ctx.needs_input_grad[1]:
            grad_codebooks = _codebook_gradient(
                grad_quantized if gradient == "none" else None,
                grad_losses * codebook_weight,
                z,
                codebooks,
                sizes,
                indices,
                valid_rows,
                backend,
            )
        return grad_z, grad_codebooks, None, None, None, None, None, None, None, None, None


def _codebook_gradient(
    grad_quantized: Tensor | None,
    grad_mse: Tensor,
    z: Tensor,
    codebooks: Tensor,
    sizes: tuple[int, ...],
    indices: Tensor,
    valid_rows: Tensor,
    backend: str | None,
) -> Tensor:
    """A code gets what its members push it away from them, row by row: n_k c_k - sums_k would cancel."""
    sum_rows = _backend.implementation("code_statistics", backend)
    wide = wide_type(z)
    heads, _, dim = z.shape
    coefficients = grad_mse.double() * 2 / (valid_rows * dim).clamp(min=1)
    residual = z.to(wide)
    grads = []
    for level, (codes, coefficient) in enumerate(
        zip(codebooks.split(list(sizes), 1), coefficients.to(wide).unbind(1), strict=True)
    ):
        num_codes = codes.shape[1]
        chosen = indices[..., level]
        offsets = num_codes * torch.arange(heads, device=z.device).unsqueeze(1)
        flat = codes.reshape(heads * num_codes, dim)
        residual = residual - flat[chosen.clamp(min=0) + offsets].to(wide)
        rows = residual * -coefficient.reshape(heads, 1, 1)
        if grad_quantized is not None:
            rows = rows + grad_quantized.to(wide)
        grads.append(sum_rows(rows, chosen, num_codes)[1])
    return torch.cat(grads, 1).to(codebooks.dtype)


def residual_quantize(
    z: Tensor,
    codebooks: Tensor | Sequence[Tensor],
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    num_levels: int | Tensor | None = None,
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
    statistics: bool = False,
    beam_size: int | None = None,
    beam_weights: Sequence[float] | None = None,
    backend: str | None = None,
) -> ResidualQuantizeResult:
    """Replaces every row of z by a sum of codes, one a level: each is nearest to what the levels before have left.

        r_0 = z,   c_q = the code of level q nearest to r_q,   r_{q+1} = r_q - c_q,   quantized = c_0 + c_1 + ...

    (Zeghidour et al., arXiv 2107.03312, algorithm 1). Codes are those of `nearest_code` level by level with residuals
    in float32 (float64 where z or codebooks are float64), bit for bit, and every level has the losses and gradients
    of `vector_quantize` on its residuals, in which the codes of other levels count as constants. Nothing of size
    rows x codes is stored, in either direction.

    Args:
        z: rows, [..., D], or [H, ..., D] with codebooks for every head; float32, float64, bfloat16 or float16.
        codebooks: [Q, K, D], or a sequence of Q tensors [K_q, D], of one of these dtypes, on the device of z; with
            heads [H, Q, K, D], or a sequence of [H, K_q, D].
        metric: "l2", "cosine" or "dot"; decides the choice alone: codes are subtracted as they are.
        mask: bool [...] (with heads also [H, ...]); rows where it is False take no part.
        num_levels: how many levels run, at most Q: an integer, or an int64 or int32 tensor whose shape is a leading
            part of the shape of the rows ([] for all, [B] one a sample of z [B, N, D]). Its values stay on the device.
        gradient: "straight_through", "rotation" or "none", as in `vector_quantize`, for every level that runs.
        commitment_weight: weight of the loss that moves z, at least 0.
        codebook_weight: weight of the loss that moves the codebooks, at least 0.
        statistics: also return counts and sums of every level, as `code_statistics` gives them for its residuals.
        beam_size: keep as many candidates a row from level to level instead of the nearest code alone, and take the
            one with the least weighted sum of squared errors |r_1|^2, |r_2|^2, ...
        beam_weights: weights of these errors, one a level; None: 1.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        quantized: the shape and dtype of z; summed up in ascending order of the levels in float32 (float64), rounded
            once. 0 where a row is masked or has no level, NaN where a level that should run finds no code (see
            `nearest_code`).
        indices: int64 [..., Q], -1 for levels that do not run or find no code, and all after them.
        losses: float32 (float64 for float64) [Q] ([H, Q]); 0 where no row has a code.
        counts: int64 [Q, K] ([H, Q, K]), a tuple of [K_q] ([H, K_q]) where sizes differ, or None.
        sums: float32 [Q, K, D] ([H, Q, K, D]), a tuple of [K_q, D] ([H, K_q, D]) where sizes differ, or None.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, metric, gradient, levels, weights, beam or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    arguments = residual_arguments(z, codebooks, metric, mask, num_levels)
    check_choice("gradient", gradient, GRADIENTS)
    check_numbers(low=0, commitment_weight=commitment_weight, codebook_weight=codebook_weight)
    weights = _check_beam(beam_size, beam_weights, len(arguments.sizes))
    backend = _backend.resolve(backend, z)
    if backend == "reference":
        return ResidualQuantizeResult(
            *reference.residual_quantize(
                z,
                codebooks,
                metric=metric,
                mask=mask,
                num_levels=num_levels,
                gradient=gradient,
                commitment_weight=commitment_weight,
                codebook_weight=codebook_weight,
                statistics=statistics,
                beam_size=beam_size,
                beam_weights=weights,
            )
        )
    chosen = None
    if beam_size is not None and beam_size > 1:
        chosen = _search_beams(arguments, metric, beam_size, weights, backend)
    # Gradients of a narrower tensor that meets a float64 one are rounded once, at the end.
    mixed = (
        arguments.z.dtype != arguments.codebooks.dtype and wide_type(arguments.z, arguments.codebooks) == torch.float64
    )
    rows = arguments.z.double() if mixed else arguments.z
    table = arguments.codebooks.double() if mixed else arguments.codebooks
    quantized, indices, losses = _ResidualQuantize.apply(
        rows,
        table,
        arguments.sizes,
        arguments.mask,
        arguments.num_levels,
        chosen,
        metric,
        gradient,
        float(commitment_weight),
        float(codebook_weight),
        backend,
    )
    counts = sums = None
    if statistics:
        sum_levels = _backend.implementation("residual_statistics", backend)
        counts, sums = sum_levels(rows.detach(), table.detach(), arguments.sizes, indices)
        counts, sums = _per_level(counts, arguments), _per_level(sums.float(), arguments)
    return ResidualQuantizeResult(
        quantized.to(z.dtype).reshape(z.shape),
        indices.reshape(*arguments.row_shape, len(arguments.sizes)),
        losses if arguments.heads else losses[0],
        counts,
        sums,
    )


def _check_beam(beam_size: int | None, beam_weights: Sequence[float] | None, levels: int) -> list[float]:
    if beam_size is not None:
        check_sizes(beam_size=beam_size)
    if beam_weights is None:
        return [1.0] * levels
    if not isinstance(beam_weights, Sequence):
        raise TypeError(f"beam_weights: expected a sequence of numbers, got {describe(beam_weights)}")
    if len(beam_weights) != levels:
        raise ValueError(f"beam_weights: expected {levels} numbers, one a level, got {len(beam_weights)}")
    for level, weight in enumerate(beam_weights):
        check_numbers(low=0, **{f"beam_weights[{level}]": weight})
    return [float(weight) for weight in beam_weights]


def _search_beams(
    arguments: ResidualArguments, metric: str, beam_size: int, weights: list[float], backend: str | None
) -> Tensor:
    search = _backend.implementation("topk_codes", backend)
    wide = wide_type(arguments.z, arguments.codebooks)
    return beam_search(
        arguments.z.detach().to(wide),
        arguments.codebooks.detach().to(wide).split(list(arguments.sizes), 1),
        arguments.num_levels,
        beam_size,
        weights,
        lambda rows, codes, k: search(rows, codes, k, metric, None),
    )


def _per_level(values: Tensor, arguments: ResidualArguments) -> Tensor | tuple[Tensor, ...]:
    """From [H, sum(sizes), ...]."""
    levels = values.split(list(arguments.sizes), 1)
    if not arguments.heads:
        return stack_levels([level[0] for level in levels])
    return stack_levels(levels, dim=1)
