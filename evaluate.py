"""What checkpoints are worth: exact pair and triplet figures, few-shot accuracy, all with a calibrated threshold.

    python evaluate.py runs/classic/best.pt --threshold auto --json report.json --report page
    python evaluate.py resnet56.th --backbone resnet56 --data cifar100 --split 90-10 --threshold 0.2

The second form reads a bare state dict of the CIFAR ResNet family. Test images only, without augmentation; seen and
unseen classes apart. metrics.py defines the figures. To choose among recipes, `--on validation` measures held-back
images instead, and validation classes in place of the unseen ones.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

import adapt
import calibration
import data as datasets
import engine
import measure
import metrics
import model
import report as report_page
import tables
from measure import Side


@dataclass(frozen=True)
class Options:
    checkpoints: tyro.conf.Positional[tuple[str, ...]]  # files of train_*.py, or state dicts of CIFAR ResNets
    on: Literal["test", "validation"] = "test"  # validation: held-back images, and the validation classes (--withhold)
    threshold: str = "auto"  # auto (calibrated on held-back training images) or a similarity in -1..1
    criterion: str = "balanced"  # of auto: balanced (accuracy), eer, or far:RATE, a rate of false accepts (far:0.01)
    store: bool = False  # write the calibrated threshold into the checkpoint: predict.py and export.py use it
    json: str | None = None  # write the report to this file
    report: str | None = None  # write a page with tables and figures, and the figures, into this folder
    adapt_steps: int | None = None  # also score episodes after so many steps on augmented views of the support images
    adapt_published: bool = False  # also score unseen classes after training 30 steps on each one's training images
    adapt_lr: float = 3e-4  # of Adam in the steps of either; as published: 0.001
    data: str | None = None  # cifar100, glyphs, an .npz file or a folder; by default what the checkpoint was trained on
    data_root: str = "data"  # folder for downloads and caches
    image_size: int | None = None  # side to which pictures of a folder are scaled; by default as trained, or 32
    split: str | None = None  # by default the checkpoint's, or 90-10
    split_seed: int | None = None  # by default the checkpoint's
    backbone: str | None = None  # of a bare state dict
    width: int | None = None  # of a bare state dict, 16 by default
    mirror: Literal["auto", "yes", "no"] = "auto"  # average embeddings of image and mirror image; auto: as trained
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
    training: dict | None  # how long it was trained, and with which options
    calibration: dict | None  # the checkpoint's threshold, where it goes with these classes
    triplet: dict  # keyword arguments of the loss it was trained with; of a bare state dict, the default ones

    @property
    def pictures(self) -> datasets.Images:
        """Images of unseen classes that episodes are drawn from."""
        return datasets.few_shot_images(self.data, self.unseen, self.split)

    def embed(self, images: datasets.Images) -> Tensor:
        """Normalised embeddings (N, D)."""
        return metrics.normalise(model.embed(self.net, images.images, self.mean, self.std), self.center)


# ------------------------------------------------------------------------------------------------------------ loading


load_data = functools.cache(datasets.load)  # for several checkpoints, once


def load(path: str, options: Options, device: torch.device) -> Loaded:
    """A checkpoint of the training scripts, or a bare state dict. Raises ValueError or OSError."""
    saved = engine.load_checkpoint(path)
    own = {"model", "options", "data"} <= saved.keys()
    trained = saved["options"] if own else {}
    source = options.data or trained.get("data")
    backbone = options.backbone or trained.get("backbone")
    if source is None or backbone is None:
        raise ValueError(f"{path} is a bare state dict: give --backbone and --data (and --split) with it")
    data = load_data(source, options.data_root, options.image_size or trained.get("image_size", 32))
    net, as_trained = load_network(saved, path, backbone, options, data.train.images.shape[2])
    split = options.split or trained.get("split", "90-10")
    split_seed = options.split_seed if options.split_seed is not None else trained.get("split_seed")
    seen, unseen = datasets.split_classes(data.class_names, split, split_seed)
    facts = saved["data"] if own else {}
    as_trained = as_trained and data.train.images.shape[2] == facts.get("size")
    validation = facts.get("validation", [])
    if own and data.class_names == facts["classes"] and set(validation) < set(seen):
        seen = [label for label in seen if label not in validation]
    if own and data.class_names == facts["classes"] and set(facts["seen"]) & set(unseen):
        raise ValueError(
            f"{path} was trained on classes that --split {split} calls unseen; leave --split and --split-seed out"
        )
    if options.on == "validation":
        if not validation or data.class_names != facts["classes"]:
            raise ValueError(
                f"--on validation: {path} has no validation classes in this data; train with --withhold 0.1"
            )
        seen, unseen, split = facts["seen"], validation, f"{split}, validation classes"
        data = datasets.for_choosing(data, seen, validation)
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
        training_facts(saved) if own else None,
        saved["threshold"] if same_classes and as_trained else None,
        {name: trained.get(name, default) for name, default in engine.Options().triplet.items()},
    )


def training_facts(saved: dict) -> dict:
    """Steps, images, seconds and threads of a checkpoint's training, and its options but for where it was."""
    lengths = {name: saved.get(name) for name in ("step", "images", "seconds", "threads")}
    places = {"data", "data_root", "out", "log_dir", "device", "resume", "overwrite"}
    options = {name: value for name, value in saved["options"].items() if name not in places}
    if options.get("weights"):
        options["weights"] = Path(options["weights"]).name
    return lengths | {"options": options}


