"""Triton kernels run on CUDA, or interpreted on CPU, in a process of their own (test_interpreter.py), or compile."""

import os
import re
import subprocess
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# What is interpreted can neither be compiled nor run on a GPU.
collect_ignore = ["test_compile.py", "test_on_gpu.py"] if INTERPRETED else []


def pytest_collection_modifyitems(items):
    if INTERPRETED:
        items[:] = [item for item in items if "compiled" not in item.fixturenames]


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Program(NamedTuple):
    """A kernel as it was compiled; `shared` in bytes a block."""

    ptx: str
    cubin: bytes
    shared: int

    def registers_and_stack(self, folder):
        """Registers of a thread, and bytes that it keeps in memory for want of registers."""
        path = folder / "program.cubin"
        path.write_bytes(self.cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return int(registers), int(stack)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A function of the capability, from whose call on launches compile instead, into the dict that it returns.

    Its keys are (name of the kernel, signature, constants, attributes), its values of type Program.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    programs = {}

    def launch(self, *args, grid, warmup, capability, **options):
        bound = dict(zip(self.arg_names, args, strict=False))
        bound |= {name: options.pop(name) for name in self.arg_names if name in options}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.params):
            value = bound[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                assert isinstance(value, int | float)
                signature[parameter.name] = parameter.annotation_type
                assert signature[parameter.name] in (("i64",) if isinstance(value, int) else ("fp32", "fp64"))
            of_integer = isinstance(value, int) and signature[parameter.name] != "constexpr"
            divisible = isinstance(value, torch.Tensor) or (of_integer and value % 16 == 0)
            if divisible and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        key = (self.__name__, str(signature), str(constants), str(attributes))
        if key not in programs:
            source = ASTSource(self, signature, constants, attributes)
            target = GPUTarget("cuda", capability, 32)
            done = triton.compile(source, target=target, options=options)
            programs[key] = Program(done.asm["ptx"], done.asm["cubin"], done.metadata.shared)

    def for_capability(capability):
        monkeypatch.setattr(JITFunction, "run", lambda *args, **kw: launch(*args, capability=capability, **kw))
        return programs

    return for_capability
