"""Speed and memory of the fused triplet op on the CPU, compared with other ways to compute the same loss.

    python benchmarks/bench_triplet.py                     # the whole table: about 7 minutes, on an idle machine
    python benchmarks/bench_triplet.py --quick             # a few sizes, about a minute
    python benchmarks/bench_triplet.py --json results/bench_cpu.json --plot docs/bench_cpu.png
    python benchmarks/bench_triplet.py --bfloat16 --json results/bench_cpu_bfloat16.json  # what AVX512-BF16 is worth

Each contender is checked against the float64 reference first, loss and gradient. Then all of them run in one process,
turn by turn. A turn is one call, timed as "cold" (the caches hold the previous contender's data), and then as many as
fit 10 ms, of which the mean counts; the median of the turns is shown. Peak memory is taken in a fresh process for each
contender.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import triplet  # noqa: E402
from triplet import triplet_loss  # noqa: E402

TURN = 0.01  # seconds of a contender's turn, at least one call
PER_CLASS = 8  # images a class
MARGIN = 0.3
PEER_MEMORY = 6e9  # bytes: contenders that hold (B, B) matrices stop where ten of them would need more
TRIPLETS = 3e7  # where triplets are listed one by one, contenders stop here


@dataclass(frozen=True)
class Options:
    quick: bool = False  # fewer sizes and turns
    bfloat16: bool = False  # only cosine on bfloat16 rows, with and without the processor's products of bfloat16 pairs
    threads: int = 2  # threads of each contender
    seconds: float = 0.6  # time for each contender at each size, at least 3 turns
    json: str | None = None  # write the figures to this file
    plot: str | None = None  # draw time against batch size into this file (PNG)
    memory_of: str | None = None  # internal: "contender B D mining", print the growth of peak memory in MB
    serve: str | None = None  # internal: "B D mining", print milliseconds of bfloat16 calls for each line of input


@dataclass(frozen=True)
class Case:
    """One row of the table. Euclidean distances: the only ones that all contenders define alike."""

    rows: int
    width: int
    mining: str = "hard"
    soft_margin: bool = False

    def batch(self) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and labels (B,), `PER_CLASS` rows a class."""
        x = torch.randn(self.rows, self.width, generator=torch.Generator().manual_seed(0))
        return x, torch.arange(self.rows) // PER_CLASS

    @property
    def triplets(self) -> int:
        return self.rows * (PER_CLASS - 1) * (self.rows - PER_CLASS)


