"""A fused model against the original and against the original in float64, all three with the same codes."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vqkernels
from benchmarks.fuse_models import Subject
from vqkernels.fuse import _search, vector_quantize_pytorch

aten = torch.ops.aten


class Search(NamedTuple):
    """One search of a fused model."""

    rows: Tensor  # [H, N, D]
    codes: Tensor  # [H, K, D]
    metric: str
    indices: Tensor  # [H, N]


@contextlib.contextmanager
def recorded() -> Iterator[list[Search]]:
    """The searches that fused modules do, in their order; levels of a residual quantizer one by one."""
    searches: list[Search] = []
    nearest_code, residual_quantize = _search.nearest_code, _search.residual_quantize

    def add(rows: Tensor, codes: Tensor, metric: str, indices: Tensor) -> None:
        heads = codes.shape[0] if codes.ndim == 3 else 1
        rows, codes = rows.detach().clone().reshape(heads, -1, rows.shape[-1]), codes.detach().clone()
        indices = indices.clone().reshape(heads, -1)
        searches.append(Search(rows, codes.reshape(heads, -1, rows.shape[-1]), metric, indices))

    def search(z: Tensor, codebook: Tensor, *, metric: str) -> Tensor:
        indices = nearest_code(z, codebook, metric=metric)
        add(z, codebook, metric, indices)
        return indices

    def levels(z: Tensor, codebooks: list[Tensor], *, metric: str, gradient: str) -> Any:
        result = residual_quantize(z, codebooks, metric=metric, gradient=gradient)
        residual = z
        for codes, indices in zip(codebooks, result.indices.unbind(-1), strict=True):
            add(residual, codes, metric, indices)
            residual = residual - codes[indices]
        return result

    replaced = [(_search, "nearest_code", search), (_search, "residual_quantize", levels)]
    replaced.append((vector_quantize_pytorch, "nearest_code", search))
    originals = [getattr(module, name) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield searches
    finally:
        for (module, name, _), function in zip(replaced, originals, strict=True):
            setattr(module, name, function)


class Replay(TorchDispatchMode):
    """Makes the searches of an original (argmin, argmax, max over codes) answer as recorded; keeps its own answers."""

    def __init__(self, searches: list[Search]) -> None:
        super().__init__()
        self.searches = searches
        self.own: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (aten.argmin.default, aten.argmax.default, aten.max.dim) or not self._is_search(args[0]):
            return result
        search = self.searches[len(self.own)]
        indices = result[1] if func is aten.max.dim else result
        self.own.append(indices.reshape(search.indices.shape))
        chosen = search.indices.reshape(indices.shape)
        return (result[0], chosen) if func is aten.max.dim else chosen

    def _is_search(self, scores: Tensor) -> bool:
        if len(self.own) == len(self.searches):
            return False
        search = self.searches[len(self.own)]
        codes = search.codes.shape[1]
        return scores.shape[-1] == codes and scores.numel() == search.indices.numel() * codes


class Double(TorchFunctionMode):
    """Lets x.float() be x.double()."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].double() if func is torch.Tensor.float else func(*args, **(kwargs or {}))


class Run(NamedTuple):
    """Every step's outputs and gradients, and the state in the end."""

    values: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Tensor]


class Agreement(NamedTuple):
    """How far a fused model is from its original; errors are relative to the largest element of all."""

    codes: int
    ties: int  # codes that differ because the original cannot tell which is nearer
    output_error: float
    gradient_error: float


