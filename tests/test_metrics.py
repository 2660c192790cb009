"""metrics.py against brute force over pairs and triplets, and against scikit-learn."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn.functional import normalize

import evaluate
import metrics
import oneshot


def embeddings(images, classes, seed=0, levels=None):
    """Normalised rows around class centres; `levels` rounds similarities' ingredients, for ties."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    x = torch.randn(images, 6, generator=generator) + torch.randn(classes, 6, generator=generator)[labels]
    if levels:  # rows of +-1/2 in four columns: similarities are exact multiples of 1/4
        x = torch.where(x[:, :4] > 0, 0.5, -0.5)
        return x, labels
    return normalize(x), labels


def all_pairs(z, labels):
    """Similarity and "same class" of each pair i < j, as numpy arrays."""
    i, j = torch.triu_indices(len(z), len(z), 1)
    return (z @ z.T)[i, j].numpy(), (labels[i] == labels[j]).numpy()


def balanced(similarity, same, threshold):
    return 50 * ((similarity[same] > threshold).mean() + (similarity[~same] <= threshold).mean())


def few_shot(z, labels, way, shot, **settings):
    """Accuracy and half the width of its interval."""
    return metrics.mean_interval(metrics.episode_accuracies(z, labels, way, shot, **settings))


CASES = [(60, 5, None), (90, 7, 4), (700, 9, None), (40, 3, 4)]


@pytest.mark.parametrize("sorts", [True, False])
@pytest.mark.parametrize(("images", "classes", "levels"), CASES)
def test_pair_statistics(images, classes, levels, sorts, monkeypatch):
    if not sorts:
        monkeypatch.setattr(metrics, "SORTED", 0)
    z, labels = embeddings(images, classes, levels=levels)
    similarity, same = all_pairs(z, labels)
    found = metrics.roc(z, labels)
    oracle_accuracy, oracle_threshold = found.best()
    assert found.auc == pytest.approx(100 * roc_auc_score(same, similarity), abs=1e-9 if levels else 1e-4)
    far, tar, _ = roc_curve(same, similarity, drop_intermediate=False)
    assert oracle_accuracy == pytest.approx(50 * (1 + (tar - far).max()), abs=1e-9 if levels else 1e-3)
    assert balanced(similarity, same, oracle_threshold) == pytest.approx(oracle_accuracy, abs=1e-3)
    crossing = np.interp(0, far - (1 - tar), far)
    assert found.eer == pytest.approx(100 * crossing, abs=1e-6 if levels else 0.05)


def test_the_oracle_threshold_is_the_middle_of_its_interval():
    z = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    found = metrics.roc(z, torch.tensor([0, 0, 1, 1]))
    # same: 0.8, 0.8; different: 0, 0.6, -0.6, 0
    assert (found.auc, found.eer, *found.best()) == (100.0, 0.0, 100.0, pytest.approx(0.7))


