"""The part of k-means in which the rows of several processes meet."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqkernels.reference import _fixed_point
from vqkernels.reference._contributions import Offer, join_counts, split_counts
from vqkernels.reference._random_rows import gather_rows
from vqkernels.reference.synchronization import group_of, pack, unpack

if TYPE_CHECKING:
    from vqkernels.reference.codebook_state import CodebookState


def draw_rows(codebook: "CodebookState", rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a distinct valid row of all processes for every code, the same on each; where there are fewer, they repeat.

    Args:
        codebook: K codes.
        rows: [C, M, D].
        valid: bool [C, M].

    Returns:
        drawn: float32 [C, K, D].
        possible: bool [C, 1], whether there was a valid row.
    """
    group = group_of(codebook)
    num = codebook.codebook_size
    offer = Offer(rows, valid, num, group, codebook.cluster_size if codebook.reproducible else None)
    group.all_reduce(offer.keys, op="MAX")
    offer.take_keys(offer.keys)
    bits = offer.own_bits()
    group.all_reduce(bits)
    found = offer.usable.sum(-1, keepdim=True)
    turns = torch.arange(num, device=rows.device) % found.clamp(min=1)
    return gather_rows(bits.view(torch.float32), turns), found > 0


def sum_statistics(
    codebook: "CodebookState", rows: Tensor, indices: Tensor, counts: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """The statistics of the rows of all processes, at once.

    Args:
        codebook: K codes.
        rows: [C, M, D].
        indices: int64 [C, M], their codes, -1 for none.
        counts: int64 [C, K], the statistics of this process's rows.
        sums: [C, K, D].

    Returns:
        counts and sums, float32.
    """
    group = group_of(codebook)
    if codebook.reproducible:
        largest = _fixed_point.largest_value(rows, indices)
        group.all_reduce(largest, op="MAX")
        addends = [counts, _fixed_point.fixed_point_sums(rows, indices, codebook.codebook_size, largest)]
    else:
        addends = [*split_counts(counts), sums.to(torch.float32)]
    buffer = pack(addends)
    group.all_reduce(buffer)
    *parts, sums = unpack(buffer, [t.shape for t in addends])
    if codebook.reproducible:
        return parts[0], _fixed_point.from_fixed_point(sums, largest)
    return join_counts(*parts), sums
