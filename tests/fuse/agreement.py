"""How original and fused quantizers are compared: codes up to ties, everything else against float64."""

import copy
import dataclasses

import torch
from torch import Tensor

from vqkernels.fuse import _recipes

EPS = torch.finfo(torch.float32).eps


def use_fused(module, recipe):
    """A fused copy of a module, after the recipe's own checks."""
    twin = copy.deepcopy(module)
    assert _recipes.why_not(recipe, twin) is None
    _recipes.bind(recipe, twin)
    return twin


def leaves(value):
    """Every value of nested results, with the path that leads to it."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value):
        items = vars(value).items()
    else:
        return {"": value}
    return {f".{key}{path}": leaf for key, item in items for path, leaf in leaves(item).items()}


def run(module, x, weights):
    """Results, gradients of x and of parameters, and the states after a call, the random one too, by name.

    Args:
        module: a quantizer in any mode.
        x: input.
        weights: a generator of what the outputs are multiplied by before their gradients are taken.
    """
    x = x.detach().clone().requires_grad_()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    outputs = leaves(module(x))
    results = {f"output{path}": v.detach() if isinstance(v, Tensor) else v for path, v in outputs.items()}
    results["random"] = torch.get_rng_state()
    total = torch.zeros((), dtype=x.dtype)
    for value in outputs.values():
        if isinstance(value, Tensor) and value.requires_grad:
            total = total + (value * torch.randn(value.shape, generator=weights, dtype=torch.float64).to(value)).sum()
    if total.requires_grad:
        gradients = torch.autograd.grad(total, [x, *parameters.values()], allow_unused=True)
        for name, value, gradient in zip(["x", *parameters], [x, *parameters.values()], gradients, strict=True):
            results[f"gradient.{name}"] = torch.zeros_like(value) if gradient is None else gradient
    results.update({f"state.{name}": value.clone() for name, value in module.state_dict().items()})
    return results


class Errors:
    """Squared errors of original and fused against float64, pooled by name over many calls.

    Args:
        eps: of the dtype that results are rounded to.
    """

    def __init__(self, eps=EPS):
        self.eps = eps
        self.sums = {}

    def add(self, original, fused, truth):
        assert list(original) == list(fused) == list(truth)
        for name, value in original.items():
            other, true = fused[name], truth[name]
            if not isinstance(value, Tensor):
                assert other == value == true, name
                continue
            assert value.dtype == other.dtype, name
            assert value.shape == other.shape == true.shape, name
            if not value.is_floating_point():
                assert torch.equal(value, other), name
                assert torch.equal(value, true), name
                continue
            sums = self.sums.setdefault(name, torch.zeros(4, dtype=torch.float64))
            true = true.double()
            sums += torch.stack(
                [
                    (value.double() - true).square().sum(),
                    (other.double() - true).square().sum(),
                    true.square().sum(),
                    torch.tensor(true.numel(), dtype=torch.float64),
                ]
            )

    def check(self):
        """Fused is at most twice as far from the truth as the original, plus one rounding; both root mean square."""
        for name, sums in self.sums.items():
            original, fused, size, _ = sums.sqrt().tolist()
            assert fused <= 2 * original + self.eps * size, f"{name}: {fused} against {original}, {size}"


def compare(original, fused, truth, inputs, steps=20, synchronised=True):
    """Trains both, and the original in float64 beside them, evaluates all, and holds fused to the error budget.

    Args:
        original: a quantizer in float32.
        fused: a fused copy of it.
        truth: a copy of the original, which becomes float64.
        inputs: a function that gives the input of a step.
        steps: how many steps of SGD.
        synchronised: whether all start every step from the original's state; otherwise each goes its own way.
    """
    modules = (original, fused, truth.double())
    errors = Errors()
    for step in range(steps + 1):
        x = inputs()
        if synchronised:
            for module in modules[1:]:
                module.load_state_dict(original.state_dict())
        results = []
        for module in modules:
            module.train(step < steps)
            torch.manual_seed(step)
            results.append(run(module, x.double() if module is truth else x, torch.Generator().manual_seed(step)))
            if step < steps:
                descend(module, results[-1])
        errors.add(*results)
    errors.check()


@torch.no_grad()
def descend(module, results, rate=1e-3):
    for name, parameter in module.named_parameters():
        gradient = results.get(f"gradient.{name}")
        if gradient is not None and gradient.shape == parameter.shape:
            parameter -= rate * gradient


def distance_error(rows: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """A bound of the rounding error of float32 distances |z|^2 - 2 z c + |c|^2, for float64 rows and their codes.

    Every one of the three sums of D products rounds at most D times, and so do a normalisation before it and what comes
    after; all terms together are at most (|z| + |c|)^2.
    """
    dim = rows.shape[1]
    size = (rows.norm(dim=1) + codes[indices].norm(dim=1)).square()
    return (2 * dim + 8) * EPS / 2 * size


def count_ties(rows: Tensor, codes: Tensor, expected: Tensor, actual: Tensor) -> int:
    """How many codes differ; every one that does has to be as near as the original's arithmetic can tell."""
    rows, codes = rows.double(), codes.double()
    differ = (expected != actual).nonzero().squeeze(1)
    rows, expected, actual = rows[differ], expected[differ], actual[differ]
    gap = (rows - codes[expected]).square().sum(1) - (rows - codes[actual]).square().sum(1)
    bound = distance_error(rows, codes, expected) + distance_error(rows, codes, actual)
    assert (gap.abs() <= bound).all()
    return len(differ)
