"""What checkpoints are worth: exact pair and triplet figures, few-shot accuracy, all with a calibrated threshold.

    python evaluate.py runs/classic/best.pt --threshold auto --json report.json
    python evaluate.py resnet56.th --backbone resnet56 --data cifar100 --split 90-10 --threshold 0.2

The second form reads a bare state dict of the CIFAR ResNet family. Test images only, without augmentation; seen and
unseen classes apart. metrics.py defines the figures.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

import adapt
import data as datasets
import engine
import metrics
import model

EPISODES = {"5w1s": (5, 1), "5w5s": (5, 5), "10w1s": (10, 1), "all1s": (None, 1)}  # way (None: all classes), shot
# Figures of others on CIFAR-100 with the last classes unseen: triplet seen, pairs seen, triplet unseen, pairs unseen,
# 10-way 1-shot, 5-way 1-shot, all-way 1-shot. "published" is what the authors printed, whose score for unseen pairs is
# on unbalanced pairs; "measured" is what their networks reach by the definitions used here.
KNOWN = {
    ("90-10", "published, classic"): (88.34, 80.95, None, "83.06*", None, None, None),
    ("90-10", "published, Reptile"): (73.44, 67.60, 80.0, "68.80*", None, None, None),
    ("90-10", "measured, classic"): (87.9, 81.1, 83.4, 76.0, 49.7, 63.3, 50.0),
    ("80-20", "published, classic"): (88.27, 80.96, None, "77.81*", None, None, None),
    ("80-20", "measured, classic"): (88.1, 81.0, 79.8, 72.6, 38.5, 54.0, 25.8),
    ("50-50", "published, classic"): (86.79, 78.26, None, "76.77*", None, None, None),
    ("50-50", "measured, classic"): (86.3, 79.3, 74.3, 67.4, 31.5, 46.9, 10.9),
    ("70-30", "published, classic"): (88.58, 81.24, None, "76.51*", None, None, None),
    ("60-40", "published, classic"): (88.01, 81.63, None, "72.73*", None, None, None),
    ("40-60", "published, classic"): (86.15, 79.56, None, "69.72*", None, None, None),
    ("30-70", "published, classic"): (85.11, 79.13, None, "67.23*", None, None, None),
    ("20-80", "published, classic"): (85.33, 77.95, None, "61.72*", None, None, None),
    ("10-90", "published, classic"): (86.90, 78.82, None, "45.32*", None, None, None),
}


@dataclass(frozen=True)
class Options:
    checkpoints: tyro.conf.Positional[tuple[str, ...]]  # files of train_*.py, or state dicts of CIFAR ResNets
    threshold: str = "auto"  # auto (calibrated on held-back training images) or a similarity in -1..1
    json: str | None = None  # write the report to this file
    adapt_published: bool = False  # also score unseen classes after training 30 steps on each one's training images
    data: str | None = None  # cifar100, glyphs, an .npz file or a folder; by default what the checkpoint was trained on
    data_root: str = "data"  # folder for downloads and caches
    split: str | None = None  # by default the checkpoint's, or 90-10
    split_seed: int | None = None  # by default the checkpoint's
    backbone: str | None = None  # of a bare state dict
    width: int | None = None  # of a bare state dict, 16 by default
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


@dataclass(frozen=True)
class Loaded:
    """A network and all that its evaluation needs."""

    path: str
    net: nn.Module
    data: datasets.Data
    seen: list[int]
    unseen: list[int]
    split: str
    mean: list[float]
    std: list[float]
    center: Tensor | None
    commit: str | None
    calibration: dict | None  # the checkpoint's threshold, where it goes with these classes

    def embed(self, images: datasets.Images) -> Tensor:
        """Normalised embeddings (N, D)."""
        return metrics.normalise(model.embed(self.net, images.images, self.mean, self.std), self.center)


# ------------------------------------------------------------------------------------------------------------ loading


def load(path: str, options: Options, device: torch.device) -> Loaded:
    """A checkpoint of the training scripts, or a bare state dict. Raises ValueError or OSError."""
    saved = engine.load_checkpoint(path)
    own = {"model", "options", "data"} <= saved.keys()
    trained = saved["options"] if own else {}
    source = options.data or trained.get("data")
    backbone = options.backbone or trained.get("backbone")
    if source is None or backbone is None:
        raise ValueError(f"{path} is a bare state dict: give --backbone and --data (and --split) with it")
    data = datasets.load(source, options.data_root, trained.get("image_size", 32))
    state = model.bare_state(saved, path)
    network = saved.get("network") if options.backbone is None and options.width is None else None
    width = options.width or trained.get("width", 16)
    net = model.build(**(network or model.fit(backbone, width, data.train.images.shape[2], state)))
    ignored = model.load_weights(net, state)
    if ignored:
        print(f"{path}: left out {', '.join(ignored)}")
    split = options.split or trained.get("split", "90-10")
    split_seed = options.split_seed if options.split_seed is not None else trained.get("split_seed")
    seen, unseen = datasets.split_classes(data.class_names, split, split_seed)
    facts = saved["data"] if own else {}
    if own and data.class_names == facts["classes"] and set(facts["seen"]) & set(unseen):
        raise ValueError(
            f"{path} was trained on classes that --split {split} calls unseen; leave --split and --split-seed out"
        )
    same_classes = own and data.class_names == facts["classes"] and seen == facts["seen"]
    if own:
        mean, std = facts["mean"], facts["std"]
    elif backbone == "resnet18":
        mean, std = model.IMAGENET
    else:
        mean, std = datasets.channel_statistics(datasets.hold_back(data.train.of(seen))[0].images)
    return Loaded(
        path,
        net.to(device),
        data,
        seen,
        unseen,
        split if split_seed is None else f"{split}, seed {split_seed}",
        mean,
        std,
        saved.get("center") if own else None,
        saved.get("commit") if own else None,
        saved["threshold"] if same_classes else None,
    )


def pick_threshold(loaded: Loaded, wanted: str) -> dict:
    """The threshold in force: a given number, the checkpoint's own, or one calibrated now. Raises ValueError."""
    if wanted != "auto":
        try:
            value = float(wanted)
        except ValueError:
            value = float("nan")
        if not -1 <= value <= 1:
            raise ValueError(f"--threshold must be auto or a number in -1..1, got {wanted}")
        return {"mode": "fixed", "value": value, "calibrated_on": None}
    if loaded.calibration is not None:
        return loaded.calibration
    _, held_back = datasets.hold_back(loaded.data.train.of(loaded.seen))
    pairs = metrics.pair_statistics(loaded.embed(held_back), held_back.labels)
    if pairs is None:
        raise ValueError("too few training images to calibrate a threshold; give --threshold a number")
    calibrated_on = f"{len(held_back)} held-back training images of {len(loaded.seen)} seen classes"
    return {"mode": "auto", "value": pairs.oracle_threshold, "calibrated_on": calibrated_on}


