"""evaluate.py end to end: its report, checkpoints of both kinds, thresholds, refusals."""

import csv
import dataclasses
import datetime
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import checkpoints
import data
import evaluate
import metrics
import model
import oneshot
import sources
import tiny
import train_classic

REPORT = {"checkpoint", "commit", "data", "split", "threshold", "seen", "unseen", "per_class"}
REPORT |= {"training", "network", "date", "thresholds", "compared_with", "measured", "notes", "open_set"}
SIDE = {"triplet_accuracy", "pair_accuracy", "pair_accuracy_oracle", "auc", "eer", "ci95"}
BARE = ["--backbone", "resnet20", "--width", "4", "--data", "{npz}", "--split", "75-25"]
UNSEEN = SIDE | {"published_protocol", "constant_answer", "few_shot", "adapted"}


def stored(path) -> dict:
    """A checkpoint's threshold as a report tells it."""
    threshold = checkpoints.read(path)["threshold"]
    assert threshold.pop("strangers")
    return threshold


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set and a classic checkpoint trained on it for a moment, 9 classes seen and 3 unseen."""
    folder = tmp_path_factory.mktemp("evaluate")
    npz = str(tiny.write_npz(folder / "tiny.npz", classes=12, train=24, test=8))
    tiny.train_classic(npz, folder / "run")
    return folder


def test_report(folder, capsys, tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    tiny.run(evaluate, folder / "run" / "best.pt", "--threshold", "auto", "--json", target)
    report = json.loads(target.read_text())
    assert report.keys() == REPORT and report["seen"].keys() == SIDE and report["unseen"].keys() == UNSEEN
    assert report["split"] == "75-25" and report["data"] == "tiny"
    training = report["training"]
    assert training["images"] > training["step"] > 0 and training["options"]["epochs"] == 6
    assert str(folder) not in target.read_text().replace(report["checkpoint"], "")  # no other file is named
    own = {"backbone": "resnet20", "width": 4, "size": 16, "parameters": 17156}
    assert report["network"] == own | {"mirror": True, "turned": 0.0, "penultimate": 0.5}
    assert report["date"] == datetime.date.today().isoformat()
    assert report["threshold"]["mode"] == "auto" and "9 seen classes" in report["threshold"]["calibrated_on"]
    assert set(report["seen"]["ci95"]) == {"triplet_accuracy", "pair_accuracy"}
    assert [row["label"] for row in report["per_class"]] == [9, 10, 11] and report["per_class"][0]["name"] == "class 9"
    shots = report["unseen"]["few_shot"]
    assert shots["5w1s"] is None and shots["10w1s"] is None and shots["all1s"]["episodes"] == 10_000
    assert shots["all1s"]["ci95"] is None and report["unseen"]["ci95"]["pair_accuracy"] is None  # of three classes
    rows = [(row["enrolled"], row["classes"], row["pictures"]) for row in report["open_set"]]
    assert rows == [("unseen", 1, 1), ("unseen", 1, 5), ("seen", 9, 1), ("seen", 9, 5)]
    assert all(row["auroc"][0] > 60 and row["right@0.1"][0] >= row["right@0.01"][0] for row in report["open_set"][::2])
    assert "strangers" not in report["threshold"]
    assert report["measured"]["seen"] == {"classes": 9, "images": 72} and len(report["notes"]) == 2
    assert report["seen"]["triplet_accuracy"] > 80 and shots["all1s"]["accuracy"] > 60
    printed = capsys.readouterr().out
    for text in ("class 11", "all 3, 1-shot", f"{report['seen']['auc']:.1f}", "unseen: 24 images of 3 classes"):
        assert text in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "given", "kept", "told"),
    [
        ("weights", "far/given.pt", "given.pt", ", trained on from the weights of given.pt"),
        ("pretrained", True, True, ", trained on from the weights of ImageNet"),
        ("teacher", ("far/a.pt", "b.pt"), ["a.pt", "b.pt"], ", with the teachers a.pt, b.pt"),
    ],
)
def test_a_report_tells_whose_weights_came_first(folder, capsys, tmp_path, option, given, kept, told):
    saved = torch.load(folder / "run" / "best.pt", weights_only=True)
    saved["options"][option] = given
    torch.save(saved, tmp_path / "best.pt")
    files = "--json", tmp_path / "report.json", "--report", tmp_path / "page"
    tiny.run(evaluate, tmp_path / "best.pt", "--threshold", "0.5", *files)
    assert json.loads((tmp_path / "report.json").read_text())["training"]["options"][option] == kept
    assert told + "\n" in capsys.readouterr().out and told in (tmp_path / "page" / "index.html").read_text()


def test_recipes_are_chosen_without_test_images_and_unseen_classes(folder, tmp_path, refusal):
    """Held-back images give what the training's log says; blank test images and unseen classes change nothing."""
    npz, out = folder / "tiny.npz", tmp_path / "run"
    tiny.train_classic(npz, out, "--withhold", "0.34")
    with open(out / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))[-1]
    arrays = dict(np.load(npz))
    arrays["test_images"][:] = 0
    arrays["train_images"][arrays["train_labels"] >= 9] = 0  # unseen
    np.savez(tmp_path / "blank.npz", **arrays)
    target = tmp_path / "report.json"
    tiny.run(evaluate, out / "last.pt", "--data", tmp_path / "blank.npz", "--on", "validation", "--json", target)
    report = json.loads(target.read_text())
    assert report["split"] == "75-25, validation classes"
    assert [row["label"] for row in report["per_class"]] == [6, 7, 8]
    assert report["seen"]["triplet_accuracy"] == pytest.approx(float(log["triplet_accuracy"]), abs=1e-3)
    loaded = evaluate.load(str(out / "last.pt"), evaluate.Options((), data=str(npz)), torch.device("cpu"))
    new = loaded.data.train.of([6, 7, 8])
    found = metrics.accuracies(loaded.embed(new), new.labels, 0.5)["triplet_accuracy"]
    assert report["unseen"]["triplet_accuracy"] == found.value
    assert found.value == pytest.approx(float(log["new_triplet_accuracy"]), abs=1e-3)
    for arguments, message in (
        ([folder / "run" / "best.pt", "--on", "validation"], "train with --withhold 0.1"),
        ([out / "last.pt", "--on", "validation", "--adapt-published"], "--adapt-published trains on the images"),
        ([out / "last.pt", "--split", "own"], "split must be"),
        ([out / "last.pt", "--split", "75-25", "--split-seed", 2**63], "--split-seed must be 0 or more and below"),
        ([out / "last.pt", "--split", "100-0", "--adapt-published"], "needs training images of unseen classes"),
    ):
        assert message in refusal(evaluate, *arguments)


