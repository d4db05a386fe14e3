"""Recipes for classes that people copy from repository to repository: known by their shape, proven by their results."""

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.fuse import _recipes
from vqkernels.fuse._recipes import Recipe

Attributes = Mapping[str, type | tuple[type, ...]]

_ROWS = 32
_CANDIDATES = 128


def recipe(
    library: str,
    class_name: str,
    methods: Mapping[str, Callable[..., Any]],
    *,
    attributes: Attributes,
    table: Callable[[Any], Tensor],
    codes: Callable[[Any], Tensor],
    inputs: Callable[[Tensor], Tensor],
    refuse: Callable[[Any], str | None] | None = None,
    others: Mapping[str, str] | None = None,
) -> Recipe:
    """A recipe for the classes of a name, wherever they are defined.

    An instance is fused if forward takes the arguments of the fused one, the attributes have these types, `refuse` has
    no objection, and original and fused agree on random rows (`disagreement`).

    Args:
        library: where the class comes from.
        class_name: its name.
        methods: by name, what replaces its methods; among them forward.
        attributes: by name, the types of what an instance has; an nn.Embedding has to be as plain as it comes.
        table: the parameter or buffer that holds the codes.
        codes: the codes [K, D] that an instance searches, as they are compared with rows.
        inputs: makes an input of forward of rows [32, D].
        refuse: why an instance of this shape cannot be fused, or None.
        others: by attribute, what else of this name has it, and why that cannot be fused.
    """
    plain = Recipe(library=library, class_path=class_name, methods=methods)

    def why_not(module: nn.Module) -> str | None:
        for attribute, other in (others or {}).items():
            if hasattr(module, attribute):
                return other
        reason = _other_shape(module, methods["forward"], attributes) or (refuse(module) if refuse else None)
        if reason is None:
            try:
                # Among codes near zero, as they are in the beginning, many distances choose the same.
                spread = _copy(module)
                with torch.no_grad(), _fixed_random_state(table(spread).device):
                    table(spread).normal_()
                    rows = separated_rows(codes(spread))
            except Exception as error:  # whatever a user's class may keep that cannot be copied
                reason = _cannot_be_tried(error)
            else:
                reason = disagreement(plain, spread, inputs(rows))
        return reason and f"it is not {library}'s: {reason}"

    return dataclasses.replace(plain, refuse=why_not)


def _other_shape(module: nn.Module, forward: Callable[..., Any], attributes: Attributes) -> str | None:
    takes, expected = (_parameters(function) for function in (type(module).forward, forward))
    if takes != expected:
        return f"forward takes ({', '.join(takes)})"
    for name, kind in attributes.items():
        if not hasattr(module, name):
            return f"it has no {name}"
        value = getattr(module, name)
        if not isinstance(value, kind):
            return f"{name} is of type {type(value).__name__}"
        if isinstance(value, nn.Embedding) and not _is_plain(value):
            return f"{name} is more than a table"
        if isinstance(value, nn.Embedding | Tensor):
            tensor = value.weight if isinstance(value, nn.Embedding) else value
            if tensor.dtype not in (torch.float32, torch.float64):
                dtype = str(tensor.dtype).removeprefix("torch.")
                return f"{name} is {dtype}, too coarse to compare results (fuse before converting)"
    return None


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return tuple(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


def _is_plain(embedding: nn.Embedding) -> bool:
    return (
        type(embedding) is nn.Embedding
        and embedding.padding_idx is None
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
        and _recipes.is_transparent(embedding)
    )


def separated_rows(codes: Tensor) -> Tensor:
    """Random rows [32, D] that are nearly as near to another of the codes [K, D], but not by rounding alone."""
    rows = torch.randn(_CANDIDATES, codes.shape[1], dtype=torch.float64, device=codes.device)
    wide = codes.double()
    scores, nearest = (rows @ wide.mT - wide.square().sum(-1) / 2).topk(min(2, len(codes)))
    size = (rows.norm(dim=-1) + wide[nearest[:, 0]].norm(dim=-1)).square()
    rounding = (2 * codes.shape[1] + 8) * torch.finfo(codes.dtype).eps * size
    gap = (scores[:, 0] - scores[:, -1]) / rounding
    distinct = gap > 1
    order = torch.where(distinct, gap, torch.inf).argsort()[: max(1, int(distinct.sum()))]
    return rows[order[torch.arange(_ROWS, device=codes.device) % len(order)]].to(codes.dtype)


@contextlib.contextmanager
def _fixed_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def disagreement(recipe: Recipe, module: nn.Module, x: Tensor) -> str | None:
    """What differs between a copy of a module and a fused copy after a forward pass of x, in training or evaluation.

    Outputs, gradients of every output, and the state afterwards are compared. The module and torch's random state stay.
    """
    for training in (False, True):
        results: list[dict[str, list[Any]]] = []
        for fused in (False, True):
            twin = _copy(module).train(training)
            if fused:
                _recipes.bind(recipe, twin)
            try:
                with _fixed_random_state(x.device), torch.enable_grad():
                    results.append(_results(twin, x.clone().requires_grad_()))
            except Exception as error:  # whatever an unknown forward may raise, on inputs that it was not made for
                return _cannot_be_tried(error)
        # Every result ends a chain of at most about as many roundings as x has elements.
        what = _difference(results[0], results[1], roundings=x.numel() + 64)
        if what is not None:
            return f"{what} in {'training' if training else 'evaluation'}"
    return None


def _cannot_be_tried(error: Exception) -> str:
    return f"it cannot be tried: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _copy(module: nn.Module) -> nn.Module:
    """A copy whose buffers have no history: some libraries register parameters as buffers."""
    return copy.deepcopy(module, {id(buffer): buffer.detach().clone() for buffer in module.buffers()})


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *_leaves(item))]
    if isinstance(value, tuple | list):
        return [type(value), *(leaf for item in value for leaf in _leaves(item))]
    return [value]


def _results(module: nn.Module, x: Tensor) -> dict[str, list[Any]]:
    variables = [x, *(p for p in module.parameters() if p.requires_grad)]
    outputs = _leaves(module.forward(x))  # not the hooks of a user
    generator = torch.Generator().manual_seed(1)
    gradients: list[Any] = []
    for output in outputs:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            continue
        found: tuple[Tensor | None, ...] = (None,) * len(variables)
        if output.requires_grad:
            weight = torch.randn(output.shape, generator=generator).to(output)
            found = torch.autograd.grad(output, variables, weight, retain_graph=True, allow_unused=True)
        gradients += [torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True)]
    parameters = [(name, p.requires_grad) for name, p in module.named_parameters()]
    return {
        "outputs differ": [o.detach() if isinstance(o, Tensor) else o for o in outputs],
        "gradients differ": gradients,
        "the state differs": _leaves([parameters, dict(module.state_dict())]),
    }


def _difference(expected: dict[str, list[Any]], actual: dict[str, list[Any]], roundings: int) -> str | None:
    for what, values in expected.items():
        others = actual[what]
        if len(values) != len(others) or not all(_close(a, b, roundings) for a, b in zip(values, others, strict=True)):
            return what
    return None


def _close(a: Any, b: Any, roundings: int) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if not a.is_floating_point() or a.numel() == 0:
        return torch.equal(a, b)
    bound = roundings * torch.finfo(a.dtype).eps * a.abs().max()
    return bool(((a - b).abs() <= bound).all())
