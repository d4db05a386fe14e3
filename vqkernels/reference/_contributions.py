"""What a process sends of a step of a codebook, and what it makes of the sum over all processes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference import _fixed_point
from vqkernels.reference._random_rows import gather_rows

if TYPE_CHECKING:
    from vqkernels.reference.codebook_state import CodebookState, CodeUpdate

# Rows that all processes together offer for dead codes, so that what is sent does not grow with the batch.
MOST_CANDIDATES = 1024

# Counts are sent as two float32, this many bits and the rest: exact for up to 2^12 processes and 2^36 rows.
COUNT_BITS = 12


class Group(NamedTuple):
    """A process group, or a single process where `handle` is None."""

    handle: Any
    rank: int
    size: int

    def all_reduce(self, buffer: Tensor, op: str = "SUM", async_op: bool = False) -> Any:
        if self.handle is None:
            return None
        reduce_op = getattr(torch.distributed.ReduceOp, op)
        return torch.distributed.all_reduce(buffer, op=reduce_op, group=self.handle, async_op=async_op)

    def in_own_slot(self, x: Tensor, empty: int = 0) -> Tensor:
        """[size, *x.shape], x at this process's place and `empty` elsewhere: all_reduce makes a gather of it."""
        slots = torch.full((self.size, *x.shape), empty, dtype=x.dtype, device=x.device)
        slots[self.rank] = x
        return slots


