"""Calibration: from similarities of held-back pairs to a decision, its expected errors and a probability."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import metrics


def check_criterion(criterion: str) -> None:
    """Raise ValueError unless it is balanced, eer, or far:RATE with a rate between 0 and 1."""
    if criterion in ("balanced", "eer"):
        return
    try:
        rate = float(criterion.removeprefix("far:")) if criterion.startswith("far:") else math.nan
    except ValueError:
        rate = math.nan
    if not 0 < rate < 1:
        raise ValueError(f"--criterion must be balanced, eer, or far:RATE such as far:0.01, got {criterion}")


def check_threshold(text: str) -> float:
    """The number that --threshold gives. Raises ValueError unless it is a similarity."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1 <= value <= 1:
        raise ValueError(f"--threshold must be auto or a number in -1..1, got {text}")
    return value


def pick(curve: metrics.Roc, criterion: str) -> tuple[float, float, float]:
    """(threshold, false accepts, false rejects in percent) by a criterion.

    balanced: the highest mean of the shares of right answers on same-class and on different-class pairs. eer: the two
    errors as near to each other as can be. far:RATE: as many same-class pairs accepted as can be while at most this
    share of different-class pairs is.
    """
    if criterion == "balanced":
        wanted = curve.false_reject + curve.false_accept
    elif criterion == "eer":
        wanted = (curve.false_reject - curve.false_accept).abs()
    else:
        too_many = curve.false_accept > float(criterion.removeprefix("far:"))
        if too_many.all():
            return 1.0, 0.0, 100.0  # only accepting none is rare enough
        wanted = curve.false_reject + too_many
    place = int(wanted.argmin())
    figures = (curve.thresholds, 100 * curve.false_accept, 100 * curve.false_reject)
    return tuple(float(figure[place]) for figure in figures)


def calibrate(z: Tensor, labels: Tensor, criterion: str = "balanced") -> dict | None:
    """What a checkpoint stores, from normalised rows `z` (N, D) of held-back images; None without both kinds of pairs.

    The threshold and how it was found, its errors in percent on the same pairs, and `logistic`: see
    `probability_same`. New classes are harder to tell apart than those of the held-back images.
    """
    curve = metrics.roc(z, labels)
    if curve is None:
        return None
    value, false_accept, false_reject = pick(curve, criterion)
    return {
        "mode": "auto",
        "criterion": criterion,
        "value": value,
        "false_accept": false_accept,
        "false_reject": false_reject,
        "logistic": fit_logistic(metrics.pair_histogram(z, labels)),
        "calibrated_on": f"{len(labels)} held-back training images of {len(labels.unique())} seen classes",
    }


def fit_logistic(histogram: Tensor) -> list[float]:
    """[slope, intercept] of Platt scaling on a `metrics.pair_histogram`, both kinds of pairs weighing the same.

    The targets lie a little inside 0 and 1, so that separable pairs have an optimum too (Platt 1999, "Probabilistic
    outputs for support vector machines", sec. 2.2).
    """
    counts = histogram.sum(1, keepdim=True)
    targets = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    targets = (targets * counts + 1) / (counts + 2)
    similarity = (torch.arange(histogram.shape[1], dtype=torch.float64) + 0.5) * 2 / histogram.shape[1] - 1
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    settings = {"tolerance_grad": 1e-10, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, **settings)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = (parameters[0] * similarity + parameters[1]).expand(2, -1)
        weight = histogram / counts
        value = F.binary_cross_entropy_with_logits(logits, targets.expand_as(logits), weight, reduction="sum")
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return parameters.detach().tolist()


def probability_same(similarity: float, logistic: list[float]) -> float:
    """Probability 0..1 that two images of this similarity are of one class, if half of all pairs are (a prior)."""
    slope, intercept = logistic
    return float(torch.sigmoid(torch.tensor(slope * similarity + intercept, dtype=torch.float64)))
