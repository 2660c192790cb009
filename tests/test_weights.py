"""Given weights: those of torchvision, timm, a run or others, to train from or, frozen, to recognise with."""

import csv
import http.server
import json
import runpy
import shutil
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import timm
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

import checkpoints
import data
import evaluate
import export
import metrics
import model
import oneshot
import pictures
import tiny
import train_classic
import train_reptile
from tiny import SMALL, USUAL

ONE_STEP = {  # without a width, which networks of libraries do not take
    train_classic: [*USUAL, "--epochs", "0.1", "--batch-classes", "2", "--images-per-class", "2"],
    train_reptile: [*USUAL, "--iters", "1", "--inner-steps", "2", "--way", "2", "--images-per-class", "2"],
}
CONSTANT = ["--warmup", "0", "--weight-decay", "0"]
RESNET18 = ["--backbone", "torchvision:resnet18", "--image-size", "32"]  # 16 x 16 pixels become 32 x 32


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
        width = [] if any(str(each).startswith(("torchvision:", "timm:")) for each in more) else ["--width", 4]
        out = tmp_path / script.__name__
        return ["--data", npz, "--out", out, "--overwrite", *ONE_STEP[script], *width, *more]

    return make


@pytest.fixture
def train(arguments, tmp_path):
    """Runs one step of a script with arguments; returns its last checkpoint."""

    def run(script, *more):
        tiny.run(script, *arguments(script, *more))
        return checkpoints.read(tmp_path / script.__name__ / "last.pt")

    return run


@pytest.mark.slow
@pytest.mark.parametrize("script", ONE_STEP)
def test_resnet18_from_a_file_with_frozen_stages(train, published, script, capsys, tmp_path):
    path, state = published
    saved = train(script, *RESNET18, "--weights", path, "--freeze", "3")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # torchvision's
    own = {"backbone": "torchvision:resnet18", "input_size": 32}
    assert saved["network"] == own | {"mirror": True, "turned": 0.0, "size": 16, "mean": mean, "std": std}
    assert saved["model"].pop("mean_embedding").norm() > 0.5
    for name, tensor in saved["model"].items():
        name = name.removeprefix("body.")
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
    moved = [(saved["body.layer4.1.conv2.weight"] - state["layer4.1.conv2.weight"]).norm() for saved in (slow, fast)]
    assert 0 < 1e4 * moved[0] < moved[1]


