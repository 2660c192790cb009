"""The scripts' command lines: every option is explained, every wrong value gives one message and exit status 2."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cli
import evaluate
import export
import predict
import serve
import tiny
import train_classic
import train_reptile

ROOT = Path(__file__).parent.parent
TRAININGS = [train_classic, train_reptile]


def call(capsys, script, *arguments) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a script that must end by itself."""
    with pytest.raises(SystemExit) as stop:
        tiny.run(script, *arguments)
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("script", [*TRAININGS, evaluate, predict, serve, export])
def test_help_explains_every_option_and_shows_two_examples(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "100")
    status, text, _ = call(capsys, script, "--help")
    assert status == 0
    assert not re.search(r"\bSTR\b|FLOAT FLOAT|default: (\)|None)", text)
    assert (" CHECKPOINT" in text.splitlines()[0]) == (script not in TRAININGS)
    named = {"json": "FILE", "csv": "FILE", "weights": "FILE", "out": "FILE" if script is export else "FOLDER"}
    named |= dict.fromkeys(("report", "support", "data-root", "log-dir"), "FOLDER") | {"threshold": "auto|NUMBER"}
    named |= {"data": "cifar100|omniglot|glyphs|FILE|FOLDER", "criterion": "balanced|eer|far:RATE"}
    for flag, value in re.findall(r"^\W+--([a-z-]+) (\S+)", text, re.MULTILINE):
        assert value == named.get(flag, value)
    assert len(re.findall(rf"^ +python {script.__name__}\.py", text, re.MULTILINE)) >= 2
    entries = [
        " ".join(entry.replace("│", " ").split()) for entry in re.split(r"^[│ ] (?=--)", text, flags=re.MULTILINE)
    ]
    for field in dataclasses.fields(script.Options):
        flag = f"--{field.name.replace('_', '-')}"
        if field.default is dataclasses.MISSING:
            continue  # a positional argument: the usage line and the examples show it
        if isinstance(field.default, bool):
            flag = f"{flag}, --no-{flag[2:]}"
        (entry,) = [entry for entry in entries if entry.startswith(f"{flag} ")]
        explained = re.sub(r"^(\{.*?\}|[A-Z|]+|R G B) ", "", entry.removeprefix(f"{flag} "))  # the type
        assert len(re.findall("[a-z]{2,}", explained.split("(default")[0])) >= 2, entry


