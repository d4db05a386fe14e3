"""Those who are compared, as plain functions.

Each takes the inputs of an operation, prepares what a user would prepare once (an index, a layer, a compiled function)
and returns a function without arguments that does the work to be timed. Where it cannot serve, it raises `Unavailable`
with the reason.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels

DECAY, EPS = 0.99, 1e-5


class Unavailable(RuntimeError):
    """A provider cannot serve this case here; the message says why."""


class CodebookState(NamedTuple):
    """What an EMA codebook keeps: codebook [K, D], cluster_size [K], code_sum [K, D]."""

    codebook: Tensor
    cluster_size: Tensor
    code_sum: Tensor

    @classmethod
    def start(cls, codebook: Tensor) -> "CodebookState":
        """The state in which every code has had one member."""
        return cls(codebook.clone(), codebook.new_ones(codebook.shape[0]), codebook.clone())


class Step(NamedTuple):
    """What a training step of a quantizer leaves behind; codebook is the one after the EMA update."""

    indices: Tensor
    loss: Tensor
    grad_z: Tensor
    codebook: Tensor


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error})") from error


def _require_memory(num_bytes: int, device: torch.device) -> None:
    """Raises `Unavailable` where `num_bytes` are more than two thirds of what is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    else:
        return
    if num_bytes > free * 2 // 3:
        raise Unavailable(f"stores {num_bytes / 2**30:.1f} GiB of scores, {free / 2**30:.1f} GiB are free")


def _require_cpu(z: Tensor, name: str) -> None:
    if z.device.type != "cpu":
        raise Unavailable(f"{name} runs on the CPU only")


def _score_bytes(z: Tensor, codebook: Tensor, matrices: int) -> int:
    return matrices * z.shape[0] * codebook.shape[0] * z.element_size()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For one size, as a training run compiles it. Without the reset torch gives up after a few sizes."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


# nearest_code: z [N, D], codebook [K, D] -> indices [N]


