"""Embeddings made of several views, measured on classes that a network was not trained on.

    python benchmarks/views.py weights/classic-50-50.pt --data cifar100 --first 50 --last 89 --out results/views.json

Beside an image's own embedding z_0 stand those of the image turned by 90, 180 and 270 degrees, times `turned`, and the
standardised, pooled features of the second stage at length 1, times `stage2`. New: 60 test images of each of the
classes FIRST..LAST; seen: 30 of each class the network was trained on.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import cli
import data
import metrics
import model

WEIGHTS = [*itertools.product((0, 0.25, 0.35, 0.5, 0.7, 1), (0,)), *itertools.product((0, 0.35, 0.5), (0.3, 0.45))]


@torch.no_grad()
def features(net: model.Embedder, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Embeddings of each of four views at length 1, (N, D), and pooled features of stage 2, (N, C), of uint8 images."""
    pooled: list[Tensor] = []
    hook = net.layer2.register_forward_hook(lambda module, inputs, output: pooled.append(output.mean((2, 3))))
    views = [torch.cat([net(net.normalise(part.rot90(k, (2, 3)))) for part in images.split(250)]) for k in range(4)]
    hook.remove()
    upright = pooled[: len(pooled) // 4]  # of each batch two, with its mirror image
    means = [(image + mirrored) / 2 for image, mirrored in zip(upright[::2], upright[1::2], strict=True)]
    return [F.normalize(view) for view in views], torch.cat(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    net, saved = model.load(options.checkpoint)
    net.mirror, net.turned = True, 0.0
    loaded = data.load(options.data, "data", net.size)
    sides = {}
    for name, classes, most in (
        ("new", list(range(options.first, options.last + 1)), 60),
        ("seen", saved["data"]["seen"], 30),
    ):
        images = loaded.test.of(classes).part(torch.full((len(loaded.class_names),), most))[1]
        sides[name] = (*features(net, images.images), images.labels)
    mean, std = sides["seen"][1].mean(0), sides["seen"][1].std(0)
    rows = []
    for turned, stage2 in WEIGHTS:
        row = {"turned": turned, "stage2": stage2}
        for name, (views, pooled, labels) in sides.items():
            parts = [views[0]] + [turned * view for view in views[1:] if turned]
            parts += [stage2 * F.normalize((pooled - mean) / std)] if stage2 else []
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
