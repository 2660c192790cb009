"""What a training step costs beyond the network: data, loss, cloning and interpolation.

    python benchmarks/bench_step.py --data cifar100 --json results/bench_step.json

Turn by turn in one process: a step of train_classic.py, a meta-iteration of train_reptile.py, and beside each the bare
network: as many times forward, backward and a step of the same optimizers, on one fixed batch.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
import data  # noqa: E402
import model  # noqa: E402
import train_classic  # noqa: E402
import train_reptile  # noqa: E402
import training  # noqa: E402
from triplet import triplet_loss  # noqa: E402


@dataclass(frozen=True)
class Options:
    data: str = "glyphs"  # as for the trainings
    data_root: str = "data"  # folder for downloads and caches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seconds: float = 60.0  # time to measure for
    json: str | None = None  # write the figures to this file


def network(train: data.TrainingData, width: int, device: torch.device) -> model.Embedder:
    mean, std = train.pixel_statistics
    return model.build("resnet20", width, mean=mean, std=std).to(device)


def bare_step(
    train: data.TrainingData, device: torch.device, width: int, batch: int, make_optimizers: Callable
) -> Callable:
    """The network and its optimizers alone, on one fixed batch of `batch` images."""
    net = network(train, width, device)
    optimizers = make_optimizers(net)
    images, _ = train.batch(net.normalise, torch.arange(batch) % len(train.kept))

    def step() -> None:
        embeddings = net(images)
        for optimizer in optimizers:
            optimizer.zero_grad()
        embeddings.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def classic_step(
    train: data.TrainingData, device: torch.device, options: train_classic.Options
) -> tuple[Callable, Callable]:
    """(whole step, bare step) of train_classic.py."""
    net = network(train, options.width, device)
    seen = torch.tensor(train.facts["seen"], device=device)
    head = train_classic.NormalisedSoftmax(4 * len(seen), net.dimension, options.softmax_scale).to(device)
    optimizers = train_classic.make_optimizers(options, net, head).values()

    def step() -> None:
        images, labels, _ = train_classic.draw(train, net, seen, options)
        embeddings = net(images)
        loss = options.triplet_weight * triplet_loss(embeddings, labels, **options.triplet)
        loss = loss + options.softmax_weight * head(embeddings, labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    batch = options.batch_classes * options.images_per_class
    return step, bare_step(
        train, device, options.width, batch, lambda net: train_classic.make_optimizers(options, net, head).values()
    )


def reptile_step(train: data.TrainingData, device: torch.device) -> tuple[Callable, Callable]:
    """(meta-iteration, as many bare steps) of train_reptile.py with its defaults."""
    options = training.with_defaults(train_reptile.Options(), lr=0.001, muon_lr=0.02)
    net = network(train, options.width, device)
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    optimizers = train_reptile.make_optimizers(options, net)

    @dataclass
    class Stand:  # what `adapt` takes of a run
        net: torch.nn.Module
        train: data.TrainingData

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images)

    def iteration() -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(net.parameters()), weights)
        train_reptile.adapt(Stand(net, train), optimizers, train.sampler.task(options.way), options)
        adapted = [parameter.detach().clone() for parameter in net.parameters()]
        train_reptile.meta_step(weights, [adapted], 0.01)

    batch = options.way * options.images_per_class
    bare = bare_step(train, device, options.width, batch, lambda net: train_reptile.make_optimizers(options, net))
    return iteration, lambda: [bare() for _ in range(options.inner_steps)]


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    options = cli.parse(Options, __doc__)
    device = training.prepare_process(cli.RunOptions(device=options.device))
    classic = train_classic.Options(data=options.data, data_root=options.data_root, lr=1e-3, muon_lr=1e-4)  # low rates
    classic = training.with_defaults(classic)
    train = data.load_for_training(classic, 0, device)
    pairs = {"classic": classic_step(train, device, classic), "reptile": reptile_step(train, device)}
    times: dict[str, list[list[float]]] = {name: [[], []] for name in pairs}
    for pair in pairs.values():
        for step in pair:
            step()
    started = time.perf_counter()
    while time.perf_counter() - started < options.seconds:
        for name, pair in pairs.items():
            for step, taken in zip(pair, times[name], strict=True):
                wait(device)
                began = time.perf_counter()
                step()
                wait(device)
                taken.append(1e3 * (time.perf_counter() - began))
    report = {}
    for name, (whole, bare) in times.items():
        extra = 100 * (median(whole) / median(bare) - 1)
        report[name] = {"milliseconds": median(whole), "bare_milliseconds": median(bare), "extra_percent": extra}
        print(
            f"{name}: {median(whole):.1f} ms, network alone {median(bare):.1f} ms, {extra:+.1f} % ({len(whole)} turns)"
        )
    if options.json:
        cli.write_json(options.json, report)


if __name__ == "__main__":
    main()
