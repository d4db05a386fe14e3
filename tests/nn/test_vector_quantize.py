"""What the layer promises beyond its interface: masks, invalid rows, dtypes, round trips, errors, statistics."""

import copy
import pickle

import numpy as np
import pytest
import torch

from vqkernels import nn, reference

LAYERS = {"nn": nn.VectorQuantize, "reference": reference.VectorQuantize}
OPTIONS = {
    "default": {},
    "projected": {"codebook_dim": 5},
    "shared_heads": {"heads": 2, "codebook_dim": 4},
    "separate_heads": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
    "cosine": {"use_cosine_sim": True},
    "learnable": {"learnable_codebook": True},
}
EPS = torch.finfo(torch.float32).eps

each_layer = pytest.mark.parametrize("layer_class", LAYERS.values(), ids=LAYERS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def copies(layer, num=2):
    return [copy.deepcopy(layer) for _ in range(num)]


def assert_equal_states(first, second):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def close(actual, expected, factor=32):
    return (actual - expected).abs().max() <= factor * EPS * expected.abs().max()


@each_option
def test_the_fused_layer_equals_its_twin(options):
    twin = reference.VectorQuantize(8, 32, **options)
    layer = nn.VectorQuantize(8, 32, **options)
    layer.load_state_dict(twin.state_dict())
    for _ in range(3):
        x = torch.randn(2, 50, 8)
        results = []
        for module in (layer, twin):
            z = x.clone().requires_grad_()
            quantized, indices, loss = module(z)
            (quantized.sin().sum() + loss).backward()
            results.append((indices, quantized, loss, z.grad, module.codebook))
        assert torch.equal(results[0][0], results[1][0])
        for fused, expected in zip(*[r[1:] for r in results], strict=True):
            assert close(fused, expected)


@each_layer
@each_option
def test_a_masked_batch_is_its_unmasked_rows(layer_class, options):
    layer, alone = copies(layer_class(8, 32, **options))
    x, mask = torch.randn(3, 20, 8), torch.rand(3, 20) < 0.5
    x[~mask] = torch.nan
    z, z_alone = x.clone().requires_grad_(), x[mask].unsqueeze(0).requires_grad_()
    quantized, indices, loss = layer(z, mask=mask)
    expected, expected_indices, expected_loss = alone(z_alone)
    assert torch.equal(indices[mask], expected_indices[0])
    assert (indices[~mask] == -1).all()
    assert (quantized[~mask] == 0).all()
    assert close(quantized[mask], expected[0])
    assert close(loss, expected_loss)
    (quantized.sum() + loss).backward()
    (expected.sum() + expected_loss).backward()
    assert close(z.grad[mask], z_alone.grad[0])
    assert (z.grad[~mask] == 0).all()
    for ours, theirs in zip(layer.parameters(), alone.parameters(), strict=True):
        assert close(ours.grad, theirs.grad)
    assert close(layer.codebook, alone.codebook)
    if layer_class is nn.VectorQuantize and not layer.has_projections:
        assert_equal_states(layer, alone)


@pytest.mark.parametrize("options", [{"channel_last": False}, {}], ids=["channel_first", "channel_last"])
def test_lens_are_a_mask(options):
    first, second = copies(nn.VectorQuantize(8, 32, **options))
    x, lens = torch.randn(4, 6, 8), torch.tensor([6, 0, 1, 3])
    mask = torch.tensor([[n < length for n in range(6)] for length in lens.tolist()])
    if options:
        x = x.mT
    for a, b in zip(first(x, lens=lens), second(x, mask=mask), strict=True):
        assert torch.equal(a, b)
    assert_equal_states(first, second)


def test_masked_positions_can_keep_the_input():
    layer = nn.VectorQuantize(8, 32, codebook_dim=4, return_zeros_for_masked_padding=False)
    x, mask = torch.randn(2, 5, 8), torch.rand(2, 5) < 0.5
    quantized, _, _ = layer(x, mask=mask)
    assert torch.equal(quantized[~mask], x[~mask])
    assert not torch.equal(quantized[mask], x[mask])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"heads": 2, "codebook_dim": 4}])
