"""The sizes that are measured, and the data."""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """`rows` vectors of `dim` against `levels` codebooks of `codes`; `group` says what the case is there to show."""

    name: str
    group: str
    rows: int
    codes: int
    dim: int
    levels: int = 1

    def __str__(self) -> str:
        size = f"{self.rows}x{self.codes}x{self.dim}" + (f", {self.levels} levels" if self.levels > 1 else "")
        return f"{self.name} {size}" if self.name else size

    def smaller(self) -> "Case":
        """The case for a quick look: a sixteenth of the rows, a quarter of the codes."""
        return self._replace(rows=-(-self.rows // 16), codes=-(-self.codes // 4))

    def record(self) -> dict[str, Any]:
        return {"rows": self.rows, "codes": self.codes, "dim": self.dim}

    def data(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows z [rows, dim] and codebook [codes, dim], the same for the same sizes on every device."""
        generator = torch.Generator().manual_seed(self.rows + self.codes + self.dim)
        z = torch.randn(self.rows, self.dim, generator=generator)
        codebook = torch.randn(self.codes, self.dim, generator=generator)
        return z.to(device), codebook.to(device)


def parse_case(text: str) -> Case | None:
    """The case that "N,K,D" or "N,K,D,Q" describes; None where the text is none."""
    match = re.fullmatch(r"\d+(,\d+){2,3}", text)
    return Case("", "own", *map(int, text.split(","))) if match else None


PUBLISHED = [
    Case("VQ-VAE", "published", 32768, 512, 64),
    Case("VQGAN", "published", 8192, 1024, 256),
    Case("VQGAN-16k", "published", 8192, 16384, 256),
    Case("LlamaGen", "published", 8192, 16384, 8),
    Case("EnCodec", "published", 24000, 1024, 128),
    Case("IBQ", "published", 2048, 262144, 256),
]
LARGE_CODEBOOK = [Case("", "large codebook", 2048, 262144, dim) for dim in (8, 64)]
FEW_ROWS = [Case("", "few rows", rows, 262144, 64) for rows in (1, 16, 256)]
MORE_CODES = [Case("", "more codes", 1024, codes, 64) for codes in (64, 512, 4096, 32768, 262144)]
MORE_ROWS = [Case("", "more rows", rows, 4096, 64) for rows in (1, 8, 64, 512, 4096, 32768)]

SEARCH = [*PUBLISHED, *LARGE_CODEBOOK, *FEW_ROWS, *MORE_CODES, *MORE_ROWS]
TRAINING = [PUBLISHED[0], PUBLISHED[1], Case("VQGAN-16k", "published", 4096, 16384, 256), PUBLISHED[3]]
STATISTICS = [*TRAINING, PUBLISHED[4]]
CODEBOOKS = [*TRAINING, PUBLISHED[5]]
RESIDUAL = [
    Case("EnCodec", "published", 24000, 1024, 128, 8),
    Case("DAC", "published", 24000, 1024, 8, 9),
    Case("RQ-VAE", "published", 8192, 16384, 256, 4),
]
RESIDUAL_TRAINING = [Case("EnCodec", "published", 8192, 1024, 128, 8), Case("DAC", "published", 8192, 1024, 8, 9)]
