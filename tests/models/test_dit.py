"""The diffusion transformer: published sizes and names, diffusers' own, initialization, guidance, checkpointing."""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps

from vqkernels.models import DiT, DiT_models

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 48,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}


def small(**options):
    """A model that computes something: a new one gives zeros."""
    model = DiT(**{**SMALL, **options})
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(count=4, dtype=torch.float32):
    x = torch.randn(count, SMALL["in_channels"], SMALL["input_size"], SMALL["input_size"], dtype=dtype)
    return x, torch.randint(1000, (count,)), torch.arange(count)


# Millions of parameters at patch size 2: arXiv 2212.09748, table 4.
@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_published_sizes(size, millions):
    with torch.device("meta"):
        model = DiT_models[f"DiT-{size}/2"]()
        coarser = DiT_models[f"DiT-{size}/4"](), DiT_models[f"DiT-{size}/8"]()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dim, depth = model.pos_embed.shape[2], len(model.blocks)
    block = 4 * dim * dim + 4 * dim + 8 * dim * dim + 5 * dim + 6 * dim * dim + 6 * dim
    embedders = (16 * dim + dim) + (256 * dim + dim) + (dim * dim + dim) + 1001 * dim
    final = 2 * dim * dim + 2 * dim + 32 * dim + 32
    assert count == depth * block + embedders + final
    assert abs(count / 1e6 - millions) < 1
    assert [m.pos_embed.shape[1] for m in (model, *coarser)] == [256, 64, 16]


