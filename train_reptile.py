"""Reptile (Nichol et al. 2018, arXiv:1803.02999) with the triplet loss.

    python train_reptile.py --iters 10000                   # CIFAR-100, 90 seen and 10 unseen classes
    python train_reptile.py --data glyphs --iters 300 --rotate 0 --cutout 0    # no download, minutes

A task is a few of the seen classes, each upright or rotated. Its inner steps train the network on P x K batches of
these classes, augmented and mined afresh at each step; the kept weights then move part of the way to the adapted ones.
With `--task domain` a task is one class, the source of anchors and positives, against images of all other seen classes.
Only parameters are interpolated. Training never uses batch norm's running statistics; they are measured again on
training images, with the interpolated weights, whenever the network is validated.

Writes best.pt, last.pt and log.csv into --out; `python evaluate.py runs/reptile/best.pt --threshold auto` evaluates
it. Ctrl-C saves; --resume continues.
"""

from dataclasses import dataclass
from typing import Literal

import cli


@dataclass(frozen=True)
class OptimisationOptions:
    iters: int = 10_000  # meta-iterations, without --minutes
    validate_every: int = 500  # meta-iterations between validations
    task: Literal["classes", "domain"] = "classes"  # some classes among each other, or one against all others
    way: int = 16  # classes of a task
    images_per_class: int = 8  # images of each class in an inner step; with --task domain also of other classes in all
    inner_steps: int = 2  # gradient steps on each task
    optimizer: Literal["muon", "adam"] = "muon"  # inner steps by Muon for convolutions and Adam for the rest, or Adam
    lr: cli.Float = None  # learning rate of Adam, restarted with each task; 0.001, from given weights 0.0001
    muon_lr: cli.Float = None  # of Muon, whose momentum also restarts with each task; 0.02, from given weights 0.002
    muon_weight_decay: float = 0.05  # weight decay of Muon, decoupled
    beta1: float = 0.0  # decay of the first moment of Adam and Muon; 0 turns it off
    meta_batch: int = 1  # tasks whose adapted weights are averaged in a meta-iteration, split among the processes
    meta_step_size: float = 1.0  # fraction of the way to the adapted weights; falls linearly to 0


@dataclass(frozen=True)
class Options(cli.DataOptions, cli.NetworkOptions, cli.LossOptions, OptimisationOptions, cli.RunOptions):
    out: cli.Folder = "runs/reptile"


if __name__ == "__main__":
    cli.parse(Options, __doc__)  # before PyTorch is imported, so that --help takes no seconds

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import data
import distributed
import training
from muon import Muon, split_for_muon
from triplet import triplet_loss


def make_optimizers(options: Options, net: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of the inner steps; together they have all weights that are to be trained."""
    made: list[torch.optim.Optimizer] = []
    if options.optimizer == "muon":
        hidden, trained = split_for_muon(net)
        dtype = training.pick_precision(options.precision, next(net.parameters()).device)
        made.append(Muon([{"params": hidden}], options.muon_lr, options.beta1, options.muon_weight_decay, dtype))
    else:
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return [*made, torch.optim.Adam(trained, options.lr, betas=(options.beta1, 0.999), fused=True)]


def adapt(
    run: training.Run, optimizers: list[torch.optim.Optimizer], task: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Train the network in place on a task, places of the sampler's classes; return mean loss and last embeddings."""
    for optimizer in optimizers:
        optimizer.state.clear()
    sampler, domain = run.train.sampler, options.task == "domain"
    turns = run.train.turns(len(task)).repeat_interleave(options.images_per_class)
    anchors = len(task) * options.images_per_class  # images that are anchors and positives, in a batch of B
    losses = []
    for _ in range(options.inner_steps):
        index = sampler.batch(task, options.images_per_class)
        if domain:
            index = torch.cat((index, sampler.against(int(task), options.images_per_class)))
        images, labels = run.train.batch(run.net.normalise, index, turns)
        embeddings = run.forward(images)
        others = (embeddings[anchors:], labels[anchors:]) if domain else None  # negatives only
        loss = triplet_loss(embeddings[:anchors], labels[:anchors], others=others, **options.triplet)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), embeddings


@torch.no_grad()
def meta_step(weights: list[Tensor], adapted: list[list[Tensor]], size: float) -> None:
    """weights += size * mean_t(adapted_t - weights), in place (arXiv:1803.02999, algorithm 2)."""
    for task in adapted:
        torch._foreach_add_(task, weights, alpha=-1)
    move, *others = adapted
    for task in others:
        torch._foreach_add_(move, task)
    distributed.average(move)
    torch._foreach_add_(weights, move, alpha=size / len(adapted))


def check(options: Options) -> None:
    """Raise ValueError unless the options make sense."""
    cli.require(options, "iters", "inner_steps", "meta_batch", "validate_every", least=1, most=1_000_000_000)
    cli.require(options, "lr", "muon_lr", "meta_step_size")
    cli.require(options, "muon_weight_decay", least=0)
    cli.require(options, "way", "images_per_class", least=2, most=100_000)
    if not 0 <= options.beta1 < 1:
        raise ValueError(f"--beta1 must be in 0..1, below 1, got {options.beta1}")
    if options.rotate and options.task == "domain":
        raise ValueError("--task domain has one class against all others, upright; give --rotate 0 with it")
    training.check(options)


def main(args: Sequence[str] | None = None) -> None:
    with cli.user_errors():
        options = training.with_defaults(cli.parse(Options, __doc__, args), penultimate=0.25, lr=0.001, muon_lr=0.02)
        check(options)
        device = training.prepare_process(options)
        if options.meta_batch % distributed.world():
            raise ValueError(f"--meta-batch must be a multiple of {distributed.world()}, the number of processes")
        train = data.load_for_training(options, options.seed, device)
        net = training.make_network(options, train)
        run = training.Run(options, train, net, options.iters, options.validate_every, refresh_batch_norm=True)
    way = 1 if options.task == "domain" else options.way
    optimizers = make_optimizers(options, net)
    parameters = [parameter.detach() for parameter in net.parameters() if parameter.requires_grad]
    weights = [parameter.clone() for parameter in parameters]
    for progress in run.steps():
        adapted = []
        tasks = torch.stack([train.sampler.task(way) for _ in range(options.meta_batch)])
        for task in distributed.share(tasks):
            torch._foreach_copy_(parameters, weights)
            loss, embeddings = adapt(run, optimizers, task, options)
            adapted.append([parameter.clone() for parameter in parameters])
        size = options.meta_step_size * (1 - progress)
        meta_step(weights, adapted, size)
        torch._foreach_copy_(parameters, weights)  # validated and saved are the kept weights
        run.record(loss, embeddings, options.meta_batch * options.inner_steps * len(embeddings), size)


if __name__ == "__main__":
    main()
