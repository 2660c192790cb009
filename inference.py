"""A trained network as one module, pixels in and embeddings out: what predict.py uses and export.py writes."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
import model


class Inference(nn.Module):
    """(B, 3, size, size) pixels, uint8 or float32 in 0..255 -> (B, D) float32 rows of length 1.

    Pixel normalisation, network, centring (where the checkpoint has a centre) and normalisation, in evaluation mode.
    """

    def __init__(self, net: nn.Module, size: int, mean: list[float], std: list[float], center: Tensor | None = None):
        super().__init__()
        self.net, self.size = net, size
        deviation = torch.tensor(std).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviation))
        self.register_buffer("shift", torch.tensor(mean).view(3, 1, 1) / deviation)
        self.register_buffer("center", center)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.net(images.float() * self.scale - self.shift)
        return F.normalize(embeddings if self.center is None else embeddings - self.center)


def load(path: str | os.PathLike) -> tuple[Inference, dict]:
    """The network of a checkpoint of the training scripts, and the checkpoint. Raises ValueError or OSError."""
    saved = engine.load_checkpoint(path)
    if not {"model", "options", "data", "threshold"} <= saved.keys():
        raise ValueError(f"{path} is not a checkpoint of train_classic.py or train_reptile.py")
    facts, threshold = saved["data"], saved["threshold"]
    if threshold is None or "logistic" not in threshold or "size" not in facts or "network" not in saved:
        raise ValueError(f"{path} lacks a calibration: `python evaluate.py {path} --store` adds it")
    net = model.build(**saved["network"])
    model.load_weights(net, saved["model"])
    return Inference(net, facts["size"], facts["mean"], facts["std"], saved["center"]), saved
