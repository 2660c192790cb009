"""setup.py: which toolkit is taken, what the switches do, and that the built library needs libtorch_cpu alone."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import setup as build

ROOT = Path(__file__).parent.parent
MODULES = ("triplet.py", "oneshot.py", "checkpoints.py", "model.py", "pictures.py")


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


def test_cuda_is_forced_or_left_out(tmp_path, monkeypatch, capsys):
    good = toolkit(tmp_path / "good")
    monkeypatch.setattr(build, "toolkit_candidates", lambda: [good])
    monkeypatch.delenv("ONESHOT_CUDA", raising=False)
    assert build.toolkit_to_use(["csrc/a.cu"], "13.0") == good
    assert build.toolkit_to_use([], "13.0") is None and capsys.readouterr().err == ""
    assert build.toolkit_to_use(["csrc/a.cu"], "12.6") is None
    assert "the CUDA library is left out: no CUDA 12 toolkit" in capsys.readouterr().err
    monkeypatch.setenv("ONESHOT_CUDA", "0")
    assert build.toolkit_to_use(["csrc/a.cu"], "13.0") is None
    monkeypatch.setenv("ONESHOT_CUDA", "1")
    assert build.toolkit_to_use(["csrc/a.cu"], "13.0") == good
    with pytest.raises(SystemExit, match="ONESHOT_CUDA=1, but no CUDA 12 toolkit"):
        build.toolkit_to_use(["csrc/a.cu"], "12.6")
    with pytest.raises(SystemExit, match="ONESHOT_CUDA=1, but csrc has no .cu file"):
        build.toolkit_to_use([], "13.0")


def test_architectures_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.architectures(13, gpu=True) is None
    assert "7.0" not in build.architectures(13, gpu=False) and "9.0" in build.architectures(13, gpu=False)
    assert "10.0+PTX" in build.architectures(13, gpu=False)  # the PTX of 12.0 would leave out 11.0
    assert "10.0" not in build.architectures(12, gpu=False) and build.architectures(12, gpu=False).endswith("+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert build.architectures(13, gpu=False) is None


def test_the_compiler_must_work(tmp_path, monkeypatch):
    """A command that is there but compiles nothing, such as a stub, is no compiler."""
    for name, status in (("c++", 1), ("g++", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.compiler() == "g++"
    monkeypatch.setenv("CXX", "g++ -O0")
    assert build.compiler() == "g++ -O0"
    monkeypatch.setenv("CXX", "c++")
    assert build.compiler() is None
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert build.compiler() is None
    monkeypatch.setenv("CXX", 'g++ "')
    assert build.compiler() is None


def run_setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """`setup.py COMMAND` in a copy of what it needs, with no compiler on PATH."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", *MODULES):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "bin").mkdir()
    keep = {name: value for name, value in os.environ.items() if not name.startswith("ONESHOT_") and name != "CXX"}
    environment = keep | {"PATH": str(folder / "bin")} | environment
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_without_a_compiler_the_package_is_pure_python(tmp_path):
    done = run_setup(tmp_path, "build")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no working C++ compiler was found") == 1 and "apt-get install g++" in done.stderr
    assert list(tmp_path.glob("build/**/triplet.py")) and not list(tmp_path.glob("build/**/*.so"))


def test_oneshot_is_installed_as_a_package(tmp_path):
    """It works in a folder outside the checkout, without PyTorch for an .onnx file, and no module of ours is in the way
    of others' `model` or `pictures`."""
    assert run_setup(tmp_path, "build", ONESHOT_NATIVE="0").returncode == 0
    built = tmp_path / "build" / "lib"
    found = {str(path.relative_to(built)) for path in built.rglob("*.py")}
    assert found == {"triplet.py", *(f"oneshot/{name}.py" for name in ("__init__", "checkpoints", "model", "pictures"))}
    script = (
        "import sys, oneshot, numpy\n"
        "assert 'torch' not in sys.modules\n"
        "recogniser = oneshot.load(sys.argv[1])\n"
        "gallery = oneshot.Gallery(':memory:', recogniser)\n"
        "pictures = numpy.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), numpy.uint8)\n"
        "for name, picture in zip('ab', pictures): gallery.enrol(name, picture)\n"
        "second = gallery.recognise(pictures[:2], threshold=0.9)[1]\n"
        "print(second.name, 'torch' in sys.modules, 'model' in sys.modules)"
    )
    outside = {
        "cwd": tmp_path / "bin",
        "env": os.environ | {"PYTHONPATH": str(built)},
        "capture_output": True,
        "text": True,
    }
    weights = ROOT / "weights" / "classic-90-10.pt"
    subprocess.run([sys.executable, ROOT / "export.py", weights, "--out", tmp_path / "net.onnx"], check=True)
    for file, torch_needed in ((weights, True), (tmp_path / "net.onnx", False)):
        done = subprocess.run([sys.executable, "-c", script, file], **outside)
        assert done.stdout.split() == ["b", str(torch_needed), "False"], done.stderr


