"""What `fuse` did to a model."""

from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple


class FusedModule(NamedTuple):
    """A module that now runs on the fused operations: its path in the model, its class and its library."""

    name: str
    kind: str
    library: str


class LeftModule(NamedTuple):
    """A quantizer or block that stays as it was: its path in the model, its class, and why."""

    name: str
    kind: str
    reason: str


class FusionReport:
    """What `fuse` replaced and what it left; as a context manager it restores at the end what it replaced.

    Attributes:
        fused: the modules that changed.
        left: the quantizers and blocks that did not, with reasons.
    """

    def __init__(
        self, fused: tuple[FusedModule, ...], left: tuple[LeftModule, ...], restore: Callable[[], None]
    ) -> None:
        self.fused = fused
        self.left = left
        self._restore = restore

    def __enter__(self) -> "FusionReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def __repr__(self) -> str:
        return f"FusionReport(fused={self.fused}, left={self.left})"

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return "vqkernels.fuse: nothing to fuse found"
        rows = [("fused", m.name or "(model)", m.kind, m.library) for m in self.fused]
        rows += [("left", m.name or "(model)", m.kind, m.reason) for m in self.left]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        return "\n".join([f"vqkernels.fuse: {len(self.fused)} fused, {len(self.left)} left", *lines])
