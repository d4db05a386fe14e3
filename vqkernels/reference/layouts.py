"""How the vectors of a layer's input lie, and how they become the rows of its codebooks."""

from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels.reference import _checks


class Layout(NamedTuple):
    """Input [B, N, dim] or [B, dim], [B, dim, N] without channel_last, [B, dim, H, W] or [B, dim, D, H, W].

    Each vector has as many parts as there are heads: rows of one codebook, or of one for each head.
    """

    dim: int
    heads: int
    separate: bool
    channel_last: bool
    image: bool
    volume: bool

    def channels_first(self, x: Tensor) -> bool:
        return x.ndim > 2 and (not self.channel_last or self.image or self.volume)

    def tokens(self, x: Tensor) -> Tensor:
        """Checks x and brings it to [B, N, dim]."""
        _checks.check_tensor("x", x, _checks.FLOAT_TYPES)
        if self.volume:
            layouts = [f"[B, {self.dim}, D, H, W]"]
        elif self.image:
            layouts = [f"[B, {self.dim}, H, W]"]
        else:
            layouts = [f"[B, N, {self.dim}]" if self.channel_last else f"[B, {self.dim}, N]", f"[B, {self.dim}]"]
        channels_first = self.channels_first(x)
        _checks.check_input(x, layouts, self.dim, 1 if channels_first else -1)
        if channels_first:
            return x.flatten(2).mT
        return x.unsqueeze(1) if x.ndim == 2 else x

    def output(self, tokens: Tensor, x: Tensor) -> Tensor:
        """[B, N, ..., dim] back to the shape of x, what is between N and dim at its end or before its channels."""
        more = tokens.shape[2:-1]
        if self.channels_first(x):
            return tokens.movedim(-1, 1).reshape(*x.shape, *more)
        return tokens.reshape(*x.shape[:-1], *more, x.shape[-1])

    def rows(self, t: Tensor) -> Tensor:
        """[B, N, heads * W] to the rows [C, M, W] of each codebook."""
        t = t.reshape(t.shape[0] * t.shape[1], self.heads, t.shape[-1] // self.heads)
        return t.transpose(0, 1) if self.separate else t.flatten(0, 1).unsqueeze(0)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Undoes `rows`."""
        return (rows.transpose(0, 1) if self.separate else rows).reshape(shape)

    def mask_rows(self, mask: Tensor) -> Tensor:
        """[B, N] to [C, M]."""
        return self.rows(mask.unsqueeze(-1).expand(-1, -1, self.heads)).squeeze(-1)

    def index_rows(self, indices: Tensor, tokens: Tensor) -> Tensor:
        """Indices in the shape of `indices_shape` to int64 [C, M]."""
        return self.rows(indices.reshape(*tokens.shape[:2], self.heads)).squeeze(-1).to(torch.int64)

    def positions(self, tokens: Tensor) -> Tensor:
        """Which rows of a codebook belong to each of the N positions, int64 [N, G]."""
        batch, length = tokens.shape[:2]
        parts = 1 if self.separate else self.heads
        rows = torch.arange(batch * length * parts, device=tokens.device)
        return rows.reshape(batch, length, parts).transpose(0, 1).flatten(1)

    def transformed_rows(self, codes: Tensor, tokens: Tensor) -> Tensor:
        """Codes of every row, [H, B, N, K, D] or [1, B * heads, N, K, D], to [C, M, K, D]."""
        if not self.separate:
            codes = codes.unflatten(1, (tokens.shape[0], self.heads)).transpose(2, 3).flatten(2, 3)
        return codes.flatten(1, 2)

    def indices_shape(self, x: Tensor) -> torch.Size:
        """The shape of x without channels, and [..., heads] with several heads."""
        positions = x.shape[:1] + (x.shape[2:] if self.channels_first(x) else x.shape[1:-1])
        return torch.Size((*positions, self.heads)) if self.heads > 1 else positions

    def channels_to_place(self, vectors: Tensor) -> Tensor:
        """Moves the channels of [B, ..., dim] to where the input has them."""
        return vectors.movedim(-1, 1) if self.channels_first(vectors) else vectors
