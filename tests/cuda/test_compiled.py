"""What the built library holds for CUDA devices. Looked at without one."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import torch

import vqkernels
from vqkernels import _C

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(source.stem for source in ROOT.glob("csrc/cuda/*.cu"))
OPS = (
    "nearest_code",
    "code_statistics",
    "ema_update_",
    "vector_quantize",
    "vector_quantize_backward",
    "residual_quantize",
    "residual_quantize_backward",
    "residual_statistics",
    "topk_codes",
)

FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, CUBIN = 1, 2


def device_images() -> list[set[tuple[int, int]]]:
    """The (kind, architecture) pairs of every fatbin in the library, by the headers that nvcc writes."""
    data = Path(_C.__file__).read_bytes()
    fatbins = []
    start = data.find(FATBIN_MAGIC)
    while start >= 0:
        header_size, size = struct.unpack_from("<HQ", data, start + 6)
        position, end, images = start + header_size, start + header_size + size, set()
        while position < end:
            kind, header_size, image_size = struct.unpack_from("<H2xIQ", data, position)
            (architecture,) = struct.unpack_from("<I", data, position + 28)
            images.add((kind, architecture))
            position += header_size + image_size
        fatbins.append(images)
        start = data.find(FATBIN_MAGIC, end)
    return fatbins


def test_every_kernel_is_compiled_for_every_architecture():
    info = vqkernels.build_info()
    expected = set()
    for name in filter(None, info["cuda_architectures"].split(";")):
        number = int(re.match(r"\d+", name.replace(".", "")).group())
        expected.add((CUBIN, number))
        if name.endswith("+PTX"):
            expected.add((PTX, number))
    assert bool(expected) == bool(info["cuda"])
    with_kernels = [images for images in device_images() if CUBIN in {kind for kind, _ in images}]
    assert with_kernels == ([expected] * len(SOURCES) if info["cuda"] else [])


def test_every_operation_has_a_cuda_kernel():
    for name in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vqkernels::{name}", "CUDA")


def test_stream_symbol_is_weak():
    """A library that needed it would not load under a torch without CUDA."""
    nm = shutil.which("nm")
    assert nm
    listing = subprocess.run([nm, "-D", _C.__file__], capture_output=True, text=True, check=True).stdout
    kinds = re.findall(r"^\s+(\w) aoti_torch_get_current_cuda_stream$", listing, re.MULTILINE)
    assert kinds == (["w"] if vqkernels.build_info()["cuda"] else [])
    assert not re.search(r" U cuda\w+$| U _ZN3c104cuda", listing, re.MULTILINE), "the CUDA runtime is linked statically"
