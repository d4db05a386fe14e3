"""descript-audio-codec: the search of its levels, whose rows and codes are both brought to length 1."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.fuse._recipes import Recipe
from vqkernels.fuse._search import nearest


def _decode_latents(self: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        rows = F.normalize(latents.mT.reshape(-1, latents.shape[1]))
        # Not the inner product alone: a code of zeros has no length, and is nearer than one that lies across.
        indices = nearest(rows, F.normalize(self.codebook.weight)).view(latents.shape[0], -1)
    return self.decode_code(indices), indices


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        library="descript-audio-codec",
        class_path="dac.nn.quantize.VectorQuantize",
        methods={"decode_latents": _decode_latents},
        sources=frozenset({"25ad869cf33e64a2"}),
        versions="1.0",
    ),
)
