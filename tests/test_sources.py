"""sources.py: CIFAR-100 by download, .npz files, folders of pictures; what is refused, and how."""

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

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.datasets import CIFAR100, ImageFolder, Omniglot

import data
import pictures
import sources
import tiny

# ----------------------------------------------------------------------------------------------------------- npz files


def test_npz_round_trip(tmp_path):
    arrays = tiny.arrays()
    loaded = data.load(str(tiny.write_npz(tmp_path / "mine.npz")))
    assert loaded.name == "mine" and loaded.class_names[3] == "class 3"
    assert loaded.train.images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(loaded.train.images.permute(0, 2, 3, 1).numpy(), arrays["train_images"])
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
        (
            {"train_images": np.zeros((160, 12, 16, 3), np.uint8)},
            r"square, got 12 x 16 pixels; crop them to \[:, :S, :S\]",
        ),
        ({"test_images": np.zeros((48, 8, 8, 3), np.uint8)}, "differ in size"),
        ({"train_labels": np.full(160, 2**63, np.uint64)}, r"must lie in 0\.\.7"),
        ({"train_labels": np.zeros(160)}, "train_labels must be"),
        ({"train_images": np.zeros((0, 16, 16, 3), np.uint8), "train_labels": np.zeros(0, int)}, "no class has both"),
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
    arrays = {key: value for key, value in (tiny.arrays() | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "bad.npz"))


def test_classes_without_images_are_left_out_all_at_once(tmp_path, capsys):
    arrays = tiny.arrays()
    for part, lost in (("train", 6), ("test", 1)):
        keep = arrays[f"{part}_labels"] != lost
        arrays |= {name: arrays[name][keep] for name in (f"{part}_images", f"{part}_labels")}
    np.savez(tmp_path / "a.npz", **arrays)
    loaded = data.load(str(tmp_path / "a.npz"))
    assert capsys.readouterr().err == "a: left out, without training or test images: class 1, class 6\n"
    assert loaded.class_names == [f"class {label}" for label in (0, 2, 3, 4, 5, 7)] and loaded.own_split is None
    for part, count in (("train", 20), ("test", 6)):
        own, labels = getattr(loaded, part), arrays[f"{part}_labels"]
        assert torch.bincount(own.labels).tolist() == [count] * 6
        kept = arrays[f"{part}_images"][labels == 4]
        assert np.array_equal(own.images[own.labels == 3].permute(0, 2, 3, 1), kept)


@pytest.mark.parametrize("index", [np.s_[..., 0], np.s_[..., :1]])
def test_grey_images_get_three_channels(tmp_path, index):
    arrays = tiny.arrays()
    grey = arrays["train_images"][index]
    np.savez(tmp_path / "a.npz", **arrays | {"train_images": grey})
    loaded = data.load(str(tmp_path / "a.npz"))
    assert loaded.train.images.is_contiguous(memory_format=torch.channels_last)
    for channel in loaded.train.images.unbind(1):
        assert np.array_equal(channel, grey.reshape(160, 16, 16))
    assert np.array_equal(loaded.test.images.permute(0, 2, 3, 1), arrays["test_images"])


