"""The report of one checkpoint, from embeddings of test images; its keys are explained in `evaluation_report`."""

from dataclasses import dataclass

import torch
from torch import Tensor

import metrics
from data import Images

EPISODES = {"5w1s": (5, 1), "5w5s": (5, 5), "10w1s": (10, 1), "all1s": (None, 1)}  # way (None: all classes), shot
PUBLISHED_THRESHOLDS = {"classic": 0.2, "Reptile": 0.7}  # fixed by hand
SHARES = {"1:1": 0.5, "1:9": 0.1}  # same-class pairs to different-class pairs: share of the former


@dataclass(frozen=True)
class Side:
    """Test images of the seen or of the unseen classes, and what is measured of them at one threshold."""

    images: Images
    z: Tensor  # (N, D) normalised embeddings
    curve: metrics.Roc
    pairs: metrics.PairTable
    triplets: metrics.TripletTable
    episodes: dict[str, Tensor | None]  # accuracies (episodes,) in the settings of EPISODES; empty for seen classes


def measure(images: Images, z: Tensor, threshold: float, shots: tuple[Tensor, Tensor] | None = None) -> Side | None:
    """None where there are no pairs of one class, or none of two.

    `shots`: normalised embeddings (N, D) and labels (N,) of the images that episodes are drawn from, if any are.
    """
    labels = images.labels
    curve = metrics.roc(z, labels)
    if curve is None:
        return None
    episodes = {}
    if shots is not None:
        for name, (way, shot) in EPISODES.items():
            episodes[name] = metrics.episode_accuracies(*shots, way or len(labels.unique()), shot)
    pairs, triplets = metrics.pair_table(z, labels, threshold), metrics.triplet_table(z, labels)
    return Side(images, z, curve, pairs, triplets, episodes)


def side_report(side: Side) -> dict:
    """Figures of one side, in percent."""
    tables = {"triplet_accuracy": side.triplets, "pair_accuracy": side.pairs}
    return {
        **{name: float(table.accuracy()) for name, table in tables.items()},
        "pair_accuracy_oracle": side.curve.best()[0],
        "auc": side.curve.auc,
        "eer": side.curve.eer,
        "ci95": {name: metrics.bootstrap(table) for name, table in tables.items()},
    }


def unseen_report(side: Side, threshold: float) -> dict:
    """What is measured on unseen classes only."""
    score, constant = metrics.published_few_shot(side.z, side.images.labels, threshold)
    few_shot = {}
    for name, accuracies in side.episodes.items():
        figures = (None, None) if accuracies is None else metrics.mean_interval(accuracies)
        few_shot[name] = None if accuracies is None else {"accuracy": figures[0], "ci95": figures[1]}
    adapted = {"support": None, "published": None}
    return {"published_protocol": score, "constant_answer": constant, "few_shot": few_shot, "adapted": adapted}


def class_rows(side: Side, names: list[str]) -> list[dict]:
    """One row a class: its own anchors' triplets, the pairs it takes part in."""
    labels = side.images.labels.unique().tolist()
    figures = zip(labels, side.triplets.per_class().tolist(), side.pairs.per_class().tolist(), strict=True)
    return [
        {"label": label, "name": names[label], "triplet_accuracy": triplet, "pair_accuracy": pair}
        for label, triplet, pair in figures
    ]


def threshold_rows(sides: dict[str, Side | None], thresholds: dict[str, float]) -> list[dict]:
    """Pair accuracy by each named threshold, the best possible and a constant answer; on 1:1 and on 1:9 pairs."""
    rows = [{"name": name, "value": value} for name, value in thresholds.items()]
    best, constant = {"name": "oracle", "value": None}, {"name": "always different", "value": None}
    for name, side in sides.items():
        if side is None:
            continue
        errors = metrics.pair_errors(side.z, side.images.labels, list(thresholds.values()))
        for row, accept, reject in zip(rows, *(error.tolist() for error in errors), strict=True):
            accuracies = {ratio: 100 * (1 - share * reject - (1 - share) * accept) for ratio, share in SHARES.items()}
            row[name] = accuracies | {"false_accept": 100 * accept, "false_reject": 100 * reject}
        best[name] = {ratio: side.curve.best(share)[0] for ratio, share in SHARES.items()}
        constant[name] = {ratio: 100 * (1 - share) for ratio, share in SHARES.items()}
    return [*rows, best, constant]


def evaluation_report(
    facts: dict, threshold: dict, thresholds: dict[str, float], sides: dict[str, Side | None], names: list[str]
) -> dict:
    """The JSON report; figures in percent unless a name says otherwise.

    `facts`: checkpoint, commit, data, split, training. threshold: the one in force, with its criterion and, where it
    was calibrated, its errors on the images it was calibrated on. seen, unseen: null or the figures of the test images
    of these classes, ci95 by resampling classes; few_shot: by way and shot, with half the width of the 95 % interval.
    adapted: where asked for, few-shot accuracy with and without adaptation to the support images of the same episodes
    (adapt.SupportAdaptation.report), and figures by the published way of adapting (adapt.published_variant).
    thresholds: other thresholds beside it, on pairs of which one in two, or one in ten, is of one class. per_class:
    the unseen classes. compared_with: see `compare`; null where there is one checkpoint.
    """
    found = {name: None if side is None else side_report(side) for name, side in sides.items()}
    unseen = sides["unseen"]
    if unseen is not None:
        found["unseen"] |= unseen_report(unseen, threshold["value"])
    return {
        **facts,
        "threshold": threshold,
        **found,
        "thresholds": threshold_rows(sides, thresholds),
        "per_class": [] if unseen is None else class_rows(unseen, names),
        "compared_with": None,
    }


def comparable(a: dict[str, Side | None], b: dict[str, Side | None]) -> bool:
    """Were both measured on the same images?"""
    return all(
        (a[name] is None) == (b[name] is None)
        and (a[name] is None or torch.equal(a[name].images.images, b[name].images.images))
        and (a[name] is None or torch.equal(a[name].images.labels, b[name].images.labels))
        for name in a
    )


def compare(sides: dict[str, Side | None], other: dict[str, Side | None]) -> dict:
    """Figures of `sides` minus those of `other`, in points, with 95 % intervals of the differences, (low, high).

    Paired: both sets of figures are taken on the same resamples of the classes, and on the same episodes.
    """
    found = {}
    for name, side in sides.items():
        if side is None:
            found[name] = None
            continue
        tables = {
            "triplet_accuracy": (side.triplets, other[name].triplets),
            "pair_accuracy": (side.pairs, other[name].pairs),
        }
        rows = {
            figure: {"difference": float(a.accuracy() - b.accuracy()), "ci95": metrics.bootstrap(a, b)}
            for figure, (a, b) in tables.items()
        }
        for setting, accuracies in side.episodes.items():
            if accuracies is not None:
                mean, half = metrics.mean_interval(accuracies - other[name].episodes[setting])
                rows[setting] = {"difference": mean, "ci95": (mean - half, mean + half)}
        found[name] = rows
    return found