def test_imagenet_weights_come_from_torchvision(train, arguments, published, monkeypatch, tmp_path, refusal):
    """From PyTorch's cache where they are in it; without a network and a cache, one message with a way out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    errors = refusal(train_classic, *arguments(train_classic, *RESNET18, "--pretrained"))
    assert "cannot download the weights of torchvision:resnet18" in errors and "give --weights FILE" in errors
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in errors
    cache = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert not cache.exists()
    cache.write_bytes(published[0].read_bytes())
    saved = train(train_classic, *RESNET18, "--pretrained", "--freeze", "1")
    assert torch.equal(saved["model"]["body.conv1.weight"], published[1]["conv1.weight"])


def test_a_run_starts_where_another_ended(train, tmp_path):
    classic = train(train_classic)
    first = tmp_path / "train_classic" / "last.pt"
    warm = train(train_reptile, "--weights", first, "--meta-step-size", "1e-30")
    assert warm["network"]["mean"] == classic["network"]["mean"] != [0, 0, 0]
    assert warm["network"]["penultimate"] == classic["network"]["penultimate"] == 0.5  # not 0.25, Reptile's default
    assert warm["data"]["learned_before"] == [f"class {label}" for label in range(6)]
    for name, _ in model.build("resnet20", 4).named_parameters():
        assert torch.allclose(warm["model"][name], classic["model"][name], rtol=0, atol=1e-25), name


@pytest.mark.parametrize("script", [train_classic, train_reptile])
def test_training_that_does_harm_leaves_the_given_weights_the_best(npz, tmp_path, script, capsys):
    """Good weights, and an optimiser whose steps are far too long."""
    good = ["--out", tmp_path / "good", "--epochs", "30", "--batch-classes", "4", "--penultimate", "0"]
    tiny.run(train_classic, "--data", npz, *SMALL, *good)
    given = tmp_path / "good" / "best.pt"
    before, out = given.read_bytes(), tmp_path / "harmed"
    harm = ["--weights", given, "--freeze", 0, "--muon-lr", "3", "--lr", "3", "--precision", "float32"]
    harm += ["--penultimate", "0"]
    assert "has the given weights" not in capsys.readouterr().out
    tiny.run(script, "--data", npz, "--out", out, *ONE_STEP[script], "--width", 4, *harm)
    assert f"{out}/best.pt has the given weights: nothing later did better" in capsys.readouterr().out
    best, given_state = checkpoints.read(out / "best.pt"), checkpoints.read(given)
    assert tiny.same(best["model"], given_state["model"]) and best["step"] == 0
    assert best["validation"]["auc"] == pytest.approx(given_state["validation"]["auc"])
    last = checkpoints.read(out / "last.pt")
    assert last["validation"]["auc"] < best["validation"]["auc"] and given.read_bytes() == before
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["step"] == "0" and float(rows[0]["auc"]) > float(rows[-1]["auc"])


def test_a_bare_state_dict_of_a_library_is_centred_in_evaluation(published, npz):
    options = evaluate.Options((), backbone="torchvision:resnet18", data=npz, image_size=32, split="75-25")
    assert evaluate.load(str(published[0]), options, torch.device("cpu")).net.mean_embedding.any()


def test_given_weights_keep_the_parts_of_their_embedding(npz, tmp_path):
    usual = ["--data", npz, *ONE_STEP[train_classic], "--width", 4]
    tiny.run(train_classic, *usual, "--out", tmp_path / "first", "--turned", 0.5, "--penultimate", 0.25)
    for name, more in (("same", []), ("other", ["--turned", 0])):
        given = ["--weights", tmp_path / "first" / "last.pt", "--epochs", 0, "--out", tmp_path / name]
        tiny.run(train_classic, *usual, *given, *more)
        network = checkpoints.read(tmp_path / name / "best.pt")["network"]
        assert (network["turned"], network["penultimate"]) == (0.0 if more else 0.5, 0.25)


def test_given_weights_are_validated_once(train, npz, tmp_path):
    """Also if the run is resumed before its first step."""
    train(train_classic)
    given, out = tmp_path / "train_classic" / "last.pt", tmp_path / "as given"
    more = ["--data", npz, "--out", out, *ONE_STEP[train_classic], "--width", 4]
    more += ["--epochs", "0", "--weights", given]
    tiny.run(train_classic, *more)
    tiny.run(train_classic, *more, "--resume")
    with open(out / "log.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0"]


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
    shutil.copy(tmp_path / "train_classic" / "last.pt", tmp_path / "given.pt")
    more = ["--weights", tmp_path / "given.pt", *pixels]
    assert "has its own pixel statistics" in refusal(train_classic, *arguments(train_classic, *more))
    assert "give --weights FILE with them" in refusal(train_classic, *arguments(train_classic, *pixels))


@pytest.mark.parametrize(("script", "option"), [(train_reptile, "--weights"), (train_classic, "--teacher")])
def test_weights_that_know_the_unseen_classes_are_refused(train, arguments, tmp_path, refusal, script, option):
    train(train_classic)
    shutil.copy(tmp_path / "train_classic" / "last.pt", tmp_path / "given.pt")
    for own, kind in ((["--split", "50-50"], "unseen"), (["--withhold", "0.34"], "validation")):
        errors = refusal(script, *arguments(script, option, tmp_path / "given.pt", *own))
        assert f"given.pt was trained on {kind} classes (class " in errors and "); give the --split" in errors


def test_a_student_sees_the_similarities_its_teachers_see(train, npz, arguments, tmp_path, refusal):
    longer = ["--epochs", 20, "--batch-classes", 6, "--images-per-class", 4, "--penultimate", 0]
    teachers = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for seed, path in enumerate(teachers):
        train(train_classic, *longer, "--seed", seed)
        shutil.copy(tmp_path / "train_classic" / "last.pt", path)
    images = data.load(npz).test.of(range(6))
    taught = torch.cat([F.normalize(model.embed(checkpoints.load(path)[0], images)) for path in teachers], 1)

    def apart(*more):
        saved = train(train_classic, *longer, "--seed", 2, *more)
        net = checkpoints.load(tmp_path / "train_classic" / "last.pt")[0]
        return saved, float(train_classic.divergence(model.embed(net, images), taught))

    alone = apart()[1]
    student, distance = apart("--triplet-weight", 0, "--softmax-weight", 0, "--teacher", *teachers)
    assert distance < 0.5 * alone
    assert student["data"]["learned_before"] == [f"class {label}" for label in range(6)]
    train(train_classic, "--rotate", 1, "--triplet-weight", 0, "--softmax-weight", 0, "--teacher", teachers[0])
    with open(tmp_path / "train_classic" / "log.csv", newline="") as file:
        assert {float(row["loss"]) for row in csv.DictReader(file)} == {0}  # teachers were shown no turned images
    larger = tiny.write_npz(tmp_path / "larger.npz", train=8, test=3, side=32)
    errors = refusal(train_classic, *arguments(train_classic, "--teacher", teachers[0], "--data", larger))
    assert "a.pt was trained on images of 16 pixels, these have 32" in errors
    assert (tmp_path / "train_classic" / "last.pt").exists()  # what --overwrite would replace


@pytest.mark.parametrize("option", ["--teacher", "--weights"])
def test_a_run_goes_on_with_the_networks_it_began_with_only(train, arguments, tmp_path, refusal, option):
    given, made = tmp_path / "given.pt", tmp_path / "train_classic" / "last.pt"
    train(train_classic)
    shutil.copy(made, given)
    more = arguments(train_classic, option, given)
    tiny.run(train_classic, *more)
    resumed = [*(each for each in more if each != "--overwrite"), "--resume"]
    tiny.run(train_classic, *resumed)
    saved = checkpoints.read(given)
    saved["model"]["bn1.weight"] += 1
    torch.save(saved, given)
    before = made.read_bytes()
    assert "learned from other networks than the files of --weights and --teacher" in refusal(train_classic, *resumed)
    assert made.read_bytes() == before


@pytest.mark.slow
def test_a_network_of_a_library_keeps_the_size_it_was_trained_at(train, arguments, tmp_path):
    """It scales images to that itself, whatever they come in: these have 16 pixels."""
    train(train_classic, "--backbone", "torchvision:resnet18", "--image-size", 48)
    shutil.copy(tmp_path / "train_classic" / "last.pt", tmp_path / "given.pt")
    more = ["--backbone", "torchvision:resnet18", "--weights", tmp_path / "given.pt"]
    assert train(train_classic, *more)["network"]["input_size"] == 48
    for number in range(16):
        (tmp_path / "photos" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((60, 50), 90).save(tmp_path / "photos" / f"{number % 2}" / f"{number}.png")
    found = train(train_classic, *more, "--data", tmp_path / "photos", "--split", "100-0", "--epochs", 0)["network"]
    assert (found["input_size"], found["size"]) == (48, 48)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pretrained"], "--pretrained is for --backbone torchvision:NAME and timm:NAME"),
        ([*RESNET18, "--pretrained", "--weights", "{file}"], "--pretrained or --weights FILE, not both"),
        (["--freeze", "1"], "--freeze keeps given weights"),
        ([*RESNET18, "--weights", "{file}", "--freeze", "5"], "--freeze must be in 0..4"),
        (["--weights", "missing.pth"], "no such file: missing.pth"),
        (["--weights", "{npz}"], "is not a checkpoint"),
        (["--weights", "{list}"], "holds a list"),
        (["--weights", "{other}"], "is neither a checkpoint of this project nor a state dict"),
        (["--weights", "{file}"], "the weights do not fit this network"),
        (["--backbone", "torchvision:resnet34", "--weights", "{file}"], "80 missing (layer1.2.conv1.weight, "),
        (["--epochs", "0"], "--epochs 0 takes given weights as they are"),
        ([*RESNET18, "--weights", "{file}", "--epochs", "0", "--minutes", "1"], "--epochs 0 takes given weights"),
    ],
)
def test_wrong_weights_give_one_message(arguments, npz, published, tmp_path, refusal, more, message):
    names = {"npz": npz, "file": published[0], "list": tmp_path / "list.pt", "other": tmp_path / "other.pt"}
    torch.save([1], names["list"])
    torch.save({"epoch": 3}, names["other"])
    errors = refusal(train_classic, *arguments(train_classic, *[argument.format(**names) for argument in more]))
    assert message in errors and len(errors) < 600


def test_a_missing_package_is_named(arguments, monkeypatch, tmp_path, refusal):
    (tmp_path / "a.safetensors").write_bytes(bytes(8))
    for package, more in (("timm", ["--backbone", "timm:resnet18"]), ("safetensors", ["--weights", "{file}"])):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.torch", None)
        given = [argument.format(file=tmp_path / "a.safetensors") for argument in more]
        assert f"; pip install {package}\n" in refusal(train_classic, *arguments(train_classic, *given))


def test_frozen_batch_norm_keeps_its_statistics(npz):
    options = train_reptile.Options(data=npz, split="75-25", width=4)
    train = data.load_for_training(options, 0, torch.device("cpu"))
    net = model.build("resnet20", 4)
    net.freeze(1)
    before = net.bn1.running_mean.clone(), net.layer1[0].bn1.running_mean.clone()
    model.refresh_batch_norm(net, train.samples(net.normalise, augmented=False))
    assert torch.equal(net.bn1.running_mean, before[0]) and not torch.equal(net.layer1[0].bn1.running_mean, before[1])


# ------------------------------------------------------------------------------------------------------ not trained


def calibrated(script, *arguments, out):
    """The checkpoint of a run without training."""
    tiny.run(script, *arguments, "--epochs", "0", "--out", out)
    assert tiny.same(checkpoints.read(out / "best.pt")["model"], checkpoints.read(out / "last.pt")["model"])
    return checkpoints.read(out / "best.pt")


def test_a_checkpoint_without_training(published, tmp_path, capsys):
    """The weights as given, less the mean embedding of the training images; calibrated on the held-back ones."""
    npz = tiny.write_npz(tmp_path / "tiny.npz", train=16, test=4)
    path, state = published
    usual = [*RESNET18, "--weights", path, "--data", npz, "--split", "75-25", "--device", "cpu"]
    saved = calibrated(train_classic, *usual, out=tmp_path / "run")
    assert "no training: " in capsys.readouterr().out
    assert saved["step"] == saved["images"] == 0 and not saved["data"]["trained"]
    body = {name.removeprefix("body."): tensor for name, tensor in saved["model"].items()}
    assert all(torch.equal(body[name], tensor) for name, tensor in state.items() if not name.startswith("fc."))
    net, _ = checkpoints.load(tmp_path / "run" / "best.pt")
    kept, held_back = data.hold_back(data.load(str(npz)).train.of(list(range(6))))
    assert model.embed(net, kept.images).mean(0).norm() < 1e-5 < model.embed(net, held_back.images).mean(0).norm()
    z = torch.nn.functional.normalize(model.embed(net, held_back.images))
    assert saved["threshold"]["value"] == metrics.roc(z, held_back.labels).best()[1]
    assert oneshot.load(tmp_path / "run" / "best.pt").trained == frozenset()
    tiny.run(evaluate, tmp_path / "run" / "best.pt", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["measured"]["unseen"] == {"classes": 2, "images": 8} and report["unseen"]["auc"] > 50
    assert any("6 of the seen classes were not trained on" in note for note in report["notes"])
    tiny.run(evaluate, path, *usual[:2], "--image-size", 32, "--data", npz, "--threshold", "0.1")  # the state dict


def test_a_checkpoint_of_ours_without_training(train, npz, tmp_path):
    """Calibrated for other data: its classes stay those that it was trained on."""
    first = train(train_classic)
    torch.save(first, tmp_path / "first.pt")
    usual = ["--data", npz, *SMALL, "--weights", tmp_path / "first.pt"]
    saved = calibrated(train_classic, *usual, out=tmp_path / "again")
    assert tiny.same(saved["model"], first["model"]) and saved["threshold"]["value"] == first["threshold"]["value"]
    assert oneshot.load(tmp_path / "again" / "best.pt").trained == {f"class {label}" for label in range(6)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone", ["resnet12", "torchvision:squeezenet1_1", "timm:test_vit", "timm:test_efficientnet"]
)
def test_any_network_is_trained_evaluated_exported_and_used(arguments, tmp_path, backbone, capsys):
    """Weights from a .safetensors file for those of timm, with a classifier for all; images of 16 pixels become 64 for
    the libraries', or what the network wants."""
    library, _, name = backbone.partition(":")
    if library == "resnet12":
        given = tmp_path / "net.pth"
        torch.save(model.build(backbone, 4).state_dict() | {"classifier.weight": torch.zeros(64, 40)}, given)
    elif library == "timm":
        net = timm.create_model(name)
        given = tmp_path / "model.safetensors"
        save_file(net.state_dict(), given)
    else:
        given = tmp_path / "net.pth"
        torch.save(torchvision.models.get_model(name).state_dict(), given)
    size = [] if name in ("", "test_vit") else ["--image-size", 64]
    usual = ["--backbone", backbone, "--weights", given, *size]
    tiny.run(train_classic, *arguments(train_classic, *usual, "--images-per-class", 4))
    tiny.run(train_reptile, *arguments(train_reptile, *usual))
    for script in (train_classic, train_reptile):
        best = tmp_path / script.__name__ / "last.pt"
        tiny.run(evaluate, best, "--device", "cpu")
        assert "unseen" in capsys.readouterr().out
    for form in ("onnx", "torch"):
        out = best.with_suffix(export.SUFFIXES[form])
        tiny.run(export, best, "--format", form)
        pictures = [image.numpy() for image in export.random_images(3, 32).permute(0, 2, 3, 1)]
        known, found = (oneshot.load(each).embed(pictures) for each in (best, out))
        assert abs(known - found).max() < 1e-5 < abs(known[0] - known[1]).max()


