"""Classic training: P x K batches, one network, triplet loss plus a normalised softmax.

    python train_classic.py                                 # CIFAR-100, 90 seen and 10 unseen classes
    python train_classic.py --epochs 4 --rotate 0 --cutout 0    # in a tenth of the time, where these two do not pay
    python train_classic.py --data my.npz --split 80-20 --out runs/mine
    python train_classic.py --weights A.pt --freeze 0 --lr 0.1 --muon-lr 0.02 --teacher A.pt B.pt  # a second round
    python train_classic.py --data photos/ --backbone torchvision:resnet18 --pretrained --epochs 0  # no training

Writes best.pt, last.pt and log.csv into --out; `python evaluate.py runs/classic/best.pt --threshold auto` evaluates
it. Ctrl-C saves; --resume continues.
"""

from dataclasses import dataclass
from typing import Literal

import cli


@dataclass(frozen=True)
class OptimisationOptions:
    epochs: float = 40.0  # passes over the seen classes' training images; 0: measure and calibrate given weights only
    validate_every: float = 5.0  # epochs between validations
    batch_classes: int = 64  # P, classes in a batch, split among the processes
    images_per_class: int = 4  # K, images of each class in a batch
    optimizer: Literal["muon", "sgd", "adam"] = "muon"  # muon: Muon for convolutions, SGD for the rest; or one for all
    lr: cli.Float = None  # peak learning rate of SGD (Nesterov momentum 0.9) or Adam; 0.1, from given weights 0.01
    muon_lr: cli.Float = None  # peak learning rate of Muon; 0.02, from given weights 0.002
    muon_weight_decay: float = 0.05  # weight decay of Muon, decoupled
    backbone_lr: cli.Float = None  # peak learning rate of the network; --lr is then the softmax's alone
    warmup: float = 0.05  # fraction of the run in which the learning rates rise linearly
    decay: bool = True  # let the learning rates fall linearly to 0 after the warmup
    weight_decay: float = 5e-4  # weight decay of SGD or Adam
    triplet_weight: float = 3.0  # weight of the triplet loss; 0 leaves it out
    softmax_weight: float = 1.0  # weight of the normalised softmax over the seen classes; 0 leaves it out
    softmax_scale: float = 16.0  # factor of the softmax's cosines
    teacher: cli.Checkpoints = ()  # trained networks; the similarities they see between a batch's images are imitated
    teacher_weight: float = 10.0  # weight of the divergence from the teachers' similarities


@dataclass(frozen=True)
class Options(cli.DataOptions, cli.NetworkOptions, cli.LossOptions, OptimisationOptions, cli.RunOptions):
    out: cli.Folder = "runs/classic"


if __name__ == "__main__":
    cli.parse(Options, __doc__)  # before PyTorch is imported, so that --help takes no seconds

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoints
import data
import distributed
import model
import training
from muon import Muon, split_for_muon
from triplet import triplet_loss

TEACHER_TEMPERATURE = 0.2


class NormalisedSoftmax(nn.Module):
    """Cross-entropy over scaled cosines between embeddings and one learned direction a class.

    NormFace (Wang et al. 2017, arXiv:1704.06369, eq. 5); used beside the triplet loss and thrown away after training.
    """

    def __init__(self, n_classes: int, dimension: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_classes, dimension) / math.sqrt(dimension))
        self.scale = scale

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """`embeddings` (B, D), `target` (B,) int64 in 0..n_classes-1 -> scalar loss."""
        cosine = F.normalize(embeddings.float()) @ F.normalize(self.weight).T
        return F.cross_entropy(self.scale * cosine, target)


def divergence(embeddings: Tensor, taught: Tensor) -> Tensor:
    """How far the similarities of images in `embeddings` (B, D) are from those in `taught` (B, D'): a scalar.

    A row's cosines to the other rows, through a softmax, are its distribution; the result is the mean Kullback-Leibler
    divergence of the student's from the teacher's (Roth et al. 2021, arXiv:2009.08348, eq. 3).
    """
    itself = torch.eye(len(taught), dtype=torch.bool, device=taught.device)
    rows = (F.normalize(z.float()) for z in (embeddings, taught))
    own, target = ((z @ z.T / TEACHER_TEMPERATURE).masked_fill(itself, -1e4).log_softmax(1) for z in rows)
    return F.kl_div(own, target, reduction="sum", log_target=True) / max(1, len(taught))  # all images may be turned


def load_teachers(paths: Sequence[str], train: data.TrainingData, net: model.Embedder) -> list[model.Embedder]:
    """The networks that `net` learns from. Raises ValueError or OSError."""
    teachers = []
    for path in paths:
        teacher, saved = checkpoints.load(path)
        training.note_learned(path, saved, train)
        train.facts.setdefault("given", []).append(checkpoints.fingerprint(teacher.settings, saved["model"]))
        if teacher.size != net.size:
            raise ValueError(f"{path} was trained on images of {teacher.size} pixels, these have {net.size}")
        teachers.append(teacher)
    return teachers


def embed_by(teachers: Sequence[model.Embedder], train: data.TrainingData, dtype: torch.dtype) -> Tensor:
    """Their embeddings of all training images as they are, each of length 1, side by side: (N, D')."""
    print(f"--teacher: embedding {len(train.kept)} images", flush=True)
    with torch.autocast(train.device.type, dtype, enabled=dtype != torch.float32):
        found = [F.normalize(model.embed(teacher.to(train.device), train.kept)) for teacher in teachers]
    return torch.cat(found, 1).to(train.device)


