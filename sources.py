"""Where images come from: CIFAR-100, drawn glyphs, .npz files, folders of pictures, single pictures.

All input is validated. Picture files are not trusted: only the formats below are tried (none runs another program), a
picture of too many pixels is refused before it is decoded, and any decoder error becomes a ValueError with the file's
name.
"""

import io
import os
import socket
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

PATIENCE = 60.0  # seconds without a byte after which a download is given up
LISTED = 20  # unreadable pictures that are named one by one
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = 80_000_000  # 320 MB as RGBA
LARGE_PIXELS = 8_000_000  # of pictures larger than this, one is decoded at a time
LARGE = threading.Lock()


@dataclass(frozen=True)
class Images:
    """`images` (N, 3, H, W) uint8 stored channels last, `labels` (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        return Images(self.images[index], self.labels[index])

    def __add__(self, other: "Images") -> "Images":
        return Images(torch.cat((self.images, other.images)), torch.cat((self.labels, other.labels)))

    def of(self, classes: list[int]) -> "Images":
        """The images of these classes, in their order; labels keep their values."""
        chosen = torch.isin(self.labels, torch.tensor(classes, dtype=torch.int64))
        return self if chosen.all() else self[chosen.nonzero()[:, 0]]

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set: training and test images, and a name for each label."""

    name: str
    train: Images
    test: Images
    class_names: list[str]


def load(source: str, data_root: str | os.PathLike = "data", image_size: int = 32) -> Data:
    """Read `source`: "cifar100", "glyphs", the path of an .npz file, or of a folder with a folder for each class.

    Downloads and caches live in `data_root`; pictures of a folder become `image_size` pixels wide and high. Raises
    ValueError or OSError with a message for the user.
    """
    if source == "glyphs":
        import glyphs

        return from_arrays("glyphs", **glyphs.load(Path(data_root))._asdict())
    if source == "cifar100":
        return load_cifar100(Path(data_root))
    if Path(source).is_dir():
        return load_folder(Path(source), image_size)
    if source.endswith(".npz"):
        return load_npz(Path(source))
    raise ValueError(
        f"unknown data {source!r}: give cifar100, glyphs, or the path of an .npz file or of a folder that holds one "
        "folder of pictures for each class"
    )


# ------------------------------------------------------------------------------------------------------------ CIFAR-100


