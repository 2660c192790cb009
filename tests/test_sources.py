"""sources.py: CIFAR-100 by download, .npz files, folders of pictures; what is refused, and how."""

import functools
import hashlib
import io
import pickle
import socket
import socketserver
import tarfile
import threading
import time
import zipfile
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.datasets import CIFAR100, ImageFolder, Omniglot

import data
import pictures
import sources
import tiny


def load(path: Path) -> data.Data:
    return data.load(str(path), image_size=8)


def sizes(images: data.Images) -> list[int]:
    """How many images of each class there are."""
    return torch.bincount(images.labels).tolist()


# ----------------------------------------------------------------------------------------------------------- npz files


def load_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> data.Data:
    np.savez(folder / "a.npz", **arrays)
    return load(folder / "a.npz")


@pytest.mark.parametrize("channels", [np.s_[...], np.s_[..., 0], np.s_[..., :1]])
def test_npz_round_trip(tmp_path, channels):
    """Grey images get three channels."""
    arrays = tiny.arrays()
    arrays["train_images"] = arrays["train_images"][channels]
    loaded = load_arrays(tmp_path, arrays)
    assert loaded.name == "a" and loaded.class_names[3] == "class 3"
    assert loaded.train.images.is_contiguous(memory_format=torch.channels_last)
    for part in ("train", "test"):
        images = getattr(loaded, part).images.permute(0, 2, 3, 1)
        stored = arrays[f"{part}_images"].reshape(*images.shape[:3], -1)  # one channel or three
        assert np.array_equal(images, np.broadcast_to(stored, images.shape))
    assert loaded.test.labels.dtype == torch.int64 and np.array_equal(loaded.test.labels, arrays["test_labels"])


NOTHING = {"images": np.zeros((0, 16, 16, 3), np.uint8), "labels": np.zeros(0, int)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((160, 3, 16, 16), np.uint8)}, r"train_images must be \(N, S, S, 3\) uint8"),
        ({"train_images": np.zeros((160, 16, 16, 3), np.float32)}, "float32"),
        ({"train_labels": np.zeros(3, np.uint8)}, "train_labels must be"),
        ({"train_labels": np.full(160, 8)}, r"must lie in 0\.\.7"),
        ({"test_labels": np.full(48, -1)}, r"must lie in 0\.\.7"),
        ({"train_images": np.zeros((160, 12, 16, 3), np.uint8)}, r"square, got 12 x 16 pixels; crop them to \[:, :S, "),
        ({"test_images": np.zeros((48, 8, 8, 3), np.uint8)}, "differ in size"),
        ({"train_labels": np.full(160, 2**63, np.uint64)}, r"must lie in 0\.\.7"),
        ({"train_labels": np.zeros(160)}, "train_labels must be"),
        ({f"train_{k}": v for k, v in NOTHING.items()}, "no class has both"),
        ({f"{p}_{k}": v for p in ("train", "test") for k, v in NOTHING.items()}, "no class has both"),
        ({"train_images": np.zeros((160, 0, 16, 3), np.uint8)}, "train_images must be"),
        ({"class_names": None}, "lacks class_names"),
        ({"class_names": np.array(8)}, r"class_names must be \(C,\) strings"),
        ({"class_names": np.arange(8)}, r"class_names must be \(C,\) strings"),
        ({"class_names": np.array(["a"] * 8)}, "the same name twice"),
        ({"class_names": np.array([{}], dtype=object)}, "class_names holds pickled objects"),
    ],
)
def test_npz_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_arrays(tmp_path, {key: value for key, value in (tiny.arrays() | change).items() if value is not None})


def test_classes_without_images_are_left_out_all_at_once(tmp_path, capsys):
    arrays = tiny.arrays()
    for part, lost in (("train", 6), ("test", 1)):
        keep = arrays[f"{part}_labels"] != lost
        arrays |= {name: arrays[name][keep] for name in (f"{part}_images", f"{part}_labels")}
    loaded = load_arrays(tmp_path, arrays)
    assert capsys.readouterr().err == "a: left out, without training or test images: class 1, class 6\n"
    assert loaded.class_names == [f"class {label}" for label in (0, 2, 3, 4, 5, 7)] and loaded.own_split is None
    assert sizes(loaded.train) == [20] * 6 and sizes(loaded.test) == [6] * 6
    for part in ("train", "test"):
        own, kept = getattr(loaded, part), arrays[f"{part}_images"][arrays[f"{part}_labels"] == 4]
        assert np.array_equal(own.images[own.labels == 3].permute(0, 2, 3, 1), kept)


