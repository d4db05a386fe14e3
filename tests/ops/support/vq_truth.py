"""Upstream's quantizer layer and ours side by side, from the same state, and upstream in float64 as the truth."""

import copy
from contextlib import contextmanager

import torch
from vector_quantize_pytorch import VectorQuantize as Upstream

from vqkernels import nn

EPS = torch.finfo(torch.float32).eps
DIM, CODES = 8, 32


def pair(layer_class=nn.VectorQuantize, **options):
    """Upstream's layer and ours, with upstream's state."""
    torch.manual_seed(1)
    upstream = Upstream(DIM, CODES, **copy.deepcopy(options))
    layer = layer_class(DIM, CODES, **copy.deepcopy(options))
    layer.load_state_dict(upstream.state_dict(), strict=True)
    return upstream, layer


def assert_close(actual, expected, factor=32):
    """Within `factor` roundings of the largest element: upstream rotates values, a chain of some D steps."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bound = factor * EPS * expected.abs().max().clamp(min=EPS)
    assert (actual - expected).abs().max() <= bound


def assert_same_state(layer, upstream, factor=32):
    ours, theirs = layer.state_dict(), upstream.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert_close(value.float(), theirs[name].float(), factor)


@contextmanager
def float_is_double():
    """Upstream computes in float32, whatever it is given, by calls of Tensor.float."""
    narrow = torch.Tensor.float
    torch.Tensor.float = lambda t: t.double()
    try:
        yield
    finally:
        torch.Tensor.float = narrow


def perturbed(t, generator):
    """Every element changed by a rounding of float32, up or down."""
    sign = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
    return t * (1 + EPS * sign)


def in_double(upstream, perturb=False):
    """A copy in float64; or its neighbour by a rounding of float32 in each parameter and code."""
    twin = copy.deepcopy(upstream).double()
    if perturb:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for t in [*twin.parameters(), *twin.buffers()]:
                if t.is_floating_point():
                    t.copy_(perturbed(t, generator))
    return twin


def step(layer, x, weight=None, optimizer=None, **call):
    """A training step, or an evaluation: everything that comes out of it, by name."""
    x = x.clone().requires_grad_()
    quantized, indices, loss, breakdown = layer(x, return_loss_breakdown=True, **call)
    out = {"quantized": quantized, "indices": indices, "loss": loss, **breakdown._asdict()}
    if layer.training:
        total = (quantized * (1 if weight is None else weight.reshape(quantized.shape))).sum() + 3 * loss.sum()
        total.backward()
        out["x.grad"] = torch.zeros_like(x) if x.grad is None else x.grad
        for name, p in layer.named_parameters():
            out[f"{name}.grad"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    out.update({f"state {name}": value.clone() for name, value in layer.state_dict().items()})
    return {name: value.detach().clone() for name, value in out.items()}


def assert_as_upstream(upstream, layer, inputs, weights=None, optimize=False, after=None, **call):
    """Runs steps of both, and asserts that ours is as close to upstream in float64 as upstream itself.

    What a change of all inputs by one rounding would do is allowed for too, since upstream may be right by chance.
    """
    runs = [layer, upstream, in_double(upstream), in_double(upstream, perturb=True)]
    optimizers = [
        torch.optim.SGD([*module.parameters(), torch.zeros(1)], lr=0.01) if optimize else None for module in runs
    ]
    generator = torch.Generator().manual_seed(1)
    for number, x in enumerate(inputs):
        weight = None if weights is None else weights[number]
        ours, theirs = (
            step(module, x, weight, optimizer, **call)
            for module, optimizer in zip(runs[:2], optimizers[:2], strict=True)
        )
        with float_is_double():
            truth, neighbour = (
                step(module, z, None if weight is None else weight.double(), optimizer, **call)
                for module, optimizer, z in zip(
                    runs[2:], optimizers[2:], (x.double(), perturbed(x.double(), generator)), strict=True
                )
            )
        assert list(ours) == list(theirs)
        assert torch.equal(ours["indices"], theirs["indices"])
        assert torch.equal(ours["indices"], truth["indices"])
        for name, expected in theirs.items():
            actual = ours[name]
            assert actual.shape == expected.shape, name
            assert actual.dtype == expected.dtype, name
            if expected.is_floating_point():
                exact = truth[name]
                allowed = 2 * (expected - exact).abs().max() + 16 * (neighbour[name] - exact).abs().max()
                bound = allowed + 4 * EPS * exact.abs().max()
                assert (actual - exact).abs().max() <= bound, name
            else:
                assert torch.equal(actual, expected), name
        if after is not None:
            for module in runs:
                after(module)