def test_an_npz_file_with_other_classes_for_testing_has_a_split_of_its_own(tmp_path, capsys):
    arrays = tiny.arrays(classes=5, train=12, test=6)
    arrays |= {f"{part}_labels": arrays[f"{part}_labels"] % 2 + 3 * (part == "test") for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays)
    loaded = data.load(str(tmp_path / "a.npz"))
    assert loaded.class_names == ["class 0", "class 1", "class 3", "class 4"]
    assert loaded.own_split == ([0, 1], [], [2, 3])
    counts = np.bincount(arrays["train_labels"])
    assert torch.bincount(loaded.train.labels).tolist() == (counts - counts // 6).tolist()
    assert torch.bincount(loaded.test.labels)[:2].tolist() == (counts // 6).tolist() and len(loaded.test) > 30
    printed = capsys.readouterr()
    assert printed.out == "a: train and test have different classes: 2 seen, 0 for validation, 2 unseen\n"
    assert "class 2\n" in printed.err
    last = [np.flatnonzero(arrays["train_labels"] == label)[-1] for label in (0, 1)]  # in the file's order
    for label, place in enumerate(last):
        own = loaded.test.images[loaded.test.labels == label][-1]
        assert np.array_equal(own.permute(1, 2, 0), arrays["train_images"][place])


def test_unreadable_sources_are_refused(tmp_path):
    whole = tiny.write_npz(tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "single.npy", np.zeros(3))
    array = (tmp_path / "single.npy").read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "text": b"no archive", "empty": b"", "array": array}
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.npz is not an \.npz file, or was cut short"):
            data.load(str(tmp_path / f"{name}.npz"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load(str(tmp_path / "missing.npz"))
    with pytest.raises(ValueError, match="unknown data 'mnist'"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-100], "train_images is damaged or cut short"),
        (lambda content: content + b"more", "train_images is damaged or cut short: it holds more data"),
        (lambda content: b"", "train_images is damaged or cut short"),
        (lambda content: b"\x93NUMPY\x01\x00\xff\xff" + content[10:], "train_images is damaged or cut short"),
    ],
)
def test_a_damaged_array_is_refused(tmp_path, change, message):
    """The archive is sound, the array in it is not."""
    with (
        zipfile.ZipFile(tiny.write_npz(tmp_path / "whole.npz")) as whole,
        zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad,
    ):
        for name in whole.namelist():
            content = whole.read(name)
            bad.writestr(name, change(content) if name == "train_images.npy" else content)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_is_refused_or_harmless(tmp_path, save):
    """Anywhere in the file: checksums find it, or it sits where it changes nothing; never another kind of error."""
    arrays = tiny.arrays(classes=2, train=2, test=1, side=4)
    save(tmp_path / "whole.npz", **arrays)
    whole = (tmp_path / "whole.npz").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for place in random.integers(0, len(whole), 200).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= int(random.integers(1, 256))
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            loaded = data.load(str(tmp_path / "damaged.npz"))
        except ValueError as error:
            assert "damaged.npz" in str(error)
            refused += 1
        else:
            assert np.array_equal(loaded.train.images.permute(0, 2, 3, 1), arrays["train_images"])
            assert np.array_equal(loaded.test.labels, arrays["test_labels"])
    assert refused > 100


# ------------------------------------------------------------------------------------------------------------ CIFAR-100


def cifar_archive(folder: Path) -> Path:
    """A cifar-100-python.tar.gz in the official layout, with 2 training and 1 test images of each class."""
    random = np.random.default_rng(0)
    path = folder / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, count in (("train", 200), ("test", 100), ("meta", 0)):
            labels = [i % 100 for i in range(count)]
            content = {"data": random.integers(0, 256, (count, 3072), np.uint8), "fine_labels": labels}
            if name == "meta":
                content = {"fine_label_names": [f"name {i}" for i in range(100)]}
            packed = pickle.dumps(content)
            entry = tarfile.TarInfo(f"cifar-100-python/{name}")
            entry.size = len(packed)
            archive.addfile(entry, io.BytesIO(packed))
    return path


