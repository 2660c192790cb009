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

from data import Sampler
from oneshot import STRANGERS, Strangers
from sources import Images

FEW_SHOT = {"5w1s": (5, 1), "5w5s": (5, 5), "10w1s": (10, 1), "20w1s": (20, 1), "20w5s": (20, 5)}  # way, shot
FEW_SHOT |= {"all1s": (None, 1)}  # all classes
SHARES = {"1:1": 0.5, "1:9": 0.1}  # same-class to different-class pairs: share of the former
ROWS = 500  # of a block of similarities
LOWEST = -1 - 2**-20  # just below the similarities there can be, rounding included
SORTED = 100_000_000  # pairs whose similarities are sorted for a ROC curve; more are counted on a grid
GRID = 2**21  # steps of that grid from 0 to 1, hardly coarser than the rounding errors of the similarities
FEW_POSITIVES = 40  # comparing with each of so many is faster than a binary search
LEAST = (5, 10)  # classes and images: an interval from fewer says nothing
CELLS = 40_000_000  # numbers in a batch of episodes
FALSE_ALARMS = (0.01, 0.1)  # shares of strangers that get a name, at which open-set recognition is measured
NAMED = (0.05, 0.1)  # shares that are asked for
STRANGER_CLASSES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 3000, 10_000]
STRANGER_RATES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
COMPARISONS = 1_500_000_000  # of queries with classes, in all episodes of a setting


# ---------------------------------------------------------------------------------------------------------------- pairs


