"""Evaluate checkpoints: exact pair and triplet accuracy, few-shot accuracy, and a calibrated threshold.

    python evaluate.py runs/classic/best.pt --threshold auto --json report.json --report page
    python evaluate.py resnet56.th --backbone resnet56 --data cifar100 --split 90-10 --threshold 0.2

The second form reads a bare state dict of the CIFAR ResNet family; --pixel-mean and --pixel-std give the statistics it
was trained with. Measured are the test images of seen and of unseen classes, without augmentation; metrics.py defines
the figures. To choose among recipes, `--on validation` measures held-back images instead, and validation classes in
place of the unseen ones. `--runs all_runs.zip` is the one-shot test of Omniglot's authors, in place of all others.
"""

from dataclasses import dataclass, replace
from typing import Literal

import tyro

import cli


@dataclass(frozen=True)
class NetworkOptions:
    checkpoints: tyro.conf.Positional[cli.Checkpoints]  # files of train_*.py, or state dicts
    backbone: cli.OptionalBackbone = None  # network of a bare state dict
    width: cli.Int = None  # width of a bare state dict's network, 16 by default
    pixel_mean: cli.PixelStatistics = None  # channel means (0..1) that a state dict was trained with
    pixel_std: cli.PixelStatistics = None  # its standard deviations; default: those of the training data
    mirror: Literal["auto", "yes", "no"] = "auto"  # average embeddings of image and mirror image; auto: as trained
    penultimate: cli.Float = None  # weight of the features before the last block; default: as trained
    turned: cli.Float = None  # weight of turned views in the embedding; default: as trained
    device: cli.Device = "auto"  # where the network runs; auto: on a GPU, if there is one


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    data: cli.OptionalDataSource = None  # default: what the checkpoint was trained on
    data_root: cli.Folder = "data"  # folder for downloads and caches
    image_size: cli.Int = None  # side to which pictures of a folder are scaled; default: as in training, or 32
    split: cli.OptionalSplit = None  # seen-unseen shares, 0-100: all unseen; default: what the checkpoint has seen
    split_seed: cli.Int = None  # draw the unseen classes at random; default: the checkpoint's
    runs: cli.OptionalFile = None  # measure only these runs: all_runs.zip of Omniglot's authors, zipped or not
    on: Literal["test", "validation"] = "test"  # validation: held-back images and the validation classes (--withhold)


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions:
    threshold: cli.Threshold = "auto"  # auto (calibrated on held-back training images) or a similarity in -1..1
    criterion: cli.Criterion = "balanced"  # how auto chooses: by accuracy, equal errors or false accepts (far:0.01)
    store: bool = False  # write the calibrated threshold into the checkpoint: predict.py and export.py use it


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions:
    adapt_steps: cli.Int = None  # also score episodes after this many steps on augmented views of the support images
    adapt_published: bool = False  # also score unseen classes after training 30 steps on each one's training images
    adapt_lr: float = 3e-4  # learning rate of Adam in either; as published: 0.001


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    json: cli.OptionalFile = None  # write the report to this file
    report: cli.OptionalFolder = None  # write a page with tables and figures, and the figures, into this folder


@dataclass(frozen=True)
class Options(NetworkOptions, DataOptions, ThresholdOptions, AdaptationOptions, OutputOptions):
    pass


if __name__ == "__main__":
    cli.parse(Options, __doc__)  # before PyTorch is imported, so that --help takes no seconds

import functools
import textwrap
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import adapt
import checkpoints
import data
import metrics
import model
import report
from metrics import SHARES, Side
from oneshot import Strangers
from sources import NAMED, has_files

PUBLISHED_THRESHOLDS = {"classic": 0.2, "Reptile": 0.7}  # fixed by hand
BARE = {"options": {}, "data": {"classes": [], "seen": []}, "threshold": None}  # what is known of a bare state dict


