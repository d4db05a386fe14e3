"""What the codebooks of several processes do together.

In a training step every codebook contributes the statistics of its rows. Those of all codebooks are packed into one
buffer, which one asynchronous all_reduce sums over the processes while the rest of forward and backward runs. Which
codebook is the last of a step is known from the last one with the same beginning; in the first step every codebook is
summed on its own.
Sums are applied when the gradient reaches the rows of one of the codebooks, at the latest before its codes are read;
those of codes that are a parameter at once.

All processes have to run the same codebooks in the same order in training, with any rows or none. Collectives are
launched in the forward pass of training and in k-means alone, where all processes are in the same place; what a single
process may do, such as saving a state, only waits for them. Nor does it disturb the others that one process applies a
sum early: applying starts from the state at the launch and is repeated in the next step, so that it does not matter
whether DistributedDataParallel has copied buffers between processes meanwhile.

Where a model skips a codebook that it used before, the others may be summed only when the next step begins; until then
their codes are as before.

With `reproducible` sums are integers: rows are rounded to multiples of a power of two that follows from the largest
value of all processes, and rows for k-means and dead codes are chosen by a hash of their bits. The codebook then is the
same, bit for bit, for any distribution of the same rows over processes. That takes a second, small all_reduce, of the
largest values, before the sum.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo as eager  # unlike torch.compiler.disable, does not import the compiler

from vqkernels.reference._contributions import (
    Contribution,
    Group,
    ReproducibleContribution,
    num_candidates,
)

if TYPE_CHECKING:
    from vqkernels.reference.codebook_state import CodebookState, CodeUpdate

SINGLE = Group(None, 0, 1)


def is_distributed() -> bool:
    """Whether this process is one of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def group_of(codebook: "CodebookState") -> Group:
    """The processes whose rows a codebook follows.

    Raises:
        RuntimeError: the codebook asks for a process group, and there is none.
    """
    if not codebook.sync_codebook:
        return SINGLE
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "sync_codebook: expected a process group with sync_codebook=True, got none; "
            "call torch.distributed.init_process_group first, or pass sync_codebook=False"
        )
    handle = codebook.process_group or distributed.group.WORLD
    return Group(handle, distributed.get_rank(handle), distributed.get_world_size(handle))


def candidates_of(codebook: "CodebookState") -> int:
    """Rows that this process offers for dead codes in a step."""
    return num_candidates(codebook, group_of(codebook))


class _Flight:
    """Contributions to one all_reduce."""

    def __init__(self, contributions: list[Contribution], group: Group) -> None:
        self.contributions = contributions
        maxima = [t for c in contributions for t in c.maxima()]
        if maxima:
            buffer = pack(maxima)
            group.all_reduce(buffer, op="MAX")
            largest = unpack(buffer, [t.shape for t in maxima])
            for c in contributions:
                c.take_maxima(largest)
        addends = [t for c in contributions for t in c.addends()]
        self.shapes = [t.shape for t in addends]
        self.buffer = pack(addends)
        self.work = group.all_reduce(self.buffer, async_op=True)
        self.before = pack(self._buffers())
        self.after: Tensor | None = None

    def concerns(self, codebook: "CodebookState") -> bool:
        return any(c.codebook is codebook for c in self.contributions)

    def apply(self, *, last: bool) -> None:
        """Waits, and gives the codebooks their new state; the same state every time, even if another was copied there.

        Args:
            last: whether no other call follows.
        """
        if self.after is not None:
            self._restore(self.after)
            return
        totals = self.totals()
        # A copy from another process leaves no trace, so that nobody can tell whether this is necessary.
        self._restore(self.before)
        for c, update in zip(self.contributions, totals, strict=True):
            if not c.dropped:
                c.codebook.apply_update_(update)
        if not last:
            self.after = pack(self._buffers())

    def totals(self) -> list["CodeUpdate"]:
        """Waits; the sums over all processes."""
        if self.work is not None:
            self.work.wait()
        sums = unpack(self.buffer, self.shapes)
        return [c.total(sums) for c in self.contributions]

    def _buffers(self) -> list[Tensor]:
        return [t for c in self.contributions for t in c.state()]

    @torch.no_grad()
    def _restore(self, state: Tensor) -> None:
        values = unpack(state, [t.shape for t in self._buffers()])
        for c in self.contributions:
            for buffer in c.state():
                value = next(values)
                if not c.dropped:
                    buffer.copy_(value)


