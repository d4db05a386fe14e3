"""Arguments of the norm chain, its plain expressions in any dtype, and a call's values and gradients to compare."""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from budget import assert_within_budget
from torch import Tensor
from vq_cases import same_bits

import vqkernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

# Shapes of a modulation of x [B, ..., D].
SHAPES = {
    "D": lambda shape: shape[-1:],
    "B,D": lambda shape: (shape[0], shape[-1]),
    "B,1,D": lambda shape: (shape[0], *[1] * (len(shape) - 2), shape[-1]),
    "1,1,D": lambda shape: (*[1] * (len(shape) - 1), shape[-1]),
    "B,L,D": lambda shape: shape,
    "1,L,D": lambda shape: (1, *shape[1:]),
}


@dataclass
class Arguments:
    """Tensors of a call; None: not given."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    shift2: Tensor | None = None
    scale2: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def to(self, dtype: torch.dtype) -> "Arguments":
        return replace(self, **{name: t.detach().to(dtype) for name, t in self.tensors().items()})

    def __getitem__(self, names: str) -> list[Tensor | None]:
        return [getattr(self, name) for name in names.split()]


def arguments(shape, names, kind="B,D", dtype=torch.float32, seed=0, offset=0.0):
    """Arguments in `names` for an x of a shape, modulations of a kind in SHAPES; x has the mean `offset`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size, around=0.0):
        return (torch.randn(tuple(size), generator=generator) + around).to(dtype)

    sizes = {"branch": shape, "weight": shape[-1:], "bias": shape[-1:]}
    values = {name: draw(sizes.get(name, SHAPES[kind](tuple(shape)))) for name in names.split()}
    return Arguments(draw(shape, offset), **values)


def spread(modulation, x):
    """[B, D] as [B, 1, ..., D]."""
    if modulation is None or modulation.ndim != 2 or x.ndim == 2:
        return modulation
    return modulation.view(modulation.shape[0], *[1] * (x.ndim - 2), modulation.shape[1])


def norm_expression(x, norm, weight, bias, eps):
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = (x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def expression(a, norm="layer", eps=1e-6):
    """The chain as a model writes it: residual where there is a branch, then one or two modulated norms."""
    outputs, x = [], a.x
    if a.branch is not None:
        x = x + (a.branch if a.gate is None else spread(a.gate, x) * a.branch)
        outputs.append(x)
    n = norm_expression(x, norm, a.weight, a.bias, eps)
    for shift, scale in [a["shift scale"]] + [a["shift2 scale2"]] * (a.shift2 is not None or a.scale2 is not None):
        y = n if scale is None else n * (1 + spread(scale, x))
        outputs.append(y if shift is None else y + spread(shift, x))
    return outputs


def fused(a, norm="layer", eps=1e-6, **options):
    """The same by the public functions."""
    if a.shift2 is not None or a.scale2 is not None:
        options["second"] = tuple(a["shift2 scale2"])
    options |= {"norm": norm, "weight": a.weight, "bias": a.bias, "eps": eps}
    if a.branch is None:
        outputs = vqkernels.norm_modulate(a.x, a.shift, a.scale, **options)
    else:
        outputs = vqkernels.gate_residual_norm_modulate(a.x, a.branch, a.gate, a.shift, a.scale, **options)
    return outputs if isinstance(outputs, tuple) else [outputs]


def values_and_gradients(call, a, seed=1000, unused=(), grad_dtype=None):
    """What call(a) returns and the gradients of all arguments, for random gradients of the results not in `unused`.

    The random gradients are rounded to `grad_dtype`, by default the dtype of their result.
    """
    a = replace(a, **{name: t.detach().requires_grad_() for name, t in a.tensors().items()})
    outputs = call(a)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator).to(grad_dtype or o.dtype).to(o.dtype) for o in outputs]
    used = [i for i in range(len(outputs)) if i not in unused]
    inputs = list(a.tensors().values())
    gradients = torch.autograd.grad([outputs[i] for i in used], inputs, [grads[i] for i in used])
    return [o.detach() for o in outputs] + list(gradients)


def several(shape, names, kind="B,D", **options):
    """So many sets of arguments that the largest error of a sum over rows is that of some hundred sums."""
    seed = options.pop("seed", 0)
    return [arguments(shape, names, kind, seed=100 * seed + i, **options) for i in range(max(1, 256 // shape[-1]))]


def assert_accurate(cases, norm="layer", eps=1e-6, unused=()):
    """Values and gradients of `fused` against float64, in the budget of the plain expression of the same dtype."""
    actual, plain, truth = [], [], []
    for a in cases:
        dtype = a.x.dtype
        actual.append(values_and_gradients(lambda a: fused(a, norm, eps), a, unused=unused))
        plain.append(values_and_gradients(lambda a: expression(a, norm, eps), a, unused=unused))
        wide = a.to(torch.float64)
        truth.append(values_and_gradients(lambda a: expression(a, norm, eps), wide, unused=unused, grad_dtype=dtype))
    # One comparison for each result and gradient, of all cases together.
    actual, plain, truth = (
        [torch.cat([t.flatten() for t in r]) for r in zip(*x, strict=True)] for x in (actual, plain, truth)
    )
    if dtype != torch.float64:
        assert_within_budget(actual, plain, truth)
        return
    # The expression is the truth itself: either may be off by a few roundings of its largest term.
    for result, exact in zip(actual, truth, strict=True):
        assert result.dtype == torch.float64
        assert (result - exact).abs().max() <= 32 * torch.finfo(torch.float64).eps * exact.abs().max()


def assert_same(actual, expected):
    for p, q in zip(actual, expected, strict=True):
        assert same_bits(p, q)


def saved_bytes(call):
    """Bytes of the memory that a call keeps for its backward pass, but for that of its arguments and results."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t
    ):
        outputs, inputs = call()
    arguments = {t.untyped_storage().data_ptr() for t in (*outputs, *inputs)}
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in arguments)
