"""Where images come from: CIFAR-100, Omniglot, drawn glyphs, .npz files, folders and zip files of pictures.

All input is validated; pictures.py finds and reads the files.
"""

import csv
import hashlib
import io
import json
import math
import mmap
import os
import re
import shutil
import socket
import sys
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

import cli
from pictures import File, Folder, content, find_classes, listed, open_folder, open_zip, read

NAMED = ("cifar100", "omniglot", "glyphs")  # data sets that are no files
IN_MEMORY = 2**28  # bytes of pictures; more of them are kept in a file
PATIENCE = 60.0  # seconds without a byte after which a download is given up
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= {"val": "val", "valid": "val", "validation": "val"}  # what a folder is for, by its name in small letters
OwnSplit = tuple[list[int], list[int], list[int]]  # labels of the seen, validation and unseen classes


class Mapped(NamedTuple):
    """The file that a store of images is mapped from."""

    memory: mmap.mmap
    fingerprint: str  # SHA-256 of its pixels


@dataclass(frozen=True)
class Images:
    """Images of a data set: rows of a store that all of its parts share, in memory or, if it is large, on disk."""

    store: Tensor  # (M, 3, S, S) uint8, stored channels last
    labels: Tensor  # (N,) int64
    rows: Tensor | None = None  # (N,) int64, of the store; None: all
    border: int = 0  # pixels at each side of a stored image that only training sees
    mapped: Mapped | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        return replace(self, labels=self.labels[index], rows=rows[index])

    def __add__(self, other: "Images") -> "Images":
        """Images of the same store."""
        a, b = self[:], other[:]
        return replace(a, labels=torch.cat((a.labels, b.labels)), rows=torch.cat((a.rows, b.rows)))

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.store.shape[2] - 2 * self.border

    @property
    def images(self) -> Tensor:
        """All of them in memory: (N, 3, size, size) uint8, stored channels last."""
        return self.pixels(slice(None))

    def pixels(self, index: Tensor | slice | int, border: bool = False) -> Tensor:
        """Some of the images, without or with their border: (B, 3, size, size) uint8, stored channels last."""
        edge = slice(None) if border or not self.border else slice(self.border, -self.border)
        if self.mapped and hasattr(mmap, "MADV_DONTNEED"):  # what was read may leave memory, not the file cache
            self.mapped.memory.madvise(mmap.MADV_DONTNEED)
        return self.store[index if self.rows is None else self.rows[index]][..., edge, edge]

    def split(self, batch: int) -> Iterator[Tensor]:
        """All of them, (B, 3, size, size) uint8 at a time, as a tensor's `split`: one empty batch of none."""
        return (self.pixels(slice(start, start + batch)) for start in range(0, max(1, len(self)), batch))

    def same(self, other: "Images") -> bool:
        """Are pixels and labels the same?"""
        parts = zip(self.split(1000), other.split(1000), strict=True)
        return torch.equal(self.labels, other.labels) and all(torch.equal(*each) for each in parts)

    def of(self, classes: list[int]) -> "Images":
        """The images of these classes, in their order; labels keep their values."""
        chosen = torch.isin(self.labels, torch.tensor(classes, dtype=torch.int64))
        return self if chosen.all() else self[chosen.nonzero()[:, 0]]

    def part(self, last: Tensor) -> tuple["Images", "Images"]:
        """(the rest, the last `last[label]` images of each class)."""
        by_class = torch.argsort(self.labels, stable=True)
        from_end = torch.empty_like(by_class)  # place of each image within its class, 0 for the last
        from_end[by_class] = torch.bincount(self.labels).cumsum(0)[self.labels[by_class]] - 1 - torch.arange(len(self))
        chosen = from_end < last[self.labels]
        return self[~chosen], self[chosen]

    def to(self, device: torch.device) -> "Images":
        """In the memory of a GPU, unless they are on disk; as they are on the CPU."""
        if self.mapped or device.type == "cpu":
            return self
        return Images(self.pixels(slice(None), border=True).to(device), self.labels, border=self.border)


@dataclass(frozen=True)
class Data:
    """A data set: training and test images, and a name for each label."""

    name: str
    train: Images
    test: Images
    class_names: list[str]
    own_split: OwnSplit | None = None  # where train and test have different classes


def has_files(source: str) -> bool:
    """Is the data set made of picture files, which can be scaled to any size?"""
    return source not in ("cifar100", "glyphs") and not source.lower().endswith(".npz")


