"""Recognition with a trained network: embeddings, two pictures compared, galleries of enrolled classes.

    recogniser = oneshot.load("weights/classic-90-10.pt")       # or an exported .onnx or .pt2 file
    recogniser.compare("a.jpg", "b.jpg")                        # Comparison(similarity=0.71, same=True, ...)
    gallery = oneshot.Gallery("animals.gallery", recogniser)    # opened, or made
    gallery.enrol("cat", ["cat1.jpg", "cat2.jpg"])
    gallery.recognise(["new.jpg"])                              # [Answer(name="cat", ...)], name None: unknown

A picture is a path, the bytes of a picture file, a PIL image, an array (H, W, 3) or (H, W) of uint8, or a PyTorch
tensor (3, H, W) of uint8. Its centre square counts, scaled to the network's size. PyTorch is only imported for
checkpoints and .pt2 files.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import sqlite3
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

if __package__:  # installed by pip: a package of four modules
    from . import pictures
else:
    import pictures

BATCH = 250  # pictures that are read and embedded at once
STRANGERS = 1.7  # C classes name strangers as often as 1.7 C classes would name held-back images of other seen classes
CELLS = 20_000_000  # similarities that are held at once
Network = Callable[[np.ndarray], np.ndarray]  # (N, 3, size, size) uint8 -> (N, D) float32 of length 1


# ------------------------------------------------------------------------------------------------------- the recogniser


@dataclass(frozen=True)
class Comparison:
    """Two pictures: cosine similarity of their embeddings, is it above the threshold, and the probability that they are
    of one class, if half of all pairs are."""

    similarity: float
    same: bool
    probability: float


@dataclass(frozen=True)
class Recogniser:
    """A trained network with its calibration. `load` makes it."""

    network: Network
    size: int  # side of the network's images in pixels
    threshold: dict  # as a checkpoint stores it: "value", "logistic", "strangers", ...
    trained: frozenset[str]  # names of the classes it was trained on
    fingerprint: str  # of the network: embeddings are comparable where it is equal
    border: int = 0  # pixels that a picture loses at each side after it is scaled

    def embed_each(self, some: Sequence[Any]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None, str]]:
        """Of each picture its pixels (3, size, size) uint8, its embedding (D,) float32 and "", or None, None and an
        error message if it cannot be read."""

        def read(picture: Any) -> np.ndarray | str:
            try:
                return pictures.read(picture, self.size, self.border)
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release the GIL
            for start in tqdm(range(0, len(some), BATCH), "embedding", delay=2, leave=False):
                found = list(pool.map(read, some[start : start + BATCH]))
                good = [pixels for pixels in found if not isinstance(pixels, str)]
                z = iter(self.network(np.stack(good)) if good else ())
                for each in found:
                    yield (None, None, each) if isinstance(each, str) else (each, next(z), "")

    def embed(self, some: Any) -> np.ndarray:
        """Embeddings (N, D) float32, of length 1, of a picture or several. Raises ValueError if one cannot be read."""
        rows = []
        for _, z, error in self.embed_each(as_list(some)):
            if error:
                raise ValueError(error)
            rows.append(z)
        return np.stack(rows) if rows else self.network(np.zeros((1, 3, self.size, self.size), np.uint8))[:0]

    def compare(self, a: Any, b: Any) -> Comparison:
        """Are two pictures of one class? Raises ValueError."""
        first, second = self.embed([a, b])
        similarity = float(first @ second)
        probability = float(probabilities(np.array([[similarity]]), self.threshold["logistic"], 1)[0, 0])
        return Comparison(similarity, similarity > self.threshold["value"], probability)


def as_list(some: Any) -> list:
    """Pictures as a list; one picture, or a batch in one array, is one too."""
    if isinstance(some, (str, os.PathLike, bytes, Image.Image)) or getattr(some, "ndim", 4) in (2, 3):
        return [some]
    return list(some)


def probabilities(similarities: np.ndarray, logistic: Sequence[float], classes: float) -> np.ndarray:
    """Probability 0..1 that a picture is of each class, of its `similarities` (N, C) to all of them, if half of all
    pictures are of an enrolled class, each as often. The `logistic` gives the odds that a pair of this similarity is of
    one class; the rest, up to 1, is that the picture is of none. `classes` is how many C counts for."""
    slope, intercept = logistic
    odds = slope * similarities + (intercept - math.log(classes))  # logarithms
    top = odds.max(1, keepdims=True).clip(0)
    odds = np.exp(odds - top)
    return odds / (np.exp(-top) + odds.sum(1, keepdims=True))


def load(path: str | os.PathLike, device: str = "auto") -> Recogniser:
    """A recogniser from best.pt or last.pt of a run, or from a file that export.py made of it (.onnx or .pt2).

    `device` is for checkpoints: "auto" (a GPU, if there is one), "cpu", "cuda", ... Raises ValueError or OSError.
    """
    if Path(path).suffix in (".onnx", ".pt2"):
        if device not in ("auto", "cpu"):
            raise ValueError(f"{path} runs on the CPU, not on {device}; a checkpoint (.pt) runs on either")
        network, facts = load_exported(Path(path))
    else:
        if __package__:
            from . import checkpoints, model
        else:
            import checkpoints
            import model
        net, saved = checkpoints.load(path)
        net.to(model.pick_device(device))
        facts = checkpoints.recogniser_facts(net, saved)

        def network(pixels: np.ndarray) -> np.ndarray:
            return normalised(model.embed(net, model.torch.from_numpy(pixels)).numpy())

    return Recogniser(network, **facts | {"trained": frozenset(facts["trained"])})


def load_exported(path: Path) -> tuple[Network, dict]:
    """The function that an .onnx or .pt2 file computes, on the CPU, and what `Recogniser` needs beside it. Raises
    ValueError or OSError."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            metadata = session.get_modelmeta().custom_metadata_map
            digest = metadata.get("sha256", "")  # of the file with zeros in its place
            if digest and digest != hashlib.sha256(path.read_bytes().replace(digest.encode(), b"0" * 64)).hexdigest():
                raise ValueError("a checksum is wrong")
        else:
            import torch

            with zipfile.ZipFile(path) as archive:
                if "metadata.json" not in {name.rpartition("/")[2] for name in archive.namelist()} or archive.testzip():
                    raise ValueError("a checksum is wrong, or it is of another kind")
            extra = {"metadata.json": ""}
            module = torch.export.load(path, extra_files=extra).module()
            metadata = json.loads(extra["metadata.json"])
    except ImportError as error:
        raise ValueError(f"{path} needs a package: pip install {error.name}") from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if "recogniser" not in metadata:
        raise ValueError(f"{path} lacks what recognition needs; export it again")
    kind = metadata["input"].split()[0]  # uint8 or float32

    def network(pixels: np.ndarray) -> np.ndarray:
        pixels = np.ascontiguousarray(pixels, kind)
        if path.suffix == ".onnx":
            return session.run(None, {"images": pixels})[0]
        with torch.inference_mode():
            return module(torch.from_numpy(pixels)).numpy()

    return network, json.loads(metadata["recogniser"])


