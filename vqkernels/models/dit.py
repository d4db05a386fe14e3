"""Diffusion transformers: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqkernels import reference

FREQUENCIES = 256


class DiT(nn.Module):
    """A transformer on the patches of a noisy image or latent map, under a timestep and a class.

    Names, initialization and state_dict are those of the published model, whose defaults are DiT-XL/2 for latents of
    256 pixel images. `vqkernels.fuse` puts it on the fused operations.

    Args:
        input_size: height and width of the input, a multiple of patch_size.
        patch_size: height and width of a patch.
        in_channels: C of the input.
        hidden_size: D, a multiple of num_heads, and of 4 for the positions.
        depth: blocks.
        num_heads: heads of an attention.
        mlp_ratio: width of the MLPs over D.
        class_dropout_prob: share of labels that training replaces by `num_classes`, the label of "no class"; with 0
            there is none, and no guidance.
        num_classes: classes.
        learn_sigma: predict the fraction of the variance beside the C channels, in C more.
        qk_norm: normalization of q and k: None, "rms" or "layer".
        mlp: "gelu" or "swiglu".
        rope: rotate q and k by the position in the grid of patches, beside the published position embedding.
        checkpoint_blocks: keep the input of each block alone for the backward pass, and compute the rest again.

    Attributes:
        config: the arguments, from which, with the state_dict, the model can be built again.

    Raises:
        ValueError: a size does not fit.
    """

    pos_embed: Tensor
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        qk_norm: str | None = None,
        mlp: str = "gelu",
        rope: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "in_channels": in_channels, "depth": depth, "num_classes": num_classes}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if input_size < 1 or input_size % patch_size:
            raise ValueError(f"input_size: expected a multiple of {patch_size}, the patch_size, got {input_size}")
        if hidden_size < 1 or hidden_size % 4:
            raise ValueError(f"hidden_size: expected a multiple of 4, got {hidden_size}")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob: expected a number from 0 to 1, got {class_dropout_prob}")
        self.config = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "qk_norm": qk_norm,
            "mlp": mlp,
            "rope": rope,
            "checkpoint_blocks": checkpoint_blocks,
        }
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        self.checkpoint_blocks = checkpoint_blocks

        side = input_size // patch_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(position_embedding(side, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            reference.DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, mlp=mlp) for _ in range(depth)
        )
        self.final_layer = reference.FinalLayer(hidden_size, patch_size, self.out_channels)
        if rope:
            tables = reference.rope_tables((side, side), hidden_size // num_heads)
            for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
                self.register_buffer(name, table, persistent=False)

    @property
    def rope(self) -> tuple[Tensor, Tensor] | None:
        return (self.rope_cos, self.rope_sin) if self.config["rope"] else None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """What the model says of noisy images.

        Args:
            x: [B, C, input_size, input_size].
            t: timesteps [B], integers or not.
            y: labels, int64 [B] from 0 to num_classes - 1; num_classes is "no class".

        Returns:
            [B, C, input_size, input_size], or 2 C channels with learn_sigma.

        Raises:
            IndexError: there is no such label (on CPU, where looking waits for nothing).
            ValueError: a shape does not fit.
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(f"x: expected shape [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
        for name, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"{name}: expected shape [{x.shape[0]}], got {list(value.shape)}")
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        return self.unpatchify(self.transform(tokens, condition))

    def transform(self, x: Tensor, c: Tensor) -> Tensor:
        """Blocks and final layer: patches [B, L, p p C] of tokens [B, L, D] under a condition [B, D]."""
        for block in self.blocks:
            x = self.run_block(block, x, c, self.rope)
        return self.final_layer(x, c)

    def run_block(self, block: Callable[..., Any], *args: Any) -> Any:
        """Calls a block, which keeps nothing but its arguments if `checkpoint_blocks` says so."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] of patches [B, L, p p C]."""
        side, patch = self.input_size // self.patch_size, self.patch_size
        x = x.unflatten(2, (patch, patch, self.out_channels)).unflatten(1, (side, side))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, side * patch, side * patch)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, *, guided_channels: int | None = 3
    ) -> Tensor:
        """Classifier-free guidance as published: the second half of a batch has the label of "no class".

        Args:
            x: [2 B, C, H, W]; the second half is not looked at, the first stands for it.
            t: [2 B].
            y: [2 B], classes and then num_classes.
            cfg_scale: output = unconditional + cfg_scale (conditional - unconditional).
            guided_channels: channels that this is done to, the first; the others stay. Published are 3, although
                latents have 4; None: all C, without the variance.

        Returns:
            [2 B, C or 2 C, H, W], both halves with the guided channels.
        """
        guided_channels = self.in_channels if guided_channels is None else guided_channels
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        guided, rest = output.tensor_split([guided_channels], 1)
        conditional, unconditional = guided.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], 1)


class PatchEmbedder(nn.Module):
    """Tokens [B, L, D] of the patches of images [B, C, H, W], row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Vectors [B, D] of timesteps [B]: an MLP of their sinusoids."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        linears = nn.Linear(FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(linears[0], nn.SiLU(), linears[1])

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(reference.timestep_embedding(t, FREQUENCIES, dtype=dtype))


class LabelEmbedder(nn.Module):
    """Vectors [B, D] of labels [B], some of which training replaces by `num_classes`, "no class"."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.dropout_prob, self.num_classes)
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            labels = self.embedding_table.num_embeddings
            outside = y[(y < 0) | (y >= labels)]
            if len(outside):
                raise IndexError(f"y: expected labels from 0 to {labels - 1}, got {outside[0].item()}")
        return self.embedding_table(y)


def position_embedding(side: int, dim: int) -> Tensor:
    """Of the positions of a grid, row by row, float32 [1, side side, dim]: sinusoids of the column, then of the row.

    Each half of dim is the sines, then the cosines, of position / 10000^(i / (dim / 4)), 0 <= i < dim / 4.
    """
    positions = torch.arange(side, dtype=torch.float64)
    angles = torch.outer(positions, 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves.expand(side, -1, -1), waves.unsqueeze(1).expand(-1, side, -1)], -1)
    return grid.reshape(1, side * side, dim).float()


_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}

DiT_models: dict[str, Callable[..., DiT]] = {
    f"DiT-{size}/{patch}": functools.partial(
        DiT, depth=depth, hidden_size=hidden_size, patch_size=patch, num_heads=num_heads
    )
    for size, (depth, hidden_size, num_heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
