"""The CUDA kernels, compiled by g++ and run on the CPU by tests/simt.h, against the oracle and the torch code."""

import importlib.util
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
import triplet_torch
from test_triplet import MININGS, RESOLUTION, TYPES, batch, check_mined
from triplet import DISTANCES, Settings

ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / "csrc").glob("triplet*"), ROOT / "tests" / "emulation.cpp", ROOT / "tests" / "simt.h"]
LARGE, SMALL = 1, 10**6  # processors of the device: few are filled by large tiles, for many the tiles are small


def compiled(name: str, sources: list[Path], *flags: str):
    """The module of tests/NAME.cpp, compiled anew where its sources have changed."""
    if build.compiler() is None and os.environ.get("ONESHOT_NATIVE") != "1":
        pytest.skip("no C++ compiler")
    library = ROOT / "build" / name / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        library.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", ROOT / "tests", pybind11.get_include(), sysconfig.get_path("include")]
        common = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", *[f"-I{path}" for path in includes]]
        command = [build.compiler() or "c++", *common, *flags, ROOT / "tests" / f"{name}.cpp", "-o", library]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulation():
    """The emulated kernels."""
    return compiled("emulation", SOURCES, "-O1", "-U_FORTIFY_SOURCE")


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

    def settings(self) -> Settings:
        return Settings(self.kind, self.mining, self.soft, 0.3, 0.5, self.reduction)

    def rows(self) -> torch.Tensor:
        """All candidates (B + M, D), float64."""
        return torch.cat((self.x, self.others[0])).double() if self.others else self.x.double()

    def names(self) -> torch.Tensor:
        return torch.cat((self.labels, self.others[1])) if self.others else self.labels


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy() if x.dtype in (torch.bfloat16, torch.float16) else x.numpy()


def guarded(case: Case) -> list[np.ndarray]:
    """The kernel's arrays. Behind the rows stand copies of them in classes of their own: whoever reads beyond an end
    finds a nearer negative there."""
    arrays = []
    for rows, labels in ((case.x, case.labels), case.others or (case.x[:0], case.labels[:0])):
        n = len(rows)
        held = torch.cat((rows, case.x)).contiguous()
        names = torch.cat((labels, case.labels.max() + 1 + torch.arange(len(case.x))))
        arrays += [bits(held)[:n], names.numpy()[:n]]
    return arrays


def run(emulation, case: Case, weights: torch.Tensor | None = None) -> dict:
    """Loss, count, mined rows and, for these weights of the anchors' losses, gradients (B + M, D)."""
    kind = str(case.x.dtype).removeprefix("torch.")
    arrays = guarded(case)
    vectors = case.x.shape[1] % 4 == 0
    codes = triplet.codes_of(case.settings())
    arguments = (kind, *arrays, vectors, codes)
    loss, losses, count, positive, negative = emulation.forward(
        *arguments, case.processors, case.tensor_cores, case.seed
    )
    found = dict(loss=loss[0], losses=losses, count=int(count[0]), positive=positive, negative=negative)
    assert max(positive.max(), negative.max()) < len(case.rows())
    if weights is not None:
        grad = weights.to(torch.float64 if case.x.dtype == torch.float64 else torch.float32).numpy()
        grads = emulation.backward(*arguments, case.seed, grad, count, positive, negative)
        found["grads"] = torch.cat([torch.from_numpy(g).view(case.x.dtype) for g in grads])
    return found


def hold_against_the_oracle(emulation, case: Case) -> None:
    rows, names = case.rows().tolist(), case.names().tolist()
    scale = max(1.0, max(oracle.distance(rows[0], row, case.kind) for row in rows))
    spread = (case.rows() - case.x.double().mean(0)).abs().max().item()
    slack = RESOLUTION[case.x.dtype] * (scale if case.kind == "cosine" else max(scale, case.x.shape[1] * spread**2))
    weights = torch.linspace(-1, 1, len(case.x), dtype=torch.float64)
    found = run(emulation, case, weights)
    given = None
    if case.mining != "all":
        given = list(zip(found["positive"].tolist(), found["negative"].tolist(), strict=True))
        check_mined(given, rows, names, case.kind, case.mining, slack)
    losses, count, gradient = oracle.triplet_loss(
        rows, names, len(case.x), case.kind, case.mining, 0.3, case.soft, 0.5, given=given
    )
    summands = float(len(names)) ** 2 if case.mining == "all" else 1.0
    rtol = 1e-4 * (case.x.dtype != torch.float64)
    assert np.allclose(found["losses"], losses, rtol=rtol, atol=8 * slack * summands)
    assert abs(found["count"] - count) <= (0.001 * count if case.x.dtype != torch.float64 else 0)
    exact = torch.tensor(gradient(weights.tolist()), dtype=torch.float64)
    close = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}[case.x.dtype]
    error = (found["grads"].double() - exact).abs().max()
    assert error <= close * max(1.0, float(exact.abs().max())), (error, exact.abs().max())


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_agrees_with_the_oracle(emulation, kind, mining, dtype):
    for rows, width, others, soft, processors in (
        (1, 5, 0, False, LARGE),
        (2, 4, 3, True, LARGE),
        (7, 5, 0, True, SMALL),
        (7, 1, 5, False, SMALL),
        (33, 8, 0, False, SMALL),
        (20, 3, 9, True, LARGE),
    ):
        made = batch(rows, width=width, dtype=dtype, others=others)
        hold_against_the_oracle(emulation, Case(*made, kind, mining, soft, processors=processors))


