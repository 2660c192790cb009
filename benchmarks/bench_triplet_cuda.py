"""Speed of the fused triplet op on a GPU, beside what else computes the same loss.

    python benchmarks/bench_triplet_cuda.py                         # the whole table: a few minutes
    python benchmarks/bench_triplet_cuda.py --json results/gpu.json

Times are of forward + backward between CUDA events, the median of turns in which every contender runs once. Of calls:
inputs rotate through more memory than the second-level cache holds, and what the host takes to launch kernels counts.
Of replays, where a CUDA graph can capture the contender: the kernels alone, on the same input each time. The floor
beside them is what the flops of the search (B^2 D: every pair once) take at the rate of the device's best float32
matrix product.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import triplet  # noqa: E402
from triplet import triplet_loss  # noqa: E402

MARGIN = 0.3
PER_CLASS = 8  # images a class
CASES = [
    *((rows, 128, "float32", "euclidean", "hard") for rows in (128, 1024, 4096, 8192, 32768)),
    *((rows, 128, "bfloat16", "cosine", "hard") for rows in (1024, 4096, 8192, 32768)),
    (4096, 512, "float32", "cosine", "hard"),
    *((rows, 128, "float32", "euclidean", "semihard") for rows in (4096, 32768)),
    *((rows, 128, "float32", "euclidean", "all") for rows in (256, 1024, 4096)),
]


@dataclass(frozen=True)
class Options:
    seconds: float = 1.0  # time for each contender at each size, at least 5 turns
    json: str | None = None  # write the figures to this file


Loss = Callable[[Tensor, Tensor], Tensor]


def contenders(rows: int, width: int, kind: str, distance: str, mining: str) -> dict[str, tuple[Loss, bool]]:
    """Name to (loss, TF32 allowed) of those that run this case in reasonable time and memory."""

    def ours(impl: str) -> Loss:
        return lambda x, labels: triplet_loss(x, labels, MARGIN, distance=distance, mining=mining, impl=impl)

    found: dict[str, tuple[Loss, bool]] = {"native": (ours("native"), False)}
    free = torch.cuda.mem_get_info()[0]
    if 10 * 4 * rows**2 > free or (mining == "all" and rows > 1024):
        return found
    found |= {"torch": (ours("torch"), False), "torch TF32": (ours("torch"), True)}
    if mining != "all":  # compiled, it would hold (B, B, B)
        found["compiled TF32"] = (torch.compile(ours("torch")), True)
    if mining != "semihard":  # its semihard triplets are others
        found["pml"] = (metric_learning(distance, mining), True)
    return found


def metric_learning(distance: str, mining: str) -> Loss:
    """pytorch-metric-learning's miner and loss, set so that the result is the same."""
    from pytorch_metric_learning import distances, losses, miners, reducers

    apart = (
        distances.LpDistance(normalize_embeddings=False) if distance == "euclidean" else distances.CosineSimilarity()
    )
    reducer = reducers.MeanReducer() if mining == "hard" else reducers.AvgNonZeroReducer()
    loss = losses.TripletMarginLoss(margin=MARGIN, distance=apart, reducer=reducer)
    if mining == "hard":
        miner = miners.BatchHardMiner(distance=apart)
    else:
        miner = miners.TripletMarginMiner(margin=MARGIN, distance=apart, type_of_triplets="all")
    return lambda x, labels: loss(x.float(), labels, miner(x.float(), labels))


