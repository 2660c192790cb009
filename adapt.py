"""Adapting a trained network before it is scored.

`SupportAdaptation` is one-shot adaptation, what Reptile trains for: the last block of the network is trained for a few
steps on augmented views of an episode's support images, with the triplet loss of its training, and then classifies the
queries, each alone. Batch norm keeps its running statistics.

`published_variant` is the published evaluation of Reptile: for each unseen class a copy of the whole network is trained
for 30 steps on the class's training images, and scored on the pairs and triplets of that class. This is not one-shot
recognition: 500 labelled images of the class are used. evaluate.py reports it in a row of its own, for comparison with
the published figures. The published learning rate is 0.001.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metrics
import model
from data import Data, Images, augment
from triplet import triplet_loss

STEPS, BATCH, MARGIN = 30, 128, 0.3  # the published settings, with cosine distance
EPISODES = 600  # episodes in which one-shot adaptation is scored
VIEWS = 8  # augmented views of each support image, from which each step draws
VIEWS_A_STEP = 4  # views of each class in a step


def adapt(net: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int, lr: float, beta1: float = 0.9) -> nn.Module:
    """A copy of `net` after `steps` steps of Adam, each on a new value of `loss(copy)`.

    Batch norm keeps its statistics, which come from many classes; these batches may have few.
    """
    adapted = copy.deepcopy(net).eval().requires_grad_(True)
    optimizer = torch.optim.Adam(adapted.parameters(), lr, betas=(beta1, 0.999))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(adapted).backward()
        optimizer.step()
    return adapted


# ------------------------------------------------------------------------------------------------- on support images


@dataclass(frozen=True)
class SupportAdaptation:
    """Adaptation of a network to the support images of an episode: only its last block learns.

    The output of the frozen part, for each image and each augmented view, is computed once for all episodes.
    """

    net: model.ResNet  # in evaluation mode
    loss: dict  # keyword arguments of triplet_loss
    steps: int
    lr: float
    flip: bool = True  # augmented views may be mirror images

    @torch.no_grad()
    def block_inputs(self, images: Tensor, batch: int = 250) -> Tensor:
        """The last block's inputs for (N, 3, H, W) uint8 images: (N, C, H', W'), on the network's device."""
        net = self.net
        return torch.cat([net.before_last(net.normalise(part.to(net.scale.device))) for part in images.split(batch)])

    def answers(self, pictures: Images, episodes: Tensor, shot: int, seed: int = 0) -> Tensor:
        """The class, 0..way-1, given to each query without and with adaptation: (2, E, way, queries).

        `episodes` (E, way, shot + queries) as from `metrics.draw_episodes`. The same seed gives the same answers.
        """
        generator = torch.Generator().manual_seed(seed)
        block = copy.deepcopy(self.net.blocks[-1]).eval()
        sides = (pictures.images, pictures.images.flip(3)) if self.net.mirror else (pictures.images,)
        inputs = torch.stack([self.block_inputs(side) for side in sides], 1)  # (N, 1 or 2, C, H', W')
        supports, place = episodes[:, :, :shot].unique(return_inverse=True)  # (S,), (E, way, shot)
        shown = augment(pictures.pixels(supports.repeat_interleave(VIEWS)), generator, flip=self.flip)
        views = self.block_inputs(shown)
        rows = (place[..., None] * VIEWS + torch.arange(VIEWS)).flatten(2)  # of `views`: (E, way, shot * VIEWS)
        own = torch.arange(episodes[0].numel()).view(1, *episodes.shape[1:])  # one episode, as rows of its own images
        found = []
        for images, own_rows in zip(episodes, rows, strict=True):
            loss = partial(support_loss, views=views, rows=own_rows, generator=generator, loss=self.loss)
            adapted = adapt(block, loss, self.steps, self.lr, beta1=0.0)
            z = self.embed(adapted, inputs[images.flatten().to(inputs.device)])
            found.append(metrics.classify(z, own, shot))
        before = torch.cat([self.embed(block, part) for part in inputs.split(250)])
        return torch.stack((metrics.classify(before, episodes, shot), torch.cat(found)))

    @torch.no_grad()
    def embed(self, block: nn.Module, inputs: Tensor) -> Tensor:
        """Normalised embeddings (N, D) of the block's `inputs` (N, M, C, H', W'), the mean of M views of each image."""
        features = self.net.finish(inputs.flatten(0, 1), block).unflatten(0, inputs.shape[:2]).mean(1)
        return F.normalize(self.net.join(features).cpu())

    def report(self, pictures: Images, seed: int = 0) -> dict:
        """Few-shot accuracy in percent without adaptation (zero_steps) and with it, on the same EPISODES episodes.

        With halves of 95 % intervals, and the paired difference in points with its interval, (low, high). Settings of
        metrics.FEW_SHOT with too few images or classes are null; that of all classes is left out.
        """
        ways = {name: setting for name, setting in metrics.FEW_SHOT.items() if setting[0]}
        few_shot = dict.fromkeys(ways)
        for name, (way, shot) in ways.items():
            drawn = [images for _, images in metrics.draw_episodes(pictures.labels, way, shot, episodes=EPISODES)]
            if drawn:
                right = self.answers(pictures, torch.cat(drawn), shot, seed) == torch.arange(way)[:, None]
                few_shot[name] = gain(*100 * right.double().mean((2, 3)))
        return {"steps": self.steps, "lr": self.lr, "episodes": EPISODES, "few_shot": few_shot}


