"""What both trainings share: options, seeding, device and precision, validation, checkpoints, log and progress."""

import contextlib
import ctypes
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import data as datasets
import model
import ranks

VALIDATION = 100  # images of each validation class, the last for training


@dataclass(frozen=True)
class Options:
    """The options both trainings have."""

    data: str = "cifar100"  # cifar100 (downloaded), glyphs (drawn here), an .npz file, or a folder of class folders
    data_root: str = "data"  # folder for downloads and caches
    image_size: int = 32  # side to which the pictures of a folder are scaled, in pixels
    out: str = "runs/run"  # folder of the run
    split: str = "90-10"  # shares of seen and unseen classes, or cifar-fs, cifar-fs+val, fc100, fc100+val
    split_seed: int | None = None  # draw the unseen classes at random; by default they are the last labels
    withhold: float = 0.0  # share of the seen classes, the last, not trained on: figures for them choose among recipes
    backbone: Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet18"] = "resnet20"  # kind of network
    width: int = 32  # channels of a CIFAR ResNet's first stage; the embedding has 4 * width numbers
    pretrained: bool = False  # start resnet18 from torchvision's ImageNet weights (downloaded)
    weights: str | None = None  # start from this file: a state dict, or a checkpoint of a run
    freeze: int = 0  # first stages that keep their weights: 1 is the first convolution, each further one a layer
    stem: Literal["auto", "small", "full"] = "auto"  # of resnet18: 3x3 or, with pooling, 7x7 convolution
    enlarge: int = 0  # resnet18 makes images so many times larger; 0: to about 128 pixels for the full stem
    cutout: float = 0.375  # side of the square that is blanked in each training image, as a share of the image's
    rotate: float = 0.25  # chance that a class of a batch is shown turned by 90, 180 or 270 degrees, a class of its own
    mirror: bool = True  # when not training, average the embeddings of an image and its mirror image: twice the time
    distance: Literal["cosine", "euclidean", "sqeuclidean"] = "cosine"  # between embeddings
    mining: Literal["hard", "semihard", "all"] = "all"  # which triplets of a batch count
    soft_margin: bool = True  # softplus((d_ap - d_an) / temperature) instead of max(0, d_ap - d_an + margin)
    margin: float = 0.3  # in units of the distance, without --soft-margin
    temperature: float = 0.1  # of the soft margin
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network's arithmetic; auto: bfloat16 where fast
    compile: bool = False  # compile the network for training: steps are faster, the first waits for the compiler
    minutes: float | None = None  # train for so long; the schedules then follow the clock, and no two runs are alike
    seed: int = 0  # of weights, batches and augmentation
    deterministic: bool = False  # only operations that give the same bits again, on a GPU too
    log_dir: str | None = None  # also log for TensorBoard into this folder
    resume: bool = False  # continue the run in --out, bit for bit as if it had not stopped
    overwrite: bool = False  # replace the run in --out

    @property
    def triplet(self) -> dict:
        """The keyword arguments of `triplet.triplet_loss`."""
        names = ("margin", "distance", "mining", "soft_margin", "temperature")
        return {name: getattr(self, name) for name in names}


class UserError(Exception):
    """Something the user can put right; its text says how."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around set-up: an error of the user's input ends the program with its message alone and exit status 2."""
    try:
        yield
    except (ValueError, OSError, UserError) as error:
        if ranks.local_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def require(options: Options, *names: str, least: float | None = None) -> None:
    """Raise ValueError unless each of these options is finite and above 0, or at least `least`."""
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
            bound = "above 0" if least is None else f"at least {least}"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, got {value}")