def load(source: str, data_root: str | os.PathLike = "data", image_size: int = 32, border: int = 0) -> Data:
    """Read `source`: one of NAMED, or the path of an .npz file, of a folder or .zip file with a folder for each class,
    or of a .csv table of pictures.

    Downloads and caches live in `data_root`. Picture files become `image_size` pixels wide and high, and `border` more
    at each side, which only training sees. Raises ValueError or OSError with a message for the user.
    """
    if source == "glyphs":
        import glyphs

        return from_arrays("glyphs", **glyphs.load(Path(data_root))._asdict())
    path, root, suffix = Path(source), Path(data_root), Path(source).suffix.lower()
    if source == "cifar100":
        return load_cifar100(root)
    if source == "omniglot":
        return load_omniglot(root, image_size, border)
    if path.is_dir() or suffix == ".zip":
        name = path.resolve().name if path.is_dir() else path.stem
        return load_folder(open_folder(path), name, root, image_size, border)
    if suffix == ".csv":
        return load_table(path, root, image_size, border)
    if suffix == ".npz":
        return load_npz(path)
    raise ValueError(
        f"unknown data {source!r}: give {', '.join(NAMED)}, or the path of an .npz file, of a folder or .zip file that "
        "holds one folder of pictures for each class, or of a .csv table of pictures with the columns path and label"
    )


# ------------------------------------------------------------------------------------------------------------ downloads


@contextmanager
def downloading(name: str, archive: str, folder: Path):
    """Around a download of `archive` to `folder` by torchvision, which checks its sum. Raises ValueError, saying what
    to do; a connection that stays silent, for which torchvision would wait forever, is given up."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with redirect_stdout(io.StringIO()):  # older torchvision prints on every start
            yield
    except (OSError, HTTPException, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
        why = f"{error}"  # URLError is an OSError
        if isinstance(error, RuntimeError):
            why = f"{archive} in {folder}/ is incomplete or damaged (its checksum is wrong)"
        raise ValueError(
            f"cannot download {name}: {why}\n"
            f"Try again, or put a good {archive} into {folder}/, or give --data FILE.npz "
            "(train_images, train_labels, test_images, test_labels, class_names), or train on --data glyphs."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def load_cifar100(root: Path) -> Data:
    """CIFAR-100 (Krizhevsky 2009) by torchvision's download: checked against its checksum, kept in `root`."""
    from torchvision.datasets import CIFAR100

    with downloading("CIFAR-100", "cifar-100-python.tar.gz", root):
        train, test = (CIFAR100(root, train=train, download=True) for train in (True, False))
    return from_arrays("cifar100", train.data, train.targets, test.data, test.targets, train.classes)


def load_omniglot(root: Path, size: int, border: int) -> Data:
    """Omniglot (Lake et al. 2015): seen are the characters of its background set, unseen those of its evaluation set.

    torchvision's downloads, checked against their checksums, kept in `root` and read as they are.
    """
    from torchvision.datasets import Omniglot
    from torchvision.datasets.utils import download_url

    folder, files = root / Omniglot.folder, {}
    for part, name in (("train", "images_background"), ("test", "images_evaluation")):
        with downloading("Omniglot", f"{name}.zip", folder):
            download_url(f"{Omniglot.download_url_prefix}/{name}.zip", folder, md5=Omniglot.zips_md5[name])
        found = open_zip(folder / f"{name}.zip").inside(name).files
        files |= {(part, *parts): file for parts, file in found.items()}
    return load_folder(Folder(folder, files), "omniglot", root, size, border)


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
    except Exception as error:  # damaged headers and members raise errors of every kind
        why = f"is damaged or cut short: {error}"
        if "Object arrays" in str(error):
            why = "holds pickled objects, which could run programs; save a plain array"
        raise ValueError(f"{key} {why}") from error


def from_arrays(name: str, train_images, train_labels, test_images, test_labels, class_names) -> Data:
    """Check the arrays of a data set (layout: `load_npz`) and put them into tensors. Raises ValueError."""
    class_names = np.asarray(class_names)
    if class_names.ndim != 1 or class_names.dtype.kind != "U":
        raise ValueError(f"class_names must be (C,) strings, got {class_names.shape} {class_names.dtype}")
    names = [unicodedata.normalize("NFC", name) for name in class_names.tolist()]
    if len(set(names)) < len(names):
        raise ValueError("class_names holds the same name twice")
    parts = (check_part("train", np.asarray(train_images), np.asarray(train_labels), len(names)),)
    parts += (check_part("test", np.asarray(test_images), np.asarray(test_labels), len(names)),)
    images, labels = zip(*parts, strict=True)
    if images[0].shape[1:] != images[1].shape[1:]:
        raise ValueError(f"train and test images differ in size: {images[0].shape[1:]}, {images[1].shape[1:]}")
    store = np.empty((sum(map(len, images)), *images[0].shape[1:]), np.uint8)
    np.concatenate(images, out=store)
    everything = Images(torch.from_numpy(store).permute(0, 3, 1, 2), torch.from_numpy(np.concatenate(labels)))
    count = len(labels[0])
    return assemble(name, names, {"train": everything[:count], "test": everything[count:]})