def test_threshold(folder, tmp_path):
    reports = []
    for wanted in ("auto", "0.9", "-1"):
        tiny.run(evaluate, folder / "run" / "best.pt", "--threshold", wanted, "--json", tmp_path / "r.json")
        reports.append(json.loads((tmp_path / "r.json").read_text()))
    assert reports[0]["threshold"] == stored(folder / "run" / "best.pt")
    threshold = reports[1]["threshold"]
    assert (threshold["mode"], threshold["value"], threshold["calibrated_on"]) == ("fixed", 0.9, None)
    assert reports[2]["seen"]["pair_accuracy"] == pytest.approx(50, abs=0.1)  # everything is accepted
    assert len({report["seen"]["auc"] for report in reports}) == 1


def test_a_bare_state_dict_equals_its_checkpoint(folder, tmp_path, capsys):
    """The published family's files: prefixed names, a classifier, wrapped in a dict; calibrated on held-back images."""
    state = checkpoints.read(folder / "run" / "best.pt")["model"]
    published = {f"module.{name}": tensor for name, tensor in state.items()} | {
        "module.linear.weight": torch.zeros(9, 16)
    }
    torch.save({"state_dict": published, "best_prec1": 70.0}, tmp_path / "net.th")
    tiny.run(evaluate, folder / "run" / "best.pt", "--json", tmp_path / "a.json")
    bare = ["--backbone", "resnet20", "--width", "4", "--data", folder / "tiny.npz", "--split", "75-25"]
    parts = ["--mirror", "yes", "--penultimate", "0.5"]
    tiny.run(evaluate, tmp_path / "net.th", *bare, *parts, "--json", tmp_path / "b.json")
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["seen"] == b["seen"] and a["unseen"] == b["unseen"] and a["threshold"] == b["threshold"]
    assert b["commit"] is None and "left out linear.weight" in capsys.readouterr().out


def test_a_bare_state_dict_can_come_with_its_pixel_statistics(folder, tmp_path, refusal):
    """By default it gets those of the training images; a checkpoint has its own."""
    best = folder / "run" / "best.pt"
    saved = checkpoints.read(best)
    torch.save(saved["model"], tmp_path / "net.pt")
    bare = ["--backbone", "resnet20", "--width", 4, "--data", folder / "tiny.npz", "--split", "75-25"]
    own = ["--pixel-mean", *saved["network"]["mean"], "--pixel-std", *saved["network"]["std"]]
    other = ["--pixel-mean", 0.5, 0.5, 0.5, "--pixel-std", 0.3, 0.3, 0.3]
    sides = []
    for statistics in ([], own, other):
        tiny.run(evaluate, tmp_path / "net.pt", *bare, *statistics, "--json", tmp_path / "r.json")
        sides.append(json.loads((tmp_path / "r.json").read_text())["seen"])
    assert sides[0] == sides[1] != sides[2]
    assert "has its own pixel statistics" in refusal(evaluate, best, *own)
    assert "go together" in refusal(evaluate, tmp_path / "net.pt", *bare, *own[:4])
    assert "on the scale 0..1" in refusal(evaluate, tmp_path / "net.pt", *bare, *own[:4], "--pixel-std", 51, 51, 51)


