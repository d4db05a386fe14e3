"""`RandomProjectionQuantizer` against upstream and against angles in float64."""

import inspect

import pytest
import torch
import vector_quantize_pytorch as upstream_package

from vqkernels import nn, reference

EPS = torch.finfo(torch.float32).eps


def pair(num_codebooks, **options):
    arguments = {"dim": 12, "codebook_size": 20, "codebook_dim": 5, "num_codebooks": num_codebooks, **options}
    upstream = upstream_package.RandomProjectionQuantizer(**arguments)
    layer = nn.RandomProjectionQuantizer(**arguments)
    layer.load_state_dict(upstream.state_dict(), strict=True)
    upstream.load_state_dict(layer.state_dict(), strict=True)
    return upstream, layer


def test_signatures_and_seeded_states_agree():
    states = []
    for module in (upstream_package, nn, reference):
        layer_class = module.RandomProjectionQuantizer
        assert str(list(inspect.signature(layer_class.__init__).parameters)) == str(
            list(inspect.signature(upstream_package.RandomProjectionQuantizer.__init__).parameters)
        )
        torch.manual_seed(1)
        states.append(layer_class(dim=12, codebook_size=20, codebook_dim=5, num_codebooks=2).state_dict())
    for state in states[1:]:
        assert list(state) == list(states[0])
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize("num_codebooks", [1, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_codes_and_cross_entropy(num_codebooks, norm):
    upstream, layer = pair(num_codebooks, norm=norm)
    x = torch.randn(2, 40, 12)
    indices = layer.train()(x)
    assert torch.equal(indices, upstream(x))
    # Upstream gives the loss of positions and heads in another order than its targets; one head shows the value.
    if num_codebooks == 1:
        targets = torch.randint(20, indices.shape)
        expected = upstream(x, indices=targets)
        assert abs(layer(x, indices=targets) - expected) <= 64 * EPS * expected

    rows = torch.nn.functional.layer_norm(x.double(), (12,)) if norm else x.double()
    layer = layer.double()
    projected = layer.vq.project_in(torch.einsum("bnd,hde->bnhe", rows, layer.rand_projs).flatten(2))
    for head, part in enumerate(projected.chunk(num_codebooks, -1)):
        codes = layer.vq._codebook.embed[head].double()
        cosines = torch.nn.functional.normalize(part, dim=-1) @ codes.mT
        chosen = indices if num_codebooks == 1 else indices[..., head]
        gap = cosines.max(-1).values - cosines.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        assert gap.max() <= 64 * EPS


def test_nothing_is_trained():
    _, layer = pair(2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(3):
        layer.train()(torch.randn(2, 40, 12))
        for module in layer.modules():
            module.train()
        layer(torch.randn(2, 40, 12))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_compiles_to_one_graph():
    _, layer = pair(2)
    x = torch.randn(2, 40, 12)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("x", [torch.zeros(2, 12), torch.zeros(2, 4, 11), torch.zeros(2, 4, 12, dtype=torch.int64)])
def test_bad_input(x):
    with pytest.raises((TypeError, ValueError), match="x: expected"):
        pair(1)[1](x)
