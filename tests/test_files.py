"""What is written and what is read: outputs, other people's files, odd names, random damage."""

import json
import math
import os
import re
import resource
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import cli
import evaluate
import export
import fuzz
import model
import oneshot
import pictures
import predict
import tiny
import train_classic
import train_reptile
import training
import triplet
from tiny import CLASSIC

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set, and a classic run on it."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.train_classic(tiny.write_npz(folder / "tiny.npz", classes=12, train=24, test=8), folder / "run")
    return folder


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


@pytest.mark.parametrize(
    "arguments", [["train_classic.py", "--help"], ["evaluate.py", "run/best.pt", "--data", "tiny.npz"]]
)
def test_output_that_nobody_reads_ends_a_script_quietly(trained, arguments):
    end, pipe = os.pipe()
    os.close(end)
    command = [sys.executable, ROOT / arguments[0], *arguments[1:]]
    done = subprocess.run(command, cwd=trained, stdout=pipe, stderr=subprocess.PIPE, text=True)
    os.close(pipe)
    assert done.returncode == 1 and "Error" not in done.stderr


def test_a_training_whose_output_nobody_reads_is_saved(trained, tmp_path):
    command = [sys.executable, ROOT / "train_classic.py", "--data", trained / "tiny.npz", "--out", tmp_path / "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *tiny.CLASSIC, "--validate-every", "1"], **pipes) as process:
        while "multiply-adds" not in process.stdout.readline():
            pass
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1 and "Error" not in errors and "cannot write" not in errors
    saved = checkpoints.read(tmp_path / "run" / "last.pt")
    assert saved["step"] >= int(saved["training"]["log"][-1]["step"]) > 0


def test_what_is_saved_when_the_progress_bar_breaks_is_validated(trained, tmp_path, monkeypatch):
    def broken(bar, *_):
        if bar.total == 12:
            raise BrokenPipeError

    monkeypatch.setattr(training.tqdm, "update", broken)
    with pytest.raises(BrokenPipeError):
        tiny.run(train_reptile, "--data", trained / "tiny.npz", "--out", tmp_path / "run", *tiny.REPTILE)
    saved = checkpoints.read(tmp_path / "run" / "last.pt")
    assert saved["step"] == 1 and saved["threshold"] and saved["model"]["penultimate_mean"].any()
    cli.RunFolder(tmp_path / "run", resume=True, overwrite=False).close()  # it is free


def test_a_report_that_cannot_be_written_gives_one_message(trained, refusal):
    message = refusal(evaluate, trained / "run" / "best.pt", "--json", "/dev/full")
    assert message.startswith("error: [Errno 28]")


def test_a_written_file_keeps_its_permissions_and_a_failure_is_an_oserror(tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("old")
    path.chmod(0o600)
    cli.write_json(path, [])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == "[]\n"
    with pytest.raises(OSError, match="unexpected pos"), cli.writing(path):
        raise RuntimeError("[enforce fail] . unexpected pos 64 vs 0\nframe #0")
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"] and path.read_text() == "[]\n"


def test_inputs_are_not_overwritten(trained, tmp_path, refusal):
    best = trained / "run" / "best.pt"
    before = best.read_bytes()
    (tmp_path / "link.pt").symlink_to(best)
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "0.png").write_text("a picture")
    for script, arguments in (
        (export, ["--format", "torch", "--out", best]),
        (export, ["--format", "torch", "--out", tmp_path / "link.pt"]),
        (evaluate, ["--json", best]),
        (evaluate, ["--json", trained / "tiny.npz", "--data", trained / "tiny.npz"]),
        (predict, ["--compare", best, "b.png", "--csv", best]),
        (predict, ["--support", tmp_path / "in", "--query", "q.png", "--csv", tmp_path / "in" / "a" / "0.png"]),
        (
            predict,
            ["--support", tmp_path / "no", "--query", tmp_path / "in", "--json", tmp_path / "in" / "a" / "0.png"],
        ),
        (predict, ["--gallery", tmp_path / "new", "--add", tmp_path / "in", "--query", "q", "--csv", tmp_path / "new"]),
        (evaluate, ["--data", tmp_path / "in", "--json", tmp_path / "in" / "a" / "0.png"]),
    ):
        assert "is an input; it would be overwritten" in refusal(script, best, *arguments)
        assert best.read_bytes() == before and (tmp_path / "in" / "a" / "0.png").read_text() == "a picture"
    (tmp_path / "in" / "answers.csv").write_text("of the last time")
    cli.check_output("--csv", tmp_path / "in" / "answers.csv", tmp_path / "in")
    assert "is a folder, not a file" in refusal(evaluate, best, "--json", tmp_path)
    both = ["--csv", tmp_path / "a", "--json", tmp_path / "a"]
    assert "give two files" in refusal(predict, best, "--compare", "a.png", "b.png", *both)


def test_outputs_are_checked_before_the_work(trained, tmp_path, refusal, monkeypatch):
    """No permission: simulated, since root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(checkpoints, "read", lambda path: pytest.fail("work began"))
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
            checkpoints.read(tmp_path / "a.pt")
        found += 1
    assert found >= 20
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/3"))  # in the list of files at the end
    (tmp_path / "a.pt").write_bytes(whole[: entry + 38] + b"\x10" + whole[entry + 39 :])  # now said to be a folder
    with pytest.raises(ValueError, match="it is damaged"):
        checkpoints.read(tmp_path / "a.pt")


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
        (b"\0" + os.urandom(4000), "it is damaged"),  # and does not begin like a web page
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
        (lambda saved: saved["threshold"].update(value=1.5), "threshold"),
        (lambda saved: saved["threshold"].update(logistic=[1.0]), "threshold"),
        (lambda saved: saved["threshold"].update(logistic=[math.nan, 1.0]), "threshold"),
        (lambda saved: saved.update(threshold=[0.5]), "threshold"),
        (lambda saved: saved["threshold"].update(false_accept="1"), "threshold"),
        (lambda saved: saved["network"].update(turned=-0.5), "weights of the embedding's parts"),
        (lambda saved: saved["network"].update(penultimate=math.nan), "weights of the embedding's parts"),
        (lambda saved: saved["threshold"]["strangers"]["rates"].__setitem__(0, 0.0), "table of strangers"),
        (lambda saved: saved["threshold"]["strangers"]["similarities"][0][0].__setitem__(0, 1.5), "of strangers"),
        (lambda saved: saved["threshold"].update(strangers=[]), "table of strangers"),
        (lambda saved: saved["threshold"]["strangers"].pop("rates"), "table of strangers"),
        (lambda saved: saved["threshold"]["strangers"]["classes"].reverse(), "table of strangers"),
        (lambda saved: saved["threshold"]["strangers"]["similarities"][0][0].append(0.5), "table of strangers"),
        (lambda saved: saved["threshold"]["strangers"]["similarities"][0][0].__setitem__(0, math.nan), "of strangers"),
        (lambda saved: saved.update(data=None), "classes"),
        (lambda saved: saved["data"].update(learned_before=[7]), "classes"),
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for script, arguments in ((evaluate, []), (predict, ["--compare", "a", "b"]), (export, [])):
        errors = refusal(script, tmp_path / "a.pt", *arguments)
        assert message in errors and len(errors) < 600
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200  # MB


@pytest.mark.parametrize("field", ["false_accept", "false_reject", "calibrated_on", "logistic", "strangers"])
def test_a_checkpoint_without_all_of_its_calibration_is_refused(trained, tmp_path, refusal, field):
    saved = torch.load(trained / "run" / "best.pt", weights_only=True)
    del saved["threshold"][field]
    torch.save(saved, tmp_path / "a.pt")
    for script, arguments in ((predict, ["--compare", "a", "b"]), (export, [])):
        assert "lacks a calibration: `python evaluate.py" in refusal(script, tmp_path / "a.pt", *arguments)


def test_weights_of_bfloat16_are_recognised(trained, tmp_path):
    saved = torch.load(trained / "run" / "best.pt", weights_only=True)
    saved["model"] = {
        name: each.bfloat16() if each.is_floating_point() else each for name, each in saved["model"].items()
    }
    torch.save(saved, tmp_path / "a.pt")
    assert oneshot.load(tmp_path / "a.pt").fingerprint != oneshot.load(trained / "run" / "best.pt").fingerprint


def test_a_foreign_last_pt_is_not_resumed(train, npz, tmp_path, refusal):
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "1")
    saved = torch.load(out / "last.pt", weights_only=True)
    changes = [{"model": {}}, {"step": "x"}, {"training": None}]
    changes += [{"training": saved["training"] | part} for part in ({"head": None}, {"rng": torch.zeros(3)})]
    for change in changes:
        torch.save(saved | change, out / "last.pt")
        before = (out / "last.pt").read_bytes()
        errors = refusal(train_classic, "--data", npz, "--out", out, *CLASSIC, "--epochs", "1", "--resume")
        assert "last.pt" in errors and (out / "last.pt").read_bytes() == before


def test_a_run_of_an_older_version_is_resumed(train, npz, tmp_path):
    """It has no statistics of the features before the last block."""
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "1")
    saved = torch.load(out / "last.pt", weights_only=True)
    del saved["model"]["penultimate_mean"], saved["model"]["penultimate_std"], saved["options"]["penultimate"]
    saved["step"], saved["training"]["log"] = 0, []
    torch.save(saved, out / "last.pt")
    train(train_classic, CLASSIC, out, "--epochs", "1", "--resume")
    assert torch.load(out / "last.pt", weights_only=True)["model"]["penultimate_std"].std() > 0


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
    loaded = sources.load(str(tmp_path / "data"))
    assert len(loaded.train) + len(loaded.test) == 6 and loaded.class_names == ["a", "b"]
    (tmp_path / "data" / "a" / "other").symlink_to(tmp_path / "data" / "b")
    with pytest.raises(ValueError, match="counts for two classes, a and b"):
        sources.load(str(tmp_path / "data"))


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
    Image.fromarray(np.arange(6000 * 6000, dtype=np.uint32).astype(np.uint16).reshape(6000, 6000)).save(
        tmp_path / "a.png"
    )
    with Image.open(tmp_path / "a.png") as image:  # the decoder's own memory comes first
        image.load()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pictures.read(tmp_path / "a.png", 32)
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
    (tmp_path / "support" / "a" / "1.png").write_text("broken too")
    (tmp_path / "support" / "b" / "2.png").write_text("broken")  # an error of another class
    errors = refusal(predict, trained / "run" / "best.pt", *arguments)
    assert "no picture can be read of class a:\n" in errors
    assert all(f"{name}.png is not a picture" in errors for name in ("a/0", "a/1", "b/2"))


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
