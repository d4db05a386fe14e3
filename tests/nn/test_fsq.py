"""FSQ and its residual layers against vector-quantize-pytorch, exhaustive search in float64, and their own promises."""

import math

import pytest
import torch
import vector_quantize_pytorch as theirs
from vq_upstream import EPS, NoHostSync, assert_close, assert_same_signatures, assert_same_step, pair

from vqkernels import nn, reference
from vqkernels.reference import _checks

LEVELS = [8, 5, 4, 3]
OPTIONS = {
    "default": {},
    "projected": {"dim": 7},
    "projected_without_bias": {"dim": 7, "projection_has_bias": False},
    "codebooks": {"num_codebooks": 3},
    "codebooks_projected": {"num_codebooks": 2, "dim": 5},
    "kept_dimension": {"keep_num_codebooks_dim": True},
    "symmetric": {"preserve_symmetry": True},
    "symmetric_noise": {"preserve_symmetry": True, "noise_dropout": 0.5},
    "clamped": {"bound_hard_clamp": True},
    "symmetric_clamped": {"bound_hard_clamp": True, "preserve_symmetry": True},
    "rotated": {"levels": [5, 5, 5], "orthogonal_rotation": True},
    "rotated_symmetric": {"levels": [4, 4, 4, 4], "orthogonal_rotation": True, "preserve_symmetry": True, "dim": 6},
    "binary": {"levels": [2, 2, 3], "preserve_symmetry": True},
    "without_indices": {"return_indices": False},
    "unforced": {"force_quantization_f32": False},
}
RESIDUAL_OPTIONS = {
    "default": {},
    "projected": {"dim": 7},
    "soft_clamp": {"bound_hard_clamp": False, "soft_clamp_input_value": 1.5},
    "soft_clamps": {"bound_hard_clamp": False, "soft_clamp_input_value": [1.5, 2.0, 1.0, 3.0]},
    "unclamped": {"bound_hard_clamp": False},
    "rotated": {"levels": [5, 5, 5], "orthogonal_rotation": True},
    "noise": {"noise_dropout": 0.5},
}

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_residual_option = pytest.mark.parametrize("options", RESIDUAL_OPTIONS.values(), ids=RESIDUAL_OPTIONS)


def fsq(options):
    return {"levels": LEVELS, **options}


def inputs(layer, *positions, channel_first=False):
    x = 2 * torch.randn(*positions, layer.dim)
    return x.movedim(-1, 1) if channel_first else x


def test_signatures_agree():
    assert_same_signatures(nn.FSQ, theirs.FSQ)
    assert_same_signatures(nn.ResidualFSQ, theirs.ResidualFSQ, extra=("num_levels",))
    assert_same_signatures(nn.GroupedResidualFSQ, theirs.GroupedResidualFSQ)
    assert nn.FSQ is reference.FSQ


@each_option
@pytest.mark.parametrize("train", [True, False])
def test_equals_upstream(options, train):
    layer, upstream = pair(nn.FSQ, theirs.FSQ, **fsq(options))
    layer.train(train), upstream.train(train)
    x = inputs(layer, 3, 20)
    results = assert_same_step(layer, upstream, x)
    if layer.return_indices:
        assert_close(layer.indices_to_codes(results[1]), upstream.indices_to_codes(results[1]))
        assert torch.equal(layer.implicit_codebook, upstream.implicit_codebook)


@pytest.mark.parametrize("options", [{}, {"num_codebooks": 2, "dim": 5}], ids=["one", "codebooks"])
@pytest.mark.parametrize(
    ("channel_first", "positions"), [(True, (2, 6)), (False, (2, 3, 4)), (True, (2, 3, 4)), (False, (1, 2, 3, 4))]
)
def test_layouts(options, channel_first, positions):
    layer, upstream = pair(nn.FSQ, theirs.FSQ, levels=LEVELS, channel_first=channel_first, **options)
    x = inputs(layer, *positions, channel_first=True)
    quantized, indices = assert_same_step(layer, upstream, x)
    assert quantized.shape == x.shape
    assert indices.shape[: len(positions)] == positions
    assert_close(layer.indices_to_codes(indices), quantized)
    rows, row_indices = nn.FSQ(LEVELS, **options), indices.flatten(1, len(positions) - 1)
    rows.load_state_dict(layer.state_dict())
    assert torch.equal(rows(x.flatten(2).mT)[1], row_indices)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clamped", [False, True])
