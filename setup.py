"""Builds the native triplet op; everything else about the package stands in pyproject.toml.

Two shared libraries are made, both on PyTorch's stable ABI, so that one build serves every later PyTorch:

    oneshot_C        csrc/ops.cpp and csrc/cpu, links libtorch_cpu only, and so loads under CPU-only PyTorch too
    oneshot_C_cuda   csrc/cuda, where a CUDA toolkit of PyTorch's major version is found

`triplet.py` finds them by module name (importlib.util.find_spec, the same for editable and regular installs) and loads
them with torch.ops.load_library; they are never imported. To rebuild in place: `python setup.py build_ext --inplace`.

Environment, each 0, 1 or unset:

    ONESHOT_NATIVE    1: a missing compiler is an error (unset: a notice, and pure Python); 0: pure Python
    ONESHOT_CUDA      1: a missing toolkit is an error; 0: no oneshot_C_cuda
    ONESHOT_SANITIZE  1: oneshot_C with AddressSanitizer and UndefinedBehaviorSanitizer

CXX, CUDA_HOME and TORCH_CUDA_ARCH_LIST mean what they mean to PyTorch.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10, the oldest one that can load the libraries
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-ignored-attributes", "-Wno-psabi"]
NO_COMPILER = (
    "one-shot: no working C++ compiler was found ({}){}. "
    "For the native op install a compiler (Debian: apt-get install g++) and run `pip install -e .` again."
)


def switch(name: str) -> bool | None:
    """An environment variable as True (1), False (0) or None (unset)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def tell(notice: str) -> None:
    """Print once: pip also runs this file for the metadata, before it builds."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(notice, file=sys.stderr)


def compiler() -> str | None:
    """The C++ compiler to build with: the first that works, its standard library included. CXX is the only candidate
    where it is set."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        try:
            check = [*shlex.split(command), "-x", "c++", "-fsyntax-only", "-"]
            works = subprocess.run(check, input="#include <vector>\n", capture_output=True, text=True).returncode == 0
        except (OSError, ValueError):  # no such program; an open quote
            works = False
        if works:
            return command
    return None


def toolkit_candidates() -> list[Path]:
    """Where a CUDA toolkit may be. `nvcc` on PATH comes last: it may be a wrapper outside a toolkit."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    on_path = shutil.which("nvcc")
    return [*named, *usual, *([Path(on_path).resolve().parent.parent] if on_path else [])]


def runtimes(home: Path) -> list[Path]:
    """A toolkit's static runtime libraries."""
    return [*home.glob("lib*/libcudart_static.a"), *home.glob("targets/*/lib/libcudart_static.a")]


def toolkit_version(home: Path) -> int | None:
    """Major version of a working toolkit (nvcc, headers and a libcudart to link), or None."""
    nvcc = home / "bin" / "nvcc"
    headers = [*home.glob("include/cuda_runtime.h"), *home.glob("targets/*/include/cuda_runtime.h")]
    if not (nvcc.is_file() and runtimes(home) and headers):
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


def toolkit_to_use(sources: list[str], torch_cuda: str | None) -> Path | None:
    """The toolkit to build oneshot_C_cuda with, None to leave it out. SystemExit where ONESHOT_CUDA=1 cannot be met."""
    wanted = switch("ONESHOT_CUDA")
    if wanted is False or not (sources or wanted):
        return None
    home, why_not = find_toolkit(torch_cuda, toolkit_candidates()) if sources else (None, "csrc has no .cu file")
    if home is None and wanted:
        raise SystemExit(f"one-shot: ONESHOT_CUDA=1, but {why_not} (CUDA_HOME names the toolkit's folder)")
    if home is None:
        tell(f"one-shot: the CUDA library is left out: {why_not}")
    return home


def architectures(toolkit: int, gpu: bool) -> str | None:
    """Value for TORCH_CUDA_ARCH_LIST; None leaves it to PyTorch, whose guess needs a GPU. Without one: those that a
    toolkit of this major version compiles for (13 dropped Volta), and PTX for 11.0 and later GPUs."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or gpu:
        return None
    return "7.5;8.0;9.0;10.0+PTX;12.0" if toolkit >= 13 else "7.0;7.5;8.0;9.0+PTX"


def sources_of(*suffixes: str) -> list[str]:
    """Files in csrc and its folders, relative to this one."""
    files = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    return sorted(str(path.relative_to(ROOT)) for path in files)


def extension(kind: type[Extension], name: str, suffix: str, libraries: list[str], **more) -> Extension:
    """An extension of the files in csrc with this suffix; of PyTorch's libraries it links the given ones only."""
    headers, include = sources_of(".h", ".inc", ".cuh"), [str(ROOT / "csrc")]
    made = kind(name, sources_of(suffix), depends=headers, include_dirs=include, py_limited_api=True, **more)
    made.libraries = libraries
    return made


