"""The vector quantizer of diffusers, in VQModel and PaellaVQModel."""

from typing import Any

import torch
from torch import Tensor

from vqkernels.fuse._recipes import Recipe
from vqkernels.fuse._search import nearest


def _forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
    z = z.permute(0, 2, 3, 1).contiguous()
    indices = nearest(z.reshape(-1, self.vq_embed_dim), self.embedding.weight)
    z_q = self.embedding(indices).view(z.shape)
    commitment, codebook = torch.mean((z_q.detach() - z) ** 2), torch.mean((z_q - z.detach()) ** 2)
    # The beta of legacy modules weighs the codebook's term.
    loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
    z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2).contiguous()
    if self.remap is not None:
        indices = self.remap_to_used(indices.reshape(z.shape[0], -1)).reshape(-1, 1)
    if self.sane_index_shape:
        indices = indices.reshape(z_q.shape[0], z_q.shape[2], z_q.shape[3])
    return z_q, loss, (None, None, indices)


def _remap_to_used(self: Any, inds: Tensor) -> Tensor:
    used, order = self.used.to(inds).sort(stable=True)  # among equal entries the first counts
    places = torch.searchsorted(used, inds.contiguous()).clamp_(max=len(used) - 1)
    new = order[places]
    unknown = used[places] != inds
    if self.unknown_index == "random":
        new[unknown] = torch.randint(0, self.re_embed, size=new[unknown].shape).to(device=new.device)
    else:
        new[unknown] = self.unknown_index
    return new


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        library="diffusers",
        class_path="diffusers.models.autoencoders.vae.VectorQuantizer",
        methods={"forward": _forward, "remap_to_used": _remap_to_used},
        sources=frozenset({"4a3dd00382d2ac1d"}),
        versions="0.42",
    ),
)