@dataclass(frozen=True)
class Loaded:
    """A network and all that its evaluation needs."""

    path: str
    net: model.Embedder
    data: data.Data
    seen: list[int]
    unseen: list[int]
    trained_on: data.Images
    split: str
    notes: list[str]  # what one should know of these classes
    saved: dict  # the checkpoint, or BARE
    calibration: dict | None  # the checkpoint's threshold, where it goes with these classes and images

    @property
    def pictures(self) -> data.Images:
        """Images of unseen classes that episodes are drawn from."""
        return data.few_shot_images(self.data, self.unseen, self.split)

    def embed(self, images: data.Images) -> Tensor:
        """Embeddings of length 1, (N, D)."""
        return normalize(model.embed(self.net, images))


# ------------------------------------------------------------------------------------------------------------- loading


load_data, load_runs = functools.cache(data.load), functools.cache(data.load_runs)  # once for several checkpoints


def load(path: str, options: Options, device: torch.device) -> Loaded:
    """A checkpoint of the training scripts, or a bare state dict. Raises ValueError or OSError."""
    saved = checkpoints.read(path)
    state, ours = checkpoints.bare_state(saved, path), checkpoints.is_ours(saved)
    saved = saved if ours else BARE
    trained, facts, own = saved["options"], saved["data"], checkpoints.settings_of(saved)
    source, backbone = options.runs or options.data or trained.get("data"), options.backbone or trained.get("backbone")
    check_options(path, ours, source, backbone, options)
    size = model.image_size(backbone, has_files(source), options.image_size, own.get("size"))
    border = round(size * own.get("border", 0) / own.get("size", size))
    loaded = (
        load_runs(Path(source), size, border) if options.runs else load_data(source, options.data_root, size, border)
    )
    names, learned = loaded.class_names, checkpoints.trained_classes(facts)
    seen, unseen, split = measured_classes(path, saved, loaded, options)
    same = bool(seen) and (loaded.name == facts.get("name") or names == facts["classes"])
    on_tests = same and facts.get("trained_on_test", False)
    parts = data.parts_of_training(loaded, seen, facts.get("validation", []) if same else [], on_tests)
    kept, held_back, validation = parts
    comparable = same and source not in NAMED and has_files(source) and size == own.get("size")
    comparable = comparable and options.on == "test" and (seen, unseen) == (facts["seen"], facts.get("unseen"))
    replaced = on_tests and options.on == "test"
    if replaced or options.on == "validation":  # images that no network was trained on
        loaded = replace(loaded, test=held_back + (loaded.test.of(unseen) if replaced else validation))
    if not seen:  # nothing was trained on, so all images are for testing
        loaded = data.Data(loaded.name, loaded.train.of([]), loaded.train + loaded.test, names)
    net = load_network(path, state, saved, backbone, options, kept, loaded.test)
    views = own.get("mirror", False), own.get("turned", 0.0), own.get("penultimate", 0.0)
    as_trained = (net.mirror, net.turned, net.penultimate) == views and net.size == own.get("size")
    shared = {*facts["classes"]} & {*names}
    missing = [name for name in facts["classes"] if shared and name not in shared]
    new = [names[label] for label in seen if ours and names[label] not in learned]
    texts = {"of the checkpoint's classes are missing here": missing, "of the seen classes were not trained on": new}
    notes = [f"{len(of)} {text}: {textwrap.shorten(', '.join(of), 100)}" for text, of in texts.items() if of]
    if options.on == "validation":
        notes.append("seen: held-back images, which the threshold is calibrated on; unseen: the validation classes")
    if replaced:
        notes.append("seen classes are measured on held-back images: their test images were trained on")
    if comparable and data.fingerprint(parts, facts) != facts.get("fingerprint"):
        notes.append("pictures came, went or changed since the training: it may have seen some that are measured here")
    if not (seen or ours or options.pixel_mean) and backbone in model.RESNETS:
        notes.append("pixels are normalised by these images' statistics, for want of --pixel-mean and --pixel-std")
    foreign = (saved["threshold"] or {}).get("data", loaded.name) != loaded.name
    calibrates = (new or foreign) and metrics.enough(held_back.labels)  # the threshold, on these images
    threshold = saved["threshold"] if as_trained and not calibrates else None
    return Loaded(path, net.to(device).eval(), loaded, seen, unseen, kept, split, notes, saved, threshold)