class Server:
    """Serves a small CIFAR-100 from loopback. `cut` sends that many bytes and, after `stall` seconds, hangs up."""

    def __init__(self, archive: Path):
        self.requested, self.cut, self.stall = [], None, 0.0
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=archive.parent)

            def log_message(self, *args):
                outer.requested.append(self.path)

            def copyfile(self, source, target):
                target.write(source.read(outer.cut))
                time.sleep(outer.stall)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{archive.name}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A small CIFAR-100 in place of the real one."""
    (tmp_path / "www").mkdir()
    archive = cifar_archive(tmp_path / "www")
    with tarfile.open(archive) as members:
        names = ("train", "test", "meta")
        sums = {name: hashlib.md5(members.extractfile(f"cifar-100-python/{name}").read()) for name in names}
    server = Server(archive)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(CIFAR100, "url", server.url)
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"].hexdigest()]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"].hexdigest()]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"].hexdigest()})
    yield server
    server.server.shutdown()
    server.server.server_close()


def pixels_of(archive: Path) -> torch.Tensor:
    """The training images (N, 3, 32, 32) of an archive made by `cifar_archive`."""
    with tarfile.open(archive) as members:
        content = pickle.load(members.extractfile("cifar-100-python/train"))
    return torch.from_numpy(content["data"].reshape(-1, 3, 32, 32))


def test_cifar100_is_downloaded_once(tmp_path, server):
    first = data.load("cifar100", tmp_path / "root")
    assert server.requested and first.name == "cifar100" and len(first.train) == 200 and len(first.test) == 100
    assert first.class_names[7] == "name 7" and torch.equal(first.train.images, pixels_of(*tmp_path.glob("www/*")))
    server.requested.clear()
    again = data.load("cifar100", tmp_path / "root")
    assert not server.requested and torch.equal(first.train.images, again.train.images)
    stored = first.train.images.permute(0, 2, 3, 1)
    assert stored.is_contiguous()  # channels last: batches are gathered without copying the data set


@pytest.mark.parametrize("share", [0, 0.5])
def test_an_interrupted_download_is_refused_and_then_repeated(tmp_path, server, share):
    (archive,) = tmp_path.glob("www/*")
    server.cut = int(share * archive.stat().st_size)
    for _ in range(2):
        with pytest.raises(ValueError, match="(?s)cannot download CIFAR-100: .*Try again"):
            data.load("cifar100", tmp_path / "root")
    server.cut = None
    assert torch.equal(data.load("cifar100", tmp_path / "root").train.images, pixels_of(archive))


@pytest.mark.slow
def test_a_silent_server_is_not_waited_for(tmp_path, server, monkeypatch):
    server.cut, server.stall = 100, 3.0
    monkeypatch.setattr(sources, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match="cannot download CIFAR-100: .*timed out"):
        data.load("cifar100", tmp_path / "root")
    assert socket.getdefaulttimeout() is None


def test_a_damaged_archive_is_downloaded_again(tmp_path, server, monkeypatch):
    (archive,) = tmp_path.glob("www/*")
    (tmp_path / "root").mkdir()
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "root" / archive.name).write_bytes(damaged)
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nothing.tar.gz")
    with pytest.raises(ValueError, match="cannot download CIFAR-100"):
        data.load("cifar100", tmp_path / "root")
    monkeypatch.setattr(CIFAR100, "url", server.url)
    assert torch.equal(data.load("cifar100", tmp_path / "root").train.images, pixels_of(archive))


def test_damaged_extracted_files_are_extracted_again(tmp_path, server):
    first = data.load("cifar100", tmp_path / "root")
    for path in (tmp_path / "root" / "cifar-100-python").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    server.requested.clear()
    assert torch.equal(data.load("cifar100", tmp_path / "root").train.images, first.train.images)
    assert not server.requested


def test_cifar100_with_a_wrong_checksum_is_refused(tmp_path, server, monkeypatch):
    monkeypatch.setattr(CIFAR100, "tgz_md5", "0" * 32)
    with pytest.raises(ValueError, match=r"is incomplete or damaged \(its checksum is wrong\)"):
        data.load("cifar100", tmp_path / "root")


def test_cifar100_offline_names_the_alternatives(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    with pytest.raises(ValueError, match=r"(?s)cannot download CIFAR-100.*--data FILE\.npz.*--data glyphs"):
        data.load("cifar100", tmp_path / "root")


# ------------------------------------------------------------------------------------------------------------- pictures


def save_pictures(folder: Path, count: int, side: int = 8, seed: int = 0) -> None:
    """`count` different noisy PNG files, 00.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{number:02}.png")


