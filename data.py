"""Images in memory: sources, class splits, P x K batches and augmentation.

A data set is one uint8 tensor; a batch is a tensor of indices into it; cropping and flipping happen while the batch is
gathered. There are no worker processes and no Python code that runs once per image.
"""

import io
import os
import re
import zipfile
import zlib
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_BACK = 25  # last training images of each seen class, never trained on: they calibrate and select (per class)


@dataclass(frozen=True)
class Images:
    """`images` (N, 3, H, W) uint8 stored channels last, `labels` (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        return Images(self.images[index], self.labels[index])

    def of(self, classes: list[int]) -> "Images":
        """The images of these classes, in their order; labels keep their values."""
        return self[torch.isin(self.labels, torch.tensor(classes, dtype=torch.int64)).nonzero()[:, 0]]

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set: official training and test images, and a name for each label."""

    name: str
    train: Images
    test: Images
    class_names: list[str]


# -------------------------------------------------------------------------------------------------------------- sources


def load(source: str, data_root: str | os.PathLike = "data") -> Data:
    """Read `source`: "cifar100", "glyphs", or the path of an .npz file.

    Downloads and caches live in `data_root`. Raises ValueError or OSError with a message for the user.
    """
    if source == "glyphs":
        import glyphs

        return from_arrays("glyphs", **glyphs.load(Path(data_root))._asdict())
    if source == "cifar100":
        return load_cifar100(Path(data_root))
    if source.endswith(".npz"):
        return load_npz(Path(source))
    raise ValueError(f"unknown data {source!r}: give cifar100, glyphs, or the path of an .npz file")