def check_options(path: str, ours: bool, source: str | None, backbone: str | None, options: Options) -> None:
    """Raise ValueError unless the options go with a checkpoint of ours, or a bare state dict."""
    if source is None or backbone is None:
        raise ValueError(f"{path} is a bare state dict: give --backbone and --data (and --split) with it")
    if options.store and not ours:
        raise ValueError(f"{path} is a bare state dict: --store needs a checkpoint of the training scripts")
    if ours and options.pixel_mean is not None:
        raise ValueError(f"{path} has its own pixel statistics; leave --pixel-mean and --pixel-std out")
    for option in ("penultimate", "adapt_steps", "width"):
        if getattr(options, option) and ":" in backbone:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for resnet12, resnet20 and their like; {path} is of {backbone}")
    if not (options.runs or options.data) and source not in NAMED and not Path(source).exists():
        raise ValueError(f"{path} was trained on {source}, which is not found from {Path.cwd()}; give --data PATH")


def measured_classes(path: str, saved: dict, loaded: data.Data, options: Options) -> tuple[list[int], list[int], str]:
    """Labels of the seen and the unseen classes, or of the validation classes in place of these, and the split in
    words. Raises ValueError."""
    facts, names = saved["data"], loaded.class_names
    learned = checkpoints.trained_classes(facts)
    asked = "0-100" if options.runs else options.split
    seen, unseen, split = data.pick_classes(loaded, saved["options"], facts, asked, options.split_seed)
    leaked = [names[label] for label in unseen if names[label] in learned]
    if leaked:
        why = f"{path} was trained on classes that --split {split} calls unseen ({', '.join(leaked[:5])})"
        raise ValueError(f"{why}; leave --split and --split-seed out")
    if options.adapt_published and (loaded.own_split or not seen or not unseen):
        why = "takes negatives from seen classes, and needs training images of unseen classes"
        raise ValueError(f"--adapt-published {why}; this data set or split has none")
    if options.on == "validation":
        if not facts.get("validation"):
            raise ValueError(f"--on validation: {path} has no validation classes; train with --withhold 0.1")
        if names != facts["classes"]:
            raise ValueError(f"--on validation: {path} was trained on other classes than {loaded.name} has now")
        seen, unseen, split = facts["seen"], facts["validation"], f"{split}, validation classes"
    return seen, unseen, split


def load_network(
    path: str,
    state: dict[str, Tensor],
    saved: dict,
    backbone: str,
    options: Options,
    kept: data.Images,
    test: data.Images,
) -> model.Embedder:
    """A network with the weights `state` of `path`, and the settings of the checkpoint `saved`, or BARE.

    A bare state dict is normalised by the pixel statistics of the training images `kept`, or `test` if there are none,
    unless there are others. Raises ValueError.
    """
    images = kept if len(kept) else test
    settings = checkpoints.settings_of(saved)
    if options.pixel_mean is not None:
        settings |= {"mean": options.pixel_mean, "std": options.pixel_std}
    elif "mean" not in settings:
        mean, std = model.made_for(backbone).get("pixels") or data.channel_statistics(images)
        settings |= {"mean": mean, "std": std}
    if "backbone" not in settings or options.backbone is not None or options.width is not None:
        width, input_size = options.width or saved["options"].get("width", 16), settings.get("input_size")
        settings |= {"backbone": backbone, "width": width, "input_size": input_size or options.image_size}
    settings |= {"size": images.size, "border": images.border}
    if options.mirror != "auto":
        settings["mirror"] = options.mirror == "yes"
    given = {"turned": options.turned, "penultimate": options.penultimate}
    settings |= {name: value for name, value in given.items() if value is not None}
    net, ignored = checkpoints.build_with_weights(settings, state)
    if options.penultimate and "penultimate_mean" not in state:
        if not len(kept):
            why = "lacks the statistics of these features, and there are no images of seen classes to measure them on"
            raise ValueError(f"--penultimate: {path} {why}; first add them with --store, on the data it was trained on")
        net.centre(kept)
    if isinstance(net, model.LibraryNetwork) and "mean_embedding" not in state and len(kept):
        net.centre(kept)
    if ignored:
        print(f"{path}: left out {', '.join(ignored)}")
    return net


