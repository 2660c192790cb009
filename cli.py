"""The scripts' command line: the options of both trainings, errors in one line, tables, files written atomically.

Nothing here needs PyTorch: scripts read their options before they import it, so that --help takes no seconds.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
RESULTS = (".csv", ".json", ".onnx", ".pt2")  # names of files that are written again and again, in any folder


def shown_as(metavar: str, kind: Any = str) -> Any:
    """The type of an option whose value --help calls `metavar`; a default that is no text goes without saying."""
    return Annotated[kind, tyro.conf.arg(metavar=metavar, help_behavior_hint=None if kind is str else "")]


Checkpoint, Checkpoints = shown_as("CHECKPOINT"), shown_as("CHECKPOINT ...", tuple[str, ...])
Folder, OptionalFolder = shown_as("FOLDER"), shown_as("FOLDER", str | None)
OptionalFile = shown_as("FILE", str | None)
DataSource, OptionalDataSource = (shown_as("cifar100|omniglot|glyphs|FILE|FOLDER", kind) for kind in (str, str | None))
OptionalSplit = shown_as("SPLIT", str | None)
Backbone, OptionalBackbone = (shown_as("resnetN|torchvision:NAME|timm:NAME", kind) for kind in (str, str | None))
Device, Threshold, Criterion = map(shown_as, ("auto|cpu|cuda|cuda:N|mps", "auto|NUMBER", "balanced|eer|far:RATE"))
Float, Int = shown_as("FLOAT", float | None), shown_as("INT", int | None)
PixelStatistics = shown_as("R G B", tuple[float, float, float] | None)


# ------------------------------------------------------------------------------------------- options of both trainings


@dataclass(frozen=True)
class DataOptions:
    data: DataSource = "cifar100"  # downloaded, drawn here, or a .npz file, a folder of classes, zipped or not, a .csv
    data_root: Folder = "data"  # folder for downloads and caches
    image_size: Int = None  # side to which pictures are scaled; default: 32 pixels, or what the network was made for
    split: OptionalSplit = None  # shares of seen and unseen classes; 90-10 if not given; or a fold: 3/10, or cifar-fs
    split_seed: Int = None  # draw the unseen classes at random; by default they are the last labels
    withhold: float = 0.0  # fraction of the seen classes (the last ones) kept for validation, to compare recipes
    crop: Float = None  # smallest share of an image that is cropped at random; photographs: 0.25, else 0, for shifts
    jitter: Float = None  # how much brightness, contrast and saturation vary at random; photographs: 0.3, else 0
    flip: bool = True  # mirror half of the training images; --no-flip where a mirror image is of another class
    distort: float = 0.0  # how strongly each image is rotated, scaled, sheared, shifted, bent; characters: 0.25
    cutout: Float = None  # side of the square blanked in each training image, as a share; 0.375, photographs: 0
    rotate: Float = None  # chance that a class is shown turned (--no-flip: or mirrored), as its own; 0.25, photos: 0


@dataclass(frozen=True)
class NetworkOptions:
    backbone: Backbone = "resnet20"  # resnet12, 20, 32, 44 or 56, for small images; any of torchvision or timm
    width: Int = None  # channels of the first stage, 32; the embedding has 4 * width numbers, resnet12's 10 * width
    weights: OptionalFile = None  # start from the weights in this file: a state dict, or a checkpoint of a run
    pretrained: bool = False  # start from the weights that torchvision or timm has for the backbone (downloaded)
    freeze: Int = None  # first stages left as given, each a layer or a first convolution; 3 with --weights
    pixel_mean: PixelStatistics = None  # channel means (0..1) that a state dict was trained with
    pixel_std: PixelStatistics = None  # its standard deviations; default: those of the training data
    mirror: bool = True  # outside training, average an image's and its mirror image's embedding, unless --no-flip
    penultimate: Float = None  # outside training, append features before the last block, times this; 0.5, Reptile 0.25
    turned: Float = None  # outside training, append embeddings of turned (and mirrored) views, times this, slower; 0


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
    out: Folder = "runs/run"  # folder of the run
    resume: bool = False  # continue the run in --out, bit for bit as if it had not stopped
    overwrite: bool = False  # replace the run in --out
    minutes: Float = None  # train for this many minutes instead of a fixed number of steps
    seed: int = 0  # random seed for weights, batches and augmentation
    device: Device = "auto"  # where the network is trained; auto: on a GPU, if there is one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # arithmetic of the network; auto: bfloat16 where fast
    compile: bool = False  # compile the network: steps are faster, the first one waits for the compiler
    deterministic: bool = False  # use only operations that give the same bits again, on a GPU too
    log_dir: OptionalFolder = None  # also log for TensorBoard into this folder


# --------------------------------------------------------------------------------------------------- reading and checks


def parse(options: type[T], description: str, args: Sequence[str] | None = None) -> T:
    """The dataclass `options` from `args`, by default those of the command line.

    Where it inherits from other dataclasses, --help shows each of these as a group: DataOptions as "data options".
    From here on the script can print any text, what the terminal's encoding lacks is escaped, and it ends without a
    traceback when nobody reads what it prints any more, as in `| head`.
    """
    sys.excepthook = unless_unread
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
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


def unless_unread(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As sys.excepthook: tell of an error, unless it is that standard output is a pipe without a reader."""
    if not issubclass(kind, BrokenPipeError):
        return sys.__excepthook__(kind, error, trace)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes the rest when it ends


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around set-up: a mistake the user can fix or a missing package ends the program with one message, status 2."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        raise  # to `unless_unread`
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one of several processes reports it
            remedy = f"; pip install {error.name.split('.')[0]}" if isinstance(error, ModuleNotFoundError) else ""
            print(f"error: {printable(str(error))}{remedy}", file=sys.stderr)
        sys.exit(2)


