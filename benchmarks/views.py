"""Embeddings made of several parts, measured on classes that a network was not trained on.

    python benchmarks/views.py weights/classic-50-50.pt --data cifar100 --first 50 --last 89 --out results/views.json

Beside an image's own embedding z_0 stand those of the image turned by 90, 180 and 270 degrees, times `turned`, and the
standardised, pooled features after one of the blocks before the last at length 1, times `weight`. New: 60 test images
of each of the classes FIRST..LAST; seen: 30 of each class the network was trained on.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoints
import cli
import data
import metrics
import model

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)][:-1]  # of a ResNet-20
LAST = BLOCKS[-1]
PARTS = [(turned, LAST, 0) for turned in (0, 0.25, 0.35, 0.5, 0.7, 1)]
PARTS += [(0, block, 0.4) for block in BLOCKS] + [(0, LAST, weight) for weight in (0.3, 0.5, 0.6, 0.8)]
PARTS += [(0.35, LAST, 0.5), (0.5, LAST, 0.5)]


@torch.no_grad()
def features(net: model.ResNet, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of uint8 images: embeddings of each of four views at length 1, (N, D), and pooled features of blocks, (N, C)."""
    pooled: dict[str, list[Tensor]] = {block: [] for block in BLOCKS}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: pooled[name].append(output.mean((2, 3)))

    hooks = [net.get_submodule(block).register_forward_hook(keep(block)) for block in BLOCKS]
    upright = torch.cat([net(net.normalise(part)) for part in images.split(250)])
    for hook in hooks:
        hook.remove()
    turned = [torch.cat([net(net.normalise(part.rot90(k, (2, 3)))) for part in images.split(250)]) for k in (1, 2, 3)]
    means = {  # of each batch and its mirror image
        block: torch.cat([(image + mirrored) / 2 for image, mirrored in zip(each[::2], each[1::2], strict=True)])
        for block, each in pooled.items()
    }
    return [F.normalize(view) for view in (upright, *turned)], means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    net, saved = checkpoints.load(options.checkpoint)
    net.mirror, net.turned, net.penultimate = True, 0.0, 0.0
    loaded = data.load(options.data, "data", net.size)
    sides = {}
    for name, classes, most in (
        ("new", list(range(options.first, options.last + 1)), 60),
        ("seen", saved["data"]["seen"], 30),
    ):
        images = loaded.test.of(classes).part(torch.full((len(loaded.class_names),), most))[1]
        sides[name] = (*features(net, images.images), images.labels)
    rows = []
    for turned, block, weight in PARTS:
        row = {"turned": turned, "block": block, "weight": weight}
        known = sides["seen"][1][block]
        mean, std = known.mean(0), known.std(0)
        for name, (views, pooled, labels) in sides.items():
            parts = [views[0]] + [turned * view for view in views[1:] if turned]
            parts += [weight * F.normalize((pooled[block] - mean) / std)] if weight else []
            z = F.normalize(torch.cat(parts, 1))
            row[name] = {"triplets": metrics.accuracies(z, labels, 0.0)["triplet_accuracy"].value}
            row[name]["pairs_oracle"] = metrics.roc(z, labels).best()[0]
            for episodes, (way, shot) in {"5w1s": (5, 1), "5w5s": (5, 5), "10w1s": (10, 1)}.items():
                if name == "new":
                    row[name][episodes] = float(metrics.episode_accuracies(z, labels, way, shot, episodes=4000).mean())
        rows.append(row)
        print(json.dumps(row), flush=True)
    report = {"checkpoint": Path(options.checkpoint).name, "classes": [options.first, options.last], "rows": rows}
    cli.write_json(options.out, report)


if __name__ == "__main__":
    main()