@pytest.mark.parametrize(("images", "classes", "levels"), CASES)
@pytest.mark.parametrize("threshold", [-0.3, 0.25, 0.5])
def test_pair_accuracy(images, classes, levels, threshold):
    z, labels = embeddings(images, classes, levels=levels)
    similarity, same = all_pairs(z, labels)
    found = metrics.accuracies(z, labels, threshold)["pair_accuracy"]
    assert found.value == pytest.approx(balanced(similarity, same, threshold), abs=1e-3)
    for row, label in enumerate(labels.unique()):
        i, j = torch.triu_indices(len(z), len(z), 1)
        member = ((labels[i] == label) | (labels[j] == label)).numpy()
        expected = balanced(similarity[member], same[member], threshold)
        assert float(found.per_class[row]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("few", [metrics.FEW_POSITIVES, 0])
@pytest.mark.parametrize(("images", "classes", "levels"), CASES[:2])
def test_triplet_accuracy(images, classes, levels, few, monkeypatch):
    monkeypatch.setattr(metrics, "FEW_POSITIVES", few)
    z, labels = embeddings(images, classes, levels=levels)
    similarity = z @ z.T
    per_anchor = {}
    for a in range(len(z)):
        positives = [p for p in range(len(z)) if labels[p] == labels[a] and p != a]
        negatives = [n for n in range(len(z)) if labels[n] != labels[a]]
        if positives and negatives:
            right = [bool(similarity[a, p] > similarity[a, n]) for p, n in itertools.product(positives, negatives)]
            per_anchor[a] = 100 * np.mean(right)
    found = metrics.accuracies(z, labels, 0.0)["triplet_accuracy"]
    assert found.value == pytest.approx(np.mean(list(per_anchor.values())), abs=1e-3)
    for row, label in enumerate(labels.unique()):
        own = [value for a, value in per_anchor.items() if labels[a] == label]
        assert float(found.per_class[row]) == pytest.approx(np.mean(own), abs=1e-3)


@pytest.mark.parametrize(("images", "classes", "levels"), CASES)
def test_roc(images, classes, levels):
    """Each threshold's errors, the best accuracy where one pair in ten is of one class, counts and histograms."""
    z, labels = embeddings(images, classes, levels=levels)
    similarity, same = all_pairs(z, labels)
    curve = metrics.roc(z, labels)
    assert len(curve.thresholds) == len(np.unique(similarity[same])) and (curve.thresholds.diff() > 0).all()
    for place in range(0, len(curve.thresholds), max(1, len(curve.thresholds) // 50)):
        threshold = float(curve.thresholds[place])
        assert float(curve.false_accept[place]) == pytest.approx((similarity[~same] > threshold).mean(), abs=1e-4)
        assert float(curve.false_reject[place]) == pytest.approx((similarity[same] <= threshold).mean(), abs=1e-4)
    far, tar, _ = roc_curve(same, similarity, drop_intermediate=False)
    assert curve.best(0.1)[0] == pytest.approx((10 * tar + 90 * (1 - far)).max(), abs=1e-3)
    accept, reject = metrics.pair_errors(z, labels, [-0.3, 0.25])
    assert accept.tolist() == pytest.approx([(similarity[~same] > t).mean() for t in (-0.3, 0.25)], abs=1e-4)
    assert reject.tolist() == pytest.approx([(similarity[same] <= t).mean() for t in (-0.3, 0.25)], abs=1e-4)
    if not levels:
        for row, chosen in zip(metrics.pair_histogram(z, labels, 40), (~same, same), strict=True):
            counts = np.histogram(similarity[chosen].clip(-1, 1), 40, (-1, 1))[0]
            assert row.sum() == chosen.sum() and abs(row.numpy() - counts).sum() <= 4  # rounding at the bins' edges


def test_blocks_do_not_matter(monkeypatch):
    z, labels = embeddings(300, 6, levels=4)

    def figures():
        curve = metrics.roc(z, labels)
        values = [found.value for found in metrics.accuracies(z, labels, 0.3).values()]
        return curve.auc, curve.eer, *curve.best(), *values

    whole = figures()
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert whole == figures()


def test_constant_embeddings_know_nothing():
    z, labels = torch.ones(30, 1), torch.arange(30) % 3
    found = metrics.roc(z, labels)
    assert (found.auc, found.eer, found.best()[0]) == (50.0, 50.0, 50.0)
    for threshold in (0.5, 1.0):
        values = [found.value for found in metrics.accuracies(z, labels, threshold).values()]
        assert values == [0, 50]  # of triplets, where a tie is wrong, and of pairs
    accuracy, _ = few_shot(z, labels, 3, 1, episodes=500)
    assert accuracy == pytest.approx(100 / 3)


def test_degenerate_inputs():
    z, _ = embeddings(10, 2)
    assert metrics.roc(z, torch.zeros(10, dtype=torch.long)) is None  # one class
    assert metrics.roc(z, torch.arange(10)) is None  # no two of a class
    lonely = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2])  # a class of one image has no positive pair
    for found in metrics.accuracies(z, lonely, 0.5).values():
        assert 0 <= found.value <= 100 and found.per_class.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("classes", "images", "some"), [(4, 400, False), (5, 9, False), (5, 10, True), (90, 180, True)]
)
def test_there_is_no_interval_from_too_few(classes, images, some):
    labels = torch.arange(images) % classes
    weight = metrics.resample(labels)
    assert (len(weight) > 1900 if some else len(weight) == 0) and metrics.enough(labels) == some
    z = torch.randn(images, 4, generator=torch.Generator().manual_seed(0))
    for found in metrics.accuracies(normalize(z), labels, 0.3, weight).values():
        assert (metrics.interval(found.resampled) is not None) == some