def test_an_npz_file_with_other_classes_for_testing_has_a_split_of_its_own(tmp_path, capsys):
    arrays = tiny.arrays(classes=5, train=12, test=6)
    arrays |= {f"{part}_labels": arrays[f"{part}_labels"] % 2 + 3 * (part == "test") for part in ("train", "test")}
    loaded = load_arrays(tmp_path, arrays)
    assert loaded.class_names == ["class 0", "class 1", "class 3", "class 4"]
    assert loaded.own_split == ([0, 1], [], [2, 3])
    counts = np.bincount(arrays["train_labels"])
    assert sizes(loaded.train) == (counts - counts // 6).tolist()
    assert sizes(loaded.test)[:2] == (counts // 6).tolist() and len(loaded.test) > 30
    printed = capsys.readouterr()
    assert printed.out == "a: train and test have different classes: 2 seen, 0 for validation, 2 unseen\n"
    assert "class 2\n" in printed.err


def test_unreadable_sources_are_refused(tmp_path):
    whole = tiny.write_npz(tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "single.npy", np.zeros(3))
    for content in (whole[: len(whole) // 2], b"no archive", b"", (tmp_path / "single.npy").read_bytes()):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz is not an \.npz file, or was cut short"):
            load(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "missing.npz")
    with pytest.raises(ValueError, match="unknown data 'mnist'"):
        load("mnist")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-100],
        lambda content: content + b"more",
        lambda content: b"",
        lambda content: b"\x93NUMPY\x01\x00\xff\xff" + content[10:],
    ],
)
def test_a_damaged_array_is_refused(tmp_path, change):
    """The archive is sound, the array in it is not."""
    whole = tiny.write_npz(tmp_path / "whole.npz")
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
        for name in archive.namelist():
            content = archive.read(name)
            bad.writestr(name, change(content) if name == "train_images.npy" else content)
    with pytest.raises(ValueError, match="train_images is damaged or cut short: "):
        load(tmp_path / "bad.npz")


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "zip"])
def test_a_changed_byte_is_refused_or_harmless(tmp_path, kind):
    """Anywhere in the file: checksums find it, or it sits where it changes nothing; never another kind of error."""
    arrays = tiny.arrays(classes=2, train=2, test=1, side=4)
    if kind == "zip":
        save_pictures(tmp_path / "set", {"a": 3, "b": 3})
        whole, damaged = zipped(tmp_path / "set").read_bytes(), tmp_path / "damaged.zip"
    else:
        damaged = tmp_path / "damaged.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(damaged, **arrays)
        whole = damaged.read_bytes()
    random, refused = np.random.default_rng(0), 0
    for place in random.integers(0, len(whole), 200).tolist():
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ int(random.integers(1, 256))]) + whole[place + 1 :])
        try:
            loaded = load(damaged)
        except (ValueError, OSError) as error:
            assert damaged.name in str(error) and "\n" not in str(error)
            assert kind == "zip" or isinstance(error, ValueError)
            refused += 1
        else:
            if kind != "zip":
                assert np.array_equal(loaded.train.images.permute(0, 2, 3, 1), arrays["train_images"])
                assert np.array_equal(loaded.test.labels, arrays["test_labels"])
    assert refused > 100


# ------------------------------------------------------------------------------------------------------------ downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the folder www from loopback. `cut` sends that many bytes and, after `stall` seconds, hangs up."""
    server = SimpleNamespace(requested=[], cut=None, stall=0.0)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "www")

        def log_message(self, *args):
            server.requested.append(self.path)

        def copyfile(self, source, target):
            target.write(source.read(server.cut))
            time.sleep(server.stall)

    (tmp_path / "www").mkdir()
    monkeypatch.setenv("no_proxy", "*")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_address[1]}"
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        listening.shutdown()