def load_cifar100(root: Path) -> Data:
    """CIFAR-100 (Krizhevsky 2009) by torchvision's download: checked against its checksum, kept in `root`."""
    from torchvision.datasets import CIFAR100

    try:
        with redirect_stdout(io.StringIO()):  # older torchvision prints on every start
            train, test = (CIFAR100(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise ValueError(
            f"CIFAR-100 could not be had: {error}\n"
            f"Without a network, put cifar-100-python.tar.gz into {root}/, or give --data FILE.npz "
            "(train_images, train_labels, test_images, test_labels, class_names), or train on --data glyphs."
        ) from error
    return from_arrays("cifar100", train.data, train.targets, test.data, test.targets, train.classes)


def load_npz(path: Path) -> Data:
    """An .npz file without pickles: train_images, test_images (N, H, W, 3) uint8, train_labels, test_labels (N,)
    integers, class_names (C,) strings. Named after the file, so cifar100.npz is "cifar100"."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    keys = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in keys if key not in arrays]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)} (it holds: {', '.join(arrays) or 'nothing'})")
            return from_arrays(path.stem, *(arrays[key] for key in keys))
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a data set that can be read: {error}") from error


def from_arrays(name: str, train_images, train_labels, test_images, test_labels, class_names) -> Data:
    """Check the arrays of a data set (layout: `load_npz`) and put them into tensors."""
    class_names = [str(class_name) for class_name in class_names]
    parts = []
    for part, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"{part}_images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(f"{part}_labels must be {images.shape[:1]} integers, got {labels.shape} {labels.dtype}")
        counts = np.bincount(labels.astype(np.int64), minlength=len(class_names)) if labels.min(initial=0) >= 0 else []
        if len(counts) != len(class_names):
            raise ValueError(f"{part}_labels must lie in 0..{len(class_names) - 1}, got {labels.min()}..{labels.max()}")
        if not np.all(counts):
            empty = class_names[int(np.argmin(counts))]
            raise ValueError(f"class {empty!r} has no {part} image; each class needs at least one")
        parts.append(Images(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))))
    if parts[0].images.shape[1:] != parts[1].images.shape[1:]:
        raise ValueError(f"train and test images differ in size: {train_images.shape[1:]}, {test_images.shape[1:]}")
    return Data(name, *parts, class_names)


# --------------------------------------------------------------------------------------------------------------- splits


def split_classes(n_classes: int, split: str = "90-10", split_seed: int | None = None) -> tuple[list[int], list[int]]:
    """Seen and unseen classes of the split "a-b": max(2, round(C b / (a + b))) classes are unseen, none in "a-0".

    The unseen ones are the last labels, or `split_seed` draws them. Raises ValueError.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", split)
    if not match or int(match[1]) == 0:
        raise ValueError(f"split must look like 90-10 (seen-unseen shares of the classes), got {split!r}")
    a, b = int(match[1]), int(match[2])
    n_unseen = max(2, round(n_classes * b / (a + b))) if b else 0
    if n_classes - n_unseen < 2:
        raise ValueError(f"split {split} of {n_classes} classes leaves fewer than 2 to train on")
    order = list(range(n_classes))
    if split_seed is not None:
        order = torch.randperm(n_classes, generator=torch.Generator().manual_seed(split_seed)).tolist()
    return sorted(order[: n_classes - n_unseen]), sorted(order[n_classes - n_unseen :])


def hold_back(train: Images, per_class: int = HELD_BACK) -> tuple[Images, Images]:
    """(kept, held back): the last `per_class` images of each class, at most a quarter of it, are never trained on."""
    by_class = torch.argsort(train.labels, stable=True)
    counts = torch.bincount(train.labels)
    # place of each image within its class, counted from the class's end
    ends = counts.cumsum(0)[train.labels[by_class]]
    from_end = torch.empty_like(by_class)
    from_end[by_class] = ends - 1 - torch.arange(len(by_class))
    held = from_end < torch.clamp(counts // 4, max=per_class)[train.labels]
    return train[(~held).nonzero()[:, 0]], train[held.nonzero()[:, 0]]


# -------------------------------------------------------------------------------------------------------------- batches


class Sampler:
    """Draws P classes x K images, with equal chances for each class and, within it, for each image."""

    def __init__(self, labels: Tensor, generator: torch.Generator):
        """`labels` (N,) on the CPU; `generator` makes the draws repeatable."""
        self.classes, self.counts = labels.unique(return_counts=True)
        order = torch.argsort(labels, stable=True)
        slots = torch.arange(int(self.counts.max()))
        starts = self.counts.cumsum(0) - self.counts
        self.table = order[(starts[:, None] + slots % self.counts[:, None])]  # (C, largest class), short rows repeat
        self.taken = slots >= self.counts[:, None]  # (C, largest class): a repeat, not an image of its own
        self.generator = generator

    def task(self, way: int) -> Tensor:
        """`way` different classes (fewer if there are fewer), as rows of the sampler's table: (way,)."""
        return torch.randperm(len(self.classes), generator=self.generator)[:way]

    def batch(self, rows: Tensor, per_class: int) -> Tensor:
        """`per_class` images of each class in `rows`, as indices (len(rows) * per_class,), class after class.

        Images of a class differ, unless the class is smaller than `per_class`.
        """
        chance = torch.rand(len(rows), self.table.shape[1], generator=self.generator)
        chance -= self.taken[rows].float()  # repeats come last
        draw = chance.topk(min(per_class, self.table.shape[1])).indices
        draw = draw[:, torch.arange(per_class) % draw.shape[1]]
        return self.table[rows].gather(1, draw).flatten()


def augment(images: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Gather images[index] with a random crop (reflection, by up to an eighth of the side) and a random flip.

    `images` (N, 3, H, W) uint8, `index` (B,) int64 on the CPU -> (B, 3, H, W) uint8; both stored channels last.
    """
    _, channels, height, width = images.shape
    y = shifted(height, len(index), generator)
    x = shifted(width, len(index), generator)
    flip = torch.rand(len(index), 1, generator=generator) < 0.5
    x = torch.where(flip, x.flip(1), x)
    pixel = (index[:, None, None] * height + y[:, :, None]) * width + x[:, None, :]  # (B, H, W)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)  # a view: channels are last in memory
    batch = pixels.index_select(0, pixel.flatten().to(images.device))
    return batch.view(len(index), height, width, channels).permute(0, 3, 1, 2)


def shifted(side: int, n: int, generator: torch.Generator) -> Tensor:
    """Source coordinates (n, side) of n random shifts by up to side/8 pixels, reflected at the borders."""
    reach = side // 8
    coordinate = torch.arange(side) + torch.randint(-reach, reach + 1, (n, 1), generator=generator)
    coordinate = coordinate.abs()
    return torch.where(coordinate >= side, 2 * (side - 1) - coordinate, coordinate)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, 3, H, W) uint8 images, on the scale 0..1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append(float(share @ levels))
        std.append(max(float(share @ (levels - mean[-1]).square()) ** 0.5, 1e-3))  # a constant channel stays finite
    return mean, std