def check_pictures(labels: Tensor) -> None:
    """Raise ValueError unless episodes of 5 classes and 1 support image can be drawn from images of these labels."""
    counts = labels.unique(return_counts=True)[1].tolist()
    if len(counts) < 5 or min(counts) < 2:
        found = f"there are {len(counts)}" + (f", the smallest with {min(counts)}" if counts else "")
        needed = "5 or more unseen classes with 2 or more images each to be scored on"
        raise ValueError(f"--adapt-steps needs {needed}; {found}")


def support_loss(block: nn.Module, views: Tensor, rows: Tensor, generator: torch.Generator, loss: dict) -> Tensor:
    """The triplet loss of VIEWS_A_STEP random views of each class.

    `views` (V, C, H, W): inputs of the block; `rows` (way, n): those of each class; `loss`: arguments of triplet_loss.
    """
    chance = torch.rand(rows.shape, generator=generator)
    chosen = rows.gather(1, chance.topk(VIEWS_A_STEP).indices).flatten().to(views.device)
    label = torch.arange(len(rows), device=views.device).repeat_interleave(VIEWS_A_STEP)
    return triplet_loss(block(views[chosen]).mean((2, 3)), label, **loss)


def gain(before: Tensor, after: Tensor) -> dict:
    """Means and intervals of the accuracies (E,) of the same episodes without adaptation and with it."""
    (zero, zero_half), (accuracy, half) = metrics.mean_interval(before), metrics.mean_interval(after)
    difference, spread = metrics.mean_interval(after - before)
    return {
        "zero_steps": {"accuracy": zero, "ci95": zero_half},
        "adapted": {"accuracy": accuracy, "ci95": half},
        "difference": {"difference": difference, "ci95": (difference - spread, difference + spread)},
    }


# ------------------------------------------------------------------------------------------------- published variant


def domain_loss(net: model.Embedder, own: Images, rest: Images, generator: torch.Generator) -> Tensor:
    """The hinge loss of the triplets of BATCH random images of one class, `own`, and BATCH negatives from `rest`."""
    anchors = own.pixels(torch.randperm(len(own), generator=generator)[:BATCH])
    others = rest.pixels(torch.randint(len(rest), (BATCH,), generator=generator))
    device = next(net.parameters()).device
    z = net.join(net.embed(net.normalise(torch.cat((anchors, others)).to(device))))
    label = (torch.arange(len(z), device=device) >= len(anchors)).long()
    negatives = z[len(anchors) :], label[len(anchors) :]
    return triplet_loss(z[: len(anchors)], label[: len(anchors)], MARGIN, mining="all", others=negatives)


def published_variant(
    net: model.Embedder, data: Data, seen: list[int], unseen: list[int], threshold: float, lr: float, seed: int = 0
) -> dict:
    """Triplet and pair accuracy of each unseen class, the network adapted to it, and their means; in percent.

    Negatives of the adaptation are training images of the `seen` classes. Scored are the pairs of the unseen classes'
    test images that the class takes part in, and the triplets that have it as the anchor class. Intervals are by
    resampling the classes. `lr` is Adam's. The same seed gives the same bits.
    """
    generator = torch.Generator().manual_seed(seed)
    rest, test = data.train.of(seen), data.test.of(unseen)
    rows = []
    for place, label in enumerate(sorted(unseen)):
        loss = partial(domain_loss, own=data.train.of([label]), rest=rest, generator=generator)
        z = F.normalize(model.embed(adapt(net, loss, STEPS, lr), test))
        if not z.isfinite().all():
            raise ValueError(f"--adapt-lr {lr:g} is too high: the adapted network is not finite")
        found = metrics.accuracies(z, test.labels, threshold)
        rows.append({"label": label} | {name: float(accuracy.per_class[place]) for name, accuracy in found.items()})
    variant = f"{STEPS} steps (learning rate {lr:g}) on each unseen class's training images"
    report = {"variant": variant, "ci95": {}, "per_class": rows}
    weight = metrics.resample(test.labels, seed=seed).double()
    for figure in ("triplet_accuracy", "pair_accuracy"):
        values = torch.tensor([row[figure] for row in rows], dtype=torch.float64)
        known = ~values.isnan()  # a class of one image has no figure
        report["ci95"][figure] = metrics.interval(weight[:, known] @ values[known] / weight[:, known].sum(1))
        report[figure] = float(values[known].mean())
    return report