@pytest.fixture
def cifar100(tmp_path, server, monkeypatch):
    """A small CIFAR-100 in place of the real one, 2 training and 1 test images a class: archive, training images."""
    random, sums, path = np.random.default_rng(0), {}, tmp_path / "www" / "cifar-100-python.tar.gz"
    made = {"meta": {"fine_label_names": [f"name {i}" for i in range(100)]}}
    for part, count in (("train", 2), ("test", 1)):
        pixels = random.integers(0, 256, (100 * count, 3072), np.uint8)
        made[part] = {"data": pixels, "fine_labels": [*range(100)] * count}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in made.items():
            packed = pickle.dumps(content)
            entry = tarfile.TarInfo(f"cifar-100-python/{name}")
            entry.size = len(packed)
            archive.addfile(entry, io.BytesIO(packed))
            sums[name] = hashlib.md5(packed).hexdigest()
    monkeypatch.setattr(CIFAR100, "url", f"{server.url}/{path.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    return path, torch.from_numpy(made["train"]["data"]).view(-1, 3, 32, 32)


def test_cifar100_is_downloaded_once(tmp_path, server, cifar100):
    """Damaged extracted files are extracted again."""
    first = data.load("cifar100", tmp_path / "root")
    assert server.requested and first.name == "cifar100" and len(first.train) == 200 and len(first.test) == 100
    assert first.class_names[7] == "name 7" and torch.equal(first.train.images, cifar100[1])
    assert first.train.images.is_contiguous(memory_format=torch.channels_last)
    server.requested.clear()
    for path in (tmp_path / "root" / "cifar-100-python").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    again = data.load("cifar100", tmp_path / "root")
    assert not server.requested and torch.equal(first.train.images, again.train.images)


@pytest.mark.parametrize(
    ("share", "message"),
    [(None, ""), (0, ""), (0.5, ""), (1, r"is incomplete or damaged \(its checksum is wrong\)")],
)
def test_a_failed_download_is_refused_and_then_repeated(tmp_path, server, cifar100, monkeypatch, share, message):
    """Offline, cut short after a share of the file, or the whole of a wrong one. The message names the alternatives."""
    archive, images = cifar100
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-1] + b"x")
    with monkeypatch.context() as change:
        if share is None:
            change.setattr(CIFAR100, "url", "http://127.0.0.1:9/nothing.tar.gz")
        else:
            server.cut = int(share * len(whole))
        message = rf"(?s)cannot download CIFAR-100: .*{message}.*Try again.*--data FILE\.npz.*--data glyphs"
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                data.load("cifar100", tmp_path / "root")
    server.cut = None
    archive.write_bytes(whole)
    assert torch.equal(data.load("cifar100", tmp_path / "root").train.images, images)


@pytest.mark.slow
def test_a_silent_server_is_not_waited_for(tmp_path, server, cifar100, monkeypatch):
    server.cut, server.stall = 100, 1.0
    monkeypatch.setattr(sources, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match="cannot download CIFAR-100: .*timed out"):
        data.load("cifar100", tmp_path / "root")
    assert socket.getdefaulttimeout() is None


def test_omniglot_is_downloaded_once_and_checked(tmp_path, server, monkeypatch):
    www, sums, read = tmp_path / "www", {}, functools.partial(data.load, "omniglot", tmp_path / "root", 8)
    for name, alphabets in (("images_background", "BA"), ("images_evaluation", "DC")):
        save_pictures(www / name, {f"{alphabet}/character0{n}": 20 for alphabet in alphabets for n in (1, 2)})
        sums[name] = hashlib.md5(zipped(www / name).read_bytes()).hexdigest()
    monkeypatch.setattr(Omniglot, "download_url_prefix", server.url)
    monkeypatch.setattr(Omniglot, "zips_md5", sums | {"images_evaluation": "0" * 32})
    with pytest.raises(ValueError, match=r"download Omniglot: images_evaluation\.zip .*is incomplete or damaged"):
        read()
    monkeypatch.setattr(Omniglot, "zips_md5", sums)
    loaded = read()
    names = [f"{alphabet}/character0{n}" for alphabet in "ABCD" for n in (1, 2)]
    assert loaded.name == "omniglot" and loaded.class_names == names
    assert loaded.own_split == ([0, 1, 2, 3], [], [4, 5, 6, 7])  # background, evaluation
    assert sizes(loaded.train) == [17] * 4 and sizes(loaded.test) == [3] * 4 + [20] * 4  # the last sixth, for testing
    expected = pictures.read(www / "images_evaluation" / "C" / "character02" / "00.png", 8)
    assert np.array_equal(loaded.test.images[loaded.test.labels == 5][0], expected)
    server.requested.clear()
    again = read()
    assert not server.requested and torch.equal(again.test.images, loaded.test.images)
    (tmp_path / "root" / "omniglot-py" / "images_background.zip").write_bytes(b"PK damaged")
    assert torch.equal(read().train.images, loaded.train.images)
    assert {*server.requested} == {"/images_background.zip"}