def start(options: Options) -> torch.device:
    """Check the options both trainings have, seed PyTorch, meet the other processes, and pick the device.

    Raises ValueError.

    Freed memory stays with the process: each step frees and allocates the same activations, and glibc hands such large
    blocks back to the system, which clears them page by page at their next use, a tenth of the time of a step.
    """
    require(options, "temperature", *(["minutes"] if options.minutes is not None else []))
    require(options, "margin", "seed", "enlarge", "withhold", "cutout", "rotate", least=0)
    require(options, "image_size", least=8)
    if options.rotate > 1:
        raise ValueError(f"--rotate is a chance, at most 1, got {options.rotate}")
    if options.seed >= 2**63:
        raise ValueError(f"--seed must be below 2**63, got {options.seed}")
    if options.pretrained and options.backbone != "resnet18":
        raise ValueError("--pretrained is for --backbone resnet18")
    if options.pretrained and options.weights is not None:
        raise ValueError("give --pretrained or --weights FILE, not both")
    if options.freeze and not (options.pretrained or options.weights):
        raise ValueError("--freeze keeps given weights; give --pretrained or --weights FILE with it")
    torch.manual_seed(options.seed)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(options.deterministic)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to this size come from the heap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at its end stays there
    return pick_device(ranks.join(options.device))


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is the GPU if there is one. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type the network computes in; "auto": bfloat16 where the processor multiplies it natively."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() and has_bfloat16_products()
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def has_bfloat16_products() -> bool:
    """Does this CPU multiply bfloat16 itself (AVX512-BF16 or AMX)? Without, bfloat16 is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def git_commit() -> str:
    """The commit of this code, with "+" if files differ from it; "unknown" outside a git checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


