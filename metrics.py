"""Everything computed from embeddings and labels: exact pair and triplet figures, thresholds, few-shot accuracy.

Figures are in percent unless a name says otherwise. Rows `z` (N, D) have length 1, and similarity is the cosine. A pair
is accepted as "same class" if its similarity is above the threshold. All pairs and all triplets count, each once, and
no (N, N) matrix is held: similarities are computed in blocks of rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEW_SHOT = {"5w1s": (5, 1), "5w5s": (5, 5), "10w1s": (10, 1), "all1s": (None, 1)}  # way (None: all classes), shot
SHARES = {"1:1": 0.5, "1:9": 0.1}  # same-class to different-class pairs: share of the former
ROWS = 500  # of a block of similarities, at most
LOWEST = -1 - 2**-20  # just below the similarities there can be, rounding included


# ---------------------------------------------------------------------------------------------------------------- pairs


def pair_blocks(z: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Every pair of rows of `z` (N, D) once, class after class.

    Yields a class's place among the sorted labels, similarities within it (pairs,), and similarities of n of its images
    to the M images of all later classes (n, M) with the places of those classes (M,).
    """
    index = labels.unique(return_inverse=True)[1]
    order = torch.argsort(index, stable=True)
    z, index = z[order], index[order]
    start = 0
    for row, end in enumerate(torch.bincount(index).cumsum(0).tolist()):
        for first in range(start, end, ROWS):
            own = z[first : min(first + ROWS, end)]
            inside = own @ z[first:end].T
            once = torch.triu(torch.ones_like(inside, dtype=torch.bool), 1)
            yield row, inside[once], own @ z[end:].T, index[end:]
        start = end


@dataclass(frozen=True)
class Roc:
    """The errors of every threshold, exactly.

    Same-class pairs have U distinct similarities. `thresholds[k]`, just below the k-th, is the best of the thresholds
    that accept as many same-class pairs.
    """

    thresholds: Tensor  # (U,) float64, rising: midway from the next lower similarity of any pair
    false_reject: Tensor  # (U,) share 0..1 of same-class pairs that each threshold refuses
    false_accept: Tensor  # (U,) share 0..1 of different-class pairs that each threshold accepts
    auc: float  # area under the curve; pairs of equal similarity count half
    eer: float  # where the two errors meet, linear between thresholds

    def best(self, share: float = 0.5) -> tuple[float, float]:
        """(accuracy, threshold) of the most accurate threshold where `share` of the pairs are of one class."""
        accuracy = 100 * (share * (1 - self.false_reject) + (1 - share) * (1 - self.false_accept))
        place = int(accuracy.argmax())
        if accuracy[place] < 100 * (1 - share):  # refusing all is better
            return 100 * (1 - share), 1.0
        return float(accuracy[place]), float(self.thresholds[place])

    def threshold(self, criterion: str) -> tuple[float, float, float]:
        """(threshold, false accepts, false rejects in percent) by a criterion.

        balanced: the least sum of the two error rates. eer: the two rates as close to each other as possible. far:RATE:
        the fewest false rejects among thresholds with at most this rate of false accepts.
        """
        if criterion == "balanced":
            unwanted = self.false_reject + self.false_accept
        elif criterion == "eer":
            unwanted = (self.false_reject - self.false_accept).abs()
        else:
            too_many = self.false_accept > float(criterion.removeprefix("far:"))
            if too_many.all():
                return 1.0, 0.0, 100.0  # only accepting none is rare enough
            unwanted = self.false_reject + too_many
        place = int(unwanted.argmin())
        figures = (self.thresholds, 100 * self.false_accept, 100 * self.false_reject)
        return tuple(float(figure[place]) for figure in figures)


def roc(z: Tensor, labels: Tensor) -> Roc | None:
    """The errors of every threshold on rows `z` (N, D) with `labels` (N,); None without pairs of both kinds."""
    same = torch.cat([inside for _, inside, _, _ in pair_blocks(z, labels)] or [z.new_empty(0)])
    values, counts = same.unique(return_counts=True)
    below, up_to = torch.zeros(2, len(values), dtype=torch.int64)  # different-class pairs
    beneath = torch.cat((values.new_tensor([LOWEST]), values[:-1])) if len(values) else values  # next lower similarity
    total = 0
    for _, _, across, _ in pair_blocks(z, labels):
        if not across.numel():
            continue
        ordered = torch.from_numpy(np.sort(across.numpy(), axis=None))  # ten times as fast as torch's
        place = torch.searchsorted(ordered, values)
        below += place
        up_to += torch.searchsorted(ordered, values, right=True)
        beneath = torch.maximum(beneath, torch.where(place > 0, ordered[(place - 1).clamp(min=0)], LOWEST))
        total += len(ordered)
    if not len(same) or not total:
        return None
    rejected = counts.double().cumsum(0) / len(same)
    false_reject, false_accept = rejected - counts.double() / len(same), 1 - below.double() / total
    auc = float((counts * (below + up_to).double()).sum()) / (2 * len(same) * total)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    eer = equal_error(
        torch.cat((torch.stack((false_reject, rejected), 1).flatten(), one)),
        torch.cat((torch.stack((false_accept, 1 - up_to.double() / total), 1).flatten(), zero)),
    )
    thresholds = (values.double() + beneath.double()) / 2
    return Roc(thresholds, false_reject, false_accept, 100 * auc, 100 * eer)


