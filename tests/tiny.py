"""A data set small enough to train on in seconds, trainings on it, and what they leave."""

from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

import sources

USUAL = "--split 75-25 --device cpu --precision float32".split()
SMALL = [*USUAL, "--width", "4"]
CLASSIC = [*SMALL, *"--epochs 10 --batch-classes 4 --images-per-class 4".split()]
REPTILE = [*SMALL, *"--iters 12 --way 3 --images-per-class 4 --inner-steps 3 --validate-every 6".split()]


def arrays(classes: int = 8, train: int = 20, test: int = 6, side: int = 16) -> dict[str, np.ndarray]:
    """The arrays of an .npz data set with `train` and `test` images a class, in mixed order.

    Each class is a colour pattern under noise.
    """
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, (classes, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    made = {"class_names": np.array([f"class {label}" for label in range(classes)])}
    for part, count in (("train", train), ("test", test)):
        labels = random.permutation(np.arange(classes).repeat(count))
        noise = random.normal(0, 40, (len(labels), side, side, 3))
        made[f"{part}_images"] = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
        made[f"{part}_labels"] = labels.astype(np.uint8)
    return made


def write_npz(path: Path, **sizes: int) -> Path:
    """Save `arrays(**sizes)` at `path`."""
    np.savez(path, **arrays(**sizes))
    return path


def run(script: ModuleType, *arguments: object) -> None:
    """A script's main, in this process."""
    script.main([*map(str, arguments)])


def train_classic(npz: Path, out: Path, *more: object) -> None:
    """A moment's classic training on a data set of 12 classes, 9 of them seen, into the folder `out`."""
    import train_classic

    run(train_classic, "--data", npz, "--out", out, *SMALL, "--epochs", 6, "--batch-classes", 6, *more)


def same(a: object, b: object) -> bool:
    """Are two checkpoints equal, bit for bit, except for the seconds they took and their places?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[key], b[key]) for key in a if key not in ("seconds", "resume", "out")
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def pictures(folder: Path) -> Path:
    """Into `folder`, best.pt of a training on 9 classes, and pictures of 3 others in support/ and queries/."""
    npz = str(write_npz(folder / "tiny.npz", classes=12, train=24, test=8))
    train_classic(npz, folder)
    test = sources.load(npz).test.of([9, 10, 11])
    for number, (image, label) in enumerate(zip(test.images, test.labels.tolist(), strict=True)):
        place = folder / ("queries" if number % 2 else "support") / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:02}.png")
    return folder