@pytest.mark.parametrize("script", [*TRAININGS, evaluate, predict, serve, export])
def test_help_needs_no_pytorch(script):
    """It takes seconds to load."""
    code = f"""
import runpy, sys
class Halt:
    def find_spec(self, name, *more):
        assert name != "torch", "imports PyTorch"
sys.meta_path.insert(0, Halt())
runpy.run_path({script.__file__!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "show this help message" in done.stdout, done.stderr


@pytest.mark.parametrize("script", TRAININGS)
def test_help_groups_the_options(capsys, script):
    _, text, _ = call(capsys, script, "--help")
    titles = re.findall(r"^\W* (\w+) options \W*$", text, re.MULTILINE)
    assert titles == ["data", "network", "loss", "optimisation", "run"]
    assert "(default: runs/classic)" in text or "(default: runs/reptile)" in text


BOTH = [
    ("--data nowhere.npz", "no such file: nowhere.npz"),
    ("--data mnist", "unknown data 'mnist'"),
    ("--data {text}", "text': give cifar100"),
    ("--data {empty}", "has no folders"),
    ("--data-root {text} --data cifar100", "cannot download CIFAR-100"),
    ("--image-size 64", "resnet20 takes images that are no picture files as they are"),
    ("--image-size big", "big"),
    ("--out {text}", "is not a folder"),
    ("--out {text}/below", "Not a directory"),
    ("--split 90", "split must be"),
    ("--split 1-99", "leaves fewer than 2"),
    ("--split cifar-fs", "is for the 100 classes of CIFAR-100"),
    ("--split-seed x", "x"),
    ("--withhold -0.1", "--withhold must be at least 0, got -0.1"),
    ("--withhold 0.01", "must stay on each side"),
    ("--backbone vgg", "vgg"),
    ("--width 0", "width must be at least 1"),
    ("--width 5000", "--width must be at least 1 and at most 1024, got 5000"),
    ("--cutout 2", "--cutout must be at least 0 and at most 1, got 2"),
    ("--width 4.5", "4.5"),
    ("--freeze 1", "--freeze keeps given weights"),
    ("--weights nowhere.pt", "no such file: nowhere.pt"),
    ("--pretrained", "--pretrained is for --backbone torchvision:NAME and timm:NAME"),
    ("--backbone torchvision:resnet19", "near ones: torchvision:resnet18"),
    ("--backbone torchvision:resnet18 --penultimate 0.5", "--penultimate is for resnet12, resnet20"),
    ("--backbone torchvision:resnet18 --width 16", "--width is for resnet12, resnet20"),
    ("--penultimate 2", "--penultimate must be at least 0 and at most 1, got 2"),
    ("--backbone torchvision:resnet18 --image-size 7", "--image-size must be at least 8 and at most 4096, got 7"),
    ("--distance manhattan", "manhattan"),
    ("--mining easy", "easy"),
    ("--margin -0.1", "--margin must be at least 0, got -0.1"),
    ("--margin nan", "--margin must be at least 0, got nan"),
    ("--temperature 0", "--temperature must be at least 1e-06 and at most 1e+06, got 0"),
    ("--temperature inf", "--temperature must be at least 1e-06 and at most 1e+06, got inf"),
    ("--device toaster", "'toaster' cannot be used here"),
    ("--device cuda:99", "'cuda:99' cannot be used here"),
    ("--precision half", "half"),
    ("--minutes 0", "--minutes must be above 0 and at most 1e+06, got 0"),
    ("--cutout -1", "--cutout must be at least 0 and at most 1, got -1"),
    ("--rotate -0.1", "--rotate must be at least 0"),
    ("--rotate 1.5", "--rotate must be at least 0 and at most 1, got 1.5"),
    ("--rotate nan", "--rotate must be at least 0"),
    ("--minutes nan", "--minutes must be above 0 and at most 1e+06, got nan"),
    ("--seed -1", "--seed must be at least 0, got -1"),
    (f"--seed {2**64}", "--seed must be below"),
    ("--log-dir {text}", "text is not a folder"),
    ("--resume", "no such file"),
    ("--lr 0", "--lr must be above 0, got 0"),
    ("--lr -1", "--lr must be above 0, got -1"),
    ("--lr nan", "--lr must be above 0, got nan"),
    ("--lr inf", "--lr must be above 0, got inf"),
    ("--muon-lr 0", "--muon-lr must be above 0"),
    ("--muon-weight-decay -1", "--muon-weight-decay must be at least 0"),
    ("--optimizer lion", "lion"),
    ("--images-per-class 1", "--images-per-class must be at least 2 and at most 100000, got 1"),
    ("--no-such-option 1", "Unrecognized"),
    ("stray", "Unrecognized"),
]
CLASSIC = [
    ("--epochs 0", "--epochs 0 takes given weights as they are: give --pretrained or --weights"),
    ("--epochs -1", "--epochs must be at least 0"),
    ("--epochs inf", "--epochs must be at least 0"),
    ("--validate-every 0", "--validate-every must be above 0"),
    ("--batch-classes 1", "--batch-classes must be at least 2"),
    ("--backbone-lr 0", "--backbone-lr must be above 0"),
    ("--backbone-lr 1e-3", "--backbone-lr is for --optimizer sgd or adam"),
    ("--warmup -1", "--warmup must be at least 0"),
    ("--warmup 1", "--warmup is a fraction of the run, below 1"),
    ("--weight-decay -1", "--weight-decay must be at least 0"),
    ("--triplet-weight -1", "--triplet-weight must be at least 0"),
    ("--softmax-weight nan", "--softmax-weight must be at least 0"),
    ("--softmax-weight 0 --triplet-weight 0", "there is nothing to learn from"),
    ("--teacher missing.pt", "no such file: missing.pt"),
    ("--teacher-weight -1", "--teacher-weight must be at least 0"),
    ("--softmax-scale 0", "--softmax-scale must be above 0"),
]
REPTILE = [
    ("--iters 0", "--iters must be at least 1"),
    ("--task circle", "circle"),
    ("--task domain", "give --rotate 0 with it"),
    ("--way 1", "--way must be at least 2"),
    ("--inner-steps 0", "--inner-steps must be at least 1"),
    ("--beta1 1", "--beta1 must be"),
    ("--beta1 -0.1", "--beta1 must be"),
    ("--beta1 nan", "--beta1 must be"),
    ("--meta-batch 0", "--meta-batch must be at least 1"),
    ("--meta-step-size 0", "--meta-step-size must be above 0"),
    ("--validate-every 0", "--validate-every must be at least 1"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A good data set, a file that is nothing, an empty folder."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "text").write_text("nothing")
    (folder / "empty").mkdir()
    return {"npz": tiny.write_npz(folder / "tiny.npz"), "text": folder / "text", "empty": folder / "empty"}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        *((script, *case) for script in TRAININGS for case in BOTH),
        *((train_classic, *case) for case in CLASSIC),
        *((train_reptile, *case) for case in REPTILE),
    ],
)
def test_a_wrong_value_gives_one_message(capsys, tmp_path, places, script, arguments, message):
    given = arguments.format(**places).split()
    usual = ["--data", places["npz"], "--out", tmp_path / "run", "--split", "75-25", "--device", "cpu"]
    status, out, errors = call(capsys, script, *usual, *given)
    assert status == 2 and message in errors + out and "Traceback" not in errors
    assert not (tmp_path / "run").exists()
    if errors.startswith("error: "):
        assert errors.count("error") == 1 + message.count("error") and len(errors) < 600


def test_images_that_are_not_square_are_refused(capsys, tmp_path):
    made = tiny.arrays()
    made |= {f"{part}_images": made[f"{part}_images"][:, :12] for part in ("train", "test")}
    np.savez(tmp_path / "wide.npz", **made)
    arguments = ("--data", tmp_path / "wide.npz", "--out", tmp_path / "run", "--device", "cpu")
    status, _, errors = call(capsys, train_classic, *arguments)
    assert status == 2 and "train_images must be square, got 12 x 16 pixels; crop them" in errors
    assert not (tmp_path / "run").exists()


def test_too_few_images_are_refused(capsys, tmp_path):
    for count, message in (
        (1, "training images or more, an anchor and a positive: class 0, class 1, class 2"),
        (3, "need 4 training images or more"),
    ):
        npz = tiny.write_npz(tmp_path / "few.npz", train=count, test=2)
        status, _, errors = call(capsys, train_classic, "--data", npz, "--out", tmp_path / "run")
        assert status == 2 and message in errors and not (tmp_path / "run").exists()


def test_too_few_validation_images_are_refused(capsys, tmp_path):
    made = tiny.arrays()
    kept = made["train_labels"] != 5
    kept[np.flatnonzero(~kept)[0]] = True
    made |= {name: made[name][kept] for name in ("train_images", "train_labels")}
    np.savez(tmp_path / "few.npz", **made)
    arguments = ("--data", tmp_path / "few.npz", "--split", "75-25", "--withhold", "0.34", "--out", tmp_path / "run")
    status, _, errors = call(capsys, train_classic, *arguments)
    assert status == 2 and "validation classes need 2 training images or more" in errors and "class 5" in errors


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("batch_classes", 64, "--batch-classes 64"),
        ("flip", True, "--flip"),
        ("soft_margin", False, "--no-soft-margin"),
        ("minutes", None, "no --minutes"),
        ("teacher", (), "no --teacher"),
        ("teacher", ("a.pt", "b.pt"), "--teacher a.pt b.pt"),
    ],
)
def test_an_option_is_shown_as_one_gives_it(name, value, text):
    assert cli.as_given(name, value) == text


def test_what_is_printed_of_a_name():
    """Words of any script as they are; what a terminal would obey, or nobody could see, as an escape."""
    for name in ("می\u200cخواهم", "東京\u3000タワー", "👩\u200d🌾", "10\u00a0%"):
        assert cli.printable(name) == name
    assert cli.printable("\x1b[2J \u202e \u2028 \udce9") == r"\x1b[2J \u202e \u2028 \udce9"
