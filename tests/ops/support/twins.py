"""Layers beside their twins: values, every gradient, and what is kept for the backward pass."""

import copy

import torch
from budget import assert_rms_within_budget


def initialized(module):
    """Parameters that compute something, where new ones are 0 or 1, and none that hide the errors of others."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(
                parameter, std=0.5 / max(1, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.3
            )
    return module


def run(module, *inputs, **options):
    """The output, the gradients of floating-point inputs, and those of the parameters."""
    module.zero_grad()
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    output = module(*leaves, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (output * weights.to(output)).sum().backward()
    gradients = [t.grad for t in leaves if t.is_floating_point()]
    return [output.detach(), *gradients, *(p.grad for p in module.parameters() if p.requires_grad)]


def doubled(value):
    """The same in float64: a tensor, or tuples and dictionaries of them."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: doubled(v) for name, v in value.items()}
    return tuple(map(doubled, value)) if isinstance(value, tuple) else value


def assert_fused_within_budget(reference, fused, *inputs, draws=4, **options):
    """Values and every gradient of a fused module against its reference in float64.

    The root mean square error of the output, of the gradient of each input, and of those of a layer's parameters
    together may be twice the reference's in the same dtype, plus one rounding. It is that of a few draws of inputs
    like these: through matrix products, which both have, errors of either come out at random places.
    """
    exact = copy.deepcopy(reference).double()
    trained = [name.rpartition(".")[0] for name, p in reference.named_parameters() if p.requires_grad]
    names = [*(f"result {i}" for i in range(1 + sum(t.is_floating_point() for t in inputs))), *trained]

    def draw():
        drawn = [torch.empty_like(t).copy_(torch.randn(t.shape)) if t.is_floating_point() else t for t in inputs]
        truths = run(exact, *doubled(tuple(drawn)), **doubled(options))
        expressions, actuals = run(reference, *drawn, **options), run(fused, *drawn, **options)
        return actuals, expressions, truths

    scales = assert_rms_within_budget((draw() for _ in range(draws)), names)
    assert all(scale > 0 for scale in scales.values()), scales


def kept_bytes(module, *inputs, **options):
    """Bytes of what a forward pass keeps for the backward pass, parameters aside, and each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs, **options)
    del output
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)
