"""Builds the native triplet op; everything else about the package stands in pyproject.toml.

Two shared libraries are made, both on PyTorch's stable ABI, so that one build serves every later PyTorch:

    oneshot_C        csrc/*.cpp, links libtorch_cpu only, and so loads under CPU-only PyTorch too
    oneshot_C_cuda   csrc/*.cu, where a CUDA toolkit of PyTorch's major version is found

`triplet.py` finds them by module name and loads them with torch.ops.load_library; they are never imported.

Environment: ONESHOT_NATIVE=1 makes a missing compiler an error (otherwise the package is pure Python), ONESHOT_CUDA=0|1
leaves CUDA out or insists on it, ONESHOT_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020a000000000000"  # PyTorch 2.10, the oldest one that can load the libraries
NO_COMPILER = (
    "one-shot: no C++ compiler was found ({}), so the triplet loss will run in plain PyTorch. "
    "For the native op install a compiler (Debian: apt-get install g++) and run `pip install -e .` again."
)


def switch(name: str) -> bool | None:
    """An environment variable as True (1), False (0) or None (unset)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def compiler() -> str | None:
    """The C++ compiler that builds would use, or None."""
    return shutil.which(os.environ.get("CXX", "") or "c++") or shutil.which("g++")


def toolkit_candidates() -> list[Path]:
    """Where a CUDA toolkit may be. `nvcc` on PATH comes last: it may be a wrapper whose folder is no toolkit."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    on_path = shutil.which("nvcc")
    return [*named, *usual, *([Path(on_path).resolve().parent.parent] if on_path else [])]


def toolkit_version(home: Path) -> int | None:
    """Major version of a working toolkit (nvcc, headers and a libcudart to link), or None."""
    nvcc = home / "bin" / "nvcc"
    runtime = [*home.glob("lib*/libcudart_static.a"), *home.glob("targets/*/lib/libcudart_static.a")]
    headers = [*home.glob("include/cuda_runtime.h"), *home.glob("targets/*/include/cuda_runtime.h")]
    if not (nvcc.is_file() and runtime and headers):
        return None
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+)\.", told)
    return int(release[1]) if release else None


def find_toolkit(torch_cuda: str | None, candidates: list[Path]) -> tuple[Path | None, str]:
    """(toolkit of PyTorch's CUDA major version, "") or (None, why not)."""
    if torch_cuda is None:
        return None, "this PyTorch is built without CUDA"
    wanted = int(torch_cuda.split(".")[0])
    found = {home: toolkit_version(home) for home in candidates}
    for home, version in found.items():
        if version == wanted:
            return home, ""
    others = [f"{home} has {version}" for home, version in found.items() if version is not None]
    return None, f"no CUDA {wanted} toolkit with nvcc, headers and libcudart" + f" ({'; '.join(others)})" * bool(others)


def extensions() -> list:
    """What to build here; [] for a pure Python install."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    cuda_sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cu"))
    if compiler() is None:
        notice = NO_COMPILER.format(f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else "c++, g++")
        if switch("ONESHOT_NATIVE"):
            raise SystemExit(notice)
        print(notice, file=sys.stderr)
        return []
    import torch

    home, why_not = find_toolkit(torch.version.cuda, toolkit_candidates())
    if switch("ONESHOT_CUDA") and home is None:
        raise SystemExit(f"ONESHOT_CUDA=1, but {why_not}; set CUDA_HOME to the toolkit")
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported: its own guess trusts nvcc's folder
    from torch.utils import cpp_extension

    sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"] if switch("ONESHOT_SANITIZE") else []
    flags = [
        "-O3",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-ignored-attributes",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
        *sanitize,
    ]
    common = {"py_limited_api": True, "include_dirs": ["csrc"]}
    native = cpp_extension.CppExtension(
        "oneshot_C", sources, extra_compile_args={"cxx": flags}, extra_link_args=sanitize, **common
    )
    native.libraries = ["c10", "torch_cpu"]
    if not cuda_sources or home is None or switch("ONESHOT_CUDA") is False:
        return [native]
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = (
            "7.5;8.0;9.0;10.0;12.0+PTX" if (toolkit_version(home) or 0) >= 13 else "7.0;8.0;9.0+PTX"
        )
    nvcc = ["-O3", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA", "-cudart=static"]
    cuda = cpp_extension.CUDAExtension(
        "oneshot_C_cuda", cuda_sources, extra_compile_args={"cxx": flags, "nvcc": nvcc}, **common
    )
    cuda.libraries = ["c10", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    return [native, cuda]


def build_commands(modules: list) -> dict:
    """The build command: PyTorch's, without the Python symbols that the libraries do not use."""
    if not modules:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


if __name__ == "__main__":
    os.chdir(ROOT)
    modules = extensions()
    setup(ext_modules=modules, cmdclass=build_commands(modules))
