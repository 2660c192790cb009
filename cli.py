"""The scripts' command line: the options of both trainings, errors in one line, tables, files written atomically.

Nothing here needs PyTorch: scripts read their options before they import it, so that --help takes no seconds.
"""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro

T = TypeVar("T")


# ------------------------------------------------------------------------------------------- options of both trainings


@dataclass(frozen=True)
class DataOptions:
    data: str = "cifar100"  # cifar100 (downloaded), glyphs (drawn here), an .npz file, or a folder of class folders
    data_root: str = "data"  # folder for downloads and caches
    image_size: int = 32  # side in pixels to which the pictures of a folder are scaled
    split: str = "90-10"  # seen and unseen shares of the classes, or cifar-fs, cifar-fs+val, fc100, fc100+val
    split_seed: int | None = None  # draw the unseen classes at random; by default they are the last labels
    withhold: float = 0.0  # fraction of the seen classes (the last ones) kept for validation, to compare recipes
    cutout: float = 0.375  # side of the square blanked in each training image, as a fraction of the image's side
    rotate: float = 0.25  # probability that a class is shown rotated by 90, 180 or 270 degrees, as a class of its own


@dataclass(frozen=True)
class NetworkOptions:
    backbone: Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet18"] = "resnet20"  # which network to train
    width: int = 32  # channels of a CIFAR ResNet's first stage; the embedding has 4 * width numbers
    weights: str | None = None  # start from the weights in this file: a state dict, or a checkpoint of a run
    pretrained: bool = False  # start resnet18 from torchvision's ImageNet weights (downloaded)
    freeze: int = 0  # leave the first stages as given: 1 is the first convolution, each further one a layer
    pixel_mean: tuple[float, float, float] | None = None  # channel means (0..1) that a state dict was trained with
    pixel_std: tuple[float, float, float] | None = None  # its standard deviations; default: those of the training data
    stem: Literal["auto", "small", "full"] = "auto"  # first layer of resnet18: small is 3x3, full is 7x7 and pooling
    enlarge: int = 0  # enlarge images for resnet18 by this factor; 0: to about 128 pixels for the full stem
    mirror: bool = True  # outside training, average the embeddings of an image and its mirror image: twice the time


@dataclass(frozen=True)
class LossOptions:
    distance: Literal["cosine", "euclidean", "sqeuclidean"] = "cosine"  # distance between embeddings
    mining: Literal["hard", "semihard", "all"] = "all"  # which triplets of a batch are used
    soft_margin: bool = True  # softplus((d_ap - d_an) / temperature) instead of max(0, d_ap - d_an + margin)
    margin: float = 0.3  # margin with --no-soft-margin, in units of the distance
    temperature: float = 0.1  # temperature of the soft margin

    @property
    def triplet(self) -> dict:
        """The keyword arguments of `triplet.triplet_loss`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(LossOptions)}


@dataclass(frozen=True)
class RunOptions:
    out: str = "runs/run"  # folder of the run
    resume: bool = False  # continue the run in --out, bit for bit as if it had not stopped
    overwrite: bool = False  # replace the run in --out
    minutes: float | None = None  # train for this many minutes instead of a fixed number of steps
    seed: int = 0  # random seed for weights, batches and augmentation
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # arithmetic of the network; auto: bfloat16 where fast
    compile: bool = False  # compile the network: steps are faster, the first one waits for the compiler
    deterministic: bool = False  # use only operations that give the same bits again, on a GPU too
    log_dir: str | None = None  # also log for TensorBoard into this folder


# --------------------------------------------------------------------------------------------------- reading and checks


def parse(options: type[T], description: str, args: Sequence[str] | None = None) -> T:
    """The dataclass `options` from `args`, by default those of the command line.

    Where it inherits from other dataclasses, --help shows each of these as a group: DataOptions as "data options".
    """
    groups = [base for base in options.__bases__ if dataclasses.is_dataclass(base)]
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    if not groups:
        return tyro.cli(options, description=description, args=args, config=config)
    fields = []
    for group in groups:  # `options` may have another default for a field
        own = {field.name: options.__dataclass_fields__[field.name].default for field in dataclasses.fields(group)}
        missing = dataclasses.MISSING in own.values()  # a required argument
        default = dataclasses.MISSING if missing else group(**own)
        fields.append((group.__name__.removesuffix("Options").lower(), group, dataclasses.field(default=default)))
    grouped = dataclasses.make_dataclass(options.__name__, fields, kw_only=True)
    found = tyro.cli(grouped, description=description, args=args, config=config)
    return options(**{name: value for group in vars(found).values() for name, value in vars(group).items()})


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around set-up: a mistake the user can fix (ValueError, OSError) ends the program with its message, status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one of several processes reports it
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def require(options: object, *names: str, least: float | None = None) -> None:
    """Raise ValueError unless each of these options is finite and above 0, or at least `least`."""
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
            bound = "above 0" if least is None else f"at least {least}"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, got {value}")


def check_pixel_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raise ValueError unless --pixel-mean and --pixel-std are both left out or both on the scale 0..1."""
    if (mean is None) != (std is None):
        raise ValueError("--pixel-mean and --pixel-std go together: give both, three numbers each, or neither")
    if mean is not None and not (all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):
        raise ValueError(f"--pixel-mean and --pixel-std are on the scale 0..1, got {mean} and {std}")


def check_criterion(criterion: str) -> None:
    """Raise ValueError unless --criterion is balanced, eer, or far:RATE with a rate between 0 and 1."""
    if criterion in ("balanced", "eer"):
        return
    try:
        rate = float(criterion.removeprefix("far:")) if criterion.startswith("far:") else math.nan
    except ValueError:
        rate = math.nan
    if not 0 < rate < 1:
        raise ValueError(f"--criterion must be balanced, eer, or far:RATE such as far:0.01, got {criterion}")


def check_threshold(text: str) -> float:
    """The number given as --threshold. Raises ValueError unless it is a similarity."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1 <= value <= 1:
        raise ValueError(f"--threshold must be auto or a number in -1..1, got {text}")
    return value


def check_folder_of(option: str, path: str | os.PathLike | None) -> None:
    """Raise ValueError if the file that an option names would lie in a folder that does not exist."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{option}: no such folder: {Path(path).parent}")


def cell(value: object, decimals: int = 1, dash: str = "-") -> str:
    """A table's cell: floats with `decimals`, None as a dash."""
    return dash if value is None else f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def text_table(header: list[str], rows: list[list], decimals: int = 1) -> str:
    """Aligned columns, the first to the left."""
    cells = [header, *([cell(value, decimals) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it at the end of the block unless there was an error.

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
