"""TiTok (bytedance/1d-tokenizer): VectorQuantizer in float32, with its update of unused codes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.fuse import _by_shape, _steps
from vqkernels.fuse._recipes import Recipe
from vqkernels.fuse._search import nearest


def _vector_quantizer(self: Any, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    clusters = self.clustering_vq and self.training
    # With several processes the rows of all are gathered, in a way of the original's own.
    if clusters and _steps.several_processes():
        return type(self).forward(self, z)
    with torch.autocast(z.device.type, enabled=False):
        latents = z.float().permute(0, 2, 3, 1)
        rows = F.normalize(latents, dim=-1) if self.use_l2_norm else latents
        # A copy where the step below gives the table other values, which the backward pass would read.
        codes = _codes(self, self.embedding.weight.clone() if clusters else self.embedding.weight)
        flat = rows.reshape(-1, self.token_size)
        found, indices = _steps.lookup(flat, codes)
        found = found.view(rows.shape)
        commitment_loss = self.commitment_cost * torch.mean((found.detach() - rows) ** 2)
        codebook_loss = torch.mean((found - rows.detach()) ** 2)
        if clusters:
            _draw_codes(self, indices, nearest(codes, flat), latents.reshape(flat.shape))
        quantized = rows + (found - rows).detach()
    quantized = quantized.permute(0, 3, 1, 2).contiguous()
    return quantized, {
        "quantizer_loss": commitment_loss + codebook_loss,
        "commitment_loss": commitment_loss,
        "codebook_loss": codebook_loss,
        "min_encoding_indices": indices.view(rows.shape[:-1]),
    }


def _codes(module: Any, weight: Tensor) -> Tensor:
    return F.normalize(weight, dim=-1) if module.use_l2_norm else weight


@torch.no_grad()
def _draw_codes(module: Any, indices: Tensor, nearest_rows: Tensor, latents: Tensor) -> None:
    """Moves every code toward the row [N, D] next to it, the further the less it is used."""
    ones = torch.ones_like(indices, dtype=torch.float32)
    counts = ones.new_zeros(module.codebook_size).scatter_add_(0, indices, ones)
    module.embed_prob.mul_(module.decay).add_(counts / len(indices), alpha=1 - module.decay)
    step = torch.exp(-(module.embed_prob * module.codebook_size * 10) / (1 - module.decay) - 1e-3).unsqueeze(1)
    module.embedding.weight.data = module.embedding.weight.data * (1 - step) + latents[nearest_rows] * step


def _refuse(module: Any) -> str | None:
    if module.clustering_vq and not isinstance(getattr(module, "embed_prob", None), Tensor):
        return "it has no embed_prob"
    if module.clustering_vq and not isinstance(getattr(module, "decay", None), float):
        return "it has no decay"
    return None


RECIPES: tuple[Recipe, ...] = (
    _by_shape.recipe(
        "TiTok",
        "VectorQuantizer",
        {"forward": _vector_quantizer},
        attributes={
            "embedding": nn.Embedding,
            "codebook_size": int,
            "token_size": int,
            "commitment_cost": (int, float),
            "use_l2_norm": bool,
            "clustering_vq": bool,
        },
        table=lambda module: module.embedding.weight,
        codes=lambda module: _codes(module, module.embedding.weight),
        inputs=_steps.image,
        refuse=_refuse,
    ),
)