def test_an_invalid_row_touches_nothing(options, bad):
    layer, alone = copies(nn.VectorQuantize(8, 32, threshold_ema_dead_code=0, **options))
    x = torch.randn(1, 41, 8)
    x[0, 17] = bad
    without = torch.cat([x[:, :17], x[:, 18:]], dim=1)
    for _ in range(3):
        quantized, indices, loss = layer(x)
        expected, expected_indices, expected_loss = alone(without)
    assert (indices[0, 17] == -1).all()
    assert quantized[0, 17].isnan().all()
    others = torch.arange(41) != 17
    assert torch.equal(indices[:, others], expected_indices)
    assert torch.equal(quantized[:, others], expected)
    assert close(loss, expected_loss)
    assert_equal_states(layer, alone)


@each_layer
def test_batches_without_a_valid_row(layer_class):
    for x in (torch.full((2, 3, 8), torch.nan), torch.zeros(2, 0, 8), torch.zeros(0, 3, 8)):
        layer = layer_class(8, 32, kmeans_init=True, threshold_ema_dead_code=2)
        before = layer.codebook.clone()
        _, indices, loss = layer(x)
        assert (indices == -1).all()
        assert loss == 0
        assert layer.codebook.isfinite().all()
        assert layer._codebook.embed_avg.isfinite().all()
        assert close(layer.codebook, before)


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_codebook_stays_float32(layer_class, dtype):
    layer = layer_class(8, 32, codebook_dim=4, learnable_codebook=True).to(dtype)
    assert layer.project_in.weight.dtype == dtype
    assert layer._codebook.embed.dtype == torch.float32
    layer = layer_class(8, 32)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to(dtype).double()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    x = torch.randn(2, 50, 8, dtype=dtype)
    wide = copy.deepcopy(layer)
    quantized, indices, loss = layer(x)
    expected, expected_indices, expected_loss = wide(x.float())
    assert quantized.dtype == dtype
    assert loss.dtype == torch.float32
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized, expected.to(dtype))
    assert close(loss, expected_loss)
    assert close(layer.codebook, wide.codebook)
    assert all(value.dtype in (torch.float32, torch.bool) for value in layer.state_dict().values())


@each_layer
@pytest.mark.parametrize("assign", [False, True])
def test_a_low_precision_state_is_widened(layer_class, assign):
    source = layer_class(8, 32)
    state = {name: v.bfloat16() if v.is_floating_point() else v for name, v in source.state_dict().items()}
    layer = layer_class(8, 32)
    layer.load_state_dict(state, assign=assign)
    assert layer.codebook.dtype == torch.float32
    assert torch.equal(layer.codebook, source.codebook.bfloat16().float())


