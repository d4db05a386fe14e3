"""Denoising operations against the same expression in PyTorch, eager and compiled: sizes, data, providers, checks."""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Operation
from benchmarks.peers import Unavailable
from benchmarks.truth import Check

Expression = Callable[..., Tensor | tuple[Tensor, ...]]


class Shape(NamedTuple):
    """The sizes of a tensor of activations, in the order that the operation documents."""

    name: str
    group: str
    sizes: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        size = "x".join(map(str, self.sizes))
        return f"{self.name} {size} {self.dtype}".strip()

    def smaller(self) -> "Shape":
        """The shape for a quick look: one image."""
        return self._replace(sizes=(1, *self.sizes[1:]))

    def record(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes), "dtype": self.dtype}

    def randn(self, device: torch.device, *sizes: tuple[int, ...]) -> list[Tensor]:
        """Normal numbers, the same for the same sizes on every device."""
        generator = torch.Generator().manual_seed(sum(self.sizes))
        return [
            torch.randn(size, generator=generator).to(device, getattr(torch, self.dtype)).requires_grad_()
            for size in sizes
        ]


def parse(dimensions: int) -> Callable[[str], Shape | None]:
    """Reads "A,B,C" as a shape of so many sizes; missing ones in front are 1. None where the text is no shape."""

    def parse_shape(text: str) -> Shape | None:
        if not re.fullmatch(r"\d+(,\d+){2,3}", text):
            return None
        sizes = tuple(map(int, text.split(",")))
        return Shape("", "own", (1,) * (dimensions - len(sizes)) + sizes) if len(sizes) <= dimensions else None

    return parse_shape


def operations(
    name: str,
    cases: list[Shape],
    ours: Expression,
    plain: Expression,
    inputs: Callable[[Shape, torch.device], Sequence[Tensor]],
) -> list[Operation]:
    """The forward pass of an operation, and forward and backward together.

    Args:
        name: of the operation.
        cases: the shapes to measure.
        ours: the operation as a function of the inputs.
        plain: the expression that it stands for.
        inputs: from a shape and a device, tensors that require gradients.

    Returns:
        Two tables, whose limit is a copy of as many bytes as inputs and outputs, of both directions, have.
    """
    dimensions = len(cases[0].sizes)

    def forward_traffic(case: Shape) -> float:
        with torch.device("meta"):
            tensors = inputs(case, torch.device("meta"))
            return float(sum(t.nbytes for t in [*tensors, *_tuple(plain(*tensors))]))

    def training_traffic(case: Shape) -> float:
        with torch.device("meta"):
            tensors = inputs(case, torch.device("meta"))
            outputs = sum(t.nbytes for t in _tuple(plain(*tensors)))
        # Forward reads the inputs and writes the outputs; backward reads both again and writes a gradient an input.
        return float(2 * outputs + 3 * sum(t.nbytes for t in tensors))

    tables = []
    for suffix, prepare, traffic in (
        ("", _forward, forward_traffic),
        (" and gradients", _training, training_traffic),
    ):
        providers = {
            "vqkernels": prepare(lambda: ours),
            "eager": prepare(lambda: plain),
            "torch.compile": prepare(lambda: _compiled(plain)),
        }
        tables.append(
            Operation(
                name=name + suffix,
                cases=cases,
                providers=providers,
                inputs=lambda case, device: tuple(inputs(case, device)),
                check=_budget(prepare, plain),
                limit="copy",
                work=traffic,
                parse=parse(dimensions),
            )
        )
    return tables


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _compiled(plain: Expression) -> Expression:
    torch.compiler.reset()
    try:
        return torch.compile(plain, fullgraph=True)
    except RuntimeError as error:
        raise Unavailable(f"cannot compile here ({error})") from error


def _forward(choose: Callable[[], Expression]) -> Callable[..., Callable[[], Any]]:
    def prepare(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        function = choose()

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _tuple(function(*tensors))

        return run

    return prepare


def _training(choose: Callable[[], Expression]) -> Callable[..., Callable[[], Any]]:
    def prepare(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        function = choose()
        gradients: list[Tensor] = []

        def run() -> tuple[Tensor, ...]:
            outputs = _tuple(function(*tensors))
            if not gradients:
                gradients.extend(map(_gradient, outputs))
            return (*outputs, *torch.autograd.grad(outputs, tensors, gradients))

        return run

    return prepare


def _gradient(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, generator=generator).to(output)


def _budget(prepare: Callable[..., Callable[..., Callable[[], Any]]], plain: Expression) -> Callable[..., Check]:
    """Compares with float64.

    "error" is the largest one, relative to the largest value of its tensor; "beyond_bound" counts the tensors whose
    error is more than twice that of the eager expression plus one rounding.
    """

    def check_for(*tensors: Tensor) -> Check:
        wide = [t.detach().double().requires_grad_() for t in tensors]
        truth = prepare(lambda: plain)(*wide)()
        eager = prepare(lambda: plain)(*tensors)()

        def check(result: tuple[Tensor, ...]) -> dict[str, float]:
            errors, beyond = [], 0
            for value, expression, exact in zip(result, eager, truth, strict=True):
                error, scale = (value.double() - exact).abs().max().item(), exact.abs().max().item()
                allowed = 2 * (expression.double() - exact).abs().max().item() + torch.finfo(value.dtype).eps * scale
                errors.append(error / scale if scale else error)
                beyond += not error <= allowed
            return {"error": max(errors), "beyond_bound": float(beyond)}

        return check

    return check_for


def split(x: Tensor, *sizes: int) -> list[Tensor]:
    """Parts of the last dimension, as views."""
    ends = list(accumulate(sizes))
    return [x[..., end - size : end] for size, end in zip(sizes, ends, strict=True)]
