"""The attention block of VQGAN and latent diffusion on the fused operations."""

from typing import Any

from torch import Tensor

from vqkernels import ops, reference
from vqkernels.nn.dit_block import NUMERICS
from vqkernels.ops._checks import check_choice
from vqkernels.reference.attn_block import as_map, as_single_head


def attend(self: Any, x: Tensor) -> Tensor:
    """`reference.AttnBlock` on `group_norm_silu` and `attention`."""
    norm = self.norm
    h = ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation="none")
    q, k, v = (as_single_head(t) for t in (self.q(h), self.k(h), self.v(h)))
    return x + self.proj_out(as_map(ops.attention(q, k, v), x))


class AttnBlock(reference.AttnBlock):
    """`reference.AttnBlock`, with its state_dict, in memory that grows with the positions and not with their square.

    Args:
        *args: those of `reference.AttnBlock`.
        numerics: "fp32", or "eager", which is the reference as it is.
        **kwargs: those of `reference.AttnBlock`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *args: Any, numerics: str = "fp32", **kwargs: Any) -> None:
        check_choice("numerics", numerics, NUMERICS)
        super().__init__(*args, **kwargs)
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        return attend(self, x) if self.numerics == "fp32" else super().forward(x)

    forward.__doc__ = reference.AttnBlock.forward.__doc__
