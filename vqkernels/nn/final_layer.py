"""The last layer of diffusion transformers on the fused operations."""

from typing import Any

from torch import Tensor

from vqkernels import reference
from vqkernels.nn.dit_block import NUMERICS, Stream, normalized
from vqkernels.ops._checks import check_choice
from vqkernels.reference.dit_block import check_condition


def finish(self: Any, stream: Stream, modulation: Tensor, *, numerics: str) -> Tensor:
    """A `reference.FinalLayer` for a stream whose last branch is still to be added."""
    shift, scale = modulation.chunk(2, -1)
    return self.linear(normalized(stream, shift, scale, numerics)[1])


class FinalLayer(reference.FinalLayer):
    """`reference.FinalLayer`, with its state_dict, in fewer passes over memory.

    Args:
        hidden_size: D.
        patch_size: p, the sides of a patch.
        out_channels: C.
        numerics: "fp32" or "eager", see `DiTBlock`.

    Raises:
        ValueError: numerics is neither.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, *, numerics: str = "fp32") -> None:
        check_choice("numerics", numerics, NUMERICS)
        super().__init__(hidden_size, patch_size, out_channels)
        self.numerics = numerics

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        check_condition(x, c, self.hidden_size)
        return self.advance((x, None, None), self.adaLN_modulation(c))

    def advance(self, stream: Stream, modulation: Tensor) -> Tensor:
        """Patches [B, L, p p C] of the stream of the last block, see `DiTBlock.advance`; modulation: [B, 2 D]."""
        return finish(self, stream, modulation, numerics=self.numerics)

    forward.__doc__ = reference.FinalLayer.forward.__doc__
