"""data.py: sources and their refusals, splits, held-back images, P x K batches, augmentation."""

import hashlib
import io
import itertools
import pickle
import socketserver
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

import data
import tiny

# -------------------------------------------------------------------------------------------------------------- sources


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
        ({"class_names": None}, "lacks class_names"),
        ({"class_names": np.array([{}], dtype=object)}, "pickle"),
    ],
)
def test_npz_is_refused(tmp_path, change, message):
    arrays = {key: value for key, value in (tiny.arrays() | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "bad.npz"))


def test_unreadable_sources_are_refused(tmp_path):
    whole = tiny.write_npz(tmp_path / "whole.npz").read_bytes()
    for name, content in (("truncated.npz", whole[: len(whole) // 2]), ("text.npz", b"no archive"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a data set"):
            data.load(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load(str(tmp_path / "missing.npz"))
    with pytest.raises(ValueError, match="unknown data 'mnist'"):
        data.load("mnist")


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


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A small CIFAR-100 served from loopback in place of the real one; yields the list of requested paths."""
    (tmp_path / "www").mkdir()
    archive = cifar_archive(tmp_path / "www")
    with tarfile.open(archive) as members:
        names = ("train", "test", "meta")
        sums = {name: hashlib.md5(members.extractfile(f"cifar-100-python/{name}").read()) for name in names}
    requested = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "www")

        def log_message(self, *args):
            requested.append(self.path)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_address[1]}/{archive.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"].hexdigest()]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"].hexdigest()]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"].hexdigest()})
    yield requested
    server.shutdown()
    server.server_close()


def test_cifar100_is_downloaded_once(tmp_path, cifar_server):
    first = data.load("cifar100", tmp_path / "root")
    assert cifar_server and first.name == "cifar100" and len(first.train) == 200 and len(first.test) == 100
    assert first.class_names[7] == "name 7"
    cifar_server.clear()
    again = data.load("cifar100", tmp_path / "root")
    assert not cifar_server and torch.equal(first.train.images, again.train.images)


def test_cifar100_with_a_wrong_checksum_is_refused(tmp_path, cifar_server, monkeypatch):
    monkeypatch.setattr(CIFAR100, "tgz_md5", "0" * 32)
    with pytest.raises(ValueError, match="could not be had"):
        data.load("cifar100", tmp_path / "root")


def test_cifar100_offline_names_the_alternatives(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    with pytest.raises(ValueError, match=r"(?s)could not be had.*--data FILE\.npz.*--data glyphs"):
        data.load("cifar100", tmp_path / "root")


# --------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("classes", "split", "unseen"),
    [(100, "90-10", 10), (100, "50-50", 50), (100, "10-90", 90), (100, "100-0", 0), (7, "90-10", 2), (37, "80-20", 7)],
)
def test_split_sizes(classes, split, unseen):
    seen, last = data.split_classes(classes, split)
    assert last == list(range(classes - unseen, classes)) and seen == list(range(classes - unseen))
    assert (seen, last) != data.split_classes(classes, split, split_seed=1) or unseen == 0
    drawn_seen, drawn = data.split_classes(classes, split, split_seed=1)
    assert len(drawn) == unseen and sorted(drawn_seen + drawn) == list(range(classes))
    assert data.split_classes(classes, split, 1) == data.split_classes(classes, split, 1)


@pytest.mark.parametrize("split", ["90", "90/10", "0-100", "a-b", "10-1000000"])
def test_wrong_splits_are_refused(split):
    with pytest.raises(ValueError, match="split"):
        data.split_classes(100, split)


def test_held_back_are_the_last_images_of_each_class():
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0])  # seven 0s, four 1s
    images = torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1).expand(11, 3, 2, 2)
    kept, held = data.hold_back(data.Images(images, labels), per_class=25)
    assert held.images[:, 0, 0, 0].tolist() == [9, 10]  # a quarter of each class at most
    assert kept.images[:, 0, 0, 0].tolist() == list(range(9))
    kept, held = data.hold_back(data.Images(images.repeat(8, 1, 1, 1), labels.repeat(8)), per_class=5)
    assert torch.bincount(held.labels).tolist() == [5, 5] and len(kept) == 78


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_have_p_classes_of_k_different_images():
    labels = torch.tensor([5, 3, 9]).repeat_interleave(torch.tensor([6, 4, 2]))
    shuffled = labels[torch.randperm(12)]
    sampler = data.Sampler(shuffled, torch.Generator().manual_seed(0))
    for _ in range(20):
        assert len(sampler.batch(sampler.task(2), 2).unique()) == 4
    index = sampler.batch(sampler.task(3), 4)
    by_class = shuffled[index].view(3, 4)
    assert (by_class == by_class[:, :1]).all() and sorted(by_class[:, 0].tolist()) == [3, 5, 9]
    for row, images in zip(by_class[:, 0].tolist(), index.view(3, 4), strict=True):
        assert len(images.unique()) == {5: 4, 3: 4, 9: 2}[row]  # a class of 2 shows each image twice


def test_every_image_is_drawn_equally_often():
    sampler = data.Sampler(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.Generator().manual_seed(0))
    drawn = torch.cat([sampler.batch(sampler.task(1), 2) for _ in range(4000)])
    assert (torch.bincount(drawn, minlength=8) - 1000).abs().max() < 150  # 5 standard deviations


def test_augmentation_is_a_shifted_reflected_flipped_copy():
    side, reach = 16, 2
    images = torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    index = torch.tensor([4, 0, 2, 2, 1, 3] * 10)
    out = data.augment(images, index, torch.Generator().manual_seed(0))
    assert out.shape == (60, 3, side, side) and out.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(images.float(), (reach,) * 4, mode="reflect").to(torch.uint8)
    seen = set()
    for row, image in zip(index.tolist(), out, strict=True):
        matches = [
            (dy, dx, flip)
            for dy, dx in itertools.product(range(2 * reach + 1), repeat=2)
            for flip, crop in enumerate([padded[row, :, dy : dy + side, dx : dx + side]] * 2)
            if torch.equal(image, crop.flip(2) if flip else crop)
        ]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 20  # of 50 ways


def test_channel_statistics():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    mean, std = data.channel_statistics(images)
    exact = images.double() / 255
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), exact.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), exact.std((0, 2, 3), correction=0))
