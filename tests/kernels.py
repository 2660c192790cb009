"""Kernels compiled for a test, called with NumPy arrays, and held against the oracle and plain PyTorch."""

import ctypes
import importlib.util
import mmap
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pybind11
import pytest
import torch

import oracle
import setup as build
import triplet
from contract import RESOLUTION, check_mined
from triplet import Settings

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("csrc", "tests/native") for path in (ROOT / folder).rglob("*.*")]
LARGE, SMALL = 1, 10**6  # processors of the device: few are filled by large tiles, for many the tiles are small


def compiled(name: str, *flags: str):
    """The module of tests/native/NAME.cpp, compiled again when a source has changed."""
    if build.compiler() is None and os.environ.get("ONESHOT_NATIVE") != "1":
        pytest.skip("no C++ compiler")
    library = ROOT / "build" / name / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in SOURCES):
        library.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        common = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", *[f"-I{path}" for path in includes]]
        command = [build.compiler() or "c++", *common, *flags, ROOT / "tests" / "native" / f"{name}.cpp", "-o", library]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Case(NamedTuple):
    """A batch and how its loss is computed, and on what device."""

    x: torch.Tensor
    labels: torch.Tensor
    others: tuple[torch.Tensor, torch.Tensor] | None
    kind: str = "cosine"
    mining: str = "hard"
    soft: bool = False
    reduction: str = "none"
    processors: int = LARGE
    tensor_cores: bool = False
    seed: int = 0
    temperature: float = 0.5

    def settings(self) -> Settings:
        return Settings(self.kind, self.mining, self.soft, 0.3, self.temperature, self.reduction)

    def rows(self) -> torch.Tensor:
        """All candidates (B + M, D), float64."""
        return torch.cat((self.x, self.others[0])).double() if self.others else self.x.double()

    def names(self) -> torch.Tensor:
        return torch.cat((self.labels, self.others[1])) if self.others else self.labels


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy() if x.dtype in (torch.bfloat16, torch.float16) else x.numpy()


def fenced(values: np.ndarray) -> np.ndarray:
    """A copy that ends where memory begins that nobody may touch: a read beyond it ends the process."""
    size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    held = np.frombuffer(pages, values.dtype, values.size, size - values.nbytes).reshape(values.shape)
    held[...] = values
    return held


def guarded(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and labels as the kernels take them."""
    rows = torch.cat((case.x, case.others[0])) if case.others else case.x
    return fenced(bits(rows.contiguous())), fenced(case.names().numpy())


def arguments_of(case: Case) -> tuple:
    """What the kernels take of a case, but for the device."""
    kind = str(case.x.dtype).removeprefix("torch.")
    return kind, *guarded(case), len(case.x), case.x.shape[1] % 4 == 0, triplet.codes_of(case.settings())


def run(module, case: Case, weights: torch.Tensor | None = None, gradient_rows: int | None = None) -> dict:
    """Loss, count, mined rows and, for these weights of the anchors' losses, gradients of the first `gradient_rows`
    candidates, by default of all (B + M, D), and how many kernels they took."""
    device = case.processors, case.tensor_cores, case.seed
    loss, losses, count, positive, negative = module.forward(*arguments_of(case), *device)
    found = dict(loss=loss[0], losses=losses, count=int(count[0]), positive=positive, negative=negative)
    assert max(positive.max(), negative.max()) < len(case.rows())
    if weights is not None:
        grad = weights.to(torch.float64 if case.x.dtype == torch.float64 else torch.float32).numpy()
        wanted = len(case.rows()) if gradient_rows is None else gradient_rows
        grads = module.backward(*arguments_of(case), *device, grad, wanted, count, positive, negative)
        if hasattr(module, "both"):  # CUDA: the backward pass may take what the forward pass saved
            again, saved, found["launches"] = module.both(*arguments_of(case), *device, grad, wanted)
            assert np.array_equal(again, losses if case.reduction == "none" else loss, equal_nan=True)
            assert np.array_equal(saved.view(np.uint8), grads.view(np.uint8))
        found["grads"] = torch.from_numpy(grads).view(case.x.dtype)
    return found


def hold_against_the_oracle(module, case: Case) -> None:
    rows, names = case.rows().tolist(), case.names().tolist()
    scale = max(1.0, max(oracle.distance(rows[0], row, case.kind) for row in rows))
    spread = (case.rows() - case.x.double().mean(0)).abs().max().item()
    slack = RESOLUTION[case.x.dtype] * (scale if case.kind == "cosine" else max(scale, case.x.shape[1] * spread**2))
    weights = torch.linspace(-1, 1, len(case.x), dtype=torch.float64)
    found = run(module, case, weights)
    given = None
    if case.mining != "all":
        given = list(zip(found["positive"].tolist(), found["negative"].tolist(), strict=True))
        check_mined(given, rows, names, case.kind, case.mining, slack)
    losses, count, gradient = oracle.triplet_loss(
        rows, names, len(case.x), case.kind, case.mining, 0.3, case.soft, case.temperature, given=given
    )
    summands = float(len(names)) ** 2 if case.mining == "all" else 1.0
    rtol = 1e-4 * (case.x.dtype != torch.float64)
    assert np.allclose(found["losses"], losses, rtol=rtol, atol=8 * slack * summands)
    assert abs(found["count"] - count) <= (0.001 * count if case.x.dtype != torch.float64 else 0)
    exact = torch.tensor(gradient(weights.tolist()), dtype=torch.float64)
    close = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}[case.x.dtype]
    error = (found["grads"].double() - exact).abs().max()
    assert error <= close * max(1.0, float(exact.abs().max())), (error, exact.abs().max())


def hold_against_torch(module, case: Case) -> None:
    """Beyond the oracle's reach: float64 by plain PyTorch. Random rows have no near-ties: the mined ones are equal."""
    weights = torch.linspace(-1, 1, len(case.x), dtype=torch.float64)
    found = run(module, case, weights)
    x = case.rows().requires_grad_()
    others = (x[len(case.x) :], case.others[1]) if case.others else None
    losses, count = triplet.losses_and_counts(x[: len(case.x)], case.labels, others, case.settings())
    if case.mining != "all":
        keywords = dict(distance=case.kind, mining=case.mining, others=others, impl="torch")
        positive, negative = triplet.mine(x[: len(case.x)], case.labels, **keywords)
        assert found["positive"].tolist() == positive.tolist()
        assert found["negative"].tolist() == negative.tolist()
    close = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}[case.x.dtype]
    losses_close = min(close, 1e-4)
    assert np.allclose(found["losses"], losses.detach().numpy(), rtol=losses_close, atol=losses_close)
    total = found["losses"].sum(dtype=float)
    if case.reduction == "none" and total < 1e38:  # beyond, it overflows
        assert found["loss"] == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert found["count"] == pytest.approx(int(count.sum()), rel=0 if case.mining != "all" else 1e-3)
    (exact,) = torch.autograd.grad(losses, x, weights)
    assert (found["grads"].double() - exact).abs().max() <= close * max(1.0, float(exact.abs().max()))
