"""The scripts' command line: options in groups, errors in one line, tables, the device, files written atomically."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import tyro

T = TypeVar("T")


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
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() and has_bfloat16_products()
    return torch.bfloat16 if fast else torch.float32


def has_bfloat16_products() -> bool:
    """Does this CPU multiply bfloat16 itself (AVX512-BF16 or AMX)? If not, bfloat16 is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


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
