"""Quantizers of packages whose other modules need what is not there: torchaudio, audiotools, sentencepiece."""

import importlib
import importlib.util
import sys


def load(name, *, without):
    """Imports a module without running these of the packages that it lies in.

    The packages are to be installed without their dependencies:
    `pip install --no-deps encodec==0.1.1 descript-audio-codec==1.0.0 moshi==0.2.13`.
    """
    for package in without:
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {package!r}; {load.__doc__}")
            sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(name)


encodec = load("encodec.quantization.core_vq", without=["encodec"])
dac = load("dac.nn.quantize", without=["dac", "dac.nn"])
moshi = load("moshi.quantization.core_vq", without=["moshi"])
moshi_vq = load("moshi.quantization.vq", without=["moshi"])