def run(model: nn.Module, subject: Subject, steps: int) -> Run:
    """Evaluates once (`steps` 0), or trains for some steps, from a fixed random state."""
    torch.manual_seed(1)
    model.train(steps > 0)
    dtype = next(model.parameters()).dtype if list(model.parameters()) else next(model.buffers()).dtype
    inputs = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in subject.inputs]
    if not steps:
        with torch.no_grad():
            return Run(list(subject.outputs(model(*inputs))), [], model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    values, gradients = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        output, *losses = subject.outputs(model(*inputs))
        (output.square().mean() + sum(losses)).backward()
        values += [output.detach(), *[loss.detach() for loss in losses]]
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return Run(values, gradients, model.state_dict())


def count_ties(searches: list[Search], own: list[Tensor]) -> int:
    """How many codes differ; none may but for two whose distances differ by less than the original can tell.

    In float32 a distance |z|^2 - 2 z c + |c|^2, added up in any order, is off by at most (D + 8) rounding errors of
    (|z| + |c|)^2 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); so is an inner product.
    """
    assert len(own) == len(searches)
    ties = 0
    for search, indices in zip(searches, own, strict=True):
        for head, n in (indices != search.indices).nonzero().tolist():
            z, codes = search.rows[head, n].double(), search.codes[head].double()
            ours, theirs = codes[search.indices[head, n]], codes[indices[head, n]]
            if search.metric == "dot":  # originals divide the row by its length
                z = z / z.norm()
                gap = 2 * (z @ theirs - z @ ours)
            else:
                gap = (z - ours).square().sum() - (z - theirs).square().sum()
            size = z.norm() + torch.maximum(ours.norm(), theirs.norm())
            rounding = torch.finfo(torch.float32).eps / 2
            assert gap.abs() <= 2 * (len(z) + 8) * rounding * size.square()
            ties += 1
    return ties


class Error(NamedTuple):
    """The largest error of a tensor, and its largest element."""

    error: float
    size: float


def check_within_budget(fused: Tensor, original: Tensor, truth: Tensor) -> Error:
    """Shapes and dtypes are equal; the error is at most twice the original's, plus one rounding of the result."""
    assert fused.shape == original.shape == truth.shape
    assert fused.dtype == original.dtype
    if not fused.is_floating_point() or not fused.numel():
        assert torch.equal(fused, original)
        return Error(0.0, 0.0)
    truth = truth.double()
    assert truth.isfinite().all()
    size = truth.abs().max().item()
    error = (fused.double() - truth).abs().max().item()
    assert error <= 2 * (original.double() - truth).abs().max().item() + torch.finfo(fused.dtype).eps * size
    return Error(error, size)


def _check_all(*runs: list[Tensor]) -> float:
    """The largest error of any tensor, relative to the largest element of them all."""
    errors = [check_within_budget(*triple) for triple in zip(*runs, strict=True)]
    return max((e.error for e in errors), default=0.0) / max([e.size for e in errors if e.size] or [1.0])


def compare_subject(subject: Subject, steps: int) -> Agreement:
    """Compares a fused subject with the original in evaluation (`steps` 0) or training.

    Raises:
        AssertionError: a code differs that may not, or an output, a gradient or the state exceeds the budget.
    """
    fused, original, truth = (copy.deepcopy(subject.model) for _ in range(3))
    # The blocks around a quantizer stay as they are: its input is the original's but for what it does itself.
    report = vqkernels.fuse(fused, numerics="eager", verbose=False)
    assert report.fused
    assert all("rounds otherwise than the original" in module.reason for module in report.left)
    with recorded() as searches:
        results = run(fused, subject, steps)
    assert searches
    with Replay(searches) as replay:
        expected = run(original, subject, steps)
    ties = count_ties(searches, replay.own)
    with Double(), Replay(searches):
        exact = run(truth.double(), subject, steps)
    assert list(results.state) == list(expected.state)
    for name in results.state:
        check_within_budget(results.state[name], expected.state[name], exact.state[name])
    return Agreement(
        sum(s.indices.numel() for s in searches),
        ties,
        _check_all(results.values, expected.values, exact.values),
        _check_all(results.gradients, expected.gradients, exact.gradients),
    )


class Largest(TorchDispatchMode):
    """Notes what fills memory with one number a row and code, for any of the searches noted before."""

    def __init__(self, searches: list[Search]) -> None:
        super().__init__()
        self.shapes = {(s.indices.numel(), s.codes.shape[1]) for s in searches}
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.ndim:
                codes = tensor.shape[-1]
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                if (tensor.numel() // max(codes, 1), codes) in self.shapes and stored >= tensor.numel():
                    self.found.append(func)
        return result
