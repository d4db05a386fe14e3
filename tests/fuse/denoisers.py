"""Small models of diffusers from their configurations, with inputs, and runs of them that tests compare."""

import copy
from typing import NamedTuple

import torch
from agreement import Errors
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    VQModel,
)
from torch.overrides import TorchFunctionMode

import vqkernels


class Subject(NamedTuple):
    """A model and what it is called with; `trained` names the inputs that get gradients."""

    model: torch.nn.Module
    inputs: dict
    trained: tuple[str, ...]


def dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    inputs = {
        "hidden_states": torch.randn(3, 4, 8, 8),
        "timestep": torch.tensor([0, 1, 7]),
        "class_labels": torch.tensor([3, 9, 3]),
    }
    return Subject(model, inputs, ("hidden_states",))


def pixart():
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=48,
        caption_channels=20,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.tensor([1, 7]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    return Subject(model, inputs, ("hidden_states", "encoder_hidden_states"))


def sd3(**arguments):
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=48,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        **arguments,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([1.0, 0.5]),
    }
    return Subject(model, inputs, ("hidden_states", "encoder_hidden_states", "pooled_projections"))


def sd35():
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def flux():
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 8, 12),
    )
    image_ids = torch.zeros(4, 4, 3)
    image_ids[..., 1] = torch.arange(4)[:, None]
    image_ids[..., 2] = torch.arange(4)[None]
    inputs = {
        "hidden_states": torch.randn(2, 16, 8),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.001, 0.0005]),
        "img_ids": image_ids.reshape(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([0.001, 0.002]),
    }
    return Subject(model, inputs, ("hidden_states", "encoder_hidden_states", "pooled_projections"))


def unet():
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=20,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 20),
    }
    return Subject(model, inputs, ("sample", "encoder_hidden_states"))


_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 24),
    "norm_num_groups": 4,
}


def autoencoder_kl():
    model = AutoencoderKL(**_BLOCKS)
    return Subject(model, {"sample": torch.randn(2, 3, 16, 16)}, ("sample",))


def vq_model():
    # A codebook of one: latents that round otherwise get the same code.
    model = VQModel(**_BLOCKS, num_vq_embeddings=1)
    return Subject(model, {"sample": torch.randn(2, 3, 16, 16)}, ("sample",))


TRANSFORMERS = {"DiT": dit, "PixArt": pixart, "SD3": sd3, "SD3.5": sd35, "Flux": flux, "U-Net": unet}
AUTOENCODERS = {"AutoencoderKL": autoencoder_kl, "VQModel": vq_model}


@torch.no_grad()
def subject(name, seed=0):
    """A subject whose every parameter matters: no norm, gate or modulation is what it is initialised to."""
    torch.manual_seed(seed)
    made = {**TRANSFORMERS, **AUTOENCODERS}[name]()
    for parameter in made.model.parameters():
        parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.5 * parameter.std())
    return made


class _StaysDouble(TorchFunctionMode):
    """float64 tensors stay so where a model asks for float32 to be more exact."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        to_single = func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in args)
        if to_single and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def run(made, dtype=None, autocast=False, model=None):
    """Outputs and gradients of inputs and parameters by name; the model is called as it is, in any mode.

    Args:
        made: a subject.
        dtype: of inputs, where they are not float32.
        autocast: whether to run forward under autocast in bfloat16.
        model: called in place of the subject's.
    """
    model = made.model if model is None else model
    inputs = {}
    for name, value in made.inputs.items():
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        inputs[name] = value.detach().clone().requires_grad_(name in made.trained)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(**inputs, return_dict=False)
    total = 0
    weights = torch.Generator().manual_seed(0)
    results = {}
    for i, output in enumerate(outputs):
        results[f"output.{i}"] = output.detach()
        total = total + (output * torch.randn(output.shape, generator=weights, dtype=torch.float64).to(output)).sum()
    parameters = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    wanted = {name: inputs[name] for name in made.trained} | parameters
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    for (name, value), gradient in zip(wanted.items(), gradients, strict=True):
        results[f"gradient.{name}"] = torch.zeros_like(value) if gradient is None else gradient
    return results


def run_exactly(made):
    """The original in float64."""
    exact = made._replace(model=copy.deepcopy(made.model).double())
    with _StaysDouble():
        return run(exact, torch.float64)


def fused_twin(made, numerics):
    """A fused copy of a subject, and the report."""
    twin = made._replace(model=copy.deepcopy(made.model))
    return twin, vqkernels.fuse(twin.model, numerics=numerics, verbose=False)


def assert_bits_equal(results, expected):
    assert list(results) == list(expected)
    for name, value in expected.items():
        assert results[name].dtype == value.dtype, name
        assert torch.equal(results[name], value), name


def assert_within_budget(name, seeds=(0, 1, 2), train=True):
    """Outputs and gradients of a fused subject, pooled over runs, against the original's budget (see Errors)."""
    errors = Errors()
    for seed in seeds:
        made = subject(name, seed)
        made.model.train(train)
        twin, report = fused_twin(made, "fp32")
        assert report.fused
        assert not report.left
        errors.add(run(made), run(twin), run_exactly(made))
    errors.check()


def kinds(modules):
    """How many modules of a report there are of each class."""
    names = [m.kind for m in modules]
    return {name: names.count(name) for name in names}
