"""What embeddings are worth: exact pair and triplet figures, few-shot accuracy, intervals.

Everything is a function of embeddings and labels, in percent unless a name says otherwise. Similarity is the cosine.
A pair is accepted as "same class" where its similarity is above the threshold. All pairs and all triplets count, each
once, and no (N, N) matrix is held: similarities are walked through in blocks of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 500  # of a block of similarities


def normalise(embeddings: Tensor, center: Tensor | None = None) -> Tensor:
    """Rows (N, D) of length 1, after subtracting `center` (D,) if there is one; rows of zeros stay."""
    return F.normalize(embeddings if center is None else embeddings - center)


def upper_blocks(z: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Every pair once, by blocks: similarities (pairs,), whether of one class (pairs,), labels of both (pairs,)."""
    for start in range(0, len(z), ROWS):
        rows = z[start : start + ROWS]
        similarity = rows @ z[start:].T
        first, second = torch.triu(torch.ones_like(similarity, dtype=torch.bool), 1).nonzero(as_tuple=True)
        a, b = labels[start + first], labels[start + second]
        yield similarity[first, second], a == b, a, b


# ---------------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class PairStatistics:
    """Over all pairs: area under the ROC curve, equal error rate, and the best balanced accuracy any threshold gives,
    with that threshold (a similarity: the middle of the interval of thresholds that give it)."""

    auc: float
    eer: float
    oracle_accuracy: float
    oracle_threshold: float


def pair_statistics(z: Tensor, labels: Tensor) -> PairStatistics | None:
    """Of normalised rows `z` (N, D) with `labels` (N,); None if there is no pair of one of the two kinds.

    Same-class similarities are few: they are kept, sorted. Each similarity between classes then falls on one of them or
    in a gap between two, and the counts of these 2 U + 1 slots (gap, value, gap, ..., gap) hold all figures, exactly.
    """
    same = torch.cat([similarity[of_one] for similarity, of_one, _, _ in upper_blocks(z, labels)] or [z.new_empty(0)])
    values, same_counts = same.unique(return_counts=True)
    different = torch.zeros(2 * len(values) + 1, dtype=torch.int64)
    for similarity, of_one, _, _ in upper_blocks(z, labels):
        similarity = similarity[~of_one]
        place = torch.searchsorted(values, similarity)
        on_value = values[place.clamp(max=len(values) - 1)] == similarity if len(values) else place < 0
        different += torch.bincount(2 * place + on_value.long(), minlength=len(different))
    if not len(same) or not different.sum():
        return None
    positives = torch.zeros_like(different)
    positives[1::2] = same_counts
    rejected = positives.double().cumsum(0) / len(same)  # share of same-class pairs at or below each slot
    refused = different.double().cumsum(0) / different.sum()  # of different-class pairs
    auc = float((positives.double() / len(same) * (refused - different.double() / different.sum() / 2)).sum())
    # thresholds just below a value refuse the gap under it and accept the value: none in between is better
    balanced = (1 - rejected[0::2][:-1] + refused[0::2][:-1]) / 2
    best = int(balanced.argmax())
    upper, lower = float(values[best]), float(values[best - 1]) if best else -1.0
    for similarity, of_one, _, _ in upper_blocks(z, labels):
        below = similarity[~of_one & (similarity < upper)]
        lower = max(lower, float(below.max())) if len(below) else lower
    return PairStatistics(
        100 * auc, 100 * equal_error(rejected, 1 - refused), 100 * float(balanced[best]), (lower + upper) / 2
    )


def equal_error(false_reject: Tensor, false_accept: Tensor) -> float:
    """Where the two error rates (slots,), one rising and one falling, meet; linear between slots."""
    rising = torch.cat((torch.zeros(1, dtype=torch.float64), false_reject))
    falling = torch.cat((torch.ones(1, dtype=torch.float64), false_accept))
    after = int((rising >= falling).int().argmax())
    gap_before, gap_after = falling[after - 1] - rising[after - 1], falling[after] - rising[after]
    share = gap_before / (gap_before - gap_after)
    return float(rising[after - 1] + share * (rising[after] - rising[after - 1]))


