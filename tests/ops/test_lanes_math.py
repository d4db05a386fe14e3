"""The functions of csrc/cpu/lanes_math.h, compiled alone: accuracy over all floats, equal on all instruction sets."""

import ast
import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.special
from vq_cases import LEVELS

ROOT = Path(__file__).resolve().parents[2]
STEP = 4093  # a prime: all exponents with changing digits

# The function in float64, and its largest error in units in the last place as lanes_math.h says it.
FUNCTIONS = {
    "exp": (np.exp, 0.9),
    "sigmoid": (scipy.special.expit, 2.4),
    "complement": (lambda x: scipy.special.expit(-x), 2.8),
    "cumulative": (scipy.special.ndtr, 3.9),
    "density": (lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi), 2.7),
}


def build_flags():
    """CXX_FLAGS and CAPABILITY_FLAGS of setup.py."""
    values = {}
    source = (ROOT / "setup.py").read_text()
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        if isinstance(node, ast.Assign) and text.startswith(("CXX_FLAGS", "CAPABILITY_FLAGS")):
            exec(text, values)
    return values["CXX_FLAGS"], values["CAPABILITY_FLAGS"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"])))
    common, levels = build_flags()
    common = [*common, "-DVQKERNELS_X86"] if platform.machine().lower() in ("x86_64", "amd64") else common
    loaded = {}
    for level in LEVELS:
        target = tmp_path_factory.mktemp(level) / "lanes_math.so"
        source = Path(__file__).parent / "support" / "lanes_math.cpp"
        subprocess.run([compiler, *common, *levels.get(level, []), "-shared", source, "-o", target], check=True)
        loaded[level] = ctypes.CDLL(str(target))
    return loaded


def floats():
    """A sample of all bit patterns, and all floats around zero and where results begin to over- or underflow."""
    special = np.array([0, 88.72284, 88.5, 86.6, 87.33655, 103.27893, 103.97208, 14.42, 13.1, 15, 104, 89], np.float32)
    around = (special.view(np.uint32)[:, None].astype(np.int64) + np.arange(-64, 65)).clip(0).astype(np.uint32)
    not_finite = np.array([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FC00001, 0x7FFFFFFF], np.uint32)
    positive = np.concatenate([np.arange(0, 2**31, STEP, dtype=np.uint32), around.ravel(), not_finite])
    bits = np.concatenate([positive, positive | np.uint32(2**31)])
    return np.resize(bits, -(-len(bits) // 16) * 16).view(np.float32)


def run(library, name, x):
    y = np.empty_like(x)
    pointers = [ctypes.c_void_p(t.ctypes.data) for t in (x, y)]
    getattr(library, f"run_{name}")(*pointers, ctypes.c_int64(len(x)))
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name, libraries):
    function, bound = FUNCTIONS[name]
    x = floats()
    results = [run(library, name, x) for library in libraries.values()]
    y = results[0]
    for other in results[1:]:
        assert ((y.view(np.uint32) == other.view(np.uint32)) | (np.isnan(y) & np.isnan(other))).all()

    with np.errstate(all="ignore"):
        truth = function(x.astype(np.float64))
        rounded = truth.astype(np.float32)
    assert (np.isnan(y) == np.isnan(truth)).all()
    known = np.isfinite(rounded)
    infinite = np.isinf(rounded)
    # One step below the end of the range rounding may go either way.
    assert (np.isinf(y[infinite]) | (y[infinite] == np.finfo(np.float32).max)).all()
    assert not np.isinf(y[known & (rounded < 3.4028e38)]).any()
    unit = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(truth[known]), 1e-300))) - 23, -149)
    error = np.abs(y[known] - truth[known]) / unit
    assert error.max() <= bound
