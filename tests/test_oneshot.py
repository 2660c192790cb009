"""oneshot.py: recognisers, comparisons, galleries and what they say of strangers, as a program would use them."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import checkpoints
import export
import metrics
import model
import oneshot
import predict
import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """best.pt of a moment's training on 9 classes, and pictures of 3 others in support/ and queries/."""
    return tiny.pictures(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def recogniser(folder):
    return oneshot.load(folder / "best.pt")


def test_all_kinds_of_pictures_are_embedded_alike(folder, recogniser):
    paths = sorted(folder.glob("support/*/*.png"))[:3]
    z = recogniser.embed(paths)
    net, _ = checkpoints.load(folder / "best.pt")
    arrays = [np.asarray(Image.open(path)) for path in paths]
    expected = torch.nn.functional.normalize(model.embed(net, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)))
    assert z.shape == (3, 2 * net.dimension) and np.allclose(z, expected, atol=1e-6)
    tensors = [torch.tensor(array).permute(2, 0, 1) for array in arrays]
    for some in (
        [str(path) for path in paths],
        [path.read_bytes() for path in paths],
        map(Image.open, paths),
        arrays,
        np.stack(arrays),
        tensors,
    ):
        assert np.allclose(recogniser.embed(some), z, atol=1e-6)
    for one in (paths[0], paths[0].read_bytes()):
        assert np.allclose(recogniser.embed(one), z[:1], atol=1e-6)
    grey = arrays[0][..., 0]
    assert np.allclose(recogniser.embed(grey), recogniser.embed(np.stack([grey] * 3, 2)), atol=1e-6)
    for wrong in (arrays[0].astype(float), arrays[0][..., :2], "missing.png"):
        with pytest.raises(ValueError, match="pictures are paths, PIL images, arrays|no such picture"):
            recogniser.embed([arrays[0], wrong])


def test_compare(folder, recogniser):
    first, second, *_ = sorted(folder.glob("support/class 9/*.png"))
    other = next(folder.glob("support/class 11/*.png"))
    same, different = recogniser.compare(first, second), recogniser.compare(first, other)
    assert same.same and not different.same and same.probability > 0.5 > different.probability
    z = recogniser.embed([first, second])
    assert same.similarity == pytest.approx(float(z[0] @ z[1]), abs=1e-6)


def test_a_gallery_lasts(folder, recogniser, tmp_path):
    path = tmp_path / "a.gallery"
    with oneshot.Gallery(path, recogniser) as gallery:
        for place in sorted((folder / "support").iterdir()):
            pictures = sorted(place.iterdir())
            assert gallery.enrol(place.name, pictures) == len(pictures)
            assert gallery.enrol(place.name, pictures[:2]) == 0  # known already
    queries = sorted(folder.glob("queries/*/*.png"))
    with oneshot.Gallery(path, recogniser) as gallery:
        assert gallery.names() == {"class 10": 4, "class 11": 4, "class 9": 4} and len(gallery) == 12
        answers = gallery.recognise(queries, top=2, threshold=-1.0)
        assert np.mean([answer.name == query.parent.name for answer, query in zip(answers, queries, strict=True)]) > 0.8
        means = {
            place.name: recogniser.embed(sorted(place.iterdir())).mean(0) for place in (folder / "support").iterdir()
        }
        for answer, z in zip(answers, recogniser.embed(queries), strict=True):
            expected = sorted(((float(z @ m / np.linalg.norm(m)), name) for name, m in means.items()), reverse=True)
            assert [candidate.name for candidate in answer.candidates] == [name for _, name in expected[:2]]
            assert answer.candidates[1].similarity == pytest.approx(expected[1][0], abs=1e-5)
        assert {answer.name for answer in gallery.recognise(queries, threshold=1.0)} == {None}
        assert gallery.remove("class 9") == 4 and "class 9" not in gallery.names()
        with pytest.raises(ValueError, match="no class 'class 9' is enrolled"):
            gallery.remove("class 9")
    with oneshot.Gallery(path, recogniser) as gallery:
        assert gallery.names() == {"class 10": 4, "class 11": 4}


@pytest.mark.parametrize("columns", [1, 3, 255, 256, 257, 3000])
def test_highest(columns):
    rows = np.random.default_rng(0).integers(0, 2000, (40, columns)).astype(np.float32)
    for top in (1, 3, 20):
        found = oneshot.highest(rows, top)
        assert found.shape == (40, min(top, columns)) and all(
            len(set(places)) == len(places) for places in found.tolist()
        )
        assert np.array_equal(np.take_along_axis(rows, found, 1), -np.sort(-rows, 1)[:, :top])


def test_a_folder_is_synchronised(folder, recogniser, tmp_path, monkeypatch):
    shutil.copytree(folder / "support", tmp_path / "classes")
    embedded = []
    counting = oneshot.Recogniser(
        lambda pixels: embedded.append(len(pixels)) or recogniser.network(pixels),
        **{name: getattr(recogniser, name) for name in ("size", "threshold", "trained", "fingerprint")},
    )
    with oneshot.Gallery(tmp_path / "a.gallery", counting) as gallery:
        other = next(folder.glob("queries/class 9/*.png"))
        gallery.enrol("class 9", other)
        changes = gallery.synchronise(tmp_path / "classes")
        assert (changes.added, changes.removed, changes.kept) == (12, 0, 0)
        embedded.clear()
        changes = gallery.synchronise(tmp_path / "classes")
        assert (changes.added, changes.removed, changes.kept) == (0, 0, 12) and not embedded
        gone, changed = sorted((tmp_path / "classes" / "class 10").iterdir())[:2]
        gone.unlink()
        shutil.copy(other, changed)
        (tmp_path / "classes" / "class 11").rename(tmp_path / "classes" / "new name")
        (tmp_path / "classes" / "class 9" / "broken.png").write_bytes(b"nothing")
        changes = gallery.synchronise(tmp_path / "classes")
        assert (changes.added, changes.removed, changes.kept) == (5, 6, 6)
        assert len(changes.errors) == 1 and "broken.png" in changes.errors[0]
        assert gallery.names() == {"class 10": 3, "class 9": 5, "new name": 4} and sum(embedded) == 5