class _Channel:
    """The steps of the codebooks that follow one process group.

    Attributes:
        tokens: what codebooks are known by; unlike an id, a token is never given to another one.
        seen: the codebooks, as tokens, that have contributed to the present step, in order.
        expected: those that are going to.
        steps: earlier steps, by the codebook that they began with.
        waiting: contributions whose all_reduce is not launched yet.
        flights: those whose all_reduce is, until they are applied for the last time.
    """

    def __init__(self) -> None:
        self.tokens: weakref.WeakKeyDictionary[CodebookState, object] = weakref.WeakKeyDictionary()
        self.seen: list[object] = []
        self.expected: list[object] = []
        self.steps: dict[object, list[object]] = {}
        self.waiting: list[Contribution] = []
        self.flights: list[_Flight] = []

    def token(self, codebook: "CodebookState") -> object:
        return self.tokens.setdefault(codebook, object())

    def begin(self, codebook: "CodebookState", group: Group) -> None:
        token = self.token(codebook)
        # A codebook that comes again begins a step, and so does an unexpected one that has begun a step before.
        unexpected = token not in self.expected and (not self.seen or token in self.steps)
        if token in self.seen or unexpected:
            self._begin_step(token, group)
        self.apply([flight for flight in self.flights if flight.concerns(codebook)], last=True)

    def contribute(self, contribution: Contribution, group: Group) -> None:
        token = self.token(contribution.codebook)
        self.seen.append(token)
        if self.seen.count(token) > self.expected.count(token):
            self._launch([contribution], group)
            return
        self.waiting.append(contribution)
        self._launch_when_complete(group)

    def skip(self, codebook: "CodebookState", group: Group) -> None:
        token = self.token(codebook)
        self.seen += [token] * max(self.expected.count(token), 1)
        self._launch_when_complete(group)

    def apply(self, flights: list[_Flight], *, last: bool) -> None:
        for flight in flights:
            flight.apply(last=last)
        if last:
            self.flights = [flight for flight in self.flights if flight not in flights]

    def finish(self, codebook: "CodebookState") -> None:
        self.apply([flight for flight in self.flights if flight.concerns(codebook)], last=False)

    def drop(self, codebook: "CodebookState") -> None:
        for c in [*self.waiting, *[c for flight in self.flights for c in flight.contributions]]:
            c.dropped = c.dropped or c.codebook is codebook

    def _begin_step(self, first: object, group: Group) -> None:
        self._launch_waiting(group)
        if self.seen:
            self.steps[self.seen[0]] = self.seen
        if first in self.seen:
            # What came before belongs to another model, or is skipped from now on.
            self.steps.setdefault(first, self.seen[self.seen.index(first) :])
        self.seen, self.expected = [], self.steps.get(first, [])

    def _launch_when_complete(self, group: Group) -> None:
        if Counter(self.expected) <= Counter(self.seen):
            self._launch_waiting(group)

    def _launch_waiting(self, group: Group) -> None:
        kinds: dict[object, list[Contribution]] = {}
        for c in self.waiting:
            kinds.setdefault((c.codebook.embed.device, type(c)), []).append(c)
        self.waiting = []
        for contributions in kinds.values():
            self._launch(contributions, group)

    def _launch(self, contributions: list[Contribution], group: Group) -> None:
        # A flight starts from the state of its codebooks, so none of them may be on another one.
        codebooks = [c.codebook for c in contributions]
        self.apply([f for f in self.flights if any(f.concerns(codebook) for codebook in codebooks)], last=True)
        flight = _Flight(contributions, group)
        self.flights.append(flight)
        if any(isinstance(codebook.embed, nn.Parameter) for codebook in codebooks):
            # An optimizer moves these codes too: all processes have to be done before it, or all after it.
            self.apply([flight], last=True)


_channels: "weakref.WeakKeyDictionary[object, _Channel]" = weakref.WeakKeyDictionary()
# The cluster sizes at the beginning of a step: another one in every step, and the same in all processes.
_seeds: "weakref.WeakKeyDictionary[CodebookState, Tensor]" = weakref.WeakKeyDictionary()