# ----------------------------------------------------------------------------------------------------------- measuring


def side_report(z: Tensor, labels: Tensor, threshold: float) -> tuple[dict, list[dict]] | tuple[None, list]:
    """Figures of one side's test images, seen or unseen, and one row for each class; None and [] without pairs."""
    statistics = metrics.pair_statistics(z, labels)
    if statistics is None:
        return None, []
    pairs, triplets = metrics.pair_table(z, labels, threshold), metrics.triplet_table(z, labels)
    report = {
        "triplet_accuracy": float(triplets.accuracy()),
        "pair_accuracy": float(pairs.accuracy()),
        "pair_accuracy_oracle": statistics.oracle_accuracy,
        "auc": statistics.auc,
        "eer": statistics.eer,
        "ci95": {"triplet_accuracy": metrics.bootstrap(triplets), "pair_accuracy": metrics.bootstrap(pairs)},
    }
    figures = zip(labels.unique().tolist(), triplets.per_class().tolist(), pairs.per_class().tolist(), strict=True)
    rows = [{"label": label, "triplet_accuracy": triplet, "pair_accuracy": pair} for label, triplet, pair in figures]
    return report, rows


def few_shot_report(z: Tensor, labels: Tensor) -> dict:
    """The settings of EPISODES; None where there are too few classes or images."""
    report = {}
    for name, (way, shot) in EPISODES.items():
        found = metrics.few_shot(z, labels, way or len(labels.unique()), shot)
        report[name] = None if found is None else {"accuracy": found[0], "ci95": found[1]}
    return report


def evaluate(loaded: Loaded, threshold: dict) -> dict:
    """The report of one checkpoint (its keys are documented in the README)."""
    sides, per_class = {}, []
    for name, classes in (("seen", loaded.seen), ("unseen", loaded.unseen)):
        if not classes:
            sides[name] = None
            continue
        images = loaded.data.test.of(classes)
        z = loaded.embed(images)
        sides[name], rows = side_report(z, images.labels, threshold["value"])
        if name == "unseen" and sides[name] is not None:
            score, constant = metrics.published_few_shot(z, images.labels, threshold["value"])
            extra = {"published_protocol": score, "constant_answer": constant}
            shots = datasets.few_shot_images(loaded.data, classes, loaded.split)
            sides[name] |= extra | {"few_shot": few_shot_report(loaded.embed(shots), shots.labels), "adapted": None}
            names = loaded.data.class_names
            per_class = [{"label": row["label"], "name": names[row["label"]]} | row for row in rows]
    return {
        "checkpoint": loaded.path,
        "commit": loaded.commit,
        "data": loaded.data.name,
        "split": loaded.split,
        "threshold": threshold,
        **sides,
        "per_class": per_class,
    }