def equal_error(false_reject: Tensor, false_accept: Tensor) -> float:
    """Where two error rates at rising thresholds, (T,) float64 each, meet; linear in between."""
    rising = torch.cat((torch.zeros(1, dtype=torch.float64), false_reject))
    falling = torch.cat((torch.ones(1, dtype=torch.float64), false_accept))
    after = int((rising >= falling).int().argmax())
    gap_before, gap_after = falling[after - 1] - rising[after - 1], falling[after] - rising[after]
    share = gap_before / (gap_before - gap_after)
    return float(rising[after - 1] + share * (rising[after] - rising[after - 1]))


def pair_errors(z: Tensor, labels: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Share 0..1 of different-class pairs that each threshold accepts (T,) float64, and of same-class pairs it refuses.

    Both kinds of pairs must exist.
    """
    counts = torch.zeros(2, len(thresholds) + 1, dtype=torch.float64)  # accepted by each, and all; different, same
    for _, inside, across, _ in pair_blocks(z, labels):
        for row, similarity in enumerate((across, inside)):
            accepted = [int((similarity > threshold).sum()) for threshold in thresholds]
            counts[row] += torch.tensor([*accepted, similarity.numel()], dtype=torch.float64)
    different, same = counts[:, :-1] / counts[:, -1:]
    return different, 1 - same


def pair_histogram(z: Tensor, labels: Tensor, bins: int = 2000) -> Tensor:
    """How many similarities of pairs lie in each of `bins` equal parts of -1..1: (2, bins) float64, different classes
    first, then same."""
    counts = torch.zeros(2, bins, dtype=torch.float64)
    for _, inside, across, _ in pair_blocks(z, labels):
        for row, similarity in enumerate((across, inside)):
            counts[row] += torch.histc(similarity.clamp(-1, 1), bins, -1, 1).double()
    return counts


@dataclass(frozen=True)
class PairTable:
    """Pairs between each two classes: how many there are, how many are accepted; (C, C) each, symmetric, float64."""

    accepted: Tensor
    total: Tensor

    def accuracy(self, weight: Tensor | None = None) -> Tensor:
        """Balanced pair accuracy in percent; `weight` (R, C): how often each class counts in each of R resamples."""
        weight = torch.ones(1, len(self.total)) if weight is None else weight
        weight = weight.double()
        accepted, total = self.accepted.diagonal(), self.total.diagonal()
        hit = (weight @ accepted) / (weight @ total)
        crossed = torch.stack([self.total - self.accepted, self.total]) * (
            1 - torch.eye(len(total), dtype=torch.float64)
        )
        refused, all_crossed = torch.einsum("rc,kcd,rd->kr", weight, crossed, weight)
        return 50 * (hit + refused / all_crossed)

    def per_class(self) -> Tensor:
        """Balanced accuracy (C,) of the pairs that each class takes part in."""
        others = self.total.sum(1) - self.total.diagonal()
        refused = others - self.accepted.sum(1) + self.accepted.diagonal()
        return 50 * (self.accepted.diagonal() / self.total.diagonal() + refused / others)


def pair_table(z: Tensor, labels: Tensor, threshold: float) -> PairTable:
    """The pairs of rows `z` (N, D) by class; the table's rows are the sorted labels that occur."""
    images = torch.bincount(labels.unique(return_inverse=True)[1]).double()
    accepted = torch.zeros(len(images), len(images), dtype=torch.float64)
    for row, inside, across, others in pair_blocks(z, labels):
        accepted[row, row] += (inside > threshold).sum()
        accepted[row].index_add_(0, others, (across > threshold).sum(0).double())
    total = torch.outer(images, images)
    total.diagonal().copy_(images * (images - 1) / 2)
    return PairTable(accepted + accepted.triu(1).T, total)


# ------------------------------------------------------------------------------------------------------------- triplets


@dataclass(frozen=True)
class TripletTable:
    """For anchors of one class and negatives of another: share of right triplets (C, C), 0..1; images a class (C,)."""

    right: Tensor
    images: Tensor

    def accuracy(self, weight: Tensor | None = None) -> Tensor:
        """Triplet accuracy in percent, averaged over anchors; `weight` as in `PairTable.accuracy`."""
        weight = torch.ones(1, len(self.images)) if weight is None else weight
        weight = weight.double() * self.images
        negatives = weight.sum(1, keepdim=True) - weight
        per_class = (weight @ self.right.T) / negatives
        anchors = torch.where((self.images > 1) & (negatives > 0), weight, 0)
        return 100 * (anchors * per_class.nan_to_num()).sum(1) / anchors.sum(1)

    def per_class(self) -> Tensor:
        """Triplet accuracy (C,) of each class's anchors."""
        return 100 * (self.right @ self.images) / (self.images.sum() - self.images)


def triplet_table(z: Tensor, labels: Tensor) -> TripletTable:
    """All triplets of rows `z` (N, D); one is right if the positive is more similar, so a tie is wrong."""
    classes, index = labels.unique(return_inverse=True)
    images = torch.bincount(index).double()
    right = torch.zeros(len(classes), len(classes), dtype=torch.float64)
    for row in range(len(classes)):
        own = index == row
        n = int(own.sum())
        if n < 2:
            continue
        similarity = z[own] @ z.T  # (n, N)
        positives = similarity[:, own][~torch.eye(n, dtype=torch.bool)].view(n, n - 1).sort().values
        negatives = similarity[:, ~own].contiguous()
        beaten = (n - 1 - torch.searchsorted(positives, negatives, right=True)).sum(0)  # (negatives,)
        right[row].index_add_(0, index[~own], beaten.double() / (n * (n - 1)))
    return TripletTable(right / images, images)


def triplet_accuracy(z: Tensor, labels: Tensor) -> float:
    """P(similarity(anchor, positive) > similarity(anchor, negative)) over all triplets, in percent."""
    return float(triplet_table(z, labels).accuracy())


# ---------------------------------------------------------------------------------------------------------- calibration


def calibrate(curve: Roc, z: Tensor, labels: Tensor, criteria: Iterable[str]) -> dict[str, dict]:
    """What a checkpoint stores, by criterion, from rows `z` (N, D) of held-back images and their ROC `curve`.

    The threshold and how it was found, its errors in percent on the same pairs, and `logistic`: see
    `probability_same`. New classes are harder to tell apart than those of the held-back images.
    """
    logistic = fit_logistic(pair_histogram(z, labels))
    source = f"{len(labels)} held-back training images of {len(labels.unique())} seen classes"
    found = {}
    for criterion in criteria:
        value, accept, reject = curve.threshold(criterion)
        found[criterion] = {"mode": "auto", "criterion": criterion, "value": value, "false_accept": accept}
        found[criterion] |= {"false_reject": reject, "logistic": logistic, "calibrated_on": source}
    return found


def fit_logistic(histogram: Tensor) -> list[float]:
    """[slope, intercept] of Platt scaling on a `pair_histogram`; both kinds of pairs have the same weight.

    The targets lie a little inside 0 and 1, so that separable pairs have an optimum too (Platt 1999, "Probabilistic
    outputs for support vector machines", sec. 2.2). By Newton's method.
    """
    counts = histogram.sum(1, keepdim=True)
    weight, targets = histogram / counts, torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    targets = (targets * counts + 1) / (counts + 2)
    similarity = (torch.arange(histogram.shape[1], dtype=torch.float64) + 0.5) * 2 / histogram.shape[1] - 1
    inputs = torch.stack((similarity, torch.ones_like(similarity)))  # (2, bins)
    parameters = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        share = torch.sigmoid(parameters @ inputs)
        slope = inputs @ (weight * (share - targets)).sum(0)
        curvature = inputs * (weight.sum(0) * share * (1 - share)) @ inputs.T
        step = torch.linalg.pinv(curvature, hermitian=True) @ slope
        parameters = parameters - step
        if step.abs().max() <= 1e-9 * parameters.abs().max():
            break
    return parameters.tolist()


def probability_same(similarity: float, logistic: list[float]) -> float:
    """Probability 0..1 that two images of this similarity are of one class, if half of all pairs are (a prior)."""
    slope, intercept = logistic
    return float(torch.sigmoid(torch.tensor(slope * similarity + intercept, dtype=torch.float64)))


# ------------------------------------------------------------------------------------------------------------ intervals


def bootstrap(
    table: PairTable | TripletTable, minus: PairTable | TripletTable | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of a table's accuracy, resampling the classes; None if there are fewer than 3.

    With `minus`, a table of the same images by another network: of the difference, in the same resamples. Pairs share
    images and images share classes, so resampling pairs or images would understate the spread.
    """
    n = len(table.right if isinstance(table, TripletTable) else table.total)
    if n < 3:
        return None
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    weight = torch.zeros(resamples, n).scatter_add_(1, draws, torch.ones(resamples, n))
    weight = weight[(weight > 0).sum(1) > 1]
    accuracy = table.accuracy(weight) if minus is None else table.accuracy(weight) - minus.accuracy(weight)
    low, high = torch.quantile(accuracy, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(values: Tensor) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of independent values (N,)."""
    return float(values.mean()), float(1.96 * values.std(correction=0) / len(values) ** 0.5)


# ----------------------------------------------------------------------------------------------------------- few-shot


def draw_episodes(
    labels: Tensor, way: int, shot: int, queries: int = 15, episodes: int = 10_000, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of episodes: places of the classes among the sorted labels (E, way), images (E, way, shot + queries).

    `queries` a class, fewer if the smallest class has fewer than shot + queries images. Nothing if there are fewer than
    `way` classes or no query is left. The same labels and settings give the same episodes.
    """
    classes, counts = labels.unique(return_counts=True)
    queries = min(queries, int(counts.min()) - shot)
    if len(classes) < way or queries < 1:
        return
    generator = torch.Generator().manual_seed(seed)
    order, starts = torch.argsort(labels, stable=True), counts.cumsum(0) - counts
    slots = torch.arange(int(counts.max()))
    for size in [250] * (episodes // 250) + [episodes % 250] * (episodes % 250 > 0):
        rows = torch.rand(size, len(classes), generator=generator).topk(way).indices  # (E, way)
        chance = torch.rand(size, way, len(slots), generator=generator)
        chance -= (slots >= counts[rows][:, :, None]).float()
        draw = chance.topk(shot + queries).indices  # (E, way, shot + queries)
        yield rows, order[starts[rows][:, :, None] + draw]


def classify(z: Tensor, images: Tensor, shot: int) -> Tensor:
    """The class, 0..way-1, of each query of episodes `images` (E, way, shot + queries) -> (E, way, queries).

    Each query goes to the class whose normalised mean of support rows is most similar, knowing no other query.
    """
    rows = z[images]  # (E, way, shot + queries, D)
    support = F.normalize(rows[:, :, :shot].mean(2), dim=2)
    return torch.einsum("ewqd,evd->ewqv", rows[:, :, shot:], support).argmax(3)


def episode_accuracies(z: Tensor, labels: Tensor, way: int, shot: int, **settings: int) -> Tensor | None:
    """Accuracy (episodes,) in each episode that `draw_episodes` gives with these settings; None if it gives none."""
    truth = torch.arange(way)[:, None]
    found = [
        (classify(z, images, shot) == truth).double().mean((1, 2))
        for _, images in draw_episodes(labels, way, shot, **settings)
    ]
    return 100 * torch.cat(found) if found else None


def few_shot(z: Tensor, labels: Tensor, way: int, shot: int, **settings: int) -> tuple[float, float] | None:
    """(accuracy, half width of its 95 % interval) of N-way K-shot classification of rows `z` (N, D)."""
    accuracies = episode_accuracies(z, labels, way, shot, **settings)
    return None if accuracies is None else mean_interval(accuracies)


# --------------------------------------------------------------------------------------------------------- one side


@dataclass(frozen=True)
class Side:
    """Test images of the seen or the unseen classes, and their measurements at one threshold."""

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,)
    z: Tensor  # (N, D) embeddings of length 1
    curve: Roc
    pairs: PairTable
    triplets: TripletTable
    episodes: dict[str, Tensor | None]  # accuracies (episodes,) in the settings of FEW_SHOT; empty for seen classes


def measure(
    images: Tensor, labels: Tensor, z: Tensor, threshold: float, shots: tuple[Tensor, Tensor] | None = None
) -> Side | None:
    """A `Side`; None unless there are pairs of both kinds.

    `shots`: embeddings (N, D) and labels (N,) of the images that episodes are drawn from, if any are.
    """
    curve = roc(z, labels)
    if curve is None:
        return None
    episodes = {}
    if shots is not None:
        for name, (way, shot) in FEW_SHOT.items():
            episodes[name] = episode_accuracies(*shots, way or len(labels.unique()), shot)
    pairs, triplets = pair_table(z, labels, threshold), triplet_table(z, labels)
    return Side(images, labels, z, curve, pairs, triplets, episodes)