def test_pictures_of_a_folder_are_scaled_as_wished(tmp_path):
    for part in ("train", "test"):
        arrays = tiny.arrays(classes=4, side=32)
        for i, (pixels, label) in enumerate(zip(arrays[f"{part}_images"], arrays[f"{part}_labels"], strict=True)):
            (tmp_path / part / f"{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / f"{label}" / f"{i}.png")
    net = model.build("resnet20", 4)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    shared = dict(data=str(tmp_path), split="50-50", backbone="resnet20", width=4)
    for size, side in ((None, 32), (16, 16)):
        options = evaluate.Options((str(tmp_path / "net.pt"),), image_size=size, **shared)
        loaded = evaluate.load(options.checkpoints[0], options, torch.device("cpu"))
        assert loaded.data.test.images.shape == (24, 3, side, side)


def test_a_threshold_goes_with_the_size_of_the_pictures(folder, tmp_path):
    path, large = str(folder / "run" / "best.pt"), tiny.write_npz(tmp_path / "large.npz", classes=12, side=32)
    stored = checkpoints.read(path)["threshold"]
    for place, wanted in ((None, stored), (str(large), None)):
        loaded = evaluate.load(path, evaluate.Options((path,), data=place), torch.device("cpu"))
        assert loaded.calibration == wanted


@pytest.mark.slow
def test_other_views_than_in_training_can_be_evaluated(folder, tmp_path):
    """Another network, in effect: the stored threshold, which goes with the other, is not used."""
    reports = []
    as_trained = ["--mirror", "yes", "--turned", "0", "--penultimate", "0.5"]
    for name, more in enumerate(([], as_trained, ["--mirror", "no"], ["--turned", "0.5"], ["--penultimate", "0"])):
        tiny.run(evaluate, folder / "run" / "best.pt", *more, "--json", tmp_path / f"{name}.json")
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert reports[0] == reports[1]
    for other in reports[2:]:
        assert reports[0]["seen"] != other["seen"] and reports[0]["threshold"] != other["threshold"]
        assert other["threshold"]["calibrated_on"] == reports[0]["threshold"]["calibrated_on"]


def test_thresholds_side_by_side(folder, tmp_path):
    tiny.run(evaluate, folder / "run" / "best.pt", "--criterion", "far:0.05", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {row["name"]: row for row in report["thresholds"]}
    assert list(rows) == [
        *("auto balanced", "auto eer", "auto far:0.01", "auto far:0.05"),
        *("oracle", "always different"),
    ]
    assert rows["auto far:0.05"]["value"] == report["threshold"]["value"] and report["threshold"]["false_accept"] <= 5
    assert rows["auto balanced"]["value"] == checkpoints.read(folder / "run" / "best.pt")["threshold"]["value"]
    for side in ("seen", "unseen"):
        assert rows["auto far:0.05"][side]["1:1"] == pytest.approx(report[side]["pair_accuracy"])
        assert rows["oracle"][side]["1:1"] == pytest.approx(report[side]["pair_accuracy_oracle"])
        assert (rows["always different"][side]["1:1"], rows["always different"][side]["1:9"]) == (50, 90)
        for row in list(rows.values())[:-2]:
            accept, reject = row[side]["false_accept"], row[side]["false_reject"]
            assert row[side]["1:1"] == pytest.approx(100 - (accept + reject) / 2)
            assert row[side]["1:9"] == pytest.approx(100 - 0.9 * accept - 0.1 * reject)
            assert row[side]["1:9"] <= rows["oracle"][side]["1:9"] + 1e-9 >= 90


def test_store(folder, tmp_path):
    """The checkpoint takes the new threshold, nothing else of it changes, and evaluation then goes by it."""
    path = tmp_path / "best.pt"
    path.write_bytes((folder / "run" / "best.pt").read_bytes())
    before = checkpoints.read(path)
    assert before["threshold"]["criterion"] == "balanced" and before["threshold"]["logistic"][0] > 0
    tiny.run(evaluate, path, "--criterion", "far:0.02", "--store", "--json", tmp_path / "r.json")
    after = checkpoints.read(path)
    assert after["threshold"]["criterion"] == "far:0.02" and after["threshold"]["false_accept"] <= 2
    assert stored(path) == json.loads((tmp_path / "r.json").read_text())["threshold"]
    assert after["threshold"]["logistic"] == before["threshold"]["logistic"]
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in before.pop("model").items())
    assert all(after[name] == value for name, value in before.items() if name != "threshold")
    older = {name: value for name, value in after["threshold"].items() if name != "strangers"}
    torch.save(after | {"threshold": older}, path)
    tiny.run(evaluate, path, "--criterion", "far:0.02", "--store")
    assert checkpoints.read(path)["threshold"] == after["threshold"]


def test_a_threshold_of_other_data_is_not_taken_for_that_of_the_training(folder, tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes((folder / "run" / "best.pt").read_bytes())
    before = stored(path)
    other = with_classes(folder / "tiny.npz", tmp_path / "other.npz", [f"new {label}" for label in range(12)])
    tiny.run(evaluate, path, "--data", other, "--split", "75-25", "--store")
    assert stored(path)["data"] == "other" and stored(path)["value"] != before["value"]
    assert evaluated(tmp_path, path)["threshold"]["value"] == pytest.approx(before["value"], abs=1e-6)
    tiny.run(evaluate, path, "--store")
    assert "data" not in stored(path)


def test_features_before_the_last_block_can_be_added_to_an_older_checkpoint(folder, tmp_path, refusal):
    """Their statistics are measured on the training images, as at the end of a training, and stored. Never on the
    images to be evaluated."""
    path, whole = tmp_path / "older.pt", checkpoints.read(folder / "run" / "best.pt")
    own = {name: tensor for name, tensor in whole["model"].items() if not name.startswith("penultimate")}
    network = {name: value for name, value in whole["network"].items() if name != "penultimate"}
    torch.save(whole | {"model": own, "network": network, "threshold": None}, path)
    runs = write_runs(tmp_path / "runs.zip", np.load(folder / "tiny.npz"))
    assert "lacks the statistics of these features" in refusal(evaluate, path, "--penultimate", "0.5", "--runs", runs)
    tiny.run(evaluate, path, "--penultimate", "0.5", "--store")
    net, saved = checkpoints.load(path)
    assert net.penultimate == whole["network"]["penultimate"] == 0.5 and saved["network"] == whole["network"]
    assert saved["threshold"] == whole["threshold"] and saved["model"]["penultimate_std"].std() > 0
    assert all(torch.allclose(saved["model"][name], tensor, atol=1e-6) for name, tensor in whole["model"].items())


@pytest.mark.slow
def test_checkpoints_are_compared_on_the_same_images(folder, tmp_path, capsys):
    best, untrained = folder / "run" / "best.pt", tmp_path / "untrained.pt"
    saved = checkpoints.read(best)
    torch.manual_seed(0)
    older = {name: fact for name, fact in saved["data"].items() if name != "validation"}  # as in older checkpoints
    torch.save(saved | {"model": model.build("resnet20", 4).state_dict(), "data": older}, untrained)
    tiny.run(evaluate, best, untrained, best, "--json", tmp_path / "r.json", "--report", tmp_path / "page")
    first, second, third = json.loads((tmp_path / "r.json").read_text())
    assert [report["checkpoint"] for report in (first, second, third)] == [str(best), str(untrained), str(best)]
    assert first["compared_with"] is None and second["compared_with"]["checkpoint"] == str(best)
    for side in ("seen", "unseen"):
        for figure in ("triplet_accuracy", "pair_accuracy"):
            found = second["compared_with"][side][figure]
            assert found["difference"] == pytest.approx(second[side][figure] - first[side][figure])
            if side == "seen":  # of the unseen ones there are three
                assert found["ci95"][0] <= found["difference"] <= found["ci95"][1], figure
        for found in third["compared_with"][side].values():
            assert found["difference"] == 0 and found["ci95"] == ([0, 0] if side == "seen" else None)
    assert second["compared_with"]["seen"]["pair_accuracy"]["ci95"][1] < 0  # by a threshold of another network
    shots = second["compared_with"]["unseen"]["all1s"]
    accuracies = [report["unseen"]["few_shot"]["all1s"]["accuracy"] for report in (first, second)]
    assert shots["difference"] == pytest.approx(accuracies[1] - accuracies[0])
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"{untrained} minus {best}" in capsys.readouterr().out and f"{untrained} minus {best}" in page
    assert page.count('<a href="3/index.html">') == 1
    assert f"{untrained}: tiny, split 75-25" in (tmp_path / "page" / "2" / "index.html").read_text()


def test_a_gallery_goes_with_a_checkpoint_whose_threshold_alone_is_new(folder, tmp_path):
    path, whole = tmp_path / "older.pt", checkpoints.read(folder / "run" / "best.pt")
    own = {name: tensor for name, tensor in whole["model"].items() if not name.startswith("penultimate")}
    network = {name: value for name, value in whole["network"].items() if name != "penultimate"}
    torch.save(whole | {"model": own, "network": network}, path)
    before = oneshot.load(path).fingerprint
    tiny.run(evaluate, path, "--criterion", "eer", "--store")
    assert oneshot.load(path).fingerprint == before and checkpoints.read(path)["threshold"]["criterion"] == "eer"


def test_ctrl_c_ends_an_evaluation_in_one_word(folder, monkeypatch, refusal):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "measure", interrupted)
    assert refusal(evaluate, folder / "run" / "best.pt", status=130).endswith("interrupted\n")


def test_json_is_written_before_anything_that_may_fail(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no page")

    for name in ("show", "write"):
        monkeypatch.setattr(evaluate.report, name, fail)
        with pytest.raises(RuntimeError, match="no page"):
            arguments = ("--json", tmp_path / name, "--report", tmp_path / "page")
            tiny.run(evaluate, folder / "run" / "best.pt", *arguments)
        assert json.loads((tmp_path / name).read_text()).keys() == REPORT


@pytest.mark.slow
def test_figures_arrive_in_any_encoding_and_soon(folder, tmp_path):
    """Class names that a terminal without UTF-8 lacks; without a page neither matplotlib nor the compiler is loaded."""
    arrays = dict(np.load(folder / "tiny.npz"))
    names, saved = [f"東京 {label}" for label in range(12)], checkpoints.read(folder / "run" / "best.pt")
    np.savez(tmp_path / "names.npz", **arrays | {"class_names": np.array(names)})
    saved["data"]["classes"] = names
    torch.save(saved, tmp_path / "best.pt")
    code = f"""
import sys
import zipfile
sys.path.insert(0, {str(Path(evaluate.__file__).parent)!r})
import evaluate
evaluate.main(sys.argv[1:])
print(*(name for name in ("matplotlib", "torchvision", "torch._dynamo") if name in sys.modules))
"""
    command = [sys.executable, "-c", code, tmp_path / "best.pt", "--data", tmp_path / "names.npz"]
    command += ["--json", tmp_path / "r.json"]
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for more, loaded in (([], ""), (["--report", tmp_path / "東"], "matplotlib")):
        done = subprocess.run([*command, *more], env=os.environ | plain, capture_output=True)
        lines = done.stdout.decode("ascii").splitlines()
        assert done.returncode == 0 and lines[-1].split() == loaded.split(), done.stderr.decode()
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["per_class"][2]["name"] == "東京 11" and "+- " in done.stdout.decode()
        (row,) = [line.split() for line in lines if line.startswith("11 \\u6771\\u4eac 11 ")]
        assert row[3:] == [f"{report['per_class'][2][name]:.1f}" for name in ("triplet_accuracy", "pair_accuracy")]
    assert "東京 11" in (tmp_path / "東" / "index.html").read_text(encoding="utf-8")


def evaluated(tmp_path, *arguments):
    """The report of evaluate.py with these arguments."""
    tiny.run(evaluate, *arguments, "--json", tmp_path / "r.json")
    return json.loads((tmp_path / "r.json").read_text())


def with_classes(npz, path, names):
    """A data set with only these classes of another, and copies of its first class under names that it lacks."""
    arrays = dict(np.load(npz))
    known, made = arrays["class_names"].tolist(), {"class_names": np.array(names)}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        parts = [images[labels == (known.index(name) if name in known else 0)] for name in names]
        made[f"{part}_images"] = np.concatenate(parts)
        made[f"{part}_labels"] = np.arange(len(names)).repeat([len(each) for each in parts])
    np.savez(path, **made)
    return path


@pytest.mark.parametrize(
    ("gone", "added", "seen", "unseen"),
    [
        ([4], [], [0, 1, 2, 3, 5, 6, 7, 8], ["class 9", "class 10", "class 11"]),
        ([10], [], [*range(9)], ["class 9", "class 11"]),
        ([0, 11], ["a", "b"], [*range(1, 9)], ["class 9", "class 10", "a", "b"]),
    ],
)
def test_classes_are_known_by_name(folder, tmp_path, capsys, refusal, gone, added, seen, unseen):
    """What a network was trained on is never unseen, whichever classes came or went; its threshold stays."""
    best = folder / "run" / "best.pt"
    names = [f"class {label}" for label in range(12) if label not in gone] + added
    path = with_classes(folder / "tiny.npz", tmp_path / "own.npz", names)
    report = evaluated(tmp_path, best, "--data", path)
    assert [row["name"] for row in report["per_class"]] == unseen
    loaded = evaluate.load(str(best), evaluate.Options((), data=str(path)), torch.device("cpu"))
    assert [names[label] for label in loaded.seen] == [f"class {label}" for label in seen]
    assert report["threshold"] == stored(best)
    text = f"{len(gone)} of the checkpoint's classes are missing here: class {gone[0]}"
    assert text in report["notes"][-1] and text in capsys.readouterr().out
    assert "calls unseen (class" in refusal(evaluate, best, "--data", path, "--split", "0-100")


def test_it_is_told_if_pictures_came_or_went(tmp_path):
    """Without a test folder the last sixth is for testing, so images that were trained on may take its place."""
    arrays = tiny.arrays(classes=4, train=48)
    for place, (pixels, label) in enumerate(zip(arrays["train_images"], arrays["train_labels"], strict=True)):
        (tmp_path / "a" / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / f"class {label}" / f"{place:03}.png")
    options = ["--split", "100-0", "--image-size", 16, "--width", 4, "--epochs", 1, "--device", "cpu"]
    tiny.run(train_classic, "--data", tmp_path / "a", *options, "--out", tmp_path / "run")

    def notes():
        evaluate.load_data.cache_clear()
        return evaluate.load(str(tmp_path / "run" / "last.pt"), evaluate.Options(()), torch.device("cpu")).notes

    assert not notes()
    for path in sorted((tmp_path / "a").glob("*/*.png"))[-6:]:
        path.unlink()
    (note,) = notes()
    assert note.startswith("pictures came, went or changed since the training: it may have seen")


def test_weights_it_started_from_count_as_training(folder, tmp_path):
    saved = checkpoints.read(folder / "run" / "best.pt")
    saved["data"] |= {"classes": ["x", "y"], "seen": [0, 1], "unseen": [], "learned_before": ["class 3", "class 5"]}
    torch.save(saved, tmp_path / "best.pt")
    loaded = evaluate.load(str(tmp_path / "best.pt"), evaluate.Options(()), torch.device("cpu"))
    assert loaded.seen == [3, 5] and len(loaded.unseen) == 10


def test_a_network_is_measured_on_pictures_of_new_classes(folder, tmp_path):
    """All images count, by the checkpoint's own threshold, with --split 0-100 or without."""
    best = folder / "run" / "best.pt"
    path = with_classes(folder / "tiny.npz", tmp_path / "own.npz", ["a", "b", "c", "d"])
    report = evaluated(tmp_path, best, "--data", path, "--split", "0-100")
    assert report["seen"] is None and report["measured"]["unseen"] == {"classes": 4, "images": 4 * 32}
    assert report["measured"]["copies"] == {"of_training_images": 0, "of_test_images": 3 * 32}
    assert report["threshold"] == stored(best)
    assert [row["name"] for row in report["thresholds"]] == ["auto balanced", "oracle", "always different"]
    loaded = evaluate.load(str(best), evaluate.Options((), data=str(path)), torch.device("cpu"))
    assert loaded.seen == [] and len(loaded.data.test) == 4 * 32


def test_a_threshold_is_calibrated_on_enough_pictures_or_is_the_checkpoints(folder, tmp_path, refusal):
    best, bare = folder / "run" / "best.pt", tmp_path / "net.pt"
    path = with_classes(folder / "tiny.npz", tmp_path / "own.npz", ["a", "b", "c", "d", "e", "f", "g"])
    for split, source in (
        ("3-4", "27 held-back training images of 9 seen"),
        ("5-2", "15 held-back training images of 5"),
    ):
        options = evaluate.Options((), data=str(path), split=split)
        loaded = evaluate.load(str(best), options, torch.device("cpu"))
        assert evaluate.pick_thresholds(loaded, options)[0]["calibrated_on"].startswith(source)
        assert loaded.notes[0].startswith(f"{split[0]} of the seen classes were not trained on: a, b, c")
    torch.save(checkpoints.read(best)["model"], bare)
    for arguments in ([best, "--criterion", "eer"], [best, "--mirror", "no"], [bare, *BARE[:4]]):
        message = refusal(evaluate, *arguments, "--data", path, "--split", "0-100")
        assert "has no threshold by --criterion" in message and "give --threshold a number" in message


def test_a_report_says_when_pixel_statistics_are_those_of_its_images(folder, tmp_path):
    torch.save(model.build("resnet20", 4).state_dict(), tmp_path / "bare.pt")
    given = [tmp_path / "bare.pt", *BARE[:4], "--data", folder / "tiny.npz", "--threshold", 0.5]
    statistics = ["--split", "0-100", "--pixel-mean", *[0.5] * 3, "--pixel-std", *[0.2] * 3]
    for more, told in ((["--split", "0-100"], True), (["--split", "75-25"], False), (statistics, False)):
        notes = evaluated(tmp_path, *given, *more)["notes"]
        assert any("these images' statistics" in note for note in notes) == told


def test_published_figures_stand_beside_cifar100_only(folder, tmp_path, capsys):
    path = with_classes(folder / "tiny.npz", tmp_path / "cifar100.npz", [f"class {label}" for label in range(12)])
    found = [evaluated(tmp_path, folder / "run" / "best.pt", "--data", each) for each in (path, folder / "tiny.npz")]
    for report, published in zip(found, (True, False), strict=True):
        assert ({"fixed 0.2", "fixed 0.7"} <= {row["name"] for row in report["thresholds"]}) == published
        assert (report["unseen"]["published_protocol"] is not None) == published
    assert found[0]["unseen"]["constant_answer"] == pytest.approx(200 / 3)
    assert capsys.readouterr().out.count("always answering") == 1
    evaluated(tmp_path, folder / "run" / "best.pt", "--data", path, "--split", "90-10")  # fewer classes than CIFAR-100
    words = " ".join(capsys.readouterr().out.split())
    assert "published, Reptile 73.4 67.6 80.0 68.80*" in words and "10 class 10" in words


def test_one_test_image_a_class(folder, tmp_path, capsys):
    """There are no pairs of one class: in words, with a page and a report."""
    arrays = dict(np.load(folder / "tiny.npz"))
    first = [int(np.argmax(arrays["test_labels"] == label)) for label in range(12)]
    arrays |= {"test_images": arrays["test_images"][first], "test_labels": arrays["test_labels"][first]}
    arrays["test_images"][9] = arrays["train_images"][0]
    np.savez(tmp_path / "few.npz", **arrays)
    more = "--data", tmp_path / "few.npz", "--report", tmp_path / "page"
    report = evaluated(tmp_path, folder / "run" / "best.pt", *more)
    assert report["seen"] is report["unseen"] is None
    words = [f"{name} classes; nothing is measured" for name in ("seen: 9 images of 9", "unseen: 3 images of 3")]
    words += ["copies among these images: 1 of training images, 0 of each other"]
    for text in (capsys.readouterr().out, (tmp_path / "page" / "index.html").read_text()):
        assert all(word in text for word in words)


def test_without_unseen_classes(folder, tmp_path):
    torch.save(model.build("resnet20", 4).state_dict(), tmp_path / "net.pt")
    arguments = ["--backbone", "resnet20", "--width", 4, "--data", folder / "tiny.npz", "--split", "100-0"]
    tiny.run(evaluate, tmp_path / "net.pt", *arguments, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["unseen"] is None and report["per_class"] == [] and report["seen"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt"], "no such file: missing.pt"),
        (["{npz}"], "is not a checkpoint"),
        (["{pt}", "--threshold", "high"], "--threshold must be auto or a number in -1..1, got high"),
        (["{pt}", "--threshold", "2"], "--threshold must be"),
        (["{pt}", "--criterion", "far:2"], "--criterion must be balanced, eer, or far:RATE"),
        (["{pt}", "--store", "--threshold", "0.5"], "--store keeps a calibrated threshold"),
        (["{bare}", *BARE, "--store"], "is a bare state dict: --store needs a checkpoint"),
        (["{pt}", "--data", "nowhere.npz"], "no such file: nowhere.npz"),
        (["{pt}", "--split", "50-50"], "was trained on classes that --split 50-50 calls unseen"),
        (["{pt}", "--on", "validation", "--split", "100-0"], "leave --split and --split-seed out"),
        (["{pt}", "--backbone", "resnet56"], "wrong --backbone or --width"),
        (["{pt}", "--json", "/no/such/folder/r.json"], "no such folder"),
        (["{pt}", "--image-size", "4"], "--image-size must be at least 8, got 4"),
        (["{pt}", "--image-size", "32"], "resnet20 takes images that are no picture files as they are"),
        (["{bare}"], "is a bare state dict: give --backbone and --data"),
        ([], "at least one checkpoint"),
    ],
)
def test_bad_input_gives_one_message(folder, refusal, tmp_path, arguments, message):
    torch.save(model.build("resnet20", 4).state_dict(), tmp_path / "bare.pt")
    names = {"npz": folder / "tiny.npz", "pt": folder / "run" / "best.pt", "bare": tmp_path / "bare.pt"}
    assert message in refusal(evaluate, *[argument.format(**names) for argument in arguments])


# ---------------------------------------------------------------------------------------------------------------- runs


def write_runs(path, arrays, runs=6, way=4, labels=lambda text: text):
    """An archive in the layout of Omniglot's runs: `runs` of `way` classes of `arrays`, queries in another order.

    In each run, the last query shows another class than it says.
    """
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for run in range(1, runs + 1):
            lines, classes, order = [], random.permutation(12)[: way + 1].tolist(), random.permutation(way).tolist()
            for place in range(way):
                item = order[place] + 1
                lines.append(f"run{run:02}/test/item{item:02}.png run{run:02}/training/class{place + 1:02}.png")
                shown = classes[place if place < way - 1 else way]
                for name, label in zip(lines[-1].split(), (shown, classes[place]), strict=True):
                    pixels = arrays["test_images"][arrays["test_labels"] == label][place % 8 if "item" in name else 0]
                    file = io.BytesIO()
                    Image.fromarray(pixels).save(file, "PNG")
                    archive.writestr(name, file.getvalue())
            archive.writestr(f"run{run:02}/class_labels.txt", labels("\n".join(lines) + "\n"))
    return path


def test_runs(folder, tmp_path, capsys):
    """Without the checkpoint's data; zipped or not. One query of four is of none of the known classes: mostly wrong."""
    saved = checkpoints.read(folder / "run" / "best.pt")
    torch.save(saved | {"options": saved["options"] | {"data": "gone.npz"}}, tmp_path / "best.pt")
    runs = write_runs(tmp_path / "runs.zip", np.load(folder / "tiny.npz"))
    shutil.unpack_archive(runs, tmp_path / "unpacked")
    found = []
    for source in (runs, tmp_path / "unpacked"):
        arguments = ["--runs", source, "--json", tmp_path / "r.json", "--report", tmp_path / "page"]
        tiny.run(evaluate, tmp_path / "best.pt", *arguments)
        found.append(json.loads((tmp_path / "r.json").read_text()))
    assert found[0]["runs"] == found[1]["runs"] and found[0]["network"]["size"] == 16
    assert all(found[0][name] is None for name in ("seen", "unseen", "threshold")) and found[0]["thresholds"] == []
    assert found[0]["measured"] == {"runs": 6, "trials": 24} and found[0]["data"] == "runs"
    net, _ = checkpoints.load(tmp_path / "best.pt")
    with zipfile.ZipFile(runs) as archive:
        wrong = []
        for run in range(1, 7):
            pairs = [line.split() for line in archive.read(f"run{run:02}/class_labels.txt").decode().splitlines()]
            images = [np.array(Image.open(archive.open(name))) for pair in pairs for name in pair]
            z = normalize(model.embed(net, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)))
            wrong += [int((z[::2] @ z[1::2].T).argmax(1).ne(torch.arange(4)).sum())]
    assert found[0]["runs"]["error"] == pytest.approx(100 * sum(wrong) / 24) and sum(wrong) > 3
    low, high = found[0]["runs"]["ci95"]["error"]
    assert 25 * min(wrong) <= low <= found[0]["runs"]["error"] <= high <= 25 * max(wrong)
    printed, page = capsys.readouterr().out, (tmp_path / "page" / "index.html").read_text()
    assert "6 runs, 4-way" in printed and "6 runs, 4-way" in page
    assert page.count('class="right"') == 4 - max(wrong) and page.count('class="wrong"') == max(wrong)


def test_two_checkpoints_are_compared_on_the_same_runs(folder, tmp_path, capsys):
    best, runs = folder / "run" / "best.pt", write_runs(tmp_path / "runs.zip", np.load(folder / "tiny.npz"))
    torch.save(tiny_untrained(best), tmp_path / "other.pt")
    arguments = ["--runs", runs, "--json", tmp_path / "r.json"]
    tiny.run(evaluate, best, tmp_path / "other.pt", *arguments)
    first, second = json.loads((tmp_path / "r.json").read_text())
    found = second["compared_with"]["runs"]["error"]
    assert found["difference"] == pytest.approx(second["runs"]["error"] - first["runs"]["error"])
    assert found["ci95"][0] <= found["difference"] <= found["ci95"][1] and "runs error" in capsys.readouterr().out


def tiny_untrained(path):
    """A checkpoint with the weights of a network that was not trained."""
    saved = checkpoints.read(path)
    torch.manual_seed(0)
    return saved | {"model": model.build(**saved["network"]).state_dict()}


@pytest.mark.parametrize(
    "labels",
    [
        lambda text: "",
        lambda text: "no labels at all",
        lambda text: text.replace("item02", "item01"),
        lambda text: text.replace("class02", "class99"),
        lambda text: text.partition("\n")[2] if "run02" in text else text,
        lambda text: text + "run01/test/item01.png",
        lambda text: text.replace("run03/test", "../run03/test"),
    ],
)
def test_foreign_runs_are_refused(folder, tmp_path, refusal, labels):
    path = write_runs(tmp_path / "foreign.zip", np.load(folder / "tiny.npz"), labels=labels)
    error = refusal(evaluate, folder / "run" / "best.pt", "--runs", path, "--json", tmp_path / "r.json")
    assert error.startswith(f"error: {path} does not hold runs of Omniglot's one-shot test") and error.count("\n") == 1
    assert not (tmp_path / "r.json").exists()


def test_damaged_runs_are_refused(folder, tmp_path, refusal):
    best, path = folder / "run" / "best.pt", write_runs(tmp_path / "runs.zip", np.load(folder / "tiny.npz"))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("run02/test/item03.png").header_offset + 80
    for damaged, message in (
        (whole[: len(whole) // 2], "is no folder and no zip file, or was cut short"),
        (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], "run02/test/item03.png cannot be unpacked: "),
        (whole.replace(b"\x89PNG", b"\x89PNX"), "cannot be unpacked: Bad CRC-32"),
    ):
        path.write_bytes(damaged)
        error = refusal(evaluate, best, "--runs", path)
        assert message in error and error.count("\n") == 1
    with zipfile.ZipFile(path, "w") as archive:
        pairs = [(f"run01/test/item0{n}.png", f"run01/training/class0{n}.png") for n in (1, 2)]
        archive.writestr("run01/class_labels.txt", "\n".join(map(" ".join, pairs)))
        for name in sum(pairs, ()):
            archive.writestr(name, b"no picture")
    assert "is not a picture in a known format" in refusal(evaluate, best, "--runs", path)
    error = refusal(evaluate, best, "--runs", path, "--split", "80-20", "--on", "validation", "--store")
    assert "--runs measures these runs alone; leave --split, --on, --store out" in error
    assert "is an input" in refusal(evaluate, best, "--runs", path, "--json", path)


def test_validation_needs_the_classes_of_the_training(folder, tmp_path, refusal):
    saved = checkpoints.read(folder / "run" / "best.pt")
    saved["data"] |= {"seen": [*range(6)], "validation": [6, 7, 8]}
    torch.save(saved, tmp_path / "best.pt")
    names = [f"class {label}" for label in (*range(1, 12), 0)]
    other = with_classes(folder / "tiny.npz", tmp_path / "other.npz", names)
    message = refusal(evaluate, tmp_path / "best.pt", "--data", other, "--on", "validation")
    assert "was trained on other classes than" in message


def test_a_bare_state_dict_of_a_library_is_centred_on_training_images(monkeypatch, npz, tmp_path):
    given, net = [], model.build("torchvision:resnet18")
    torch.save({name: each for name, each in net.state_dict().items() if name != "mean_embedding"}, tmp_path / "net.pt")
    monkeypatch.setattr(model.LibraryNetwork, "centre", lambda net, images: given.append(images))
    options = evaluate.Options((), backbone="torchvision:resnet18", data=npz, image_size=32, split="75-25")
    loaded = evaluate.load(str(tmp_path / "net.pt"), options, torch.device("cpu"))
    assert given[0].same(data.hold_back(loaded.data.train.of(loaded.seen))[0])


def test_classes_too_small_for_few_shot_tasks_are_counted(folder):
    loaded = evaluate.load(str(folder / "run" / "best.pt"), evaluate.Options(()), torch.device("cpu"))
    test = loaded.data.test
    few = torch.where(torch.arange(12) == 9, 7, torch.where(torch.arange(12) == 10, 3, 0))  # leaves 1, 5 and 8 images
    kept = test.part(few)[0]
    changed = dataclasses.replace(loaded, data=dataclasses.replace(loaded.data, test=kept))
    notes = evaluate.measure(changed, {"value": 0.5})[2]
    assert "unseen classes with too few images for few-shot tasks: 1 in 1-shot, 2 in 5-shot" in notes


def test_checkpoints_of_other_images_are_not_compared(folder, tmp_path):
    best, other = folder / "run" / "best.pt", tmp_path / "other.pt"
    saved = checkpoints.read(best)
    saved["data"] |= {"seen": [*range(8)], "unseen": [8, 9, 10, 11]}
    torch.save(saved, other)
    tiny.run(evaluate, best, other, "--json", tmp_path / "r.json")
    second = json.loads((tmp_path / "r.json").read_text())[1]
    assert second["compared_with"] is None
    assert f"not compared with {best}: measured on other images" in second["notes"]


@pytest.mark.parametrize(
    "more",
    [["--data", "x.npz"], ["--split-seed", 1], ["--threshold", 0.5], ["--adapt-steps", 2], ["--adapt-published"]],
)
def test_runs_go_with_no_option_of_other_measurements(refusal, more):
    message = refusal(evaluate, "a.pt", "--runs", "runs.zip", *more)
    assert f"--runs measures these runs alone; leave {more[0]} out" in message


def test_other_options_that_do_not_go_together(folder, refusal):
    best, npz = folder / "run" / "best.pt", folder / "tiny.npz"
    assert "is an input" in refusal(evaluate, best, "--data", npz, "--json", npz)
    assert "measures the run's own classes" in refusal(evaluate, best, "--on", "validation", "--split-seed", 1)
    assert "--turned must be" in refusal(evaluate, best, "--turned", 1.5)
    assert "--penultimate must be" in refusal(evaluate, best, "--penultimate", -0.1)


def test_turned_views_are_not_adapted(folder, tmp_path, refusal):
    npz = tiny.write_npz(tmp_path / "a.npz", classes=12)
    torch.save(model.build("resnet20", 4).state_dict(), tmp_path / "net.pt")
    arguments = ["--backbone", "resnet20", "--width", 4, "--data", npz, "--split", "50-50", "--adapt-steps", 1]
    message = refusal(evaluate, tmp_path / "net.pt", *arguments, "--turned", 0.5, "--threshold", 0.5)
    assert "give --turned 0 with it" in message


def test_adaptation_has_the_loss_and_flips_of_the_training(monkeypatch):
    given = []
    monkeypatch.setattr(evaluate.adapt, "SupportAdaptation", lambda *a: given.append(a) or SimpleNamespace(report=id))
    options = {"margin": 0.125, "flip": False}
    loaded = SimpleNamespace(saved={"options": options}, net=None, pictures=None)
    evaluate.adapted(loaded, {"value": 0.5}, evaluate.Options((), adapt_steps=3, adapt_lr=0.5))
    ((_, loss, steps, lr, flip),) = given
    assert loss["margin"] == 0.125 and (steps, lr, flip) == (3, 0.5, False)


def test_runs_have_the_border_of_the_training(folder, tmp_path):
    runs = write_runs(tmp_path / "runs.zip", np.load(folder / "tiny.npz"), runs=2)
    loaded = sources.load_runs(runs, 16, 4)
    assert loaded.test.size == 16 and loaded.test.store.shape[2] == 24
    assert loaded.class_names[:2] == ["run01/class01", "run01/class02"]