def as_image_folder(root: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Class names, images (N, 3, H, W) and labels by torchvision's own reader."""
    folder = ImageFolder(str(root))
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in folder])
    return folder.classes, images, torch.tensor(folder.targets)


def test_a_folder_without_parts_gives_its_last_sixth_for_testing(tmp_path):
    for seed, (name, count) in enumerate({"b": 18, "a": 5, "c": 4}.items()):
        save_pictures(tmp_path / name, count, seed=seed)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("not a class")
    loaded = data.load(str(tmp_path), image_size=8)
    (tmp_path / ".hidden").rmdir()
    names, images, labels = as_image_folder(tmp_path)
    assert loaded.name == tmp_path.name and loaded.class_names == names == ["a", "b", "c"]
    assert torch.bincount(loaded.train.labels).tolist() == [3, 15, 3]
    assert torch.bincount(loaded.test.labels).tolist() == [2, 3, 1]  # two, a pair, of five
    for label in range(3):
        own = torch.cat([part.images[part.labels == label] for part in (loaded.train, loaded.test)])
        assert torch.equal(own, images[labels == label])
    assert loaded.train.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_folder_with_parts(tmp_path, capsys, part):
    for seed, name in enumerate(("cat", "dog")):
        save_pictures(tmp_path / "train" / name, 4, seed=seed)
        save_pictures(tmp_path / "train" / name / "more", 2, seed=10 + seed)
        save_pictures(tmp_path / part / name, 1, seed=20 + seed)
    loaded = data.load(str(tmp_path), image_size=8)
    for read, folder in ((loaded.train, "train"), (loaded.test, part)):
        names, images, labels = as_image_folder(tmp_path / folder)
        assert loaded.class_names == names and torch.equal(read.images, images) and torch.equal(read.labels, labels)
    save_pictures(tmp_path / part / "fox", 1)
    (tmp_path / "train" / "empty").mkdir()
    capsys.readouterr()
    again = data.load(str(tmp_path), image_size=8)
    assert again.class_names == loaded.class_names and torch.equal(again.test.images, loaded.test.images)
    listed = capsys.readouterr().err
    assert "train: left out empty/\n" in listed and "without training or test images: fox\n" in listed


def test_pictures_are_scaled_and_turned(tmp_path):
    """A red left half and a blue right half, stored lying on its side with the turn noted in EXIF."""
    upright = np.zeros((40, 40, 3), np.uint8)
    upright[:, :20, 0] = upright[:, 20:, 2] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            exif = Image.Exif()
            exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to view
            Image.fromarray(np.rot90(upright).copy()).save(tmp_path / name / f"{number}.jpg", exif=exif, quality=95)
    images = data.load(str(tmp_path), image_size=16).train.images.float()
    assert images.shape == (2, 3, 16, 16)
    assert (images[:, 0, :, :6] > 200).all() and (images[:, 2, :, :6] < 50).all()
    assert (images[:, 2, :, 10:] > 200).all() and (images[:, 0, :, 10:] < 50).all()