def inputs(rows: int, width: int, kind: str) -> tuple[list[Tensor], Tensor]:
    """Embeddings of several batches, more than the cache holds, and their labels."""
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, kind)
    size = rows * width * dtype.itemsize
    count = min(64, max(2, -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // size)))
    made = [torch.randn(rows, width, device="cuda", generator=generator).to(dtype) for _ in range(count)]
    return [x.requires_grad_() for x in made], torch.arange(rows, device="cuda") // PER_CLASS


def measure(found: dict[str, tuple[Loss, bool]], batches: list[Tensor], labels: Tensor, seconds: float) -> dict:
    """Median milliseconds of forward + backward by name."""

    def once(name: str, x: Tensor) -> float:
        loss, tf32 = found[name]
        torch.backends.cuda.matmul.allow_tf32 = tf32
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.autograd.grad(loss(x, labels), x)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    for name in found:  # warm-up
        for x in batches[:3]:
            once(name, x)
    turns = {name: itertools.cycle(batches) for name in found}
    return medians({name: lambda name=name: once(name, next(turns[name])) for name in found}, seconds)


def measure_replays(
    found: dict[str, tuple[Loss, bool]], x: Tensor, labels: Tensor, mining: str, seconds: float
) -> dict:
    """Median milliseconds of one of 10 replays of forward + backward in a row, by name."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, (loss, tf32) in found.items():
        if name == "pml" or (name != "native" and mining == "all"):
            continue  # waits for the device to know how many triplets there are
        torch.backends.cuda.matmul.allow_tf32 = tf32
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            torch.autograd.grad(loss(x, labels), x)

    def once(graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 10

    return medians({name: partial(once, graph) for name, graph in graphs.items()}, seconds)


def medians(contenders: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """The median result of each, called in turn."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    while len(results["native"]) < 5 or time.perf_counter() - started < seconds * len(contenders):
        for name, found in results.items():
            found.append(contenders[name]())
    return {name: median(found) for name, found in results.items()}


def check(found: dict[str, tuple[Loss, bool]], x: Tensor, labels: Tensor, distance: str, mining: str) -> None:
    """Hold the loss of each contender against float64. Raises AssertionError."""
    if len(x) > 4096 or (mining == "all" and len(x) > 1024):
        return
    exact = triplet_loss(x.detach().double(), labels, MARGIN, distance=distance, mining=mining, impl="torch").item()
    for name, (loss, tf32) in found.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        value = loss(x, labels).item()
        assert abs(value - exact) < (2e-2 if tf32 else 1e-4) * max(1.0, exact), (name, value, exact)


def product_rate() -> float:
    """The best rate of a float32 matrix product here, in TFLOP/s."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.randn(8192, 8192, device="cuda")
    best = 0.0
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ a
        end.record()
        end.synchronize()
        best = max(best, 2 * 8192**3 / begin.elapsed_time(end) / 1e9)
    return best


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    why = triplet.cuda_library() if torch.cuda.is_available() else "no CUDA device was found"
    if why:
        print(f"error: {why}; this benchmark needs a GPU and the native op's CUDA kernels", file=sys.stderr)
        sys.exit(2)
    rate = product_rate()
    report: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "product_tflops": rate}
    print(report, flush=True)
    report["rows"] = []
    for case in CASES:
        rows, width, kind, distance, mining = case
        torch.compiler.reset()
        found = contenders(*case)
        batches, labels = inputs(rows, width, kind)
        check(found, batches[0], labels, distance, mining)
        times = measure(found, batches, labels, options.seconds)
        replays = measure_replays(found, batches[0], labels, mining, options.seconds)
        floor = rows**2 * width / rate / 1e9  # milliseconds
        report["rows"].append({"case": case, "calls": times, "replays": replays, "floor": floor})  # milliseconds
        print(f"{rows:6d} x {width:<4d}{kind:9}{distance:10}{mining:9} floor {floor:.3f} ms", end="")
        for what, taken in (("call", times), ("replay", replays)):
            cells = [f"{name} {value / taken['native']:.1f}x" for name, value in taken.items() if name != "native"]
            print(f"   {what} {taken['native']:.3f} ms", *cells, sep="  ", end="")
        print(flush=True)
    if options.json:
        partial = Path(f"{options.json}.{os.getpid()}")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, options.json)


if __name__ == "__main__":
    main()