def check_part(part: str, images: np.ndarray, labels: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S, 3) and labels (N,) int64 of `part`, "train" or "test", of a data set. Raises ValueError."""
    shape = images.shape if images.ndim == 4 else (*images.shape, 1)  # grey
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:3]:
        raise ValueError(f"{part}_images must be (N, S, S, 3) uint8, or grey, got {images.shape} {images.dtype}")
    if shape[1] != shape[2]:
        raise ValueError(f"{part}_images must be square, got {shape[1]} x {shape[2]} pixels; crop them to [:, :S, :S]")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{part}_labels must be {images.shape[:1]} integers, got {labels.shape} {labels.dtype}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"{part}_labels must lie in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")
    return np.broadcast_to(images.reshape(shape), (*shape[:3], 3)), labels.astype(np.int64)


def assemble(name: str, class_names: list[str], parts: dict[str, Images]) -> Data:
    """A data set from its "train" and "test" images, perhaps "val"; labels index `class_names`. Raises ValueError.

    Classes without training or without test images are left out, and named. If no class has both, train and test are
    the seen and unseen classes of a few-shot data set.
    """
    has = {part: set(images.labels.tolist()) for part, images in parts.items()}
    both = has["train"] & has["test"]
    kept = sorted(both or set().union(*has.values()))
    lost = [class_names[label] for label in sorted({*range(len(class_names))} - {*kept})]
    if lost:
        print(f"{name}: left out, without training or test images: {listed(lost)}", file=sys.stderr)
        class_names, place = [class_names[label] for label in kept], torch.tensor(kept, dtype=torch.int64)
        parts = {part: images.of(kept) for part, images in parts.items()}
        parts = {part: replace(own, labels=torch.searchsorted(place, own.labels)) for part, own in parts.items()}
    return Data(name, **parts, class_names=class_names) if both else few_shot_data(name, class_names, **parts)


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
    return images.part(torch.where(counts < 5, 1, (counts // 6).clamp(min=2)))


# -------------------------------------------------------------------------------------------------- folders of pictures


def load_folder(root: Folder, name: str, data_root: Path, size: int, border: int) -> Data:
    """Pictures in folders that name their classes, as `load_pictures` reads them.

    With train/ and test/ or val/ (see PARTS) in `root`, the class folders are in these. What is left out is printed.
    Raises ValueError or OSError.
    """
    while len(root.folders()) == 1 and root.inside(*root.folders()).folders():  # such as photos/photos/cat/1.jpg
        print(f"{root.path} holds one folder; reading {root.path / root.folders()[0]}")
        root = root.inside(*root.folders())
    named = [root.inside(folder) for folder in root.folders() if folder.lower() in PARTS]
    parts = {PARTS[folder.path.name.lower()]: folder for folder in named if folder.folders()}
    if "train" not in parts or len(named) < 2:
        parts = {"train": root}
    elif "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    classes = find_classes(parts)
    if "val" in parts and classes["train"].keys() & classes["test"].keys():
        del classes["val"], parts["val"]
    if parts["train"] is not root:
        used = {part: folder.path.name for part, folder in parts.items()}
        use = ", ".join(f"{part} images from {folder}/" for part, folder in used.items())
        unused = [f"{folder}/" for folder in root.folders() if folder not in used.values()]
        print(f"{name}: {use}" + (f"; left out {listed(unused)}" if unused else ""))
    return load_pictures(name, classes, data_root, size, border)


def load_table(path: Path, data_root: Path, size: int, border: int) -> Data:
    """The pictures that a CSV file names in its column "path", seen from its folder; "label" has their classes.

    A column "split" may say what each is for, in the words of PARTS. Raises ValueError or OSError.
    """
    classes: dict[str, dict[str, list[File]]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if not {"path", "label"} <= {*(table.fieldnames or [])}:
                raise ValueError(f"its first line is {table.fieldnames}, not path,label or path,label,split")
            for row in table:
                picture, label, split = ((row.get(name) or "").strip() for name in ("path", "label", "split"))
                part = PARTS.get(split.lower() or "train")
                if not (picture and label and part) or "\0" in picture:
                    raise ValueError(f"line {table.line_num} needs path, label, and train, val or test as any split")
                of = classes.setdefault(part, {}).setdefault(unicodedata.normalize("NFC", label), [])
                of.append(path.parent / picture)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a table of pictures: {error}") from error
    if "train" not in classes:
        raise ValueError(f"{path} is not a table of pictures: it has none to train on")
    if "test" not in classes and "val" in classes:
        classes["test"] = classes.pop("val")
    if "val" in classes and classes["train"].keys() & classes["test"].keys():
        print(f"{path.stem}: left out {sum(map(len, classes.pop('val').values()))} validation images")
    return load_pictures(path.stem, classes, data_root, size, border)


def load_pictures(
    name: str, classes: dict[str, dict[str, list[File]]], data_root: Path, size: int, border: int
) -> Data:
    """The pictures of each class for "train", and perhaps "test" and "val" (see `assemble`), scaled as `load` says.

    Without any for testing, the last sixth of each class is. Raises ValueError or OSError.
    """
    class_names = sorted(set().union(*classes.values()))
    number = {name: label for label, name in enumerate(class_names)}
    found = [(part, number[each], file) for part, of in classes.items() for each in sorted(of) for file in of[each]]
    owners: dict[str, int] = {}
    once = {}
    for part, label, file in found:
        place = os.path.realpath(str(file))
        owner = owners.setdefault(place, label)
        if owner != label:
            raise ValueError(f"{file} counts for two classes, {class_names[owner]} and {class_names[label]}")
        once.setdefault((part, place), (part, label, file))
    if len(once) < len(found):
        print(f"{name}: left out {len(found) - len(once)} pictures that are there twice", file=sys.stderr)
    found = [*once.values()]
    files = [file for _, _, file in found]
    stamps = [f"{part}/{class_names[label]}/{file.name} {stamp(file)}" for part, label, file in found]
    store, errors, mapped = read_pictures(files, size + 2 * border, data_root / "cache" / name, stamps)
    everything = Images(store, torch.tensor([label for _, label, _ in found]), None, border, mapped)
    parts = {}
    for part in classes:
        of = [place for place, (own, _, _) in enumerate(found) if own == part]
        bad = [errors[place] for place in of if errors[place]]
        if len(bad) == len(of):
            raise ValueError(f"none of {len(bad)} files can be read: {bad[0]}")
        if bad:
            print(f"left out, {len(bad)} of {len(of)}:\n  " + listed(bad, "\n  "), file=sys.stderr)
        parts[part] = everything[torch.tensor([place for place in of if not errors[place]])]
    if "test" not in parts:
        parts["train"], parts["test"] = last_sixth(parts["train"])
    return assemble(name, class_names, parts)


def load_runs(path: Path, size: int, border: int = 0) -> Data:
    """The one-shot test of Omniglot's authors (Lake et al. 2015), runs of as many new characters each, zipped or not.

    A character of a run is a class of two test images, the known one and the query, in the order of the runs; it is
    called "run01/class01". In run01/class_labels.txt a line says which query is of which known image's character:
    "run01/test/item01.png run01/training/class08.png". Raises ValueError or OSError.
    """
    files = {"/".join(parts): file for parts, file in open_folder(path).files.items()}
    labels = [name for name in files if name.endswith("/class_labels.txt")]
    runs = {name.rpartition("/")[0]: content(files[name]).decode(errors="replace").split() for name in labels}
    names, lengths = [name for run in runs.values() for name in run], {len(run) for run in runs.values()}
    if len(lengths) != 1 or min(lengths) < 4 or min(lengths) % 2 or len({*names} & {*files}) < len(names):
        raise ValueError(
            f"{path} does not hold runs of Omniglot's one-shot test: run01/class_labels.txt and so on, which name as "
            "many queries as known pictures, each once, and as many in each run"
        )
    pairs = [(run, *pair) for run, of in runs.items() for pair in sorted(zip(of[1::2], of[::2], strict=True))]
    images, errors, _ = read_pictures([files[name] for _, *pair in pairs for name in pair], size + 2 * border)
    if any(errors):
        raise ValueError(max(errors))
    test = Images(images, torch.arange(len(pairs)).repeat_interleave(2), border=border)
    class_names = [f"{run}/{Path(known).stem}" for run, known, _ in pairs]
    return Data(path.name.removesuffix(".zip"), test.of([]), test, class_names)


def stamp(file: File) -> str:
    """What changes when a file does."""
    if isinstance(file, zipfile.Path):
        info = file.root.getinfo(file.at)
        return f"{info.file_size} {info.CRC}"
    try:
        found = file.stat()
    except OSError as error:
        return str(error)
    return f"{found.st_size} {found.st_mtime_ns}"


def read_pictures(
    files: list[File], size: int, cache: Path | None = None, stamps: Sequence[str] = ()
) -> tuple[Tensor, list[str], Mapped | None]:
    """Pictures (N, 3, size, size) uint8, channels last, and an error message for each, "" if it was read.

    Where they take more than IN_MEMORY they are mapped from the file `cache`-*.pixels: the pixels, then their SHA-256
    and the messages as JSON. It is written unless there is one for the same `stamps` and what it could not read cannot
    be read now; those of former pictures are deleted. Raises OSError, and ValueError if the disk is too small.
    """
    shape = (len(files), size, size, 3)
    if cache is None or math.prod(shape) <= IN_MEMORY:
        pixels, errors = np.zeros(shape, np.uint8), []
        for place, (picture, error) in enumerate(decode(files, size)):
            errors.append(error)
            if picture is not None:
                pixels[place] = picture
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), errors, None
    stamps = [f"{size} {PIL.__version__} SHA-256", *stamps]
    fingerprint = hashlib.sha256("\n".join(stamps).encode(errors="surrogateescape")).hexdigest()
    path = cache.with_name(f"{cache.name}-{size}-{fingerprint[:16]}.pixels")
    if path.exists():
        memory, _, errors = map_cache(path, math.prod(shape))
        unread = [file for file, error in zip(files, errors, strict=True) if error]
        if any(not error for _, error in decode(unread, size)):
            memory.close()
            path.unlink()
    if not path.exists():
        write_cache(path, cache, files, size)
    memory, sha256, errors = map_cache(path, math.prod(shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PyTorch: nothing may write to it
        store = torch.frombuffer(memory, dtype=torch.uint8, count=math.prod(shape)).view(shape)
    return store.permute(0, 3, 1, 2), errors, Mapped(memory, sha256)


def map_cache(path: Path, length: int) -> tuple[mmap.mmap, str, list[str]]:
    """A file of `write_cache`, whose pixels take `length` bytes: its memory, their SHA-256, and the messages."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return memory, *json.loads(memory[length:])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged; delete it, and it is made again") from error