# ------------------------------------------------------------------------------------------------------------ printing


def table(header: list[str], rows: list[list], decimals: int = 1) -> str:
    """Aligned columns, the first to the left; floats with `decimals`, None as a dash."""

    def text(value: object) -> str:
        return "-" if value is None else f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

    cells = [header, *([text(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1f}" if interval is None else f"{value:.1f} ({interval[0]:.1f}..{interval[1]:.1f})"


def show(report: dict) -> None:
    """Print a report as tables."""
    threshold = report["threshold"]
    how = f"calibrated on {threshold['calibrated_on']}" if threshold["calibrated_on"] else "as given"
    print(f"\n{report['checkpoint']}: {report['data']}, split {report['split']} (seen-unseen)")
    print(f"threshold {threshold['value']:.3f}, {how}; figures in percent, (..) 95 % by resampling classes\n")
    rows = []
    for name in ("seen", "unseen"):
        side = report[name]
        if side is not None:
            triplets = with_interval(side["triplet_accuracy"], side["ci95"]["triplet_accuracy"])
            pairs = with_interval(side["pair_accuracy"], side["ci95"]["pair_accuracy"])
            rows.append([name, triplets, pairs, side["pair_accuracy_oracle"], side["auc"], side["eer"]])
    adapted = report["unseen"] and report["unseen"]["adapted"]
    if adapted:
        figures = [with_interval(adapted[key], adapted["ci95"][key]) for key in ("triplet_accuracy", "pair_accuracy")]
        rows.append(["unseen, adapted (published variant)", *figures, None, None, None])
    print(table(["test images of classes", "triplets", "pairs", "best threshold", "AUC", "EER"], rows))
    if report["unseen"] is None:
        return
    show_few_shot(report)
    show_comparison(report)
    rows = [[row["label"], row["name"], row["triplet_accuracy"], row["pair_accuracy"]] for row in report["per_class"]]
    print("\n" + table(["label", "unseen class", "triplets", "pairs"], rows))


def show_few_shot(report: dict) -> None:
    rows = []
    for name, (way, shot) in EPISODES.items():
        found = report["unseen"]["few_shot"][name]
        way = way or len(report["per_class"])
        figures = ["-", "-"] if found is None else [found["accuracy"], f"+-{found['ci95']:.2f}"]
        rows.append([f"{way}-way {shot}-shot", *figures, 100 / way])
    print("\n" + table(["unseen classes", "accuracy", "95 %", "chance"], rows))


def show_comparison(report: dict) -> None:
    """Beside what others reached on the same split of CIFAR-100."""
    seen, unseen = report["seen"], report["unseen"]
    if report["data"] == "cifar100" and any(split == report["split"] for split, _ in KNOWN) and seen is not None:
        shots = unseen["few_shot"]
        pairs = [side[figure] for side in (seen, unseen) for figure in ("triplet_accuracy", "pair_accuracy")]
        ours = [*pairs, *(shots[name] and shots[name]["accuracy"] for name in ("10w1s", "5w1s", "all1s"))]
        rows = [
            ["this checkpoint", *ours],
            *([who, *row] for (split, who), row in KNOWN.items() if split == report["split"]),
        ]
        header = "|triplets seen|pairs seen|triplets unseen|pairs unseen|10-way|5-way|all-way".split("|")
        print("\n" + table(header, rows))
        print("* on unbalanced pairs, by the published protocol")
    print(
        f"\npublished few-shot protocol (one pair in {len(report['per_class'])} is of one class): "
        f'{unseen["published_protocol"]:.2f}; always answering "different": {unseen["constant_answer"]:.2f}'
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with engine.user_errors():
        if not options.checkpoints:
            raise ValueError("give at least one checkpoint")
        device = engine.pick_device(options.device)
        loaded = [load(path, options, device) for path in options.checkpoints]
        thresholds = [pick_threshold(each, options.threshold) for each in loaded]
        if options.json and not Path(options.json).absolute().parent.is_dir():
            raise ValueError(f"--json: no such folder: {Path(options.json).parent}")
    reports = []
    for each, threshold in zip(loaded, thresholds, strict=True):
        reports.append(evaluate(each, threshold))
        if options.adapt_published and reports[-1]["unseen"]:
            classes, pixels = (each.seen, each.unseen), (each.mean, each.std)
            adapted = adapt.published_variant(each.net, each.data, *classes, pixels, threshold["value"], each.center)
            reports[-1]["unseen"]["adapted"] = adapted
        show(reports[-1])
    if options.json:
        partial = Path(f"{options.json}.{os.getpid()}")
        partial.write_text(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1) + "\n")
        os.replace(partial, options.json)


if __name__ == "__main__":
    main()