def pick_thresholds(loaded: Loaded, options: Options) -> tuple[dict, dict[str, float]]:
    """The threshold in force, and others to show beside it, by name. Raises ValueError.

    In force is the given number, the checkpoint's own threshold if it has one by this criterion, or one calibrated now
    on the held-back training images.
    """
    held_back = data.hold_back(loaded.data.train.of(loaded.seen))[1]
    z = loaded.embed(held_back)
    criteria = dict.fromkeys(["balanced", "eer", "far:0.01", options.criterion])
    curve = metrics.roc(z, held_back.labels)
    found = {} if curve is None else metrics.calibrate(curve, z, held_back.labels, criteria)
    named = {f"auto {name}": made["value"] for name, made in found.items()}
    if loaded.data.name == "cifar100":
        named |= {f"fixed {value}": value for value in PUBLISHED_THRESHOLDS.values()}
    if options.threshold != "auto":
        value = float(options.threshold)
        unknown = dict.fromkeys(("false_accept", "false_reject", "logistic", "calibrated_on"))
        return {"mode": "fixed", "criterion": None, "value": value, **unknown}, named | {f"fixed {value}": value}
    threshold, own = found.get(options.criterion, {}), loaded.calibration or {}
    if threshold and not own and loaded.data.name != loaded.saved["data"].get("name", loaded.data.name):
        threshold["data"] = loaded.data.name  # it is not that of the training
    if own.get("criterion") == options.criterion:
        threshold = threshold | own  # which may lack the table of strangers
    if not threshold:
        why = f"{loaded.path} has no threshold by --criterion {options.criterion} for images like these"
        raise ValueError(f"{why}, and too few training images to calibrate one; give --threshold a number")
    return threshold, named | {f"auto {options.criterion}": threshold["value"]}


# ---------------------------------------------------------------------------------------------------------- the report


def make_report(
    facts: dict, threshold: dict | None, thresholds: dict[str, float], sides: dict[str, Side], names: list[str]
) -> dict:
    """The JSON report, which docs/usage.md describes; `facts`: what it says of checkpoint, data and measurement."""
    found = report.UNMEASURED | {name: side_report(side) for name, side in sides.items()}
    unseen = sides.get("unseen")
    if unseen:
        score, constant = None, None
        if facts["data"] == "cifar100":
            score, constant = published_few_shot(unseen.z, unseen.labels, threshold["value"])
        shots = few_shot_report(unseen)
        found["unseen"] |= {"published_protocol": score, "constant_answer": constant, "few_shot": shots}
    return {
        **facts,
        "threshold": threshold and {name: value for name, value in threshold.items() if name != "strangers"},
        **found,
        "thresholds": threshold_rows(sides, thresholds) if threshold else [],
        "per_class": class_rows(unseen, names) if unseen else [],
        "compared_with": None,
        "open_set": open_set_rows(sides, threshold) if unseen else [],
    }


def side_report(side: Side) -> dict:
    """Figures of one side, in percent."""
    found = {name: accuracy.value for name, accuracy in side.accuracies.items()}
    if side.curve is not None:
        found |= {"pair_accuracy_oracle": side.curve.best()[0], "auc": side.curve.auc, "eer": side.curve.eer}
    return found | {"ci95": {name: metrics.interval(accuracy.resampled) for name, accuracy in side.accuracies.items()}}


