"""setup.py: which toolkit is taken, what the switches do, and that the built library needs libtorch_cpu alone."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import setup as build

ROOT = Path(__file__).parent.parent


def toolkit(home: Path, version: str = "13.0", nvcc=True, headers=True, runtime=True) -> Path:
    """A folder that looks like a CUDA toolkit."""
    for present, name in (
        (headers, "include/cuda_runtime.h"),
        (runtime, "lib64/libcudart_static.a"),
        (nvcc, "bin/nvcc"),
    ):
        if present:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
            (home / name).chmod(0o755)
    home.mkdir(exist_ok=True)
    return home


def test_the_toolkit_of_pytorchs_version_is_taken(tmp_path):
    wrapper = toolkit(tmp_path / "wrapper", headers=False, runtime=False)
    headless = toolkit(tmp_path / "no headers", headers=False)
    static_only = toolkit(tmp_path / "no runtime", runtime=False)
    old = toolkit(tmp_path / "old", version="12.8")
    good = toolkit(tmp_path / "good")
    candidates = [tmp_path / "absent", wrapper, headless, static_only, old, good]
    assert build.find_toolkit("13.0", candidates) == (good, "")
    assert build.find_toolkit("12.6", candidates) == (old, "")
    home, why_not = build.find_toolkit("13.0", candidates[:-1])
    assert home is None and "no CUDA 13 toolkit" in why_not and "old has 12" in why_not
    assert build.find_toolkit(None, candidates) == (None, "this PyTorch is built without CUDA")


def test_named_toolkits_come_before_the_nvcc_on_path(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    monkeypatch.setenv("PATH", str(toolkit(tmp_path / "on path") / "bin"))
    candidates = build.toolkit_candidates()
    assert candidates[0] == tmp_path / "named" and candidates[-1] == tmp_path / "on path"
    assert Path("/usr/local/cuda") in candidates


@pytest.mark.parametrize(("value", "meaning"), [("", None), ("0", False), ("1", True)])
def test_switches(monkeypatch, value, meaning):
    monkeypatch.setenv("ONESHOT_NATIVE", value)
    assert build.switch("ONESHOT_NATIVE") is meaning


def test_wrong_switch_is_refused(monkeypatch):
    monkeypatch.setenv("ONESHOT_CUDA", "yes")
    with pytest.raises(SystemExit, match="ONESHOT_CUDA must be 0 or 1, got 'yes'"):
        build.switch("ONESHOT_CUDA")


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """`setup.py build` in a copy of what it needs, with no compiler on PATH."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "triplet.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "bin").mkdir()
    keep = {name: value for name, value in os.environ.items() if not name.startswith("ONESHOT_") and name != "CXX"}
    environment = keep | {"PATH": str(folder / "bin")} | environment
    command = [sys.executable, "setup.py", "build"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_package_is_pure_python(tmp_path):
    done = run_setup(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no C++ compiler was found") == 1 and "apt-get install g++" in done.stderr
    assert list(tmp_path.glob("build/**/triplet.py")) and not list(tmp_path.glob("build/**/*.so"))


def test_a_missing_compiler_is_an_error_where_the_native_op_is_required(tmp_path):
    done = run_setup(tmp_path, ONESHOT_NATIVE="1", CXX="/no/such/compiler")
    assert done.returncode != 0 and "CXX=/no/such/compiler" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("oneshot_C") is None and os.environ.get("ONESHOT_NATIVE") != "1",
    reason="pure Python install",
)
def test_the_library_links_libtorch_cpu_and_neither_python_nor_cuda():
    library = Path(importlib.util.find_spec("oneshot_C").origin).read_bytes()
    needed = set(re.findall(rb"lib(?:torch|c10|cuda|python)[\w.]*", library))
    assert b"libtorch_cpu.so" in needed
    assert not [
        name for name in needed if re.match(rb"lib(torch_python|torch_cuda|c10_cuda|cuda|python|torch\.so)", name)
    ]
