"""The last layer of diffusion transformers on the fused operations."""

from typing import Any

from torch import Tensor

from vqkernels import reference
from vqkernels.nn.dit_block import NUMERICS, Stream, normalized
from vqkernels.ops._checks import check_choice


def finish(self: Any, stream: Stream, modulation: Tensor, *, numerics: str) -> Tensor:
    """A `reference.FinalLayer` for a stream whose last branch is still to be added."""
    shift, scale = modulation.chunk(2, -1)
    return self.linear(normalized(stream, shift, scale, numerics)[1])


class FinalLayer(reference.FinalLayer):
    """`reference.FinalLayer`, with its state_dict, in fewer passes over memory.

    Args:
        *args: those of `reference.FinalLayer`.
        numerics: "fp32" or "eager", see `DiTBlock`.
        **kwargs: those of `reference.FinalLayer`.

    Raises:
        ValueError: numerics is neither.
    """

    def __init__(self, *args: Any, numerics: str = "fp32", **kwargs: Any) -> None:
        check_choice("numerics", numerics, NUMERICS)
        super().__init__(*args, **kwargs)
        self.numerics = numerics

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.advance((x, None, None), self.adaLN_modulation(c))

    def advance(self, stream: Stream, modulation: Tensor) -> Tensor:
        """Patches [B, L, p p C] of the stream of the last block, see `DiTBlock.advance`; modulation: [B, 2 D]."""
        return finish(self, stream, modulation, numerics=self.numerics)

    forward.__doc__ = reference.FinalLayer.forward.__doc__