def native_extension() -> Extension:
    """oneshot_C."""
    from torch.utils.cpp_extension import CppExtension

    sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"] if switch("ONESHOT_SANITIZE") else []
    level = "-O1" if sanitize else "-O3"  # the sanitizers' checks take the compiler many minutes at -O3
    flags = [level, "-fno-math-errno", "-fvisibility=hidden", *WARNINGS, TARGET, *sanitize]
    more = {"extra_compile_args": {"cxx": flags}, "extra_link_args": sanitize}
    return extension(CppExtension, "oneshot_C", ".cpp", ["torch_cpu"], **more)


def cuda_extension(home: Path) -> Extension:
    """oneshot_C_cuda, with its own CUDA runtime in it."""
    from torch.utils.cpp_extension import CUDAExtension

    flags = {"cxx": ["-O3", TARGET], "nvcc": ["-O3", TARGET, "-DUSE_CUDA"]}
    libraries = ["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    more = {"extra_compile_args": flags, "library_dirs": [str(runtimes(home)[0].parent)]}
    return extension(CUDAExtension, "oneshot_C_cuda", ".cu", libraries, **more)


def extensions() -> list[Extension]:
    """What to build here; [] for a pure Python install."""
    wanted = switch("ONESHOT_NATIVE")
    command = None if wanted is False else compiler()
    if command is None:
        tried = f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else "c++, g++, clang++"
        required = wanted or switch("ONESHOT_CUDA")
        instead = "" if required else ", so the triplet loss will run in plain PyTorch"
        notice = "one-shot: ONESHOT_NATIVE=0, pure Python" if wanted is False else NO_COMPILER.format(tried, instead)
        if required:
            raise SystemExit(notice)
        tell(notice)
        return []
    os.environ["CXX"] = command  # PyTorch and setuptools have different defaults
    import torch

    home = toolkit_to_use(sources_of(".cu"), torch.version.cuda)
    if home is None:
        return [native_extension()]
    os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported: its own guess trusts nvcc's folder
    names = architectures(toolkit_version(home) or 0, torch.cuda.is_available())
    if names:
        os.environ["TORCH_CUDA_ARCH_LIST"] = names
    return [native_extension(), cuda_extension(home)]


class BuildPackage(build_py):
    """oneshot.py is installed as a package, with the three modules it needs inside; in the checkout all are flat."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # without an extension build_ext does not run
            remove_others(self, ROOT)

    def find_modules(self) -> list[tuple[str, str, str]]:
        found = super().find_modules()
        if self.editable_mode:
            return found
        inside = {"oneshot": "__init__"} | {name: name for name in ("checkpoints", "model", "pictures")}
        return [("oneshot", inside[name], file) if name in inside else ("", name, file) for _, name, file in found]


def build_command(base: type[Command]) -> type[Command]:
    """build_ext, which leaves no library of an earlier build that this one does not make."""

    class Build(base):
        def run(self) -> None:
            super().run()
            remove_others(self, ROOT if self.inplace else Path(self.build_lib))

    return Build


def remove_others(command: Command, folder: Path) -> None:
    """Remove the libraries in a folder that are not built here: they would be loaded, or packed, all the same."""
    built = {each.name for each in command.distribution.ext_modules or ()}
    for path in folder.glob("oneshot_C*"):
        if path.suffix in (".so", ".pyd") and path.name.split(".")[0] not in built:
            tell(f"one-shot: {path.name} of an earlier build is removed")
            path.unlink()


def main() -> None:
    os.chdir(ROOT)
    modules = extensions()
    commands, options = {"build_py": BuildPackage, "build_ext": build_command(build_ext)}, {}
    if modules:
        from torch.utils.cpp_extension import BuildExtension

        commands["build_ext"] = build_command(BuildExtension)
        options["bdist_wheel"] = {"py_limited_api": "cp310"}  # they use none of Python's ABI: for every later Python
    setup(ext_modules=modules, cmdclass=commands, options=options)


if __name__ == "__main__":
    main()