def hold_against_torch(emulation, case: Case) -> None:
    """Beyond the oracle's reach: float64 by plain PyTorch. Random rows have no near-ties: the mined ones are equal."""
    weights = torch.linspace(-1, 1, len(case.x), dtype=torch.float64)
    found = run(emulation, case, weights)
    x = case.rows().requires_grad_()
    others = (x[len(case.x) :], case.others[1]) if case.others else None
    losses, count = triplet_torch.losses_and_counts(x[: len(case.x)], case.labels, others, case.settings())
    if case.mining != "all":
        with torch.no_grad():
            positive, negative = triplet_torch.mine(x[: len(case.x)], case.labels, others, case.settings())
        assert found["positive"].tolist() == positive.tolist()
        assert found["negative"].tolist() == negative.tolist()
    close = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}[case.x.dtype]
    losses_close = min(close, 1e-4)
    assert np.allclose(found["losses"], losses.detach().numpy(), rtol=losses_close, atol=losses_close)
    assert found["count"] == pytest.approx(int(count.sum()), rel=0 if case.mining != "all" else 1e-3)
    (exact,) = torch.autograd.grad(losses, x, weights)
    assert (found["grads"].double() - exact).abs().max() <= close * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize(
    ("rows", "width", "others", "processors"),
    [(65, 16, 0, SMALL), (130, 19, 70, SMALL), (130, 36, 140, LARGE), (257, 8, 0, LARGE)],
)
def test_several_tiles(emulation, kind, mining, rows, width, others, processors):
    """Edges of tiles of 64 and of 128, own and others', with and without vector loads."""
    made = batch(rows, width=width, dtype=torch.float32, others=others)
    made[1][-1] = -1  # an anchor without a positive
    hold_against_torch(emulation, Case(*made, kind, mining, processors=processors, seed=rows))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", ("hard", "semihard"))
def test_several_tiles_in_double_precision(emulation, kind, mining):
    hold_against_torch(emulation, Case(*batch(130, width=19, others=70), kind, mining))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize(("rows", "width", "others"), [(2, 5, 1), (130, 40, 0), (130, 51, 140)])
def test_tensor_cores(emulation, dtype, mining, rows, width, others):
    made = batch(rows, width=width, dtype=dtype, others=others)
    made[1][-1] = -1  # an anchor without a positive
    hold_against_torch(emulation, Case(*made, "cosine", mining, tensor_cores=True))


@pytest.mark.parametrize(("dtype", "factors"), [(torch.bfloat16, (1e30, 1e-30, 1)), (torch.float16, (200, 1e-3, 1))])
def test_lengths_of_rows_on_tensor_cores(emulation, dtype, factors):
    """Products of such values leave float32; the cosine does not depend on them."""
    x, labels, _ = batch(40, width=16, dtype=torch.float32)
    x = (x * torch.tensor(factors).repeat(14)[:40, None]).to(dtype)
    x[5] = 0
    hold_against_torch(emulation, Case(x, labels, None, tensor_cores=True))


def test_all_triplets_beyond_a_blocks_memory(emulation):
    """More positives than a block holds at a time, and more anchors than are weighed at a time."""
    x, _, _ = batch(700, width=4)
    labels = torch.arange(700)
    labels[90:690:2] = labels[2] = -1
    others = (x[3:], labels[3:])
    hold_against_torch(emulation, Case(x[:3], labels[:3], others, "euclidean", "all"))
    labels = torch.arange(520)
    labels[508:516] = 7
    for kind in DISTANCES:
        hold_against_torch(emulation, Case(x[:520], labels, None, kind, "all", soft=True))


