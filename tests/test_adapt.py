"""adapt.py: adapting to support images or to a class before scoring, and what the report says of it."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import adapt
import cli
import data
import evaluate
import metrics
import model
import tiny

PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A data set of 8 classes, a network of random weights, seen and unseen classes, and the data set's file."""
    path = tiny.write_npz(tmp_path_factory.mktemp("adapt") / "tiny.npz", train=20, test=5)
    torch.manual_seed(0)
    return data.load(str(path)), model.build("resnet20", 4, **PIXELS), list(range(5)), [5, 6, 7], path


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


# ------------------------------------------------------------------------------------------------- on support images


def support_adaptation(net, **changes):
    settings = {"loss": cli.LossOptions().triplet, "steps": 3, "lr": 3e-3}
    return adapt.SupportAdaptation(net.eval(), **settings | changes)


@pytest.mark.parametrize(("mirror", "penultimate"), [(False, 0.0), (False, 0.5), (True, 0.5)])
def test_frozen_part_and_block_make_up_the_network(known, mirror, penultimate):
    """Without adaptation the answers are those of the embeddings of the whole network."""
    test = known[0].test
    torch.manual_seed(1)
    net = model.build("resnet20", 4, mirror=mirror, penultimate=penultimate, **PIXELS)
    net.centre(test.images)
    z = normalize(model.embed(net, test.images))
    _, episodes = next(metrics.draw_episodes(test.labels, 5, 2, episodes=4))
    found = support_adaptation(net, steps=1).answers(test, episodes, 2)
    assert found.shape == (2, 4, 5, 3)
    assert torch.equal(found[0], metrics.classify(z, episodes, 2))
    assert all(parameter.grad is None for parameter in net.parameters())


def flat(block):
    return torch.cat([value.flatten() for value in block.state_dict().values()])


def test_only_support_images_are_learned_from(known, monkeypatch):
    """Other query images change their own answers at most, and not the adapted weights; another support image does."""
    test = known[0].test
    _, episodes = next(metrics.draw_episodes(test.labels, 5, 1, episodes=1))
    take_steps, learned = adapt.adapt, []
    monkeypatch.setattr(adapt, "adapt", lambda *args, **more: learned.append(take_steps(*args, **more)) or learned[-1])
    adaptation, answers = support_adaptation(known[1]), []
    one, queries, support = episodes[0, 2, 3], episodes[0, :, 1:].flatten(), episodes[0, 2, 0]
    for changed in ([], one, queries, support):
        pictures = data.Images(test.images.clone(), test.labels)
        pictures.store[changed] = 255 - pictures.store[changed]
        answers.append(adaptation.answers(pictures, episodes, 1))
    weights = list(map(flat, learned))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    differs = answers[0] != answers[1]
    differs[:, 0, 2, 2] = False  # the query that was changed: the third after one support image
    assert not differs.any() and answers[0].shape == (2, 1, 5, 4)


def test_each_episode_starts_from_the_network(known, monkeypatch):
    test, net = known[0].test, known[1]
    _, episodes = next(metrics.draw_episodes(test.labels, 5, 1, episodes=3))
    take_steps, starts, ends = adapt.adapt, [], []

    def spy(block, *args, **more):
        starts.append(flat(block))
        ends.append(flat(take_steps(block, *args, **more)))
        return block

    monkeypatch.setattr(adapt, "adapt", spy)
    support_adaptation(net).answers(test, episodes, 1)
    assert len(starts) == 3 and all(torch.equal(start, flat(net.layer3[-1])) for start in starts)
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], starts[0])


def test_adapting_tells_the_supports_apart(known):
    """Views of the support images that were not trained on go to their own image more often afterwards."""
    test, shift = known[0].test, torch.Generator().manual_seed(9)
    adaptation = support_adaptation(known[1], steps=20)
    supports = torch.stack([(test.labels == label).nonzero()[0] for label in range(8)])  # (way, 1)
    crops = data.augment(test.pixels(supports.repeat(1, 10).flatten()), shift).unflatten(0, (8, 10))
    images = torch.cat((test.images[supports], crops), 1).flatten(0, 1)
    images = images.contiguous(memory_format=torch.channels_last)
    pictures = data.Images(images, torch.arange(8).repeat_interleave(11))
    answers = adaptation.answers(pictures, torch.arange(88).view(1, 8, 11), 1)
    before, after = (answers == torch.arange(8)[:, None]).double().mean((1, 2, 3)).tolist()
    assert after > before + 0.1