def normalised(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) scaled to length 1; rows of zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


# ------------------------------------------------------------------------------------------------------------ strangers


class Strangers:
    """How similar pictures of no enrolled class are to the most similar of C enrolled ones.

    `stored` is a table that training measured on held-back images (`metrics.strangers`): "similarities" (shots,
    classes, rates), those that a share `rates` of strangers exceeds, for so many `classes` with so many pictures of
    each, `shots`. Between its points it is linear in the logarithms of all three. All strangers exceed -1.
    """

    def __init__(self, stored: dict):
        self.shots, self.classes, self.rates = (np.log(stored[name]) for name in ("shots", "classes", "rates"))
        self.rates = np.append(self.rates, 0.0)
        self.similarities = np.pad(stored["similarities"], ((0, 0), (0, 0), (0, 1)), constant_values=-1.0)

    def curve(self, classes: float, shots: float) -> np.ndarray:
        """Similarities (R,), falling as the rates rise."""
        table = self.similarities
        for values, points in ((shots, self.shots), (classes, self.classes)):
            place = float(np.interp(math.log(max(values, 1.0)), points, np.arange(len(points))))
            low, part = min(int(place), len(points) - 1), place % 1
            table = table[low] if not part else (1 - part) * table[low] + part * table[low + 1]
        return table

    def threshold(self, false_accept: float, classes: float, shots: float) -> float:
        """The similarity that this share (0..1) of strangers exceeds."""
        return float(np.interp(math.log(false_accept), self.rates, self.curve(classes, shots)))

    def rate(self, similarity: float, classes: float, shots: float) -> float:
        """The share (0..1) of strangers that exceeds a similarity."""
        return float(np.exp(np.interp(-similarity, -self.curve(classes, shots), self.rates)))

    def factor(self, similarities: np.ndarray, labels: np.ndarray, classes: int, shots: float) -> float:
        """How many classes of the table each of the enrolled `classes` counts for, STRANGERS unless pictures of other
        classes, with `similarities` (M,) to the most similar enrolled class and `labels` (M,), say otherwise.

        They are compared where the table expects about three of their classes above a similarity; pictures of one class
        are alike and count as one. One more is added to both counts, so that few classes change little.
        """
        seen = len(np.unique(labels))
        if not seen:
            return STRANGERS
        threshold = self.threshold(max(0.1, min(0.5, 3 / seen)), STRANGERS * classes, shots)
        expected = seen * self.rate(threshold, STRANGERS * classes, shots)
        return STRANGERS * (seen * float((similarities > threshold).mean()) + 1) / (expected + 1)