def few_shot_report(side: Side) -> dict:
    """Accuracy in each setting of metrics.FEW_SHOT, or None where there are too few classes or images."""
    found = dict.fromkeys(side.episodes)
    for name, accuracies in side.episodes.items():
        if accuracies is not None:
            mean, half = metrics.mean_interval(accuracies)
            half = half if metrics.enough(side.labels) else None
            found[name] = {"accuracy": mean, "ci95": half, "episodes": len(accuracies)}
    return found


def published_few_shot(z: Tensor, labels: Tensor, threshold: float) -> tuple[float, float]:
    """(score, score of always answering "different") by the published protocol, for comparison with its figures only.

    The support is the first image of each class, the queries are all others, and each support-query pair counts the
    same, so one pair in C is of one class.
    """
    support = torch.from_numpy(np.unique(labels, return_index=True)[1])
    query = torch.ones(len(z), dtype=torch.bool)
    query[support] = False
    same = labels[support][:, None] == labels[query]
    accepted = z[support] @ z[query].T > threshold
    return 100 * float((accepted == same).double().mean()), 100 * float((~same).double().mean())


def class_rows(side: Side, names: list[str]) -> list[dict]:
    """One row a class: its own anchors' triplets, the pairs it takes part in."""
    return [
        {"label": label, "name": names[label]}
        | {name: float(of.per_class[row]) for name, of in side.accuracies.items()}
        for row, label in enumerate(side.labels.unique().tolist())
    ]


def threshold_rows(sides: dict[str, Side], thresholds: dict[str, float]) -> list[dict]:
    """Pair accuracy by each named threshold, the best possible and a constant answer; on 1:1 and on 1:9 pairs."""
    rows = [{"name": name, "value": value} for name, value in thresholds.items()]
    best, constant = {"name": "oracle", "value": None}, {"name": "always different", "value": None}
    for name, side in sides.items():
        errors = metrics.pair_errors(side.z, side.labels, list(thresholds.values()))
        for row, accept, reject in zip(rows, *(error.tolist() for error in errors), strict=True):
            accuracies = {ratio: 100 * (1 - share * reject - (1 - share) * accept) for ratio, share in SHARES.items()}
            row[name] = accuracies | {"false_accept": 100 * accept, "false_reject": 100 * reject}
        best[name] = {ratio: side.curve.best(share)[0] for ratio, share in SHARES.items()}
        constant[name] = {ratio: 100 * (1 - share) for ratio, share in SHARES.items()}
    return [*rows, best, constant]


