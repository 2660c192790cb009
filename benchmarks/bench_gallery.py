"""A gallery of many classes: seconds to open it, to ask it about one picture and about a thousand.

    python benchmarks/bench_gallery.py --classes 100000

Embeddings are random, of 128 numbers, one of each class. The network is left out.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import oneshot


@dataclass(frozen=True)
class Options:
    classes: int = 100_000
    dimension: int = 128


def embeddings(count: int, dimension: int) -> np.ndarray:
    z = np.random.default_rng(count).standard_normal((count, dimension), np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    strangers = {"shots": [1], "classes": [1, 100_000], "rates": [0.1], "similarities": [[[0.3], [0.6]]]}
    threshold = {"value": 0.5, "logistic": [10.0, -5.0], "strangers": strangers}
    recogniser = oneshot.Recogniser(None, 32, threshold, frozenset(), "random")
    z, queries = embeddings(options.classes, options.dimension), embeddings(1000, options.dimension)
    rows = [(f"class {k}", "", k.to_bytes(4, "big"), row.tobytes(), b"") for k, row in enumerate(z)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gallery"
        with oneshot.Gallery(path, recogniser) as gallery, gallery.transaction():
            gallery.insert(rows)
        started = time.perf_counter()
        gallery = oneshot.Gallery(path, recogniser)
        gallery.load()
        seconds, size = time.perf_counter() - started, path.stat().st_size / 1e6
        print(f"{options.classes} classes, {size:.0f} MB: opened in {seconds:.2f} s")
        for batch in (queries[:1], queries):
            times = []
            for _ in range(5):
                started = time.perf_counter()
                gallery.answer(batch, 5, 0.5)
                times.append(time.perf_counter() - started)
            print(f"{len(batch)} pictures, the 5 most similar classes: {1000 * np.median(times):.1f} ms (median of 5)")


if __name__ == "__main__":
    main()
