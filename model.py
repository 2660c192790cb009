"""The embedding network: CIFAR ResNets (He et al. 2015, arXiv:1512.03385, sec. 4.2) without a classifier.

Parameter names are those of the widely used CIFAR ResNet code (conv1, bn1, layer1.0.conv1, ...; shortcut option A), so
that published weights of that family load. The embedding is the pooled feature vector, 64 numbers at width 16.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}  # blocks in each of the three stages


class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A: subsample, pad the new channels with zeros)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if out.shape != x.shape:
            x = x[:, :, :: self.conv1.stride[0], :: self.conv1.stride[1]]
            new = out.shape[1] - x.shape[1]
            x = F.pad(x, (0, 0, 0, 0, new // 2, new - new // 2))
        return F.relu(out + x, inplace=True)


class ResNet(nn.Module):
    """(B, 3, H, W) normalised images -> (B, 4 * width) embeddings, not normalised."""

    def __init__(self, blocks: int, width: int = 16):
        super().__init__()
        self.dimension = 4 * width
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, blocks, stride=1)
        self.layer2 = stage(width, 2 * width, blocks, stride=2)
        self.layer3 = stage(2 * width, 4 * width, blocks, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


def stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


class NormalisedSoftmax(nn.Module):
    """Cross-entropy over scaled cosines between embeddings and one learned direction a class.

    NormFace (Wang et al. 2017, arXiv:1704.06369, eq. 5); used beside the triplet loss and thrown away after training.
    """

    def __init__(self, n_classes: int, dimension: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_classes, dimension) / math.sqrt(dimension))
        self.scale = scale

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """`embeddings` (B, D), `target` (B,) int64 in 0..n_classes-1 -> scalar loss."""
        cosine = F.normalize(embeddings.float()) @ F.normalize(self.weight).T
        return F.cross_entropy(self.scale * cosine, target)


def build(backbone: str, width: int = 16) -> ResNet:
    """A network by name, randomly initialised and stored channels last. Raises ValueError."""
    if backbone not in DEPTHS:
        raise ValueError(f"unknown backbone {backbone!r}: choose from {', '.join(DEPTHS)}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return ResNet(DEPTHS[backbone], width).to(memory_format=torch.channels_last)


def load_weights(net: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Load a state dict of ours or of the CIFAR ResNet family into `net`; return the names that were left out.

    A "module." prefix (DataParallel) is dropped and a classifier (linear.*, fc.*) left out. Raises ValueError if
    anything else is missing, left over or of another shape.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    ignored = [name for name in state if name.split(".")[0] in ("linear", "fc")]
    for name in ignored:
        del state[name]
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit this network (wrong --backbone or --width?): {error}") from error
    return ignored


def normalise_pixels(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 (pixel / 255 - mean) / std, in one multiplication and one addition."""
    std = torch.tensor(std, device=images.device)
    shift = torch.tensor(mean, device=images.device) / std
    return images.float().mul_((1 / (255 * std)).view(3, 1, 1)).sub_(shift.view(3, 1, 1))


@torch.inference_mode()
def embed(net: nn.Module, images: Tensor, mean: list[float], std: list[float], batch: int = 250) -> Tensor:
    """Embed (N, 3, H, W) uint8 images in evaluation mode, in float32 whatever the training precision: (N, D) float32.

    The images go to the network's device; the network's training mode is restored.
    """
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    parts = [net(normalise_pixels(part.to(device), mean, std)).float().cpu() for part in images.split(batch)]
    net.train(was_training)
    return torch.cat(parts)