def test_links_count_where_they_are(folder, recogniser, tmp_path):
    """What they lead to may be in another folder that is enrolled too."""
    shutil.copytree(folder / "support" / "class 9", tmp_path / "all" / "cat")
    first, *others = sorted((tmp_path / "all" / "cat").iterdir())
    (tmp_path / "some" / "pets").mkdir(parents=True)
    (tmp_path / "some" / "pets" / "tom.png").symlink_to(first)
    (tmp_path / "some" / "cats").symlink_to(tmp_path / "all" / "cat")
    with oneshot.Gallery(tmp_path / "a.gallery", recogniser) as gallery:
        gallery.synchronise(tmp_path / "some")
        assert gallery.names() == {"cats": 4, "pets": 1}
        for place in ("all", "some", "all"):
            gallery.synchronise(tmp_path / place)
            assert gallery.names() == {"cat": 4, "cats": 4, "pets": 1}
        others[0].unlink()
        (tmp_path / "some" / "pets" / "tom.png").unlink()
        changes = gallery.synchronise(tmp_path / "some")
        assert changes.removed == 2 and gallery.names() == {"cat": 4, "cats": 3}


def test_a_picture_that_another_process_enrols_meanwhile_stays(folder, recogniser, tmp_path, monkeypatch):
    """It may get the number of one that was to be removed."""
    for name in ("x", "y"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        shutil.copy(next(folder.glob("support/class 9/*.png")), tmp_path / "classes" / name)
    path = tmp_path / "a.gallery"
    with oneshot.Gallery(path, recogniser) as gallery, oneshot.Gallery(path, recogniser) as other:
        gallery.synchronise(tmp_path / "classes")
        shutil.rmtree(tmp_path / "classes" / "y")
        original = gallery.new_rows

        def meanwhile(*given):
            other.remove("y")
            other.enrol("z", next(folder.glob("support/class 10/*.png")))
            return original(*given)

        monkeypatch.setattr(gallery, "new_rows", meanwhile)
        assert gallery.synchronise(tmp_path / "classes").removed == 0
        assert gallery.names() == {"x": 1, "z": 1}


def test_a_damaged_gallery_is_told(folder, recogniser, tmp_path):
    """Whichever page of the file is damaged, and whatever is asked."""
    path = tmp_path / "a.gallery"
    with oneshot.Gallery(path, recogniser) as gallery:
        for n, picture in enumerate(sorted(folder.glob("support/*/*.png"))):
            gallery.enrol(f"class {n % 5}", picture)
    whole, told = path.read_bytes(), 0
    picture = next(folder.glob("queries/*/*.png"))
    for page in range(len(whole) // 4096):
        path.write_bytes(whole[: 4096 * page] + b"\xff" * 4096 + whole[4096 * (page + 1) :])
        for ask in (
            lambda gallery: gallery.recognise([picture]),
            lambda gallery: gallery.enrol("new", picture),
            lambda gallery: gallery.remove("class 1"),
            lambda gallery: gallery.names(),
        ):
            try:
                with oneshot.Gallery(path, recogniser) as gallery:
                    ask(gallery)
            except (OSError, ValueError) as error:
                told += str(path) in str(error)
    assert told > 4


def test_a_palette_is_part_of_a_picture(recogniser, tmp_path):
    flags = [Image.new("RGB", (8, 8), colour).quantize(2) for colour in ("red", "blue")]
    assert flags[0].mode == "P" and np.array_equal(*map(np.asarray, flags))
    with oneshot.Gallery(":memory:", recogniser) as gallery:
        assert gallery.enrol("flag", flags) == 2


def test_a_renamed_picture_stays_enrolled(folder, recogniser, tmp_path):
    """Also one of two copies, when the other, which was enrolled, goes."""
    shutil.copytree(folder / "support" / "class 9", tmp_path / "classes" / "cat")
    first, second, *_ = sorted((tmp_path / "classes" / "cat").iterdir())
    shutil.copy(second, tmp_path / "classes" / "cat" / "copy.png")
    with oneshot.Gallery(tmp_path / "a.gallery", recogniser) as gallery:
        gallery.synchronise(tmp_path / "classes")
        assert gallery.names() == {"cat": 4}
        first.rename(first.with_name("renamed.png"))
        second.unlink()
        changes = gallery.synchronise(tmp_path / "classes")
        assert (changes.added, changes.removed) == (2, 2) and gallery.names() == {"cat": 4}
        assert gallery.synchronise(tmp_path / "classes").kept == 4


def test_what_cannot_be_written_is_told(folder, recogniser, tmp_path):
    """Another process holds the lock; the change is tried again later."""
    picture = next(folder.glob("support/*/*.png"))
    with oneshot.Gallery(tmp_path / "a.gallery", recogniser) as gallery:
        gallery.database.execute("PRAGMA busy_timeout = 50")
        other = sqlite3.connect(tmp_path / "a.gallery", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match=r"cannot write to the gallery .*a\.gallery: database is locked"):
            gallery.enrol("a", picture)
        oneshot.Gallery(tmp_path / "a.gallery", recogniser).close()  # reading needs no lock
        other.execute("ROLLBACK")
        assert gallery.enrol("a", picture) == 1 and gallery.recognise([]) == []
        other.close()


@pytest.mark.parametrize(("mode", "folder_mode"), [(0o444, 0o755), (0o666, 0o555)])
def test_a_gallery_that_cannot_be_written_can_be_read(recogniser, mode, folder_mode):
    """The file is read-only, or its folder, where SQLite keeps the journal of a change."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.gallery"
        with oneshot.Gallery(path, recogniser) as gallery:
            gallery.enrol("a", picture)
        path.chmod(mode)
        path.parent.chmod(folder_mode)
        try:
            if os.getuid() == 0:  # root may write everywhere
                os.seteuid(65534)
            with oneshot.Gallery(path, recogniser) as gallery:
                assert gallery.recognise(picture, threshold=0.9)[0].name == "a"
                enrol = (gallery.enrol, "b", 255 - picture)
                for change, *given in (enrol, (gallery.remove, "a")):
                    with pytest.raises(OSError, match=r"cannot write to the gallery .*a\.gallery: .*readonly"):
                        change(*given)
                assert gallery.names() == {"a": 1}
        finally:
            os.seteuid(os.getuid())
            path.parent.chmod(0o755)


def test_a_gallery_belongs_to_one_network(folder, recogniser, tmp_path):
    path = tmp_path / "a.gallery"
    with oneshot.Gallery(path, recogniser) as gallery:
        gallery.enrol("a", next(folder.glob("support/*/*.png")))
    before = path.read_bytes()
    saved = checkpoints.read(folder / "best.pt")
    saved["model"]["conv1.weight"] = saved["model"]["conv1.weight"] * 1.01
    torch.save(saved, tmp_path / "other.pt")
    other = oneshot.load(tmp_path / "other.pt")
    assert other.fingerprint != recogniser.fingerprint == oneshot.load(folder / "best.pt").fingerprint
    with pytest.raises(ValueError, match="was made with another network; enrol its pictures again"):
        oneshot.Gallery(path, other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", ["text", "another database"])
def test_other_files_are_not_taken_for_galleries(recogniser, tmp_path, how):
    if how == "text":
        (tmp_path / "a.gallery").write_text("no database, but some text that is long enough " * 9)
    else:
        sqlite3.connect(tmp_path / "a.gallery").execute("CREATE TABLE other (a)")
    before = (tmp_path / "a.gallery").read_bytes()
    with pytest.raises(ValueError, match="is not a gallery"):
        oneshot.Gallery(tmp_path / "a.gallery", recogniser)
    assert (tmp_path / "a.gallery").read_bytes() == before


def test_what_a_hostile_gallery_holds_is_not_trusted(folder, recogniser, tmp_path):
    """A trigger would run at the next change; embeddings cut short or not finite would be compared with."""
    pictures = sorted(folder.glob("support/*/*.png"))
    for statement, message in (
        ("CREATE TRIGGER t AFTER INSERT ON pictures BEGIN DELETE FROM classes; END", "is not a gallery"),
        ("UPDATE pictures SET embedding = x'00'", "is damaged"),
        (f"UPDATE pictures SET embedding = x'{np.full(64, np.nan, '<f4').tobytes().hex()}'", "is damaged"),
    ):
        path = tmp_path / "a.gallery"
        path.unlink(missing_ok=True)
        with oneshot.Gallery(path, recogniser) as gallery:
            gallery.enrol("a", pictures[:2])
        with sqlite3.connect(path) as database:
            database.execute(statement)
        database.close()
        with pytest.raises(ValueError, match=message):
            oneshot.Gallery(path, recogniser).recognise(pictures[0])


def test_a_folder_that_is_not_there(recogniser, tmp_path):
    with pytest.raises(OSError, match="cannot open the gallery"):
        oneshot.Gallery(tmp_path / "missing" / "a.gallery", recogniser)
    with pytest.raises(ValueError, match="needs the path of a file"):
        oneshot.Gallery("", recogniser)  # as of a variable that is not set


@pytest.mark.parametrize("name", ["", " ", "unknown", 3])
def test_names_that_no_class_can_have(folder, recogniser, name):
    with oneshot.Gallery(":memory:", recogniser) as gallery:
        with pytest.raises(ValueError, match="a class cannot be called"):
            gallery.enrol(name, next(folder.glob("support/*/*.png")))
        with pytest.raises(ValueError, match="is empty"):
            gallery.recognise(next(folder.glob("support/*/*.png")))


def test_a_change_is_whole_or_not_at_all(folder, recogniser, tmp_path, monkeypatch):
    pictures = sorted(folder.glob("support/*/*.png"))
    with oneshot.Gallery(tmp_path / "a.gallery", recogniser) as gallery:
        gallery.enrol("a", pictures[:2])
        with pytest.raises(ValueError, match="no such picture"):
            gallery.enrol("b", [pictures[3], "missing.png"])
        monkeypatch.setattr(gallery, "delete", lambda numbers: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gallery.synchronise(folder / "support")
        assert gallery.names() == {"a": 2}


def enrol_in_another_process(folder, path, name):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with oneshot.Gallery(path, oneshot.load(folder / "best.pt")) as gallery:
        for picture in sorted(folder.glob("support/*/*.png")):
            gallery.enrol(name, picture)


@pytest.mark.slow
def test_two_writers(folder, recogniser, tmp_path):
    """Both write picture after picture; a gallery that is open sees what they wrote."""
    path = tmp_path / "a.gallery"
    with oneshot.Gallery(path, recogniser) as gallery:
        gallery.enrol("mine", next(folder.glob("queries/*/*.png")))
        assert len(gallery.recognise(next(folder.glob("queries/*/*.png")))[0].candidates) == 1
        context = multiprocessing.get_context("spawn")
        writers = [context.Process(target=enrol_in_another_process, args=(folder, path, name)) for name in "ab"]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert gallery.names() == {"a": 12, "b": 12, "mine": 1}
        assert len(gallery.recognise(next(folder.glob("queries/*/*.png")))[0].candidates) == 3


# ------------------------------------------------------------------------------------------------------------ strangers


def embeddings(classes, images, spread, seed=0, dimension=32):
    """Embeddings (N, D) of length 1 in clusters, and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(images)
    z = torch.randn(classes, dimension, generator=generator)[labels]
    return torch.nn.functional.normalize(z + spread * torch.randn(len(z), dimension, generator=generator)), labels


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("classes", [1, 4, 20])
def test_the_table_of_strangers_holds_on_other_classes(shots, classes):
    """Thresholds for classes of one kind, tried on galleries of other classes of that kind."""
    stored = metrics.strangers(*embeddings(60, 20, 1.0))
    z, labels = (part.numpy() for part in embeddings(200, shots + 5, 1.0, seed=1))
    means = z.reshape(200, -1, 32)[:, :shots].mean(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    queries = z.reshape(200, -1, 32)[:, shots:].reshape(-1, 32)
    draw, best = np.random.default_rng(0), []
    for _ in range(40):
        chosen = draw.permutation(200)
        strangers = queries[~np.isin(np.repeat(np.arange(200), 5), chosen[:classes])]
        best.append((strangers @ means[chosen[:classes]].T).max(1))
    found = oneshot.Strangers(stored)
    for rate in (0.02, 0.1, 0.5):
        threshold = found.threshold(rate, classes, shots)
        assert found.rate(threshold, classes, shots) == pytest.approx(rate, rel=0.05)
        assert (np.concatenate(best) > threshold).mean() == pytest.approx(rate, rel=0.3)
    assert found.rate(-1, classes, shots) == 1 and found.threshold(1, classes, shots) == -1


def test_arrays_of_other_shapes_are_other_pictures_and_empty_ones_none(recogniser):
    with oneshot.Gallery(":memory:", recogniser) as gallery:
        blank = np.full((20, 30, 3), 7, np.uint8)
        assert [gallery.enrol("blank", each) for each in (blank, blank.reshape(30, 20, 3), blank)] == [1, 1, 0]
        with pytest.raises(ValueError, match="a picture of 30 x 0 pixels shows nothing"):
            gallery.enrol("blank", blank[10:5])
        with pytest.raises(ValueError, match="top must be at least 1"):
            gallery.recognise(blank, top=0)


def test_the_table_of_strangers_is_the_formula():
    """Three classes of one row each: of a row, a share 0, 1/2 or 1 of the others is more similar than a threshold."""
    angles = torch.tensor([0.0, 0.3, 1.4])
    z = torch.stack((angles.cos(), angles.sin()), 1)
    stored = metrics.strangers(z, torch.arange(3))
    shares = {np.cos(0.3): [0.5, 0.5, 0], np.cos(1.1): [0.5, 1, 0.5], np.cos(1.4): [1, 1, 1]}  # up to each similarity
    for classes, row in zip(stored["classes"], stored["similarities"][0], strict=True):
        reached = {value: np.mean([1 - (1 - share) ** classes for share in below]) for value, below in shares.items()}
        for rate, similarity in zip(stored["rates"], row, strict=True):
            expected = max(value for value, most in reached.items() if most > rate)
            assert similarity == pytest.approx(expected, abs=0.01), (classes, rate)


def test_probabilities_are_those_of_the_mixture():
    """Half of the pictures are of one of two classes; odds of 9 for the first, of 1/3 for the second; and of a class
    alone, as of a pair."""
    logistic = [1.0, 0.0]
    found = oneshot.probabilities(np.log([[9.0, 1 / 3], [1e30, 1.0]]), logistic, 2)
    assert found[0] == pytest.approx([4.5 / (1 + 4.5 + 1 / 6), (1 / 6) / (1 + 4.5 + 1 / 6)])
    assert found[1] == pytest.approx([1, 0])
    alone = oneshot.probabilities(np.array([[0.2], [0.9], [-2000.0], [2000.0]]), [10.0, -4.0], 1)[:, 0]
    assert alone == pytest.approx([1 / (1 + np.exp(2.0)), 1 / (1 + np.exp(-5.0)), 0, 1])


def gallery_of(z, names, recogniser):
    """A gallery of given embeddings: its pictures are numbers that stand for rows of `z`."""
    gallery = oneshot.Gallery(":memory:", recogniser)
    numbered = enumerate(zip(names, z, strict=True))
    rows = [(name, "", bytes([k // 256, k % 256]), row.astype("<f4").tobytes(), b"") for k, (name, row) in numbered]
    with gallery.transaction():
        gallery.insert(rows)
    return gallery


def made_recogniser(trained=()):
    stored = {"value": 0.5, "logistic": [10.0, -5.0], "strangers": metrics.strangers(*embeddings(60, 20, 1.0))}
    return oneshot.Recogniser(None, 8, stored, frozenset(trained), "x")


@pytest.mark.parametrize(("spread", "expected"), [(1.0, "as stored"), (0.0, "all alike")])
def test_a_gallery_calibrates_itself(spread, expected):
    """Pictures that are all alike make strangers more similar than the table says; others of its kind do not."""
    z, labels = (part.numpy() for part in embeddings(40, 1, 1.0, seed=2))
    if expected == "all alike":
        z = z * 0.3 + z[:1]
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    names = [f"class {label}" for label in labels]
    gallery = gallery_of(z, names, made_recogniser())
    table, classes, shots = gallery.strangers()
    factor, before = classes / 40, table.threshold(0.1, 40 * oneshot.STRANGERS, shots)
    if expected == "as stored":
        assert 0.4 * oneshot.STRANGERS < factor < 1.2 * oneshot.STRANGERS  # the classes are independent: really 1
    else:
        assert factor > 3 * oneshot.STRANGERS and gallery.threshold(0.1) > before
    same = gallery_of(z, names, made_recogniser(trained=names))
    assert same.strangers()[1] == 40 * oneshot.STRANGERS  # classes it was trained on say nothing of strangers


def test_threads_share_a_gallery():
    """Each answer is that of one state: of the even rows, or of the odd ones as well."""
    z = normalize(torch.randn(400, 16, generator=torch.Generator().manual_seed(0))).numpy()
    gallery = gallery_of(z[::2], [f"class {k}" for k in range(0, 400, 2)], made_recogniser())
    odd = [
        (f"class {k}", "", bytes([k // 256, k % 256, 1]), z[k].astype("<f4").tobytes(), b"") for k in range(1, 400, 2)
    ]
    wrong, done = [], threading.Event()

    def ask(row):
        while not done.is_set():
            try:
                (answer,) = gallery.answer(z[row : row + 1], 1, 0.999)
                (near,) = gallery.nearest(z[row], 1)
                if {answer.name, near[0]} != {f"class {row}"}:
                    wrong.append((row, answer.name, near))
            except Exception as error:
                wrong.append((row, repr(error)))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=ask, args=(row,)) for row in (0, 200, 398)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(15):
            with gallery.transaction():
                gallery.insert(odd)
            with gallery.transaction():
                gallery.delete([number for name in odd for number in gallery.numbers_of(name[0])])
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert not wrong and len(gallery) == 200


def test_what_is_no_file_is_not_read(recogniser, tmp_path):
    """Neither a pipe, which would never end, nor a missing file; large files are hashed in parts."""
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "none.png"):
        assert oneshot.identity(tmp_path / name)[1] == hashlib.sha256().digest()
    with oneshot.Gallery(":memory:", recogniser) as gallery, pytest.raises(ValueError, match="no such picture: .*pipe"):
        gallery.enrol("a", tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(bytes(3_000_000))
    assert oneshot.identity(tmp_path / "large.png")[1] == hashlib.sha256(bytes(3_000_000)).digest()


def test_nothing_is_embedded_to_no_rows(recogniser):
    assert recogniser.embed([]).shape == (0, recogniser.embed(np.zeros((8, 8, 3), np.uint8)).shape[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_damaged_export_is_refused(folder, tmp_path, capfd, kind):
    """One bit changed anywhere in the weights, cut short, or of another kind: one line, and no traceback beside it."""
    path = tmp_path / f"a{export.SUFFIXES[kind]}"
    tiny.run(export, folder / "best.pt", "--format", kind, "--out", path)
    good = path.read_bytes()
    assert oneshot.load(path).fingerprint == oneshot.load(folder / "best.pt").fingerprint
    with pytest.raises(ValueError, match="runs on the CPU, not on cuda"):
        oneshot.load(path, "cuda")
    state = checkpoints.load(folder / "best.pt")[0].state_dict()
    largest = max(state.values(), key=torch.Tensor.numel).contiguous().numpy().tobytes()
    place = good.find(largest[:64])
    assert place > 0
    damaged = bytearray(good)
    damaged[place + 3] ^= 1
    capfd.readouterr()
    for content in (bytes(damaged), good[: len(good) // 2], b"", (folder / "best.pt").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            oneshot.load(path)
    assert "Traceback" not in capfd.readouterr().err


def test_enrolled_pictures_left_out_in_turn():
    z, labels = (part.numpy() for part in embeddings(10, 3, 0.2, seed=3))
    gallery = gallery_of(z, [f"class {label}" for label in labels], made_recogniser())
    assert gallery.recognised(-1.0) == (1.0, 30) and gallery.recognised(1.0) == (0.0, 30)
    own = [z[k] @ (total := z[labels == labels[k]].sum(0) - z[k]) / np.linalg.norm(total) for k in range(30)]
    middle = float(np.median(own))
    assert gallery.recognised(middle)[0] == pytest.approx(0.5)
    single = gallery_of(z[::3], [f"class {label}" for label in labels[::3]], made_recogniser())
    assert single.recognised(0.0) is None


@pytest.mark.slow
def test_the_documented_examples_run(tmp_path, monkeypatch, capsys):
    """Both blocks of docs/recognise.md, in a folder with the pictures they name; the client without our code agrees."""
    text = (ROOT / "docs" / "recognise.md").read_text()
    recognise, client = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "weights").mkdir()
    shutil.copy(ROOT / "weights" / "classic-90-10.pt", tmp_path / "weights")
    shapes = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
    for name, shape in zip(("cat1", "cat2", "dog1", "new1", "new2"), shapes, strict=True):
        Image.fromarray(shape).resize((80, 60)).save(tmp_path / f"{name}.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(recognise, names)
    printed = capsys.readouterr().out
    assert printed.startswith("Comparison(similarity=") and printed.count("Candidate(name='cat'") == 2
    assert names["z"].shape == (2, 256)
    tiny.run(export, "weights/classic-90-10.pt", "--out", "classic-90-10.onnx")
    exec(client, names)
    assert np.allclose(names["embedding"], names["recogniser"].embed("new1.jpg")[0], atol=2e-3)
    with oneshot.Gallery("animals.gallery", oneshot.load("classic-90-10.onnx")) as gallery:
        assert gallery.names() == {"cat": 2, "dog": 1}


# -------------------------------------------------------------------------------------------- predict.py with a gallery


def ask(folder, gallery, *arguments):
    """The answers of predict.py on all queries, as JSON."""
    target = gallery.with_suffix(".json")
    query = ["--query", folder / "queries", *arguments, "--json", target]
    tiny.run(predict, folder / "best.pt", "--gallery", gallery, *query)
    return json.loads(target.read_text())


def test_a_gallery_from_the_shell(folder, tmp_path, capsys):
    """It answers as the folder it was made of does; classes are added, listed and removed."""
    gallery = tmp_path / "a.gallery"
    tiny.run(predict, folder / "best.pt", "--gallery", gallery, "--add", folder / "support")
    assert "12 pictures added, 0 removed, 0 kept; 3 classes" in capsys.readouterr().out
    found = ask(folder, gallery, "--top", 3)
    target = tmp_path / "support.json"
    arguments = ["--support", folder / "support", "--query", folder / "queries", "--top", 3, "--json", target]
    tiny.run(predict, folder / "best.pt", *arguments)
    assert json.loads(target.read_text()) == found and len(found["answers"]) == 12
    for answer in found["answers"]:
        similarities = [answer["similarity"], answer["similarity_2"], answer["similarity_3"]]
        assert similarities == sorted(similarities, reverse=True)
        assert len({answer["nearest"], answer["nearest_2"], answer["nearest_3"]}) == 3
    capsys.readouterr()
    tiny.run(predict, folder / "best.pt", "--gallery", gallery, "--add", folder / "support", "--list")
    printed = capsys.readouterr().out
    assert "0 pictures added, 0 removed, 12 kept" in printed and "class 11         4" in printed
    tiny.run(predict, folder / "best.pt", "--gallery", gallery, "--remove", "class 9", "class 10")
    with oneshot.Gallery(gallery, oneshot.load(folder / "best.pt")) as opened:
        assert opened.strangers()[1] == oneshot.STRANGERS  # one class is left, which says nothing
    assert "class 10 removed, 4 pictures" in capsys.readouterr().out
    assert {answer["nearest"] for answer in ask(folder, gallery)["answers"]} == {"class 11"}


def test_the_share_of_strangers_that_may_get_a_name_is_asked_for(folder, tmp_path, capsys):
    gallery = tmp_path / "a.gallery"
    tiny.run(predict, folder / "best.pt", "--gallery", gallery, "--add", folder / "support")
    strict, loose = (ask(folder, gallery, "--false-accept", share)["threshold"] for share in (0.01, 0.5))
    assert strict > loose
    printed = capsys.readouterr().out
    for text in ("expected to give a name to 1 % of the pictures", "name to 50 %", "of 12 enrolled pictures"):
        assert text in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gallery", "{gallery}"], "or --gallery FILE with --add, --remove, --list or --query"),
        (["--gallery", "{gallery}", "--support", "{folder}/support"], "--support FOLDER or --gallery FILE, not both"),
        (["--add", "{folder}/support"], "--add, --remove and --list are for --gallery FILE"),
        (["--gallery", "{gallery}", "--list", "--compare", "a", "b"], "--compare goes without"),
        (["--gallery", "{gallery}", "--remove", "nobody"], "no class 'nobody' is enrolled"),
        (["--gallery", "{gallery}", "--query", "{folder}/queries", "--json", "{gallery}"], "--json"),
        (["--gallery", "{gallery}", "--list", "--json", "a.json"], "--csv and --json take the answers about pictures"),
        (["--gallery", "{gallery}", "--query", "{folder}/queries", "--false-accept", "1.5"], "--false-accept"),
        (["--gallery", "{gallery}", "--query", "{folder}/queries", "--top", "0"], "--top"),
        (["--gallery", "{folder}/best.pt", "--list"], "is not a gallery"),
        (["--gallery", "{gallery}", "--add", "{unknown}"], "a class cannot be called 'unknown'"),
    ],
)
def test_bad_input_leaves_the_gallery_as_it_is(folder, recogniser, tmp_path, refusal, arguments, message):
    path = tmp_path / "a.gallery"
    with oneshot.Gallery(path, recogniser) as gallery:
        gallery.enrol("a", sorted(folder.glob("support/*/*.png"))[:2])
    shutil.copytree(folder / "support" / "class 9", tmp_path / "classes" / "unknown")
    before, checkpoint = path.read_bytes(), (folder / "best.pt").read_bytes()
    names = {"gallery": path, "folder": folder, "unknown": tmp_path / "classes"}
    assert message in refusal(predict, folder / "best.pt", *(argument.format(**names) for argument in arguments))
    assert path.read_bytes() == before and (folder / "best.pt").read_bytes() == checkpoint


def test_two_pictures_are_the_same_above_the_threshold_of_the_network():
    """The stored value decides, not a usual one."""
    rows = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
    for value, same in ((0.59, True), (0.61, False), (-0.2, True), (0.9, False)):
        facts = {"value": value, "logistic": [1.0, 0.0]}
        recogniser = oneshot.Recogniser(lambda pixels: rows[: len(pixels)], 8, facts, frozenset(), "x")
        assert recogniser.compare(*np.zeros((2, 8, 8, 3), np.uint8)).same == same, value


def test_the_factor_of_strangers_is_the_formula():
    """Ten classes of one picture, three of which are above the similarity that three should exceed."""
    table = oneshot.Strangers(
        {"shots": [1], "classes": [1, 1000], "rates": [0.1, 0.9], "similarities": [[[0.8, 0.0]] * 2]}
    )
    threshold = table.threshold(0.3, 1, 1)
    for above in (0, 3, 10):
        similarities = np.where(np.arange(10) < above, threshold + 0.01, threshold - 0.01)
        expected = oneshot.STRANGERS * (above + 1) / (3 + 1)
        assert table.factor(similarities, np.arange(10), 10, 1) == pytest.approx(expected)


def test_a_gallery_is_the_same_in_blocks(monkeypatch):
    """Of as many similarities as are held at once."""
    z, labels = (part.numpy() for part in embeddings(12, 3, 0.8, seed=4))
    gallery = gallery_of(z, [f"class {label}" for label in labels], made_recogniser())
    whole = gallery.strangers(), gallery.recognised(0.3), gallery.load().left_out, gallery.answer(z, 2, 0.3)
    monkeypatch.setattr(oneshot, "CELLS", 12 * 5)
    again = gallery_of(z, [f"class {label}" for label in labels], made_recogniser())
    assert np.allclose(again.load().left_out[1], whole[2][1], atol=1e-6)
    assert again.strangers()[1:] == whole[0][1:] and again.recognised(0.3) == whole[1]
    assert [each.name for each in again.answer(z, 2, 0.3)] == [each.name for each in whole[3]]


def test_pictures_left_out_in_turn_are_spread_over_a_large_gallery():
    """Of 4000 pictures, 2000 are tried; classes of one come first, then pairs that are alike."""
    z = normalize(torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))).numpy()
    names = [f"single {k}" for k in range(2000)] + [f"pair {k // 2}" for k in range(2000)]
    gallery = gallery_of(np.concatenate([z[:2000], z[2000:].repeat(2, 0)]), names, made_recogniser())
    chosen, _ = gallery.load().left_out
    assert len(chosen) == 2000 and gallery.recognised(0.9) == (1.0, (chosen >= 2000).sum())


def test_a_gallery_that_another_network_makes_meanwhile_is_its_own(recogniser, tmp_path, monkeypatch):
    """Two processes find no tables; the second one to write is refused."""
    path = tmp_path / "a.gallery"
    first = oneshot.Recogniser(None, 8, {}, frozenset(), "first")
    oneshot.Gallery(path, first).close()
    value = oneshot.Gallery.value
    monkeypatch.setattr(
        oneshot.Gallery,
        "value",
        lambda self, query, *given: 0 if "count(*) FROM sqlite_master" in query else value(self, query, *given),
    )
    with pytest.raises(ValueError, match="was made with another network"):
        oneshot.Gallery(path, recogniser)
    monkeypatch.undo()
    oneshot.Gallery(path, first).close()


def test_nobody_else_writes_during_a_change(folder, recogniser, tmp_path):
    """From its beginning, so that what it reads stays true."""
    path = tmp_path / "a.gallery"
    with oneshot.Gallery(path, recogniser) as gallery, oneshot.Gallery(path, recogniser) as other:
        other.database.execute("PRAGMA busy_timeout = 50")
        with gallery.transaction(), pytest.raises(OSError, match="database is locked"):
            other.enrol("a", next(folder.glob("support/*/*.png")))


def test_a_change_that_fails_halfway_is_undone(folder, recogniser, tmp_path, monkeypatch):
    """What was removed before the failure is there again."""
    with oneshot.Gallery(tmp_path / "a.gallery", recogniser) as gallery:
        (tmp_path / "classes" / "a").mkdir(parents=True)
        for number, picture in enumerate(sorted(folder.glob("support/*/*.png"))[:2]):
            (tmp_path / "classes" / "a" / f"{number}.png").write_bytes(picture.read_bytes())
        gallery.synchronise(tmp_path / "classes")
        (tmp_path / "classes" / "a" / "0.png").unlink()
        monkeypatch.setattr(gallery, "insert", lambda rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gallery.synchronise(tmp_path / "classes")
        assert gallery.names() == {"a": 2}
    with oneshot.Gallery(tmp_path / "a.gallery", recogniser) as gallery:
        assert gallery.names() == {"a": 2}


def test_answers_are_of_what_is_enrolled_now():
    """After each change, by the gallery that made it."""
    z, labels = (part.numpy() for part in embeddings(40, 1, 1.0, seed=2))
    names = [f"class {label}" for label in labels]
    gallery = gallery_of(z[:20], names[:20], made_recogniser())
    assert gallery.answer(z[30:31], 1, -1.0)[0].name in names[:20]
    threshold = gallery.threshold(0.1)
    rows = [(names[k], "", bytes([k]), z[k].astype("<f4").tobytes(), b"") for k in range(20, 40)]
    with gallery.transaction():
        gallery.insert(rows)
    assert gallery.answer(z[30:31], 1, 0.99)[0].name == "class 30"
    assert gallery.threshold(0.1) == gallery_of(z, names, made_recogniser()).threshold(0.1) != threshold
    gallery.remove("class 30")
    assert gallery.answer(z[30:31], 1, 0.99)[0].name is None
    assert "class 30" not in {name for name, *_ in gallery.nearest(z[30], 40)}


def test_a_class_has_as_many_pictures_as_all_have_on_average():
    z, labels = (part.numpy() for part in embeddings(4, 3, 0.2, seed=3))
    gallery = gallery_of(z[[0, 1, 2, 3, 6, 9]], ["a"] * 3 + ["b", "c", "d"], made_recogniser())
    assert gallery.strangers()[2] == 1.5


def test_a_folder_whose_name_begins_alike_is_another(folder, recogniser, tmp_path):
    paths = sorted(folder.glob("support/*/*.png"))
    for place, picture in (("pets", paths[0]), ("pets 2", paths[1])):
        (tmp_path / place / "cat").mkdir(parents=True)
        (tmp_path / place / "cat" / "0.png").write_bytes(picture.read_bytes())
    with oneshot.Gallery(tmp_path / "a.gallery", recogniser) as gallery:
        gallery.synchronise(tmp_path / "pets 2")
        changes = gallery.synchronise(tmp_path / "pets")
        assert (changes.added, changes.removed, changes.kept) == (1, 0, 0) and gallery.names() == {"cat": 2}


def test_thumbnails_and_numbers_are_of_the_pictures(recogniser):
    """The nearest picture's number leads to it, upright and in its colours."""
    shown = np.zeros((16, 16, 3), np.uint8)
    shown[:8], shown[8:, :8] = (255, 0, 0), (0, 0, 255)
    with oneshot.Gallery(":memory:", recogniser) as gallery:
        gallery.enrol("b", 255 - shown)
        gallery.enrol("a", shown)
        gallery.enrol("b", np.zeros((16, 16, 3), np.uint8))  # the third, of the first class
        name, number, _ = gallery.nearest(recogniser.embed(shown)[0], 1)[0]
        found = np.asarray(Image.open(io.BytesIO(gallery.thumbnail(number)))).astype(int)
    assert name == "a" and abs(found - shown).mean() < 20


def test_probabilities_of_a_gallery_count_its_classes_as_it_is_calibrated():
    z, labels = (part.numpy() for part in embeddings(40, 1, 1.0, seed=2))
    z = z * 0.3 + z[:1]
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    gallery = gallery_of(z, [f"class {label}" for label in labels], made_recogniser())
    counted = gallery.strangers()[1]
    (answer,) = gallery.answer(z[:1], 40, 0.5)
    similarities = np.array([[each.similarity for each in answer.candidates]])
    expected = oneshot.probabilities(similarities, [10.0, -5.0], counted)[0]
    assert counted > 120 and [each.probability for each in answer.candidates] == pytest.approx(list(expected), rel=1e-4)


def test_more_pictures_than_are_read_at_once(recogniser, monkeypatch):
    """One of them cannot be read."""
    monkeypatch.setattr(oneshot, "BATCH", 3)
    some = [np.full((16, 16, 3), 20 * k, np.uint8) for k in range(8)]
    z = np.concatenate([recogniser.embed(each) for each in some])
    assert np.allclose(recogniser.embed(some), z, atol=1e-6)
    found = list(recogniser.embed_each([*some[:4], b"no picture", *some[4:]]))
    assert [bool(error) for *_, error in found] == [False] * 4 + [True] + [False] * 4
    assert np.allclose(np.stack([row for _, row, error in found if not error]), z, atol=1e-6)


def test_classes_trained_on_say_nothing_beside_others():
    """Half of the classes were."""
    z, labels = (part.numpy() for part in embeddings(40, 1, 1.0, seed=2))
    names = [f"class {label}" for label in labels]
    gallery = gallery_of(z, names, made_recogniser(trained=names[:20]))
    table, classes, _ = gallery.strangers()
    _, other = gallery.load().left_out
    expected = table.factor(other[20:], np.arange(20), 39, 1)
    assert classes / 40 == pytest.approx(expected) and abs(expected - oneshot.STRANGERS) > 0.1


def test_a_comparison_at_the_threshold_that_is_given(folder, tmp_path, capsys):
    """By default the stored one decides, whose rates are printed."""
    saved = checkpoints.read(folder / "best.pt")
    saved["threshold"] |= {"false_accept": 12.5, "false_reject": 37.5}
    torch.save(saved, tmp_path / "a.pt")
    pair = sorted(folder.glob("queries/class 9/*.png"))[:2]
    for threshold, answer in ((-1, "same"), (1, "different")):
        more = ["--threshold", threshold, "--json", tmp_path / "a.json"]
        tiny.run(predict, tmp_path / "a.pt", "--compare", *pair, *more)
        found = json.loads((tmp_path / "a.json").read_text())
        assert found["threshold"] == threshold and found["answers"][0]["answer"] == answer
        assert "it accepts" not in capsys.readouterr().out
    tiny.run(predict, tmp_path / "a.pt", "--compare", *pair)
    printed = capsys.readouterr().out
    assert f"threshold {saved['threshold']['value']:.3f}" in printed
    assert "it accepts 12.5 % of different-class pairs\nand refuses 37.5 % of same-class pairs" in printed


def test_the_share_of_enrolled_pictures_that_are_recognised_is_printed(folder, capsys):
    arguments = ["--support", folder / "support", "--query", folder / "queries", "--threshold", -1]
    tiny.run(predict, folder / "best.pt", *arguments)
    assert "of 12 enrolled pictures, each left out in turn, 100.0 % are given their class" in capsys.readouterr().out


def test_a_class_is_removed_by_either_spelling_of_its_name(folder, tmp_path, capsys):
    (tmp_path / "classes" / "cafe\u0301").mkdir(parents=True)
    picture = next(folder.glob("support/*/*.png"))
    (tmp_path / "classes" / "cafe\u0301" / "0.png").write_bytes(picture.read_bytes())
    gallery = [folder / "best.pt", "--gallery", tmp_path / "a.gallery"]
    tiny.run(predict, *gallery, "--add", tmp_path / "classes")
    tiny.run(predict, *gallery, "--remove", "cafe\u0301")
    assert "caf\u00e9 removed, 1 pictures" in capsys.readouterr().out


def test_the_other_classes_of_an_answer_go_with_their_similarities(folder, tmp_path):
    """The probability is that of the best."""
    target = tmp_path / "a.json"
    more = ["--query", folder / "queries", "--top", 3, "--json", target]
    tiny.run(predict, folder / "best.pt", "--support", folder / "support", *more)
    with oneshot.Gallery(":memory:", oneshot.load(folder / "best.pt")) as gallery:
        gallery.synchronise(folder / "support")
        for found in json.loads(target.read_text())["answers"]:
            (answer,) = gallery.recognise(found["picture"], top=3)
            names = [found["nearest"], found["nearest_2"], found["nearest_3"]]
            assert names == [each.name for each in answer.candidates]
            assert found["similarity_3"] == pytest.approx(answer.candidates[2].similarity, abs=1e-5)
            assert found["probability"] == pytest.approx(answer.candidates[0].probability, abs=1e-4)