def test_the_loss_is_of_a_few_views_of_each_class():
    """The block's inputs are drawn for each class from its own; the loss is the op's, with the options given."""
    views = torch.randn(24, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    rows, found = torch.arange(24).view(3, 8), []
    block = lambda x: found.append(x) or x  # noqa: E731
    options = {"margin": 0.2, "distance": "euclidean", "mining": "hard"}
    loss = adapt.support_loss(block, views, rows, torch.Generator().manual_seed(0), options)
    drawn = [[int((views == row).all(1).all(1).all(1).nonzero()) for row in part] for part in found[0].split(4)]
    assert all(len({*part}) == 4 and {*part} <= {*rows[place].tolist()} for place, part in enumerate(drawn))
    x, label = found[0][:, :, 0, 0].numpy(), np.arange(3).repeat(4)
    distance = np.linalg.norm(x[:, None] - x, axis=2)
    same = label[:, None] == label
    costs = [distance[i][same[i]].max() - distance[i][~same[i]].min() + 0.2 for i in range(12)]
    assert float(loss) == pytest.approx(np.maximum(costs, 0).mean(), rel=1e-5)


def test_gain_by_hand():
    found = adapt.gain(torch.tensor([50.0, 60, 70, 80]), torch.tensor([52.0, 60, 74, 82]))
    assert found["zero_steps"]["accuracy"] == 65 and found["adapted"]["accuracy"] == 67
    assert found["difference"]["difference"] == 2
    half = 1.96 * np.std([2, 0, 4, 2]) / 2
    assert found["difference"]["ci95"] == pytest.approx((2 - half, 2 + half))


# ------------------------------------------------------------------------------------------------- published variant


@pytest.mark.slow
def test_adapting_brings_the_class_together_and_keeps_batch_norms_statistics(known):
    loaded, net, seen, _, _ = known
    own, rest = loaded.train.of([6]), loaded.train.of(seen)

    def loss(network):
        return adapt.domain_loss(network, own, rest, torch.Generator().manual_seed(0))

    adapted = adapt.adapt(net, loss, 30, 1e-3)
    before = dict(net.named_buffers())
    assert all(torch.equal(buffer, before[name]) for name, buffer in adapted.named_buffers())
    assert loss(adapted).item() < 0.7 * loss(net.eval()).item()


@pytest.mark.parametrize("penultimate", [0.0, 0.5])
def test_the_loss_is_over_triplets_of_the_class_against_the_rest(known, monkeypatch, penultimate):
    """By the embeddings that are scored."""
    loaded, net, seen, _, _ = known
    monkeypatch.setattr(net, "penultimate", penultimate)
    own, rest = loaded.train.of([6]), loaded.train.of(seen)
    with torch.no_grad():
        found = adapt.domain_loss(net.eval(), own, rest, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    images = [own.images[torch.randperm(20, generator=generator)]]
    images.append(rest.images[torch.randint(100, (adapt.BATCH,), generator=generator)])
    z = [model.embed(net, part).double().numpy() for part in images]
    a, n = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in z)
    costs = [
        cost for i in range(20) for j in range(20) if i != j for cost in a[i] @ n.T - a[i] @ a[j] + 0.3 if cost > 0
    ]
    assert float(found) == pytest.approx(np.mean(costs), rel=1e-4)


def test_without_steps_the_figures_are_those_of_the_network(known, monkeypatch):
    loaded, net, seen, unseen, _ = known
    monkeypatch.setattr(adapt, "STEPS", 0)
    report = adapt.published_variant(net, loaded, seen, unseen, threshold=0.9, lr=1e-3)
    test = loaded.test.of(unseen)
    z = model.embed(net, test.images).double().numpy()
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
        assert report["ci95"][figure] is None  # of three classes


def test_nothing_but_the_class_and_the_seen_ones_is_learned_from(known, monkeypatch):
    """Changing the training images of the other unseen classes changes nothing; neither does a second call."""
    loaded, net, seen, unseen, _ = known
    monkeypatch.setattr(adapt, "STEPS", 3)
    other = data.Images(loaded.train.images.clone(), loaded.train.labels)
    other.store[torch.isin(other.labels, torch.tensor([6, 7]))] = 0
    changed = data.Data(loaded.name, other, loaded.test, loaded.class_names)
    embed, embeddings = model.embed, []
    monkeypatch.setattr(model, "embed", lambda *args: embeddings.append(embed(*args)) or embeddings[-1])
    for each in (loaded, loaded, changed):
        adapt.published_variant(net, each, seen, unseen, 0.9, 1e-3)
    first, second, third = embeddings[:3], embeddings[3:6], embeddings[6:]
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[0], third[0]) and not torch.equal(first[1], third[1])


def run(folder, path, *more):
    """evaluate.py's report of the network in `folder`, whose weights are random."""
    arguments = [folder / "net.pt", "--backbone", "resnet20", "--width", 4, "--data", path, "--device", "cpu", *more]
    tiny.run(evaluate, *arguments, "--json", folder / "report.json")
    return json.loads((folder / "report.json").read_text())