def open_set_rows(sides: dict[str, Side], threshold: dict) -> list[dict]:
    """Recognition with strangers among the queries, by enrolled classes and pictures of each."""
    if not threshold.get("strangers"):
        return []
    classes = {name: len(side.labels.unique()) for name, side in sides.items()}
    settings = [("unseen", min(5, classes["unseen"] // 2))]
    if "seen" in sides:
        settings += [("seen", way) for way in sorted({min(20, classes["seen"]), classes["seen"]})]
    table, rows = Strangers(threshold["strangers"]), []
    for name, way in settings:
        for shot in (1, 5):
            enrolled, others = ((side.z, side.labels) for side in (sides[name], sides["unseen"]))
            found = metrics.open_set(enrolled, others, way, shot, table, adapt=name == "unseen")
            if found:
                figures = {figure: metrics.mean_interval(values) for figure, values in found.items()}
                if not metrics.enough(sides["unseen"].labels):
                    figures = {figure: (mean, None) for figure, (mean, _) in figures.items()}
                rows.append({"enrolled": name, "classes": way, "pictures": shot, **figures})
    return rows


# ------------------------------------------------------------------------------------------------------------- running


def evaluate(
    loaded: Loaded, threshold: dict | None, thresholds: dict[str, float], options: Options
) -> tuple[dict, dict[str, Side]]:
    """The report of one checkpoint and what it was made from, by side: seen, unseen; or runs."""
    sides, measured, notes = measure(loaded, threshold)
    told = ("backbone", "width", "size", "mirror", "turned", "penultimate")
    network = {name: loaded.net.settings[name] for name in told if name in loaded.net.settings}
    network["parameters"] = sum(parameter.numel() for parameter in loaded.net.parameters())
    facts = {"checkpoint": loaded.path, "commit": loaded.saved.get("commit"), "data": loaded.data.name}
    facts |= {"split": loaded.split, "network": network, "training": training_facts(loaded.saved)}
    facts |= {"date": date.today().isoformat(), "measured": measured, "notes": notes + loaded.notes}
    made = make_report(facts, threshold, thresholds, sides, loaded.data.class_names)
    if "unseen" in sides:
        made["unseen"]["adapted"] = adapted(loaded, threshold, options)
    return made, sides


def training_facts(saved: dict) -> dict | None:
    """Steps, images, seconds and threads of a checkpoint's training, and its options except those that name places."""
    if saved is BARE:
        return None
    lengths = {name: saved.get(name) for name in ("step", "images", "seconds", "threads")}
    places = {"data", "data_root", "out", "log_dir", "device", "resume", "overwrite"}
    options = {name: value for name, value in saved["options"].items() if name not in places}
    if options.get("weights"):
        options["weights"] = Path(options["weights"]).name
    if options.get("teacher"):
        options["teacher"] = [Path(path).name for path in options["teacher"]]
    return lengths | {"options": options}


def measure(loaded: Loaded, threshold: dict | None) -> tuple[dict[str, Side], dict, list[str]]:
    """What can be measured, by side, how much it is, and the same in words. Without a threshold the data are runs."""
    test, names = loaded.data.test, loaded.data.class_names
    if threshold is None:
        runs = len({name.rpartition("/")[0] for name in names})
        side = metrics.measure_runs(test, loaded.embed(test), len(names) // runs)
        return {"runs": side}, {"runs": runs, "trials": len(names)}, []
    sides, measured, notes = {}, {}, []
    for name, classes in (("seen", loaded.seen), ("unseen", loaded.unseen)):
        images, shots = test.of(classes), None
        z = loaded.embed(images)
        if name == "unseen":
            pictures = loaded.pictures
            shots = (z if len(pictures) == len(images) else loaded.embed(pictures), pictures.labels)
        side = metrics.measure(images, z, threshold["value"], shots)
        sides |= {name: side} if side else {}
        measured[name] = {"classes": len(classes), "images": len(images)}
        too_few = "" if side or not classes else "; nothing is measured: that takes two classes, and two images of one"
        notes.append(f"{name}: {len(images)} images of {len(classes)} classes{too_few}")
    counts = loaded.pictures.labels.unique(return_counts=True)[1]
    few = [int((counts <= shot).sum()) for shot in (1, 5)]
    if any(few) and "unseen" in sides:
        notes.append(f"unseen classes with too few images for few-shot tasks: {few[0]} in 1-shot, {few[1]} in 5-shot")
    of_training, of_test = data.copies(loaded.trained_on, test.of(loaded.seen) + loaded.pictures)
    if of_training or of_test:
        notes.append(f"copies among these images: {of_training} of training images, {of_test} of each other")
    return sides, measured | {"copies": {"of_training_images": of_training, "of_test_images": of_test}}, notes


def adapted(loaded: Loaded, threshold: dict, options: Options) -> dict:
    """What the options ask to measure after adaptation; see adapt.py."""
    found, trained = {"support": None, "published": None}, loaded.saved["options"]
    if options.adapt_steps is not None:
        loss = {name: trained.get(name, default) for name, default in cli.LossOptions().triplet.items()}
        settings = (loss, options.adapt_steps, options.adapt_lr, trained.get("flip", True))
        found["support"] = adapt.SupportAdaptation(loaded.net, *settings).report(loaded.pictures)
    if options.adapt_published:
        found["published"] = adapt.published_variant(
            loaded.net, loaded.data, loaded.seen, loaded.unseen, threshold["value"], options.adapt_lr
        )
    return found


def check(options: Options) -> None:
    """Raise ValueError if the options are wrong or their files cannot be written."""
    if not options.checkpoints:
        raise ValueError("give at least one checkpoint")
    cli.check_criterion(options.criterion)
    cli.check_pixel_statistics(options.pixel_mean, options.pixel_std)
    cli.require(options, "adapt_lr")
    cli.require(options, "adapt_steps", least=1)
    cli.require(options, "image_size", least=8)
    cli.require(options, "turned", "penultimate", least=0, most=1)
    if options.threshold != "auto":
        cli.check_threshold(options.threshold)
        if options.store:
            raise ValueError("--store keeps a calibrated threshold; it does not go with --threshold NUMBER")
    if options.on == "validation" and options.adapt_published:
        raise ValueError("--adapt-published trains on the images that --on validation measures; give one of them")
    others = ("data", "split", "split_seed", "on", "threshold", "store", "adapt_steps", "adapt_published")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(options, name) != getattr(Options, name)]
    if options.runs and given:
        raise ValueError(f"--runs measures these runs alone; leave {', '.join(given)} out")
    if options.on == "validation" and (options.split or options.split_seed is not None):
        raise ValueError("--on validation measures the run's own classes; leave --split and --split-seed out")
    cli.check_output("--json", options.json, *options.checkpoints, *filter(None, (options.data, options.runs)))
    if options.report:
        if Path(options.report).exists() and not Path(options.report).is_dir():
            raise ValueError(f"--report: {options.report} is not a folder")
        Path(options.report).mkdir(parents=True, exist_ok=True)
        cli.check_output("--report", Path(options.report, "index.html"))
    for path in options.checkpoints if options.store else ():
        cli.check_output("--store", path)


def main(args: Sequence[str] | None = None) -> None:
    options = cli.parse(Options, __doc__, args)
    with cli.user_errors():
        check(options)
        device = model.pick_device(options.device)
        loaded = [load(path, options, device) for path in options.checkpoints]
        if options.adapt_steps is not None:
            for each in loaded:
                adapt.check_pictures(each.pictures.labels)
                if each.net.turned:
                    raise ValueError("--adapt-steps adapts upright views alone; give --turned 0 with it")
        thresholds = [(None, {}) if options.runs else pick_thresholds(each, options) for each in loaded]
        if options.store:
            for each, (threshold, _) in zip(loaded, thresholds, strict=True):
                measured = each.net.state_dict() if each.net.penultimate else {}  # what the checkpoint lacks
                stored = {"model": measured | each.saved["model"], "threshold": threshold, "network": each.net.settings}
                with cli.writing(each.path) as path:
                    torch.save(each.saved | stored, path)
        evaluated: list[tuple[dict, dict[str, Side], list[str]]] = []
        for each, (threshold, others) in zip(loaded, thresholds, strict=True):
            made, sides = evaluate(each, threshold, others, options)
            if evaluated:
                first, first_sides, _ = evaluated[0]
                compared = report.compare(sides, first_sides)
                if compared:
                    made["compared_with"] = {"checkpoint": first["checkpoint"]} | compared
                else:
                    made["notes"].append(f"not compared with {first['checkpoint']}: measured on other images")
            evaluated.append((made, sides, each.data.class_names))
        reports = [made for made, _, _ in evaluated]
        if options.json:  # before anything that may fail
            cli.write_json(options.json, reports if len(reports) > 1 else reports[0])
        for made in reports:
            report.show(made)
        if options.report:
            print(f"\nreport: {report.write(options.report, evaluated)}")


if __name__ == "__main__":
    main()