def load_network(saved: dict, path: str, backbone: str, options: Options, side: int) -> tuple[model.Embedder, bool]:
    """The network of `path`, and whether it averages over mirror images or not as it was trained to.

    `side`: of the images, in pixels. Raises ValueError.
    """
    state = model.bare_state(saved, path)
    network = saved.get("network") if options.backbone is None and options.width is None else None
    width = options.width or saved.get("options", {}).get("width", 16)
    network = network or model.fit(backbone, width, side, state)
    trained = network.get("mirror", False)
    mirror = trained if options.mirror == "auto" else options.mirror == "yes"
    net = model.build(**network | {"mirror": mirror})
    ignored = model.load_weights(net, state)
    if ignored:
        print(f"{path}: left out {', '.join(ignored)}")
    return net, mirror == trained


def pick_thresholds(loaded: Loaded, options: Options) -> tuple[dict, dict[str, float]]:
    """The threshold in force, and others to show beside it, by name. Raises ValueError.

    In force is the given number, the checkpoint's own threshold where it has one by this criterion, or one calibrated
    now on the training images held back.
    """
    held_back = datasets.hold_back(loaded.data.train.of(loaded.seen))[1]
    z = loaded.embed(held_back)
    criteria = dict.fromkeys(["balanced", "eer", "far:0.01", options.criterion])
    found = {name: calibration.calibrate(z, held_back.labels, name) for name in criteria}
    named = {f"auto {name}": made["value"] for name, made in found.items() if made is not None}
    named |= {f"fixed {value}": value for value in measure.PUBLISHED_THRESHOLDS.values()}
    if options.threshold == "auto":
        stored = loaded.calibration
        threshold = stored if stored and stored.get("criterion") == options.criterion else found[options.criterion]
        if threshold is None:
            raise ValueError("too few training images to calibrate a threshold; give --threshold a number")
        return threshold, named | {f"auto {options.criterion}": threshold["value"]}
    value = float(options.threshold)
    unknown = dict.fromkeys(("false_accept", "false_reject", "logistic", "calibrated_on"))
    return {"mode": "fixed", "criterion": None, "value": value, **unknown}, named | {f"fixed {value}": value}


def store(loaded: Loaded, threshold: dict) -> None:
    """Put what predict.py and export.py need into a checkpoint. Raises ValueError or OSError."""
    saved = engine.load_checkpoint(loaded.path)
    if "threshold" not in saved:
        raise ValueError(f"{loaded.path} is a bare state dict: --store needs a checkpoint of the training scripts")
    facts = saved["data"] | {"size": loaded.data.test.images.shape[2]}
    kept = {"threshold": threshold, "data": facts, "network": loaded.net.settings}
    engine.save_checkpoint(Path(loaded.path), saved | kept)


