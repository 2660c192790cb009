"""A run and its files when things go wrong: kills, stops, full disks, other data, two runs at once."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import cli
import tiny
import train_classic
import train_reptile
from tiny import CLASSIC, REPTILE, same

SCRIPTS = [(train_classic, CLASSIC), (train_reptile, REPTILE)]


# ---------------------------------------------------------------------------------------------------------------- kills

WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def play(folder: Path, run: str, steps: int, resume: bool = False, overwrite: bool = False) -> None:
    """A run of RunFolder's, as training.Run goes about it: a row a step, checkpoints every second one."""
    place = cli.RunFolder(folder, resume, overwrite)
    state = json.loads((folder / "last.pt").read_text()) if resume else {"run": run, "log": []}
    place.start(["run", "step"], state["log"])
    for step in range(len(state["log"]), steps):
        due = step % 2 == 1
        if due:
            with cli.writing(place.place / "best.pt") as path:
                path.write_text(json.dumps({"run": run, "step": step}))
        state["log"].append({"run": run, "step": step})
        place.write_row(state["log"][-1])
        if due:
            with cli.writing(place.place / "last.pt") as path:
                path.write_text(json.dumps(state))
            place.committed()
    place.close()


def killed(folder: Path, operation: int, *arguments, **keywords) -> bool:
    """`play` in a process that dies before its n-th file operation in `folder`; False if it came to its end."""
    child = os.fork()
    if child == 0:
        left = [operation]

        def hook(event, args):
            if event in WRITES and args and str(folder) in str(args[0]):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        play(folder, *arguments, **keywords)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def whose(folder: Path) -> set[str]:
    """The runs whose files are in the folder once it has been opened again."""
    cli.RunFolder(folder, resume=True, overwrite=False).close()
    found = {
        json.loads((folder / name).read_text())["run"] for name in ("last.pt", "best.pt") if (folder / name).exists()
    }
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return found | {row["run"] for row in rows}