CASES = [
    *(Case(rows, 64) for rows in (32, 128, 384, 1024, 4096)),
    *(Case(rows, 128) for rows in (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    *(Case(rows, 512) for rows in (128, 1024, 4096)),
    *(Case(rows, width, "semihard") for rows, width in ((128, 64), (1024, 128))),
    *(Case(rows, width, "all", soft) for soft in (False, True) for rows, width in ((128, 64), (1024, 128))),
]
QUICK = [Case(128, 64), Case(1024, 128), Case(4096, 128), Case(128, 64, "semihard"), Case(128, 64, "all", True)]

BFLOAT16 = [(128, 64), (1024, 128), (4096, 128), (4096, 512), (8192, 128)]

Loss = Callable[[Tensor, Tensor], Tensor]


def contenders(case: Case) -> dict[str, Loss]:
    """Functions (embeddings, labels) -> loss. "product" is no loss, only the bare matrix product."""

    def ours(impl: str) -> Loss:
        keywords = dict(distance="euclidean", mining=case.mining, soft_margin=case.soft_margin, impl=impl)
        return lambda x, labels: triplet_loss(x, labels, MARGIN, **keywords)

    found = {"native": ours("native"), "torch": ours("torch"), "compiled": torch.compile(ours("torch"))}
    return found | {"pml": metric_learning(case), "product": lambda x, labels: x @ x.T}


def metric_learning(case: Case) -> Loss:
    """pytorch-metric-learning's miner and loss, set so that the result is the same (semihard: its own definition, all
    semihard triplets of the batch)."""
    from pytorch_metric_learning import distances, losses, miners, reducers

    distance = distances.LpDistance(normalize_embeddings=False)
    mean = reducers.MeanReducer() if case.mining == "hard" or case.soft_margin else reducers.AvgNonZeroReducer()
    margin = 0.0 if case.soft_margin else MARGIN
    loss = losses.TripletMarginLoss(margin=margin, smooth_loss=case.soft_margin, distance=distance, reducer=mean)
    if case.mining == "all":
        return loss  # every triplet of the batch
    if case.mining == "hard":
        miner = miners.BatchHardMiner(distance=distance)
    else:
        miner = miners.TripletMarginMiner(margin=MARGIN, distance=distance, type_of_triplets="semihard")
    return lambda x, labels: loss(x, labels, miner(x, labels))


def fits(name: str, case: Case) -> bool:
    """Can this contender run this case in reasonable time and memory?"""
    if name == "native":
        return True
    if name == "compiled" and (case.mining != "hard" or case.rows > 8192):
        return False  # for mining "all" it would hold (B, B, B)
    if case.mining == "all" and case.triplets > TRIPLETS:
        return False
    return 10 * 4 * case.rows**2 <= PEER_MEMORY


def check(case: Case, found: dict[str, Loss]) -> None:
    """Hold loss and gradient of each contender against the float64 reference. Raises AssertionError."""
    x, labels = case.batch()
    if case.rows > 4096 or (case.mining == "all" and case.rows > 256):
        return
    reference = x.double().requires_grad_()
    keywords = dict(distance="euclidean", mining=case.mining, soft_margin=case.soft_margin, impl="torch")
    exact = triplet_loss(reference, labels, MARGIN, **keywords)
    exact.backward()
    for name, loss in found.items():
        if name == "product" or (name == "pml" and case.mining == "semihard"):
            continue
        leaf = x.clone().requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        error = float((leaf.grad - reference.grad).norm() / reference.grad.norm())
        assert abs(value.item() - exact.item()) < 1e-4 * max(1.0, exact.item()), (
            case,
            name,
            value.item(),
            exact.item(),
        )
        assert error < 0.1, (case, name, error)  # near-ties decided the other way move a few rows


def measure(case: Case, found: dict[str, Loss], seconds: float) -> dict[str, dict[str, float]]:
    """Median milliseconds {contender: {"forward": .., "both": .., "forward_cold": .., "both_cold": ..}}."""
    x, labels = case.batch()
    leaf = x.clone().requires_grad_()

    def both(loss: Loss) -> None:
        leaf.grad = None
        loss(leaf, labels).backward()

    jobs = {(name, "forward"): (lambda loss=loss: loss(x, labels)) for name, loss in found.items()}
    jobs |= {(name, "both"): (lambda loss=loss: both(loss)) for name, loss in found.items() if name != "product"}
    for job in jobs.values():
        job()
    turns: dict[tuple[str, str], list[tuple[float, float]]] = {job: [] for job in jobs}
    started = time.perf_counter()
    while len(next(iter(turns.values()))) < 3 or time.perf_counter() - started < seconds * len(found):
        for key, job in jobs.items():
            turns[key].append(turn(job))
    times: dict[str, dict[str, float]] = {name: {} for name in found}
    for (name, way), both_times in turns.items():
        cold, warm = zip(*both_times, strict=True)
        times[name] |= {way: 1e3 * median(warm), f"{way}_cold": 1e3 * median(cold)}
    return times


def turn(job: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a first call, and the mean of those that follow for `TURN` seconds; long calls are made once only."""
    began = time.perf_counter()
    job()
    cold = time.perf_counter() - began
    calls = int(TURN / cold)
    if calls == 0:
        return cold, cold
    began = time.perf_counter()
    for _ in range(calls):
        job()
    return cold, (time.perf_counter() - began) / calls


def peak_memory(name: str, case: Case, threads: int) -> float | None:
    """Megabytes that forward and backward add beside inputs and gradients, in a fresh process; None if it dies."""
    told = f"{name} {case.rows} {case.width} {case.mining} {int(case.soft_margin)}"
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", told]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_memory(told: str) -> None:
    """The child's part of `peak_memory`. Linux keeps the peak of resident memory and can forget an earlier one."""
    name, rows, width, mining, soft = told.split()
    case = Case(int(rows), int(width), mining, bool(int(soft)))

    def resident(field: str) -> float:
        line = next(line for line in open("/proc/self/status") if line.startswith(field))
        return float(line.split()[1]) / 1024

    def run(case: Case) -> float:
        x, labels = case.batch()
        x.requires_grad_()
        loss = contenders(case)[name]
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        (gradient,) = torch.autograd.grad(loss(x, labels), x)
        return resident("VmHWM") - before - gradient.numel() * gradient.element_size() / 2**20

    run(Case(64, case.width, mining, case.soft_margin))  # code and constants are loaded once
    print(run(case))


def bfloat16_pairs(case: Case, threads: int, turns: int) -> dict:
    """Milliseconds of forward + backward by cosine on bfloat16 rows, with products of bfloat16 pairs and, in a second
    process that takes its turns, without (ONESHOT_ISA=avx512); the ratio is the median of the turns' ratios."""
    command = [sys.executable, __file__, "--threads", str(threads), "--serve"]
    command.append(f"{case.rows} {case.width} {case.mining}")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, env=os.environ | {"ONESHOT_ISA": isa}, **pipes) for isa in ("", "avx512")]
    times: list[list[float]] = [[], []]
    for _ in range(turns + 1):
        for worker, taken in zip(workers, times, strict=True):
            print(file=worker.stdin, flush=True)
            taken.append(float(worker.stdout.readline()))
    for worker in workers:
        worker.communicate()
    ratio = median(without / pairs for pairs, without in zip(*(taken[1:] for taken in times), strict=True))
    row = {"rows": case.rows, "width": case.width, "mining": case.mining}
    return row | {"milliseconds": median(times[0][1:]), "without_pairs": median(times[1][1:]), "ratio": ratio}


def serve(told: str) -> None:
    """The worker's part of `bfloat16_pairs`."""
    rows, width, mining = told.split()
    x, labels = Case(int(rows), int(width), mining).batch()
    x = x.bfloat16().requires_grad_()
    for _ in sys.stdin:
        print(1e3 * turn(lambda: triplet_loss(x, labels, mining=mining, impl="native").backward())[1], flush=True)


def describe_machine(threads: int) -> dict:
    names = ("torch", "pytorch-metric-learning")
    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": model, "capability": capability, "threads": threads} | {n: version(n) for n in names}


def sgemm_rate() -> float:
    """The best rate of a float32 matrix product here, in GFLOP/s."""
    best = 0.0
    for side in (1024, 2048, 4096):
        a, b = torch.randn(side, side), torch.randn(side, side)
        for _ in range(5):
            began = time.perf_counter()
            a @ b
            best = max(best, 2 * side**3 / (time.perf_counter() - began) / 1e9)
    return best


def row_of(case: Case, times: dict, memory: dict) -> dict:
    """One row of the report."""
    row = {"rows": case.rows, "width": case.width, "mining": case.mining, "soft_margin": case.soft_margin}
    return row | {"milliseconds": times, "peak_megabytes": memory}


def add_shares(report: dict) -> None:
    """Share of the best product's rate that the native forward pass reaches, counting B^2 D flops: what the symmetric
    matrix of distances takes."""
    for row in report["rows"]:
        seconds = row["milliseconds"]["native"]["forward"] / 1e3
        row["share_of_sgemm"] = row["rows"] ** 2 * row["width"] / seconds / 1e9 / report["sgemm_gflops"]


def show(row: dict) -> None:
    """One line: forward + backward of each contender, the ratios to the native op, memory."""
    times = row["milliseconds"]
    native = times["native"]["both"]
    kind = row["mining"] + (" soft" if row["soft_margin"] else "")
    cells = [f"{row['rows']:6d} x {row['width']:<4d}{kind:<10}", f"native {native:9.3f} ms"]
    for name in ("torch", "compiled", "pml"):
        cells.append(f"{name} {times[name]['both'] / native:6.1f}x" if name in times else f"{name}       -")
    if "pml" in times:
        cells.append(f"(cold {times['pml']['both_cold'] / times['native']['both_cold']:.1f}x)")
    if "product" in times:
        cells.append(f"x @ x.T / forward {times['product']['forward'] / times['native']['forward']:.2f}")
    cells += [f"{name} {memory:.1f} MB" for name, memory in row["peak_megabytes"].items() if memory is not None]
    print("  ".join(cells), flush=True)


def plot(report: dict, path: str) -> None:
    """Milliseconds of forward + backward against the batch size, both on logarithmic axes, for D = 128."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if row["mining"] == "hard" and row["width"] == 128]
    names = {
        "native": "fused op",
        "torch": "plain PyTorch",
        "compiled": "plain PyTorch, compiled",
        "pml": "pytorch-metric-learning",
        "product": "x @ x.T alone",
    }
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, label), marker in zip(names.items(), "osD^x", strict=True):
        way = "forward" if name == "product" else "both"
        points = [(row["rows"], row["milliseconds"][name][way]) for row in rows if name in row["milliseconds"]]
        style = "--" if name == "product" else "-"
        axes.loglog(
            *zip(*points, strict=True), style, marker=marker, label=label, linewidth=2.5 if name == "native" else 1.2
        )
    axes.set(xlabel="batch size B (D = 128)", ylabel="milliseconds, forward + backward")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print_memory(options.memory_of)
        return
    if options.serve:
        serve(options.serve)
        return
    if triplet.native_library():
        sys.exit(f"error: {triplet.native_library()}; build it with: {triplet.NATIVE_BUILD}")
    if options.bfloat16:
        if not torch.cpu.get_capabilities().get("avx512_bf16"):
            sys.exit("error: this processor has no products of bfloat16 pairs (AVX512-BF16)")
        cases = [Case(rows, width, mining) for mining in ("hard", "semihard") for rows, width in BFLOAT16]
        found = {"machine": describe_machine(options.threads), "rows": []}
        for case in cases:
            found["rows"].append(bfloat16_pairs(case, options.threads, 25))
            print(found["rows"][-1], flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
        return
    report: dict = {"machine": describe_machine(options.threads), "sgemm_gflops": sgemm_rate(), "rows": []}
    print(report["machine"], f"best sgemm {report['sgemm_gflops']:.0f} GFLOP/s", flush=True)
    for case in QUICK if options.quick else CASES:
        torch.compiler.reset()
        found = {name: loss for name, loss in contenders(case).items() if fits(name, case)}
        check(case, found)
        times = measure(case, found, 0.5 if options.quick else options.seconds)
        large = case.rows >= 4096 or case.mining != "hard"
        memory = {
            name: peak_memory(name, case, options.threads)
            for name in ("native", "torch", "pml")
            if large and name in found
        }
        report["rows"].append(row_of(case, times, memory))
        report["sgemm_gflops"] = max(report["sgemm_gflops"], sgemm_rate())  # the machine's speed is not always the same
        add_shares(report)
        show(report["rows"][-1])
        if options.json:
            partial = Path(f"{options.json}.{os.getpid()}")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(partial, options.json)
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