@contextmanager
def patience(seconds: float):
    """Give up on connections that stay silent for this many seconds; torchvision would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def load_cifar100(root: Path) -> Data:
    """CIFAR-100 (Krizhevsky 2009) by torchvision's download: checked against its checksum, kept in `root`."""
    from torchvision.datasets import CIFAR100

    try:
        with patience(PATIENCE), redirect_stdout(io.StringIO()):  # older torchvision prints on every start
            train, test = (CIFAR100(root, train=train, download=True) for train in (True, False))
    except (OSError, HTTPException, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
        why = f"{error}"  # URLError is an OSError
        if isinstance(error, RuntimeError):
            why = f"cifar-100-python.tar.gz in {root}/ is incomplete or damaged (its checksum is wrong)"
        raise ValueError(
            f"cannot download CIFAR-100: {why}\n"
            f"Try again, or put a good cifar-100-python.tar.gz into {root}/, or give --data FILE.npz "
            "(train_images, train_labels, test_images, test_labels, class_names), or train on --data glyphs."
        ) from error
    return from_arrays("cifar100", train.data, train.targets, test.data, test.targets, train.classes)


# --------------------------------------------------------------------------------------------------------------- arrays


def load_npz(path: Path) -> Data:
    """An .npz file without pickles: train_images, test_images (N, H, W, 3) uint8, train_labels, test_labels (N,)
    integers, class_names (C,) strings. Named after the file, so cifar100.npz is "cifar100"."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    keys = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = [key for key in keys if key not in held]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)} (it holds: {', '.join(held) or 'nothing'})")
            return from_arrays(path.stem, *(read_member(archive, key) for key in keys))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is not an .npz file, or was cut short: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a data set that can be read: {error}") from error


def read_member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array of an .npz file. Raises ValueError, naming the array, whatever is wrong with it."""
    try:
        with archive.open(f"{key}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError("it holds more data than its shape says")
            return array
    except ValueError as error:
        if "Object arrays" in str(error):
            raise ValueError(f"{key} holds pickled objects, which could run programs; save a plain array") from error
        raise ValueError(f"{key} is damaged or cut short: {error}") from error
    except Exception as error:  # damaged headers and members raise errors of every kind
        raise ValueError(f"{key} is damaged: {error}") from error


def from_arrays(name: str, train_images, train_labels, test_images, test_labels, class_names) -> Data:
    """Check the arrays of a data set (layout: `load_npz`) and put them into tensors. Raises ValueError."""
    class_names = np.asarray(class_names)
    if class_names.ndim != 1 or class_names.dtype.kind != "U":
        raise ValueError(f"class_names must be (C,) strings, got {class_names.shape} {class_names.dtype}")
    if len(set(class_names)) < len(class_names):
        raise ValueError("class_names holds the same name twice")
    parts = [
        check_part("train", np.asarray(train_images), np.asarray(train_labels), class_names),
        check_part("test", np.asarray(test_images), np.asarray(test_labels), class_names),
    ]
    if parts[0].images.shape[1:] != parts[1].images.shape[1:]:
        raise ValueError(f"train and test images differ in size: {train_images.shape[1:]}, {test_images.shape[1:]}")
    return Data(name, *parts, class_names.tolist())


def check_part(part: str, images: np.ndarray, labels: np.ndarray, class_names: np.ndarray) -> Images:
    """`part`, "train" or "test", of a data set. Raises ValueError."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"{part}_images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{part}_labels must be {images.shape[:1]} integers, got {labels.shape} {labels.dtype}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(f"{part}_labels must lie in 0..{len(class_names) - 1}, got {labels.min()}..{labels.max()}")
    counts = np.bincount(labels.astype(np.int64), minlength=len(class_names))
    if not np.all(counts):
        empty = str(class_names[int(np.argmin(counts))])
        raise ValueError(f"class {empty!r} has no {part} image; each class needs at least one")
    images = np.ascontiguousarray(images)  # torchvision's CIFAR-100 is a view of (N, 3, H, W)
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)))


# -------------------------------------------------------------------------------------------------- folders of pictures


def load_folder(root: Path, size: int) -> Data:
    """Pictures in folders that name their classes, as torchvision's ImageFolder has them, scaled to `size` pixels.

    With train/ and test/ (or val/) in `root`, the class folders are in these; without, the last sixth of each class, at
    least two pictures of five or more, is for testing. Unreadable files are listed and left out. Raises ValueError.
    """
    tests = [name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and tests:
        train, class_names = read_classes(root / "train", size, least=2)
        test, test_names = read_classes(root / tests[0], size, least=1)
        differing = sorted({*class_names} ^ {*test_names})
        if differing:
            raise ValueError(f"{root}: not both in train/ and {tests[0]}/: {', '.join(differing)}")
    else:
        pictures, class_names = read_classes(root, size, least=2)
        counts = torch.bincount(pictures.labels)  # pictures are sorted by class
        from_end = (counts.cumsum(0))[pictures.labels] - torch.arange(len(pictures))  # 1 is the last of a class
        for_testing = from_end <= torch.where(counts < 5, 1, (counts // 6).clamp(min=2))[pictures.labels]
        train, test = pictures[~for_testing], pictures[for_testing]
    return Data(root.resolve().name, train, test, class_names)


def read_classes(root: Path, size: int, least: int) -> tuple[Images, list[str]]:
    """The pictures in each folder of `root`, class after class by name, and the classes' names.

    Raises ValueError if a class has fewer than `least` pictures that can be read.
    """
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise ValueError(f"{root} has no folders; each class needs a folder of its own with its pictures in it")
    files = [class_pictures(folder) for folder in folders]
    owners: dict[str, Path] = {}
    for folder, pictures in zip(folders, files, strict=True):
        for path in pictures:
            owner = owners.setdefault(os.path.realpath(path), folder)
            if owner != folder:
                raise ValueError(f"{path} counts for two classes by a link, {owner.name} and {folder.name}")
    labels = torch.arange(len(folders)).repeat_interleave(torch.tensor([len(each) for each in files]))
    images, errors = read_pictures(sum(files, []), size)
    good = torch.tensor([not error for error in errors], dtype=torch.bool)
    bad = [error for error in errors if error]
    if bad:
        more = [f"and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        print(f"left out, {len(bad)} of {len(errors)}:", *bad[:LISTED], *more, sep="\n  ", file=sys.stderr)
    counts = torch.bincount(labels[good], minlength=len(folders))
    for folder, count in zip(folders, counts.tolist(), strict=True):
        if count < least:
            raise ValueError(f"{folder} holds {count} pictures that can be read; a class needs at least {least}")
    return Images(images[good], labels[good]), [folder.name for folder in folders]


def class_pictures(folder: Path) -> list[Path]:
    """The picture files in a folder and in folders inside it, hidden ones aside, always in the same order."""
    found, visited = [], set()
    for inside, subfolders, _ in os.walk(folder, followlinks=True):
        if os.path.realpath(inside) in visited:  # a link back
            subfolders.clear()
            continue
        visited.add(os.path.realpath(inside))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += list_pictures(Path(inside))
    return found


def read_pictures(files: list[Path], size: int) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, size, size) uint8, channels last, and an error message for each, "" if it was read.

    Decoders release the GIL, so threads decode on all cores.
    """
    pixels = torch.zeros(len(files), size, size, 3, dtype=torch.uint8)

    def read(place: int) -> str:
        try:
            pixels[place] = read_picture(files[place], size).permute(1, 2, 0)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(read, range(len(files))), "reading pictures", len(files), delay=2, leave=False)
        return pixels.permute(0, 3, 1, 2), list(progress)


# ------------------------------------------------------------------------------------------------------ picture files


def list_pictures(folder: Path) -> list[Path]:
    """The picture files directly in `folder`, by name; hidden files and other suffixes are passed over.

    Raises OSError if there is no such folder.
    """
    files = sorted(Path(folder).iterdir())
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def read_picture(path: Path, size: int) -> Tensor:
    """The centre square of a picture, scaled to `size` pixels, antialiased: (3, size, size) uint8, channels last.

    EXIF rotation is applied, transparent parts become white, greyscale, palette and 16-bit pictures become RGB; of an
    animation the first frame counts. A picture of size x size pixels keeps them as they are. Raises ValueError.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such picture: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=FORMATS) as image:
                large = image.width * image.height > LARGE_PIXELS
                with LARGE if large else nullcontext():
                    square = centre_square(image, size)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture in a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise errors of many kinds over broken files
        raise ValueError(f"{path} cannot be read: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """An opened file as an RGB image of size x size pixels. Raises errors of many kinds."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
    image.draft(None, (2 * size, 2 * size))  # JPEG decodes at 1/2, 1/4 or 1/8 of its size where that is enough
    image = colours(ImageOps.exif_transpose(image))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def colours(image: Image.Image) -> Image.Image:
    """In mode RGB, or RGBA where something may be transparent."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # one channel of 16 bits; some decoders hand it out as 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixel values {values.min()}..{values.max()} are not of 8 or 16 bits")
        levels = np.empty(values.shape, np.uint8)
        for row, line in enumerate(values):  # line by line: no copy of the whole in a wider type
            levels[row] = (line.astype(np.int32) + 128) // 257
        image = Image.fromarray(levels)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