# ---------------------------------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place at the end of the block, unless there was an error.

    A reader, or a crash, finds the old file or the new one, never half of one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write atomically."""
    with writing(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path: str | os.PathLike) -> dict:
    """A dict of tensors and plain values; no code in the file is run. Raises ValueError or OSError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class TrainingData:
    """The seen classes' images, on the device, and what a checkpoint needs to know of the data."""

    kept: datasets.Images
    held_back: datasets.Images
    validation: datasets.Images | None  # of classes that are not trained on, none of them unseen
    sampler: datasets.Sampler
    generator: torch.Generator  # of this process's images and their augmentation
    cutout: float  # share of an image's side
    rotate: float  # chance that a class is shown turned
    facts: dict  # name, source, size (pixels), classes, seen, validation, unseen, mean, std

    def turns(self, n: int) -> Tensor:
        """Quarters of a circle (n,) by which each of n classes is turned."""
        return self.sampler.turns(n, self.rotate)

    def batch(self, index: Tensor, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Augmented, normalised images (B, 3, H, W) float32 and labels (B,) of an index (B,), and of turns (B,)."""
        if not self.rotate:
            turns = None  # all are upright
        pixels = datasets.augment(self.kept.images, index, self.generator, turns)
        images = model.normalise_pixels(pixels, self.facts["mean"], self.facts["std"])
        if self.cutout:
            images = datasets.cut_out(images, self.cutout, self.generator)
        return images, self.kept.labels[index.to(self.kept.labels.device)]


def training_data(options: Options, device: torch.device) -> TrainingData:
    """Load the data, take the seen classes and hold back their last images. Raises ValueError or OSError."""
    with ranks.one_before_the_others():  # it downloads
        data = datasets.load(options.data, options.data_root, options.image_size)
    height, width = data.train.images.shape[2:]
    if options.rotate and height != width:
        raise ValueError(f"--rotate needs square images, got {(height, width)}; give --rotate 0")
    seen, unseen = datasets.split_classes(data.class_names, options.split, options.split_seed)
    seen, withheld = datasets.withhold(data.class_names, options.split, seen, options.withhold)
    kept, held_back = datasets.hold_back(data.train.of(seen))
    validation = datasets.hold_back(data.train.of(withheld), VALIDATION)[1] if withheld else None
    if int(torch.bincount(kept.labels)[seen].min()) < 2:
        raise ValueError("a seen class has fewer than 2 training images: triplets need an anchor and a positive")
    if len(held_back.labels.unique()) < 2:
        raise ValueError("two seen classes need 4 training images or more: some are held back to set the threshold")
    mean, std = datasets.channel_statistics(kept.images)
    facts = {
        "name": data.name,
        "source": options.data,
        "size": kept.images.shape[2],
        "classes": data.class_names,
        "seen": seen,
        "validation": withheld,
        "unseen": unseen,
        "mean": mean,
        "std": std,
    }
    generator = torch.Generator().manual_seed(options.seed)
    tasks = generator
    if ranks.world() > 1:
        tasks = torch.Generator().manual_seed(options.seed)  # the same ones in all processes
        generator.manual_seed(int(torch.randint(2**62, (ranks.rank() + 1,), generator=generator)[-1]))
    sampler = datasets.Sampler(kept.labels, generator, tasks)
    print(
        f"{data.name}: {len(kept)} training images of {len(seen)} seen classes, {len(held_back)} more held back; "
        f"{len(unseen)} classes unseen" + (f"; validation on {len(withheld)} others" if withheld else "")
    )
    return TrainingData(
        kept.to(device), held_back, validation, sampler, generator, options.cutout, options.rotate, facts
    )


def network(options: Options, train: TrainingData) -> model.Embedder:
    """The network to be trained, on the device of the data, with the weights and the frozen stages the options want.

    Where given weights go with a normalisation of their own, the facts of `train` take it over. Raises ValueError or
    OSError.
    """
    state, statistics = given_weights(options, train.facts)
    side = train.kept.images.shape[2]
    settings = model.fit(options.backbone, options.width, side, state, stem=options.stem, enlarge=options.enlarge)
    net = model.build(**settings, mirror=options.mirror)
    if state is not None:
        model.load_weights(net, state)
        train.facts["mean"], train.facts["std"] = statistics
    net.freeze(options.freeze)
    net.to(train.kept.images.device)
    parameters, multiply_adds = model.count(net, side)
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    print(
        f"{options.backbone}: {parameters / 1e6:.2f} M parameters"
        + (f", {trained / 1e6:.2f} M of them trained" if trained < parameters else "")
        + f"; {multiply_adds / 1e6:.1f} M multiply-adds for an image of {side} x {side}"
    )
    return net


def given_weights(options: Options, facts: dict) -> tuple[dict, tuple] | tuple[None, None]:
    """A state dict, and the mean and standard deviation that its network's images are normalised with."""
    if options.pretrained:
        return model.pretrained_resnet18(), model.IMAGENET
    if options.weights is None:
        return None, None
    saved = load_checkpoint(options.weights)
    theirs = saved.get("data")
    if isinstance(theirs, dict) and {"classes", "seen", "mean", "std"} <= theirs.keys():
        learned = {theirs["classes"][label] for label in theirs["seen"]}
        if learned & {facts["classes"][label] for label in facts["unseen"]}:
            raise ValueError(f"{options.weights} was trained on classes that are unseen here; give it its own --split")
        statistics = theirs["mean"], theirs["std"]
    else:
        statistics = model.IMAGENET if options.backbone == "resnet18" else (facts["mean"], facts["std"])
    return model.bare_state(saved, options.weights), statistics


def refresh_batch_norm(net: nn.Module, train: TrainingData, batches: int = 20, batch_size: int = 250) -> None:
    """Replace batch norm's running statistics by averages over training images, not augmented; frozen ones stay.

    The statistics then belong to the weights in `net` now, whatever weights the last forward passes had (as for
    averaged weights: Izmailov et al. 2018, arXiv:1803.05407, sec. 3.2). The images are the same at every call.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d) and module.weight.requires_grad]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    was_training = net.training
    net.train()
    shuffled = torch.randperm(len(train.kept), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index in shuffled[: batches * batch_size].split(batch_size):
            images = train.kept.images[index.to(train.kept.images.device)]
            net(model.normalise_pixels(images, train.facts["mean"], train.facts["std"]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.train(was_training)