def test_unreadable_pictures_are_listed_and_left_out(tmp_path, capsys):
    for seed, name in enumerate(("a", "b")):
        save_pictures(tmp_path / name, 4, seed=seed)
    (tmp_path / "a" / "01.png").write_bytes(b"no picture")
    whole = (tmp_path / "b" / "03.png").read_bytes()
    (tmp_path / "b" / "03.png").write_bytes(whole[: len(whole) // 2])
    loaded = data.load(str(tmp_path), image_size=8)
    assert torch.bincount(loaded.train.labels).tolist() == [2, 2] and len(loaded.test) == 2
    listed = capsys.readouterr().err
    assert "left out, 2 of 8:" in listed and "a/01.png is not a picture" in listed and "b/03.png cannot be" in listed
    for number in (0, 2):
        (tmp_path / "a" / f"{number:02}.png").write_bytes(b"")
    assert data.load(str(tmp_path), image_size=8).class_names == ["b"]
    assert "left out, without training or test images: a\n" in capsys.readouterr().err


def test_a_long_list_of_unreadable_pictures_is_cut(tmp_path, capsys):
    save_pictures(tmp_path / "a", 2)
    for number in range(30):
        (tmp_path / "a" / f"bad{number}.png").write_bytes(b"")
    data.load(str(tmp_path), image_size=8)
    listed = capsys.readouterr().err
    assert "left out, 30 of 32:" in listed and "and 10 more" in listed and len(listed.splitlines()) == 22


def test_a_folder_without_class_folders_is_refused(tmp_path):
    save_pictures(tmp_path / "flat", 3)
    with pytest.raises(ValueError, match="flat has no folders with pictures, one for each class"):
        data.load(str(tmp_path / "flat"))


@pytest.mark.parametrize(
    ("folders", "read", "left_out"),
    [
        (("train", "valid"), "train images from train/, test images from valid/", ""),
        (("Train", "VALIDATION"), "train images from Train/, test images from VALIDATION/", ""),
        (("Training", "Testing"), "test images from Testing/, train images from Training/", ""),
        (("TRAIN", "Test", "Val"), "test images from Test/, train images from TRAIN/", "; left out Val/"),
        (("train", "test", "more"), "test images from test/, train images from train/", "; left out more/"),
    ],
)
def test_usual_names_of_the_parts(tmp_path, capsys, folders, read, left_out):
    for seed, part in enumerate(folders):
        for name in ("a", "b"):
            save_pictures(tmp_path / part / name, 3 + seed, seed=seed)
    loaded = data.load(str(tmp_path), image_size=8)
    assert loaded.class_names == ["a", "b"] and loaded.own_split is None
    assert (len(loaded.train), len(loaded.test)) == (6, 8)
    said = capsys.readouterr().out
    assert sorted(said.split(": ")[1].split("; ")[0].strip().split(", ")) == sorted(read.split(", "))
    assert said.endswith(left_out + "\n") and ("left out" in said) == bool(left_out)


def test_training_pictures_alone(tmp_path, capsys):
    """With nothing beside train/, or with test pictures of no class, the last sixth of each class is for testing."""
    for seed, name in enumerate(("a", "b")):
        save_pictures(tmp_path / "photos" / "train" / name, 12, seed=seed)
    for expected in (f"holds one folder; reading {tmp_path / 'photos' / 'train'}", "from train/; left out test/"):
        loaded = data.load(str(tmp_path / "photos"), image_size=8)
        assert (loaded.name, loaded.class_names) == ("photos", ["a", "b"])
        assert torch.bincount(loaded.train.labels).tolist() == [10, 10] and len(loaded.test) == 4
        assert expected in capsys.readouterr().out
        save_pictures(tmp_path / "photos" / "test", 5)


def test_a_data_set_one_level_down(tmp_path, capsys):
    """It is read if it is the only folder there, whatever its name; otherwise folders are levels of classes' names."""
    for seed, name in enumerate(("cat", "dog")):
        save_pictures(tmp_path / "photos" / "photos" / name, 6, seed=seed)
    for folder in (".git", "__MACOSX/photos"):
        save_pictures(tmp_path / "photos" / folder, 1)
    loaded = data.load(str(tmp_path / "photos"), image_size=8)
    assert loaded.class_names == ["cat", "dog"] and len(loaded.train) == 8
    assert f"{tmp_path}/photos holds one folder; reading {tmp_path}/photos/photos\n" in capsys.readouterr().out
    save_pictures(tmp_path / "photos" / "more" / "fox", 6)
    save_pictures(tmp_path / "photos" / "more" / "cow", 6)
    names = ["more/cow", "more/fox", "photos/cat", "photos/dog"]
    assert data.load(str(tmp_path / "photos"), image_size=8).class_names == names


def zipped(folder: Path) -> Path:
    """A zip file, beside it, of a folder and what is in it, with entries for folders as archivers write them."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), key=lambda file: file.name):  # in another order than that of folders
            archive.write(file, file.relative_to(folder.parent))
    return path


@pytest.mark.parametrize("parts", [(), ("train", "test")])
def test_nested_class_folders_zipped_or_not(tmp_path, capsys, parts):
    """A folder without pictures of its own, but with two or more folders with pictures, is a level of the name."""
    for part in parts or ("",):
        root = tmp_path / "set" / part
        for seed, name in enumerate(("Greek/a", "Greek/b", "Han/new/c", "Han/old/c", "Han/old/d", "cat", "dog/1/2")):
            save_pictures(root / name, 6, seed=seed)
        save_pictures(root / "dog" / "1" / "3", 2)  # dog has but one folder
        save_pictures(root / "cat" / "more", 2)  # cat has pictures of its own
        (root / "Greek" / "notes.txt").write_text("no picture")
        save_pictures(root / "Greek" / ".hidden", 1)
        save_pictures(root / "__MACOSX" / "Greek", 1)
    names = ["Greek/a", "Greek/b", "Han/new/c", "Han/old/c", "Han/old/d", "cat", "dog/2", "dog/3"]
    names = [name.replace("new/c", "new") for name in names]
    loaded = [data.load(str(path), image_size=8) for path in (tmp_path / "set", zipped(tmp_path / "set"))]
    for each in loaded:
        assert each.name == "set" and each.class_names == names
        counts = torch.bincount(each.train.labels) if parts else torch.bincount((each.train + each.test).labels)
        assert counts.tolist() == [6, 6, 6, 6, 6, 8, 6, 2]
    for part in ("train", "test"):
        a, b = (getattr(each, part) for each in loaded)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert "left out 1 other files, __MACOSX/\n" in capsys.readouterr().err


def test_parts_agree_on_what_is_a_class(tmp_path):
    """cat/2026 in train/ is of class cat if test/ has pictures in cat/ itself; so it was before there were levels."""
    for place in ("train/cat/2025", "train/cat/2026", "train/dog", "test/cat", "test/dog/a", "test/dog/b"):
        save_pictures(tmp_path / place, 2)
    loaded = data.load(str(tmp_path), image_size=8)
    assert loaded.class_names == ["cat", "dog"] and loaded.own_split is None
    assert torch.bincount(loaded.train.labels).tolist() == [4, 2] and len(loaded.test) == 6


def test_bilevel_drawings_are_scaled_with_antialiasing(tmp_path):
    """1-bit PNG, black on white, as Omniglot's, from a zip file: a thin line becomes grey, not lost."""
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(6):
            drawing = Image.new("1", (105, 105), 1)
            drawing.paste(0, (50, 0, 52, 105))
            drawing.save(tmp_path / "set" / name / f"{number}.png")
    images = data.load(str(zipped(tmp_path / "set")), image_size=32).train.images
    assert images.shape == (8, 3, 32, 32) and (images[:, :, :, 0] == 255).all()
    assert abs(int((255 - images[0, 0].int()).sum()) - 32 * 255 * 2 * 32 / 105) < 0.1 * 32 * 255


def test_hostile_and_damaged_zip_files_are_refused(tmp_path, monkeypatch):
    """As a whole, in one line that names the file."""
    save_pictures(tmp_path / "set" / "a", 6, side=32)
    save_pictures(tmp_path / "set" / "b", 6, side=32, seed=1)
    whole, bad = zipped(tmp_path / "set"), tmp_path / "bad.zip"
    picture = (tmp_path / "set" / "a" / "00.png").read_bytes()

    def refuse(message):
        with pytest.raises((ValueError, OSError), match=message) as error:
            data.load(str(bad), image_size=8)
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


def test_a_changed_byte_of_a_zip_file_is_refused_or_harmless(tmp_path):
    """Anywhere in the file, as of an .npz file."""
    for seed, name in enumerate("ab"):
        save_pictures(tmp_path / "set" / name, 3, seed=seed)
    whole = zipped(tmp_path / "set").read_bytes()
    random, refused = np.random.default_rng(0), 0
    for place in random.integers(0, len(whole), 200).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= int(random.integers(1, 256))
        (tmp_path / "damaged.zip").write_bytes(damaged)
        try:
            data.load(str(tmp_path / "damaged.zip"), image_size=8)
        except (ValueError, OSError) as error:
            assert "damaged.zip" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100


def omniglot_archives(folder: Path) -> dict[str, str]:
    """Small archives in Omniglot's layout, and their checksums."""
    sums = {}
    for seed, (name, alphabets) in enumerate((("images_background", "BA"), ("images_evaluation", "DC"))):
        for alphabet in alphabets:
            for character in ("character01", "character02"):
                save_pictures(folder / name / alphabet / character, 20, seed=ord(alphabet) + seed)
        sums[name] = hashlib.md5(zipped(folder / name).read_bytes()).hexdigest()
    return sums


def test_omniglot_is_downloaded_once_and_checked(tmp_path, monkeypatch, capsys):
    (tmp_path / "www").mkdir()
    sums = omniglot_archives(tmp_path / "www")
    server = Server(tmp_path / "www" / "images_background.zip")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Omniglot, "download_url_prefix", server.url.rpartition("/")[0])
    monkeypatch.setattr(Omniglot, "zips_md5", sums | {"images_evaluation": "0" * 32})
    with pytest.raises(
        ValueError, match=r"cannot download Omniglot: images_evaluation\.zip .*is incomplete or damaged"
    ):
        data.load("omniglot", tmp_path / "root", 8)
    monkeypatch.setattr(Omniglot, "zips_md5", sums)
    loaded = data.load("omniglot", tmp_path / "root", 8)
    names = [f"{alphabet}/character0{n}" for alphabet in "ABCD" for n in (1, 2)]
    assert loaded.name == "omniglot" and loaded.class_names == names
    assert loaded.own_split == ([0, 1, 2, 3], [], [4, 5, 6, 7])  # background, evaluation
    assert torch.bincount(loaded.train.labels).tolist() == [17] * 4  # the last sixth of background is for testing
    assert torch.bincount(loaded.test.labels).tolist() == [3] * 4 + [20] * 4
    expected = torch.from_numpy(
        pictures.read(tmp_path / "www" / "images_evaluation" / "C" / "character02" / "00.png", 8)
    )
    assert torch.equal(loaded.test.images[loaded.test.labels == 5][0], expected)
    server.requested.clear()
    again = data.load("omniglot", tmp_path / "root", 8)
    assert not server.requested and torch.equal(again.test.images, loaded.test.images)
    (tmp_path / "root" / "omniglot-py" / "images_background.zip").write_bytes(b"PK damaged")
    assert torch.equal(data.load("omniglot", tmp_path / "root", 8).train.images, loaded.train.images)
    assert {*server.requested} == {"/images_background.zip"}
    server.server.shutdown()
    server.server.server_close()


@pytest.mark.parametrize("val", ["none", "others", "same"])
def test_the_layout_of_few_shot_data_sets(tmp_path, capsys, val):
    """Seen, validation and unseen classes, in the order of their names."""
    classes = {"train": "bdf", "test": "ac", "val": {"none": "", "others": "eg", "same": "bdf"}[val]}
    for part, names in classes.items():
        for seed, name in enumerate(names):
            save_pictures(tmp_path / part / name, 12, seed=seed)
    loaded = data.load(str(tmp_path), image_size=8)
    own, out = loaded.own_split, capsys.readouterr().out
    assert [[loaded.class_names[label] for label in part] for part in own] == [
        ["b", "d", "f"],
        ["e", "g"] if val == "others" else [],
        ["a", "c"],
    ]
    counts = f"3 seen, {len(own[1])} for validation, 2 unseen"
    assert f"{tmp_path.name}: train and test have different classes: {counts}\n" in out
    expected = [(12, 12) if val == "same" else (10, 2), (12, 0), (0, 12)]  # training and test images of a class
    for labels, counts in zip(own, expected, strict=True):
        for label in labels:
            assert tuple(int((part.labels == label).sum()) for part in (loaded.train, loaded.test)) == counts


@pytest.mark.parametrize("names", [("ab", "AC"), ("ab", "c"), ("a", "bc")])
def test_parts_that_only_seem_to_have_different_classes(tmp_path, names):
    for part, classes in zip(("train", "test"), names, strict=True):
        for name in classes:
            save_pictures(tmp_path / part / name, 4)
    with pytest.raises(ValueError, match="no class has both training and test images; give both the same class names"):
        data.load(str(tmp_path), image_size=8)


def test_what_is_left_out_of_a_folder_is_listed_in_one_line(tmp_path, capsys):
    for seed, name in enumerate(("a", "b")):
        save_pictures(tmp_path / name, 3, seed=seed)
        (tmp_path / name / "labels.json").write_text("{}")
        (tmp_path / name / ".DS_Store").write_text("hidden")
    for folder in (".cache", "__MACOSX/a", "empty", "notes"):
        (tmp_path / folder).mkdir(parents=True)
    save_pictures(tmp_path / "__MACOSX" / "a", 1)
    (tmp_path / "notes" / "read.TXT").write_text("no picture")
    save_pictures(tmp_path, 1)
    assert data.load(str(tmp_path), image_size=8).class_names == ["a", "b"]
    listed = "left out 4 other files, .cache/, __MACOSX/, empty/, notes/"
    assert capsys.readouterr().err == f"{tmp_path}: {listed}\n"


def test_two_spellings_of_a_name_are_one_class(tmp_path):
    """Composed and decomposed Unicode, as Linux and macOS write it."""
    for seed, (part, name) in enumerate(
        [("train", "caf\u00e9"), ("train", "cafe\u0301"), ("train", "b"), ("test", "cafe\u0301"), ("test", "b")]
    ):
        save_pictures(tmp_path / part / name, 2, seed=seed)
    loaded = data.load(str(tmp_path), image_size=8)
    assert loaded.class_names == ["b", "caf\u00e9"]
    assert torch.bincount(loaded.train.labels).tolist() == [2, 4] and len(loaded.test) == 4
    np.savez(tmp_path / "a.npz", **tiny.arrays(classes=2) | {"class_names": np.array(["b", "cafe\u0301"])})
    assert data.load(str(tmp_path / "a.npz")).class_names == loaded.class_names


def test_pictures_are_known_by_their_content(tmp_path, capsys):
    save_pictures(tmp_path / "a", 2)
    picture = Image.open(tmp_path / "a" / "00.png")
    names = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.JPG": "PNG", "d": "GIF", "e.jp2": "JPEG2000", "f.png": "WEBP"}
    names |= {"g.avif": "AVIF"} if features.check("avif") else {}
    for name, form in names.items():
        picture.save(tmp_path / "a" / name, format=form)
    assert len(data.load(str(tmp_path), image_size=8).train) == 2 + len(names) - 2
    assert capsys.readouterr().err == ""


def test_heic_pictures_that_pillow_cannot_read(tmp_path, capsys, monkeypatch):
    """One message, what it says helps, and what is skipped beside others is counted."""
    monkeypatch.setattr(pictures, "FORMATS", ("JPEG", "PNG"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(15):
            (tmp_path / name / f"{number:02}.HEIC").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic")
    with pytest.raises(
        ValueError, match=r"none of 30 files can be read: .*a/00\.HEIC .*for HEIC: pip install pillow-h"
    ):
        data.load(str(tmp_path), image_size=8)
    assert capsys.readouterr().err == ""
    save_pictures(tmp_path / "a", 3)
    save_pictures(tmp_path / "b", 3)
    assert len(data.load(str(tmp_path), image_size=8).train) == 4
    listed = capsys.readouterr().err
    assert "left out, 30 of 36:" in listed and "a/14.HEIC" in listed and "and 10 more" in listed