def test_weights_come_from_timms_hub(train, tmp_path, monkeypatch):
    """A stand-in serves them; they are downloaded once."""
    asked = []
    net = timm.create_model("test_vit")
    file = tmp_path / "model.safetensors"
    save_file(net.state_dict(), file)

    class Hub(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return str(file)

        def end_headers(self):
            asked.append((self.command, self.path))
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "1" * 40)
            super().end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", place)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        saved = train(train_classic, "--backbone", "timm:test_vit", "--pretrained", "--freeze", 1)
        server.shutdown()
    assert [command for command, path in asked if path.endswith("/model.safetensors")] == ["HEAD", "GET"]
    assert torch.equal(saved["model"]["body.cls_token"], net.cls_token)
    assert saved["network"]["input_size"] == 160 and saved["network"]["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.slow
def test_real_weights_know_a_palace_and_a_daisy():
    """ImageNet's classes of scikit-learn's two photographs: the package's tensors have got timm's names rightly."""
    lite0 = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "lite0.py"))
    net = timm.create_model("tf_efficientnet_lite0").eval()
    net.load_state_dict(lite0["state_dict"](), strict=False)
    made = model.made_for("timm:tf_efficientnet_lite0")
    images = [pictures.read(image, made["input_size"]) for image in sklearn.datasets.load_sample_images().images]
    pixels = torch.tensor(np.stack(images)) / 255
    mean, std = torch.tensor(made["pixels"])[..., None, None]
    with torch.no_grad():
        scores = net((pixels - mean) / std)
    assert scores.argmax(1).tolist() == [698, 985]