# ---------------------------------------------------------------------------------------------------------- the gallery

FORMAT = 0x4F534701  # of the file, SQLite's application_id
SCHEMA = {
    "facts": "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "classes": "CREATE TABLE classes (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "pictures": "CREATE TABLE pictures (id INTEGER PRIMARY KEY, class INTEGER NOT NULL, source TEXT NOT NULL, "
    "sha256 BLOB NOT NULL, enrolled REAL NOT NULL, embedding BLOB NOT NULL, UNIQUE (class, sha256))",
    "thumbnails": "CREATE TABLE thumbnails (picture INTEGER PRIMARY KEY, jpeg BLOB NOT NULL)",
}
ENROLLED = "FROM pictures JOIN classes ON class = classes.id"


@dataclass(frozen=True)
class Candidate:
    """An enrolled class: cosine similarity to the mean of its pictures, and the probability that the picture is of it,
    if half of all pictures are of an enrolled class."""

    name: str
    similarity: float
    probability: float


@dataclass(frozen=True)
class Answer:
    """The class of a picture, None for unknown, and the enrolled classes most similar to it, the best first."""

    name: str | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Changes:
    """What `Gallery.synchronise` did: pictures added, removed and left as they are, why some cannot be read, and the
    classes of which none can."""

    added: int
    removed: int
    kept: int
    errors: list[str]
    empty: list[str]


@dataclass(frozen=True)
class Enrolled:
    """What a gallery holds, read at one time: P pictures of C classes."""

    classes: list[str]  # C names
    numbers: tuple[int, ...]  # of the P pictures
    rows: np.ndarray  # (P, D) their embeddings
    of: np.ndarray  # (P,) their classes, 0..C-1
    counts: np.ndarray  # (C,) pictures of each class
    sums: np.ndarray  # (C, D) of their embeddings
    means: np.ndarray  # (C, D) of length 1
    recogniser: Recogniser

    def similarities(self, z: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks of embeddings (N, D): where they are, and their similarities (B, C) to the means of all classes."""
        size = max(1, CELLS // len(self.classes))
        for start in range(0, len(z), size):
            yield slice(start, start + size), z[start : start + size] @ self.means.T

    @functools.cached_property
    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (M,) of enrolled pictures, spread over all, and their highest similarities (M,) to another class, as if
        theirs were not enrolled."""
        chosen = np.unique(np.linspace(0, len(self.rows) - 1, 2000).astype(int))
        of, other = self.of[chosen], np.empty(len(chosen))
        for part, similarity in self.similarities(self.rows[chosen]):
            similarity[np.arange(len(similarity)), of[part]] = -1
            other[part] = similarity.max(1)
        return chosen, other

    @functools.cached_property
    def strangers(self) -> tuple[Strangers, float, float]:
        """The calibration, and what it is asked about: how many classes the enrolled ones count for, and how many
        pictures each has.

        Each picture is a stranger to the gallery without its class. How often these are more similar to another class
        than the table expects says how many more, or fewer, classes they count for. Classes that the network was
        trained on say nothing of strangers.
        """
        table, shots, factor = Strangers(self.recogniser.threshold["strangers"]), self.counts.mean(), STRANGERS
        if len(self.classes) > 1:
            chosen, other = self.left_out
            of = self.of[chosen]
            new = np.array([name not in self.recogniser.trained for name in self.classes])[of]
            factor = table.factor(other[new], of[new], len(self.classes) - 1, shots)
        return table, factor * len(self.classes), shots


class Gallery(contextlib.AbstractContextManager):
    """Enrolled classes in one file, an SQLite database: pictures' embeddings, names, sources, hashes and times.

    `path` is opened, or made; ":memory:" keeps the gallery in memory. Each change is one transaction: after a crash the
    file is as before or as after it, and several processes and threads may read and write. Raises ValueError for a file
    that is not a gallery or belongs to another network, OSError for one that cannot be opened, or changed.
    """

    def __init__(self, path: str | os.PathLike, recogniser: Recogniser):
        self.path, self.recogniser, self.lock = os.fspath(path), recogniser, threading.RLock()
        if not self.path:  # SQLite would make a file that is gone when it is closed
            raise ValueError("a gallery needs the path of a file")
        self.version = None
        with self.faults("open"):
            self.database = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self.database.execute("PRAGMA trusted_schema = OFF")
            self.database.text_factory = os.fsdecode  # names of folders that are not UTF-8 keep their bytes
            self.make_or_check()

    def make_or_check(self) -> None:
        """Raise ValueError unless the file is a gallery of this network: these tables and nothing that could run. An
        empty file is made one; others need not be writable."""
        if not self.value("SELECT count(*) FROM sqlite_master"):
            with self.transaction():
                for statement in SCHEMA.values():  # another process may be first
                    self.database.execute(statement.replace("TABLE", "TABLE IF NOT EXISTS"))
                self.database.execute(f"PRAGMA application_id = {FORMAT}")
                query = "INSERT OR IGNORE INTO facts VALUES ('fingerprint', ?)"
                self.database.execute(query, (self.recogniser.fingerprint,))
        found = dict(self.ask("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))
        if self.value("PRAGMA application_id") != FORMAT or found != SCHEMA:
            raise ValueError(f"{self.path} is not a gallery")
        if self.value("SELECT value FROM facts WHERE name = 'fingerprint'") != self.recogniser.fingerprint:
            raise ValueError(f"the gallery {self.path} was made with another network; enrol its pictures again")

    def close(self, *_: object) -> None:
        self.database.close()

    __exit__ = close

    @contextlib.contextmanager
    def faults(self, action: str) -> Iterator[None]:
        """What SQLite cannot do in the block is an OSError, what is wrong with the file a ValueError."""
        try:
            with self.lock:
                yield
        except sqlite3.ProgrammingError:  # the gallery was closed
            raise
        except sqlite3.OperationalError as error:  # locked, read-only, a full disk
            raise OSError(f"cannot {action} the gallery {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not a gallery, or is damaged: {error}") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes in the block or none. Raises OSError if they cannot be written, ValueError if the file is
        damaged."""
        with self.faults("write to"):
            self.database.execute("BEGIN IMMEDIATE")
            with self.database:  # commits, or rolls back
                yield

    def ask(self, query: str, *given: object) -> list[tuple]:
        """The rows that a query finds. Raises OSError or ValueError."""
        with self.faults("read"):
            return self.database.execute(query, given).fetchall()

    def value(self, query: str, *given: object) -> Any:
        """The first value that a query finds, or None. Raises OSError or ValueError."""
        return next((row[0] for row in self.ask(query, *given)), None)

    def __len__(self) -> int:
        """The number of pictures."""
        return self.value("SELECT count(*) FROM pictures")

    def names(self) -> dict[str, int]:
        """The enrolled classes, in alphabetical order, and how many pictures each has."""
        return dict(self.ask(f"SELECT name, count(*) {ENROLLED} GROUP BY name ORDER BY name"))

    def numbers_of(self, name: str) -> list[int]:
        """The numbers of a class's pictures; [] if it is not enrolled."""
        query = f"SELECT pictures.id {ENROLLED} WHERE name = CAST(? AS TEXT) ORDER BY pictures.id"
        return [row[0] for row in self.ask(query, os.fsencode(name))]

    def thumbnail(self, number: int) -> bytes | None:
        """An enrolled picture as the network sees it, a JPEG file; None if there is no such picture."""
        return self.value("SELECT CAST(jpeg AS BLOB) FROM thumbnails WHERE picture = ?", number)

    # ------------------------------------------------------------------------------------------------------ changes

    def enrol(self, name: str, some: Any) -> int:
        """Add pictures to a class; those it has already are skipped. Returns how many are new. Raises ValueError, and
        adds none, if one cannot be read."""
        rows, errors = self.new_rows({(name, *identity(picture)): picture for picture in as_list(some)})
        if errors:
            raise ValueError(errors[0])
        with self.transaction():
            return self.insert(rows)

    def remove(self, name: str) -> int:
        """Remove a class; returns how many pictures it had. Raises ValueError if it is not enrolled."""
        with self.transaction():
            removed = self.delete(self.numbers_of(name))
        if not removed:
            raise ValueError(f"no class {name!r} is enrolled in {self.path}")
        return removed

    def synchronise(self, folder: str | os.PathLike) -> Changes:
        """Make the gallery hold what a folder with a folder for each class holds: new and changed pictures are added,
        those that came from the folder and are gone are removed. Others stay. Raises ValueError or OSError."""
        root = os.path.join(os.path.realpath(folder), "")
        found = {}
        classes = pictures.find_classes({"": pictures.open_folder(Path(folder))})[""]
        for name, files in classes.items():
            for file in files:  # a link's place counts, not where it leads
                found[name, root + os.path.relpath(str(file), folder), identity(file)[1]] = file
        ours = self.numbers_from(root)
        gone = {key: number for key, number in ours.items() if key not in found}
        rows, errors = self.new_rows({key: file for key, file in found.items() if key not in ours}, gone.values())
        with self.transaction():  # another process may have removed some
            still = self.numbers_from(root)
            removed = self.delete([number for key, number in gone.items() if still.get(key) == number])
            added = self.insert(rows)
        return Changes(added, removed, len(ours) - removed, errors, sorted(classes.keys() - self.names().keys()))

    def numbers_from(self, root: str) -> dict[tuple, int]:
        """The numbers of the pictures from a folder, by class, source and SHA-256."""
        rows = self.ask(f"SELECT name, source, sha256, pictures.id {ENROLLED}")
        return {tuple(key): number for *key, number in rows if key[1].startswith(root)}

    def new_rows(self, found: dict[tuple, Any], gone: Collection[int] = ()) -> tuple[list[tuple], list[str]]:
        """What `insert` takes, of pictures `found` by class, source and SHA-256 that are not enrolled, or only as the
        numbers `gone`, and errors of those that cannot be read. Raises ValueError for a name that no class can have."""
        query = f"SELECT name, sha256, pictures.id {ENROLLED}"
        known = {(name, sha) for name, sha, number in self.ask(query) if number not in gone}
        new = {}
        for (name, source, sha), picture in found.items():
            if not isinstance(name, str) or not name.strip() or name == "unknown":
                raise ValueError(f"a class cannot be called {name!r}; rename it")
            if (name, sha) not in known:
                known.add((name, sha))
                new[name, source, sha] = picture
        rows, errors = [], []
        for row, (pixels, z, error) in zip(new, self.recogniser.embed_each([*new.values()]), strict=True):
            if error:
                errors.append(error)
            else:
                rows.append((*row, z.astype("<f4").tobytes(), jpeg(pixels)))
        return rows, errors

    def insert(self, rows: list[tuple]) -> int:
        added, now = 0, time.time()
        query = "INSERT OR IGNORE INTO pictures (class, source, sha256, enrolled, embedding) "
        query += "SELECT id, CAST(? AS TEXT), ?, ?, ? FROM classes WHERE name = CAST(? AS TEXT)"
        for name, source, sha, z, thumbnail in rows:
            name = os.fsencode(name)
            self.database.execute("INSERT OR IGNORE INTO classes (name) VALUES (CAST(? AS TEXT))", (name,))
            done = self.database.execute(query, (os.fsencode(source), sha, now, z, name))
            if done.rowcount:
                self.database.execute("INSERT INTO thumbnails VALUES (?, ?)", (done.lastrowid, thumbnail))
                added += 1
        self.version = None
        return added

    def delete(self, numbers: Collection[int]) -> int:
        rows = [(number,) for number in numbers]
        self.database.executemany("DELETE FROM pictures WHERE id = ?", rows)
        self.database.executemany("DELETE FROM thumbnails WHERE picture = ?", rows)
        self.database.execute("DELETE FROM classes WHERE id NOT IN (SELECT class FROM pictures)")
        self.version = None
        return len(rows)

    # -------------------------------------------------------------------------------------------------- recognition

    def load(self) -> Enrolled:
        """What is enrolled, read anew if the file has changed. Raises ValueError if that is nothing."""
        with self.faults("read"):
            version = self.value("PRAGMA data_version")  # another connection's changes
            if version != self.version:
                rows = self.ask(f"SELECT class, pictures.id, embedding, name {ENROLLED} ORDER BY class, pictures.id")
                self.enrolled, self.version = self.arrange(rows), version
            return self.enrolled

    def arrange(self, found: list[tuple]) -> Enrolled:
        if not found:
            raise ValueError(f"the gallery {self.path} is empty; enrol pictures first")
        classes, numbers, blobs, names = zip(*found, strict=True)
        data = b"".join(blobs)
        if len(data) % (4 * len(found)) or not np.isfinite(np.frombuffer(data, "<f4")).all():
            raise ValueError(f"{self.path} is damaged: its embeddings are not what they were")
        rows = np.frombuffer(data, "<f4").reshape(len(found), -1)
        _, starts, of, counts = np.unique(classes, return_index=True, return_inverse=True, return_counts=True)
        sums = np.add.reduceat(rows, starts)
        parts = numbers, rows, of, counts, sums, normalised(sums), self.recogniser
        return Enrolled([names[start] for start in starts], *parts)

    def strangers(self) -> tuple[Strangers, float, float]:
        """`Enrolled.strangers` of what is enrolled."""
        return self.load().strangers

    def threshold(self, false_accept: float = 0.1) -> float:
        """The similarity above which a picture gets a name, so that this share (0..1) of strangers, pictures of no
        enrolled class, does. Raises ValueError."""
        if not 0 < false_accept <= 1:
            raise ValueError(f"false_accept is a share above 0 and up to 1, got {false_accept}")
        table, *asked = self.strangers()
        return table.threshold(false_accept, *asked)

    def false_accept(self, threshold: float) -> float:
        """The share (0..1) of strangers that is expected to get a name at a threshold."""
        table, *asked = self.strangers()
        return table.rate(threshold, *asked)

    def recognise(
        self, some: Any, top: int = 5, false_accept: float = 0.1, threshold: float | None = None
    ) -> list[Answer]:
        """An answer for each picture, with the `top` most similar classes. It has a name if the highest similarity is
        above `threshold`, by default `threshold(false_accept)`. Raises ValueError."""
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        threshold = self.threshold(false_accept) if threshold is None else threshold
        return self.answer(self.recogniser.embed(some), top, threshold)

    def answer(self, z: np.ndarray, top: int, threshold: float) -> list[Answer]:
        """As `recognise`, of embeddings (N, D)."""
        enrolled, (_, tried, _), answers = self.load(), self.strangers(), []
        for _, similarity in enrolled.similarities(z):
            probability = probabilities(similarity, self.recogniser.threshold["logistic"], tried)
            for row, chances, best in zip(similarity, probability, highest(similarity, top), strict=True):
                found = tuple(Candidate(enrolled.classes[k], float(row[k]), float(chances[k])) for k in best)
                answers.append(Answer(found[0].name if found[0].similarity > threshold else None, found))
        return answers

    def nearest(self, z: np.ndarray, top: int = 5) -> list[tuple[str, int, float]]:
        """The enrolled pictures most similar to an embedding (D,): class, number of the picture, cosine similarity."""
        enrolled = self.load()
        similarity = enrolled.rows @ z
        places = highest(similarity[None], top)[0]
        return [(enrolled.classes[enrolled.of[n]], enrolled.numbers[n], float(similarity[n])) for n in places]

    def recognised(self, threshold: float) -> tuple[float, int] | None:
        """The share (0..1) of enrolled pictures that are given their class when they are left out of it, and how many
        pictures that is of; None if no class has two."""
        enrolled = self.load()
        chosen, other = enrolled.left_out
        several = enrolled.counts[enrolled.of[chosen]] > 1
        z, sums = enrolled.rows[chosen[several]], enrolled.sums[enrolled.of[chosen[several]]]
        own = np.einsum("nd,nd->n", z, normalised(sums - z))
        right = own > np.maximum(other[several], threshold)
        return (float(right.mean()), len(right)) if len(right) else None


def highest(rows: np.ndarray, top: int) -> np.ndarray:
    """Columns (N, top) of the highest numbers of each row (N, C), the highest first; fewer if there are fewer.

    They lie in the `top` groups of columns that have the highest maxima, so that only these are sorted.
    """
    columns = np.arange(rows.shape[1])
    maxima = np.maximum.reduceat(rows, columns[::256], axis=1)
    groups = np.argsort(-maxima, kind="stable")[:, :top]
    places = (256 * groups[:, :, None] + np.arange(256)).reshape(len(rows), -1)
    values = np.where(places < len(columns), np.take_along_axis(rows, np.minimum(places, columns[-1]), 1), -np.inf)
    return np.take_along_axis(places, np.argsort(-values, kind="stable")[:, : min(top, len(columns))], 1)


def identity(picture: Any) -> tuple[str, bytes]:
    """Where a picture comes from, "" if it is no file, and its SHA-256."""
    if isinstance(picture, (str, os.PathLike)):
        digest = hashlib.sha256()
        with contextlib.suppress(OSError):  # reading it as a picture will tell
            with open(picture if os.path.isfile(picture) else os.devnull, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return os.path.realpath(str(picture)), digest.digest()
    source, content = "", picture
    if isinstance(picture, zipfile.Path):
        source, content = os.path.realpath(str(picture)), b""
        with contextlib.suppress(OSError):
            content = pictures.content(picture)
    if isinstance(content, Image.Image) and content.mode == "P":  # whose numbers are places in a palette
        content = content.convert("RGBA")
    if hasattr(content, "cpu"):
        content = content.cpu()
    if not isinstance(content, bytes):
        pixels = np.asarray(content)
        content = f"{pixels.shape} ".encode() + pixels.tobytes()
    return source, hashlib.sha256(content).digest()


def jpeg(image: np.ndarray) -> bytes:
    """(3, S, S) uint8 as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()
