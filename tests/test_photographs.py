"""Photographs: tables and caches of pictures, augmentation, and the whole path from pictures to an exported network."""

import csv
import json
import os
import runpy
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from torchvision.transforms import v2

import checkpoints
import data
import evaluate
import export
import oneshot
import pictures
import predict
import sources
import tiny
import train_classic
import training
from test_sources import zipped


def photographs(folder: Path, count: int = 12) -> list[tuple[str, str]]:
    """So many JPEG files of each quarter of scikit-learn's two photographs, taken from places a little apart; their
    paths in `folder` and classes."""
    random, made = np.random.default_rng(0), []
    for photo, name in zip(sklearn.datasets.load_sample_images().images, ("palace", "flower"), strict=True):
        for quarter in range(4):
            (folder / f"{name} {quarter}").mkdir(parents=True)
            for number in range(count):
                y, x = random.integers(0, 40, 2) + (200 * (quarter // 2), 300 * (quarter % 2))
                path = f"{name} {quarter}/{number:02}.jpg"
                Image.fromarray(photo[y : y + 180, x : x + 230]).save(folder / path)
                made.append((path, f"{name} {quarter}"))
    return made


@pytest.fixture
def folder(tmp_path):
    photographs(tmp_path / "photos")
    return tmp_path / "photos"


def table(path: Path, rows: list[tuple]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def load(path: Path, size: int = 32, border: int = 0) -> data.Data:
    return data.load(str(path), path.parent / "root", size, border)


def caches(folder: Path) -> list[Path]:
    return sorted((folder.parent / "root" / "cache").glob("*"))


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", 0)


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_table_names_pictures_and_their_classes(tmp_path):
    """As folders do; paths are seen from the table's folder, or absolute."""
    rows = photographs(tmp_path / "photos", count=6)
    rows[0] = (str(tmp_path / "photos" / rows[0][0]), rows[0][1])
    made = table(tmp_path / "photos" / "mine.csv", [("path", "label"), *rows])
    ours, theirs = load(made), load(tmp_path / "photos")
    assert ours.name == "mine" and ours.class_names == theirs.class_names
    assert ours.train.same(theirs.train) and ours.test.same(theirs.test)


def test_a_table_says_what_pictures_are_for(tmp_path, capsys):
    rows = photographs(tmp_path / "photos", count=4)
    parts = ("Training", " test", "", "validation")
    made = table(
        tmp_path / "photos" / "a.csv",
        [("label", "path", "split"), *((b, a, parts[n % 4]) for n, (a, b) in enumerate(rows))],
    )
    loaded = load(made)
    assert (
        len(loaded.train) == 16 and len(loaded.test) == 8 and loaded.own_split is None
    )  # validation: of few-shot sets
    assert capsys.readouterr().out == "a: left out 8 validation images\n"
    second = pictures.read(tmp_path / "photos" / "flower 0" / "01.jpg", 32)
    assert np.array_equal(loaded.test.images[0], second)
    seen = [(a, b, "train" if b.startswith("palace") else "val") for a, b in rows]
    loaded = load(table(made, [("path", "label", "split"), *seen]))
    assert loaded.own_split == ([4, 5, 6, 7], [], [0, 1, 2, 3])


def test_a_picture_that_a_table_names_twice_counts_once(tmp_path, capsys):
    """Or its copy among the images for testing, or held back, would be one that was trained on."""
    rows = photographs(tmp_path / "photos", count=6)
    once = load(table(tmp_path / "photos" / "A.CSV", [("path", "label"), *rows]))
    twice = load(table(tmp_path / "photos" / "b.csv", [("path", "label"), *rows, *rows]))
    assert twice.train.same(once.train) and twice.test.same(once.test)
    assert capsys.readouterr().err == f"b: left out {len(rows)} pictures that are there twice\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("file", "class")], "its first line is .'file', 'class'., not path,label or path,label,split"),
        ([], "its first line is None"),
        ([("path", "label"), ("a.jpg", " ")], "line 2 needs path, label"),
        ([("path", "label"), ("a.jpg",)], "line 2 needs path, label"),
        (
            [("path", "label", "split"), ("a.jpg", "a", "tset")],
            "line 2 needs path, label, and train, val or test as any split",
        ),
        ([("path", "label", "split"), ("a.jpg", "a", "test")], "it has none to train on"),
        ([("path", "label"), ("a.jpg", "a"), ("a.jpg", "b")], "a.jpg counts for two classes, a and b"),
        ([("path", "label"), ("a.jpg", "a")], "none of 1 files can be read: no such picture"),
        ([("path", "label"), ("a" * 300, "a")], "none of 1 files can be read: no such picture"),
        (
            [("path", "label", "split"), ("a.jpg", "a", "train"), ("a.jpg", "b", "test")],
            "a.jpg counts for two classes, a and b",
        ),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load(table(tmp_path / "wrong.csv", rows))


def test_a_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(ValueError, match=r"a\.csv is not a table of pictures: .*utf-8"):
        load(tmp_path / "a.csv")


# --------------------------------------------------------------------------------------------------------------- caches


def test_pictures_on_disk_are_those_in_memory(folder, on_disk, monkeypatch, capsys):
    """Read once; sets are rows of one store; unreadable pictures are told each time."""
    (folder / "flower 0" / "bad.jpg").write_bytes(b"no picture")
    first = load(folder)
    decoded = []
    monkeypatch.setattr(sources, "read", lambda *args: decoded.append(args) or pictures.read(*args))
    again = load(folder)
    assert [Path(file).name for file, _ in decoded] == ["bad.jpg"]  # perhaps it can be read now
    assert capsys.readouterr().err.count("bad.jpg is not a picture") == 2
    monkeypatch.setattr(sources, "IN_MEMORY", 2**30)
    known = load(folder)
    assert decoded and known.train.mapped is None
    for loaded in (first, again):
        assert loaded.train.mapped and loaded.train.store is loaded.test.store
        assert loaded.train.same(known.train) and loaded.test.same(known.test)
    kept, held_back = data.hold_back(again.train.of([1, 2]))
    assert kept.store is held_back.store is (kept + held_back).store is again.train.store
    assert len(caches(folder)) == 1


@pytest.mark.parametrize("change", ["pixels", "name", "size", "a picture more"])
def test_a_cache_is_of_these_pictures(folder, on_disk, change):
    """One that is out of date is replaced; other data sets' stay; a set that uses it goes on."""
    shutil.copytree(folder, folder.with_name("my photos"))
    load(folder.with_name("my photos"))
    (other,) = caches(folder)
    before = load(folder)
    old, pixels = ({*caches(folder)} - {other}).pop(), before.train.images.clone()
    path, size = folder / "flower 0" / "00.jpg", 32
    if change == "pixels":
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    elif change == "name":
        path.rename(path.with_name("99.jpg"))
    elif change == "a picture more":
        shutil.copy(path, path.with_name("98.jpg"))
    else:
        size = 16
    after = load(folder, size)
    new = {*caches(folder)} - {other, old}
    assert len(new) == 1 and other.exists() and old.exists() == (change == "size")
    assert torch.equal(before.train.images, pixels) and (change == "size" or not after.train.same(before.train))
    assert after.train.size == size


def test_a_cache_among_the_pictures_is_none_of_them(tmp_path, on_disk, capsys):
    photographs(tmp_path / "photos", count=6)
    first, second = (sources.load(str(tmp_path), tmp_path, 32) for _ in range(2))
    assert first.class_names == second.class_names and not any("cache" in name for name in second.class_names)
    assert first.train.mapped.fingerprint == second.train.mapped.fingerprint
    assert "no such picture" not in capsys.readouterr().err


def test_what_could_not_be_read_is_tried_again(folder, on_disk, monkeypatch, capsys):
    """By then the format may be known, or the file be allowed to be read: its times are as before."""
    bad = folder / "flower 0" / "01.jpg"
    read, count = pictures.read, len(load(folder).train)
    os.utime(bad, (1, 1))

    def refuse(picture, *given):
        if str(picture) == str(bad):
            raise ValueError(f"{bad} cannot be read: not today")
        return read(picture, *given)

    monkeypatch.setattr(sources, "read", refuse)
    for _ in range(2):
        assert len(load(folder).train) == count - 1
        assert "not today" in capsys.readouterr().err
    monkeypatch.setattr(sources, "read", read)
    assert len(load(folder).train) == count and len(caches(folder)) == 1


def test_a_run_of_pictures_on_disk_is_resumed_if_their_times_alone_changed(folder, on_disk):
    before = load(folder).train
    os.utime(folder / "flower 0" / "01.jpg", (1, 1))
    after = load(folder).train
    assert after.mapped.fingerprint == before.mapped.fingerprint
    Image.new("RGB", (40, 40)).save(folder / "flower 0" / "01.jpg")
    assert load(folder).train.mapped.fingerprint != before.mapped.fingerprint


def test_a_damaged_cache_is_told_of(folder, on_disk):
    load(folder)
    (path,) = caches(folder)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"\.pixels is damaged; delete it"):
        load(folder)


def test_what_a_process_that_died_has_left_is_deleted(folder, on_disk):
    root = folder.parent / "root" / "cache"
    root.mkdir(parents=True)
    dead, alive = (root / f".photos-32-abcd.pixels.{process}" for process in (2**22 + 1, os.getpid()))
    for path in (dead, alive):
        path.write_bytes(b"half")
    load(folder)
    assert alive.exists() and not dead.exists() and len(caches(folder)) == 2


def test_a_disk_that_is_too_small(folder, on_disk, monkeypatch):
    """Known before a picture is read, if it is not filled meanwhile; nothing is left behind."""
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"96 pictures of 32 pixels take 0\.0 GB in .*cache, where 0\.0 GB are free; give --data-root"
    ):
        load(folder)
    monkeypatch.undo()
    monkeypatch.setattr(sources, "IN_MEMORY", 0)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.json, "dumps", full)
    with pytest.raises(OSError, match="No space left"):
        load(folder)
    assert not caches(folder)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux what is in memory")
