"""SimVQ and ResidualSimVQ against vector-quantize-pytorch, nearest codes and gradients in float64, their promises."""

import pytest
import torch
import vector_quantize_pytorch as theirs
from vq_upstream import (
    NoHostSync,
    assert_close,
    assert_same_signatures,
    assert_same_step,
    pair,
    step,
)

from vqkernels import nn, reference
from vqkernels.reference import _checks

DIM, CODES = 8, 32
OPTIONS = {
    "default": {},
    "straight_through": {"rotation_trick": False},
    "weights": {"input_to_quantize_commit_loss_weight": 0.7, "commitment_weight": 0.3},
    "without_loss": {"commitment_weight": 0.0},
    "frozen_dim": {"frozen_codebook_dim": 5},
    "init_fn": {"init_fn": lambda codebook: codebook.sign()},
    "transform": {
        "codebook_transform": torch.nn.Sequential(
            torch.nn.Linear(DIM, 16), torch.nn.ReLU(), torch.nn.Linear(16, DIM), torch.nn.LayerNorm(DIM)
        )
    },
}
LAYERS = {"nn": nn, "reference": reference}

each_room = pytest.mark.parametrize("room", LAYERS.values(), ids=LAYERS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def test_signatures_agree():
    for room in LAYERS.values():
        assert_same_signatures(room.SimVQ, theirs.SimVQ, identities=("init_fn",))
        assert_same_signatures(room.ResidualSimVQ, theirs.ResidualSimVQ, extra=("num_levels",))


@each_room
@each_option
@pytest.mark.parametrize("train", [True, False])
def test_equals_upstream(room, options, train):
    layer, upstream = pair(room.SimVQ, theirs.SimVQ, dim=DIM, codebook_size=CODES, **options)
    layer.train(train), upstream.train(train)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (layer, upstream)]
    for _ in range(3):
        x = torch.randn(3, 20, DIM)
        results = assert_same_step(layer, upstream, x, factor=64)
        assert_close(layer.indices_to_codes(results[1]), upstream.indices_to_codes(results[1]))
        for module, optimizer in zip((layer, upstream), optimizers, strict=True):
            module(x)[2].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_close(layer.codebook, upstream.codebook)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("positions", [(5,), (2, 6), (2, 3, 4), (1, 2, 3, 4)])
def test_layouts(channel_first, positions):
    options = {"dim": DIM, "codebook_size": CODES, "channel_first": channel_first}
    layer, upstream = pair(nn.SimVQ, theirs.SimVQ, **options)
    x = torch.randn(*positions, DIM)
    x = x.movedim(-1, 1) if channel_first else x
    quantized, indices, _ = assert_same_step(layer, upstream, x)
    assert indices.shape == positions
    assert_close(layer.indices_to_codes(indices), quantized)
    residual, upstream = pair(nn.ResidualSimVQ, theirs.ResidualSimVQ, num_quantizers=3, **options)
    results = assert_same_step(residual, upstream, x, factor=64, return_all_codes=True)
    assert results[1].shape == (*positions, 3)
    assert_close(residual.get_output_from_indices(results[1]), results[0])


@each_room
@pytest.mark.parametrize("rotation_trick", [True, False])
def test_codes_loss_and_gradients_in_float64(room, rotation_trick):
    layer = room.SimVQ(DIM, CODES, rotation_trick=rotation_trick).double()
    x = torch.randn(2, 30, DIM, dtype=torch.float64, requires_grad=True)
    quantized, indices, loss = layer(x)
    codes = layer.codebook
    distances = (x.detach().unsqueeze(-2) - codes.detach()).square().sum(-1)
    assert torch.equal(indices, distances.argmin(-1))
    chosen = codes[indices]
    assert torch.equal(quantized, chosen)
    expected = (x.detach() - chosen).square().mean() + 0.25 * (x - chosen.detach()).square().mean()
    assert_close(loss, expected)
    weight = torch.randn_like(x)
    if rotation_trick:
        # The rotation in the plane of row and code that takes one to the other, as a matrix.
        u, q = (torch.nn.functional.normalize(t.detach(), dim=-1) for t in (x, chosen))
        reflection = u + q
        reflection = reflection / reflection.norm(dim=-1, keepdim=True)
        eye = torch.eye(DIM, dtype=torch.float64)
        rotation = eye - 2 * torch.einsum("...i,...j->...ij", reflection, reflection)
        rotation = rotation + 2 * torch.einsum("...i,...j->...ij", q, u)
        scale = (chosen.norm(dim=-1) / x.norm(dim=-1)).detach()
        passed = torch.einsum("...ij,...i->...j", rotation, weight) * scale.unsqueeze(-1)
    else:
        passed = weight
    actual = torch.autograd.grad((quantized * weight).sum() + loss, [x, layer.code_transform.weight])
    grads = torch.autograd.grad(expected, [x, layer.code_transform.weight])
    assert_close(actual[0], grads[0] + passed)
    assert_close(actual[1], grads[1])


