"""Moving averages of weights against their definition in float64, and as a state that goes on."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vqkernels.models import EMA


def steps(count):
    """A model with a buffer, and what its weight is at every step."""
    model = nn.BatchNorm1d(5)
    weights = [torch.randn(5) for _ in range(count)]
    return model, weights


def follow(ema, model, weights):
    for i, weight in enumerate(weights):
        model.weight.data.copy_(weight)
        model.running_mean.fill_(i)
        ema.update_parameters(model)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_follows_the_definition(decay, warmup):
    model, weights = steps(20)
    ema = EMA(model, decay, warmup=warmup)
    follow(ema, model, weights)
    expected = weights[0].double()
    for n, weight in enumerate(weights[1:], 1):
        rate = min(decay, (1 + n) / (10 + n)) if warmup else decay
        expected = rate * expected + (1 - rate) * weight.double()
    largest = max(w.abs().max() for w in weights)
    assert (ema.module.weight.double() - expected).abs().max() <= 20 * 2**-24 * largest * 3
    assert torch.equal(ema.module.running_mean, torch.full((5,), 19.0))
    assert ema.n_averaged == 20
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_goes_on_where_it_stopped():
    model, weights = steps(9)
    ema = EMA(model, 0.9, warmup=True)
    follow(ema, model, weights[:4])
    others = [copy.deepcopy(ema), pickle.loads(pickle.dumps(ema)), EMA(nn.BatchNorm1d(5), 0.9, warmup=True)]
    others[2].load_state_dict(ema.state_dict())
    for each in (ema, *others):
        follow(each, model, weights[4:])
        assert torch.equal(each.module.weight, ema.module.weight)
    x = torch.randn(3, 5)
    assert torch.equal(ema.eval()(x), ema.module(x))


def test_leaves_the_model_alone():
    model = nn.Linear(3, 3)
    before = copy.deepcopy(model.state_dict())
    ema = EMA(model)
    ema.update_parameters(model)
    ema.module.weight.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=f"decay: expected a number from 0 to below 1, got {decay}"):
        EMA(nn.Linear(1, 1), decay)