@pytest.mark.parametrize("processors", [LARGE, SMALL])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties_go_to_the_lowest_row(emulation, dtype, processors):
    """Rows on a grid: distances are exact, many are equal, and rows have copies."""
    x = torch.tensor([[i % 3, i // 3 % 2, i % 5 // 2] for i in range(150)]).to(dtype)
    labels = torch.arange(150) * 7 % 11
    for mining in ("hard", "semihard"):
        found = run(emulation, Case(x, labels, None, "sqeuclidean", mining, processors=processors))
        rows, names = x.tolist(), labels.tolist()
        for a in range(0, 150, 7):
            d = [oracle.distance(rows[a], row, "sqeuclidean") for row in rows]
            p = [j for j in range(150) if names[j] == names[a] and j != a]
            n = [j for j in range(150) if names[j] != names[a]]
            assert (found["positive"][a], found["negative"][a]) == oracle.mine(d, p, n, mining)


@pytest.mark.parametrize("kind", DISTANCES)
def test_equal_rows(emulation, kind):
    """The lowest row is the choice of all: one row's list holds nearly every pair."""
    case = Case(torch.ones(150, 7), torch.arange(150) % 2, None, kind)
    found = run(emulation, case, torch.ones(150))
    assert found["positive"].tolist() == [2, 3] + [0, 1] * 74 and found["negative"].tolist() == [1, 0] * 75
    assert np.allclose(found["losses"], 0.3) and found["grads"].abs().max() < 1e-5


@pytest.mark.parametrize("mining", ("hard", "semihard"))
@pytest.mark.parametrize("kind", ("euclidean", "sqeuclidean"))
def test_rows_far_from_the_origin(emulation, kind, mining):
    """Values on a grid of 1/64 stay exact under the offset."""
    x = torch.randint(-128, 129, (70, 16), generator=torch.Generator().manual_seed(0)) / 64
    labels = torch.arange(70) % 9
    near, far = (run(emulation, Case(x + by, labels, None, kind, mining)) for by in (0, 1000))
    assert all((near[rows] == far[rows]).all() for rows in ("positive", "negative"))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("factor", [2.0**60, 2.0**-30])
def test_magnitudes(emulation, kind, factor):
    """The order survives where float32 cannot hold the squares: powers of two change no digit."""
    x, labels, others = batch(40, width=16, dtype=torch.float32, others=9)
    case = Case(x, labels, others, kind, "semihard")
    scaled = case._replace(x=x * factor, others=(others[0] * factor, others[1]))
    near, far = run(emulation, case), run(emulation, scaled)
    assert all((near[rows] == far[rows]).all() for rows in ("positive", "negative"))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
def test_zero_rows_and_lone_anchors(emulation, kind, mining):
    x, labels, _ = batch(17)
    x[3] = x[8] = x[9] = 0
    labels[9], labels[16] = 77, 78
    hold_against_the_oracle(emulation, Case(x, labels, None, kind, mining))


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("labels", [[3] * 9, list(range(9)), [-(2**62), 2**62, 0] * 3])
def test_label_patterns(emulation, mining, labels):
    hold_against_the_oracle(emulation, Case(batch(9)[0], torch.tensor(labels), None, "euclidean", mining))


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_rows_give_nan(emulation, mining, value):
    for kind, where in ((kind, where) for kind in DISTANCES for where in (0, 1)):
        x, labels, others = batch(12, others=5, dtype=torch.float32)
        (x, others[0])[where][4, 2] = value
        for names in (labels, labels * 0):
            found = run(emulation, Case(x, names, others, kind, mining, reduction="none"), torch.ones(12))
            assert np.isnan(found["losses"]).all() and np.isnan(found["loss"]) and found["grads"].isnan().all()
            assert found["count"] == -1 and (found["positive"] == -1).all()


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_reductions(emulation, mining, reduction):
    case = Case(*batch(40, dtype=torch.float32, others=7), mining=mining)
    each = run(emulation, case, torch.full((40,), 0.7))
    whole = run(emulation, case._replace(reduction=reduction), torch.tensor(0.7))
    divisor = each["count"] if reduction == "mean" else 1
    assert whole["loss"] == pytest.approx(each["losses"].sum() / divisor, rel=1e-5)
    assert torch.allclose(whole["grads"], each["grads"] / divisor, atol=1e-6)


@pytest.mark.parametrize("mining", MININGS)
def test_any_order_of_blocks_and_threads_gives_the_same_bits(emulation, mining):
    case = Case(*batch(70, width=9, classes=9, dtype=torch.float32, others=9), "euclidean", mining)
    runs = [run(emulation, case._replace(seed=seed), torch.linspace(-1, 1, 70)) for seed in (1, 1000, 2000)]
    for again in runs[1:]:
        assert all(np.array_equal(runs[0][name], again[name]) for name in again)


FAULTS = {
    1: "diverge",  # a thread returns before a barrier
    2: "read before it is written",
    3: "256 of 256",
    4: "read beside a write|read before it is written|write beside a read",
    5: "write beside a read|read beside a write",
    6: "diverge",  # half of the lanes shuffle
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_the_emulation_finds_faults(emulation, fault, message):
    assert emulation.toy(0, 1) == [255 - (t ^ 1) for t in range(256)]
    for seed in range(3):
        with pytest.raises(RuntimeError, match=message):
            emulation.toy(fault, seed)
    assert emulation.toy(0, 2) == [255 - (t ^ 1) for t in range(256)]  # and is sound afterwards