# ------------------------------------------------------------------------------------------------------------- pictures


def save_pictures(root: Path, folders: dict[str, int], side: int = 8) -> None:
    """So many noisy PNG files, 00.png and so on, into each of these folders in `root`; no two are equal."""
    random = np.random.default_rng(0)
    for folder, count in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number:02}.png")


def zipped(folder: Path) -> Path:
    """A zip file, beside it, of a folder and what is in it, with entries for folders as archivers write them."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), key=lambda file: file.name):  # in another order than that of folders
            archive.write(file, file.relative_to(folder.parent))
    return path


def as_image_folder(root: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Class names, images (N, 3, H, W) and labels by torchvision's own reader."""
    folder = ImageFolder(str(root))
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in folder])
    return folder.classes, images, torch.tensor(folder.targets)


def test_a_folder_without_parts_gives_its_last_sixth_for_testing(tmp_path):
    save_pictures(tmp_path, {"b": 18, "a": 5, "c": 4})
    names, images, labels = as_image_folder(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("not a class")
    loaded = load(tmp_path)
    assert loaded.name == tmp_path.name and loaded.class_names == names == ["a", "b", "c"]
    assert sizes(loaded.train) == [3, 15, 3] and sizes(loaded.test) == [2, 3, 1]  # two, a pair, of five
    for label in range(3):
        own = torch.cat([part.images[part.labels == label] for part in (loaded.train, loaded.test)])
        assert torch.equal(own, images[labels == label])
    assert loaded.train.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "parts", ["train test more", "train valid", "Train VALIDATION", "Training Testing", "TRAIN Test Val"]
)
def test_a_folder_with_parts(tmp_path, capsys, parts):
    """By their usual names. Another folder, and a class that only one of them has, is left out."""
    train, test, *others = parts.split()
    save_pictures(tmp_path, {f"{part}/{name}": 3 for part in parts.split() for name in ("cat", "cat/more", "dog")})
    expected = [as_image_folder(tmp_path / part) for part in (train, test)]
    save_pictures(tmp_path, {f"{test}/fox": 1, f"{train}/empty": 0})
    loaded = load(tmp_path)
    for read, (names, images, labels) in zip((loaded.train, loaded.test), expected, strict=True):
        assert loaded.class_names == names and torch.equal(read.images, images) and torch.equal(read.labels, labels)
    assert loaded.own_split is None
    said, listed = capsys.readouterr()
    assert f"train images from {train}/" in said and f"test images from {test}/" in said
    assert said.endswith(f"; left out {others[0]}/\n" if others else "/\n") and ("left out" in said) == bool(others)
    assert f"{train}: left out empty/\n" in listed and "without training or test images: fox\n" in listed


