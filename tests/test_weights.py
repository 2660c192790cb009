"""Training from given weights: ResNet-18 from torchvision's, any network from a run's or others' files."""

import csv
import urllib.request

import pytest
import torch
import torchvision

import data
import evaluate
import model
import tiny
import train_classic
import train_reptile
from tiny import SMALL

ONE_STEP = {
    train_classic: [*SMALL, "--epochs", "0.1", "--batch-classes", "2", "--images-per-class", "2"],
    train_reptile: [*SMALL, "--iters", "1", "--inner-steps", "2", "--way", "2", "--images-per-class", "2"],
}
CONSTANT = ["--warmup", "0", "--weight-decay", "0"]
RESNET18 = ["--backbone", "resnet18", "--enlarge", "2"]  # 16 x 16 pixels become 32 x 32


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return str(tiny.write_npz(tmp_path_factory.mktemp("data") / "tiny.npz", train=8, test=3))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in the layout of torchvision's weights, classifier and all, and the state dict in it."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(state, path)
    return path, state


@pytest.fixture
def arguments(npz, tmp_path):
    """The arguments of one step of a script."""

    def make(script, *more):
        out = tmp_path / script.__name__
        return ["--data", npz, "--out", out, "--overwrite", *ONE_STEP[script], *more]

    return make


@pytest.fixture
def train(arguments, tmp_path):
    """Runs one step of a script with arguments; returns its last checkpoint."""

    def run(script, *more):
        tiny.run(script, *arguments(script, *more))
        return model.load_checkpoint(tmp_path / script.__name__ / "last.pt")

    return run


@pytest.mark.slow
@pytest.mark.parametrize("script", ONE_STEP)
def test_resnet18_from_a_file_with_frozen_stages(train, published, script, capsys, tmp_path):
    path, state = published
    saved = train(script, *RESNET18, "--weights", path, "--freeze", "3")
    mean, std = model.IMAGENET
    own = {"backbone": "resnet18", "stem": "full", "enlarge": 2}
    assert saved["network"] == own | {"mirror": True, "turned": 0.0, "size": 16, "mean": mean, "std": std}
    for name, tensor in saved["model"].items():
        frozen = name.startswith(("conv1.", "bn1.", "layer1.", "layer2."))
        assert torch.equal(tensor, state[name]) == frozen, name
    assert "resnet18: 11.18 M parameters, 10.49 M of them trained" in capsys.readouterr().out
    tiny.run(evaluate, tmp_path / script.__name__ / "last.pt")
    assert "unseen" in capsys.readouterr().out


def test_the_network_can_learn_at_a_rate_of_its_own(train, published):
    path, state = published
    slow, fast = (
        train(train_classic, *RESNET18, "--weights", path, "--optimizer", "sgd", *CONSTANT, *more)["model"]
        for more in (["--backbone-lr", "1e-6"], [])
    )
    moved = [(saved["layer4.1.conv2.weight"] - state["layer4.1.conv2.weight"]).norm() for saved in (slow, fast)]
    assert 0 < 1e4 * moved[0] < moved[1]


