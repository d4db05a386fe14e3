"""Random projections and random codes as targets of self-supervised learning, with upstream's interface."""

from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.reference import _checks
from vqkernels.reference.layer import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """Projects to a few dimensions at random, and takes the code at the smallest angle (arXiv 2202.01855).

    Nothing here is updated. Interface, defaults, results and state_dict are those of `RandomProjectionQuantizer` in
    vector-quantize-pytorch 1.32; as there, several codebooks see the projections through one more, `vq.project_in`.

    Args:
        dim: dimension of the input.
        codebook_size: codes K of a codebook.
        codebook_dim: dimension D of a projection.
        num_codebooks: projections H, each with a codebook of its own.
        norm: first give every input mean 0 and variance 1.
        **kwargs: further arguments of the quantizer; see `VectorQuantize`.

    Raises:
        ValueError: arguments are out of range.
    """

    layer_class: type[VectorQuantize] = VectorQuantize

    rand_projs: Tensor

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _checks.check_sizes(dim=dim, codebook_dim=codebook_dim, num_codebooks=num_codebooks)
        self.dim = dim
        self.num_codebooks = num_codebooks
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = self.layer_class(
            codebook_dim * num_codebooks,
            codebook_size,
            heads=num_codebooks,
            use_cosine_sim=True,
            separate_codebook_per_head=True,
            **kwargs,
        )
        self.vq.eval()

    def train(self, mode: bool = True) -> "RandomProjectionQuantizer":
        super().train(mode)
        self.vq.eval()
        return self

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """The codes of x, or, with indices, the cross entropy of the similarities to them.

        Args:
            x: [B, N, dim]; float32, float64, bfloat16 or float16.
            indices: int64, as returned without them.

        Returns:
            int64 [B, N], or [B, N, H] with several codebooks; or a float32 scalar.

        Raises:
            TypeError: an argument has an unexpected type or dtype.
            ValueError: shapes do not fit.
        """
        _checks.check_tensor("x", x, _checks.FLOAT_TYPES)
        _checks.check_input(x, [f"[B, N, {self.dim}]"], self.dim, -1)
        if self.vq.training:  # someone has called its `train`
            self.vq.eval()
        projected = torch.einsum("bnd,hde->bnhe", self.norm(x), self.rand_projs).flatten(2)
        results = self.vq(projected, indices=indices)
        return results[1]
