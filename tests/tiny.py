"""A data set small enough to train on in seconds: each class is a colour pattern under noise."""

import sys
from pathlib import Path

import numpy as np


def arrays(classes: int = 8, train: int = 20, test: int = 6, side: int = 16) -> dict[str, np.ndarray]:
    """The arrays of an .npz data set with `train` and `test` images a class, in mixed order."""
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


def train_classic(npz: Path, out: Path, *more: str) -> None:
    """A moment's classic training on a data set of 12 classes, 9 of them seen, into the folder `out`."""
    import train_classic

    arguments = f"--data {npz} --out {out} --split 75-25 --width 4 --epochs 6 --batch-classes 6 --precision float32"
    before, sys.argv = sys.argv, ["train_classic.py", *arguments.split(), "--device", "cpu", *more]
    try:
        train_classic.main()
    finally:
        sys.argv = before
