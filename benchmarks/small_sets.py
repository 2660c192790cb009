"""Few pictures of one's own classes: a trained network as it is, fine-tuned, or one trained from scratch.

    python benchmarks/small_sets.py --cifar data/cifar100.npz --out results/small-sets.json

Ten of CIFAR-100's classes, which --weights was not trained on, play one's own classes; each has 6 to 100 training
pictures, drawn at random. The ten classes after them stay unseen in all trainings. Figures are from CIFAR-100's test
images of the ten own and of the ten new classes, in percent: AUC of all pairs and 10-way 1-shot accuracy. Finished
trainings are kept in --out, so that the same command continues.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoints
import cli
import metrics
import model
import train_classic
import train_reptile

ARMS = {  # of a training: its script, does it start from given weights, its further options
    "fine-tuned": (train_classic, True, []),
    "fine-tuned, --freeze 0": (train_classic, True, ["--freeze", "0"]),
    "from scratch": (train_classic, False, []),
    "fine-tuned, --freeze 0, rates / 3": (train_classic, True, "--freeze 0 --lr 0.0033 --muon-lr 0.00067".split()),
    "fine-tuned, --freeze 0, rates x 10": (train_classic, True, "--freeze 0 --lr 0.1 --muon-lr 0.02".split()),
    "by Reptile, --freeze 0": (train_reptile, True, "--freeze 0".split()),
    "by Reptile, --freeze 0, rates x 10": (train_reptile, True, "--freeze 0 --lr 0.001 --muon-lr 0.02".split()),
}


@dataclass(frozen=True)
class Options:
    cifar: str  # CIFAR-100 as one .npz file
    out: str  # the figures, as JSON
    weights: str = "weights/classic-80-20.pt"  # the given network
    first: int = 80  # the own classes are labels first..first+9, the new ones first+10..first+19
    pictures: tuple[int, ...] = (6, 10, 20, 50, 100)  # training pictures of each own class
    seeds: tuple[int, ...] = (0, 1, 2)  # of the draw of pictures and of the training
    arms: tuple[str, ...] = ("fine-tuned", "fine-tuned, --freeze 0", "from scratch")  # see ARMS
    iters: int = 200  # of Reptile


def small_set(cifar: dict, first: int, pictures: int, seed: int, path: Path) -> None:
    """Write the set: `pictures` of each own class, two of each new one, and all test images of both."""
    generator, parts = np.random.default_rng(seed), {}
    for part in ("train", "test"):
        labels, chosen = cifar[f"{part}_labels"], []
        for place in range(20):
            rows = np.flatnonzero(labels == first + place)
            chosen.append(generator.permutation(rows)[: pictures if place < 10 else 2] if part == "train" else rows)
        parts[f"{part}_images"] = cifar[f"{part}_images"][np.concatenate(chosen)]
        parts[f"{part}_labels"] = labels[np.concatenate(chosen)] - first
    np.savez(path, class_names=cifar["class_names"][first : first + 20], **parts)


def measure(checkpoint: Path | str, test: np.lib.npyio.NpzFile) -> dict:
    """AUC and 10-way 1-shot accuracy, each of the own and of the new classes, in percent."""
    net = checkpoints.load(checkpoint)[0].eval()
    net.penultimate = 0.0
    images, labels = torch.from_numpy(test["test_images"]).permute(0, 3, 1, 2), torch.from_numpy(test["test_labels"])
    z, found = F.normalize(model.embed(net, images)), {}
    for side, rows in (("own", labels < 10), ("new", labels >= 10)):
        episodes = metrics.episode_accuracies(z[rows], labels[rows], 10, 1, episodes=4000)
        found[side] = {"auc": metrics.roc(z[rows], labels[rows]).auc, "one_shot": float(episodes.mean())}
    return found


def train(arm: str, options: Options, data: Path, seed: int, folder: Path) -> None:
    script, given, extra = ARMS[arm]
    args = ["--data", str(data), "--split", "50-50", "--out", str(folder), "--overwrite", "--seed", str(seed), *extra]
    args += ["--weights", options.weights] if given else []
    args += ["--iters", str(options.iters), "--validate-every", "50"] if script is train_reptile else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        script.main(args)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    out = Path(options.out)
    settings = {name: getattr(options, name) for name in ("weights", "first", "iters")}
    known = json.loads(out.read_text()) if out.exists() else {"rows": []}
    if other := [name for name in settings if known.get(name, settings[name]) != settings[name]]:
        with cli.user_errors():
            raise ValueError(f"{out} has rows of another --{other[0]}, {known[other[0]]}; give another --out")
    rows = known["rows"]
    done = {(row["arm"], row["pictures"], row["seed"]) for row in rows}
    cifar = dict(np.load(options.cifar))
    with tempfile.TemporaryDirectory() as temporary:
        data, folder = Path(temporary) / "set.npz", Path(temporary) / "run"
        for seed in options.seeds:
            for pictures in options.pictures:
                small_set(cifar, options.first, pictures, seed, data)
                test = np.load(data)
                for arm in ("as it is", *options.arms):
                    if (arm, pictures, seed) in done:
                        continue
                    started = time.monotonic()
                    if arm != "as it is":
                        train(arm, options, data, seed, folder)
                    seconds = round(time.monotonic() - started)
                    figures = measure(options.weights if arm == "as it is" else folder / "best.pt", test)
                    rows.append({"arm": arm, "pictures": pictures, "seed": seed, "seconds": seconds, **figures})
                    text = settings | {"rows": rows}
                    with cli.writing(out) as path:
                        path.write_text(json.dumps(text, indent=1))
                    print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
