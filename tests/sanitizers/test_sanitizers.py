"""The CPU kernels, built without torch, under the address and undefined-behaviour sanitizers."""

import ast
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vqkernels import _C

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("CXX_FLAGS", "CAPABILITY_FLAGS")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
PROBLEMS = 820  # of all kinds of the drivers in turn


def build_flags():
    """CXX_FLAGS and CAPABILITY_FLAGS of setup.py, so that this build follows that one."""
    source = (ROOT / "setup.py").read_text()
    values = {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        if isinstance(node, ast.Assign) and text.startswith(NAMES):
            exec(text, values)
    return [values[name] for name in NAMES]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"])))
    folder = tmp_path_factory.mktemp("sanitizers")
    common, levels = build_flags()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")

    def build(source):
        level = next((name for name in levels if source.stem.endswith(f"_{name}")), None)
        if level and not is_x86:
            return None
        target = folder / f"{source.stem}.o"
        flags = ["-O0" if flag == "-O3" else flag for flag in common] + ["-g1"] + levels.get(level, []) + SANITIZERS
        # So that a function of the lanes is instrumented once, not wherever it would be inlined.
        flags += ["-DVQKERNELS_LANES_INLINE=inline"]
        flags += ["-DVQKERNELS_X86"] if is_x86 else []
        command = [compiler, *flags, f"-I{ROOT / 'csrc' / 'cpu'}", "-c", str(source), "-o", str(target)]
        compilation = subprocess.run(command, capture_output=True, text=True)
        assert compilation.returncode == 0, compilation.stderr
        return str(target)

    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), *sorted(Path(__file__).parent.glob("driver*.cpp"))]
    share = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() // share)) as pool:
        objects = list(filter(None, pool.map(build, sources)))
    binary = folder / "driver"
    subprocess.run([compiler, *SANITIZERS, "-pthread", *objects, "-o", str(binary)], check=True)
    return binary


@pytest.mark.slow
def test_kernels_under_sanitizers(driver):
    result = subprocess.run([driver, str(PROBLEMS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[:3000]
    levels, problems = result.stdout.splitlines()
    assert levels.split()[1:] == _C.cpu_capabilities()
    assert problems == f"problems: {PROBLEMS}"