def test_imagenet_weights_come_from_torchvision(train, arguments, published, monkeypatch, tmp_path, refusal):
    """From PyTorch's cache where they are in it; without a network and a cache, one message with a way out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    errors = refusal(train_classic, *arguments(train_classic, *RESNET18, "--pretrained"))
    assert "cannot download the ImageNet weights" in errors and "give --weights FILE" in errors
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in errors
    cache = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert not cache.exists()
    cache.write_bytes(published[0].read_bytes())
    saved = train(train_classic, *RESNET18, "--pretrained", "--freeze", "1")
    assert torch.equal(saved["model"]["conv1.weight"], published[1]["conv1.weight"])


def test_a_run_starts_where_another_ended(train, tmp_path):
    classic = train(train_classic)
    first = tmp_path / "train_classic" / "last.pt"
    warm = train(train_reptile, "--weights", first, "--meta-step-size", "1e-30")
    assert warm["network"]["mean"] == classic["network"]["mean"] != [0, 0, 0]
    assert warm["data"]["learned_before"] == [f"class {label}" for label in range(6)]
    for name, _ in model.build("resnet20", 4).named_parameters():
        assert torch.allclose(warm["model"][name], classic["model"][name], rtol=0, atol=1e-25), name


@pytest.mark.parametrize("script", [train_classic, train_reptile])
def test_training_that_does_harm_leaves_the_given_weights_the_best(npz, tmp_path, script):
    """Good weights, and an optimiser whose steps are far too long."""
    tiny.run(train_classic, "--data", npz, "--out", tmp_path / "good", *SMALL, "--epochs", "30", "--batch-classes", "4")
    given = tmp_path / "good" / "best.pt"
    before, out = given.read_bytes(), tmp_path / "harmed"
    harm = ["--weights", given, "--freeze", 0, "--muon-lr", "3", "--lr", "3", "--precision", "float32"]
    tiny.run(script, "--data", npz, "--out", out, *ONE_STEP[script], *harm)
    best, given_state = model.load_checkpoint(out / "best.pt"), model.load_checkpoint(given)
    assert tiny.same(best["model"], given_state["model"]) and best["step"] == 0
    assert best["validation"]["auc"] == pytest.approx(given_state["validation"]["auc"])
    last = model.load_checkpoint(out / "last.pt")
    assert last["validation"]["auc"] < best["validation"]["auc"] and given.read_bytes() == before
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["step"] == "0" and float(rows[0]["auc"]) > float(rows[-1]["auc"])


@pytest.mark.parametrize(("script", "lr"), [(train_classic, 0.1), (train_reptile, 0.001)])
def test_given_weights_are_trained_gently(train, tmp_path, script, lr, capsys):
    scratch = train(script)
    assert "training images are few: a network in weights/" in capsys.readouterr().out
    first = tmp_path / "first.pt"
    (tmp_path / script.__name__ / "last.pt").rename(first)
    other = ["--lr", 0.3, "--muon-lr", 0.4, "--freeze", 0]
    warm, chosen = (train(script, "--weights", first, *more) for more in ([], other))
    assert "are few" not in capsys.readouterr().out
    found = [tuple(run["options"][name] for name in ("lr", "muon_lr", "freeze")) for run in (scratch, warm, chosen)]
    assert found == [(lr, 0.02, 0), (pytest.approx(lr / 10), pytest.approx(0.002), 3), (0.3, 0.4, 0)]
    for name in ("conv1.weight", "layer2.2.conv2.weight"):
        assert torch.equal(warm["model"][name], scratch["model"][name])
        assert not torch.equal(chosen["model"][name], scratch["model"][name])


def test_a_state_dict_brings_its_pixel_statistics(train, arguments, tmp_path, refusal):
    torch.save(train(train_classic)["model"], tmp_path / "net.pt")
    pixels = ["--pixel-mean", 0.5, 0.4, 0.3, "--pixel-std", 0.2, 0.25, 0.3]
    saved = train(train_classic, "--weights", tmp_path / "net.pt", *pixels)
    assert saved["network"]["mean"] == [0.5, 0.4, 0.3] and saved["network"]["std"] == [0.2, 0.25, 0.3]
    more = ["--weights", tmp_path / "train_classic" / "last.pt", *pixels]
    assert "has its own pixel statistics" in refusal(train_classic, *arguments(train_classic, *more))
    assert "give --weights FILE with them" in refusal(train_classic, *arguments(train_classic, *pixels))


def test_weights_that_know_the_unseen_classes_are_refused(train, arguments, tmp_path, refusal):
    train(train_classic)
    more = ["--weights", tmp_path / "train_classic" / "last.pt", "--split", "50-50"]
    assert "was trained on classes that are unseen here" in refusal(train_reptile, *arguments(train_reptile, *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pretrained"], "--pretrained is for --backbone resnet18"),
        ([*RESNET18, "--pretrained", "--weights", "{file}"], "--pretrained or --weights FILE, not both"),
        (["--freeze", "1"], "--freeze keeps given weights"),
        ([*RESNET18, "--weights", "{file}", "--freeze", "5"], "--freeze must be in 0..4"),
        (["--weights", "missing.pth"], "no such file: missing.pth"),
        (["--weights", "{npz}"], "is not a checkpoint"),
        (["--weights", "{list}"], "holds a list"),
        (["--weights", "{other}"], "is neither a checkpoint of this project nor a state dict"),
        (["--weights", "{file}"], "the weights do not fit this network"),
        ([*RESNET18, "--weights", "{file}", "--stem", "small"], "the weights do not fit this network"),
        (["--stem", "full"], "--stem and --enlarge are for --backbone resnet18"),
        (["--backbone", "resnet18", "--enlarge", "-1"], "--enlarge must be at least 0"),
    ],
)
def test_wrong_weights_give_one_message(arguments, npz, published, tmp_path, refusal, more, message):
    names = {"npz": npz, "file": published[0], "list": tmp_path / "list.pt", "other": tmp_path / "other.pt"}
    torch.save([1], names["list"])
    torch.save({"epoch": 3}, names["other"])
    errors = refusal(train_classic, *arguments(train_classic, *[argument.format(**names) for argument in more]))
    assert message in errors and len(errors) < 600


def test_frozen_batch_norm_keeps_its_statistics(npz):
    options = train_reptile.Options(data=npz, split="75-25", width=4)
    train = data.load_for_training(options, 0, torch.device("cpu"))
    net = model.build("resnet20", 4)
    net.freeze(1)
    before = net.bn1.running_mean.clone(), net.layer1[0].bn1.running_mean.clone()
    model.refresh_batch_norm(net, train.kept.images)
    assert torch.equal(net.bn1.running_mean, before[0]) and not torch.equal(net.layer1[0].bn1.running_mean, before[1])
