"""What is left when things go wrong: kills, full disks, other people's files, interrupted runs, odd file names."""

import csv
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import evaluate
import export
import fuzz
import model
import predict
import tiny
import train_classic
import train_reptile
import triplet
from tiny import CLASSIC, REPTILE, same

ROOT = Path(__file__).parent.parent
SCRIPTS = [(train_classic, CLASSIC), (train_reptile, REPTILE)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set, and a classic run on it."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.train_classic(tiny.write_npz(folder / "tiny.npz", classes=12, train=24, test=8), folder / "run")
    return folder


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
        assert same(*(model.load_checkpoint(folder / name) for folder in (whole, out))), name


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
        assert same(*(model.load_checkpoint(folder / "best.pt") for folder in (whole, out)))
        first, second = (model.load_checkpoint(folder / "last.pt") for folder in (whole, out))
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


def test_other_data_is_not_resumed(train, npz, tmp_path, refusal):
    """Other pixels, labels, names of classes, one class more."""
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "1")
    before = (out / "last.pt").read_bytes()
    arrays = dict(np.load(npz))
    more = tiny.arrays(classes=9)
    for number, changes in enumerate(
        (
            {"train_images": 255 - arrays["train_images"]},
            {"train_labels": 7 - arrays["train_labels"], "test_labels": 7 - arrays["test_labels"]},
            {"class_names": arrays["class_names"][::-1]},
            more,
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        np.savez(folder / "tiny.npz", **arrays | changes)
        monkey = [*CLASSIC, "--epochs", "1", "--resume", "--out", out, "--data", folder / "tiny.npz"]
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
    before = model.load_checkpoint(out / "last.pt")["step"]
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
    assert "cannot write to" in errors and "--resume" in errors
    monkeypatch.undo()
    assert model.load_checkpoint(out / "last.pt")["step"] == before


# -------------------------------------------------------------------------------------------------------------- outputs


def test_devices_pipes_and_links_are_written_to(trained, tmp_path):
    best = trained / "run" / "best.pt"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    tiny.run(evaluate, best, "--json", pipe)
    assert json.loads(reader.communicate()[0])["data"] == "tiny" and stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    tiny.run(evaluate, best, "--json", tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "target.json").read_text())["unseen"]
    tiny.run(evaluate, best, "--json", "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    command = [
        sys.executable,
        ROOT / "predict.py",
        best,
        "--compare",
        *[tmp_path / "a.png"] * 2,
        "--json",
        "/dev/stdout",
    ]
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    for target in (subprocess.PIPE, open(tmp_path / "out.txt", "w+")):
        done = subprocess.run(command, stdout=target, text=True)
        text = done.stdout if target == subprocess.PIPE else (tmp_path / "out.txt").read_text()
        assert "threshold" in text and json.loads(text[text.index("\n{") :])["answers"][0]["answer"] == "same"


def test_inputs_are_not_overwritten(trained, tmp_path, refusal):
    best = trained / "run" / "best.pt"
    before = best.read_bytes()
    (tmp_path / "link.pt").symlink_to(best)
    for script, arguments in (
        (export, ["--format", "torch", "--out", best]),
        (export, ["--format", "torch", "--out", tmp_path / "link.pt"]),
        (evaluate, ["--json", best]),
        (evaluate, ["--json", trained / "tiny.npz", "--data", trained / "tiny.npz"]),
        (predict, ["--compare", best, "b.png", "--csv", best]),
    ):
        assert "is an input; it would be overwritten" in refusal(script, best, *arguments)
        assert best.read_bytes() == before
    assert "is a folder, not a file" in refusal(evaluate, best, "--json", tmp_path)
    both = ["--csv", tmp_path / "a", "--json", tmp_path / "a"]
    assert "give two files" in refusal(predict, best, "--compare", "a.png", "b.png", *both)


def test_outputs_are_checked_before_the_work(trained, tmp_path, refusal, monkeypatch):
    """No permission: simulated, since root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(model, "load_checkpoint", lambda path: pytest.fail("work began"))
    best = trained / "run" / "best.pt"
    for arguments in (["--json", tmp_path / "a.json"], ["--store"], ["--report", tmp_path / "page"]):
        assert "no permission to write" in refusal(evaluate, best, *arguments)


def test_files_are_synced_through_a_handle_that_can_write(tmp_path, monkeypatch):
    """Windows refuses to sync one that can only read."""
    import fcntl

    original = os.fsync

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        original(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with cli.writing(tmp_path / "a") as path:
        path.write_text("a")
    assert (tmp_path / "a").read_text() == "a"


def test_json_is_always_json(tmp_path):
    cli.write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5, (float("inf"),)], "b": None})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None]],
        "b": None,
    }


# ------------------------------------------------------------------------------------------------------- foreign files


def test_auto_takes_apples_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(()))
    assert model.pick_device("auto").type == "mps"


def test_a_damaged_block_never_gives_another_answer(trained, tmp_path):
    """One byte changed anywhere in a checkpoint: refused, since the checksums are verified."""
    whole = (trained / "run" / "best.pt").read_bytes()
    found = 0
    with zipfile.ZipFile(trained / "run" / "best.pt") as archive:
        members = [info for info in archive.infolist() if info.file_size > 64]
    for info in members:
        place = whole.index(archive_data(whole, info), info.header_offset) + info.file_size // 2
        (tmp_path / "a.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="it is damaged, cut short or of another kind"):
            model.load_checkpoint(tmp_path / "a.pt")
        found += 1
    assert found >= 20
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/3"))  # in the list of files at the end
    (tmp_path / "a.pt").write_bytes(whole[: entry + 38] + b"\x10" + whole[entry + 39 :])  # now said to be a folder
    with pytest.raises(ValueError, match="it is damaged"):
        model.load_checkpoint(tmp_path / "a.pt")


def archive_data(whole: bytes, info: zipfile.ZipInfo) -> bytes:
    """The stored bytes of a member, which PyTorch does not compress."""
    header = whole[info.header_offset : info.header_offset + 30]
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    begin = info.header_offset + 30 + name + extra
    return whole[begin : begin + info.file_size]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"\x80\x02cos\nsystem\n", "it holds more than tensors and plain values|it is damaged"),
        (b"PK\x03\x04 and then nothing", "it is damaged"),
        (os.urandom(4000), "it is damaged"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, refusal, content, message):
    (tmp_path / "a.pt").write_bytes(content)
    for script, arguments in ((evaluate, []), (predict, ["--compare", "a", "b"]), (export, [])):
        errors = refusal(script, tmp_path / "a.pt", *arguments)
        assert re.search(message, errors) and "weights_only" not in errors and len(errors) < 300


def nan_weights(saved):
    saved["model"]["conv1.weight"][0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan_weights, "conv1.weight holds NaN or infinity"),
        (lambda saved: saved["network"].update(mean=[float("nan")] * 3), "pixel statistics"),
        (lambda saved: saved["network"].update(std=[0.0, 1, 1]), "pixel statistics"),
        (lambda saved: saved["network"].update(width=10**6), "network settings"),
        (lambda saved: saved["network"].update(width=60_000), "the weights do not fit this network"),
        (lambda saved: saved["network"].update(width="4"), "network settings"),
        (lambda saved: saved["network"].update(depth=4), "network settings"),
        (lambda saved: saved["threshold"].update(value=float("nan")), "threshold"),
        (lambda saved: saved["threshold"].update(value="0.5"), "threshold"),
        (lambda saved: saved.update(threshold=[0.5]), "threshold"),
        (lambda saved: saved.update(data=None), "classes"),
        (lambda saved: saved["data"].update(seen=[99]), "labels of the classes"),
        (lambda saved: saved["data"].pop("seen"), "labels of the classes"),
        (lambda saved: saved["data"].update(classes=7), "classes"),
        (lambda saved: saved.update(options=3), "options"),
        (lambda saved: saved.update(network=3), "network settings"),
        (lambda saved: saved.update(model={"conv1.weight": 3}), "neither a checkpoint"),
        (lambda saved: saved["model"].pop("conv1.weight"), "conv1.weight"),
    ],
)
def test_damaged_checkpoints_give_one_message(trained, tmp_path, refusal, change, message):
    saved = torch.load(trained / "run" / "best.pt", weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "a.pt")
    began = time.monotonic()
    for script, arguments in ((evaluate, []), (predict, ["--compare", "a", "b"]), (export, [])):
        errors = refusal(script, tmp_path / "a.pt", *arguments)
        assert message in errors and len(errors) < 600
    assert time.monotonic() - began < 20  # and nothing large was allocated


def test_a_foreign_last_pt_is_not_resumed(train, npz, tmp_path, refusal):
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "1")
    saved = torch.load(out / "last.pt", weights_only=True)
    for change in ({"net": {}}, {"head": None}, {"rng": torch.zeros(3)}, {"step": "x"}, None):
        training = change if change is None else saved["training"] | change
        torch.save(saved | {"training": training}, out / "last.pt")
        before = (out / "last.pt").read_bytes()
        errors = refusal(train_classic, "--data", npz, "--out", out, *CLASSIC, "--epochs", "1", "--resume")
        assert "last.pt" in errors and (out / "last.pt").read_bytes() == before


def test_links_between_folders(tmp_path):
    """Loops are visited once; a picture that would count for two classes is an error."""
    import sources

    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((8, 8, 3), number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
        (tmp_path / "data" / name / "again").symlink_to(tmp_path / "data" / name)
        (tmp_path / "data" / name / "once more").symlink_to(tmp_path / "data" / name)
    images, names = sources.read_classes(tmp_path / "data", 8, 1)
    assert len(images) == 6 and names == ["a", "b"]
    (tmp_path / "data" / "a" / "other").symlink_to(tmp_path / "data" / "b")
    with pytest.raises(ValueError, match="counts for two classes by a link, a and b"):
        sources.read_classes(tmp_path / "data", 8, 1)


def test_damaged_npz_headers(tmp_path):
    import sources

    with zipfile.ZipFile(tiny.write_npz(tmp_path / "whole.npz")) as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}
    header = contents["train_images.npy"]
    for change in (b"{'descr': (((((", b"{'descr': '|u1', 'fortran_order': False, 'shape': (\\", b"\x00" * 20):
        damaged = header[:10] + change + header[10 + len(change) :]
        with zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
            for name, content in contents.items():
                bad.writestr(name, damaged if name == "train_images.npy" else content)
        with pytest.raises(ValueError, match="train_images is damaged"):
            sources.load_npz(tmp_path / "bad.npz")


def test_sixteen_bit_pictures_take_few_copies(tmp_path):
    import resource

    import sources

    Image.fromarray(np.arange(6000 * 6000, dtype=np.uint32).astype(np.uint16).reshape(6000, 6000)).save(
        tmp_path / "a.png"
    )
    with Image.open(tmp_path / "a.png") as image:  # the decoder's own memory comes first
        image.load()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sources.read_picture(tmp_path / "a.png", 32)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 6 * 36  # MB, 6 bytes a pixel


# -------------------------------------------------------------------------------------------------------------- predict


def test_an_unreadable_support_picture_is_left_out(trained, tmp_path, refusal):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "support" / name / "1.png"
        )
    (tmp_path / "support" / "a" / "0.png").write_text("broken")
    arguments = [
        "--support",
        tmp_path / "support",
        "--query",
        tmp_path / "support" / "b",
        "--json",
        tmp_path / "a.json",
    ]
    errors = refusal(predict, trained / "run" / "best.pt", *arguments)
    assert "0.png" in errors and "1 of the pictures could not be read" in errors
    assert json.loads((tmp_path / "a.json").read_text())["answers"][0]["nearest"] == "b"
    (tmp_path / "support" / "a" / "1.png").write_text("broken")
    assert "no picture of class a can be read" in refusal(predict, trained / "run" / "best.pt", *arguments)


def test_names_that_a_terminal_would_obey(trained, tmp_path, capsys):
    support = tmp_path / "support"
    for name in (b"esc\x1b[31m", b"no\xffutf8", b"bell\x07\n"):
        folder = support / os.fsdecode(name)
        folder.mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), len(name), np.uint8)).save(folder / "1.png")
    files = ["--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json"]
    tiny.run(predict, trained / "run" / "best.pt", "--support", support, "--query", *support.iterdir(), *files)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "esc\\x1b[31m" in printed
    assert b"no\xffutf8" in (tmp_path / "a.csv").read_bytes()
    assert len(json.loads((tmp_path / "a.json").read_text())["answers"]) == 3


# ---------------------------------------------------------------------------------------------------------------- fuzz


@pytest.mark.skipif(triplet.native_library() != "" and os.environ.get("ONESHOT_NATIVE") != "1", reason="pure Python")
def test_a_short_fuzz():
    assert min(fuzz.fuzz(seconds=6, seed=0).values()) > 30
