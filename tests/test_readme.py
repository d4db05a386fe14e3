"""The README's Python examples run as they stand, one after the other."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_examples_run():
    text = README.read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 2
    names = {
        "features": torch.randn(2, 64, 4, 4),
        "z": torch.randn(100, 16, requires_grad=True),
        "codebook": torch.randn(8, 16),
        "cluster_size": torch.ones(8),
        "code_sum": torch.randn(8, 16),
        "decoder": torch.nn.Linear(16, 3),
    }
    before = names["codebook"].clone()
    for example in examples:
        exec(compile(example, str(README), "exec"), names)
    assert names["quantized"].shape == (2, 64, 4, 4)
    assert names["indices"].shape == (100,)
    assert names["z"].grad is not None
    assert not torch.equal(names["codebook"], before)


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", README.read_text())