def test_codes_are_the_nearest_levels_in_float64(symmetric, clamped):
    layer = nn.FSQ(LEVELS, preserve_symmetry=symmetric, bound_hard_clamp=clamped)
    x = 2 * torch.randn(1, 5000, 4)
    quantized, indices = layer(x)
    expected_index, stride, undecided = 0, 1, torch.zeros(5000, dtype=torch.bool)
    for channel, num in enumerate(LEVELS):
        z = x[0, :, channel].double()
        if symmetric:
            values = torch.linspace(-1, 1, num, dtype=torch.float64)
            limited = z.clamp(-1, 1) if clamped else z.tanh()
        else:
            # Levels are integers; an even number of them is one longer below zero (arXiv 2309.15505, appendix A.1).
            half = (num - 1) * 1.001 / 2
            offset = 0.5 if num % 2 == 0 else 0.0
            values = torch.arange(-(num // 2), num - num // 2, dtype=torch.float64)
            shift = offset / half if clamped else math.atanh(offset / half)
            limited = ((z + shift).clamp(-1, 1) if clamped else (z + shift).tanh()) * half - offset
        distances = (limited.unsqueeze(1) - values).abs()
        best = distances.topk(2, largest=False)
        # tanh, a product and a sum, each good to a rounding or two of numbers up to num.
        near = best.values[:, 1] - best.values[:, 0] < 16 * num * EPS
        undecided |= near
        level = distances.argmin(1)
        scaled = values[level] if symmetric else values[level] / (num // 2)
        assert_close(quantized[0, ~near, channel].double(), scaled[~near], factor=2)
        expected_index, stride = expected_index + level * stride, stride * num
    assert undecided.float().mean() < 0.01
    assert torch.equal(indices[0, ~undecided].long(), expected_index[~undecided])


@each_option
def test_indices_and_codes_are_inverse(options):
    layer = nn.FSQ(**fsq(options)).eval()
    if layer.has_projections or layer.num_codebooks > 1 or layer.keep_num_codebooks_dim or not layer.return_indices:
        return
    indices = torch.arange(layer.codebook_size, dtype=torch.int32).reshape(1, -1)
    codes = layer.indices_to_codes(indices)
    assert len(codes.unique(dim=1)[0]) == layer.codebook_size
    assert torch.equal(layer.codes_to_indices(codes), indices)
    quantized, found = layer(inputs(layer, 2, 50))
    assert_close(layer.indices_to_codes(found), quantized, factor=8)
    assert (layer.indices_to_codes(torch.tensor([[-1]])) == 0).all()


def test_level_indices():
    layer = nn.FSQ(LEVELS)
    for index in (0, 1, 8, 39, 40, 479):
        levels = [index % 8, index // 8 % 5, index // 40 % 4, index // 160]
        assert layer.indices_to_level_indices(torch.tensor([index]))[0].tolist() == levels


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_noise_moves_that_share_of_the_channels(share):
    layer = nn.FSQ([9, 9], preserve_symmetry=True, noise_dropout=share)
    x = torch.zeros(1, 20000, 2)  # the middle level, 0, so that noise stays within [-1, 1]
    quantized, indices = layer(x)
    moved = quantized != 0
    num = x.numel()
    assert abs(moved.sum() - share * num) <= 5 * math.sqrt(share * (1 - share) * num)
    assert quantized.abs().max() <= 0.5
    assert (indices == 40).all()
    assert (layer.eval()(x)[0] == 0).all()


def test_gradients_pass_the_rounding():
    layer = nn.FSQ([5, 5], preserve_symmetry=True)
    x = torch.randn(1, 30, 2, dtype=torch.float64, requires_grad=True)
    layer(x)[0].sum().backward()
    assert_close(x.grad, 1 - x.detach().tanh() ** 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_modules_quantize_in_float32(dtype):
    for options in ({}, {"orthogonal_rotation": True, "levels": [5, 5, 5]}):
        layer = nn.FSQ(**fsq(options))
        x = inputs(layer, 2, 200).to(dtype)
        expected, indices = layer(x.float())
        quantized, low_indices = layer.to(dtype)(x)
        assert torch.equal(low_indices, indices)
        assert quantized.dtype == dtype
        assert torch.equal(quantized, expected.to(dtype))
        assert torch.equal(layer.indices_to_codes(indices).to(dtype), expected.to(dtype))
    layer = nn.ResidualFSQ(levels=LEVELS, num_quantizers=4)
    expected, indices = layer(x := inputs(layer, 2, 200).to(dtype).float())
    quantized, low_indices = layer.to(dtype)(x.to(dtype))
    assert torch.equal(low_indices, indices)
    assert torch.equal(quantized, expected.to(dtype))
    projected = nn.ResidualFSQ(levels=LEVELS, num_quantizers=4, dim=7).to(dtype)
    quantized, indices = projected(inputs(projected, 2, 20).to(dtype))
    assert quantized.dtype == dtype
    assert torch.equal(projected.get_output_from_indices(indices), quantized)


@each_residual_option
@pytest.mark.parametrize("train", [True, False])
def test_residual_equals_upstream(options, train):
    layer, upstream = pair(nn.ResidualFSQ, theirs.ResidualFSQ, num_quantizers=3, **fsq(options))
    layer.train(train), upstream.train(train)
    # Upstream forgets the rotation when it decodes.
    rotated = "orthogonal_rotation" in options
    results = assert_same_step(layer, upstream, inputs(layer, 3, 20), return_all_codes=not rotated)
    if rotated:
        codebooks = [level.implicit_codebook @ level.orthogonal_rot.mT for level in upstream.layers]
        assert torch.equal(layer.codebooks, torch.stack(codebooks))
    else:
        assert torch.equal(layer.codebooks, upstream.codebooks)
    if "noise_dropout" not in options:
        assert_close(layer.get_output_from_indices(results[1]), results[0])


@pytest.mark.parametrize(("cutoff", "multiple"), [(0, 1), (1, 1), (0, 2), (2, 3)])
def test_residual_dropout_with_a_seed_equals_upstream(cutoff, multiple):
    layer, upstream = pair(
        nn.ResidualFSQ,
        theirs.ResidualFSQ,
        levels=LEVELS,
        num_quantizers=5,
        dim=6,
        quantize_dropout=True,
        quantize_dropout_cutoff_index=cutoff,
        quantize_dropout_multiple_of=multiple,
    )
    x, dropped = inputs(layer, 2, 10), set()
    for seed in range(8):
        _, indices, codes = assert_same_step(
            layer, upstream, x, return_all_codes=True, rand_quantize_dropout_fixed_seed=seed
        )
        active = (indices >= 0).sum(-1).unique()
        assert len(active) == 1
        dropped.add(active.item())
        assert (codes[active.item() :] == 0).all()
        coarse = indices[..., : active.item()]
        assert torch.equal(layer.get_output_from_indices(coarse), layer.get_output_from_indices(indices))
    assert len(dropped) > 1


def test_groups_equal_upstream():
    layer, upstream = pair(
        nn.GroupedResidualFSQ, theirs.GroupedResidualFSQ, dim=12, groups=2, levels=LEVELS, num_quantizers=3
    )
    results = assert_same_step(layer, upstream, inputs(layer, 2, 10), return_all_codes=True)
    assert_close(layer.get_output_from_indices(results[1]), upstream.get_output_from_indices(results[1]))
    assert torch.equal(layer.codebooks, upstream.codebooks)
    assert torch.equal(layer.get_codes_from_indices(results[1]), upstream.get_codes_from_indices(results[1]))


@pytest.mark.parametrize("positions", [(2, 5), (2, 3, 4), (2, 2, 3, 4)])
def test_channel_first_residuals(positions):
    first, last = (nn.ResidualFSQ(levels=LEVELS, num_quantizers=3, dim=6, is_channel_first=f) for f in (True, False))
    last.load_state_dict(first.state_dict())
    x = inputs(last, *positions)
    expected, expected_indices, expected_codes = last(x, return_all_codes=True)
    quantized, indices, codes = first(x.movedim(-1, 1), return_all_codes=True)
    assert_close(quantized.movedim(1, -1), expected)
    assert torch.equal(indices.movedim(1, -1), expected_indices)
    assert torch.equal(codes, expected_codes)
    assert_close(first.get_output_from_indices(indices), quantized)
    groups = nn.GroupedResidualFSQ(dim=12, groups=2, accept_image_fmap=True, levels=LEVELS, num_quantizers=3)
    x = inputs(groups, *positions, channel_first=True)
    quantized, indices = groups(x)
    assert quantized.shape == x.shape
    assert_close(groups.get_output_from_indices(indices), quantized)


def test_residual_errors_shrink():
    layer = nn.ResidualFSQ(levels=[5, 5], num_quantizers=5)
    x = torch.rand(1, 500, 2) - 0.5
    limited = (x / 1.25).tanh() * 1.25
    for levels in range(1, 6):
        error = (layer(x, num_levels=levels)[0] - limited).abs().max()
        assert error <= 0.25 * 5.0 ** (1 - levels) * (1 + 16 * EPS) + 4 * EPS


@pytest.mark.parametrize("train", [True, False])
def test_no_step_waits_for_the_device(train, monkeypatch):
    # A check of index values that leaves tensors of other devices alone. Here all are on the CPU.
    monkeypatch.setattr(_checks, "check_index_range", lambda indices, num_codes: None)
    layers = [
        nn.FSQ(LEVELS, preserve_symmetry=True, noise_dropout=0.5),
        nn.ResidualFSQ(levels=LEVELS, num_quantizers=3, quantize_dropout=True),
        nn.GroupedResidualFSQ(dim=8, groups=2, levels=LEVELS, num_quantizers=3, quantize_dropout=True),
    ]
    for layer in layers:
        x = inputs(layer.train(train), 2, 10).requires_grad_()
        with NoHostSync():
            quantized, indices = layer(x)
            quantized.sum().backward()
            decode = layer.indices_to_codes if isinstance(layer, nn.FSQ) else layer.get_output_from_indices
            decode(indices)


BAD_ARGUMENTS = {
    "levels_empty": (ValueError, "levels", {"levels": []}),
    "levels_one": (ValueError, "levels", {"levels": [5, 1]}),
    "levels_two": (ValueError, "levels", {"levels": [2, 5]}),
    "levels_many": (ValueError, "levels", {"levels": [2**16, 2**16]}),
    "dim": (ValueError, "dim", {"dim": 0}),
    "noise": (ValueError, "noise_dropout", {"noise_dropout": 0.5}),
    "noise_range": (ValueError, "noise_dropout", {"noise_dropout": 1.5, "preserve_symmetry": True}),
    "codebooks": (ValueError, "num_codebooks", {"num_codebooks": 0}),
    "kept": (ValueError, "keep_num_codebooks_dim", {"num_codebooks": 2, "keep_num_codebooks_dim": False}),
}


@pytest.mark.parametrize(("error", "name", "options"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(error, name, options):
    with pytest.raises(error, match=f"^{name}"):
        nn.FSQ(**fsq(options))


def test_bad_input():
    layer = nn.FSQ(LEVELS)
    for x in (torch.randn(2, 3, 5), torch.randn(4), torch.randn(2, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"^x: expected shape"):
            layer(x)
    with pytest.raises(TypeError, match=r"^x: expected a tensor"):
        layer(torch.zeros(2, 3, 4, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"^indices"):
        layer.indices_to_codes(torch.tensor([[480]]))
    with pytest.raises(TypeError, match=r"^indices"):
        layer.indices_to_codes(torch.tensor([[0.0]]))
    with pytest.raises(ValueError, match=r"^zhat"):
        layer.codes_to_indices(torch.zeros(2, 3))
    with pytest.warns(UserWarning, match="orthogonal_rotation"):
        nn.FSQ(LEVELS, orthogonal_rotation=True)


def test_bad_residual_arguments():
    for name, options in (
        ("num_quantizers", {"num_quantizers": 0}),
        ("quantize_dropout_cutoff_index", {"quantize_dropout": True, "quantize_dropout_cutoff_index": 3}),
        ("quantize_dropout_cutoff_index", {"quantize_dropout_cutoff_index": -1}),
        ("quantize_dropout_multiple_of", {"quantize_dropout_multiple_of": 0}),
        ("soft_clamp_input_value", {"soft_clamp_input_value": 2.0}),
        ("return_indices", {"return_indices": False}),
        ("num_codebooks", {"num_codebooks": 2}),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            nn.ResidualFSQ(**{"levels": LEVELS, "num_quantizers": 3, **options})
    layer = nn.ResidualFSQ(levels=LEVELS, num_quantizers=3)
    x = torch.randn(2, 5, 4)
    for num_levels in (0, 4, 1.0, torch.tensor([1])):
        with pytest.raises(ValueError, match=r"^num_levels"):
            layer(x, num_levels=num_levels)
    with pytest.raises(TypeError, match=r"^num_levels"):
        layer(x, num_levels=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^indices: .*quantize_dropout"):
        layer.get_output_from_indices(torch.zeros(2, 5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^dim"):
        nn.GroupedResidualFSQ(dim=5, groups=2, levels=LEVELS, num_quantizers=3)
    with pytest.raises(ValueError, match=r"^is_channel_first"):
        nn.GroupedResidualFSQ(dim=8, groups=2, levels=LEVELS, num_quantizers=3, is_channel_first=True)