def require(options: object, *names: str, least: float | None = None, most: float = math.inf) -> None:
    """Raise ValueError unless each of these options is None, or finite, above 0 or at least `least`, at most `most`."""
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        if not (math.isfinite(value) and (value > 0 if least is None else value >= least) and value <= most):
            bound = "above 0" if least is None else f"at least {least:g}"
            bound += "" if most == math.inf else f" and at most {most:g}"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, got {value}")


def as_given(name: str, value: object) -> str:
    """How one gives an option this value: "--lr 0.1", "--no-flip", or "no --minutes" for one to be left out."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value == ():
        return f"no {flag}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return " ".join([flag, *map(str, value if isinstance(value, (tuple, list)) else [value])])


def check_pixel_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raise ValueError unless --pixel-mean and --pixel-std are both left out or both on the scale 0..1."""
    if (mean is None) != (std is None):
        raise ValueError("--pixel-mean and --pixel-std go together: give both, three numbers each, or neither")
    if mean is not None and not (all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):
        raise ValueError(f"--pixel-mean and --pixel-std are on the scale 0..1, got {mean} and {std}")


def check_criterion(criterion: str) -> None:
    """Raise ValueError unless --criterion is balanced, eer, or far:RATE with a rate between 0 and 1."""
    rate = number(criterion[4:]) if criterion.startswith("far:") else math.nan
    if criterion not in ("balanced", "eer") and not 0 < rate < 1:
        raise ValueError(f"--criterion must be balanced, eer, or far:RATE such as far:0.01, got {criterion}")


def check_threshold(text: str) -> float:
    """The number given as --threshold. Raises ValueError unless it is a similarity."""
    value = number(text)
    if not -1 <= value <= 1:
        raise ValueError(f"--threshold must be auto or a number in -1..1, got {text}")
    return value


def number(text: str) -> float:
    """The number that a text is, NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_output(option: str, path: str | os.PathLike | None, *inputs: str | os.PathLike) -> None:
    """Raise ValueError if the file that an option names cannot be written, or is one of the inputs."""
    if path is None:
        return
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option}: no such folder: {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder, not a file")
    place = os.path.realpath(path)
    for each in inputs:
        same = os.path.realpath(each) == place or path.exists() and os.path.exists(each) and path.samefile(each)
        inside = path.exists() and os.path.isdir(each) and place.startswith(os.path.join(os.path.realpath(each), ""))
        if same or inside and path.suffix not in RESULTS:
            raise ValueError(f"{option}: {path} is an input; it would be overwritten")
    target = path if path.exists() else path.absolute().parent
    if not os.access(target, os.W_OK):
        raise ValueError(f"{option}: no permission to write {path}")


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters and bytes that are no UTF-8 are escaped, spaces
    and the (non-)joiners of Indic and Persian words are not."""
    shown = (c.isprintable() or c in "\n\u200c\u200d" or unicodedata.category(c) == "Zs" for c in text)
    escaped = (c if fine else c.encode("unicode_escape").decode() for c, fine in zip(text, shown, strict=True))
    return "".join(escaped).encode("utf-8", "backslashreplace").decode()


def cell(value: object, decimals: int = 1, dash: str = "-") -> str:
    """A table's cell: floats with `decimals`, None and NaN as a dash."""
    if value is None or value != value:
        return dash
    return f"{value:.{decimals}f}" if isinstance(value, float) else printable(str(value)).replace("\n", "\\n")


