"""The triplet loss in plain PyTorch: what triplet.py falls back on, and what the native op is held against.

It says the same as the native op and is the one to read first, but holds the (B, B) matrix of distances.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Settings(NamedTuple):
    """How a loss is computed; `triplet.triplet_loss` explains each."""

    distance: str
    mining: str
    soft_margin: bool
    margin: float
    temperature: float
    reduction: str


def loss(embeddings: Tensor, labels: Tensor, others: tuple[Tensor, Tensor] | None, settings: Settings) -> Tensor:
    """`triplet.triplet_loss` of checked arguments."""
    losses, count = losses_and_counts(embeddings, labels, others, settings)
    if settings.reduction == "mean":
        return losses.sum() / count.sum().clamp(min=1)
    return losses.sum() if settings.reduction == "sum" else losses


def mine(
    embeddings: Tensor, labels: Tensor, others: tuple[Tensor, Tensor] | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Rows (B,) of the mined positives and negatives, -1 in both where an anchor takes no part."""
    return mined_rows(*prepare(embeddings, labels, others, settings), settings)


def prepare(
    embeddings: Tensor, labels: Tensor, others: tuple[Tensor, Tensor] | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates (B + M, D) in the type of the arithmetic, normalised for cosine, and two masks (B, B + M): who is
    whose positive, who is whose negative. A non-finite value anywhere makes all candidates NaN."""
    rows = len(embeddings)
    if others is not None:
        embeddings, labels = torch.cat((embeddings, others[0])), torch.cat((labels.long(), others[1].long()))
    x = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    finite = x.detach().isfinite().all()
    x = x * torch.where(finite, 1.0, torch.nan).to(x.dtype)
    if settings.distance == "cosine":
        least = 1e-12
        if x.dtype == torch.float64:  # squares overflow from 1e154
            largest = x.detach().abs().amax(1, keepdim=True).clamp(min=least)
            x, least = x / largest, least / largest
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)  # float32 would overflow from 1e18
        x = torch.where(norm == 0, 0, x / norm.clamp(min=least)).to(x.dtype)
    same = labels[:rows, None] == labels
    itself = torch.arange(len(x), device=x.device) == torch.arange(rows, device=x.device)[:, None]
    return x, same & ~itself, ~same


def losses_and_counts(
    embeddings: Tensor, labels: Tensor, others: tuple[Tensor, Tensor] | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The loss of each anchor (B,) and how many anchors or triplets it stands for in the mean (B,)."""
    with torch.autocast(embeddings.device.type, enabled=False):
        x, positives, negatives = prepare(embeddings, labels, others, settings)
        if settings.mining == "all":
            losses, count = losses_of_all(x, positives, negatives, settings)
        else:
            positive, negative = mined_rows(x, positives, negatives, settings)
            takes_part, anchor = positive >= 0, x[: len(positives)]
            gap = separation(anchor, x[positive.clamp(min=0)], settings.distance) - separation(
                anchor, x[negative.clamp(min=0)], settings.distance
            )
            losses, count = torch.where(takes_part, cost(gap, settings), 0), takes_part.long()
        return losses + 0 * x.detach().sum(), count  # NaN also where no anchor takes part


def separation(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """Distances (B,) of paired rows (B, D), by differences where there are any."""
    if distance == "cosine":
        return 1 - (a * b).sum(1)
    squared = (a - b).square().sum(1)
    if distance == "sqeuclidean":
        return squared
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def cost(gap: Tensor, settings: Settings) -> Tensor:
    """The loss of triplets with these d_ap - d_an."""
    if settings.soft_margin:
        return F.softplus(gap / settings.temperature, threshold=40)
    return F.relu(gap + settings.margin)


@torch.no_grad()
def mined_rows(x: Tensor, positives: Tensor, negatives: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """`mine` from what `prepare` made. Needs only the order of the distances, not themselves."""
    rows = len(positives)
    if settings.distance == "cosine":
        order = -(x[:rows] @ x.T)
    else:  # |a|^2 + |b|^2 - 2ab cancels unless the rows are centred; scaled, it cannot overflow
        x = x - x.mean(0)
        x = x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
        squares = x.square().sum(1)
        order = squares[:rows, None] + squares - 2 * (x[:rows] @ x.T)
    hardest, positive = torch.where(positives, order, -torch.inf).max(1, keepdim=True)
    nearest = torch.where(negatives, order, torch.inf)
    if settings.mining == "semihard":
        farther = negatives & (order > hardest)
        beyond = torch.where(farther, order, torch.inf)
        farthest = torch.where(negatives, order, -torch.inf).argmax(1)
        negative = torch.where(farther.any(1), beyond.argmin(1), farthest)
    else:
        negative = nearest.argmin(1)
    takes_part = positives.any(1) & negatives.any(1)
    return torch.where(takes_part, positive[:, 0], -1), torch.where(takes_part, negative, -1)


def losses_of_all(x: Tensor, positives: Tensor, negatives: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Summed loss (B,) of all triplets of each anchor, and how many of them count in the mean (B,)."""
    rows = len(positives)
    if settings.distance == "cosine":
        distances = 1 - x[:rows] @ x.T
    else:
        distances = torch.cdist(x[:rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.square() if settings.distance == "sqeuclidean" else distances

    def of_pairs(distances: Tensor, anchor: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and count of the triplets of each pair (anchor, positive): (pairs,) each."""
        gap = distances[anchor, positive][:, None] - distances[anchor]
        losses = torch.where(negatives[anchor], cost(gap, settings), 0)
        return losses.sum(1), (losses > 0).sum(1)

    if torch.compiler.is_compiling():  # no shapes that depend on data
        gap = distances[:, :, None] - distances[:, None, :]
        losses = torch.where(positives[:, :, None] & negatives[:, None, :], cost(gap, settings), 0)
        summed, count = losses.sum((1, 2)), (losses > 0).sum((1, 2))
    else:
        summed, count = distances.new_zeros(rows), torch.zeros(rows, dtype=torch.int64, device=x.device)
        anchors, partners = positives.nonzero(as_tuple=True)
        at_once = max(1, 2**24 // max(1, x.shape[0]))  # pairs whose triplets are held at a time
        for anchor, positive in zip(anchors.split(at_once), partners.split(at_once), strict=True):
            if len(anchors) > at_once:  # recompute in the backward pass, to hold one part only
                losses, counts = checkpoint(of_pairs, distances, anchor, positive, use_reentrant=False)
            else:
                losses, counts = of_pairs(distances, anchor, positive)
            summed, count = summed.index_add(0, anchor, losses), count.index_add(0, anchor, counts)
    if settings.soft_margin:
        count = positives.sum(1) * negatives.sum(1)
    return summed, count
