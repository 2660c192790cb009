"""adapt.py: adapting to a class before it is scored, and the row of the report it makes."""

import json
import sys

import numpy as np
import pytest
import torch

import adapt
import data
import evaluate
import model
import tiny

PIXELS = ([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A data set of 8 classes, a network of random weights, seen and unseen classes, and the data set's file."""
    path = tiny.write_npz(tmp_path_factory.mktemp("adapt") / "tiny.npz", train=20, test=5)
    torch.manual_seed(0)
    return data.load(str(path)), model.build("resnet20", 4), list(range(5)), [5, 6, 7], path


def test_adapting_takes_steps_of_adam_on_a_copy():
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 3.0)
    adapted = adapt.adapt(net, lambda copy: copy.weight.square().sum(), steps=2, lr=0.1)
    assert net.weight.item() == 3 and net.weight.grad is None
    weight, first, second = 3.0, 0.0, 0.0
    for step in (1, 2):  # Kingma & Ba 2014, arXiv:1412.6980, algorithm 1
        gradient = 2 * weight
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)) ** 0.5 + 1e-8)
    assert adapted.weight.item() == pytest.approx(weight, abs=1e-6)


def test_adapting_brings_the_class_together_and_keeps_batch_norms_statistics(known):
    loaded, net, seen, _, _ = known
    own, rest = loaded.train.of([6]), loaded.train.of(seen)

    def loss(network):
        return adapt.domain_loss(network, own, rest, PIXELS, torch.Generator().manual_seed(0))

    adapted = adapt.adapt(net, loss, 30, 1e-3)
    before = dict(net.named_buffers())
    assert all(torch.equal(buffer, before[name]) for name, buffer in adapted.named_buffers())
    assert loss(adapted).item() < 0.7 * loss(net.eval()).item()


def test_the_loss_is_over_triplets_of_the_class_against_the_rest(known):
    loaded, net, seen, _, _ = known
    own, rest = loaded.train.of([6]), loaded.train.of(seen)
    with torch.no_grad():
        found = adapt.domain_loss(net.eval(), own, rest, PIXELS, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    images = [own.images[torch.randperm(20, generator=generator)]]
    images.append(rest.images[torch.randint(100, (adapt.BATCH,), generator=generator)])
    z = [model.embed(net, part, *PIXELS).double().numpy() for part in images]
    a, n = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in z)
    costs = [
        cost for i in range(20) for j in range(20) if i != j for cost in a[i] @ n.T - a[i] @ a[j] + 0.3 if cost > 0
    ]
    assert float(found) == pytest.approx(np.mean(costs), rel=1e-4)


def test_without_steps_the_figures_are_those_of_the_network(known, monkeypatch):
    loaded, net, seen, unseen, _ = known
    monkeypatch.setattr(adapt, "STEPS", 0)
    report = adapt.published_variant(net, loaded, seen, unseen, PIXELS, threshold=0.9)
    test = loaded.test.of(unseen)
    z = model.embed(net, test.images, *PIXELS).double().numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    similarity, labels = z @ z.T, test.labels.numpy()
    for row in report["per_class"]:
        own, others = np.flatnonzero(labels == row["label"]), np.flatnonzero(labels != row["label"])
        positive = [similarity[a, p] for a in own for p in own if a != p]
        negative = similarity[np.ix_(own, others)]
        right = [similarity[a, p] > similarity[a, n] for a in own for p in own if a != p for n in others]
        pairs = 50 * (np.mean(np.array(positive) > 0.9) + np.mean(negative <= 0.9))
        assert row["triplet_accuracy"] == pytest.approx(100 * np.mean(right), abs=1e-3)
        assert row["pair_accuracy"] == pytest.approx(pairs, abs=1e-3)
    for figure in ("triplet_accuracy", "pair_accuracy"):
        values = [row[figure] for row in report["per_class"]]
        assert report[figure] == pytest.approx(np.mean(values))
        low, high = report["ci95"][figure]
        assert min(values) <= low <= report[figure] <= high <= max(values)


def test_nothing_but_the_class_and_the_seen_ones_is_learned_from(known, monkeypatch):
    """Changing the training images of the other unseen classes changes nothing; neither does a second call."""
    loaded, net, seen, unseen, _ = known
    monkeypatch.setattr(adapt, "STEPS", 3)
    other = data.Images(loaded.train.images.clone(), loaded.train.labels)
    other.images[torch.isin(other.labels, torch.tensor([6, 7]))] = 0
    changed = data.Data(loaded.name, other, loaded.test, loaded.class_names)
    embed, embeddings = model.embed, []
    monkeypatch.setattr(model, "embed", lambda *args: embeddings.append(embed(*args)) or embeddings[-1])
    for each in (loaded, loaded, changed):
        adapt.published_variant(net, each, seen, unseen, PIXELS, 0.9)
    first, second, third = embeddings[:3], embeddings[3:6], embeddings[6:]
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[0], third[0]) and not torch.equal(first[1], third[1])


def test_evaluation_reports_it_in_a_row_of_its_own(known, monkeypatch, tmp_path, capsys):
    *_, path = known
    torch.save(known[1].state_dict(), tmp_path / "net.pt")
    arguments = ["--backbone", "resnet20", "--width", "4", "--data", str(path), "--split", "62-38"]
    reports = []
    for more in ([], ["--adapt-published"]):
        json_file = str(tmp_path / "report.json")
        argv = ["evaluate.py", str(tmp_path / "net.pt"), *arguments, "--json", json_file, "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", argv)
        evaluate.main()
        reports.append(json.loads((tmp_path / "report.json").read_text()))
        assert ("unseen, adapted (published variant)" in capsys.readouterr().out) == bool(more)
    adapted = reports[1]["unseen"].pop("adapted")
    assert reports[0]["unseen"].pop("adapted") is None and reports[0]["unseen"] == reports[1]["unseen"]
    assert [row["label"] for row in adapted["per_class"]] == [5, 6, 7] and "30 steps" in adapted["variant"]
    assert adapted["triplet_accuracy"] > reports[1]["unseen"]["triplet_accuracy"]