@pytest.mark.parametrize("figure", ["triplet_accuracy", "pair_accuracy"])
def test_resampling_classes_equals_copying_them(figure):
    """A class drawn twice counts as two classes that are never compared with each other."""
    z, labels = embeddings(120, 5)
    weight = torch.tensor([[2.0, 0, 1, 1, 1]])
    accuracy = float(metrics.accuracies(z, labels, 0.2, weight)[figure].resampled)
    similarity = z @ z.T
    counts = torch.tensor([2.0, 0, 1, 1, 1])[labels]
    if figure == "triplet_accuracy":
        total = weight = 0.0
        for a in range(len(z)):
            same = (labels == labels[a]) & (torch.arange(len(z)) != a)
            right = (similarity[a, same][:, None] > similarity[a, labels != labels[a]]).double().mean(0)
            negative_weight = counts[labels != labels[a]].double()
            total += float(counts[a] * (right * negative_weight).sum() / negative_weight.sum())
            weight += float(counts[a])
        expected = 100 * total / weight
    else:
        i, j = torch.triu_indices(len(z), len(z), 1)
        accepted, same = similarity[i, j] > 0.2, labels[i] == labels[j]
        own, crossed = counts[i] * same, counts[i] * counts[j] * ~same
        expected = 50 * float((own * accepted).sum() / own.sum() + (crossed * ~accepted).sum() / crossed.sum())
    assert accuracy == pytest.approx(expected, abs=1e-3)


def test_bootstrap_covers_the_spread_between_classes():
    z, labels = embeddings(400, 20)
    found = metrics.accuracies(z, labels, 0.3, metrics.resample(labels))["pair_accuracy"]
    low, high = metrics.interval(found.resampled)
    assert low < found.value < high and 1 < high - low < 30
    assert torch.equal(metrics.resample(labels), metrics.resample(labels))


@pytest.mark.parametrize("criterion", ["balanced", "eer", "far:0.01"])
def test_thresholds_are_similarities(criterion):
    """Of rows that are nearly or quite equal, whose products round to more than 1, none is above 1."""
    labels = torch.arange(12) // 3
    for seed in range(40):
        noise = torch.randn(12, 24, generator=torch.Generator().manual_seed(seed))
        z = normalize(torch.ones(12, 24) + (10.0 ** -(seed % 5 + 3) if seed % 5 else 0) * noise)
        curve = metrics.roc(z, labels)
        found = curve.threshold(criterion)
        assert -1 <= found["value"] <= 1 and -1 <= curve.best()[1] <= 1
        if found["value"] == 1.0:  # accepts none
            assert metrics.pair_errors(z, labels, [1.0])[0] == found["false_accept"] == 0


def test_classes_without_a_query_are_in_no_episode():
    labels = torch.tensor([0] * 6 + [1] + [2] * 6 + [3] * 2 + [4] * 6)
    for shot, classes in ((1, {0, 2, 3, 4}), (5, {0, 2, 4})):
        for rows, images in metrics.draw_episodes(labels, 3, shot, episodes=50):
            assert set(rows.flatten().tolist()) == classes and images.shape[2] == shot + 1
            assert torch.equal(labels[images], rows[:, :, None].expand_as(images))
    assert not [*metrics.draw_episodes(labels, 4, 5)] and not [*metrics.draw_episodes(labels, 5, 1)]


