"""The shared object and the package: what they need, what they load, what they say about themselves."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vqkernels
from vqkernels import _C


def undefined_symbols():
    nm = shutil.which("nm")
    assert nm, "nm (binutils) comes with every compiler"
    listing = subprocess.run([nm, "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    return [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]


def test_torch_symbols_are_of_the_c_abi():
    symbols = undefined_symbols()
    from_torch = [s for s in symbols if "torch" in s or re.search(r"\d(at|c10|caffe2)\d|3c10|2at", s)]
    assert from_torch
    assert all(re.fullmatch(r"(aoti_torch|torch)_\w+", s) for s in from_torch), from_torch
    mangled = [s for s in symbols if s.startswith("_Z")]
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(at|c10|torch|caffe2)::", names)


def test_import_is_light():
    code = """
import sys
import vqkernels
unwanted = {"triton", "sklearn", "matplotlib", "rich", "faiss", "vector_quantize_pytorch", "torchvision"}
print(sorted(unwanted & {name.split(".")[0] for name in sys.modules}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_build_info():
    info = vqkernels.build_info()
    assert set(info) == {"compiler", "torch", "cuda", "cuda_architectures"}
    assert info["compiler"]
    assert re.match(r"\d+\.\d+", info["torch"])
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])


def test_capabilities(monkeypatch):
    levels = _C.cpu_capabilities()
    assert levels == [level for level in ("scalar", "avx2", "avx512") if level in levels]
    assert levels[0] == "scalar"
    torch_level = torch.backends.cpu.get_cpu_capability()
    assert ("avx2" in levels) == (torch_level in ("AVX2", "AVX512"))
    monkeypatch.delenv("VQKERNELS_CPU_CAPABILITY", raising=False)
    assert _C.cpu_capability() == levels[-1]
    monkeypatch.setenv("VQKERNELS_CPU_CAPABILITY", "")
    assert _C.cpu_capability() == levels[-1]
    for level in levels:
        monkeypatch.setenv("VQKERNELS_CPU_CAPABILITY", level)
        assert _C.cpu_capability() == level


def calls():
    z, codebook, indices = torch.randn(9, 4), torch.randn(5, 4), torch.zeros(9, dtype=torch.int64)
    state = codebook.clone(), torch.ones(5), codebook.clone(), torch.ones(5, dtype=torch.int64), codebook.clone()
    return {
        "cpu_capability": lambda: _C.cpu_capability(),
        "nearest_code": lambda: vqkernels.nearest_code(z, codebook),
        "code_statistics": lambda: vqkernels.code_statistics(z, indices, 5),
        "ema_update_": lambda: vqkernels.ema_update_(*state, decay=0.9, eps=1e-5),
        "vector_quantize": lambda: vqkernels.vector_quantize(z, codebook),
    }


@pytest.mark.parametrize("name", list(calls()))
@pytest.mark.parametrize("level", ["sse9", "AVX2", "avx512 "])
def test_unknown_level(monkeypatch, name, level):
    call = calls()[name]
    monkeypatch.setenv("VQKERNELS_CPU_CAPABILITY", level)
    expected = rf"VQKERNELS_CPU_CAPABILITY: expected one of .*{_C.cpu_capabilities()[-1]}.*, got \"{level}\""
    with pytest.raises(RuntimeError, match=expected):
        call()


def test_level_of_a_gradient(monkeypatch):
    loss = vqkernels.vector_quantize(torch.randn(9, 4, requires_grad=True), torch.randn(5, 4)).loss
    monkeypatch.setenv("VQKERNELS_CPU_CAPABILITY", "sse9")
    with pytest.raises(RuntimeError, match="VQKERNELS_CPU_CAPABILITY"):
        loss.backward()


@pytest.mark.parametrize("value", ["native", "reference", "cuda"])
def test_backend_from_the_environment(monkeypatch, value):
    monkeypatch.setenv("VQKERNELS_BACKEND", value)
    code = "import torch, vqkernels; print(vqkernels.nearest_code(torch.ones(1, 2), torch.ones(1, 2)).tolist())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if value == "cuda":
        assert "expected None or one of native, triton, reference" in result.stderr
    else:
        assert result.stdout.strip() == "[0]"


def test_source_tree_without_library_says_so(tmp_path):
    package = Path(vqkernels.__file__).parent
    shutil.copytree(package, tmp_path / "vqkernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    # -S keeps out an editable installation's finder; torch is put back by hand.
    site = Path(torch.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.append({str(site)!r}); import vqkernels"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "the native library of vqkernels cannot be loaded" in result.stderr
    assert "pip install -e ." in result.stderr
