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
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100, ImageFolder

import data
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((160, 3, 16, 16), np.uint8)}, r"train_images must be \(N, H, W, 3\) uint8"),
        ({"train_images": np.zeros((160, 16, 16, 3), np.float32)}, "float32"),
        ({"train_labels": np.zeros(3, np.uint8)}, "train_labels must be"),
        ({"train_labels": np.full(160, 8)}, r"must lie in 0\.\.7"),
        ({"test_labels": np.full(48, -1)}, r"must lie in 0\.\.7"),
        ({"test_labels": np.zeros(48, np.uint8)}, "class 'class 1' has no test image"),
        ({"test_images": np.zeros((48, 8, 8, 3), np.uint8)}, "differ in size"),
        ({"train_labels": np.full(160, 2**63, np.uint64)}, r"must lie in 0\.\.7"),
        ({"train_labels": np.zeros(160)}, "train_labels must be"),
        ({"train_images": np.zeros((0, 16, 16, 3), np.uint8), "train_labels": np.zeros(0, int)}, "has no train image"),
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
def test_a_folder_with_parts(tmp_path, part):
    for seed, name in enumerate(("cat", "dog")):
        save_pictures(tmp_path / "train" / name, 4, seed=seed)
        save_pictures(tmp_path / "train" / name / "more", 2, seed=10 + seed)
        save_pictures(tmp_path / part / name, 1, seed=20 + seed)
    loaded = data.load(str(tmp_path), image_size=8)
    for read, folder in ((loaded.train, "train"), (loaded.test, part)):
        names, images, labels = as_image_folder(tmp_path / folder)
        assert loaded.class_names == names and torch.equal(read.images, images) and torch.equal(read.labels, labels)
    save_pictures(tmp_path / part / "fox", 1)
    with pytest.raises(ValueError, match=rf"not both in train/ and {part}/: fox"):
        data.load(str(tmp_path), image_size=8)


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
    with pytest.raises(ValueError, match="a holds 1 pictures that can be read; a class needs at least 2"):
        data.load(str(tmp_path), image_size=8)


def test_a_long_list_of_unreadable_pictures_is_cut(tmp_path, capsys):
    save_pictures(tmp_path / "a", 2)
    for number in range(30):
        (tmp_path / "a" / f"bad{number}.png").write_bytes(b"")
    data.load(str(tmp_path), image_size=8)
    listed = capsys.readouterr().err
    assert "left out, 30 of 32:" in listed and "and 10 more" in listed and len(listed.splitlines()) == 22


def test_a_folder_without_class_folders_is_refused(tmp_path):
    save_pictures(tmp_path / "flat", 3)
    with pytest.raises(ValueError, match="has no folders; each class needs a folder of its own"):
        data.load(str(tmp_path / "flat"))