@pytest.mark.parametrize("figure", ["triplet_accuracy", "pair_accuracy"])
def test_differences_are_paired(figure):
    """Nearly equal embeddings differ by little, however much the classes differ; with itself a table differs by 0."""
    z, labels = embeddings(400, 20)
    near = normalize(z + 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
    weight = metrics.resample(labels)
    found, other = (metrics.accuracies(rows, labels, 0.2, weight)[figure] for rows in (z, near))
    low, high = metrics.interval(found.resampled - other.resampled)
    alone = metrics.interval(found.resampled)
    assert low <= found.value - other.value <= high and high - low < (alone[1] - alone[0]) / 3


def test_many_classes_take_little_memory():
    """1200 classes of 4 images: an episode of all of them compares 2 million pairs."""
    code = (
        "import resource, torch, metrics, sources\n"
        "labels, z = torch.arange(4800) // 4, torch.nn.functional.normalize(torch.randn(4800, 16))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "side = metrics.measure(sources.Images(torch.empty(0), labels), z, 0.3, (z, labels))\n"
        "print(len(side.episodes['all1s']), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    root = Path(metrics.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    episodes, kilobytes = map(int, done.stdout.split())
    assert episodes == metrics.COMPARISONS // (1200 * 3 * 1200) and kilobytes < 400_000


def test_queries_may_be_compared_in_parts(monkeypatch):
    z, labels = embeddings(150, 8)
    _, images = next(metrics.draw_episodes(labels, 8, 2, episodes=9))
    whole = metrics.classify(z, images, 2)
    monkeypatch.setattr(metrics, "CELLS", 2000)
    assert torch.equal(metrics.classify(z, images, 2), whole)
    sizes = [len(rows) for rows, _ in metrics.draw_episodes(labels, 8, 2, episodes=5)]
    assert sum(sizes) == 5 and max(sizes) == 2


def test_few_shot_by_hand():
    """Two classes of two images: with one support each, every query is another image; which ones are right is known."""
    z = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [0.8, -0.6]])
    labels = torch.tensor([0, 0, 1, 1])
    accuracy, interval = few_shot(z, labels, way=2, shot=1, episodes=20_000)
    right = []
    for a, b in itertools.product((0, 1), (2, 3)):
        for query, own, other in ((1 - a, a, b), (5 - b, b, a)):
            # the supports are compared in either order, and a tie goes to the first
            mine, theirs = float(z[query] @ z[own]), float(z[query] @ z[other])
            right.append(0.5 if mine == theirs else float(mine > theirs))
    assert accuracy == pytest.approx(100 * np.mean(right), abs=3 * interval) and 0 < interval < 1


@pytest.mark.parametrize("shot", [1, 3])
def test_episodes_by_loops(shot):
    """Supports and queries are different images of the right class; each query goes to the nearest mean, by loops."""
    z, labels = embeddings(150, 8)
    classes = labels.unique()
    seen = set()
    for rows, images in metrics.draw_episodes(labels, 5, shot, queries=4, episodes=60):
        predicted = metrics.classify(z, images, shot)
        for episode in range(len(rows)):
            assert len(set(rows[episode].tolist())) == 5 and len(set(images[episode].flatten().tolist())) == 5 * (
                shot + 4
            )
            means = []
            for row, own in zip(rows[episode], images[episode].numpy(), strict=True):
                assert (labels[own] == classes[row]).all()
                mean = z[own[:shot]].numpy().mean(0)
                means.append(mean / np.linalg.norm(mean))
            for place, own in enumerate(images[episode].numpy()):
                answers = [int(np.argmax([z[query].numpy() @ mean for mean in means])) for query in own[shot:]]
                assert predicted[episode, place].tolist() == answers
            seen.add(tuple(sorted(rows[episode].tolist())))
    assert len(seen) > 30  # of 56