@dataclass(frozen=True)
class PairTable:
    """Pairs between each two classes: how many there are, how many are accepted; (C, C) each, symmetric, float64."""

    accepted: Tensor
    total: Tensor

    def accuracy(self, weight: Tensor | None = None) -> Tensor:
        """Balanced pair accuracy in percent; `weight` (R, C) counts each class so many times in each of R resamples."""
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
    """Of normalised rows `z` (N, D); the table's rows are the sorted labels that occur."""
    classes, index = labels.unique(return_inverse=True)
    n = len(classes)
    tables = torch.zeros(2, n * n, dtype=torch.float64)
    for similarity, _, a, b in upper_blocks(z, index):
        for table, chosen in zip(tables, (similarity > threshold, slice(None)), strict=True):
            table += torch.bincount(a[chosen] * n + b[chosen], minlength=n * n)
    tables = tables.view(2, n, n)
    tables = tables + tables.mT - torch.diag_embed(tables.diagonal(dim1=1, dim2=2))
    return PairTable(*tables)


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
    """All triplets of normalised rows `z` (N, D); one is right if the positive is more similar, so a tie is wrong."""
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
    """Triplet accuracy of normalised rows in percent: P(sim(anchor, positive) > sim(anchor, negative)), over all."""
    return float(triplet_table(z, labels).accuracy())


# ------------------------------------------------------------------------------------------------------------ intervals


def bootstrap(table: PairTable | TripletTable, resamples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a table's accuracy, resampling the classes; None if there are fewer than 3.

    Pairs share images and images share classes, so resampling pairs or images would understate the spread.
    """
    n = len(table.right if isinstance(table, TripletTable) else table.total)
    if n < 3:
        return None
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    weight = torch.zeros(resamples, n).scatter_add_(1, draws, torch.ones(resamples, n))
    accuracy = table.accuracy(weight[(weight > 0).sum(1) > 1])
    low, high = torch.quantile(accuracy, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


# ----------------------------------------------------------------------------------------------------------- few-shot


def few_shot(
    z: Tensor, labels: Tensor, way: int, shot: int, queries: int = 15, episodes: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """(accuracy, half width of its 95 % interval) of N-way K-shot classification of normalised rows `z` (N, D).

    Each query goes to the class whose normalised mean of support rows is most similar, knowing no other query.
    `queries` a class, fewer if the smallest class has fewer than shot + queries images. None if there are fewer than
    `way` classes or no query is left. The same settings give the same episodes.
    """
    classes, counts = labels.unique(return_counts=True)
    queries = min(queries, int(counts.min()) - shot)
    if len(classes) < way or queries < 1:
        return None
    generator = torch.Generator().manual_seed(seed)
    order, starts = torch.argsort(labels, stable=True), counts.cumsum(0) - counts
    slots = torch.arange(int(counts.max()))
    accuracies = []
    for size in [250] * (episodes // 250) + [episodes % 250] * (episodes % 250 > 0):
        rows = torch.rand(size, len(classes), generator=generator).topk(way).indices  # (E, way)
        chance = torch.rand(size, way, len(slots), generator=generator)
        chance -= (slots >= counts[rows][:, :, None]).float()
        draw = chance.topk(shot + queries).indices  # (E, way, shot + queries)
        images = z[order[starts[rows][:, :, None] + draw]]
        support = F.normalize(images[:, :, :shot].mean(2), dim=2)  # (E, way, D)
        similarity = torch.einsum("ewqd,evd->ewqv", images[:, :, shot:], support)
        right = similarity.argmax(3) == torch.arange(way)[:, None]
        accuracies.append(right.double().mean((1, 2)))
    accuracy = 100 * torch.cat(accuracies)
    return float(accuracy.mean()), float(1.96 * accuracy.std(correction=0) / len(accuracy) ** 0.5)


def published_few_shot(z: Tensor, labels: Tensor, threshold: float) -> tuple[float, float]:
    """(score, score of always answering "different") by the published protocol, for comparison with its figures only.

    The support is the first image of each class, the queries are all others, and each support-query pair counts alike,
    so one pair in C is of one class.
    """
    classes, index = labels.unique(return_inverse=True)
    support = torch.stack([(index == row).nonzero()[0, 0] for row in range(len(classes))])
    query = torch.ones(len(z), dtype=torch.bool)
    query[support] = False
    same = index[support][:, None] == index[query]
    accepted = z[support] @ z[query].T > threshold
    return 100 * float((accepted == same).double().mean()), 100 * float((~same).double().mean())
