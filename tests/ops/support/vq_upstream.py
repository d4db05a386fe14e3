"""What tests of the layers share: closeness, comparison with vector-quantize-pytorch, waiting for the device."""

import copy
import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode

EPS = torch.finfo(torch.float32).eps


class WaitsForDevice(Exception):
    pass


class NoHostSync(TorchDispatchMode):
    """Raises at operations whose result the host needs: a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "is_nonzero",
        ):
            raise WaitsForDevice(func)
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


def assert_close(actual, expected, factor=32):
    """Within `factor` roundings of the largest element."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if actual.numel():
        bound = factor * EPS * expected.abs().max().clamp(min=EPS)
        assert (actual - expected).abs().max() <= bound


def assert_same_signatures(ours, theirs, extra=(), identities=()):
    """Same names, order and defaults; ours may have `extra` ones, and None for an identity function or module."""
    for method in ("__init__", "forward"):
        expected = {n: p.default for n, p in inspect.signature(getattr(theirs, method)).parameters.items()}
        actual = {n: p.default for n, p in inspect.signature(getattr(ours, method)).parameters.items()}
        names = [name for name in actual if name not in extra]
        assert names == list(expected)
        for name in names:
            assert actual[name] == (None if name in identities else expected[name]), name


def pair(ours, theirs, **options):
    """Upstream's layer and ours, with upstream's state, which ours has from the same seed, and can give back."""
    torch.manual_seed(3)
    upstream = theirs(**copy.deepcopy(options))
    torch.manual_seed(3)
    layer = ours(**copy.deepcopy(options))
    assert list(layer.state_dict()) == list(upstream.state_dict())
    for (name, value), expected in zip(layer.state_dict().items(), upstream.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    layer.load_state_dict(upstream.state_dict(), strict=True)
    upstream.load_state_dict(layer.state_dict(), strict=True)
    return layer, upstream


def step(layer, x, **arguments):
    """Results of a training step, flat, and the gradients of x and of the parameters, zeros for None."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    results = flat(layer(x, **arguments))
    weight = torch.linspace(-1, 1, results[0].numel(), dtype=x.dtype).reshape(results[0].shape)
    total = (results[0] * weight).sum()
    for loss in results[1:]:
        if loss.is_floating_point() and loss.requires_grad and loss.ndim < 3:
            total = total + 3 * loss.sum()
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return results, [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]


def flat(results):
    """Nested tuples of tensors as one list; None is left out."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [] if results is None else [tensor for result in results for tensor in flat(result)]


def assert_same_step(layer, upstream, x, factor=32, **arguments):
    """Equal indices, and close values and gradients; returns our results."""
    results, grads = step(layer, x, **arguments)
    expected, expected_grads = step(upstream, x, **arguments)
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        if ours.is_floating_point():
            assert_close(ours, theirs, factor)
        else:
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert_close(ours, theirs, factor)
    return results
