"""Adapting a trained network before it is scored, as the published evaluation of Reptile does.

There, the network is trained on for 30 steps on the training images of one unseen class, and scored on the pairs and
triplets of that class; then it is put back and the next class comes. This is not one-shot recognition: 500 labelled
images of the class are used. evaluate.py reports it in a row of its own, for comparison with the published figures.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import metrics
import model
from data import Data, Images
from triplet import triplet_loss

STEPS, LEARNING_RATE, BATCH, MARGIN = 30, 1e-3, 128, 0.3  # the published settings, with cosine distance


def adapt(net: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int, lr: float) -> nn.Module:
    """A copy of `net` after `steps` steps of Adam, each on a new value of `loss(copy)`.

    Batch norm keeps its statistics: they are of many classes, the batches may be of few.
    """
    adapted = copy.deepcopy(net).eval().requires_grad_(True)
    optimizer = torch.optim.Adam(adapted.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(adapted).backward()
        optimizer.step()
    return adapted


def domain_loss(
    net: nn.Module, own: Images, rest: Images, pixels: tuple[list[float], list[float]], generator: torch.Generator
) -> Tensor:
    """The hinge of the triplets of BATCH random images of one class, `own`, with BATCH images of others as negatives.

    `pixels`: mean and standard deviation of the channels, on the scale 0..1.
    """
    anchors = own.images[torch.randperm(len(own), generator=generator)[:BATCH]]
    others = rest.images[torch.randint(len(rest), (BATCH,), generator=generator)]
    device = next(net.parameters()).device
    embeddings = net(model.normalise_pixels(torch.cat((anchors, others)).to(device), *pixels))
    label = (torch.arange(len(embeddings), device=device) >= len(anchors)).long()
    own_part, other_part = slice(len(anchors)), slice(len(anchors), None)
    negatives = embeddings[other_part], label[other_part]
    return triplet_loss(embeddings[own_part], label[own_part], MARGIN, mining="all", others=negatives)


def published_variant(
    net: nn.Module,
    data: Data,
    seen: list[int],
    unseen: list[int],
    pixels: tuple[list[float], list[float]],
    threshold: float,
    center: Tensor | None = None,
    seed: int = 0,
) -> dict:
    """Triplet and pair accuracy of each unseen class, the network adapted to it, and their means; in percent.

    Negatives of the adaptation are training images of the `seen` classes. Scored are the pairs of the unseen classes'
    test images that the class takes part in, and the triplets that have it as the anchor class. Intervals are by
    resampling the classes. `pixels` as in `domain_loss`. The same seed gives the same bits.
    """
    generator = torch.Generator().manual_seed(seed)
    rest, test = data.train.of(seen), data.test.of(unseen)
    rows = []
    for place, label in enumerate(sorted(unseen)):
        loss = partial(domain_loss, own=data.train.of([label]), rest=rest, pixels=pixels, generator=generator)
        adapted = adapt(net, loss, STEPS, LEARNING_RATE)
        z = metrics.normalise(model.embed(adapted, test.images, *pixels), center)
        triplets = metrics.triplet_table(z, test.labels).per_class()[place]
        pairs = metrics.pair_table(z, test.labels, threshold).per_class()[place]
        rows.append({"label": label, "triplet_accuracy": float(triplets), "pair_accuracy": float(pairs)})
    report = {"variant": f"{STEPS} steps on each unseen class's training images", "ci95": {}, "per_class": rows}
    for figure in ("triplet_accuracy", "pair_accuracy"):
        values = torch.tensor([row[figure] for row in rows], dtype=torch.float64)
        draws = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(seed))
        low, high = torch.quantile(values[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        report[figure], report["ci95"][figure] = float(values.mean()), (low, high)
    return report
