"""Triton kernels run on CUDA, or interpreted on CPU, in a process of their own (test_interpreter.py)."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# What is interpreted can neither be compiled nor run on a GPU.
collect_ignore = ["test_compile.py", "test_on_gpu.py"] if INTERPRETED else []


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param