def text_table(header: list[str], rows: list[list], decimals: int = 1) -> str:
    """Aligned columns, the first to the left."""
    cells = [header, *([cell(value, decimals).replace("±", "+-") for value in row] for row in rows)]  # in ASCII
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path whose file replaces `path` at the end of the block unless there was an error.

    A reader, or a crash, finds the old file or the new one, never half of one. Links are followed, and permissions
    stay. What is no regular file, such as a pipe or /dev/stdout, is written to. Raises OSError.
    """
    path = Path(path)
    device = path.exists() and (not path.is_file() or str(path.absolute()).startswith(("/dev/", "/proc/")))
    target = Path(os.path.realpath(path))
    folder = Path(tempfile.mkdtemp()) if device else target.parent
    temporary = folder / f".{path.name if device else target.name}.{os.getpid()}"
    try:
        yield temporary
        if device:
            sys.stdout.flush()
            with open(path, "ab", buffering=0) as file:
                file.write(temporary.read_bytes())
            return
        with open(temporary, "r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except RuntimeError as error:  # PyTorch's writer, on a full disk
        raise OSError(str(error).partition("\n")[0]) from error
    finally:
        temporary.unlink(missing_ok=True)
        if device:
            folder.rmdir()


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write valid JSON: numbers that are not finite become null."""

    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {name: finite(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with writing(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


class RunFolder:
    """A run's last.pt, best.pt and log.csv, which always belong together; one process at a time has the folder.

    A run that is to be replaced stays until the new one has its first last.pt: until then the new files lie in a hidden
    folder, `place`. If the process dies in between, the next one finishes the replacement or undoes it.
    """

    FILES = ("log.csv", "best.pt", "last.pt")  # in this order they take the place of another run's

    def __init__(self, folder: str | os.PathLike, resume: bool, overwrite: bool):
        """Check that the folder may be used, and lock it if it exists. Raises ValueError or OSError."""
        self.folder = self.place = Path(folder)
        self.new = self.folder / ".new"
        self.handle = None
        if self.folder.is_dir():
            self.lock()
            self.clean_up()
        if self.check(folder, resume, overwrite) and not resume:
            self.place = self.new

    @staticmethod
    def check(folder: str | os.PathLike, resume: bool, overwrite: bool) -> bool:
        """Does the folder hold a run? Raises ValueError if it does and should not, or is none."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out: {folder} is not a folder")
        holds = any((folder / name).exists() for name in ("last.pt", "best.pt"))
        if holds and not (resume or overwrite):
            ways = "--resume continues it, --overwrite replaces it, --out goes elsewhere"
            raise ValueError(f"{folder} holds a run: {ways}")
        return holds

    def lock(self) -> None:
        """Keep other processes out until this one ends. Raises ValueError if another run is in the folder."""
        if fcntl is None:
            return
        self.handle = os.open(self.folder, os.O_RDONLY)  # closed, and so unlocked, when the process ends
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {self.folder}; wait for it, or give another --out") from error
        except OSError:  # a file system without locks
            pass

    def clean_up(self) -> None:
        """Finish or undo what a process that died has left."""
        if (self.new / "last.pt").exists():
            self.adopt()
        shutil.rmtree(self.new, ignore_errors=True)
        for path in self.folder.iterdir():
            found = re.fullmatch(r"\.(?:best\.pt|last\.pt|log\.csv)\.(\d+)", path.name)
            if found and not is_running(int(found[1])):
                path.unlink(missing_ok=True)

    def start(self, fields: Sequence[str], rows: list[dict]) -> None:
        """Make the folder, and log.csv with these rows. Raises ValueError or OSError."""
        self.place.mkdir(parents=True, exist_ok=True)
        if self.handle is None:
            self.lock()
        self.fields = fields
        with writing(self.place / "log.csv") as path, open(path, "w", newline="") as file:
            log = csv.DictWriter(file, fields)
            log.writeheader()
            log.writerows(rows)

    def write_row(self, row: dict) -> None:
        """Add a row to log.csv."""
        with open(self.place / "log.csv", "a", newline="") as file:
            csv.DictWriter(file, self.fields).writerow(row)

    def committed(self) -> None:
        """To be called when last.pt has been written: from now on the new run has the folder."""
        if self.place == self.new:
            self.adopt()

    def adopt(self) -> None:
        """Replace the old run by the new one. While both are there, neither has a last.pt in the folder."""
        (self.folder / "last.pt").unlink(missing_ok=True)
        if (self.new / "log.csv").exists() and not (self.new / "best.pt").exists():  # nothing has moved yet
            (self.folder / "best.pt").unlink(missing_ok=True)
        for name in self.FILES:
            if (self.new / name).exists():
                os.replace(self.new / name, self.folder / name)
        shutil.rmtree(self.new, ignore_errors=True)
        self.place = self.folder

    def close(self) -> None:
        """Let other processes in."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    __del__ = close


def is_running(pid: int) -> bool:
    """Is there a process of this number? True where asking would end it, on Windows."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # somebody else's
    return True