def test_evaluation_reports_both(known, monkeypatch, tmp_path, capsys):
    *_, path = known
    torch.save(known[1].state_dict(), tmp_path / "net.pt")
    monkeypatch.setattr(adapt, "EPISODES", 20)
    monkeypatch.setattr(adapt, "STEPS", 10)
    plain = run(tmp_path, path, "--split", "38-62")
    texts = ("unseen, adapted (published variant)", "2 steps (learning rate 0.002) of the last block")
    printed = capsys.readouterr().out
    assert not any(text in printed for text in texts)
    both = run(tmp_path, path, "--split", "38-62", "--adapt-published", "--adapt-steps", "2", "--adapt-lr", "2e-3")
    printed = capsys.readouterr().out
    assert all(text in printed for text in texts)
    adapted = both["unseen"].pop("adapted")
    assert plain["unseen"].pop("adapted") == {"support": None, "published": None} and plain["unseen"] == both["unseen"]
    published, support = adapted["published"], adapted["support"]
    assert [row["label"] for row in published["per_class"]] == [3, 4, 5, 6, 7]
    assert "10 steps (learning rate 0.002)" in published["variant"]
    assert published["triplet_accuracy"] > both["unseen"]["triplet_accuracy"]
    for figure, (low, high) in published["ci95"].items():
        values = [row[figure] for row in published["per_class"]]
        assert min(values) <= low <= published[figure] <= high <= max(values)
    assert (support["steps"], support["lr"], support["episodes"]) == (2, 0.002, 20)
    found = support["few_shot"].pop("5w1s")
    assert support["few_shot"] == dict.fromkeys(("5w5s", "10w1s", "20w1s", "20w5s"))  # 5 classes of 5 images
    after, before = found["adapted"]["accuracy"], found["zero_steps"]["accuracy"]
    assert found["difference"]["difference"] == pytest.approx(after - before)
    test, kept = known[0].test.of([3, 4, 5, 6, 7]), data.hold_back(known[0].train.of([0, 1, 2]))[0]
    mean, std = data.channel_statistics(kept.images)
    net = model.build("resnet20", 4, mean=mean, std=std)
    net.load_state_dict(known[1].state_dict())
    z = normalize(model.embed(net, test.images))
    assert before == pytest.approx(float(metrics.episode_accuracies(z, test.labels, 5, 1, episodes=20).mean()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapt-steps", "0"], "--adapt-steps must be at least 1, got 0"),
        (["--adapt-steps", "2", "--adapt-lr", "0"], "--adapt-lr must be above 0, got 0"),
        (["--adapt-steps", "2", "--adapt-lr", "nan"], "--adapt-lr must be above 0, got nan"),
        (["--adapt-steps", "2", "--split", "62-38"], "--adapt-steps needs 5 or more unseen classes"),
        (["--adapt-steps", "2", "--split", "100-0"], "there are 0"),
        (["--adapt-steps", "2", "--backbone", "torchvision:resnet18"], "--adapt-steps is for resnet12, resnet20"),
        (["--penultimate", "0.5", "--backbone", "torchvision:resnet18"], "--penultimate is for resnet12, resnet20"),
        (["--width", "8", "--backbone", "torchvision:resnet18"], "--width is for resnet12, resnet20"),
        (["--adapt-published", "--split", "0-100"], "--adapt-published takes negatives from seen classes"),
    ],
)
def test_bad_values_give_one_message(known, tmp_path, refusal, more, message):
    torch.save(known[1].state_dict(), tmp_path / "net.pt")
    arguments = [tmp_path / "net.pt", "--backbone", "resnet20", "--width", 4, "--data", known[-1], *more]
    assert message in refusal(evaluate, *arguments)


def test_an_adaptation_has_the_settings_of_the_training(known, monkeypatch):
    """No flips where the training had none, and Adam without momentum."""
    (loaded, net, *_), flips, betas, augment, steps = known, [], [], adapt.augment, adapt.adapt
    monkeypatch.setattr(adapt, "augment", lambda *a, **k: flips.append(k["flip"]) or augment(*a, **k))
    monkeypatch.setattr(adapt, "adapt", lambda *a, **k: betas.append(k["beta1"]) or steps(*a, **k))
    _, episodes = next(metrics.draw_episodes(loaded.test.labels, 5, 1, episodes=1))
    adapt.SupportAdaptation(net, cli.LossOptions().triplet, 1, 1e-3, flip=False).answers(loaded.test, episodes, 1)
    assert flips == [False] and betas == [0.0]