def test_few_shot_episodes():
    z, labels = embeddings(200, 8)
    same = [few_shot(z, labels, 5, 1, episodes=300) for _ in range(2)]
    assert same[0] == same[1] != few_shot(z, labels, 5, 1, episodes=300, seed=1)
    assert metrics.episode_accuracies(z, labels, 9, 1) is None  # more classes than there are
    assert metrics.episode_accuracies(z, labels, 5, 200) is None  # no query is left
    assert few_shot(z, labels, 5, 5, episodes=300)[0] > same[0][0]
    noise = normalize(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)))
    accuracy, _ = few_shot(noise, torch.arange(1000) % 10, 10, 1, episodes=2000)
    assert accuracy == pytest.approx(10, abs=0.7)


def test_many_classes_are_compared_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, means = (normalize(torch.randn(3, n, 6, generator=generator), dim=2) for n in (41, 7))
    similarity = queries @ means.mT
    for cells in (metrics.CELLS, 100, 1):
        monkeypatch.setattr(metrics, "CELLS", cells)
        highest, place = metrics.most_similar(queries, means)
        assert torch.allclose(highest, similarity.amax(2)) and torch.equal(place, similarity.argmax(2))


def test_published_few_shot():
    z = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [1.0, 0.1]])
    labels = torch.tensor([7, 9, 7, 9, 9])
    score, constant = evaluate.published_few_shot(normalize(z), labels, 0.5)
    # supports 0 and 1, queries 2, 3, 4: six pairs, of which (0, 4) is accepted and (1, 4) refused, both wrongly
    assert score == pytest.approx(100 * 4 / 6) and constant == pytest.approx(50)


def test_intervals_hold_95_percent():
    assert metrics.interval(torch.arange(1001.0).double()) == pytest.approx((25, 975))


def test_open_set_by_loops():
    """Strangers are of no enrolled class, and a name counts where it is the right one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(9)
    z = normalize(torch.randn(12, 8, generator=generator)[labels] + torch.randn(108, 8, generator=generator))
    table, way, shot = oneshot.Strangers(metrics.strangers(z, labels)), 4, 1
    found = metrics.open_set((z, labels), (z, labels), way, shot, table, adapt=False)
    generator, known, right, strange, named = torch.Generator().manual_seed(0), [], [], [], []
    limit = table.threshold(0.1, oneshot.STRANGERS * way, shot)
    for rows, images in metrics.draw_episodes(labels, way, shot, 15, episodes=400):
        taken = torch.stack([torch.isin(labels, row) for row in rows])
        drawn = (torch.rand(taken.shape, generator=generator) - taken.float()).topk(way * (9 - shot)).indices
        for row, own, others in zip(rows, images, drawn, strict=True):
            assert not torch.isin(labels[others], row).any()
            means = normalize(z[own[:, :shot]].mean(1))
            similarity = z[own[:, shot:].flatten()] @ means.T
            known.append(similarity.amax(1))
            right.append(similarity.argmax(1) == torch.arange(way).repeat_interleave(9 - shot))
            strange.append((z[others] @ means.T).amax(1))
            named.append((strange[-1] > limit).double().mean())
    above = float(np.quantile(torch.cat(strange).numpy(), 0.9))
    expected = {
        "right@0.1": [(r & (k > above)).double().mean() for k, r in zip(known, right, strict=True)],
        "named@0.1": named,
        "auroc": [(k[:, None] > s).double().mean() for k, s in zip(known, strange, strict=True)],
    }
    for name, values in expected.items():
        assert float(found[name].mean()) == pytest.approx(100 * float(torch.stack(values).mean()), abs=0.05), name
