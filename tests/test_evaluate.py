"""evaluate.py end to end: its report, checkpoints of both kinds, thresholds, refusals."""

import json
import sys

import pytest
import torch

import engine
import evaluate
import model
import tiny
import train_classic

REPORT = {"checkpoint", "commit", "data", "split", "threshold", "seen", "unseen", "per_class"}
SIDE = {"triplet_accuracy", "pair_accuracy", "pair_accuracy_oracle", "auc", "eer", "ci95"}
UNSEEN = SIDE | {"published_protocol", "constant_answer", "few_shot", "adapted"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set and a classic checkpoint trained on it for a moment, 9 classes seen and 3 unseen."""
    folder = tmp_path_factory.mktemp("evaluate")
    npz = str(tiny.write_npz(folder / "tiny.npz", classes=12, train=24, test=8))
    out = str(folder / "run")
    arguments = f"--data {npz} --out {out} --split 75-25 --width 4 --epochs 6 --batch-classes 6 --precision float32"
    old, sys.argv = sys.argv, ["train_classic.py", *arguments.split(), "--device", "cpu"]
    try:
        train_classic.main()
    finally:
        sys.argv = old
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_report(folder, monkeypatch, capsys, tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    run(monkeypatch, folder / "run" / "best.pt", "--threshold", "auto", "--json", target)
    report = json.loads(target.read_text())
    assert report.keys() == REPORT and report["seen"].keys() == SIDE and report["unseen"].keys() == UNSEEN
    assert report["split"] == "75-25" and report["data"] == "tiny"
    assert report["threshold"]["mode"] == "auto" and "9 seen classes" in report["threshold"]["calibrated_on"]
    assert set(report["seen"]["ci95"]) == {"triplet_accuracy", "pair_accuracy"}
    assert [row["label"] for row in report["per_class"]] == [9, 10, 11] and report["per_class"][0]["name"] == "class 9"
    shots = report["unseen"]["few_shot"]
    assert shots["5w1s"] is None and shots["10w1s"] is None and shots["all1s"].keys() == {"accuracy", "ci95"}
    assert report["seen"]["triplet_accuracy"] > 80 and shots["all1s"]["accuracy"] > 60
    assert report["unseen"]["constant_answer"] == pytest.approx(200 / 3)
    printed = capsys.readouterr().out
    for text in ("class 11", "3-way 1-shot", f"{report['seen']['auc']:.1f}", "always answering"):
        assert text in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


def test_threshold(folder, monkeypatch, tmp_path):
    reports = []
    for wanted in ("auto", "0.9", "-1"):
        run(monkeypatch, folder / "run" / "best.pt", "--threshold", wanted, "--json", tmp_path / "r.json")
        reports.append(json.loads((tmp_path / "r.json").read_text()))
    assert reports[0]["threshold"] == engine.load_checkpoint(folder / "run" / "best.pt")["threshold"]
    assert reports[1]["threshold"] == {"mode": "fixed", "value": 0.9, "calibrated_on": None}
    assert reports[2]["seen"]["pair_accuracy"] == pytest.approx(50, abs=0.1)  # everything is accepted
    assert len({report["seen"]["auc"] for report in reports}) == 1


def test_a_bare_state_dict_equals_its_checkpoint(folder, monkeypatch, tmp_path, capsys):
    """The published family's files: prefixed names, a classifier, wrapped in a dict; calibrated on held-back images."""
    state = engine.load_checkpoint(folder / "run" / "best.pt")["model"]
    published = {f"module.{name}": tensor for name, tensor in state.items()} | {
        "module.linear.weight": torch.zeros(9, 16)
    }
    torch.save({"state_dict": published, "best_prec1": 70.0}, tmp_path / "net.th")
    run(monkeypatch, folder / "run" / "best.pt", "--json", tmp_path / "a.json")
    bare = ["--backbone", "resnet20", "--width", "4", "--data", folder / "tiny.npz", "--split", "75-25"]
    run(monkeypatch, tmp_path / "net.th", *bare, "--json", tmp_path / "b.json")
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["seen"] == b["seen"] and a["unseen"] == b["unseen"] and a["threshold"] == b["threshold"]
    assert b["commit"] is None and "left out linear.weight" in capsys.readouterr().out


def test_several_checkpoints(folder, monkeypatch, tmp_path):
    best, last = folder / "run" / "best.pt", folder / "run" / "last.pt"
    run(monkeypatch, best, last, "--json", tmp_path / "r.json")
    reports = json.loads((tmp_path / "r.json").read_text())
    assert [report["checkpoint"] for report in reports] == [str(best), str(last)]


def test_without_unseen_classes(folder, monkeypatch, tmp_path):
    torch.save(model.build("resnet20", 4).state_dict(), tmp_path / "net.pt")
    arguments = ["--backbone", "resnet20", "--width", 4, "--data", folder / "tiny.npz", "--split", "100-0"]
    run(monkeypatch, tmp_path / "net.pt", *arguments, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["unseen"] is None and report["per_class"] == [] and report["seen"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt"], "no such file: missing.pt"),
        (["{npz}"], "is not a checkpoint"),
        (["{pt}", "--threshold", "high"], "--threshold must be auto or a number in -1..1, got high"),
        (["{pt}", "--threshold", "2"], "--threshold must be"),
        (["{pt}", "--data", "nowhere.npz"], "no such file: nowhere.npz"),
        (["{pt}", "--split", "50-50"], "was trained on classes that --split 50-50 calls unseen"),
        (["{pt}", "--backbone", "resnet56"], "wrong --backbone or --width"),
        (["{pt}", "--json", "/no/such/folder/r.json"], "no such folder"),
        (["{bare}"], "is a bare state dict: give --backbone and --data"),
        ([], "at least one checkpoint"),
    ],
)
def test_bad_input_gives_one_message(folder, monkeypatch, capsys, tmp_path, arguments, message):
    torch.save(model.build("resnet20", 4).state_dict(), tmp_path / "bare.pt")
    names = {"npz": folder / "tiny.npz", "pt": folder / "run" / "best.pt", "bare": tmp_path / "bare.pt"}
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *[argument.format(**names) for argument in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err and "Traceback" not in captured.err
