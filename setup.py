"""Builds the shared object vqkernels/_C with ninja: C++ always, CUDA whenever nvcc is found.

Environment variables:
    CUDA_HOME, CUDA_PATH    where the CUDA toolkit is; else nvcc on PATH, else /usr/local/cuda
    TORCH_CUDA_ARCH_LIST    architectures by number ("8.0;9.0a;10.0+PTX", the default)
    MAX_JOBS                compile jobs at a time
    VQKERNELS_CPU_ONLY=1    leave the CUDA kernels out
    CXX                     the C++ compiler (default c++, then g++, then clang++)
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX"

# Nothing may contract a * b + c behind our back: the contract says where an fma stands.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    # GCC 12 reports its own AVX-512 headers (GCC bug 105593).
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",
    # Vectors wider than the instruction set's are passed to functions that are always inlined.
    "-Wno-psabi",
]
CAPABILITY_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
CAPABILITY_FLAGS["avx512"] = [
    *CAPABILITY_FLAGS["avx2"],
    *["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"],
]
# Where there are vectors, the scalar kernels are the specification and not what runs for speed. Left to the compiler,
# inlining takes a third of the time to compile.
SCALAR_FLAGS = ["-O2", "-DVQKERNELS_LANES_INLINE=inline"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "1"]


def find_compiler() -> str:
    for name in filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise RuntimeError(
        "vqkernels is compiled at installation and found no C++ compiler. Install one (Debian and Ubuntu: "
        "apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) or set CXX."
    )


def find_nvcc() -> Path | None:
    if os.environ.get("VQKERNELS_CPU_ONLY", "0") not in ("", "0"):
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in candidates if path.exists()), None)


def cuda_home(nvcc: Path) -> Path:
    """The toolkit that nvcc itself uses: nvcc on PATH may be a link or a wrapper."""
    listing = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"#\$ TOP=(\S+)", listing)
    return Path(top.group(1)).resolve() if top else nvcc.resolve().parent.parent


def nvcc_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def architecture_flags(version: str) -> tuple[list[str], str]:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = (wanted or DEFAULT_ARCHITECTURES).replace(" ", ";")
    if not wanted and tuple(map(int, version.split("."))) < (12, 8):
        names = "8.0;9.0a;9.0+PTX"  # older toolkits do not know 10.0
    flags = []
    for name in filter(None, names.split(";")):
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name):
            raise RuntimeError(f'TORCH_CUDA_ARCH_LIST: expected entries like "9.0a" or "10.0+PTX", got "{name}"')
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, names


def write_build_config(path: Path, **values: str) -> None:
    """A header with one string macro a value. Kept as it is where nothing changed, so that ninja sees no change."""
    text = "".join(f"#define VQKERNELS_{name.upper()} {json.dumps(value)}\n" for name, value in values.items())
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class NinjaBuild(build_ext):
    """Writes build.ninja, in which every file has the flags of its instruction set, and runs ninja."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11
        import torch
        from ninja import ninja_syntax

        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        compiler = find_compiler()
        version_line = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout
        nvcc = find_nvcc()
        cuda_version = nvcc_version(nvcc) if nvcc else ""
        arch_flags, arch_names = architecture_flags(cuda_version) if nvcc else ([], "")
        torch_root = Path(torch.__file__).resolve().parent
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")

        includes = [torch_root / "include", sysconfig.get_path("include"), pybind11.get_include()]
        common = [f"-isystem{path}" for path in includes] + ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
        common += [f"-I{build_dir}"]
        common += ["-DVQKERNELS_X86"] if is_x86 else []
        common += ["-DVQKERNELS_CUDA"] if nvcc else []
        if nvcc:
            common += [f"-isystem{cuda_home(nvcc) / 'include'}"]
        write_build_config(
            build_dir / "build_config.h",
            compiler=version_line.splitlines()[0] if version_line else compiler,
            torch_version=torch.__version__,
            cuda_version=cuda_version,
            cuda_architectures=arch_names,
        )

        path = build_dir / "build.ninja"
        with path.open("w") as file:
            n = ninja_syntax.Writer(file, width=10000)
            n.variable("cxx", compiler)
            n.variable("nvcc", shlex.quote(str(nvcc)))
            n.rule("cxx", "$cxx -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("nvcc", "$nvcc -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("link", "$cxx -shared $in -o $out $flags")
            objects = []
            sources = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])
            for source in sources:
                level = next((name for name in CAPABILITY_FLAGS if source.stem.endswith(f"_{name}")), None)
                if level and not is_x86:
                    continue
                flags = [*CXX_FLAGS, *common, *CAPABILITY_FLAGS.get(level, [])]
                flags += SCALAR_FLAGS if is_x86 and source.stem.endswith("_scalar") else []
                out = build_dir / source.relative_to(CSRC).with_suffix(".o")
                n.build(str(out), "cxx", str(source), variables={"flags": shlex.join(flags)})
                objects.append(str(out))
            for source in sorted(CSRC.glob("cuda/*.cu")) if nvcc else []:
                out = build_dir / source.relative_to(CSRC).with_suffix(".cu.o")
                flags = [*NVCC_FLAGS, *arch_flags, "-ccbin", shlex.split(compiler)[-1]]
                n.build(str(out), "nvcc", str(source), variables={"flags": shlex.join(flags)})
                objects.append(str(out))
            # libtorch brings libtorch_cuda into scope where torch has it.
            link = [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
            if sys.platform == "darwin":
                link = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-undefined", "dynamic_lookup"]
            if nvcc:
                libraries = [cuda_home(nvcc) / part for part in ("lib64", "targets/x86_64-linux/lib")]
                link += [f"-L{path}" for path in libraries] + ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            n.build(str(target), "link", objects, variables={"flags": shlex.join(link)})

        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("vqkernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
    # With setuptools' default, a folder that holds the source tree under its own name would hide an editable install.
    options={"editable_wheel": {"mode": "compat"}},
)
