"""The training scripts end to end on a tiny data set: learning, resuming, stopping, logs, published settings."""

import csv
import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import checkpoints
import cli
import data
import evaluate
import metrics
import model
import tiny
import train_classic
import train_reptile
import training
from tiny import CLASSIC, REPTILE, SMALL, same

ROOT = Path(__file__).parent.parent
SCRIPTS = [(train_classic, CLASSIC), (train_reptile, REPTILE)]


def test_validation_classes_are_measured_and_not_trained_on(train, tmp_path, monkeypatch):
    out = train(train_classic, CLASSIC, tmp_path / "run", "--withhold", "0.34", "--epochs", "2")
    with open(out / "log.csv", newline="") as file:
        row = [row for row in csv.DictReader(file) if row["auc"]][-1]
    assert all(0 < float(row[name]) <= 100 for name in ("new_triplet_accuracy", "new_pair_accuracy", "new_one_shot"))
    facts = checkpoints.read(out / "best.pt")["data"]
    assert facts["seen"] == [0, 1, 2, 3] and facts["validation"] == [4, 5] and facts["unseen"] == [6, 7]
    loaded = evaluate.load(str(out / "best.pt"), evaluate.Options((str(out / "best.pt"),)), torch.device("cpu"))
    assert loaded.seen == facts["seen"] and loaded.unseen == facts["unseen"] and loaded.calibration is not None


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_training_learns_and_leaves_its_files(train, tmp_path, script, arguments):
    out = train(script, arguments, tmp_path / "run", *(["--iters", "40"] if script is train_reptile else []))
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "log.csv"]
    best = checkpoints.read(out / "best.pt")
    assert best["validation"]["triplet_accuracy"] > 80  # 50 is chance
    assert best["options"]["width"] == 4 and best["data"]["unseen"] == [6, 7]
    assert "training" not in best
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and float(rows[-1]["auc"]) > 80


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_resuming_gives_the_same_bits(train, tmp_path, capsys, monkeypatch, script, arguments):
    whole = train(script, arguments, tmp_path / "whole")
    original = script.triplet_loss
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            assert (tmp_path / "parts" / "log.csv").read_text().startswith("step,images,")
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(script, "triplet_loss", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(script, arguments, tmp_path / "parts")
    assert stop.value.code == 130
    stopped = checkpoints.read(tmp_path / "parts" / "last.pt")
    monkeypatch.setattr(script, "triplet_loss", original)
    parts = train(script, arguments, tmp_path / "parts", "--resume")
    ends = [checkpoints.read(out / "last.pt") for out in (whole, parts)]
    assert stopped["step"] < ends[0]["step"]
    assert same(*ends)
    capsys.readouterr()
    train(script, arguments, tmp_path / "parts", "--resume")
    assert "nothing is left to do" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_a_run_can_be_as_long_as_there_is_time(train, tmp_path, monkeypatch, script, arguments):
    """Whatever the number of steps; the rate falls to 0 by the clock, which here advances each time it is read."""
    seconds = itertools.count(0, 0.03)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    out = train(script, arguments, tmp_path / "run", "--minutes", "0.04")
    saved = checkpoints.read(out / "last.pt")
    assert saved["seconds"] >= 2.4
    with open(out / "log.csv", newline="") as file:
        rates = [float(row["rate"]) for row in csv.DictReader(file)]
    assert rates[-1] < 0.3 * max(rates)
    before = (out / "best.pt").read_bytes()
    train(script, arguments, out, "--minutes", "0.04", "--resume")  # it is at its end
    assert (out / "best.pt").read_bytes() == before and checkpoints.read(out / "last.pt")["step"] == saved["step"]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_two_runs_agree_and_another_seed_differs(train, tmp_path, script, arguments):
    runs = [train(script, arguments, tmp_path / str(i), *more) for i, more in enumerate(([], [], ["--seed", "1"]))]
    first, second, other = (checkpoints.read(run / "last.pt")["model"] for run in runs)
    assert same(first, second) and not same(first, other)


def test_a_run_is_never_lost(train, tmp_path, capsys):
    out = train(train_reptile, REPTILE, tmp_path / "run")
    before = (out / "last.pt").read_bytes()
    for arguments, message in (
        (REPTILE, "holds a run"),
        ([*REPTILE, "--resume", "--lr", "0.5"], "other options; to resume it give --lr 0.001"),
        ([*REPTILE, "--resume", "--no-flip"], "to resume it give --flip\n"),
        ([*REPTILE, "--resume", "--minutes", "1"], "to resume it give no --minutes"),
    ):
        with pytest.raises(SystemExit) as stop:
            train(train_reptile, arguments, out)
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert (out / "last.pt").read_bytes() == before
    train(train_reptile, REPTILE, out, "--overwrite", "--seed", "3")
    assert (out / "last.pt").read_bytes() != before


def test_a_non_finite_loss_stops_the_run(train, tmp_path, capsys, monkeypatch):
    original = train_reptile.triplet_loss
    monkeypatch.setattr(train_reptile, "triplet_loss", lambda *a, **k: original(*a, **k) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        train(train_reptile, REPTILE, tmp_path / "run")
    assert stop.value.code == 1 and "the loss is nan" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_weights_that_are_not_finite_are_never_saved(train, tmp_path, capsys, monkeypatch, script, arguments):
    """As by the gradient of a validated step, whose loss was still finite."""
    original = training.Run.check

    def check(run):
        row = original(run)
        if run.step >= 10:
            next(run.net.parameters()).data.fill_(float("nan"))
        return row

    monkeypatch.setattr(training.Run, "check", check)
    with pytest.raises(SystemExit) as stop:
        train(script, arguments, tmp_path / "run", "--validate-every", "1")
    assert stop.value.code == 1 and "the weights are no longer finite" in capsys.readouterr().err
    for name in ("best.pt", "last.pt"):
        saved = checkpoints.read(tmp_path / "run" / name)
        assert saved["step"] < 10 and all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_collapsed_embeddings_stop_the_run(train, tmp_path, capsys, monkeypatch):
    original = train_classic.triplet_loss
    monkeypatch.setattr(train_classic, "triplet_loss", lambda e, *a, **k: original(e * 0 + 1, *a, **k))
    monkeypatch.setattr(
        model.ResNet, "forward", lambda self, x: x.mean() * 0 + torch.ones(len(x), 16) + self.bn1.bias[0] * 0
    )
    with pytest.raises(SystemExit) as stop:
        train(train_classic, [*CLASSIC, "--softmax-weight", "0", "--epochs", "60"], tmp_path / "run")
    assert stop.value.code == 1 and "all embeddings point the same way" in capsys.readouterr().err


@pytest.fixture
def endless_training(npz, tmp_path):
    """Starts a process that trains without end; returns it when it has saved a checkpoint."""
    command = [sys.executable, "train_classic.py", "--data", npz, "--out", str(tmp_path / "run"), *CLASSIC]
    started = []

    def start(**options):
        started.append(subprocess.Popen([*command, "--epochs", "100000"], cwd=ROOT, **options))
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        return started[0]

    yield start
    started[0].kill()
    started[0].wait()


@pytest.mark.slow
def test_ctrl_c_in_a_shell_saves_and_says_how_to_go_on(endless_training, tmp_path):
    process = endless_training(stderr=subprocess.PIPE, text=True)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert re.search("stopping: validating and saving.*go on with --resume", errors, re.DOTALL)
    assert checkpoints.read(tmp_path / "run" / "last.pt")["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_saves(endless_training, tmp_path, nohup):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = endless_training(**streams, start_new_session=True, preexec_fn=take_terminal)
    os.close(theirs)
    saved = checkpoints.read(tmp_path / "run" / "last.pt")["step"]
    os.close(ours)  # the kernel sends SIGHUP
    if nohup:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.terminate()
    assert process.wait(timeout=60) == 128 + (signal.SIGTERM if nohup else signal.SIGHUP)
    assert checkpoints.read(tmp_path / "run" / "last.pt")["step"] > saved


PUBLISHED_CLASSIC = (
    "--backbone resnet56 --rotate 0 --cutout 0 --epochs 150 --optimizer adam --lr 0.001 --no-decay --warmup 0 "
)
PUBLISHED_CLASSIC += "--weight-decay 0 --mining all --no-soft-margin --margin 0.3 --triplet-weight 1 --softmax-weight 0"
PUBLISHED_REPTILE = (
    "--backbone resnet56 --rotate 0 --cutout 0 --task domain --images-per-class 128 --iters 10000 --inner-steps 30 "
)
PUBLISHED_REPTILE += "--optimizer adam --lr 0.001 --beta1 0.9 --meta-step-size 0.01 "
PUBLISHED_REPTILE += "--mining all --no-soft-margin --margin 0.3"


@pytest.mark.parametrize(
    ("script", "published", "shorter"),
    [
        (train_classic, PUBLISHED_CLASSIC, ["--epochs", "0.1"]),
        (train_reptile, PUBLISHED_REPTILE, ["--iters", "1", "--inner-steps", "1", "--images-per-class", "8"]),
    ],
)
def test_the_published_settings_are_available(train, tmp_path, monkeypatch, script, published, shorter):
    """The command lines of docs/published.md, except for their length; the loss is what they say."""
    original = script.triplet_loss
    settings = []

    def recording(*args, others=None, **kwargs):
        settings.append(kwargs)
        return original(*args, others=others, **kwargs)

    monkeypatch.setattr(script, "triplet_loss", recording)
    out = train(script, [*published.split(), *SMALL, *shorter], tmp_path / "run")
    assert checkpoints.read(out / "last.pt")["network"].items() >= {"backbone": "resnet56", "width": 4}.items()
    assert {"margin": 0.3, "distance": "cosine", "mining": "all", "soft_margin": False}.items() <= settings[0].items()


def test_adam_without_decay_keeps_its_learning_rate(train, tmp_path):
    out = train(train_classic, [*CLASSIC, "--optimizer", "adam", "--lr", "0.001", "--no-decay"], tmp_path / "run")
    saved = checkpoints.read(out / "last.pt")
    assert [group["lr"] for group in saved["training"]["optimizer"]["param_groups"]] == [0.001, 0.001]
    assert "exp_avg_sq" in saved["training"]["optimizer"]["state"][0]
    assert saved["validation"]["triplet_accuracy"] > 80


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_a_compiled_network_learns_the_same(train, tmp_path, monkeypatch, script, arguments, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    arguments = [*arguments, "--device", device, "--precision", "float32"]
    compile, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda net, **how: compiled.append(net) or compile(net, **how))
    first_losses = []  # those of later steps drift apart
    for more in ([], ["--compile"]):
        out = train(script, arguments, tmp_path / str(len(more)), *more)
        with open(out / "log.csv", newline="") as file:
            first_losses.append(float(next(csv.DictReader(file))["loss"]))
        assert checkpoints.read(out / "best.pt")["validation"]["triplet_accuracy"] > 80
    close = 0.02 if device == "cpu" else 0.05  # convolutions in TF32
    assert first_losses[1] == pytest.approx(first_losses[0], rel=close) and len(compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_deterministic_runs_agree_bit_for_bit(train, tmp_path, monkeypatch, script, arguments, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    original = script.triplet_loss
    modes = []

    def watching(*args, **kwargs):
        modes.append(torch.are_deterministic_algorithms_enabled())
        return original(*args, **kwargs)

    monkeypatch.setattr(script, "triplet_loss", watching)
    arguments = [*arguments, "--device", device, "--deterministic"]
    runs = [checkpoints.read(train(script, arguments, tmp_path / str(i)) / "last.pt") for i in range(2)]
    assert same(*runs) and all(modes)
    torch.use_deterministic_algorithms(False)


def test_tensorboard_shows_the_log(train, tmp_path):
    out = train(train_reptile, REPTILE, tmp_path / "run", "--withhold", "0.34", "--log-dir", str(tmp_path / "events"))
    (events,) = (tmp_path / "events").iterdir()
    shown = {}
    for event in EventFileLoader(str(events)).Load():
        for value in event.summary.value:
            shown.setdefault(value.tag, {})[event.step] = value.tensor.float_val[0]
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in rows[0].keys() - {"step", "images", "seconds"}:
        logged = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert logged and shown[name] == pytest.approx(logged, rel=1e-4), name


def test_without_tensorboard_one_message_says_how_to_get_it(train, tmp_path, capsys, monkeypatch):
    out = train(train_reptile, REPTILE, tmp_path / "run")
    before = (out / "log.csv").read_bytes()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        train(train_reptile, REPTILE, out, "--overwrite", "--log-dir", str(tmp_path / "events"))
    assert stop.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err
    assert (out / "log.csv").read_bytes() == before and (out / "last.pt").exists()


def test_batch_norm_statistics_are_those_of_the_weights(npz):
    """After a refresh, evaluation mode normalises augmented images to mean 0 and variance 1 in each channel."""
    options = train_reptile.Options(data=npz, split="75-25", width=4, cutout=0.375, rotate=0.25)
    train = data.load_for_training(options, 0, torch.device("cpu"))
    mean, std = train.pixel_statistics
    net = model.build("resnet20", 4, mean=mean, std=std)
    net.bn1.running_mean.fill_(1e6)
    random_before = torch.get_rng_state(), train.generator.get_state()
    net.bn1.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.1, module.training))
    model.refresh_batch_norm(net, train.samples(net.normalise, augmented=True))
    assert all(map(torch.equal, random_before, (torch.get_rng_state(), train.generator.get_state())))
    assert net.training and net.bn1.momentum == 0.1
    (batch,) = train.samples(net.normalise, augmented=True)
    assert batch.shape == (len(train.kept), 3, 16, 16) and (batch == 0).float().mean() > 0.1  # blanked squares
    out = net.eval().bn1(net.conv1(batch))
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(out.var((0, 2, 3)), torch.ones(4), atol=1e-2)


def test_batch_norm_is_measured_on_what_is_better_on_held_back_images(npz, tmp_path):
    arguments = [*REPTILE, "--data", npz, "--out", tmp_path / "run", "--cutout", "0.5", "--rotate", "0.5"]
    tiny.run(train_reptile, *arguments)
    net, saved = checkpoints.load(tmp_path / "run" / "last.pt")
    options = cli.DataOptions(data=npz, split="75-25", cutout=0.5, rotate=0.5)
    train, found = data.load_for_training(options, 0, torch.device("cpu")), []
    net.requires_grad_(True)
    for augmented in (True, False):
        model.refresh_batch_norm(net, train.samples(net.normalise, augmented))
        net.centre(train.kept)
        z = torch.nn.functional.normalize(model.embed(net, train.held_back))
        found.append(metrics.roc(z, train.held_back.labels).auc)
    assert abs(found[0] - found[1]) > 1e-3 and abs(saved["validation"]["auc"] - max(found)) < 1e-6


def test_batch_norm_is_measured_on_batches_of_one_size(npz):
    """A last batch of one image would count as much as one of 250."""
    train = data.load_for_training(cli.DataOptions(str(npz), split="75-25"), 0, torch.device("cpu"))
    for count, sizes in ((251, [126, 125]), (250, [250]), (3, [3]), (501, [167] * 3)):
        images = train.kept[torch.arange(count) % len(train.kept)]
        batches = dataclasses.replace(train, kept=images).samples(lambda pixels: pixels.float(), False)
        assert [len(batch) for batch in batches] == sizes


def test_nearly_equal_embeddings_leave_a_checkpoint_that_can_be_read(train, tmp_path, monkeypatch):
    """Their products round to more than 1, where no threshold may be."""
    monkeypatch.setattr(
        training.Run, "embed", lambda self, images: (torch.full((len(images), 24), 24**-0.5), images.labels)
    )
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", 1)
    for name in ("best.pt", "last.pt"):
        assert -1 <= checkpoints.read(out / name)["threshold"]["value"] <= 1


def test_what_stops_is_saved_before_it_is_validated(train, tmp_path, monkeypatch):
    """There may be no time to validate."""

    def interrupt(run):
        raise KeyboardInterrupt

    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", 2)
    before = torch.load(out / "last.pt", weights_only=True)
    check = training.Run.check

    def stop(run):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(run)

    monkeypatch.setattr(training.Run, "LOG_EVERY", 1)
    monkeypatch.setattr(training.Run, "check", stop)
    monkeypatch.setattr(training.Run, "validate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(train_classic, CLASSIC, tmp_path / "next", "--epochs", 2)
    saved = torch.load(tmp_path / "next" / "last.pt", weights_only=True)
    assert saved["step"] == 4 and saved["threshold"] is None
    monkeypatch.undo()
    train(train_classic, CLASSIC, tmp_path / "next", "--epochs", 2, "--resume")
    assert same(torch.load(tmp_path / "next" / "last.pt", weights_only=True)["model"], before["model"])


def test_the_best_of_equals_is_the_last(train, tmp_path, monkeypatch):
    monkeypatch.setattr(training.Run, "embed", lambda self, images: (F.one_hot(images.labels).float(), images.labels))
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", 4, "--validate-every", 1)
    best, last = (torch.load(out / name, weights_only=True)["step"] for name in ("best.pt", "last.pt"))
    assert best == last


def test_held_back_and_unseen_images_never_reach_the_training(npz):
    loaded = data.load(npz)
    train = data.load_for_training(train_classic.Options(data=npz, split="75-25"), 0, torch.device("cpu"))
    everything = {bytes(image.numpy()) for image in loaded.train.images}
    kept, held = ({bytes(image.numpy()) for image in part.images} for part in (train.kept, train.held_back))
    unseen = {bytes(image.numpy()) for image in loaded.train.of([6, 7]).images}
    assert not kept & held and not (kept | held) & unseen and kept | held | unseen == everything
    assert train.pixel_statistics == data.channel_statistics(train.kept.images)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.pt"
    with cli.writing(path) as temporary:
        torch.save({"x": torch.ones(2)}, temporary)
    with pytest.raises(AttributeError), cli.writing(path) as temporary:
        torch.save({"x": lambda: 0}, temporary)
    assert checkpoints.read(path)["x"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    (tmp_path / "bad.pt").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoints.read(tmp_path / "bad.pt")


def test_the_rate_rises_and_falls(train, tmp_path):
    options = train_classic.Options(warmup=0.2)
    rates = [train_classic.schedule(progress, options) for progress in (0, 0.1, 0.2, 0.6, 1)]
    assert rates == pytest.approx([0.01, 0.505, 1, 0.5, 0])
    state = checkpoints.read(train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "1") / "last.pt")["training"]
    groups = [group for name in ("muon", "optimizer") for group in state[name]["param_groups"]]
    shares = [group["lr"] / group["peak"] for group in groups]
    assert len(shares) == 3 and shares == pytest.approx([shares[0]] * 3) and shares[0] < 0.5


def test_turned_classes_are_targets_of_their_own(npz):
    options = train_classic.Options(data=npz, split="75-25", width=4, rotate=1.0)
    train = data.load_for_training(training.with_defaults(options, lr=0.1, muon_lr=0.1), 0, torch.device("cpu"))
    seen = torch.tensor(train.facts["seen"])
    _, target, index = train_classic.draw(train, model.build("resnet20", 4), seen, options)
    assert (target >= len(seen)).all() and torch.equal(seen[target % len(seen)], train.kept.labels[index])


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_every_option_of_the_loss_reaches_it(train, tmp_path, monkeypatch, script, arguments):
    found, original = [], script.triplet_loss
    monkeypatch.setattr(script, "triplet_loss", lambda *a, **k: found.append(k) or original(*a, **k))
    given = "--distance euclidean --mining hard --no-soft-margin --margin 0.7 --temperature 0.2".split()
    shorter = ["--epochs", "0.1"] if script is train_classic else ["--iters", "1"]
    train(script, arguments, tmp_path / "run", *shorter, *given)
    wanted = {"distance": "euclidean", "mining": "hard", "soft_margin": False, "margin": 0.7, "temperature": 0.2}
    assert {name: found[0][name] for name in wanted} == wanted


def test_without_flips_an_embedding_has_no_mirror_image(train, tmp_path):
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "0.1", "--no-flip")
    assert checkpoints.read(out / "last.pt")["network"]["mirror"] is False


@pytest.mark.slow
def test_a_resumed_run_has_the_rest_of_its_minutes(train, tmp_path, monkeypatch):
    """By a clock that advances each time it is read."""
    seconds, calls, original = itertools.count(0, 0.03), [], train_classic.triplet_loss

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 15:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(train_classic, "triplet_loss", stop)
    with pytest.raises(SystemExit):
        train(train_classic, CLASSIC, tmp_path / "run", "--minutes", "0.02")
    before = checkpoints.read(tmp_path / "run" / "last.pt")["seconds"]
    assert 0.3 < before < 1.2
    train(train_classic, CLASSIC, tmp_path / "run", "--minutes", "0.02", "--resume")
    assert len(calls) <= 15 + (1.2 - before) / 0.03 + 1
