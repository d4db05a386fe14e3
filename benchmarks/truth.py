"""Whether a result is right, judged in float64. Each function takes the inputs of an operation, works out what it can
once, and returns a function from a provider's result to figures:

    differs       share of indices (counts) that are not the canonical ones
    not_nearest   share of the checked rows whose code is farther away than the nearest one
    beyond_bound  share of them that rounding in float32 does not explain
    error         largest error of the real-valued results, relative to the largest true value
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vqkernels
from benchmarks.peers import DECAY, EPS, CodebookState, Step

Check = Callable[[Any], dict[str, float]]

CHECKED_ROWS = 1024
CHUNK_SCORES = 2**24


def check_search(z: Tensor, codebook: Tensor) -> Check:
    # The canonical codes are those of the CPU kernels, for results on any device.
    canonical = vqkernels.nearest_code(z.cpu(), codebook.cpu())
    checked = torch.linspace(0, z.shape[0] - 1, min(z.shape[0], CHECKED_ROWS), device=z.device).round().long()
    rows, codes = z[checked].double(), codebook.double()
    half_norms = codes.square().sum(1) / 2
    chunk = max(1, CHUNK_SCORES // codes.shape[0])
    best = torch.cat([torch.addmm(-half_norms, part, codes.t()).amax(1) for part in rows.split(chunk)])

    def check(result: Any) -> dict[str, float]:
        indices = torch.as_tensor(result, device=z.device).long()
        chosen = indices[checked]
        products = rows * codes[chosen]
        gap = best - (products.sum(1) - half_norms[chosen])
        # A sum of D + 1 terms in any order is off by at most (D + 2) eps times the sum of their magnitudes (Higham,
        # Accuracy and Stability, section 4.2), here for both codes; the norms bound the magnitudes of the better one.
        magnitude = rows.norm(dim=1) * codes.norm(dim=1).max() + half_norms.max()
        bound = 2 * (z.shape[1] + 2) * torch.finfo(torch.float32).eps * magnitude
        rounding = 1e-13 * magnitude  # of this check itself
        return {
            "differs": _share(indices.cpu() != canonical),
            "not_nearest": _share(gap > rounding),
            "beyond_bound": _share(gap > bound),
        }

    return check


def check_residual(z: Tensor, codebooks: Tensor) -> Check:
    def check(result: tuple[Tensor, Tensor]) -> dict[str, float]:
        quantized, indices = result
        # Every level is judged by what the provider's own codes have left for it; the worst level counts.
        residual, total, levels = z, z.double() * 0, []
        for level, codes in enumerate(codebooks):
            levels.append(check_search(residual, codes)(indices[:, level]))
            chosen = codes[indices[:, level]]
            residual, total = residual - chosen, total + chosen.double()
        worst = {name: max(figures[name] for figures in levels) for name in levels[0]}
        return worst | {"error": _error((quantized, total))}

    return check


def check_residual_step(z: Tensor, codebooks: Tensor, gradient: Tensor) -> Check:
    search = check_residual(z, codebooks)

    def check(step: Step) -> dict[str, float]:
        residual, loss, grad_z, moved = z, 0.0, len(codebooks) * gradient.double(), []
        for codes, indices in zip(codebooks, step.indices.unbind(1), strict=True):
            difference = residual.double() - codes[indices].double()
            loss = loss + difference.square().mean()
            grad_z = grad_z + difference * (2 / difference.numel())
            moved.append(_ema(codes, *_statistics(residual, indices, codes.shape[0])))
            residual = residual - codes[indices]
        figures = search((z - residual, step.indices))
        figures["error"] = _error((step.loss, loss), (step.grad_z, grad_z), (step.codebook, torch.stack(moved)))
        return figures

    return check


def check_statistics(z: Tensor, indices: Tensor, num_codes: int) -> Check:
    counts, sums = _statistics(z, indices, num_codes)

    def check(result: tuple[Tensor, Tensor]) -> dict[str, float]:
        return {"differs": _share(result[0].double() != counts), "error": _error((result[1], sums))}

    return check


def check_ema(codebook: Tensor, counts: Tensor, sums: Tensor) -> Check:
    moved = _ema(codebook, counts, sums)
    return lambda result: {"error": _error((result, moved))}


def check_step(z: Tensor, codebook: Tensor, gradient: Tensor) -> Check:
    search = check_search(z, codebook)

    def check(step: Step) -> dict[str, float]:
        # Loss, gradient and update are judged by the codes that the provider itself chose.
        difference = z.double() - codebook[step.indices].double()
        loss = difference.square().mean()
        grad_z = gradient.double() + difference * (2 / difference.numel())
        moved = _ema(codebook, *_statistics(z, step.indices, codebook.shape[0]))
        return search(step.indices) | {
            "error": _error((step.loss, loss), (step.grad_z, grad_z), (step.codebook, moved))
        }

    return check


def _statistics(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    sums = z.new_zeros(num_codes, z.shape[1], dtype=torch.float64).index_add_(0, indices, z.double())
    return torch.bincount(indices, minlength=num_codes).double(), sums


def _ema(codebook: Tensor, counts: Tensor, sums: Tensor) -> Tensor:
    _, cluster_size, code_sum = CodebookState.start(codebook.double())
    cluster_size = DECAY * cluster_size + (1 - DECAY) * counts
    code_sum = DECAY * code_sum + (1 - DECAY) * sums.double()
    total = cluster_size.sum()
    smoothed = (cluster_size + EPS) / (total + codebook.shape[0] * EPS) * total
    return code_sum / smoothed.unsqueeze(1)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


def _error(*pairs: tuple[Tensor, Tensor]) -> float:
    return max(((value.double() - truth).abs().max() / truth.abs().max()).item() for value, truth in pairs)
