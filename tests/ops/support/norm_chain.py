"""The formulas of the norm chain, in the dtype of what they are given; gradients are left to autograd."""

import torch

LAYOUTS = {1: lambda b, n, d: (1, 1, d), 2: lambda b, n, d: (b, 1, d), 3: lambda b, n, d: (b, n, d)}
NAMES = ("x", "branch", "gate", "shift", "scale", "shift2", "scale2", "weight", "bias")


def normalized(r, norm, weight, bias, eps):
    centered = r - r.mean(-1, keepdim=True) if norm == "layer" else r
    n = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def modulated(n, shift, scale):
    n = n if scale is None else n * (1 + scale)
    return n if shift is None else n + shift


def chain(inputs, norm, eps):
    """Residual (x where there is no branch), first and second result of tensors by name, those that are given."""
    get = inputs.get
    r = get("x")
    if get("branch") is not None:
        r = r + (get("branch") if get("gate") is None else get("gate") * get("branch"))
    n = normalized(r, norm, get("weight"), get("bias"), eps)
    return r, modulated(n, get("shift"), get("scale")), modulated(n, get("shift2"), get("scale2"))


def problem(batch, length, dim, layout, dtype=torch.float32, without=()):
    """Random tensors by name, whose modulations are slices of one tensor, as those of a modulation layer are."""
    shape = LAYOUTS[layout](batch, length, dim)
    modulations = torch.randn(*shape[:2], 5 * dim).to(dtype).split(dim, -1)
    rows = torch.randn(2, batch, length, dim).to(dtype)
    parameters = torch.randn(2, dim).to(dtype)
    return {k: v for k, v in zip(NAMES, (*rows, *modulations, *parameters), strict=True) if k not in without}


def with_gradients(inputs, grads, norm, eps, dtype):
    """Results of `chain` in dtype, and gradients by name from `grads` of the results (None: zero)."""
    leaves = {k: v.to(dtype).detach().requires_grad_() for k, v in inputs.items()}
    results = chain(leaves, norm, eps)
    used = [(r, g.to(dtype)) for r, g in zip(results, grads, strict=True) if g is not None]
    outputs, of_outputs = zip(*used, strict=True)
    of_leaves = torch.autograd.grad(outputs, list(leaves.values()), of_outputs, allow_unused=True)
    return results, dict(zip(leaves, of_leaves, strict=True))
