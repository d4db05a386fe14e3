"""Residual vector quantization of groups of channels, with the interface of vector-quantize-pytorch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vqkernels.reference import residual
from vqkernels.reference.residual_layer import ResidualVQ


class GroupedResidualVQ(residual.GroupedResidual):
    """Splits the channels into groups, each quantized by a `ResidualVQ` of its own.

    Args:
        dim: dimension of the input.
        groups: number of groups G.
        accept_image_fmap: input is [B, dim, H, W].
        **kwargs: arguments of the groups; see `ResidualVQ`.
    """

    layer_class = ResidualVQ

    def _make_layer(self, dim: int, **kwargs: Any) -> nn.Module:
        return self.layer_class(dim=dim, accept_image_fmap=self.accept_image_fmap, **kwargs)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
        num_levels: int | Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Quantizes x as `ResidualVQ` does; indices and losses have a first dimension G, codes come as a tuple.

        With indices, [G, ..., Q], the cross entropies of the groups are added up.
        """
        parts = self.split(x)
        options = {
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
            "mask": mask,
        }
        if indices is not None and len(indices) > 0:
            if len(indices) != self.groups:
                raise ValueError(f"indices: expected {self.groups} groups, got {len(indices)}")
            results = [
                layer(part, indices=target, **options)
                for layer, part, target in zip(self.rvqs, parts, indices, strict=True)
            ]
            quantized, losses = self.join(results)
            return quantized, losses.sum()
        if num_levels is None:
            num_levels = residual.choose_num_levels(self.rvqs[0], x, None, None)
        results = [
            layer(part, return_all_codes=return_all_codes, num_levels=num_levels, **options)
            for layer, part in zip(self.rvqs, parts, strict=True)
        ]
        return self.join(results, return_all_codes)
