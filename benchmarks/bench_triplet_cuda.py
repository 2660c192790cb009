"""Speed of the fused triplet op on a GPU, beside what else computes the same loss.

    python benchmarks/bench_triplet_cuda.py                         # the whole table: about five minutes
    python benchmarks/bench_triplet_cuda.py --json results/gpu.json

Times are of forward + backward, the median of turns in which every contender runs once. Calls: 20 in a row between two
CUDA events, on inputs that rotate through more memory than the second-level cache holds; what the host takes to launch
kernels counts. Replays of a CUDA graph, where one can capture the contender: the kernels alone, on the same input each
time. Host: how long a call of the op keeps the host, and the same with the backward pass on the caller's thread.

Kernels: microseconds of each in a call, by the profiler.

Rates count B^2 D operations, as the search sees every pair once, and are compared with the best matrix product of the
same type here, in operations of the same kind.
"""

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import tyro
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import triplet  # noqa: E402
from triplet import triplet_loss  # noqa: E402

MARGIN, TEMPERATURE = 0.3, 0.1
PER_CLASS = 8  # images a class
IN_A_ROW = 20  # calls between two events, fewer where these would take longer than A_TURN
A_TURN = 50  # milliseconds

Loss = Callable[[Tensor, Tensor], Tensor]


class Case(NamedTuple):
    rows: int
    width: int
    kind: str  # of the embeddings
    distance: str
    mining: str
    data: str = "sorted"  # by class; or "shuffled", or "collapsed": all rows equal
    soft: bool = False  # the soft margin of the trainings

    def loss(self, impl: str) -> Loss:
        keywords = {"distance": self.distance, "mining": self.mining, "soft_margin": self.soft}
        return lambda x, labels: triplet_loss(x, labels, MARGIN, temperature=TEMPERATURE, impl=impl, **keywords)


CASES = [
    *(Case(rows, 128, "float32", "euclidean", "hard") for rows in (128, 1024, 4096, 8192, 32768)),
    *(Case(rows, 128, "bfloat16", "cosine", "hard") for rows in (128, 1024, 4096, 8192, 32768)),
    *(Case(rows, 128, "float32", "euclidean", "hard", "shuffled") for rows in (4096, 32768)),
    *(Case(4096, 512, "float32", distance, "hard") for distance in ("cosine", "euclidean")),
    *(Case(rows, 128, "float32", "euclidean", "semihard") for rows in (4096, 32768)),
    Case(4096, 128, "bfloat16", "cosine", "semihard", "shuffled"),
    *(Case(4096, 128, "float32", distance, "hard", "collapsed") for distance in ("cosine", "euclidean")),
    *(Case(rows, 128, "float32", "euclidean", "all") for rows in (256, 1024, 4096)),
    *(Case(rows, 128, "float32", "cosine", "all", soft=True) for rows in (256, 4096)),
]


@dataclass(frozen=True)
class Options:
    seconds: float = 0.3  # time for each contender in each case, at least 5 turns
    json: str | None = None  # write the figures to this file


def contenders(case: Case) -> dict[str, tuple[Loss, bool]]:
    """Name to (loss, TF32 allowed) of those that run this case in reasonable time and memory."""
    rows, mining = case.rows, case.mining
    found: dict[str, tuple[Loss, bool]] = {"native": (case.loss("native"), False)}
    free = torch.cuda.mem_get_info()[0]
    if 10 * 4 * rows**2 > free or (mining == "all" and rows > 1024) or case.data != "sorted":
        return found
    found["reference"] = case.loss("torch"), False
    if mining != "all":
        found["plain TF32"] = partial(plain, case), True
    if mining != "all" and rows >= 4096:  # compiling takes a while
        found["compiled TF32"] = torch.compile(lambda x, labels: plain(case, x, labels)), True
    if mining != "semihard" and not case.soft:  # its semihard triplets are others
        found["pml"] = (metric_learning(case.distance, mining), True)
    return found


def plain(case: Case, x: Tensor, labels: Tensor) -> Tensor:
    """Mined triplets as one writes them in a few lines of PyTorch, in the type of the rows and float32.

    Unlike the reference it ranks by rounded distances. Every row needs a positive and a negative.
    """
    if case.distance == "cosine":
        z = nn.functional.normalize(x.float()).to(x.dtype)
        distance = 1 - (z @ z.T).float()
    else:
        squares = x.float().square().sum(1)
        distance = (squares[:, None] + squares - 2 * (x @ x.T).float()).clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels
    positive = distance.masked_fill(~same, -torch.inf).amax(1)
    negative = distance.masked_fill(same, torch.inf)
    if case.mining == "semihard":
        beyond = negative.masked_fill(negative <= positive[:, None], torch.inf).amin(1)
        negative = torch.where(beyond < torch.inf, beyond, distance.masked_fill(same, -torch.inf).amax(1))
    else:
        negative = negative.amin(1)
    return (positive - negative + MARGIN).relu().mean()


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


def inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Embeddings of several batches, more than the cache holds, and their labels."""
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, case.kind)
    size = case.rows * case.width * dtype.itemsize
    count = min(64, max(2, -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // size)))
    made = [torch.randn(case.rows, case.width, device="cuda", generator=generator).to(dtype) for _ in range(count)]
    if case.data == "collapsed":
        made = [x[:1].repeat(case.rows, 1) for x in made]
    labels = torch.arange(case.rows, device="cuda") // PER_CLASS
    if case.data == "shuffled":
        labels = labels[torch.randperm(case.rows, device="cuda", generator=generator)]
    return [x.requires_grad_() for x in made], labels


def between_events(call: Callable[[], object], times: int) -> float:
    """Milliseconds of one of several calls in a row, on the GPU's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def measure(found: dict[str, tuple[Loss, bool]], batches: list[Tensor], labels: Tensor, seconds: float) -> dict:
    """Median milliseconds of forward + backward by name."""
    turns = {name: itertools.cycle(batches) for name in found}
    in_a_row = {}

    def once(name: str, times: int) -> float:
        loss, tf32 = found[name]
        torch.backends.cuda.matmul.allow_tf32 = tf32

        def call() -> None:
            x = next(turns[name])
            torch.autograd.grad(loss(x, labels), x)

        return between_events(call, times)

    for name in found:
        once(name, 3)  # warm-up
        in_a_row[name] = max(2, min(IN_A_ROW, int(A_TURN / once(name, 2))))
    return medians({name: partial(once, name, in_a_row[name]) for name in found}, seconds)


def on_the_host(loss: Loss, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Milliseconds that a call keeps the host: as usual, and with the backward pass on the caller's thread; and what
    launching one small kernel takes there."""

    def time_of(call: Callable[[], object]) -> float:
        taken = []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(IN_A_ROW):
                call()
            taken.append(1000 * (time.perf_counter() - begin) / IN_A_ROW)
        torch.cuda.synchronize()
        return median(taken)

    def call() -> None:
        torch.autograd.grad(loss(x, labels), x)

    one = torch.zeros(1, device="cuda")
    figures = {"call": time_of(call), "small kernel": time_of(one.zero_)}
    with torch.autograd.set_multithreading_enabled(False):
        figures["call, one thread"] = time_of(call)
    return figures


def kernel_times(loss: Loss, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Microseconds of a call in each kernel, in the order of their first launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(IN_A_ROW):
            torch.autograd.grad(loss(x, labels), x)
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.sub(r"^void |\(triplet::gpu::Numbers\)|triplet::(gpu::)?|\(.*|at::native::", "", event.name)
            found[name] = found.get(name, 0.0) + event.time_range.elapsed_us() / IN_A_ROW
    return found


def measure_replays(found: dict[str, tuple[Loss, bool]], x: Tensor, labels: Tensor, seconds: float) -> dict:
    """Median milliseconds of one of 10 replays of forward + backward in a row, by name."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, (loss, tf32) in found.items():
        if name in ("pml", "reference"):
            continue  # the former waits for the device, graphs of the latter take too much memory
        torch.backends.cuda.matmul.allow_tf32 = tf32
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            torch.autograd.grad(loss(x, labels), x)

    return medians({name: partial(between_events, graph.replay, 10) for name, graph in graphs.items()}, seconds)


def medians(contenders: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """The median result of each, called in turn."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    while len(results["native"]) < 5 or time.perf_counter() - started < seconds * len(contenders):
        for name, found in results.items():
            found.append(contenders[name]())
    return {name: median(found) for name, found in results.items()}


def check(found: dict[str, tuple[Loss, bool]], x: Tensor, labels: Tensor, case: Case) -> None:
    """Hold the loss of each contender against float64. Raises AssertionError."""
    if len(x) > 4096 or (case.mining == "all" and len(x) > 1024):
        return
    exact = case.loss("torch")(x.detach().double(), labels).item()
    for name, (loss, tf32) in found.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        value = loss(x, labels).item()
        assert abs(value - exact) < (2e-2 if tf32 else 1e-4) * max(1.0, exact), (name, value, exact)


def product_rate(kind: str) -> float:
    """The best rate of a matrix product of this type here, in TFLOP/s."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.randn(8192, 8192, device="cuda").to(getattr(torch, kind))
    return max(2 * 8192**3 / between_events(lambda: a @ a, 1) / 1e9 for _ in range(5))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    why = triplet.cuda_library() if torch.cuda.is_available() else "no CUDA device was found"
    if why:
        print(f"error: {why}; this benchmark needs a GPU and the native op's CUDA kernels", file=sys.stderr)
        sys.exit(2)
    rates = {kind: product_rate(kind) for kind in ("float32", "bfloat16")}
    report: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "product_tflops": rates}
    print(report, flush=True)
    report["rows"] = []
    for case in CASES:
        torch.compiler.reset()
        found = contenders(case)
        batches, labels = inputs(case)
        check(found, batches[0], labels, case)
        times = measure(found, batches, labels, options.seconds)
        replays = measure_replays(found, batches[0], labels, options.seconds)
        host = on_the_host(found["native"][0], batches[0], labels)
        tflops = case.rows**2 * case.width / replays["native"] / 1e9
        row = {"case": case, "calls": times, "replays": replays, "host": host, "tflops": tflops}  # milliseconds
        row["kernels"] = kernel_times(found["native"][0], batches[0], labels)
        report["rows"].append(row)
        print(f"{case.rows:6d} x {case.width:<4d}{case.kind:9}{case.distance:10}{case.mining:9}", end="")
        print(f"{case.data:10}{'soft' if case.soft else '':5}", end="")
        print(f"{tflops:6.1f} TFLOP/s, {100 * tflops / rates[case.kind]:3.0f} % of a product's", end="")
        for what, taken in (("call", times), ("replay", replays)):
            cells = [f"{name} {value / taken['native']:.1f}x" for name, value in taken.items() if name != "native"]
            print(f"   {what} {taken['native']:.3f} ms", *cells, sep="  ", end="")
        print("   host", *(f"{name} {value:.3g}" for name, value in host.items()), sep="  ")
        print("      ", *(f"{name} {value:.1f} us" for name, value in row["kernels"].items()), sep="  ", flush=True)
    if options.json:
        partial_file = Path(f"{options.json}.{os.getpid()}")
        partial_file.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial_file, options.json)


if __name__ == "__main__":
    main()