def test_unreadable_pictures_are_listed_and_left_out(tmp_path, capsys):
    """The first twenty; a class without others is left out, too."""
    save_pictures(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "01.png").write_bytes(b"no picture")
    whole = (tmp_path / "b" / "03.png").read_bytes()
    (tmp_path / "b" / "03.png").write_bytes(whole[: len(whole) // 2])
    loaded = load(tmp_path)
    assert sizes(loaded.train) == [2, 2] and len(loaded.test) == 2
    listed = capsys.readouterr().err
    assert "left out, 2 of 8:" in listed and "a/01.png is not a picture" in listed and "b/03.png cannot be" in listed
    for number in range(30):
        (tmp_path / "a" / f"{number:02}.png").write_bytes(b"")
    assert load(tmp_path).class_names == ["b"]
    listed = capsys.readouterr().err
    assert "left out, 31 of 34:" in listed and "and 11 more\n" in listed and len(listed.splitlines()) == 23
    assert "left out, without training or test images: a\n" in listed


def test_a_folder_without_class_folders_is_refused(tmp_path):
    save_pictures(tmp_path, {"": 3})
    with pytest.raises(ValueError, match="has no folders with pictures, one for each class"):
        load(tmp_path)


@pytest.mark.parametrize("parts", ["train/a train/b test/A test/C", "train/a train/b test/c", "train/a test/b test/c"])
def test_parts_that_only_seem_to_have_different_classes(tmp_path, parts):
    save_pictures(tmp_path, dict.fromkeys(parts.split(), 4))
    with pytest.raises(ValueError, match="no class has both training and test images; give both the same class names"):
        load(tmp_path)


def test_training_pictures_alone(tmp_path, capsys):
    """With nothing beside train/, or with test pictures of no class, the last sixth of each class is for testing."""
    photos = tmp_path / "photos"
    save_pictures(photos, {"train/a": 12, "train/b": 12})
    for expected in (f"holds one folder; reading {photos / 'train'}", "from train/; left out test/"):
        loaded = load(photos)
        assert (loaded.name, loaded.class_names) == ("photos", ["a", "b"])
        assert sizes(loaded.train) == [10, 10] and len(loaded.test) == 4
        assert expected in capsys.readouterr().out
        save_pictures(photos, {"test": 5})


def test_a_data_set_one_level_down(tmp_path, capsys):
    """It is read if it is the only folder there, whatever its name; otherwise folders are levels of classes' names."""
    photos = tmp_path / "photos"
    save_pictures(photos, {"photos/cat": 6, "photos/dog": 6, ".git": 1, "__MACOSX/photos": 1})
    loaded = load(photos)
    assert loaded.class_names == ["cat", "dog"] and len(loaded.train) == 8
    assert f"{photos} holds one folder; reading {photos}/photos\n" in capsys.readouterr().out
    save_pictures(photos, {"more/fox": 6, "more/cow": 6})
    assert load(photos).class_names == ["more/cow", "more/fox", "photos/cat", "photos/dog"]


@pytest.mark.parametrize("parts", [(), ("train", "test")])
def test_nested_class_folders_zipped_or_not(tmp_path, capsys, parts):
    """A folder without pictures of its own, but with two or more folders with pictures, is a level of the name."""
    folders = dict.fromkeys(("Greek/a", "Greek/b", "Han/new/c", "Han/old/c", "Han/old/d", "cat", "dog/1/2"), 6)
    folders |= {"dog/1/3": 2, "cat/more": 2}  # dog has but one folder, cat has pictures of its own
    folders |= {"Greek/.hidden": 1, "__MACOSX/Greek": 1}
    for part in parts or ("",):
        save_pictures(tmp_path / "set" / part, folders)
        (tmp_path / "set" / part / "Greek" / "notes.txt").write_text("no picture")
    loaded = [load(path) for path in (tmp_path / "set", zipped(tmp_path / "set"))]
    names = ["Greek/a", "Greek/b", "Han/new", "Han/old/c", "Han/old/d", "cat", "dog/2", "dog/3"]
    for each in loaded:
        assert each.name == "set" and each.class_names == names
        assert sizes(each.train if parts else each.train + each.test) == [6, 6, 6, 6, 6, 8, 6, 2]
    for part in ("train", "test"):
        a, b = (getattr(each, part) for each in loaded)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert "left out 1 other files, __MACOSX/\n" in capsys.readouterr().err


def test_parts_agree_on_what_is_a_class(tmp_path):
    """cat/2026 in train/ is of class cat if test/ has pictures in cat/ itself; so it was before there were levels."""
    folders = ("train/cat/2025", "train/cat/2026", "train/dog", "test/cat", "test/dog/a", "test/dog/b")
    save_pictures(tmp_path, dict.fromkeys(folders, 2))
    loaded = load(tmp_path)
    assert loaded.class_names == ["cat", "dog"] and loaded.own_split is None
    assert sizes(loaded.train) == [4, 2] and len(loaded.test) == 6


@pytest.mark.parametrize("val", ["none", "others", "same"])
def test_the_layout_of_few_shot_data_sets(tmp_path, capsys, val):
    """Seen, validation and unseen classes, in the order of their names."""
    classes = {"train": "bdf", "test": "ac", "val": {"none": "", "others": "eg", "same": "bdf"}[val]}
    save_pictures(tmp_path, {f"{part}/{name}": 12 for part, names in classes.items() for name in names})
    loaded = load(tmp_path)
    own, validation = loaded.own_split, "eg" if val == "others" else ""
    assert ["".join(loaded.class_names[label] for label in part) for part in own] == ["bdf", validation, "ac"]
    counts = f"3 seen, {len(validation)} for validation, 2 unseen"
    assert f"{tmp_path.name}: train and test have different classes: {counts}\n" in capsys.readouterr().out
    expected = [(12, 12) if val == "same" else (10, 2), (12, 0), (0, 12)]  # training and test images of a class
    for labels, counts in zip(own, expected, strict=True):
        for label in labels:
            assert tuple(int((part.labels == label).sum()) for part in (loaded.train, loaded.test)) == counts


def test_bilevel_drawings_are_scaled_with_antialiasing(tmp_path):
    """1-bit PNG, black on white, as Omniglot's, from a zip file: a thin line becomes grey, not lost."""
    drawing = Image.new("1", (105, 105), 1)
    drawing.paste(0, (50, 0, 52, 105))
    save_pictures(tmp_path / "set", {"a": 6, "b": 6})
    for path in tmp_path.glob("set/*/*.png"):
        drawing.save(path)
    images = data.load(str(zipped(tmp_path / "set")), image_size=32).train.images
    assert images.shape == (8, 3, 32, 32) and (images[:, :, :, 0] == 255).all()
    assert abs(int((255 - images[0, 0].int()).sum()) - 32 * 255 * 2 * 32 / 105) < 0.1 * 32 * 255


def test_hostile_and_damaged_zip_files_are_refused(tmp_path, monkeypatch):
    """As a whole, in one line that names the file."""
    save_pictures(tmp_path / "set", {"a": 6, "b": 6}, side=32)
    whole, bad = zipped(tmp_path / "set"), tmp_path / "bad.zip"
    picture = (tmp_path / "set" / "a" / "00.png").read_bytes()

    def refuse(message):
        with pytest.raises((ValueError, OSError), match=message) as error:
            load(bad)
        assert "bad.zip" in str(error.value) and "\n" not in str(error.value)

    for name in ("../set/a/new.png", "/set/a/new.png", "set/../../new.png", "set//a.png", "set/a/00.png"):
        bad.write_bytes(whole.read_bytes())
        with pytest.warns(UserWarning) if name == "set/a/00.png" else nullcontext():  # a duplicate
            with zipfile.ZipFile(bad, "a") as archive:
                archive.writestr(name, picture)
        refuse("is no archive to trust: .* is in it twice, or leads out of it")
    for content in (b"", b"no archive", whole.read_bytes()[:-30]):
        bad.write_bytes(content)
        refuse("is no folder and no zip file, or was cut short")
    damaged = bytearray(whole.read_bytes())
    with zipfile.ZipFile(whole) as archive:
        damaged[archive.getinfo("set/b/03.png").header_offset + 300] ^= 1
    bad.write_bytes(damaged)
    refuse(r"bad\.zip/set/b/03\.png cannot be unpacked: ")
    bad.write_bytes(whole.read_bytes().replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"))
    refuse("cannot be unpacked: .*encrypted")
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("set/a/00.png", "set/b/00.png"):
            archive.writestr(name, picture + bytes(9_000_000))
    monkeypatch.setattr(pictures, "MAX_BYTES", 8_000_000)
    refuse("has 9,00.,... bytes, more than the 8,000,000 allowed")
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("set/a/00.png", bytes(9_000_000))
    refuse("would unpack to more than a thousand times its size")


def test_what_is_left_out_of_a_folder_is_listed_in_one_line(tmp_path, capsys):
    save_pictures(tmp_path, {"": 1, "a": 3, "b": 3, ".cache": 0, "__MACOSX/a": 1, "empty": 0, "notes": 0})
    for name in ("a/labels.json", "a/.DS_Store", "b/labels.json", "b/.DS_Store", "notes/read.TXT"):
        (tmp_path / name).write_text("no picture")
    assert load(tmp_path).class_names == ["a", "b"]
    listed = "left out 4 other files, .cache/, __MACOSX/, empty/, notes/"
    assert capsys.readouterr().err == f"{tmp_path}: {listed}\n"


def test_two_spellings_of_a_name_are_one_class(tmp_path):
    """Composed and decomposed Unicode, as Linux and macOS write it."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folders = (f"train/{composed}", f"train/{decomposed}", "train/b", f"test/{decomposed}", "test/b")
    save_pictures(tmp_path, dict.fromkeys(folders, 2))
    loaded = load(tmp_path)
    assert loaded.class_names == ["b", composed]
    assert sizes(loaded.train) == [2, 4] and len(loaded.test) == 4
    arrays = tiny.arrays(classes=2) | {"class_names": np.array(["b", decomposed])}
    assert load_arrays(tmp_path, arrays).class_names == loaded.class_names


def test_pictures_are_known_by_their_content(tmp_path, capsys):
    save_pictures(tmp_path, {"a": 2})
    picture = Image.open(tmp_path / "a" / "00.png")
    names = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.JPG": "PNG", "d": "GIF", "e.jp2": "JPEG2000", "f.png": "WEBP"}
    names |= {"g.avif": "AVIF"} if features.check("avif") else {}
    for name, form in names.items():
        picture.save(tmp_path / "a" / name, format=form)
    assert len(load(tmp_path).train) == 2 + len(names) - 2
    assert capsys.readouterr().err == ""


def test_heic_pictures_that_pillow_cannot_read(tmp_path, capsys, monkeypatch):
    """One message, and what it says helps; beside others they are left out."""
    monkeypatch.setattr(pictures, "FORMATS", ("JPEG", "PNG"))
    save_pictures(tmp_path, {"a": 3, "b": 3})
    pngs = [*tmp_path.glob("*/*.png")]
    for path in pngs:
        path.with_suffix(".HEIC").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic")
    assert len(load(tmp_path).train) == 4
    listed = capsys.readouterr().err
    assert "left out, 6 of 12:" in listed and "b/02.HEIC" in listed
    for path in pngs:
        path.unlink()
    with pytest.raises(ValueError, match=r"none of 6 files can be read: .*a/00\.HEIC .*HEIC: pip install pillow-heif"):
        load(tmp_path)
    assert capsys.readouterr().err == ""


def test_images_on_a_gpu_have_their_border():
    images = sources.Images(torch.zeros(4, 3, 12, 12, dtype=torch.uint8), torch.arange(4), border=2)
    moved = images[1:].to(torch.device("meta"))
    assert (moved.size, moved.store.shape, moved.border) == (8, (3, 3, 12, 12), 2)


def test_validation_folders_hold_what_they_hold(tmp_path):
    """A class of val/ and test/ is unseen, never one to choose by; of val/, seen classes alone are tested on it."""
    folders = {
        f"{part}/{name}": 12 for part, names in {"train": "ab", "test": "cd", "val": "abce"}.items() for name in names
    }
    save_pictures(tmp_path, folders)
    loaded = data.load(str(tmp_path), image_size=8)
    assert loaded.own_split == ([0, 1], [4], [2, 3])
    assert torch.bincount(loaded.test.labels, minlength=5).tolist() == [12, 12, 12, 12, 0]
    assert torch.bincount(loaded.train.labels, minlength=5).tolist() == [12, 12, 0, 0, 12]


def test_a_table_of_a_spreadsheet_in_two_spellings(tmp_path):
    """With the mark that Excel puts before UTF-8, and names as Linux and macOS write them."""
    save_pictures(tmp_path, {"p": 12})
    names = ["caf\u00e9", "cafe\u0301", "b", "b"]
    rows = "".join(f"p/{n:02}.png,{names[n % 4]}\n" for n in range(12))
    (tmp_path / "a.csv").write_text("\ufeffpath,label\n" + rows, encoding="utf-8")
    assert data.load(str(tmp_path / "a.csv"), image_size=8).class_names == ["b", names[0]]


def test_which_data_can_be_scaled():
    found = {source: sources.has_files(source) for source in ("cifar100", "omniglot", "glyphs", "a.NPZ", "a", "a.csv")}
    assert [source for source, has in found.items() if has] == ["omniglot", "a", "a.csv"]


def test_a_folder_is_named_by_its_real_name(tmp_path, monkeypatch):
    save_pictures(tmp_path / "photos", {"a": 3, "b": 3})
    monkeypatch.chdir(tmp_path / "photos")
    assert data.load(".", tmp_path / "root", 8).name == "photos"
