"""Where images come from: CIFAR-100, Omniglot, drawn glyphs, .npz files, folders and zip files of pictures.

All input is validated; pictures.py finds and reads the files.
"""

import io
import os
import socket
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pictures import File, Folder, content, find_classes, listed, open_folder, open_zip, read

NAMED = ("cifar100", "omniglot", "glyphs")  # data sets that are no files
PATIENCE = 60.0  # seconds without a byte after which a download is given up
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= {"val": "val", "valid": "val", "validation": "val"}  # what a folder is for, by its name in small letters
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
    """Read `source`: one of NAMED, the path of an .npz file, or of a folder or .zip file with a folder for each class.

    Downloads and caches live in `data_root`; picture files become `image_size` pixels wide and high. Raises ValueError
    or OSError with a message for the user.
    """
    if source == "glyphs":
        import glyphs

        return from_arrays("glyphs", **glyphs.load(Path(data_root))._asdict())
    if source == "cifar100":
        return load_cifar100(Path(data_root))
    if source == "omniglot":
        return load_omniglot(Path(data_root), image_size)
    if Path(source).is_dir() or source.endswith(".zip"):
        return load_folder(open_folder(Path(source)), Path(source).resolve().name.removesuffix(".zip"), image_size)
    if source.endswith(".npz"):
        return load_npz(Path(source))
    raise ValueError(
        f"unknown data {source!r}: give {', '.join(NAMED)}, or the path of an .npz file, or of a folder or .zip file "
        "that holds one folder of pictures for each class"
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


def load_omniglot(root: Path, size: int) -> Data:
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
    return load_folder(Folder(folder, files), "omniglot", size)


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
    lost = [class_names[label] for label in sorted({*range(len(class_names))} - {*kept})]
    if lost:
        print(f"{name}: left out, without training or test images: {listed(lost)}", file=sys.stderr)
        class_names, place = [class_names[label] for label in kept], torch.tensor(kept, dtype=torch.int64)
        parts = {part: images.of(kept) for part, images in parts.items()}
        parts = {part: Images(own.images, torch.searchsorted(place, own.labels)) for part, own in parts.items()}
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
    return images.split(torch.where(counts < 5, 1, (counts // 6).clamp(min=2)))


# -------------------------------------------------------------------------------------------------- folders of pictures


def load_folder(root: Folder, name: str, size: int) -> Data:
    """Pictures in folders that name their classes, scaled to `size` pixels.

    With train/ and test/ or val/ (see PARTS) in `root`, the class folders are in these (see `assemble`). Without a
    folder for testing, the last sixth of each class is. What is left out is printed. Raises ValueError or OSError.
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
    class_names = sorted(set().union(*classes.values()))
    images = {part: read_classes(found, class_names, size) for part, found in classes.items()}
    if "test" not in images:
        images["train"], images["test"] = last_sixth(images["train"])
    return assemble(name, class_names, images)


def load_runs(path: Path, size: int) -> Data:
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
    images, errors = read_pictures([files[name] for _, *pair in pairs for name in pair], size)
    if any(errors):
        raise ValueError(max(errors))
    test = Images(images, torch.arange(len(pairs)).repeat_interleave(2))
    class_names = [f"{run}/{Path(known).stem}" for run, known, _ in pairs]
    return Data(path.name.removesuffix(".zip"), test.of([]), test, class_names)


def read_classes(classes: dict[str, list[File]], class_names: list[str], size: int) -> Images:
    """The pictures of each class, class after class; labels index `class_names`. Raises ValueError."""
    pictures = [(label, path) for label, name in enumerate(class_names) for path in classes.get(name, [])]
    owners: dict[str, int] = {}
    for label, path in pictures:
        owner = owners.setdefault(os.path.realpath(str(path)), label)
        if owner != label:
            raise ValueError(f"{path} counts for two classes by a link, {class_names[owner]} and {class_names[label]}")
    images, errors = read_pictures([path for _, path in pictures], size)
    good, bad = torch.tensor([not error for error in errors]), [error for error in errors if error]
    if len(bad) == len(errors):
        raise ValueError(f"none of {len(bad)} files can be read: {bad[0]}")
    if bad:
        print(f"left out, {len(bad)} of {len(errors)}:\n  " + listed(bad, "\n  "), file=sys.stderr)
    return Images(images[good], torch.tensor([label for label, _ in pictures])[good])


def read_pictures(files: list[File], size: int) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, size, size) uint8, channels last, and an error message for each, "" if it was read.

    Decoders release the GIL, so threads decode on all cores. Raises OSError if a zip file is damaged.
    """
    pixels = torch.zeros(len(files), size, size, 3, dtype=torch.uint8)

    def fill(place: int) -> str:
        try:
            pixels[place] = torch.from_numpy(read(files[place], size)).permute(1, 2, 0)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(fill, range(len(files))), "reading pictures", len(files), delay=2, leave=False)
        return pixels.permute(0, 3, 1, 2), list(progress)
