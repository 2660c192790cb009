"""The triplet loss in plain Python, float64 and loops: what the implementations are held against.

It shares no code with them; its gradients are written out triplet by triplet.
"""

import math


def norm(row):
    return max(math.sqrt(math.fsum(value * value for value in row)), 1e-12)


def distance(a, b, kind):
    """Distance of two rows (lists of floats)."""
    if kind == "cosine":
        return 1 - math.fsum(x / norm(a) * (y / norm(b)) for x, y in zip(a, b, strict=True))
    squared = math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return math.sqrt(squared) if kind == "euclidean" else squared


def distance_gradient(a, b, kind):
    """Derivative of distance(a, b) by a, as a list."""
    if kind == "cosine":
        if not any(a):
            return [0.0] * len(a)
        length, cosine = norm(a), 1 - distance(a, b, kind)
        return [-(y / norm(b) - cosine * x / length) / length for x, y in zip(a, b, strict=True)]
    if kind == "sqeuclidean":
        return [2 * (x - y) for x, y in zip(a, b, strict=True)]
    apart = distance(a, b, kind)
    return [(x - y) / apart if apart else 0.0 for x, y in zip(a, b, strict=True)]


def cost(gap, margin, soft, temperature):
    """Loss of a triplet and its derivative, of gap = d_ap - d_an."""
    if not soft:
        return (gap + margin, 1.0) if gap + margin > 0 else (0.0, 0.0)
    x = gap / temperature
    loss = x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))
    slope = 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
    return loss, slope / temperature


def mine(distances, positives, negatives, mining):
    """Row of the mined positive and negative of one anchor."""
    positive = min(positives, key=lambda j: (-distances[j], j))
    farther = [j for j in negatives if distances[j] > distances[positive]]
    if mining == "semihard" and not farther:
        return positive, min(negatives, key=lambda j: (-distances[j], j))
    return positive, min(farther if mining == "semihard" else negatives, key=lambda j: (distances[j], j))


def triplet_loss(rows, labels, n_anchors, kind, mining, margin, soft, temperature, given=None):
    """Loss of each anchor, count of what a mean is over, triplets (a, p, n), and gradient of the *sum* of weight * loss
    as a function: gradient(weight of each anchor) -> list of rows.

    `rows`, `labels` are all candidates, the first `n_anchors` the anchors. `given` fixes the mined (positive, negative)
    rows instead of mining them.
    """
    losses, count, triplets = [], 0, []
    for a in range(n_anchors):
        positives = [j for j in range(len(rows)) if labels[j] == labels[a] and j != a]
        negatives = [j for j in range(len(rows)) if labels[j] != labels[a]]
        losses.append(0.0)
        if not positives or not negatives:
            continue
        distances = [distance(rows[a], row, kind) for row in rows]
        if mining == "all":
            chosen = [(p, n) for p in positives for n in negatives]
        else:
            chosen = [given[a] if given else mine(distances, positives, negatives, mining)]
            count += 1
        for p, n in chosen:
            loss, slope = cost(distances[p] - distances[n], margin, soft, temperature)
            losses[a] += loss
            triplets.append((a, p, n, slope))
            count += mining == "all" and (soft or loss > 0)

    def gradient(weights):
        total = [[0.0] * len(rows[0]) for _ in rows]
        for a, p, n, slope in triplets:
            for other, sign in ((p, 1), (n, -1)):
                for row, partner in ((a, other), (other, a)):
                    step = distance_gradient(rows[row], rows[partner], kind)
                    for k, value in enumerate(step):
                        total[row][k] += weights[a] * slope * sign * value
        return total

    return losses, count, gradient