def pair_blocks(z: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities of all pairs of rows of `z` (N, D), each once, in blocks: of one class (P,), of two classes (Q,).

    Rounding takes some beyond 1, where no threshold may be; they count as 1.
    """
    order = torch.argsort(labels, stable=True)
    z, labels = z[order], labels[order]
    for first in range(0, len(z), ROWS):
        own, classes = z[first : first + ROWS], labels[first : first + ROWS]
        end = int(torch.searchsorted(labels, classes[-1], right=True))  # from here on all are of later classes
        near = (own @ z[first:end].T).clamp_(-1, 1)
        once = torch.ones_like(near, dtype=torch.bool).triu(1)
        same = classes[:, None] == labels[first:end]
        yield near[same & once], torch.cat((near[~same & once], (own @ z[end:].T).clamp_(-1, 1).flatten()))


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
        return float(accuracy[place]), max(-1.0, float(self.thresholds[place]))

    def threshold(self, criterion: str) -> dict[str, float]:
        """The `value` of the threshold by a criterion, its `false_accept` and `false_reject` in percent.

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
                return {"value": 1.0, "false_accept": 0.0, "false_reject": 100.0}  # only accepting none is rare enough
            unwanted = self.false_reject + too_many
        place = int(unwanted.argmin())
        accept, reject = 100 * float(self.false_accept[place]), 100 * float(self.false_reject[place])
        return {"value": max(-1.0, float(self.thresholds[place])), "false_accept": accept, "false_reject": reject}


def roc(z: Tensor, labels: Tensor) -> Roc | None:
    """The errors of every threshold on rows `z` (N, D) with `labels` (N,); None without pairs of both kinds.

    With more than SORTED pairs, similarities are rounded to multiples of 1 / GRID.
    """
    images = labels.unique(return_counts=True)[1]
    same = int((images * (images - 1)).sum()) // 2
    different = len(z) * (len(z) - 1) // 2 - same
    if not same or not different:
        return None
    count = count_sorted if same + different <= SORTED else count_on_grid
    values, counts, below, up_to, beneath = count(z, labels)
    rejected = counts.double().cumsum(0) / same
    false_reject, false_accept = rejected - counts.double() / same, (different - below).double() / different
    auc = float((counts * (below + up_to).double()).sum()) / (2 * same * different)
    accepted = torch.stack((false_accept, (different - up_to).double() / different), 1).flatten()
    rising = np.r_[0, torch.stack((false_reject, rejected), 1).flatten(), 1]
    falling = np.r_[1, accepted, 0]
    eer = float(np.interp(0, rising - falling, rising))  # where the two errors meet, linear in between
    thresholds = (values.double() + beneath.double()) / 2
    return Roc(thresholds, false_reject, false_accept, 100 * auc, 100 * eer)


def count_sorted(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The distinct similarities of same-class pairs, rising, (U,); how many such pairs have each; how many
    different-class pairs lie below it, and up to it; the next lower similarity of any pair.
    """
    values, counts = torch.cat([inside for inside, _ in pair_blocks(z, labels)]).unique(return_counts=True)
    below, up_to = torch.zeros(2, len(values), dtype=torch.int64)
    lowest = values.new_tensor([LOWEST])
    beneath = torch.cat((lowest, values[:-1]))
    for _, across in pair_blocks(z, labels):
        ordered = torch.cat((lowest, across))
        ordered.numpy().sort()  # ten times as fast as torch's
        place = torch.searchsorted(ordered, values) - 1  # `lowest` does not count
        below += place
        up_to += torch.searchsorted(ordered, values, right=True) - 1
        beneath = torch.maximum(beneath, ordered[place])
    return values, counts, below, up_to, beneath


def count_on_grid(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `count_sorted`, of similarities rounded to multiples of 1 / GRID: the memory does not grow with the pairs."""
    counts = torch.zeros(2, 2 * GRID + 1, dtype=torch.int64)  # different, same
    for inside, across in pair_blocks(z, labels):
        for row, similarity in enumerate((across, inside)):
            step = similarity.mul_(GRID).add_(GRID).round_().clamp_(0, 2 * GRID).int()
            counts[row] += torch.bincount(step, minlength=2 * GRID + 1)
    different, same = counts
    steps = same.nonzero()[:, 0]
    taken = torch.cat((torch.tensor([-2]), counts.sum(0).nonzero()[:, 0]))  # -2 is the step of LOWEST
    beneath = taken[torch.searchsorted(taken, steps) - 1]
    up_to = different.cumsum(0)[steps]
    return steps.double() / GRID - 1, same[steps], up_to - different[steps], up_to, beneath.double() / GRID - 1


def pair_errors(z: Tensor, labels: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Share 0..1 of different-class pairs that each threshold accepts (T,) float64, and of same-class pairs it refuses.

    Both kinds of pairs must exist.
    """
    counts = torch.zeros(2, len(thresholds) + 1, dtype=torch.float64)  # accepted by each, and all; different, same
    for inside, across in pair_blocks(z, labels):
        for row, similarity in enumerate((across, inside)):
            accepted = [torch.count_nonzero(similarity > threshold) for threshold in thresholds]
            counts[row] += torch.tensor([*accepted, len(similarity)], dtype=torch.float64)
    different, same = counts[:, :-1] / counts[:, -1:]
    return different, 1 - same


def pair_histogram(z: Tensor, labels: Tensor, bins: int = 2000) -> Tensor:
    """How many similarities of pairs lie in each of `bins` equal parts of -1..1: (2, bins) float64, different classes
    first, then same."""
    counts = torch.zeros(2, bins, dtype=torch.float64)
    for inside, across in pair_blocks(z, labels):
        for row, similarity in enumerate((across, inside)):
            counts[row] += torch.histc(similarity, bins, -1, 1).double()
    return counts


# ----------------------------------------------------------------------------------------------------------- accuracies


@dataclass(frozen=True)
class Accuracy:
    """An accuracy, or an error, in percent."""

    value: float
    per_class: Tensor  # (C,) float64, by sorted label; NaN for a class of one image; or of each run
    resampled: Tensor  # (R,) float64, in resamples of the classes or runs


def accuracies(z: Tensor, labels: Tensor, threshold: float, weight: Tensor | None = None) -> dict[str, Accuracy]:
    """triplet_accuracy of all triplets of rows `z` (N, D), averaged over anchors; balanced pair_accuracy of all pairs.

    A class has the triplets of its anchors, and the pairs it takes part in. A tie is wrong. `weight` (R, C): how often
    each class counts in each of R resamples; copies of a class are not compared with each other.
    """
    index = labels.unique(return_inverse=True)[1]
    order = torch.argsort(index, stable=True)
    images = torch.bincount(index).double()  # (C,)
    weight = torch.cat((torch.ones(1, len(images)), torch.empty(0, len(images)) if weight is None else weight)).double()
    shown = weight * images  # (1 + R, C): images of each class, in the data and in each resample
    everything = shown.sum(1, keepdim=True)
    own, crossed, right = torch.zeros(3, len(images), dtype=torch.float64)
    all_crossed, all_right = torch.zeros(2, len(shown), dtype=torch.float64)
    for rows, accepted, beaten in class_blocks(z[order], index[order], threshold):
        n, place = images[rows], torch.arange(len(images))[rows, None]
        own[rows] += accepted.gather(1, place)[:, 0]
        accepted.scatter_(1, place, 0)
        crossed[rows] += accepted.sum(1)
        all_crossed += (weight[:, rows] * (weight @ accepted.T)).sum(1)
        shares = beaten / (n * (n - 1)).clamp(min=1)[:, None]  # summed over negatives
        right[rows] += shares.sum(1)
        per_anchor = (weight @ shares.T) / (everything - shown[:, rows])
        all_right += (shown[:, rows] * per_anchor.nan_to_num()).sum(1)
    anchors = torch.where((images > 1) & (everything > shown), shown, 0).sum(1)
    pairs, others = images * (images - 1), len(z) - images
    all_pairs = everything[:, 0].square() - shown.square().sum(1)
    refused, all_refused = images * others - crossed, all_pairs - all_crossed
    found = {
        "triplet_accuracy": (100 * all_right / anchors, torch.where(images > 1, 100 * right / others, torch.nan)),
        "pair_accuracy": (
            50 * ((weight @ own) / (weight @ pairs) + all_refused / all_pairs),
            50 * (own / pairs + refused / (images * others)),
        ),
    }
    return {name: Accuracy(float(of_all[0]), of_each, of_all[1:]) for name, (of_all, of_each) in found.items()}


def class_blocks(z: Tensor, index: Tensor, threshold: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Counts for blocks of rows of `z` (N, D), sorted by class, `index` (N,).

    Yields the c classes of a block's rows and, for these and each of all classes, (c, C) float64: accepted pairs of a
    row and an image of the class, and right triplets of a row as the anchor and a negative of the class.
    """
    starts = [0, *torch.bincount(index).cumsum(0).tolist()]
    for first in range(0, len(z), ROWS):
        similarity = (z[first : first + ROWS] @ z.T).clamp_(-1, 1)
        similarity[:, first:].fill_diagonal_(LOWEST)  # not a pair
        low, high = int(index[first]), int(index[first : first + ROWS][-1]) + 1
        accepted, beaten = torch.zeros(2, high - low, len(starts) - 1, dtype=torch.float64)
        for row in range(low, high):
            start, end = starts[row], starts[row + 1]
            anchors = similarity[max(start - first, 0) : end - first]
            positives = anchors[:, start:end].sort().values[:, 1:]
            accepted[row - low].index_add_(0, index, (anchors > threshold).sum(0).double())
            beaten[row - low].index_add_(0, index, less_similar(anchors, positives).double())
            beaten[row - low, row] = 0
        yield slice(low, high), accepted, beaten


def less_similar(similarity: Tensor, positives: Tensor) -> Tensor:
    """How many of the positives (n, P) of its row, rising, each similarity (n, M) is below, summed over rows: (M,)."""
    if positives.shape[1] > FEW_POSITIVES:
        above = torch.searchsorted(positives.contiguous(), similarity, right=True, out_int32=True)
        return (positives.shape[1] - above).sum(0)
    counts = torch.zeros(similarity.shape, dtype=torch.uint8)
    for positive in positives.T:
        counts += (similarity < positive[:, None]).view(torch.uint8)
    return counts.sum(0)


# ---------------------------------------------------------------------------------------------------------- calibration


def calibrate(curve: Roc, z: Tensor, labels: Tensor, criteria: Iterable[str]) -> dict[str, dict]:
    """What a checkpoint stores, by criterion, from rows `z` (N, D) of held-back images and their ROC `curve`.

    The threshold and how it was found, its errors in percent on the same pairs, `logistic` for
    `oneshot.probabilities`, and the table of `strangers`. New classes are harder to tell apart than those of the
    held-back images.
    """
    shared = {
        "logistic": fit_logistic(pair_histogram(z, labels)),
        "calibrated_on": f"{len(labels)} held-back training images of {len(labels.unique())} seen classes",
        "strangers": strangers(z, labels),
    }
    return {each: {"mode": "auto", "criterion": each, **curve.threshold(each), **shared} for each in criteria}


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


def strangers(z: Tensor, labels: Tensor, most: int = 1000) -> dict[str, list]:
    """How similar rows `z` (N, D) are to the most similar of so many `classes` other than their own: a table for
    `oneshot.Strangers`.

    "similarities" (shots, classes, rates): a share `rates` of all rows exceeds it. The classes of a row are drawn
    independently, each represented by the mean of `shots` rows of it.
    """
    generator, grid = torch.Generator().manual_seed(0), torch.linspace(-1, 1, 1001)
    rows = torch.randperm(len(z), generator=generator)[:most]
    found = {"shots": [], "classes": STRANGER_CLASSES, "rates": STRANGER_RATES, "similarities": []}
    for shots in (1, 5):
        draws = [class_means(z, labels, shots, generator) for _ in range(shots)]
        means, owners = (torch.cat(parts) for parts in zip(*draws, strict=True))
        if len(owners.unique()) < 2:
            break
        others = labels[rows, None] != owners
        similarity = torch.where(others, z[rows] @ means.T, -2.0).sort().values
        above = len(means) - torch.searchsorted(similarity, grid.expand(len(rows), -1).contiguous(), right=True)
        share = above.double() / others.sum(1, keepdim=True)  # (rows, similarities)
        found["shots"].append(shots)
        found["similarities"].append([])
        for classes in STRANGER_CLASSES:
            rate = (1 - (1 - share) ** classes).mean(0)
            at = np.interp(STRANGER_RATES, rate.flip(0).numpy(), grid.flip(0).double().numpy())
            found["similarities"][-1].append([round(value, 4) for value in at.tolist()])
    return found


def class_means(z: Tensor, labels: Tensor, shots: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows `z` (N, D) of each class at random in groups of `shots`, each of them once at most: normalised means (M, D)
    and labels (M,)."""
    counts = torch.bincount(labels)
    order = torch.randperm(len(z), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]
    place = torch.arange(len(z)) - (counts.cumsum(0) - counts)[labels[order]]
    order = order[place < counts[labels[order]] // shots * shots]
    return F.normalize(z[order].view(-1, shots, z.shape[1]).mean(1)), labels[order][::shots]


# ------------------------------------------------------------------------------------------------------------ intervals


def enough(labels: Tensor) -> bool:
    """Are there enough classes of two images or more, and images in them, for an interval?"""
    counts = torch.unique(labels, return_counts=True)[1]
    return int((counts > 1).sum()) >= LEAST[0] and int(counts[counts > 1].sum()) >= LEAST[1]


def resample(labels: Tensor, resamples: int = 2000, seed: int = 0) -> Tensor:
    """How often each of C classes, sorted, counts in each of R draws of C classes: (R, C). R is 0 for too few.

    Pairs share images and images share classes, so resampling pairs or images would understate the spread.
    """
    n = len(labels.unique())
    if not enough(labels):
        return torch.empty(0, n)
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    weight = torch.zeros(resamples, n).scatter_add_(1, draws, torch.ones(resamples, n))
    return weight[(weight > 0).sum(1) > 1]


def interval(values: Tensor) -> tuple[float, float] | None:
    """95 % interval of a figure from its values in resamples (R,) float64; None without any."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return tuple(torch.nanquantile(values, ends).tolist()) if len(values) else None


def mean_interval(values: Tensor) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of independent values (N,)."""
    return float(values.mean()), float(1.96 * values.std(correction=0) / len(values) ** 0.5)


# ----------------------------------------------------------------------------------------------------------- few-shot


def draw_episodes(
    labels: Tensor, way: int, shot: int, queries: int = 15, episodes: int = 10_000, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of episodes: places of the classes among the sorted labels (E, way), images (E, way, shot + queries).

    Classes of `shot` images or fewer, which leave no query, are in none. `queries` a class, fewer if the smallest class
    has fewer than shot + queries images. Fewer episodes, but at least 20, if they hold more than COMPARISONS of queries
    with classes. Nothing if there are fewer than `way` classes. The same labels and settings give the same episodes.
    """
    sampler = Sampler(labels, torch.Generator().manual_seed(seed))
    usable = (sampler.counts > shot).nonzero()[:, 0]
    if len(usable) < max(1, way):
        return
    queries = min(queries, int(sampler.counts[usable].min()) - shot)
    episodes = min(episodes, max(20, COMPARISONS // (way * queries * way)))
    batch = min(250, max(1, CELLS // (way * max(sampler.largest, way * (shot + queries)))))
    for size in [batch] * (episodes // batch) + [episodes % batch] * (episodes % batch > 0):
        rows = usable[torch.rand(size, len(usable), generator=sampler.generator).topk(way).indices]  # (E, way)
        yield rows, sampler.batch(rows.flatten(), shot + queries).view(size, way, -1)


def classify(z: Tensor, images: Tensor, shot: int) -> Tensor:
    """The class, 0..way-1, of each query of episodes `images` (E, way, shot + queries) -> (E, way, queries).

    Each query goes to the class whose normalised mean of support rows is most similar, knowing no other query.
    """
    rows = z[images]  # (E, way, shot + queries, D)
    support = F.normalize(rows[:, :, :shot].mean(2), dim=2)
    return most_similar(rows[:, :, shot:].flatten(1, 2), support)[1].unflatten(1, (images.shape[1], -1))


def most_similar(queries: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """The highest similarity of queries (E, Q, D) to means of classes (E, C, D), and whose it is: (E, Q) each."""
    part = max(1, CELLS // means[..., 0].numel())  # queries of an episode that are compared at once
    found = [torch.einsum("eqd,ecd->eqc", some, means).max(2) for some in queries.split(part, 1)]
    return tuple(torch.cat(each, 1) for each in zip(*found, strict=True))


def episode_accuracies(z: Tensor, labels: Tensor, way: int, shot: int, **settings: int) -> Tensor | None:
    """Accuracy (episodes,) in each episode that `draw_episodes` gives with these settings; None if it gives none."""
    truth = torch.arange(way)[:, None]
    found = [
        (classify(z, images, shot) == truth).double().mean((1, 2))
        for _, images in draw_episodes(labels, way, shot, **settings)
    ]
    return 100 * torch.cat(found) if found else None


def open_set(
    enrolled: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], way: int, shot: int, table: Strangers, adapt: bool
) -> dict[str, Tensor] | None:
    """400 episodes in which `way` classes are enrolled with `shot` images each, and as many queries as theirs are
    strangers. `enrolled`: embeddings (N, D) and labels (N,) of what support and queries are drawn from; `others`: of
    what strangers are, those of enrolled classes excepted. None without enough classes or images.

    Of each episode, (episodes,) in percent: auroc, of telling the two kinds of queries by their highest similarity;
    right@R: queries of enrolled classes that get their class where a share R of all strangers gets a name; named@R:
    strangers that get a name at the threshold of `table` for a share R, with `adapt` as a gallery adapts it.
    """
    (z, labels), (z_others, labels_others) = enrolled, others
    generator, truth, owners = torch.Generator().manual_seed(0), torch.arange(way)[:, None], np.arange(way).repeat(shot)
    known, right, strange, named = [], [], [], []
    for rows, images in draw_episodes(labels, way, shot, max(1, min(15, 300 // way)), episodes=400):
        support, queries = z[images].split([shot, images.shape[2] - shot], 2)
        means = F.normalize(support.mean(2), dim=2)
        best, place = most_similar(queries.flatten(1, 2), means)
        known.append(best)
        right.append((place.unflatten(1, (way, -1)) == truth).flatten(1))
        taken = torch.zeros(len(rows), int(max(labels.max(), labels_others.max())) + 1)
        taken = taken.scatter_(1, labels.unique()[rows], 1.0)[:, labels_others]
        count = min(known[-1].shape[1], int((1 - taken).sum(1).min()))
        if not count:
            return None
        drawn = (torch.rand(taken.shape, generator=generator) - taken).topk(count).indices
        strange.append(most_similar(z_others[drawn], means)[0])
        factors = [STRANGERS] * len(rows)
        if adapt and way > 1:
            similarity = torch.einsum("ewkd,evd->ewkv", support, means)
            to_others = similarity.masked_fill(torch.eye(way, dtype=torch.bool)[:, None], -1).amax(3).flatten(1)
            factors = [table.factor(similar, owners, way - 1, shot) for similar in to_others.numpy()]
        for factor, strangers in zip(factors, strange[-1], strict=True):
            thresholds = [table.threshold(share, factor * way, shot) for share in NAMED]
            named.append([float((strangers > threshold).double().mean()) for threshold in thresholds])
    if not known:
        return None
    known, right, strange = torch.cat(known), torch.cat(right), torch.cat(strange)
    pairs = zip(known[:, :, None], strange[:, None], strict=True)
    found = {"auroc": torch.stack([(k > s).double().mean() + 0.5 * (k == s).double().mean() for k, s in pairs])}
    for share in FALSE_ALARMS:
        above = known > np.quantile(strange.numpy(), 1 - share)
        found[f"right@{share}"] = (right & above).double().mean(1)
    found |= {f"named@{share}": column for share, column in zip(NAMED, torch.tensor(named).T, strict=True)}
    return {name: 100 * values for name, values in found.items()}


# --------------------------------------------------------------------------------------------------------- one side


@dataclass(frozen=True)
class Side:
    """Test images of the seen or the unseen classes, or of runs, and their measurements, at one threshold if any."""

    images: Images
    z: Tensor  # (N, D) embeddings of length 1
    curve: Roc | None  # None for runs
    accuracies: dict[str, Accuracy]  # of triplets and of pairs; for runs, "error"
    episodes: dict[str, Tensor | None]  # accuracies (episodes,) in the settings of FEW_SHOT; empty for seen classes

    @property
    def labels(self) -> Tensor:
        return self.images.labels


def measure(images: Images, z: Tensor, threshold: float, shots: tuple[Tensor, Tensor] | None = None) -> Side | None:
    """A `Side`; None unless there are pairs of both kinds.

    `z` (N, D): embeddings of length 1 of the images. `shots`: embeddings (N, D) and labels (N,) of the images that
    episodes are drawn from, if any are.
    """
    labels = images.labels
    curve = roc(z, labels)
    if curve is None:
        return None
    ways = {name: (way or len(labels.unique()), shot) for name, (way, shot) in FEW_SHOT.items() if shots}
    episodes = {name: episode_accuracies(*shots, *setting) for name, setting in ways.items()}
    return Side(images, z, curve, accuracies(z, labels, threshold, resample(labels)), episodes)


def measure_runs(images: Images, z: Tensor, way: int) -> Side:
    """One-shot classification in runs of `way` classes; a class has two images in a row, the known one and the query.

    The error in percent is the mean over runs, whose characters differ in how hard they are: these are resampled.
    """
    found = classify(z, torch.arange(len(z)).view(-1, way, 2), 1)[:, :, 0]
    wrong = 100 * (found != torch.arange(way)).double().mean(1)  # (R,)
    resamples = 2000 if len(wrong) >= LEAST[0] else 0
    draws = torch.randint(len(wrong), (resamples, len(wrong)), generator=torch.Generator().manual_seed(0))
    return Side(images, z, None, {"error": Accuracy(float(wrong.mean()), wrong, wrong[draws].mean(1))}, {})
