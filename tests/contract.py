"""Holds an implementation of the triplet loss against the oracle: batches, types, tolerances, comparisons."""

import os
from fractions import Fraction

import pytest
import torch

import oracle
import triplet
from triplet import mine, triplet_loss

NATIVE = triplet.native_library() == ""
IMPLS = [
    pytest.param("torch", "cpu", id="torch"),
    *([pytest.param("native", "cpu", id="native")] if NATIVE or os.environ.get("ONESHOT_NATIVE") == "1" else []),
    pytest.param(
        "auto",
        "cuda",
        id="cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MININGS = ("hard", "semihard", "all")
# how far rounding may move a value of order 1: a few times the resolution of the arithmetic's type
RESOLUTION = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}


def batch(rows, width=5, classes=None, dtype=torch.float64, others=0, seed=0, offset=0.0):
    """Embeddings and labels of a batch and, if `others`, of as many others."""
    generator = torch.Generator().manual_seed(1000 * rows + seed)
    x = (torch.randn(rows + others, width, generator=generator, dtype=torch.float64) + offset).to(dtype)
    labels = torch.randint(classes or max(1, rows // 4), (rows + others,), generator=generator)
    return x[:rows], labels[:rows], (x[rows:], labels[rows:]) if others else None


def compare(impl, device, x, labels, others, kind, mining, soft=False, margin=0.3, temperature=0.5):
    """Hold loss, count, mined rows and gradients against the oracle; mined rows may differ within rounding."""
    rows = x.double().tolist() + (others[0].double().tolist() if others else [])
    names = labels.tolist() + (others[1].tolist() if others else [])
    settings = (kind, mining, margin, soft, temperature)
    scale = max(1.0, max(oracle.distance(rows[0], row, kind) for row in rows))
    spread = max(abs(value - x.double().mean(0)[k].item()) for row in rows for k, value in enumerate(row))
    slack = RESOLUTION[x.dtype] * (scale if kind == "cosine" else max(scale, x.shape[1] * spread**2))
    leaf = x.to(device).requires_grad_()
    far = (others[0].to(device).requires_grad_(), others[1].to(device)) if others else None
    given = None
    if mining != "all":
        mined = mine(leaf, labels.to(device), distance=kind, mining=mining, others=far, impl=impl)
        given = list(zip(mined.positive.tolist(), mined.negative.tolist(), strict=True))
        check_mined(given, rows, names, kind, mining, slack)
    losses, count, gradient = oracle.triplet_loss(rows, names, len(x), *settings, given=given)
    keywords = dict(distance=kind, mining=mining, soft_margin=soft, temperature=temperature, others=far, impl=impl)
    each = triplet_loss(leaf, labels.to(device), margin, reduction="none", **keywords)
    assert each.shape == (len(x),) and each.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    summands = max(1.0, float(len(names)) ** 2 if mining == "all" else 1.0)
    assert torch.allclose(
        each.double().cpu(),
        torch.tensor(losses, dtype=torch.float64),
        rtol=1e-4 * (x.dtype != torch.float64),
        atol=slack * 8 * summands,
    )
    total = triplet_loss(leaf, labels.to(device), margin, reduction="sum", **keywords)
    mean = triplet_loss(leaf, labels.to(device), margin, reduction="mean", **keywords)
    expected = torch.tensor([sum(losses), sum(losses) / max(count, 1)], dtype=torch.float64)
    assert torch.allclose(torch.stack((total, mean)).double().cpu(), expected, rtol=2e-4, atol=slack * 8 * summands)
    if x.dtype in (torch.float64, torch.float32):
        weights = torch.linspace(-1, 1, len(x), dtype=torch.float64)
        leaves = [leaf, *([far[0]] if far else [])]
        grads = torch.autograd.grad(each, leaves, weights.to(each).repeat_interleave(2)[::2])
        exact = torch.tensor(gradient(weights.tolist()), dtype=torch.float64)
        got = torch.cat([grad.double().cpu() for grad in grads])
        assert torch.allclose(
            got, exact, rtol=0, atol=1e-9 if x.dtype == torch.float64 else 2e-4 * float(exact.abs().max() + 1e-3)
        )


def check_mined(given, rows, names, kind, mining, slack):
    """Are the mined rows the oracle's, or as good as them within rounding?"""
    for a, (p, n) in enumerate(given):
        positives = [j for j in range(len(rows)) if names[j] == names[a] and j != a]
        negatives = [j for j in range(len(rows)) if names[j] != names[a]]
        if not positives or not negatives:
            assert (p, n) == (-1, -1)
            continue
        assert p in positives and n in negatives
        d = [oracle.distance(rows[a], row, kind) for row in rows]
        best_p, best_n = oracle.mine(d, positives, negatives, mining)
        if kind == "euclidean":  # the order is that of squares
            d = [value * value for value in d]
        assert d[p] >= d[best_p] - slack
        if mining == "hard":
            assert d[n] <= d[best_n] + slack
        else:
            between = [j for j in negatives if d[best_p] + slack < d[j] < d[n] - slack]
            beyond = [j for j in negatives if d[j] > d[best_p] + slack]
            assert (d[n] > d[best_p] - slack and not between) or (not beyond and d[n] >= d[best_n] - slack)


def integer_batches():
    """Rows of small integers (B, D), where many distances are equal, their labels and a type that holds them."""
    yield torch.tensor([[0, 1], [0, 2], [1, 1], [0, 1]]), torch.tensor([0, 1, 0, 1]), torch.float32
    for seed, (least, most, rows, width, dtype) in enumerate(
        (
            (-1, 1, 40, 3, torch.float32),
            (-1, 1, 90, 17, torch.bfloat16),
            (0, 255, 70, 2, torch.float32),
            (0, 3, 65, 9, torch.float16),
            (1000, 1004, 60, 12, torch.float32),
            (-3, 3, 50, 4, torch.float64),
        )
    ):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(least, most + 1, (rows, width), generator=generator)
        yield x, torch.randint(rows // 5, (rows,), generator=generator), dtype


def integer_order(a: list[int], b: list[int], kind: str) -> Fraction:
    """What orders candidates b of a, in exact arithmetic: the squared distance, or -cos |cos| |a|^2."""
    if kind != "cosine":
        return Fraction(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    product, square = sum(x * y for x, y in zip(a, b, strict=True)), sum(y * y for y in b)
    return Fraction(-product * abs(product), square) if square else Fraction(0)


def check_integers(positive, negative, x, labels, kind, mining):
    """Are these the rows that integer arithmetic mines, the lowest of equals?"""
    rows, names = x.tolist(), labels.tolist()
    for a in range(len(rows)):
        d = [integer_order(rows[a], row, kind) for row in rows]
        p = [j for j in range(len(rows)) if names[j] == names[a] and j != a]
        n = [j for j in range(len(rows)) if names[j] != names[a]]
        expected = oracle.mine(d, p, n, mining) if p and n else (-1, -1)
        assert (positive[a], negative[a]) == expected, (x.shape, a)


def two_poles(rows: int) -> torch.Tensor:
    """Rows (N, 4) near one point and near another, in turn."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)) / 50
    x[::2, 0] += 1
    x[1::2, 0] -= 1
    return x


def batches_in_doubt(width):
    """Name to 300 rows (300, width) whose distances are equal or nearly so, in any units; and their labels."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(300, width, generator=generator)
    order = torch.stack([torch.randperm(width, generator=generator) for _ in x])
    far = x.clone()
    far[7] *= 1e6
    batches = {
        "permuted": x[0][order],
        "copies": x[torch.randint(60, (300,), generator=generator)],
        "collapsed": 1 + 1e-7 * x,
        "rounded": (x * 2).round() / 10,
        "an outlier": far,
        "denormal": x * 1e-40,
        "overflowing": x * 1e37,
        "doubles": (x * 2).round().double() / 10,
        "small doubles": (x * 2).round().double() / 10 * 2.0**-240,
        "large doubles": (x * 2).round().double() / 10 * 2.0**430,
        "bfloat16": x.bfloat16(),
    }
    return batches, torch.randint(60, (300,), generator=generator)