def num_candidates(codebook: "CodebookState", group: Group) -> int:
    """Rows that each process offers for dead codes in a step."""
    most = min(codebook.codebook_size, MOST_CANDIDATES)
    return most if codebook.reproducible else -(-most // group.size)


class Contribution:
    """A step of a codebook as one process sees it. Its sums are float32."""

    def __init__(self, codebook: "CodebookState", update: "CodeUpdate", group: Group) -> None:
        self.codebook = codebook
        self.update = update
        self.group = group
        self.times = None
        if update.usable is not None:
            self.times = _arrival_times(update.usable, update.counts.sum(-1, keepdim=True))
        # Whether the codebook has got another state meanwhile. The other processes still count on this one.
        self.dropped = False

    def state(self) -> list[Tensor]:
        """The buffers that the step changes. Parameters are the optimizer's."""
        codebook = self.codebook
        state = [codebook.cluster_size, codebook.embed_avg, codebook.embed]
        return [t for t in state if not isinstance(t, nn.Parameter)]

    def maxima(self) -> list[Tensor]:
        """What has to be known of all processes before the sum: int64, to be replaced by the maximum."""
        return []

    def take_maxima(self, maxima: Iterator[Tensor]) -> None:
        """Takes the maxima over all processes, in the order of `maxima`."""

    def addends(self) -> list[Tensor]:
        """What is to be summed over all processes, of one dtype."""
        update = self.update
        addends = [*split_counts(update.counts), update.sums]
        if update.candidates is None or update.keys is None or self.times is None:
            return addends
        num = num_candidates(self.codebook, self.group)
        slots = [resize(x, num) for x in (self.times.unsqueeze(-1), update.candidates)]
        return [*addends, update.keys, *[self.group.in_own_slot(x) for x in slots]]

    def total(self, sums: Iterator[Tensor]) -> "CodeUpdate":
        """The step of all processes, from the sums in the order of `addends`."""
        update = self.update._replace(counts=join_counts(next(sums), next(sums)), sums=next(sums))
        if update.candidates is None:
            return update
        keys, times, candidates = next(sums), next(sums), next(sums)
        times = times.transpose(0, 1).flatten(1)
        times, order = torch.where(times > 0, times, torch.inf).sort(stable=True)
        candidates = gather_rows(candidates.transpose(0, 1).flatten(1, 2), order)
        return update._replace(candidates=candidates, usable=times.isfinite(), keys=keys)


class ReproducibleContribution(Contribution):
    """A step of a codebook as one process sees it. Its sums are integers."""

    def __init__(
        self,
        codebook: "CodebookState",
        update: "CodeUpdate",
        group: Group,
        rows: Tensor | None,
        indices: Tensor | None,
        seed: Tensor,
    ) -> None:
        super().__init__(codebook, update, group)
        if rows is None or indices is None:
            raise RuntimeError(
                "reproducible: expected the rows of the step, got only their statistics, which depend on how rows are "
                "distributed over batches and processes"
            )
        self.rows = rows.detach()
        self.indices = indices
        self.largest = _fixed_point.largest_value(self.rows, indices)
        self.seed = seed
        self.offer = None
        if update.candidates is not None:
            self.offer = Offer(self.rows, indices >= 0, num_candidates(codebook, group), group, self.seed)

    def maxima(self) -> list[Tensor]:
        return [self.largest] if self.offer is None else [self.largest, self.offer.keys]

    def take_maxima(self, maxima: Iterator[Tensor]) -> None:
        self.largest = next(maxima)
        if self.offer is not None:
            self.offer.take_keys(next(maxima))

    def addends(self) -> list[Tensor]:
        sums = _fixed_point.fixed_point_sums(self.rows, self.indices, self.codebook.codebook_size, self.largest)
        addends = [self.update.counts, sums]
        return addends if self.offer is None else [*addends, self.offer.own_bits().to(torch.int64)]

    def total(self, sums: Iterator[Tensor]) -> "CodeUpdate":
        counts, total = next(sums), _fixed_point.from_fixed_point(next(sums), self.largest)
        update = self.update._replace(counts=counts, sums=total)
        if self.offer is None:
            return update
        candidates = next(sums).to(torch.int32).view(torch.float32)
        keys = _fixed_point.random_order(self.seed)
        return update._replace(candidates=candidates, usable=self.offer.usable, keys=keys)


class Offer:
    """The choice of distinct rows from those of all processes: the ones with the largest of random keys.

    `keys` are to be replaced by their maximum over all processes and given to `take_keys`, after which the sum of
    `own_bits` over all processes are the bits of the chosen rows.

    Args:
        rows: [C, M, D].
        valid: bool [C, M], rows to choose from.
        num: rows to choose for each C.
        group: the processes.
        seed: float32 [C, S], the same on all processes: keys follow from it and from the bits of rows, and equal rows
            count once; None: keys are random numbers.
    """

    def __init__(self, rows: Tensor, valid: Tensor, num: int, group: Group, seed: Tensor | None) -> None:
        self.num = num
        self.group = group
        self.distinct = seed is not None
        if seed is None:
            keys = torch.randint(2**62, valid.shape, device=valid.device)
        else:
            keys = _fixed_point.hash_rows(rows.to(torch.float32), seed)
        keys, positions = self._largest(keys.masked_fill(~valid, -1))
        self.rows = resize(gather_rows(rows, positions).to(torch.float32), num)
        self.keys = group.in_own_slot(resize(keys.unsqueeze(-1), num, -1), -1)

    def take_keys(self, keys: Tensor) -> None:
        keys, self.order = self._largest(keys.squeeze(-1).transpose(0, 1).flatten(1))
        self.usable = keys >= 0

    def own_bits(self) -> Tensor:
        """int32 [C, num, D], 0 for rows of other processes."""
        own = self.usable & (self.order // self.num == self.group.rank)
        return gather_rows(self.rows, self.order % self.num).view(torch.int32).masked_fill(~own.unsqueeze(-1), 0)

    def _largest(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of keys [C, M], at most num, in descending order, and their positions."""
        keys, order = keys.sort(descending=True, stable=True)
        if self.distinct:
            again = F.pad(keys[:, 1:] == keys[:, :-1], (1, 0))[:, : keys.shape[1]]
            keys, unique = keys.masked_fill(again, -1).sort(descending=True, stable=True)
            order = order.gather(1, unique)
        return keys[:, : self.num], order[:, : self.num]


def split_counts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 tensors whose sums over processes `join_counts` makes counts of."""
    return (counts & (2**COUNT_BITS - 1)).to(torch.float32), (counts >> COUNT_BITS).to(torch.float32)


def join_counts(low: Tensor, high: Tensor) -> Tensor:
    return low.to(torch.int64) + (high.to(torch.int64) << COUNT_BITS)


def resize(x: Tensor, num: int, fill: int = 0) -> Tensor:
    """[C, M, D] to [C, num, D], cut off or filled up."""
    return F.pad(x[:, :num], (0, 0, 0, max(num - x.shape[1], 0)), value=fill)


def _arrival_times(usable: Tensor, num_rows: Tensor) -> Tensor:
    """The R smallest of `num_rows` exponentially distributed times, ascending; 0 where a row is not usable.

    Rows of all processes, sorted by such times, are in random order, whatever share of the rows a process has.

    Args:
        usable: bool [C, R], whether there is a row; those that are come first.
        num_rows: int64 [C, 1], the rows that these were drawn from.
    """
    gaps = torch.empty(usable.shape, device=usable.device).exponential_()
    left = (num_rows - torch.arange(usable.shape[1], device=usable.device)).clamp(min=1)
    return (gaps / left).cumsum(-1).masked_fill(~usable, 0)
