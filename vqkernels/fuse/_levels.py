"""The residual quantizers of encodec and what came of it: layers of a projection, a codebook, and a projection back."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.fuse import _recipes
from vqkernels.fuse._search import nearest_levels


def refuse_levels(module: Any) -> str | None:
    """Why the levels of a residual quantizer are not those of its own file, unchanged; None where they are."""
    members = vars(sys.modules[type(module).__module__])
    for layer in module.layers:
        for part, name in ((layer, "VectorQuantization"), (layer._codebook, "EuclideanCodebook")):
            if type(part) is not members[name]:
                return f"a level has a {type(part).__name__} from {type(part).__module__}"
            replaced = [n for n in part.__dict__ if callable(getattr(type(part), n, None))]
            others = set(replaced) - set(_recipes.bound_names(part))
            if others:
                return f"{min(others)}() of a level has been replaced"
    return None


def pays(x: Tensor, num_codes: int) -> bool:
    """Whether x [B, D, N] has rows enough: on CPU a few are searched faster than the codebooks are joined."""
    return x.is_cuda or 8 * x.shape[0] * x.shape[-1] >= num_codes


def can_fuse_levels(layers: nn.ModuleList, x: Tensor, codebooks: Sequence[Tensor]) -> bool:
    """Whether the residuals of x [B, D, N] are those of residual_quantize, nobody listens to a level, and it pays."""
    levels: list[Any] = list(layers)
    return (
        len(layers) > 0
        and pays(x, codebooks[0].shape[0])
        and all(t.dtype == torch.float32 and t.device == x.device for t in (x, *codebooks))
        and all(
            type(layer.project_in) is nn.Identity
            and type(layer.project_out) is nn.Identity
            and _recipes.is_transparent(layer, layer.project_in, layer.project_out, layer._codebook)
            for layer in levels
        )
    )


def encode_levels(module: Any, x: Tensor, n_q: int | None, codebook_of: Callable[[Any], Tensor]) -> Tensor:
    """The `encode` of a residual quantizer, x [B, D, N] to int64 [Q, B, N]; its own where one call does not pay."""
    layers = module.layers[: n_q or len(module.layers)]
    codebooks = [codebook_of(layer) for layer in layers]
    if not can_fuse_levels(layers, x, codebooks):
        return type(module).encode(module, x, n_q)
    return nearest_levels(x.mT, codebooks)[1].movedim(-1, 0).contiguous()