def test_a_kill_before_any_file_operation_leaves_one_run(tmp_path):
    """Of a run that is resumed, or replaced by another one: the files in the folder belong together, and go on."""
    for name, keywords in (("old", {"resume": True}), ("new", {"overwrite": True})):
        operation = 0
        while True:
            folder = tmp_path / f"{name} {operation}"
            play(folder, "old", 4)
            again = killed(folder, operation, name, 8, **keywords)
            runs = whose(folder)
            assert len(runs) == 1, (name, operation, runs)
            last = json.loads((folder / "last.pt").read_text())
            assert len(last["log"]) >= (4 if runs == {"old"} else 2)
            play(folder, last["run"], 8, resume=True)
            with open(folder / "log.csv", newline="") as file:
                assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(8)), (name, operation)
            assert {path.name for path in folder.iterdir()} == {"last.pt", "best.pt", "log.csv"}
            operation += 1
            if not again:
                break
        assert operation > 15


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_a_killed_training_goes_on_bit_for_bit(train, npz, tmp_path, script, arguments):
    """SIGKILL at whatever moment; log.csv and best.pt end as if nothing had happened."""
    whole = train(script, arguments, tmp_path / "whole")
    out = tmp_path / "parts"
    command = [sys.executable, script.__file__, "--data", npz, "--out", out, *arguments]
    for more in ([], ["--resume"]):
        process = subprocess.Popen([*command, *more], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        seen = (out / "last.pt").stat().st_mtime_ns if more else 0
        while process.poll() is None and not (
            (out / "last.pt").exists() and (out / "last.pt").stat().st_mtime_ns > seen
        ):
            time.sleep(0.005)
        process.kill()
        process.wait()
    train(script, arguments, out, "--resume")
    for name in ("last.pt", "best.pt"):
        assert same(*(checkpoints.read(folder / name) for folder in (whole, out))), name


def without_seconds(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_goes_on_bit_for_bit(train, tmp_path, monkeypatch, script, arguments, number):
    """Ctrl-C and SIGTERM save; the stop shows in neither log.csv nor best.pt."""
    whole = train(script, arguments, tmp_path / "whole")
    original = script.triplet_loss
    for at in (5, 23):
        calls = []

        def interrupted(*args, at=at, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) == at:
                signal.raise_signal(number)
            return original(*args, **kwargs)

        out = tmp_path / str(at)
        monkeypatch.setattr(script, "triplet_loss", interrupted)
        with pytest.raises(SystemExit) as stop:
            train(script, arguments, out)
        assert stop.value.code == 128 + number
        monkeypatch.setattr(script, "triplet_loss", original)
        train(script, arguments, out, "--resume")
        assert without_seconds(whole / "log.csv") == without_seconds(out / "log.csv")
        assert same(*(checkpoints.read(folder / "best.pt") for folder in (whole, out)))
        first, second = (checkpoints.read(folder / "last.pt") for folder in (whole, out))
        for state in (first, second):
            for row in state["training"]["log"]:
                row.pop("seconds")
        assert same(first, second)


def test_a_run_stays_until_the_one_that_replaces_it_has_a_checkpoint(train, tmp_path, monkeypatch):
    out = train(train_reptile, REPTILE, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    original = train_reptile.triplet_loss
    monkeypatch.setattr(train_reptile, "triplet_loss", lambda *a, **k: original(*a, **k) * float("nan"))
    with pytest.raises(SystemExit):
        train(train_reptile, REPTILE, out, "--overwrite", "--seed", "1")
    cli.RunFolder(out, resume=True, overwrite=False).close()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("old", [("last.pt", "best.pt", "log.csv"), ("best.pt",)])
def test_a_run_stopped_before_its_first_validation_replaces_all_of_another(tmp_path, old):
    """It has no best.pt, and what another run left is none of its."""
    for name in old:
        (tmp_path / name).write_text("old")
    place = cli.RunFolder(tmp_path, resume=False, overwrite=True)
    place.start(["step"], [])
    (place.place / "last.pt").write_text("new")
    place.committed()
    assert {path.name: path.read_text().strip() for path in tmp_path.iterdir()} == {"last.pt": "new", "log.csv": "step"}


@pytest.mark.parametrize("option", ["--teacher", "--weights"])
def test_a_run_does_not_replace_what_it_learns_from(train, npz, tmp_path, refusal, option):
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "1")
    before = (out / "best.pt").read_bytes()
    arguments = ["--data", npz, "--out", out, *CLASSIC, "--overwrite", option, out / ".." / "run" / "best.pt"]
    assert "which the training needs; give another --out" in refusal(train_classic, *arguments)
    assert (out / "best.pt").read_bytes() == before


def test_a_run_goes_on_when_its_data_are_elsewhere_and_is_checked_before_data_are_read(train, npz, tmp_path, refusal):
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "1")
    moved = tmp_path / "moved" / "tiny.npz"
    moved.parent.mkdir()
    moved.write_bytes(Path(npz).read_bytes())
    tiny.run(train_classic, "--data", moved, "--out", out, *CLASSIC, "--epochs", "1", "--resume")
    (tmp_path / "file").write_text("")
    for place, message in ((out, "holds a run"), (tmp_path / "file", "file is not a folder")):
        assert message in refusal(train_classic, "--data", "nowhere.npz", "--out", place, *CLASSIC)
    nothing = ["--triplet-weight", 0, "--softmax-weight", 0, "--teacher", out / "best.pt", "--teacher-weight", 0]
    assert "there is nothing to learn from" in refusal(train_classic, "--data", npz, "--out", tmp_path / "x", *nothing)


def test_other_data_is_not_resumed(train, npz, tmp_path, refusal):
    """Other pixels, labels, names of classes, one class more, other pixels of a validation class alone."""
    out = train(train_classic, [*CLASSIC, "--withhold", "0.34"], tmp_path / "run", "--epochs", "1")
    before = (out / "last.pt").read_bytes()
    arrays = dict(np.load(npz))
    more = tiny.arrays(classes=9)
    for number, changes in enumerate(
        (
            {"train_images": 255 - arrays["train_images"]},
            {"train_labels": 7 - arrays["train_labels"], "test_labels": 7 - arrays["test_labels"]},
            {"class_names": arrays["class_names"][::-1]},
            more,
            {"train_images": np.where((arrays["train_labels"] == 5)[:, None, None, None], 0, arrays["train_images"])},
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        np.savez(folder / "tiny.npz", **arrays | changes)
        monkey = [*CLASSIC, "--withhold", "0.34", "--epochs", "1", "--resume", "--out", out]
        monkey += ["--data", folder / "tiny.npz"]
        saved = torch.load(out / "last.pt", weights_only=True)
        saved["options"]["data"] = str(folder / "tiny.npz")  # as if the file had been changed where it is
        torch.save(saved, out / "last.pt")
        assert "was trained on other images, labels or classes" in refusal(train_classic, *monkey)
    assert len(before) and not (out / ".new").exists()


def test_one_run_at_a_time_in_a_folder(train, tmp_path, refusal, npz):
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "1")
    holder = cli.RunFolder(out, resume=True, overwrite=False)
    for more in ("--resume", "--overwrite"):
        errors = refusal(train_classic, "--data", npz, "--out", out, *CLASSIC, "--epochs", "1", more)
        assert "another run is writing to" in errors
    holder.close()
    train(train_classic, CLASSIC, out, "--epochs", "1", "--resume")


def test_one_run_at_a_time_in_a_new_folder(tmp_path):
    first, second = (cli.RunFolder(tmp_path / "run", resume=False, overwrite=False) for _ in range(2))
    first.start(["step"], [])
    with pytest.raises(ValueError, match="another run is writing to"):
        second.start(["step"], [])


def test_temporaries_of_killed_runs_are_removed(tmp_path):
    play(tmp_path, "old", 2)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name, pid in (("best.pt", gone.pid), ("last.pt", os.getpid()), ("other.pt", gone.pid)):
        (tmp_path / f".{name}.{pid}").write_text("half")
    cli.RunFolder(tmp_path, resume=True, overwrite=False).close()
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert left == sorted([f".last.pt.{os.getpid()}", f".other.pt.{gone.pid}"])


@pytest.mark.parametrize("where", ["best.pt", "last.pt", "log.csv"])
def test_a_full_disk_ends_the_run_with_one_message(train, npz, tmp_path, monkeypatch, refusal, where):
    """Simulated: writing fails as it does on a full disk. The run's last state stays and goes on."""
    out = train(train_reptile, REPTILE, tmp_path / "run", "--iters", "6")
    before = checkpoints.read(out / "last.pt")["step"]
    save, write = torch.save, cli.RunFolder.write_row

    def full(content, path):
        if where in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")
        save(content, path)

    def full_log(self, row):
        if where == "log.csv":
            raise OSError(28, "No space left on device")
        write(self, row)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(cli.RunFolder, "write_row", full_log)
    arguments = ["--data", npz, "--out", tmp_path / "other", *REPTILE]
    errors = refusal(train_reptile, *arguments)
    assert "cannot write to" in errors and "nothing of this run was saved" in errors
    errors = refusal(train_reptile, *arguments[:2], "--out", out, *arguments[4:], "--overwrite")
    assert "nothing of this run was saved" in errors
    monkeypatch.undo()
    assert checkpoints.read(out / "last.pt")["step"] == before
