"""LlamaGen: VectorQuantizer with l2-normalised codes, without its entropy loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.fuse import _by_shape, _steps
from vqkernels.fuse._recipes import Recipe


def _vector_quantizer(self: Any, z: Tensor) -> tuple[Any, ...]:
    if self.entropy_loss_ratio != 0:
        return type(self).forward(self, z)
    rows = z.permute(0, 2, 3, 1)
    if self.l2_norm:
        rows = F.normalize(rows, dim=-1)
    codes = _codes(self)
    found, indices = _steps.lookup(rows.reshape(-1, self.e_dim), codes)
    found = found.view(rows.shape)

    losses: tuple[Any, ...] = (None, None, None)
    usage: float = 0
    if self.training:
        # The entropy over all rows and codes has the weight 0.
        losses = (
            torch.mean((found - rows.detach()) ** 2),
            self.beta * torch.mean((found.detach() - rows) ** 2),
            found.new_zeros(()),
        )
        if self.show_usage:
            usage = _record_usage(self, indices)
    quantized = rows + (found - rows).detach()
    return quantized.permute(0, 3, 1, 2), (*losses, usage), (None, None, indices)


def _codes(module: Any) -> Tensor:
    return F.normalize(module.embedding.weight, dim=-1) if module.l2_norm else module.embedding.weight


@torch.no_grad()
def _record_usage(module: Any, indices: Tensor) -> float:
    """Moves the last indices into `codebook_used`, and returns the share of codes among them."""
    used, num = module.codebook_used, len(indices)
    used[:-num] = used[num:].clone()
    used[-num:] = indices
    return len(used.unique()) / module.n_e


def _refuse(module: Any) -> str | None:
    if module.entropy_loss_ratio != 0:
        return "its entropy loss is a sum over all rows and codes"
    if module.show_usage and not isinstance(getattr(module, "codebook_used", None), Tensor):
        return "it has no codebook_used"
    return None


RECIPES: tuple[Recipe, ...] = (
    _by_shape.recipe(
        "LlamaGen",
        "VectorQuantizer",
        {"forward": _vector_quantizer},
        attributes={
            "embedding": nn.Embedding,
            "n_e": int,
            "e_dim": int,
            "beta": (int, float),
            "entropy_loss_ratio": (int, float),
            "l2_norm": bool,
            "show_usage": bool,
        },
        table=lambda module: module.embedding.weight,
        codes=_codes,
        inputs=_steps.image,
        refuse=_refuse,
    ),
)