@each_room
@pytest.mark.parametrize("train", [True, False])
def test_residual_equals_upstream(room, train):
    options = {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3, "rotation_trick": train}
    layer, upstream = pair(room.ResidualSimVQ, theirs.ResidualSimVQ, **options)
    layer.train(train), upstream.train(train)
    x = torch.randn(3, 20, DIM)
    results = assert_same_step(layer, upstream, x, factor=64, return_all_codes=True)
    assert torch.equal(layer.codebooks, upstream.codebooks)
    assert layer.codebook_size == upstream.codebook_size == CODES
    assert layer.codebook_dim == DIM
    assert_close(layer.get_output_from_indices(results[1]), results[0])


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize(("cutoff", "multiple"), [(0, 1), (1, 1), (0, 2), (2, 3)])
def test_residual_dropout_with_a_seed_equals_upstream(cutoff, multiple, channel_first):
    layer, upstream = pair(
        nn.ResidualSimVQ,
        theirs.ResidualSimVQ,
        dim=DIM,
        codebook_size=CODES,
        num_quantizers=5,
        channel_first=channel_first,
        quantize_dropout=True,
        quantize_dropout_cutoff_index=cutoff,
        quantize_dropout_multiple_of=multiple,
    )
    x = torch.randn(2, DIM, 10) if channel_first else torch.randn(2, 10, DIM)
    for seed in range(8):
        results = assert_same_step(
            layer, upstream, x, factor=128, return_all_codes=True, rand_quantize_dropout_fixed_seed=seed
        )
        assert_close(layer.get_output_from_indices(results[1]), results[0])


@each_room
def test_invalid_rows_touch_nothing_else(room):
    layer = room.SimVQ(DIM, CODES)
    x = torch.randn(2, 20, DIM)
    x[0, 3], x[1, 5, 2] = torch.nan, torch.inf
    valid = x.isfinite().all(-1)
    results, grads = step(layer, x)
    alone, alone_grads = step(layer, x[valid].unsqueeze(0))
    assert (results[1][~valid] == -1).all()
    assert results[0][~valid].isnan().all()
    assert torch.equal(results[1][valid], alone[1][0])
    assert_close(results[2], alone[2])
    assert_close(grads[1], alone_grads[1])
    assert (layer.indices_to_codes(results[1])[~valid] == 0).all()
    residual = room.ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=3)
    _, indices, losses = residual(x)
    assert (indices[~valid] == -1).all()
    assert losses.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_modules(dtype):
    for layer in (
        nn.SimVQ(DIM, CODES, codebook_transform=torch.nn.Identity()),
        nn.ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=4, codebook_transform=torch.nn.Identity()),
    ):
        layer.to(dtype)
        x = torch.randn(2, 100, DIM).to(dtype)
        quantized, indices, loss = layer(x)
        expected, expected_indices, expected_loss = layer.float()(x.float())
        assert torch.equal(indices, expected_indices)
        assert torch.equal(quantized, expected.to(dtype))
        assert torch.equal(loss, expected_loss)


def test_autocast_searches_in_float32():
    layer = nn.SimVQ(DIM, CODES)
    x = torch.randn(2, 50, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, indices, loss = layer(x)
        codes = layer.codebook
    assert codes.dtype == torch.bfloat16
    assert torch.equal(indices, torch.cdist(x.double(), codes.double()).argmin(-1))
    assert torch.equal(quantized, codes.float()[indices])
    assert loss.dtype == torch.float32


def test_the_whole_codebook_is_transformed_once_to_decode():
    calls = []

    class Transform(torch.nn.Softmax):
        def forward(self, codebook):
            calls.append(codebook.shape)
            return super().forward(codebook)

    layer = nn.SimVQ(DIM, CODES, codebook_transform=Transform(dim=0))
    indices = torch.randint(CODES, (2, 7))
    codes = layer.indices_to_codes(indices)
    assert calls == [(CODES, DIM)]
    assert torch.equal(codes, layer.frozen_codebook.softmax(0)[indices])


@each_room
@pytest.mark.parametrize("train", [True, False])
def test_no_step_waits_for_the_device(room, train, monkeypatch):
    # A check of index values that leaves tensors of other devices alone. Here all are on the CPU.
    monkeypatch.setattr(_checks, "check_index_range", lambda indices, num_codes: None)
    for layer in (
        room.SimVQ(DIM, CODES),
        room.ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, quantize_dropout=True),
    ):
        x = torch.randn(2, 10, DIM, requires_grad=True)
        with NoHostSync():
            quantized, indices, loss = layer.train(train)(x)
            (quantized.sum() + loss.sum()).backward()
            (layer.indices_to_codes if isinstance(layer, room.SimVQ) else layer.get_output_from_indices)(indices)


def test_bad_arguments():
    for name, options in (
        ("dim", {"dim": 0}),
        ("codebook_size", {"codebook_size": 0}),
        ("frozen_codebook_dim", {"frozen_codebook_dim": -1}),
        ("commitment_weight", {"commitment_weight": -1}),
        ("input_to_quantize_commit_loss_weight", {"input_to_quantize_commit_loss_weight": -1}),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            nn.SimVQ(**{"dim": DIM, "codebook_size": CODES, **options})
    with pytest.raises(ValueError, match=r"^heads"):
        nn.ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=2, heads=2)
    layer = nn.SimVQ(DIM, CODES)
    for x in (torch.randn(2, 3, 5), torch.randn(DIM)):
        with pytest.raises(ValueError, match=r"^x: expected shape"):
            layer(x)
    with pytest.raises(TypeError, match=r"^x: expected a tensor"):
        layer(torch.zeros(2, DIM, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"^indices"):
        layer.indices_to_codes(torch.tensor([[CODES]]))
    with pytest.raises(ValueError, match=r"^codebook: expected"):
        nn.SimVQ(DIM, CODES, codebook_transform=torch.nn.Linear(DIM, 5))(torch.randn(2, 3, DIM))


def test_levels_that_are_left_out_get_no_gradient():
    layer = nn.ResidualSimVQ(dim=4, num_quantizers=3, codebook_size=8)
    layer(torch.randn(2, 5, 4), num_levels=2)[2].sum().backward()
    gradients = [level.code_transform.weight.grad for level in layer.layers]
    assert all(gradient.abs().max() > 0 for gradient in gradients[:2])
    assert gradients[2] is None
