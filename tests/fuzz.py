"""Random input against what must hold: python tests/fuzz.py [SECONDS] [SEED], or `make fuzz`.

The triplet loss, native and plain: both raise, or both answer alike; not finite in, NaN out. Damaged checkpoints and
.npz files: a ValueError, or the content as it was. A failure prints what repeats it.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402
import sources  # noqa: E402
import tiny  # noqa: E402
import triplet  # noqa: E402

SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, 1e-45, 3e38, 1e19, -1e-20)


def fuzz_loss(draw: random.Random) -> None:
    """One call of the loss with both implementations."""
    generator = torch.Generator().manual_seed(draw.randrange(2**32))
    rows, width, more = draw.randint(1, 70), draw.choice((1, 2, 3, 7, 16, 33, 64)), draw.choice((0, 0, 1, 5, 40))
    dtype = draw.choice(triplet.TYPES)
    scale = 10 ** draw.uniform(-3, 3)
    x = (scale * torch.randn(rows + more, width, generator=generator)).to(dtype)
    labels = torch.randint(draw.randint(1, rows), (rows + more,), generator=generator)
    labels = labels.to(draw.choice(triplet.LABEL_TYPES))
    special = draw.random() < 0.3
    if special:
        for _ in range(draw.randint(1, 3)):
            x[draw.randrange(len(x)), draw.randrange(width)] = draw.choice(SPECIAL)
    if draw.random() < 0.1:  # neither implementation takes it
        labels = labels[: rows + more - 1] if draw.random() < 0.5 else labels.float()
    settings = {
        "distance": draw.choice(triplet.DISTANCES),
        "mining": draw.choice(triplet.MININGS),
        "soft_margin": draw.random() < 0.5,
        "temperature": 10 ** draw.uniform(-1, 1),
        "reduction": draw.choice(triplet.REDUCTIONS),
        "margin": draw.uniform(-0.5, 2),
    }
    found: dict[str, tuple | type] = {}
    for impl in ("torch", "native"):
        anchors = x[:rows].clone().requires_grad_()
        others = (x[rows:], labels[rows:]) if more else None
        try:
            loss = triplet.triplet_loss(anchors, labels[:rows], others=others, impl=impl, **settings)
            found[impl] = loss.detach().double(), torch.autograd.grad(loss.sum(), anchors)[0].double()
        except (TypeError, ValueError) as error:
            found[impl] = type(error)
    plain, native = found["torch"], found["native"]
    if isinstance(plain, type) or isinstance(native, type):
        assert plain == native, (plain, native)
        return
    assert plain[0].shape == native[0].shape
    if not x.isfinite().all():
        assert all(part.isnan().all() for part in (*plain, *native)), "not finite, but no NaN"
    elif not special:  # rounding can decide otherwise at a margin or among rows that are about as far
        size = max(1.0, plain[0].abs().max().item())
        assert native[0].isfinite().all()
        assert dtype == torch.float16 or native[1].isfinite().all()  # overflows early
        if settings["mining"] != "semihard" and settings["reduction"] != "mean":
            assert torch.allclose(plain[0], native[0], rtol=1e-3, atol=2e-4 * size * max(1.0, scale)), found


def fuzz_file(draw: random.Random, whole: bytes, path: Path, read: Callable[[Path], object]) -> None:
    """One damaged copy of a file: bits changed, a block of zeros, cut, or a piece of it repeated."""
    damaged, at = bytearray(whole), draw.randrange(len(whole))
    kind = draw.randrange(4)
    if kind == 0:
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        block = len(damaged[at : at + 512])
        damaged[at : at + block] = bytes(block)
    elif kind == 2:
        del damaged[at:]
    else:
        damaged[at:at] = damaged[at : at + draw.randint(1, 99)]
    path.write_bytes(damaged)
    try:
        content = read(path)
    except ValueError:
        return
    path.write_bytes(whole)
    assert tiny.same(content, read(path)), "read as something else"


def arrays_of(path: Path) -> list:
    """What an .npz file holds for us, as `tiny.same` compares it."""
    data = sources.load_npz(path)
    return [data.train.images, data.train.labels, data.test.images, data.test.labels, list(data.class_names)]


def fuzz(seconds: float, seed: int) -> dict[str, int]:
    """Cases of each kind that were tried and held. Raises AssertionError or whatever should not be raised."""
    with tempfile.TemporaryDirectory() as folder:
        npz, pt = tiny.write_npz(Path(folder) / "whole.npz"), Path(folder) / "whole.pt"
        tiny.train_classic(npz, Path(folder) / "run", "--epochs", "0.1")
        pt.write_bytes((Path(folder) / "run" / "best.pt").read_bytes())
        files = {"checkpoint": (pt.read_bytes(), checkpoints.read), "npz": (npz.read_bytes(), arrays_of)}
        counts = dict.fromkeys(("loss", *files), 0)
        number, end = seed, time.monotonic() + seconds
        while time.monotonic() < end:
            kind = list(counts)[number % 3]
            try:
                draw = random.Random(number)
                if kind == "loss":
                    fuzz_loss(draw)
                else:
                    fuzz_file(draw, files[kind][0], Path(folder) / f"damaged.{kind}", files[kind][1])
            except Exception:
                print(f"repeat with: python tests/fuzz.py 0.001 {number}", file=sys.stderr)
                raise
            counts[kind] += 1
            number += 1
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    seconds, seed = (*sys.argv[1:], *("60", "0")[len(sys.argv) - 1 :])
    print(fuzz(float(seconds), int(seed)))