# ------------------------------------------------------------------------------------------------------------- running


def evaluate(
    loaded: Loaded, threshold: dict, thresholds: dict[str, float], options: Options
) -> tuple[dict, dict[str, Side | None]]:
    """The report of one checkpoint and what it was made from, by side: seen, unseen."""
    sides = {}
    for name, classes in (("seen", loaded.seen), ("unseen", loaded.unseen)):
        images = loaded.data.test.of(classes)
        z = loaded.embed(images)
        shots = None
        if name == "unseen":
            pictures = loaded.pictures
            shots = (z if len(pictures) == len(images) else loaded.embed(pictures), pictures.labels)
        sides[name] = measure.measure(images, z, threshold["value"], shots)
    facts = {"checkpoint": loaded.path, "commit": loaded.commit, "data": loaded.data.name, "split": loaded.split}
    facts |= {"training": loaded.training}
    report = measure.evaluation_report(facts, threshold, thresholds, sides, loaded.data.class_names)
    if report["unseen"]:
        report["unseen"]["adapted"] = adapted(loaded, threshold, options)
    return report, sides


def adapted(loaded: Loaded, threshold: dict, options: Options) -> dict:
    """What is measured after adaptation, as far as the options ask for it; see adapt.py."""
    pixels, found = (loaded.mean, loaded.std), {"support": None, "published": None}
    if options.adapt_steps is not None:
        settings = pixels, loaded.center, loaded.triplet, options.adapt_steps, options.adapt_lr
        found["support"] = adapt.SupportAdaptation(loaded.net, *settings).report(loaded.pictures, adapt.EPISODES)
    if options.adapt_published:
        classes, settings = (loaded.seen, loaded.unseen), (threshold["value"], options.adapt_lr, loaded.center)
        found["published"] = adapt.published_variant(loaded.net, loaded.data, *classes, pixels, *settings)
    return found


def check(options: Options) -> None:
    """Raise ValueError if the options are wrong or their files cannot be written."""
    if not options.checkpoints:
        raise ValueError("give at least one checkpoint")
    calibration.check_criterion(options.criterion)
    engine.require(options, "adapt_lr")
    if options.adapt_steps is not None:
        engine.require(options, "adapt_steps", least=1)
    if options.image_size is not None:
        engine.require(options, "image_size", least=8)
    if options.threshold != "auto":
        calibration.check_threshold(options.threshold)
    if options.on == "validation" and options.adapt_published:
        raise ValueError("--adapt-published trains on the images that --on validation measures; give one of them")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(f"--json: no such folder: {Path(options.json).parent}")
    if options.report and Path(options.report).exists() and not Path(options.report).is_dir():
        raise ValueError(f"--report: {options.report} is not a folder")
    if options.store and options.threshold != "auto":
        raise ValueError("--store keeps a calibrated threshold; it does not go with --threshold NUMBER")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with engine.user_errors():
        check(options)
        device = engine.pick_device(options.device)
        loaded = [load(path, options, device) for path in options.checkpoints]
        if options.adapt_steps is not None:
            for each in loaded:
                adapt.check_pictures(each.pictures.labels)
        thresholds = [pick_thresholds(each, options) for each in loaded]
        if options.store:
            for each, (threshold, _) in zip(loaded, thresholds, strict=True):
                store(each, threshold)
    reports, first = [], None
    for each, (threshold, others) in zip(loaded, thresholds, strict=True):
        report, sides = evaluate(each, threshold, others, options)
        tables.show(report)
        first = first or sides
        if reports and measure.comparable(sides, first):
            report["compared_with"] = {"checkpoint": reports[0]["checkpoint"]} | measure.compare(sides, first)
            tables.show_comparison(report)
        elif reports:
            print(f"\nnot compared with {reports[0]['checkpoint']}: measured on other images")
        reports.append(report)
        if options.report:
            folder = Path(options.report, *([str(len(reports))] if len(loaded) > 1 else []))
            print(f"\nreport: {report_page.write(folder, report, sides, each.data.class_names)}")
    if options.json:
        with engine.writing(options.json) as file:
            file.write_text(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
