"""Exponential moving average of code statistics and the codebook that follows from it."""

import torch
from torch import Tensor

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.reference._checks import check_device, check_numbers, check_shape, check_tensor, overlaps_itself


def _shape_rule(
    codebook: Tensor, cluster_size: Tensor, code_sum: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    return None


_backend.define(
    "ema_update_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) code_sum, Tensor counts, Tensor sums, "
    "float decay, float eps) -> ()",
    _shape_rule,
)


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
    backend: str | None = None,
) -> None:
    """Moves the running statistics of a codebook toward those of a batch, and the codebook with them, in place.

        cluster_size <- lerp(cluster_size, counts, 1 - decay)
        code_sum     <- lerp(code_sum, sums, 1 - decay)
        codebook     <- code_sum / smoothed,   smoothed_k = (cluster_size_k + eps) n / (n + K eps)

    with n the sum of the new cluster_size (van den Oord et al., arXiv 1711.00937, appendix A.1, with Laplace
    smoothing). A code whose smoothed size is 0 stays as it is. The order of all sums is fixed: bitwise the same result
    on CPU and CUDA, for any number of threads. A backward pass through `vector_quantize` reads the codebook: run it
    before this update, or quantize with a clone.

    Args:
        codebook: float32 [K, D] or [H, K, D], overwritten. The three tensors that are must not share memory.
        cluster_size: float32 [K] or [H, K], overwritten.
        code_sum: float32, the shape of codebook, overwritten.
        counts: int64, the shape of cluster_size.
        sums: float32, the shape of codebook.
        decay: share of the old value that stays, in [0, 1].
        eps: the smoothing, at least 0.
        backend: None (what suits the device), "native", "triton" or "reference".

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, decay, eps or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    check_tensor("codebook", codebook, (torch.float32,))
    if codebook.ndim not in (2, 3) or 0 in codebook.shape:
        raise ValueError(f"codebook: expected shape [K, D] or [H, K, D], not empty, got {list(codebook.shape)}")
    for name, value, dtype, shape in (
        ("cluster_size", cluster_size, torch.float32, codebook.shape[:-1]),
        ("code_sum", code_sum, torch.float32, codebook.shape),
        ("counts", counts, torch.int64, codebook.shape[:-1]),
        ("sums", sums, torch.float32, codebook.shape),
    ):
        check_tensor(name, value, (dtype,))
        check_shape(name, value, shape, "codebook", codebook)
        check_device(name, value, "codebook", codebook)
    for name, value in (("codebook", codebook), ("cluster_size", cluster_size), ("code_sum", code_sum)):
        if not torch.compiler.is_compiling() and overlaps_itself(value):
            raise ValueError(f"{name}: expected memory of its own for every element, got strides {value.stride()}")
    if code_sum is codebook:
        raise ValueError("code_sum: expected memory of its own, got the codebook")
    check_numbers(low=0, high=1, decay=decay)
    check_numbers(low=0, eps=eps)
    backend = _backend.resolve(backend, codebook)
    if backend == "reference":
        reference.ema_update_(codebook, cluster_size, code_sum, counts, sums, decay=decay, eps=eps)
        return
    update = _backend.implementation("ema_update_", backend)
    tensors = (codebook, cluster_size, code_sum, counts, sums)
    with torch.no_grad():
        update(*(t.unsqueeze(0) if codebook.ndim == 2 else t for t in tensors), float(decay), float(eps))
