"""The last layer of diffusion transformers (DiT): Peebles & Xie, arXiv 2212.09748, section 3.2."""

from torch import Tensor, nn

from vqkernels.reference.dit_block import EPS, check_condition, modulate, reset_to_zero


class FinalLayer(nn.Module):
    """Linear(norm(x) (1 + scale) + shift) with shift, scale = Linear(SiLU(c)): tokens become patches.

    Both linear layers start as 0, as published. The state_dict is that of the published model.

    Args:
        hidden_size: D.
        patch_size: p, the sides of a patch.
        out_channels: C.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_to_zero(self)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Patches [B, L, p p C] of tokens x [B, L, D] under a condition c, [B, D] or [B, L, D].

        Raises:
            TypeError: x or c is no tensor of floating-point numbers.
            ValueError: x or c has another shape.
        """
        check_condition(x, c, self.hidden_size)
        modulation = self.adaLN_modulation(c)
        modulation = modulation.unsqueeze(1) if modulation.ndim < x.ndim else modulation
        shift, scale = modulation.chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
