"""Search, gather, loss, statistics and their gradient: a vector quantizer without its state."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import check_choice, search_arguments, wide_type
from vqkernels.reference._checks import check_numbers

GRADIENTS = ("straight_through", "rotation", "none")


class VectorQuantizeResult(NamedTuple):
    """What `vector_quantize` returns."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor | None
    sums: Tensor | None


def _shape_rule(z: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape),
        z.new_empty(z.shape[:2], dtype=torch.int64),
        z.new_empty((), dtype=wide_type(z, codebook)),
        z.new_empty((), dtype=torch.int64),
    )


def _backward_shape_rule(
    grad_quantized: Tensor | None,
    grad_mse: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    valid_rows: Tensor,
    gradient: str,
) -> Tensor:
    return z.new_empty(z.shape)


_backend.define(
    "vector_quantize(Tensor z, Tensor codebook, str metric, Tensor? mask) "
    "-> (Tensor quantized, Tensor indices, Tensor mse, Tensor valid_rows)",
    _shape_rule,
)
_backend.define(
    "vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_mse, Tensor z, Tensor codebook, Tensor indices, "
    "Tensor valid_rows, str gradient) -> Tensor grad_z",
    _backward_shape_rule,
)


class _VectorQuantize(torch.autograd.Function):
    """Takes and returns the [H, N, D] shapes of the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        metric: str,
        gradient: str,
        commitment_weight: float,
        codebook_weight: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        quantize = _backend.implementation("vector_quantize", backend)
        quantized, indices, mse, valid_rows = quantize(z, codebook, metric, mask)
        ctx.save_for_backward(z, codebook, indices, valid_rows)
        ctx.options = (gradient, commitment_weight, codebook_weight, backend)
        ctx.mark_non_differentiable(indices)
        return quantized, indices, mse * (commitment_weight + codebook_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_quantized, _, grad_loss = grads
        z, codebook, indices, valid_rows = ctx.saved_tensors
        gradient, commitment_weight, codebook_weight, backend = ctx.options
        row_gradient = _backend.implementation("vector_quantize_backward", backend)
        grad_z = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_mse = grad_loss * commitment_weight
            grad_z = row_gradient(grad_quantized, grad_mse, z, codebook, indices, valid_rows, gradient)
        if ctx.needs_input_grad[1]:
            # A code gets what its members push it away from them, row by row: n_k c_k - sums_k would cancel.
            wide = wide_type(z)
            grad_mse = grad_loss * codebook_weight
            rows = row_gradient(None, grad_mse, z.to(wide), codebook, indices, valid_rows, "none").neg()
            if gradient == "none":
                rows = rows + grad_quantized.to(wide)
            sum_rows = _backend.implementation("code_statistics", backend)
            grad_codebook = sum_rows(rows, indices, codebook.shape[1])[1].to(codebook.dtype)
        return grad_z, grad_codebook, None, None, None, None, None, None


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
    statistics: bool = False,
    backend: str | None = None,
) -> VectorQuantizeResult:
    """Replaces every row of z by its nearest code, with losses, gradients and statistics.

        loss = commitment_weight mse(sg(quantized), z) + codebook_weight mse(quantized, sg(z))

    where mse is the mean over the elements of the rows that have a code, and sg stops the gradient (van den Oord et
    al., arXiv 1711.00937, equation 3). Codes are chosen as `nearest_code` does; nothing of size rows x codes is
    stored, in either direction. Gradients are bitwise the same from run to run.

    Args:
        z: rows, [..., D], or [H, ..., D] with one codebook a head; float32, float64, bfloat16 or float16.
        codebook: [K, D] or [H, K, D], K and D at least 1; any of these dtypes, on the device of z.
        metric: "l2", "cosine" or "dot"; decides the choice alone: quantized rows and loss take codes as they are.
        mask: bool [...] (with heads also [H, ...]); rows where it is False take no part.
        gradient: how the gradient of `quantized` passes the choice. "straight_through" hands it to z unchanged,
            "rotation" rotates and scales it from the code to the row (arXiv 2410.06424), "none" gives it to the
            codebook, whose rows `quantized` consists of, and nothing to z.
        commitment_weight: weight of the loss that moves z, at least 0.
        codebook_weight: weight of the loss that moves the codebook, at least 0.
        statistics: also return counts and sums as `code_statistics` does.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        quantized: the shape and dtype of z. A masked row is 0, an invalid row (see `nearest_code`) NaN, so that what
            is computed from it shows it. Neither has a gradient or a part in loss and statistics.
        indices: int64 [...], -1 for these rows.
        loss: float32 (float64 for float64), a scalar; 0 where no row has a code.
        counts: int64 [K] ([H, K]), or None.
        sums: float32 [K, D] ([H, K, D]), or None.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, metric, gradient, weights or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    arguments = search_arguments(z, codebook, metric, mask)
    check_choice("gradient", gradient, GRADIENTS)
    check_numbers(low=0, commitment_weight=commitment_weight, codebook_weight=codebook_weight)
    backend = _backend.resolve(backend, z)
    if backend == "reference":
        return VectorQuantizeResult(
            *reference.vector_quantize(
                z,
                codebook,
                metric=metric,
                mask=mask,
                gradient=gradient,
                commitment_weight=commitment_weight,
                codebook_weight=codebook_weight,
                statistics=statistics,
            )
        )
    # Gradients of a narrower tensor that meets a float64 one are rounded once, at the end.
    mixed = z.dtype != codebook.dtype and torch.float64 in (z.dtype, codebook.dtype)
    quantized, indices, loss = _VectorQuantize.apply(
        arguments.z.double() if mixed else arguments.z,
        arguments.codebook.double() if mixed else arguments.codebook,
        arguments.mask,
        metric,
        gradient,
        float(commitment_weight),
        float(codebook_weight),
        backend,
    )
    counts = sums = None
    if statistics:
        sum_rows = _backend.implementation("code_statistics", backend)
        counts, sums = sum_rows(arguments.z.detach(), indices, arguments.codebook.shape[1])
        sums = sums.float()
        if codebook.ndim == 2:
            counts, sums = counts[0], sums[0]
    quantized, indices = quantized.to(z.dtype).reshape(z.shape), indices.reshape(arguments.row_shape)
    return VectorQuantizeResult(quantized, indices, loss, counts, sums)
