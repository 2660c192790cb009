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
import unicodedata
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

with suppress(ImportError):
    import pillow_heif  # makes Pillow read HEIC, the pictures of iPhones

    pillow_heif.register_heif_opener()

PATIENCE = 60.0  # seconds without a byte after which a download is given up
LISTED = 20  # pictures, folders or classes left out that are named one by one
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= {"val": "val", "valid": "val", "validation": "val"}  # what a folder is for, by its name in small letters
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "ICO", "QOI")
OTHERS = """.txt .md .csv .tsv .json .jsonl .xml .html .yaml .yml .toml .ini .log .db .py .ipynb .pdf .zip .tar .gz .npy
.npz .pkl .mat .pt .pth .h5 .mp4 .mov .avi .mp3 .wav .aae .xmp""".split()  # files that lie among pictures
MAX_PIXELS = 80_000_000  # 320 MB as RGBA
LARGE_PIXELS = 8_000_000  # of pictures larger than this, one is decoded at a time
LARGE = threading.Lock()
OwnSplit = tuple[list[int], list[int], list[int]]  # labels of the seen, validation and unseen classes


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

    def split(self, last: Tensor) -> tuple["Images", "Images"]:
        """(the rest, the last `last[label]` images of each class)."""
        by_class = torch.argsort(self.labels, stable=True)
        from_end = torch.empty_like(by_class)  # place of each image within its class, 0 for the last
        from_end[by_class] = torch.bincount(self.labels).cumsum(0)[self.labels[by_class]] - 1 - torch.arange(len(self))
        chosen = from_end < last[self.labels]
        return self[~chosen], self[chosen]

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set: training and test images, and a name for each label."""

    name: str
    train: Images
    test: Images
    class_names: list[str]
    own_split: OwnSplit | None = None  # where train and test have different classes


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
    """An .npz file without pickles: train_images, test_images (N, S, S, 3) uint8, or (N, S, S) for grey; train_labels,
    test_labels (N,) integers; class_names (C,) strings. Named after the file, so cifar100.npz is "cifar100"."""
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
    names = [unicodedata.normalize("NFC", name) for name in class_names.tolist()]
    if len(set(names)) < len(names):
        raise ValueError("class_names holds the same name twice")
    train = check_part("train", np.asarray(train_images), np.asarray(train_labels), len(names))
    test = check_part("test", np.asarray(test_images), np.asarray(test_labels), len(names))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"train and test images differ in size: {train_images.shape[1:]}, {test_images.shape[1:]}")
    return assemble(name, names, {"train": train, "test": test})


def check_part(part: str, images: np.ndarray, labels: np.ndarray, n_classes: int) -> Images:
    """`part`, "train" or "test", of a data set. Raises ValueError."""
    shape = images.shape if images.ndim == 4 else (*images.shape, 1)  # grey
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:3]:
        raise ValueError(f"{part}_images must be (N, S, S, 3) uint8, or grey, got {images.shape} {images.dtype}")
    if shape[1] != shape[2]:
        raise ValueError(f"{part}_images must be square, got {shape[1]} x {shape[2]} pixels; crop them to [:, :S, :S]")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{part}_labels must be {images.shape[:1]} integers, got {labels.shape} {labels.dtype}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"{part}_labels must lie in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")
    images = images if shape[3] == 3 else images.reshape(shape).repeat(3, axis=3)
    images = np.ascontiguousarray(images)  # torchvision's CIFAR-100 is a view of (N, 3, H, W)
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)))


def assemble(name: str, class_names: list[str], parts: dict[str, Images]) -> Data:
    """A data set from its "train" and "test" images, perhaps "val"; labels index `class_names`. Raises ValueError.

    Classes without training or without test images are left out, and named. If no class has both, train and test are
    the seen and unseen classes of a few-shot data set.
    """
    has = {part: set(images.labels.tolist()) for part, images in parts.items()}
    both = has["train"] & has["test"]
    kept = sorted(both or set().union(*has.values()))
    if len(kept) == len(class_names):
        return Data(name, **parts, class_names=class_names) if both else few_shot_data(name, class_names, **parts)
    lost = [class_names[label] for label in sorted({*range(len(class_names))} - {*kept})]
    print(f"{name}: left out, without training or test images: {listed(lost)}", file=sys.stderr)
    own, place = {part: images.of(kept) for part, images in parts.items()}, torch.tensor(kept, dtype=torch.int64)
    own = {part: Images(each.images, torch.searchsorted(place, each.labels)) for part, each in own.items()}
    return assemble(name, [class_names[label] for label in kept], own)


def few_shot_data(name: str, class_names: list[str], train: Images, test: Images, val: Images | None = None) -> Data:
    """The classes of `train` are seen, those of `test` unseen, those of `val` for validation. Raises ValueError.

    The seen classes are tested on their images in `val`, if there are any, or on the last sixth of each.
    """
    seen, unseen, in_val = (sorted(set(part.labels.tolist())) if part else [] for part in (train, test, val))
    folded = [{class_names[label].casefold() for label in part} for part in (seen, unseen)]
    if folded[0] & folded[1] or min(len(seen), len(unseen)) < 2:
        raise ValueError(
            f"{name}: no class has both training and test images; give both the same class names, capitals included, "
            "or two different classes or more each, which are then the seen and the unseen ones"
        )
    validation = sorted({*in_val} - {*seen} - {*unseen})
    train, last = (train, val.of(seen)) if {*in_val} & {*seen} else last_sixth(train)
    train = train + val.of(validation) if validation else train
    counts = f"{len(seen)} seen, {len(validation)} for validation, {len(unseen)} unseen"
    print(f"{name}: train and test have different classes: {counts}")
    return Data(name, train, test + last, class_names, (seen, validation, unseen))


def last_sixth(images: Images) -> tuple[Images, Images]:
    """(the rest, the last sixth of each class, at least one image, or two of five or more)."""
    counts = torch.bincount(images.labels)
    return images.split(torch.where(counts < 5, 1, (counts // 6).clamp(min=2)))


def listed(names: list[str], between: str = ", ") -> str:
    """The first of these names, and how many more there are."""
    return between.join(names[:LISTED] + ([f"and {len(names) - LISTED} more"] if len(names) > LISTED else []))


# -------------------------------------------------------------------------------------------------- folders of pictures


def load_folder(root: Path, size: int) -> Data:
    """Pictures in folders that name their classes, scaled to `size` pixels.

    With train/ and test/ or val/ (see PARTS) in `root`, the class folders are in these (see `assemble`). Without a
    folder for testing, the last sixth of each class is. What is left out is printed. Raises ValueError or OSError.
    """
    name, folders = root.resolve().name, subfolders(root)
    while len(folders) == 1 and subfolders(folders[0]):  # such as photos/photos/cat/1.jpg
        print(f"{root} holds one folder; reading {folders[0]}")
        root, folders = folders[0], subfolders(folders[0])
    named = [folder for folder in folders if folder.name.lower() in PARTS]
    parts = {PARTS[folder.name.lower()]: folder for folder in named if subfolders(folder)}
    if "train" not in parts or len(named) < 2:
        parts = {"train": root}
    elif "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    classes = {part: find_classes(folder) for part, folder in parts.items()}
    if "val" in parts and classes["train"].keys() & classes["test"].keys():
        del classes["val"], parts["val"]
    if parts["train"] != root:
        use = ", ".join(f"{part} images from {folder.name}/" for part, folder in parts.items())
        unused = [f"{folder.name}/" for folder in folders if folder not in parts.values()]
        print(f"{name}: {use}" + (f"; left out {listed(unused)}" if unused else ""))
    class_names = sorted(set().union(*classes.values()))
    images = {part: read_classes(found, class_names, size) for part, found in classes.items()}
    if "test" not in images:
        images["train"], images["test"] = last_sixth(images["train"])
    return assemble(name, class_names, images)


def is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"  # which macOS adds to archives


def subfolders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and is_visible(path.name))


def find_classes(root: Path) -> dict[str, list[Path]]:
    """The files that may be pictures in each folder of `root`, by class; what is left out is printed.

    Classes are the folders' names, in Unicode's composed form (NFC). Raises ValueError or OSError.
    """
    found, left_out, nested, entries = {}, [], [], sorted(root.iterdir())
    others = sum(is_visible(path.name) and not path.is_dir() for path in entries)
    for path in filter(Path.is_dir, entries):
        pictures, more = list_pictures(path) if is_visible(path.name) else ([], 0)
        others += more
        if pictures:
            found.setdefault(unicodedata.normalize("NFC", path.name), []).extend(pictures)
        places = {file.parent for file in pictures}
        nested += [f"{path.name}/"] if len(places) > 1 and path not in places else []
        left_out += [] if pictures else [f"{path.name}/"]
    if not found or (nested and len(found) == 1):
        raise ValueError(f"{root} has no folders with pictures, one for each class; is the data set one level down?")
    left_out = ([f"{others} other files"] if others else []) + left_out
    if left_out:
        print(f"{root}: left out {listed(left_out)}", file=sys.stderr)
    if nested:
        print(f"{root}: is the data set one level down? Read as one class each: {listed(nested)}", file=sys.stderr)
    return dict(sorted(found.items()))


def list_pictures(folder: Path) -> tuple[list[Path], int]:
    """The files that may be pictures in a folder and in folders inside it, always in the same order, and how many files
    have suffixes of others. Hidden ones are neither."""
    files, visited = [], set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(inside) in visited:  # a link back
            folders.clear()
            continue
        visited.add(os.path.realpath(inside))
        folders[:] = sorted(filter(is_visible, folders))
        files += [Path(inside, name) for name in sorted(filter(is_visible, names))]
    pictures = [file for file in files if file.suffix.lower() not in OTHERS]
    return pictures, len(files) - len(pictures)


def read_classes(classes: dict[str, list[Path]], class_names: list[str], size: int) -> Images:
    """The pictures of each class, class after class; labels index `class_names`. Raises ValueError."""
    pictures = [(label, path) for label, name in enumerate(class_names) for path in classes.get(name, [])]
    owners: dict[str, int] = {}
    for label, path in pictures:
        owner = owners.setdefault(os.path.realpath(path), label)
        if owner != label:
            raise ValueError(f"{path} counts for two classes by a link, {class_names[owner]} and {class_names[label]}")
    images, errors = read_pictures([path for _, path in pictures], size)
    good, bad = torch.tensor([not error for error in errors]), [error for error in errors if error]
    if len(bad) == len(errors):
        raise ValueError(f"none of {len(bad)} files can be read: {bad[0]}")
    if bad:
        print(f"left out, {len(bad)} of {len(errors)}:\n  " + listed(bad, "\n  "), file=sys.stderr)
    return Images(images[good], torch.tensor([label for label, _ in pictures])[good])


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


def read_picture(path: Path | bytes, size: int) -> Tensor:
    """The centre square of a picture, of a file or the bytes of one, scaled to `size` pixels, antialiased: (3, size,
    size) uint8, channels last.

    EXIF rotation is applied, transparent parts become white, greyscale, palette and 16-bit pictures become RGB; of an
    animation the first frame counts. A picture of size x size pixels keeps them as they are. Raises ValueError.
    """
    file = path
    if isinstance(path, bytes):
        file, path = io.BytesIO(path), "this file"
    elif not Path(path).is_file():
        raise ValueError(f"no such picture: {path}")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(file, formats=formats) as image:
                large = image.width * image.height > LARGE_PIXELS
                with LARGE if large else nullcontext():
                    square = centre_square(image, size)
    except Image.UnidentifiedImageError as error:
        known = ", ".join(formats) + ("" if "HEIF" in formats else "; for HEIC: pip install pillow-heif, or convert it")
        raise ValueError(f"{path} is not a picture in a known format ({known})") from error
    except Exception as error:  # decoders raise errors of many kinds over broken files
        raise ValueError(f"{path} cannot be read: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def read(picture: Any, size: int) -> np.ndarray:
    """Pixels (3, size, size) uint8 of a path, the bytes of a file, a PIL image, an array (H, W, 3) or (H, W) of uint8,
    or a tensor (3, H, W) of uint8, as `read_picture` reads files. Raises ValueError."""
    if isinstance(picture, (str, os.PathLike, bytes)):
        return read_picture(picture if isinstance(picture, bytes) else Path(picture), size).numpy()
    if not isinstance(picture, Image.Image):
        pixels = np.asarray(picture.cpu() if hasattr(picture, "cpu") else picture)
        if hasattr(picture, "cpu") and pixels.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
            known = "arrays (H, W, 3) or (H, W) and tensors (3, H, W) of uint8"
            raise ValueError(f"pictures are paths, PIL images, {known}, got {pixels.shape} of {pixels.dtype}")
        picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(centre_square(picture, size)).transpose(2, 0, 1)


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