def search_vqkernels(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    return lambda: vqkernels.nearest_code(z, codebook)


def search_cdist(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    _require_memory(_score_bytes(z, codebook, 1), z.device)
    return lambda: torch.cdist(z, codebook).argmin(1)


def _addmm_argmax(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(-0.5 * codebook.square().sum(1), z, codebook.t()).argmax(1)


def search_addmm(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    _require_memory(_score_bytes(z, codebook, 1), z.device)
    return lambda: _addmm_argmax(z, codebook)


def search_compiled(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    _require_memory(_score_bytes(z, codebook, 1), z.device)
    search = _compiled(_addmm_argmax)
    return lambda: search(z, codebook)


def search_faiss(z: Tensor, codebook: Tensor) -> Callable[[], Any]:
    _require_cpu(z, "faiss-cpu")
    faiss = _import("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = z.numpy()
    return lambda: index.search(rows, 1)[1][:, 0]


def search_sklearn(z: Tensor, codebook: Tensor) -> Callable[[], Any]:
    _require_cpu(z, "scikit-learn")
    metrics = _import("sklearn.metrics", "scikit-learn")
    # Limits are the process's: wrapped, they end with the call. The libraries are looked up here, not in every call.
    pools = _import("threadpoolctl", "threadpoolctl").ThreadpoolController()
    rows, codes = z.numpy(), codebook.numpy()
    return pools.wrap(limits=torch.get_num_threads())(lambda: metrics.pairwise_distances_argmin(rows, codes))


def search_vector_quantize_pytorch(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    upstream = _import("vector_quantize_pytorch", "vector-quantize-pytorch")
    _require_memory(_score_bytes(z, codebook, 3), z.device)
    layer = _layer(upstream.VectorQuantize, codebook).eval()
    return torch.no_grad()(lambda: layer(z[None])[1][0])


def search_flash_kmeans(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    if z.device.type != "cuda":
        raise Unavailable("flash-kmeans runs on CUDA only")
    flash = _import("flash_kmeans.assign_euclid_triton", "flash-kmeans")
    norms = z.square().sum(1)[None]
    return lambda: flash.euclid_assign_triton(z[None], codebook[None], norms)[0]


# code_statistics: z [N, D], indices [N], K -> counts [K], sums [K, D]


def statistics_vqkernels(z: Tensor, indices: Tensor, num_codes: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: vqkernels.code_statistics(z, indices, num_codes)


def _index_add(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts = z.new_zeros(num_codes).index_add_(0, indices, z.new_ones(z.shape[0]))
    return counts, z.new_zeros(num_codes, z.shape[1]).index_add_(0, indices, z)


def statistics_index_add(z: Tensor, indices: Tensor, num_codes: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: _index_add(z, indices, num_codes)


def statistics_compiled(z: Tensor, indices: Tensor, num_codes: int) -> Callable[[], tuple[Tensor, Tensor]]:
    statistics = _compiled(_index_add)
    return lambda: statistics(z, indices, num_codes)


def statistics_one_hot(z: Tensor, indices: Tensor, num_codes: int) -> Callable[[], tuple[Tensor, Tensor]]:
    _require_memory(3 * z.shape[0] * num_codes * z.element_size(), z.device)

    def run() -> tuple[Tensor, Tensor]:
        one_hot = F.one_hot(indices, num_codes).type(z.dtype)
        return one_hot.sum(0), one_hot.t() @ z

    return run


# ema_update: codebook [K, D], counts int64 [K], sums [K, D] -> codebook [K, D]


def ema_vqkernels(codebook: Tensor, counts: Tensor, sums: Tensor) -> Callable[[], Tensor]:
    state = CodebookState.start(codebook)

    def run() -> Tensor:
        vqkernels.ema_update_(*state, counts, sums, decay=DECAY, eps=EPS)
        return state.codebook

    return run


def _ema_update(state: CodebookState, counts: Tensor, sums: Tensor) -> Tensor:
    codebook, cluster_size, code_sum = state
    cluster_size.lerp_(counts.to(cluster_size.dtype), 1 - DECAY)
    code_sum.lerp_(sums, 1 - DECAY)
    total = cluster_size.sum()
    smoothed = (cluster_size + EPS) / (total + codebook.shape[0] * EPS) * total
    return codebook.copy_(code_sum / smoothed.unsqueeze(1))


def ema_torch(codebook: Tensor, counts: Tensor, sums: Tensor) -> Callable[[], Tensor]:
    state = CodebookState.start(codebook)
    return lambda: _ema_update(state, counts, sums)


def ema_compiled(codebook: Tensor, counts: Tensor, sums: Tensor) -> Callable[[], Tensor]:
    state, update = CodebookState.start(codebook), _compiled(_ema_update)
    return lambda: update(state, counts, sums)


# vector_quantize, a training step: z [N, D], codebook [K, D], gradient of the quantized rows [N, D] -> Step


def step_vqkernels(z: Tensor, codebook: Tensor, gradient: Tensor) -> Callable[[], Step]:
    state = CodebookState.start(codebook)

    def run() -> Step:
        rows = z.detach().requires_grad_()
        result = vqkernels.vector_quantize(rows, state.codebook, statistics=True)
        torch.autograd.backward([result.quantized, result.loss], [gradient, None])
        vqkernels.ema_update_(*state, result.counts, result.sums, decay=DECAY, eps=EPS)
        return Step(result.indices, result.loss.detach(), rows.grad, state.codebook)

    return run


def _seam(rows: Tensor, state: CodebookState) -> tuple[Tensor, Tensor, Tensor]:
    """The whole layer in plain PyTorch, as carefully as it can be written."""
    with torch.no_grad():
        indices = _addmm_argmax(rows, state.codebook)
        counts, sums = _index_add(rows, indices, state.codebook.shape[0])
    chosen = F.embedding(indices, state.codebook)
    loss = F.mse_loss(rows, chosen)
    quantized = rows + (chosen - rows).detach()
    with torch.no_grad():
        _ema_update(state, counts, sums)
    return quantized, indices, loss


def _seam_step(
    seam: Callable[..., tuple[Tensor, Tensor, Tensor]], z: Tensor, codebook: Tensor, gradient: Tensor
) -> Callable[[], Step]:
    _require_memory(_score_bytes(z, codebook, 1), z.device)
    state = CodebookState.start(codebook)

    def run() -> Step:
        rows = z.detach().requires_grad_()
        quantized, indices, loss = seam(rows, state)
        torch.autograd.backward([quantized, loss], [gradient, None])
        return Step(indices, loss.detach(), rows.grad, state.codebook)

    return run


def step_torch(z: Tensor, codebook: Tensor, gradient: Tensor) -> Callable[[], Step]:
    return _seam_step(_seam, z, codebook, gradient)


def step_compiled(z: Tensor, codebook: Tensor, gradient: Tensor) -> Callable[[], Step]:
    return _seam_step(_compiled(_seam), z, codebook, gradient)


def _layer(layer_class: Callable[..., torch.nn.Module], codebook: Tensor) -> torch.nn.Module:
    """A quantizer layer that starts at `codebook`, straight-through like the others here."""
    codes, dim = codebook.shape
    layer = layer_class(dim=dim, codebook_size=codes, decay=DECAY, eps=EPS, rotation_trick=False).to(codebook.device)
    state = layer.state_dict()
    for name, value in zip(("embed", "cluster_size", "embed_avg"), CodebookState.start(codebook), strict=True):
        state[f"_codebook.{name}"].copy_(value[None])
    return layer


def _layer_step(layer: torch.nn.Module, z: Tensor, gradient: Tensor) -> Callable[[], Step]:
    def run() -> Step:
        rows = z[None].detach().requires_grad_()
        quantized, indices, loss = layer(rows)
        torch.autograd.backward([quantized, loss.sum()], [gradient[None], None])
        return Step(indices[0], loss.detach().sum(), rows.grad[0], layer.state_dict()["_codebook.embed"][0])

    return run


def step_vqkernels_layer(z: Tensor, codebook: Tensor, gradient: Tensor) -> Callable[[], Step]:
    from vqkernels.nn import VectorQuantize

    return _layer_step(_layer(VectorQuantize, codebook), z, gradient)


def step_vector_quantize_pytorch(z: Tensor, codebook: Tensor, gradient: Tensor) -> Callable[[], Step]:
    upstream = _import("vector_quantize_pytorch", "vector-quantize-pytorch")
    _require_memory(_score_bytes(z, codebook, 6), z.device)
    return _layer_step(_layer(upstream.VectorQuantize, codebook), z, gradient)


# residual_quantize: z [N, D], codebooks [Q, K, D] -> quantized [N, D], indices [N, Q]


def residual_vqkernels(z: Tensor, codebooks: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: vqkernels.residual_quantize(z, codebooks)[:2]


def residual_vqkernels_levels(z: Tensor, codebooks: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """One call a level."""

    def run() -> tuple[Tensor, Tensor]:
        residual, quantized, indices = z, torch.zeros_like(z), []
        for codes in codebooks:
            result = vqkernels.vector_quantize(residual, codes)
            residual, quantized = residual - result.quantized, quantized + result.quantized
            indices.append(result.indices)
        return quantized, torch.stack(indices, 1)

    return run


def _residual_addmm(z: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    residual, quantized, indices = z, torch.zeros_like(z), []
    for codes in codebooks:
        indices.append(_addmm_argmax(residual, codes))
        chosen = F.embedding(indices[-1], codes)
        residual, quantized = residual - chosen, quantized + chosen
    return quantized, torch.stack(indices, 1)


def residual_addmm(z: Tensor, codebooks: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    _require_memory(_score_bytes(z, codebooks[0], 1), z.device)
    return lambda: _residual_addmm(z, codebooks)


def residual_compiled(z: Tensor, codebooks: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    _require_memory(_score_bytes(z, codebooks[0], 1), z.device)
    quantize = _compiled(_residual_addmm)
    return lambda: quantize(z, codebooks)


def residual_vector_quantize_pytorch(z: Tensor, codebooks: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    upstream = _import("vector_quantize_pytorch", "vector-quantize-pytorch")
    _require_memory(_score_bytes(z, codebooks[0], 3), z.device)
    levels, codes, dim = codebooks.shape
    layer = upstream.ResidualVQ(dim=dim, num_quantizers=levels, codebook_size=codes).to(z.device).eval()
    state = layer.state_dict()
    for level, codebook in enumerate(codebooks):
        state[f"layers.{level}._codebook.embed"].copy_(codebook[None])

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor]:
        quantized, indices, _ = layer(z[None])
        return quantized[0], indices[0]

    return run


# residual_vq: z [N, D], codebooks [Q, K, D], gradient of quantized [N, D] -> a training step of the layer


def _residual_step(
    layer_class: Callable[..., torch.nn.Module], z: Tensor, codebooks: Tensor, gradient: Tensor
) -> Callable[[], Step]:
    levels, codes, dim = codebooks.shape
    options = {"num_quantizers": levels, "codebook_size": codes, "decay": DECAY, "eps": EPS, "rotation_trick": False}
    layer = layer_class(dim=dim, **options).to(z.device)
    state = layer.state_dict()
    for level, codebook in enumerate(codebooks):
        for name, value in zip(("embed", "cluster_size", "embed_avg"), CodebookState.start(codebook), strict=True):
            state[f"layers.{level}._codebook.{name}"].copy_(value[None])

    def run() -> Step:
        rows = z[None].detach().requires_grad_()
        quantized, indices, losses = layer(rows)
        torch.autograd.backward([quantized, losses.sum()], [gradient[None], None])
        state = layer.state_dict()
        moved = torch.stack([state[f"layers.{level}._codebook.embed"][0] for level in range(levels)])
        return Step(indices[0], losses.detach().sum(), rows.grad[0], moved)

    return run


def residual_step_vqkernels(z: Tensor, codebooks: Tensor, gradient: Tensor) -> Callable[[], Step]:
    from vqkernels.nn import ResidualVQ

    return _residual_step(ResidualVQ, z, codebooks, gradient)


def residual_step_vector_quantize_pytorch(z: Tensor, codebooks: Tensor, gradient: Tensor) -> Callable[[], Step]:
    upstream = _import("vector_quantize_pytorch", "vector-quantize-pytorch")
    _require_memory(_score_bytes(z, codebooks[0], 3 * len(codebooks)), z.device)
    return _residual_step(upstream.ResidualVQ, z, codebooks, gradient)