def pack(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def unpack(buffer: Tensor, shapes: list[torch.Size]) -> Iterator[Tensor]:
    parts = buffer.split([shape.numel() for shape in shapes])
    return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


@eager
@torch.no_grad()
def begin(codebook: "CodebookState") -> None:
    """Brings a codebook up to date for a training step, which `contribute` or `skip` follows in all processes.

    Before its first step a codebook gets the state that it has in the first process of the group.

    Raises:
        RuntimeError: there is no process group.
    """
    group = group_of(codebook)
    if group.handle is not None:
        channel = _channels.setdefault(group.handle, _Channel())
        if codebook not in channel.tokens:
            channel.token(codebook)
            broadcast_state(codebook)
        channel.begin(codebook, group)
    if codebook.reproducible:
        _seeds[codebook] = codebook.cluster_size.clone()


@eager
@torch.no_grad()
def contribute(codebook: "CodebookState", update: "CodeUpdate", rows: Tensor | None, indices: Tensor | None) -> None:
    """Takes a process's part of a step; once all parts are there, calls `codebook.apply_update_` with their sum.

    A codebook may contribute several times to a step.

    Args:
        codebook: K codes, after `begin`.
        update: what this process's rows ask for.
        rows: [C, M, D]; None: only their statistics are known.
        indices: int64 [C, M], their codes, -1 for none.

    Raises:
        RuntimeError: there is no process group, or the codebook is `reproducible` and there are no rows.
    """
    group = group_of(codebook)
    if group.handle is None:
        _Flight([_contribution(codebook, update, rows, indices, group)], group).apply(last=True)
        return
    _channels[group.handle].contribute(_contribution(codebook, update, rows, indices, group), group)
    if rows is not None:
        apply_on_gradient(codebook, rows)


@eager
@torch.no_grad()
def skip(codebook: "CodebookState") -> None:
    """Instead of `contribute`, in all processes: nobody has to wait for this codebook in this step."""
    group = group_of(codebook)
    if group.handle is not None:
        _channels[group.handle].skip(codebook, group)


@eager
def apply_on_gradient(codebook: "CodebookState", x: Tensor) -> None:
    """Applies what was summed when the backward pass has the gradient of x, which the codebook has quantized."""
    group = group_of(codebook)
    if group.handle is not None and x.requires_grad:
        channel = _channels[group.handle]
        x.register_hook(lambda grad: channel.apply(channel.flights, last=True))


@eager
@torch.no_grad()
def total(codebook: "CodebookState", update: "CodeUpdate", rows: Tensor | None, indices: Tensor | None) -> "CodeUpdate":
    """The sum of the parts of all processes, at once and without applying it; see `contribute`."""
    group = group_of(codebook)
    flight = _Flight([_contribution(codebook, update, rows, indices, group)], group)
    return flight.totals()[0]


@eager
@torch.no_grad()
def finish(codebook: "CodebookState") -> None:
    """Waits for what was summed, and applies it. Launches nothing, so that one process may call it alone."""
    for channel in _channels.values():
        channel.finish(codebook)


@eager
def drop(codebook: "CodebookState") -> None:
    """Forgets what a codebook has contributed, as its state is being set by other means."""
    for channel in _channels.values():
        channel.drop(codebook)


def _contribution(
    codebook: "CodebookState", update: "CodeUpdate", rows: Tensor | None, indices: Tensor | None, group: Group
) -> Contribution:
    if codebook.reproducible:
        return ReproducibleContribution(codebook, update, group, rows, indices, _seeds[codebook])
    return Contribution(codebook, update, group)


def broadcast_state(codebook: "CodebookState") -> None:
    """Gives all processes the buffers of the group's first process. Waits for the device."""
    group = group_of(codebook)
    buffers = [codebook.initted, codebook.cluster_size, codebook.embed_avg]
    if not isinstance(codebook.embed, nn.Parameter):
        buffers.append(codebook.embed)
    state = pack([t.to(torch.float32) for t in buffers])
    torch.distributed.broadcast(state, group=group.handle, group_src=0)
    for buffer, value in zip(buffers, unpack(state, [t.shape for t in buffers]), strict=True):
        buffer.copy_(value)
    codebook._may_need_init = not bool(codebook.initted)