def test_published_names():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in DiT_models["DiT-XL/2"](depth=1).state_dict().items()}
    dim = 1152
    linears = {
        "t_embedder.mlp.0": (dim, 256),
        "t_embedder.mlp.2": (dim, dim),
        "blocks.0.attn.qkv": (3 * dim, dim),
        "blocks.0.attn.proj": (dim, dim),
        "blocks.0.mlp.fc1": (4 * dim, dim),
        "blocks.0.mlp.fc2": (dim, 4 * dim),
        "blocks.0.adaLN_modulation.1": (6 * dim, dim),
        "final_layer.linear": (2 * 2 * 8, dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
        "x_embedder.proj": (dim, 4, 2, 2),
    }
    expected = {"pos_embed": (1, 256, dim), "y_embedder.embedding_table.weight": (1001, dim)}
    for name, shape in linears.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert shapes == expected


def as_diffusers(model):
    """The same model in diffusers, whose blocks have an embedder of the condition each."""
    dim, heads = SMALL["hidden_size"], SMALL["num_heads"]
    other = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=model.input_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
        norm_eps=1e-6,
    )
    state = model.state_dict()
    mapped = {f"pos_embed.proj.{n}": state[f"x_embedder.proj.{n}"] for n in ("weight", "bias")}
    names = {"attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
    names["norm1.linear"] = "adaLN_modulation.1"
    for i in range(len(model.blocks)):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        embedder = f"{theirs}.norm1.emb"
        mapped[f"{embedder}.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        for n in ("weight", "bias"):
            for linear, layer in (("linear_1", 0), ("linear_2", 2)):
                mapped[f"{embedder}.timestep_embedder.{linear}.{n}"] = state[f"t_embedder.mlp.{layer}.{n}"]
            mapped |= {f"{theirs}.{a}.{n}": state[f"{ours}.{b}.{n}"] for a, b in names.items()}
            parts = state[f"{ours}.attn.qkv.{n}"].chunk(3)
            mapped |= {f"{theirs}.attn1.to_{a}.{n}": part for a, part in zip("qkv", parts, strict=True)}
    for n in ("weight", "bias"):
        mapped[f"proj_out_1.{n}"] = state[f"final_layer.adaLN_modulation.1.{n}"]
        mapped[f"proj_out_2.{n}"] = state[f"final_layer.linear.{n}"]
    other.load_state_dict(mapped)
    other.pos_embed.pos_embed.copy_(state["pos_embed"])
    for block in other.transformer_blocks:  # the published frequencies; diffusers' own end elsewhere
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return other.to(model.pos_embed.dtype)


def test_equals_diffusers():
    model = small().double().eval()
    other = as_diffusers(model).eval()
    x, t, y = inputs(dtype=torch.float64)
    for times, rounding in ((t, 1000 * 2**-24), (torch.zeros_like(t), 2**-40)):  # sinusoids are float32: angle 2^-24
        expected = other(x, timestep=times, class_labels=y).sample
        assert expected.abs().max() > 1
        assert (model(x, times, y) - expected).abs().max() < rounding * expected.abs().max()


def test_positions_are_sinusoids_of_column_and_row():
    side, dim = 5, 24
    table = DiT(input_size=side, patch_size=1, hidden_size=dim, depth=1, num_heads=2).pos_embed[0].numpy()
    for row in range(side):
        for column in range(side):
            for i in range(dim // 4):
                frequency = 1 / 10000 ** (i / (dim // 4))
                expected = [math.sin(column * frequency), math.cos(column * frequency)]
                expected += [math.sin(row * frequency), math.cos(row * frequency)]
                actual = table[row * side + column, i :: dim // 4]
                assert np.abs(actual - np.array(expected)).max() <= 2**-24


def test_a_new_model_gives_zeros_and_its_blocks_the_identity():
    model = DiT(**SMALL)
    x, t, y = inputs()
    assert not model(x, t, y).any()
    tokens, condition = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert torch.equal(model.blocks[0](tokens, condition), tokens)
    fan = 48 + 4 * 48
    weight = model.blocks[0].mlp.fc1.weight
    assert weight.abs().max() <= math.sqrt(6 / fan)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.05)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.pos_embed.requires_grad


def test_patches_go_where_they_came_from():
    model = DiT(**SMALL, learn_sigma=False)
    images = torch.randn(2, 3, 8, 8)
    patches = torch.nn.functional.unfold(images, 2, stride=2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(model.unpatchify(patches.transpose(1, 2)), images)


@pytest.mark.parametrize(
    ("options", "channels"), [({}, 3), ({"guided_channels": None}, 4), ({"guided_channels": 1}, 1)]
)
def test_guidance(options, channels):
    model = small(in_channels=4).double().eval()
    x, t, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([5, 700]), torch.tensor([1, 2])
    conditional, unconditional = model(x, t, y), model(x, t, torch.full_like(y, 10))
    guided = unconditional + 4.0 * (conditional - unconditional)
    both = model.forward_with_cfg(
        torch.cat([x, torch.zeros_like(x)]), t.repeat(2), torch.cat([y, torch.full_like(y, 10)]), 4.0, **options
    )
    assert both.shape == (4, 8, 8, 8)
    for half, other in zip(both.chunk(2), (conditional, unconditional), strict=True):
        torch.testing.assert_close(half[:, :channels], guided[:, :channels])
        torch.testing.assert_close(half[:, channels:], other[:, channels:])


def test_labels_are_dropped_in_training_alone():
    model = small(class_dropout_prob=1.0)
    x, t, y = inputs()
    without = torch.full_like(y, 10)
    assert torch.equal(model(x, t, y), model(x, t, without))
    model.eval()
    assert not torch.equal(model(x, t, y), model(x, t, without))
    model = small(class_dropout_prob=0.25)
    dropped = model.y_embedder(torch.zeros(4000, dtype=torch.int64)) == model.y_embedder.embedding_table.weight[10]
    assert dropped.all(1).float().mean().item() == pytest.approx(0.25, abs=0.03)  # over 4 standard deviations
    assert small(class_dropout_prob=0.0).y_embedder.embedding_table.weight.shape == (10, 48)


def gradients(model, x, t, y):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x, t, y)
    output.square().mean().backward()
    return [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms", "mlp": "swiglu", "rope": True}])
def test_checkpointing_changes_memory_alone(options):
    model = small(**options).eval()
    other = copy.deepcopy(model)
    other.checkpoint_blocks = True
    arguments = inputs()
    assert all(map(torch.equal, gradients(model, *arguments), gradients(other, *arguments)))
    assert kept(other, *arguments) < 0.25 * kept(model, *arguments)


def kept(model, *arguments):
    """Elements that are saved for the backward pass, parameters aside."""
    tensors = []
    parameters = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        model(*arguments)
    sizes = {t.data_ptr(): t.numel() for t in tensors if t.data_ptr() not in parameters}
    return sum(sizes.values())


def test_can_be_built_again_and_compiled():
    model = small(rope=True, qk_norm="layer").eval()
    other = DiT(**model.config).eval()
    other.load_state_dict(model.state_dict())
    arguments = inputs()
    assert torch.equal(other(*arguments), model(*arguments))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), model(*arguments))


def test_rope_sees_where_a_patch_is():
    model = small(rope=True).eval()
    torch.nn.init.zeros_(model.pos_embed)
    x, t, y = inputs()
    flat = small().eval()
    flat.load_state_dict(model.state_dict())
    rolled = x.roll(2, -1)
    torch.testing.assert_close(flat(rolled, t, y), flat(x, t, y).roll(2, -1))  # without positions: any order
    assert (model(rolled, t, y) - model(x, t, y).roll(2, -1)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 9}, "input_size: expected a multiple of 2, the patch_size, got 9"),
        ({"hidden_size": 50}, "hidden_size: expected a multiple of 4, got 50"),
        ({"num_heads": 5}, "num_heads: expected a divisor of 48, got 5"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob: expected a number from 0 to 1, got 1.5"),
        ({"qk_norm": "l2"}, 'qk_norm: expected None, "rms" or "layer", got \'l2\''),
        ({"mlp": "relu"}, 'mlp: expected "gelu" or "swiglu", got \'relu\''),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match="expected") as error:
        DiT(**{**SMALL, **options})
    assert str(error.value) == message


def test_bad_inputs():
    model = DiT(**SMALL)
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 3, 8, 8\], got \[4, 3, 8, 4\]"):
        model(x[..., :4], t, y)
    with pytest.raises(ValueError, match=r"t: expected shape \[4\], got \[3\]"):
        model(x, t[:3], y)
    with pytest.raises(ValueError, match=r"y: expected shape \[4\], got \[\]"):
        model(x, t, y[0])
    for labels, wrong in ((10, 11), (9, 10)):  # without label dropout there is no label of "no class"
        model = DiT(**SMALL, class_dropout_prob=0.1 * (labels - 9)).eval()
        model(x, t, torch.full_like(y, labels))
        for label in (wrong, -1):
            with pytest.raises(IndexError, match=rf"y: expected labels from 0 to {labels}, got {label}"):
                model(x, t, torch.full_like(y, label))