def test_a_missing_compiler_is_an_error_where_the_native_op_is_required(tmp_path):
    done = run_setup(tmp_path, "build", ONESHOT_NATIVE="1", CXX="/no/such/compiler")
    assert done.returncode != 0 and "CXX=/no/such/compiler" in done.stderr and "Traceback" not in done.stderr
    assert "plain PyTorch" not in done.stderr  # it does not fall back


def test_left_out_or_forced_against_each_other(tmp_path):
    pure = run_setup(tmp_path, "build", ONESHOT_NATIVE="0", PATH=os.environ["PATH"])
    assert pure.returncode == 0 and not list(tmp_path.glob("build/**/*.so")), pure.stderr
    assert "compiler" not in pure.stderr
    (tmp_path / "again").mkdir()
    both = run_setup(tmp_path / "again", "build", ONESHOT_NATIVE="0", ONESHOT_CUDA="1", PATH=os.environ["PATH"])
    assert both.returncode != 0 and "ONESHOT_NATIVE=0" in both.stderr


@pytest.mark.parametrize("command", ["build_ext --inplace", "editable_wheel"])
def test_libraries_of_an_earlier_build_do_not_stay(tmp_path, command):
    """They would be loaded all the same."""
    for name in ("oneshot_C.abi3.so", "oneshot_C_cuda.abi3.so", "another.so"):
        (tmp_path / name).touch()
    done = run_setup(tmp_path, "-q", *command.split(), ONESHOT_NATIVE="0")
    assert done.returncode == 0 and done.stderr.count("of an earlier build is removed") == 2, done.stderr
    assert [path.name for path in tmp_path.glob("*.so")] == ["another.so"]


def test_the_notice_is_printed_by_the_build_alone(tmp_path):
    """pip runs setup.py for the metadata as well."""
    assert "compiler" not in run_setup(tmp_path, "-q", "egg_info").stderr


def test_a_source_package_holds_the_headers(tmp_path):
    done = run_setup(tmp_path, "-q", "sdist", "--formats=tar")
    assert done.returncode == 0, done.stderr
    [package] = tmp_path.glob("dist/*.tar")
    names = {Path(name).name for name in tarfile.open(package).getnames()}
    assert names >= {path.name for path in (ROOT / "csrc").rglob("*") if path.is_file()}


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


def test_every_architecture_is_built_for_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.architectures(13, gpu=False) == "7.5;8.0;9.0;10.0+PTX;12.0"
    assert build.architectures(12, gpu=False) == "7.0;7.5;8.0;9.0+PTX"


def test_toolkits_that_are_not_named(tmp_path, monkeypatch):
    """CUDA_PATH names one, too; of those in /usr/local the newest comes first."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_PATH", "named")
    monkeypatch.setattr(build.Path, "glob", lambda path, pattern: [path / "cuda-12.8", path / "cuda-13.0"])
    found = [str(path) for path in build.toolkit_candidates()]
    assert found[:4] == ["named", *(f"/usr/local/{name}" for name in ("cuda", "cuda-13.0", "cuda-12.8"))]


def test_a_toolkit_with_its_headers_in_targets(tmp_path):
    home = toolkit(tmp_path / "home", headers=False)
    (tmp_path / "home/targets/x86_64-linux/include").mkdir(parents=True)
    (tmp_path / "home/targets/x86_64-linux/include/cuda_runtime.h").touch()
    assert build.toolkit_version(home) == 13


def test_pytorch_is_told_which_toolkit_and_architectures(monkeypatch, tmp_path):
    for name in ("ONESHOT_NATIVE", "ONESHOT_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.setenv(name, "")
    for name, value in (("compiler", "c++"), ("toolkit_to_use", tmp_path), ("toolkit_version", 13)):
        monkeypatch.setattr(build, name, lambda *_, value=value: value)
    for name in ("native_extension", "cuda_extension"):
        monkeypatch.setattr(build, name, lambda *_, name=name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build.extensions() == ["native_extension", "cuda_extension"]
    assert build.os.environ["CUDA_HOME"] == str(tmp_path) and build.os.environ["CXX"] == "c++"
    assert build.os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;9.0;10.0+PTX;12.0"


def test_a_build_elsewhere_leaves_the_checkouts_libraries(monkeypatch, tmp_path):
    removed = []
    monkeypatch.setattr(build, "remove_others", lambda command, folder: removed.append(folder))
    base = type("Base", (), {"run": lambda self: None, "build_lib": str(tmp_path), "inplace": False})
    build.build_command(base)().run()
    base.inplace = True
    build.build_command(base)().run()
    assert removed == [tmp_path, build.ROOT]