def write_cache(path: Path, cache: Path, files: list[File], size: int) -> None:
    """Write the file that `read_pictures` maps. Raises ValueError or OSError."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    own = re.compile(rf"\.?{re.escape(cache.name)}-{size}-[0-9a-f]+\.pixels(\.(?P<process>\d+))?")
    for old in filter(None, (own.fullmatch(each.name) for each in cache.parent.iterdir())):
        if not (old["process"] and cli.is_running(int(old["process"]))):  # of former pictures, or never finished
            (cache.parent / old.string).unlink(missing_ok=True)
    needed, free = len(files) * size * size * 3, shutil.disk_usage(cache.parent).free
    if needed > 0.99 * free:
        raise ValueError(
            f"{len(files):,} pictures of {size} pixels take {needed / 1e9:.1f} GB in {cache.parent}, where "
            f"{free / 1e9:.1f} GB are free; give --data-root on a larger disk, or a smaller --image-size"
        )
    errors, blank, pixels = [], bytes(size * size * 3), hashlib.sha256()
    with cli.writing(path) as temporary, open(temporary, "wb") as file:
        for picture, error in decode(files, size):
            picture = blank if picture is None else picture
            file.write(picture)
            pixels.update(picture)
            errors.append(error)
        file.write(json.dumps([pixels.hexdigest(), errors]).encode())


def decode(files: list[File], size: int) -> Iterator[tuple[np.ndarray | None, str]]:
    """Of each picture its pixels (size, size, 3) uint8 and "", or None and why it cannot be read.

    Decoders release the GIL, so threads decode on all cores, a few pictures ahead. Raises OSError if a zip file is
    damaged.
    """

    def read_one(file: File) -> tuple[np.ndarray | None, str]:
        try:
            return np.ascontiguousarray(read(file, size).transpose(1, 2, 0)), ""
        except ValueError as error:
            return None, str(error)

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future] = deque()
        for file in tqdm(files, "reading pictures", delay=2, leave=False):
            waiting.append(pool.submit(read_one, file))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        for each in waiting:
            yield each.result()