def test_memory_is_given_back(tmp_path, on_disk):
    """Of what was read no more stays than one batch."""
    for number in range(40):
        (tmp_path / "a" / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (512, 512, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a" / f"class {number % 2}" / f"{number}.bmp")
    loaded = load(tmp_path / "a", 512)

    def resident() -> int:
        """Bytes of the cache that are in this process's memory."""
        text, here, found = Path("/proc/self/smaps").read_text(), False, 0
        for line in text.splitlines():
            if "-" in line.split()[0]:
                here = line.endswith(".pixels")
            elif here and line.startswith("Rss:"):
                found += 1024 * int(line.split()[1])
        return found

    one = 512 * 512 * 3
    assert sum(len(batch) for batch in loaded.train.split(4)) == len(loaded.train) == 34
    assert resident() < 9 * one
    assert len(loaded.train.pixels(torch.arange(34))) == 34 and resident() >= 30 * one  # the measurement sees them
    loaded.train.pixels(torch.arange(2))
    assert resident() < 9 * one


def test_a_run_on_pictures_on_disk_is_resumed_with_the_same_ones_only(folder, on_disk, refusal):
    usual = [
        "--data",
        folder,
        "--data-root",
        folder.parent / "root",
        *tiny.SMALL,
        "--batch-classes",
        6,
        "--out",
        folder.parent / "run",
    ]
    tiny.run(train_classic, *usual, "--epochs", 3)
    tiny.run(train_classic, *usual, "--epochs", 3, "--resume")
    os.utime(folder / "flower 0" / "00.jpg", (1, 1))
    tiny.run(train_classic, *usual, "--epochs", 3, "--resume")
    Image.new("RGB", (40, 40)).save(folder / "flower 0" / "00.jpg")
    assert "was trained on other images" in refusal(train_classic, *usual, "--epochs", "3", "--resume")


# --------------------------------------------------------------------------------------------------------- augmentation


def test_crops_and_colours(monkeypatch):
    """Parts of the picture within the bounds, scaled; each image changes by itself, the same way for the same seed."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    ramp = torch.stack((2 * y, 2 * x, 0 * x + 100)).to(torch.uint8).expand(200, 3, 64, 64)
    out = data.crop_and_colour(ramp, 32, 0.25, 0.0, torch.Generator().manual_seed(0))
    assert out.shape == (200, 3, 32, 32) and out.dtype == torch.uint8 and (out[:, 2] == 100).all()
    height, width = (
        (out[:, c].float().flatten(1).amax(1) - out[:, c].float().flatten(1).amin(1)) / 2 + 1 for c in (0, 1)
    )
    area, ratio = height * width / 64**2, width / height
    assert 0.2 < area.min() < 0.3 and 0.85 < area.max() <= 1.02
    assert 0.68 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.48
    assert torch.equal(out, data.crop_and_colour(ramp, 32, 0.25, 0.0, torch.Generator().manual_seed(0)))
    grey = torch.full((50, 3, 8, 8), 100, dtype=torch.uint8)
    changed = data.crop_and_colour(grey, 8, 0.0, 0.5, torch.Generator().manual_seed(0))[:, 0, 0, 0]
    assert 45 <= changed.min() < 60 and 140 < changed.max() <= 155 and len(changed.unique()) > 20
    before = torch.get_rng_state()
    data.crop_and_colour(grey, 8, 0.5, 0.5, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    given, jitter = [], v2.ColorJitter
    monkeypatch.setattr(v2, "ColorJitter", lambda *strengths: given.append(strengths) or jitter(*strengths))
    data.crop_and_colour(grey, 8, 0.0, 0.3, torch.Generator())
    assert given == [(0.3, 0.3, 0.3)]  # brightness, contrast, saturation


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"data": "photos/", "image_size": 224}, (0.25, 0.3, 0.0, 0.0)),
        ({"data": "photos/", "image_size": 64}, (0.0, 0.0, 0.375, 0.25)),
        ({"data": "cifar100", "backbone": "torchvision:resnet18"}, (0.0, 0.0, 0.375, 0.25)),  # enlarged to 224
    ],
)
def test_photographs_have_other_defaults(given, expected):
    options = training.with_defaults(train_classic.Options(**given))
    assert (options.crop, options.jitter, options.cutout, options.rotate) == expected
    own = training.with_defaults(train_classic.Options(**given, crop=0.5, rotate=0.1))
    assert (own.crop, own.jitter, own.rotate) == (0.5, expected[1], 0.1)


def test_training_sees_the_border_and_nothing_else_does(folder):
    """224 pixels are the middle of 256; training crops from all of these."""
    options = training.with_defaults(train_classic.Options(data=str(folder), image_size=112, split="75-25", jitter=0.0))
    train = data.load_for_training(options, 0, torch.device("cpu"))
    assert train.kept.border == 8 and train.kept.store.shape[1:] == (3, 128, 128) and train.kept.size == 112
    path = folder / "flower 0" / "00.jpg"
    whole = pictures.read(path, 128)
    assert np.array_equal(train.kept.images[0], whole[:, 8:-8, 8:-8])
    assert np.array_equal(train.kept.images[0], pictures.read(path, 112, 8))
    seen = []
    train.batch(lambda images: seen.append(images) or images.float(), torch.zeros(64, dtype=torch.int64))
    assert seen[0].shape == (64, 3, 112, 112)
    corner = torch.from_numpy(whole[:, :4, :4].copy()).float()
    nearest = (seen[0][:, :, :4, :4].float() - corner).abs().mean((1, 2, 3)).min()
    assert nearest < 12  # some crop begins at the corner


# ------------------------------------------------------------------------------------------------------- the whole path


@pytest.mark.slow
def test_from_photographs_to_an_exported_network(tmp_path, on_disk, capsys):
    """Real weights, real photographs: without training, evaluated, used from the command line, exported, fine-tuned."""
    rows = photographs(tmp_path / "photos")
    listed = table(tmp_path / "photos" / "list.csv", [("path", "label"), *rows])
    lite0 = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "lite0.py"))["state_dict"]()
    torch.save(lite0, tmp_path / "lite0.pt")
    usual = ["--data", listed, "--data-root", tmp_path / "root", "--device", "cpu"]
    usual += ["--split", "50-50", "--split-seed", 1]
    usual += ["--backbone", "timm:tf_efficientnet_lite0", "--weights", tmp_path / "lite0.pt", "--image-size", 112]
    tiny.run(train_classic, *usual, "--epochs", 0, "--out", tmp_path / "frozen")
    best = tmp_path / "frozen" / "best.pt"
    assert checkpoints.read(best)["network"]["border"] == 8
    tiny.run(evaluate, best, "--data-root", tmp_path / "root", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["unseen"]["triplet_accuracy"] > 95 and report["unseen"]["auc"] > 90
    assert len(list((tmp_path / "root" / "cache").iterdir())) == 1  # training and evaluation share it

    for label in {label for _, label in rows}:
        (tmp_path / "known" / label).mkdir(parents=True)
        shutil.copy(tmp_path / "photos" / label / "11.jpg", tmp_path / "known" / label)
    tiny.run(export, best)
    files = [tmp_path / "photos" / path for path, _ in rows[::13]]
    capsys.readouterr()
    answers = []
    for network in (best, best.with_suffix(".onnx")):
        tiny.run(
            predict, network, "--support", tmp_path / "known", "--query", *files, "--json", tmp_path / "found.json"
        )
        found = json.loads((tmp_path / "found.json").read_text())["answers"]
        answers.append([answer["nearest"] for answer in found])
    assert answers[0] == answers[1] and sum(map(str.__eq__, answers[0], [label for _, label in rows[::13]])) >= 6
    z = [oneshot.load(each).embed(files) for each in (best, best.with_suffix(".onnx"))]
    assert np.abs(z[0] - z[1]).max() < 1e-5 and np.abs(z[0][0] - z[0][1]).max() > 1e-2

    more = ["--epochs", 2, "--batch-classes", 4, "--freeze", 5, "--optimizer", "sgd", "--out", tmp_path / "tuned"]
    tiny.run(train_classic, *usual, *more)
    tuned = checkpoints.read(tmp_path / "tuned" / "last.pt")
    assert tuned["step"] > 0 and tuned["options"]["crop"] == 0.25 and tuned["validation"]["auc"] > 90


def test_a_cache_notices_pictures_of_the_same_size(tmp_path, on_disk):
    """In a zip file by their checksum, elsewhere by times, to the nanosecond."""
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "set" / name / f"{number}.bmp")
    path, found = tmp_path / "set" / "a" / "0.bmp", []

    def load(source):
        return data.load(str(source), tmp_path / "root", 8).train.images.clone()

    for source in (lambda: tmp_path / "set", lambda: zipped(tmp_path / "set")):
        found.clear()
        for pixel, time in ((0, 10**18), (9, 10**18 + 1000)):
            Image.new("RGB", (8, 8), (pixel, 0, 0)).save(path)
            sources.os.utime(path, ns=(time, time))
            found.append(load(source()))
        assert not torch.equal(*found)