def schedule(progress: float, options: Options) -> float:
    """Fraction of the peak learning rate at `progress` 0..1 of the run: a linear rise from 0.01, a linear fall to 0."""
    if progress < options.warmup:
        return 0.01 + 0.99 * progress / options.warmup
    return (1 - progress) / (1 - options.warmup) if options.decay else 1.0


def make_optimizers(options: Options, net: nn.Module, head: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The optimizers by name; each parameter group stores its peak learning rate."""
    made: dict[str, torch.optim.Optimizer] = {}
    if options.optimizer == "muon":
        hidden, trained = split_for_muon(net)
        groups = [{"params": hidden, "peak": options.muon_lr}]
        dtype = training.pick_precision(options.precision, head.weight.device)
        made["muon"] = Muon(groups, options.muon_lr, weight_decay=options.muon_weight_decay, dtype=dtype)
    else:
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    peak = options.lr if options.backbone_lr is None else options.backbone_lr
    groups = [{"params": trained, "peak": peak}, {"params": list(head.parameters()), "peak": options.lr}]
    if options.optimizer == "adam":
        made["optimizer"] = torch.optim.Adam(groups, options.lr, weight_decay=options.weight_decay)
    else:
        settings = {"momentum": 0.9, "nesterov": True, "weight_decay": options.weight_decay}
        made["optimizer"] = torch.optim.SGD(groups, options.lr, **settings)
    return made


def draw(train: data.TrainingData, net: model.Embedder, seen: Tensor, options: Options) -> tuple[Tensor, ...]:
    """This process's part of a batch: images (B, 3, H, W) float32, targets (B,) int64, class after class, and the
    images' places among the training images (B,).

    A target is a class's place in `seen` (C,), plus C times the way in which it is turned.
    """
    classes = distributed.share(train.sampler.task(options.batch_classes))
    index = train.sampler.batch(classes, options.images_per_class)
    turns = train.turns(len(classes)).repeat_interleave(options.images_per_class)
    images, labels = train.batch(net.normalise, index, turns)
    return images, torch.searchsorted(seen, labels) + len(seen) * turns.to(seen.device), index


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def check(options: Options) -> None:
    """Raise ValueError unless the options make sense."""
    cli.require(options, "epochs", least=0, most=1e6)
    cli.require(options, "validate_every", most=1e6)
    if not options.epochs and (options.minutes or not (options.weights or options.pretrained)):
        raise ValueError("--epochs 0 takes given weights as they are: give --pretrained or --weights, no --minutes")
    cli.require(options, "lr", "muon_lr", "backbone_lr", "softmax_scale")
    cli.require(
        options,
        "warmup",
        "triplet_weight",
        "softmax_weight",
        "teacher_weight",
        "weight_decay",
        "muon_weight_decay",
        least=0,
    )
    cli.require(options, "batch_classes", "images_per_class", least=2, most=100_000)
    if options.warmup >= 1:
        raise ValueError(f"--warmup is a fraction of the run, below 1, got {options.warmup}")
    if options.backbone_lr is not None and options.optimizer == "muon":
        raise ValueError("--backbone-lr is for --optimizer sgd or adam")
    if not (options.triplet_weight or options.softmax_weight or options.teacher and options.teacher_weight):
        raise ValueError("the weights of all losses are 0: there is nothing to learn from")
    training.check(options)


def main(args: Sequence[str] | None = None) -> None:
    with cli.user_errors():
        options = training.with_defaults(cli.parse(Options, __doc__, args), penultimate=0.5, lr=0.1, muon_lr=0.02)
        check(options)
        device = training.prepare_process(options)
        train = data.load_for_training(options, options.seed, device)
        net = training.make_network(options, train)
        classes, n = min(options.batch_classes, len(train.facts["seen"])), distributed.world()
        if classes % n:
            raise ValueError(f"{n} processes cannot share the {classes} classes of a batch; change --batch-classes")
        seen = torch.tensor(train.facts["seen"], device=device)
        ways = train.ways if options.rotate else 1
        head = NormalisedSoftmax(ways * len(seen), net.dimension, options.softmax_scale).to(device)
        optimizers = make_optimizers(options, net, head)
        steps_per_epoch = len(train.kept) / (classes * options.images_per_class)
        total = max(1, round(options.epochs * steps_per_epoch)) if options.epochs else 0
        train.facts["trained"] = total > 0
        validate_every = max(1, round(options.validate_every * steps_per_epoch))
        teachers = load_teachers(options.teacher, train, net)
        run = training.Run(options, train, net, total, validate_every, head=head, **optimizers)
        if teachers and run.progress < 1:
            taught = embed_by(teachers, train, run.dtype)
    for progress in run.steps():
        rate = schedule(progress, options)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        images, labels, index = draw(train, net, seen, options)
        embeddings = run.forward(images)
        embeddings, labels = distributed.gather(embeddings), distributed.gather(labels)
        loss = embeddings.new_zeros((), dtype=torch.float32)
        if options.triplet_weight:
            loss = loss + options.triplet_weight * triplet_loss(embeddings, labels, **options.triplet)
        if options.softmax_weight:
            loss = loss + options.softmax_weight * head(embeddings, labels)
        if teachers:
            upright = labels < len(seen)  # the teachers were shown no turned images
            imitated = distributed.gather(taught[index.to(taught.device)])[upright]
            loss = loss + options.teacher_weight * divergence(embeddings[upright], imitated)
        loss.backward()
        distributed.add(gradients(net))  # each process has those of its own images
        distributed.average(gradients(head))  # all have the whole
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        run.record(loss, embeddings, len(labels), options.lr * rate)
    if not total and distributed.rank() == 0:
        print(f"no training: {options.out}/best.pt has the given weights, calibrated on the held-back images")


if __name__ == "__main__":
    main()