@each_layer
@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}])
def test_autocast_does_not_lower_the_codebook(layer_class, options):
    layer, plain = copies(layer_class(8, 32, **options))
    x = torch.randn(2, 50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = layer(x)
    for actual, expected in zip(results, plain(x), strict=True):
        assert torch.equal(actual, expected)
    assert_equal_states(layer, plain)


@each_layer
def test_autocast_lowers_projections_alone(layer_class):
    layer = layer_class(8, 32, codebook_dim=4)
    x = torch.randn(2, 50, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, _, loss = layer(x)
    assert quantized.dtype == loss.dtype == torch.float32
    assert layer.codebook.dtype == torch.float32
    (quantized.sum() + loss).backward()
    assert x.grad.isfinite().all()


@each_option
def test_round_trips(options):
    layer = nn.VectorQuantize(8, 32, **options)
    layer(torch.randn(2, 50, 8))
    twin, fresh = reference.VectorQuantize(8, 32, **options), nn.VectorQuantize(8, 32, **options)
    twin.load_state_dict(layer.state_dict(), strict=True)
    fresh.load_state_dict(twin.state_dict(), strict=True)
    x = torch.randn(2, 50, 8)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh]
    expected = layer(x)
    for other in others:
        for a, b in zip(other(x), expected, strict=True):
            assert torch.equal(a, b)
        assert_equal_states(other, layer)


@each_option
@pytest.mark.parametrize("layout", ["channel_last", "channel_first", "image", "volume", "token"])
def test_indices_decode_to_the_output(options, layout):
    layouts = {
        "channel_first": ({"channel_last": False}, (2, 8, 10)),
        "image": ({"accept_image_fmap": True}, (2, 8, 3, 5)),
        "volume": ({"accept_3d_fmap": True}, (2, 8, 3, 2, 5)),
        "token": ({}, (6, 8)),
    }
    more, shape = layouts.get(layout, ({}, (2, 10, 8)))
    layer = nn.VectorQuantize(8, 32, **more, **options).eval()
    x = torch.randn(shape)
    if layout == "channel_last":
        quantized, indices, _ = layer(x, mask=torch.rand(2, 10) < 0.5)
        assert (indices == -1).any()
    else:
        quantized, indices, _ = layer(x)
    assert layer.get_output_from_indices(indices).shape == quantized.shape
    assert close(layer.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_statistics(separate, train):
    layer = nn.VectorQuantize(8, 32, heads=2, codebook_dim=4, separate_codebook_per_head=separate).train(train)
    x, mask = torch.randn(3, 15, 8), torch.rand(3, 15) < 0.7
    _, indices, _, usage = layer(x, mask=mask, return_statistics=True)
    groups = [indices[..., 0], indices[..., 1]] if separate else [indices]
    for h, group in enumerate(groups):
        chosen = group[group >= 0].numpy()
        counts = np.bincount(chosen, minlength=32)
        share = counts[counts > 0] / counts.sum()
        actual = [value[h] if separate else value for value in usage]
        assert actual[0].tolist() == counts.tolist()
        assert actual[1].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=64 * EPS)
        assert actual[2].item() == pytest.approx((counts > 0).mean(), rel=EPS)


def test_the_order_of_what_is_returned():
    layer = nn.VectorQuantize(8, 32, commitment_weight=0.25)
    x = torch.randn(2, 10, 8)
    quantized, indices, loss, breakdown, usage = layer(x, return_loss_breakdown=True, return_statistics=True)
    assert isinstance(breakdown, nn.LossBreakdown)
    assert isinstance(usage, nn.CodeUsage)
    mse = (x.double() - quantized.double()).square().mean()
    assert breakdown.commitment.item() == pytest.approx(mse.item(), rel=32 * EPS)
    assert loss == breakdown.commitment * 0.25
    assert usage.counts.sum() == indices.numel()


def test_projections_learn_though_the_input_needs_no_gradient():
    layer = nn.VectorQuantize(8, 32, codebook_dim=4, commitment_weight=0.0)
    layer(torch.randn(2, 10, 8))[0].sum().backward()
    assert layer.project_in.weight.grad.abs().max() > 0


@each_layer
def test_a_codebook_set_by_hand_stays(layer_class):
    for options in ({}, {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}):
        layer = layer_class(8, 32, kmeans_init=True, **options)
        codes = torch.randn_like(layer.codebook)
        layer.codebook = codes
        assert torch.equal(layer.codebook, codes)
        _, indices, _ = layer(torch.zeros(1, 0, 8))
        assert indices.numel() == 0
        assert close(layer.codebook, codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim: expected an integer of at least 1, got 0"),
        ({"codebook_size": 0}, "codebook_size: expected an integer of at least 1, got 0"),
        ({"codebook_dim": 0}, "codebook_dim: expected an integer of at least 1, got 0"),
        ({"heads": 1.5}, "heads: expected an integer of at least 1, got 1.5"),
        ({"decay": 1.5}, "decay: expected a number from 0 to 1, got 1.5"),
        ({"eps": -1.0}, "eps: expected a number of at least 0, got -1.0"),
        ({"commitment_weight": -1.0}, "commitment_weight: expected a number of at least 0, got -1.0"),
        ({"learnable_codebook": True, "ema_update": True}, "learnable_codebook, ema_update: expected at most one"),
        ({"learnable_codebook": True, "use_cosine_sim": True}, "learnable_codebook, use_cosine_sim: expected at most"),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "accept_image_fmap, accept_3d_fmap: expected at most"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nn.VectorQuantize(**{"dim": 8, "codebook_size": 32, **options})


SEQUENCE = torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, (SEQUENCE[..., :7],), ValueError, r"x: expected shape \[B, N, 8\] or \[B, 8\], got \[2, 5, 7\]"),
        ({}, (SEQUENCE[0, :, :7],), ValueError, r"x: expected shape .* got \[5, 7\]"),
        ({}, (SEQUENCE[0, 0],), ValueError, r"x: expected shape .* got \[8\]"),
        ({}, (SEQUENCE[None],), ValueError, r"x: expected shape .* got \[1, 2, 5, 8\]"),
        ({"channel_last": False}, (SEQUENCE,), ValueError, r"x: expected shape \[B, 8, N\] or \[B, 8\], got"),
        ({"accept_image_fmap": True}, (SEQUENCE,), ValueError, r"x: expected shape \[B, 8, H, W\], got \[2, 5, 8\]"),
        ({"accept_3d_fmap": True}, (SEQUENCE,), ValueError, r"x: expected shape \[B, 8, D, H, W\], got \[2, 5, 8\]"),
        ({}, (SEQUENCE.long(),), TypeError, r"x: expected a tensor of float32 or .*, got int64 tensor of shape"),
        ({}, ([1.0],), TypeError, r"x: expected a tensor of float32 or .*, got list \[1.0\]"),
        ({}, (SEQUENCE, None, torch.ones(2, 4, dtype=torch.bool)), ValueError, r"mask: expected shape \[2, 5\] to"),
        ({}, (SEQUENCE, None, torch.ones(2, 5)), TypeError, "mask: expected a tensor of bool, got float32 tensor"),
        ({}, (SEQUENCE, None, None, torch.ones(3).long()), ValueError, r"lens: expected shape \[2\] to match x of"),
        ({}, (SEQUENCE, None, None, torch.ones(2)), TypeError, "lens: expected a tensor of int64 or int32, got float"),
        ({}, (SEQUENCE, None, torch.ones(2, 5).bool(), torch.ones(2).long()), ValueError, "mask, lens: .* got both"),
        ({}, (SEQUENCE[0], None, torch.ones(5).bool()), ValueError, "mask: expected only with x of three dimensions"),
    ],
)
def test_bad_input(options, arguments, error, message):
    with pytest.raises(error, match=message):
        nn.VectorQuantize(8, 32, **options)(*arguments)


def test_other_bad_arguments():
    layer = nn.VectorQuantize(8, 32, heads=2, separate_codebook_per_head=True)
    with pytest.raises(ValueError, match=r"indices: expected shape \[\.\.\., 2\], got \[2, 5\]"):
        layer.get_codes_from_indices(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="indices: expected a tensor of int64 or int32, got float32"):
        layer.get_codes_from_indices(torch.zeros(2, 5, 2))
    with pytest.raises(IndexError):
        layer.get_codes_from_indices(torch.tensor([[32, 0]]))
    with pytest.raises(ValueError, match=r"indices: expected shape \[2, 5, 2\] to match x"):
        layer.update_indices(SEQUENCE, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codebook: expected shape \[2, 32, 8\], got \[32, 8\]"):
        layer.codebook = torch.zeros(32, 8)
    learnable = nn.VectorQuantize(8, 32, learnable_codebook=True)
    with pytest.raises(ValueError, match="ema_update: expected False with a learnable codebook, got True"):
        learnable(SEQUENCE, ema_update=True)
