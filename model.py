"""The embedding networks.

CIFAR ResNets (He et al. 2015, arXiv:1512.03385, sec. 4.2), the ResNet-12 of few-shot learning, and the networks of
torchvision and timm, without a classifier: the embedding is the pooled feature vector. Parameters of CIFAR ResNets are
named as in the widely used code (conv1, bn1, layer1.0.conv1, ...; shortcut option A), those of the others as in theirs,
so that published weights load. A network owns the statistics that its pixels are normalised with.
"""

import difflib
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CENTRE_IMAGES = 2000  # enough for means of features
UNLIKE = ("googlenet", "inception_v3", "vit_h_14")  # torchvision builds these otherwise for their weights


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


class Embedder(nn.Module):
    """A network that maps images to embeddings."""

    classifier: Sequence[str] = ("linear", "fc", "classifier")  # layers that given weights may have, the network not
    dimension: int  # of the embedding
    settings: dict  # the arguments with which `build` makes it again
    size: int  # side of its images in pixels
    border: int  # pixels that a picture file loses at each side after it is scaled
    mirror = False  # in evaluation mode, average the embeddings of an image and of its mirror image
    turned = 0.0  # in evaluation mode, append those of turned and, without `mirror`, mirrored views, times this
    penultimate = 0.0  # in evaluation mode, append the features before a `ResNet`'s last block, times this
    frozen: Iterable[nn.Module] = ()

    def set_pixel_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Mean and standard deviation of each channel, on the scale 0..1, for `normalise`."""
        mean, std = torch.tensor([mean, std], device="cpu").view(2, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", mean / std, persistent=False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels, uint8 or float32 in 0..255 -> float32 (pixel / 255 - mean) / std."""
        return (pixels * self.scale).sub_(self.shift)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, dimension) embeddings, of any length, and in evaluation mode with
        `penultimate` what `join` takes."""
        raise NotImplementedError

    def centre(self, images: Tensor) -> None:
        """Measure what the network's features are centred by, on CENTRE_IMAGES or fewer of (N, 3, H, W) uint8."""
        raise NotImplementedError

    def join(self, features: Tensor) -> Tensor:
        """(B, D) of `embed`, or means over views: the last features at length 1 and the others at `penultimate`."""
        if self.training or not self.penultimate:
            return features
        last, before = features[:, : self.dimension], features[:, self.dimension :]
        return torch.cat([F.normalize(last), self.penultimate * F.normalize(before)], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, D): `embed` in training mode; else of all views.

        With `penultimate`, D also counts the features before the last block. With `turned`, it is 4 times as much, 8
        times without `mirror`. A network that learned turned classes as classes of their own sees other features in a
        turned image (as in the aggregated inference of Lee et al. 2020, arXiv:1910.05872).
        """
        if self.training or not (self.mirror or self.turned):
            return self.join(self.embed(x))
        views = [x.rot90(quarters, (2, 3)) for quarters in range(4 if self.turned else 1)]
        upright, mirrored = ([self.embed(view) for view in some] for some in (views, [view.flip(3) for view in views]))
        if self.mirror:
            upright, mirrored = [(a + b) / 2 for a, b in zip(upright, mirrored, strict=True)], []
        if not self.turned:
            return self.join(upright[0])
        first, *others = (F.normalize(self.join(features)) for features in upright + mirrored)
        return torch.cat([first, *(self.turned * z for z in others)], 1)

    def freeze(self, stages: int) -> None:
        """Never train the first `stages` stages again; their batch norm keeps its statistics. Raises ValueError.

        A stage is one of the `parts`, with the normalisation after it: a CIFAR ResNet's first is conv1 and bn1, a
        ResNet-12's is layer1.
        """
        found = parts(self, len(list(self.parameters())) // 2)
        starts = [place for place, part in enumerate(found) if any(each.ndim > 1 for each in part.parameters())]
        if not 0 <= stages < len(starts):
            raise ValueError(f"--freeze must be in 0..{len(starts) - 1} for this network, got {stages}")
        self.frozen = found[: starts[stages]] if stages else ()
        self.requires_grad_(not stages)
        for part in found[starts[stages] :]:
            part.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Embedder":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


def parts(module: nn.Module, most: int) -> list[nn.Module]:
    """The modules inside that images pass one after the other, as large as they come with at most `most` parameters."""
    count, children = len(list(module.parameters())), list(module.children())
    if count > most and children:
        return [part for child in children for part in parts(child, most)]
    return [module] if count else []


def to_centre(images: Tensor) -> Tensor:
    """CENTRE_IMAGES random images, or all if there are fewer, in random order; the same at every call."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CENTRE_IMAGES]]


class ResNet(Embedder):
    """What the ResNets for small images have in common: a stem, blocks, and the average over the pixels.

    The features before the last block know less of the training classes and more of others. Those of `penultimate` are
    standardised by their mean and standard deviation.
    """

    def __init__(self, dimension: int, before_last: int):
        """`dimension` features after the last block, `before_last` before it."""
        super().__init__()
        self.dimension = dimension
        self.register_buffer("penultimate_mean", torch.zeros(before_last))
        self.register_buffer("penultimate_std", torch.ones(before_last))

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for layer in self.children() if isinstance(layer, nn.Sequential) for block in layer]

    def stem(self, x: Tensor) -> Tensor:
        return x

    def embed(self, x: Tensor) -> Tensor:
        return self.finish(self.before_last(x), self.blocks[-1])

    def before_last(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> the last block's inputs (B, C, H', W')."""
        x = self.stem(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def finish(self, before: Tensor, last_block: nn.Module) -> Tensor:
        """The last block's inputs (B, C, H', W') -> what `embed` returns."""
        features = last_block(before).mean((2, 3))
        if self.training or not self.penultimate:
            return features
        return torch.cat([features, (before.mean((2, 3)) - self.penultimate_mean) / self.penultimate_std], 1)

    def centre(self, images: Tensor) -> None:
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            device = self.penultimate_mean.device
            parts = to_centre(images).split(250)
            before = torch.cat([self.before_last(self.normalise(part.to(device))).mean((2, 3)) for part in parts])
            self.penultimate_mean.copy_(before.mean(0))
            self.penultimate_std.copy_(before.std(0, correction=0).clamp(min=1e-6))
        self.train(was_training)


class CifarResNet(ResNet):
    """Three stages of `blocks` blocks, of `width`, 2 and 4 times as many channels; embeddings of 4 * width numbers."""

    def __init__(self, blocks: int, width: int = 16):
        super().__init__(4 * width, 4 * width)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, blocks, stride=1)
        self.layer2 = stage(width, 2 * width, blocks, stride=2)
        self.layer3 = stage(2 * width, 4 * width, blocks, stride=2)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


def stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


class Block12(nn.Module):
    """Three 3x3 convolutions beside a 1x1 convolution, then the largest of each 2x2 pixels."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), 0.1, inplace=True)
        out = F.leaky_relu(self.bn2(self.conv2(out)), 0.1, inplace=True)
        out = F.leaky_relu(self.bn3(self.conv3(out)) + self.downsample(x), 0.1, inplace=True)
        return F.max_pool2d(out, 2, ceil_mode=True)


class ResNet12(ResNet):
    """The usual network of few-shot learning (Lee et al. 2019, arXiv:1904.03758, sec. 4.1).

    Four blocks of `width`, 2.5, 5 and 10 times as many channels; embeddings of 10 * width numbers.
    """

    def __init__(self, width: int):
        super().__init__(10 * width, 5 * width)
        self.layer1 = nn.Sequential(Block12(3, width))
        self.layer2 = nn.Sequential(Block12(width, 5 * width // 2))
        self.layer3 = nn.Sequential(Block12(5 * width // 2, 5 * width))
        self.layer4 = nn.Sequential(Block12(5 * width, 10 * width))


RESNETS = {"resnet12": ResNet12} | {f"resnet{6 * blocks + 2}": partial(CifarResNet, blocks) for blocks in (3, 5, 7, 9)}


class LibraryNetwork(Embedder):
    """A network of torchvision or timm without its classifier: pooled features of length 1, less `mean_embedding`.

    Images of any size are scaled to `input_size` x `input_size` pixels, by the interpolation the network was made for.
    """

    def __init__(self, backbone: str, input_size: int):
        super().__init__()
        self.input_size, self.interpolation = input_size, made_for(backbone)["interpolation"]
        with torch.device("cpu"):  # not all of them can be made on the meta device
            self.body, self.classifier = library_network(backbone)
            try:
                with torch.no_grad():
                    features = self.body.eval()(torch.zeros(1, 3, input_size, input_size))
            except (AssertionError, RuntimeError, ValueError) as error:
                remedy = f"give --image-size {made_for(backbone)['input_size']}"
                raise ValueError(f"{backbone} cannot take {input_size} pixels ({error}); {remedy}") from error
            self.register_buffer("mean_embedding", torch.zeros_like(features[0]))
        self.dimension = features.shape[1]
        self.body.train()

    def embed(self, x: Tensor) -> Tensor:
        if x.shape[3] != self.input_size:
            x = F.interpolate(x, (self.input_size,) * 2, mode=self.interpolation, antialias=True)
        return F.normalize(self.body(x)) - self.mean_embedding

    def centre(self, images: Tensor) -> None:
        turned, self.turned = self.turned, 0.0
        self.mean_embedding.zero_()
        self.mean_embedding.copy_(embed(self, to_centre(images)).mean(0))
        self.turned = turned


# ------------------------------------------------------------------------------------------------------------- building


def made_for(backbone: str) -> dict:
    """What a network of torchvision or timm was made for: "input_size" in pixels, "interpolation" to it, "pixels" (mean
    and standard deviation), and the "url" of its weights. {} for one of RESNETS. Raises ValueError."""
    library, _, name = backbone.partition(":")
    if backbone in RESNETS:
        return {}
    if library == "timm":
        import timm

        known = [f"timm:{each}" for each in timm.list_models() + timm.list_pretrained()]
    else:
        from torchvision import models  # takes a second or two

        known = [*RESNETS, *(f"torchvision:{each}" for each in models.list_models(models, exclude=UNLIKE))]
    if backbone not in known:
        near = difflib.get_close_matches(backbone, known, 6, 0.5) or [*RESNETS, "torchvision:NAME", "timm:NAME"]
        raise ValueError(f"unknown backbone {backbone!r}; near ones: {', '.join(near)}")
    if library == "timm":
        made = timm.get_pretrained_cfg(name)
        found = {"input_size": made.input_size[1], "interpolation": made.interpolation}
        found["url"] = f"https://huggingface.co/{made.hf_hub_id}" if made.hf_hub_id else made.url
    else:
        weights = models.get_model_weights(name).DEFAULT
        made = weights.transforms()
        found = {"input_size": made.crop_size[0], "interpolation": made.interpolation.value, "url": weights.url}
    return found | {"pixels": (list(made.mean), list(made.std))}


def image_size(backbone: str, files: bool, given: int | None, usual: int | None = None) -> int:
    """Side in pixels to which picture files are scaled: as given, else the `usual` one, else what the network was made
    for. Raises ValueError if one is given though neither these images, without `files`, nor the network are scaled."""
    if given and not files and backbone in RESNETS:
        raise ValueError(f"{backbone} takes images that are no picture files as they are; leave --image-size out")
    return given or usual or made_for(backbone).get("input_size", 32)


def library_network(backbone: str, pretrained: bool = False) -> tuple[nn.Module, Sequence[str]]:
    """A network of torchvision or timm without its classifier, and the names of the layers left out."""
    library, name = backbone.split(":")
    if library == "timm":
        import timm

        net = timm.create_model(name, pretrained, num_classes=0)
        layers = net.pretrained_cfg["classifier"] or ()
        return net, [layers] if isinstance(layers, str) else layers
    from torchvision import models

    net = models.get_model(name, weights="DEFAULT" if pretrained else None)
    layers = [name for name, each in net.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    net.set_submodule(layers[-1], nn.Identity())
    return net, layers[-1:]


def pretrained_weights(backbone: str) -> dict[str, Tensor]:
    """The weights that torchvision or timm has, downloaded once into its cache. Raises ValueError where that fails."""
    try:
        return library_network(backbone, pretrained=True)[0].state_dict()
    except Exception as error:  # each library has errors of its own for a network that fails
        raise ValueError(
            f"cannot download the weights of {backbone}: {error}\nWithout a network, fetch {made_for(backbone)['url']} "
            "elsewhere and give --weights FILE instead of --pretrained."
        ) from error


def build(
    backbone: str,
    width: int = 16,
    input_size: int | None = None,
    mirror: bool = False,
    turned: float = 0.0,
    penultimate: float = 0.0,
    size: int = 32,
    border: int = 0,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Embedder:
    """A network by name, randomly initialised and stored channels last. Raises ValueError.

    `width` and `penultimate` are for RESNETS, `input_size` is for the others; `mirror`, `turned`, `penultimate`,
    `size` and `border` are those of `Embedder`; `mean` and `std` are of the training images' channels, on the scale
    0..1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if backbone in RESNETS:
        net, own = RESNETS[backbone](width), {"width": width}
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # whose numbers PyTorch's compiler makes
                nn.init.kaiming_normal_(module.weight)
        net.penultimate = penultimate
        own |= {"penultimate": penultimate} if penultimate else {}
    else:
        input_size = input_size or made_for(backbone)["input_size"]
        net, own = LibraryNetwork(backbone, input_size), {"input_size": input_size}
    net.mirror, net.turned, net.size, net.border = mirror, turned, size, border
    net.set_pixel_statistics(mean, std)
    views = {"mirror": mirror, "turned": turned}
    net.settings = {"backbone": backbone} | own | views | {"size": size, "mean": list(mean), "std": list(std)}
    net.settings |= {"border": border} if border else {}
    return net.to(memory_format=torch.channels_last)


def count(net: nn.Module, side: int) -> tuple[int, int]:
    """(parameters, multiply-adds of convolutions and linear layers for one image of `side` x `side` pixels)."""
    multiply_adds = 0

    def add(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal multiply_adds
        if isinstance(module, nn.Conv2d | nn.Linear):
            multiply_adds += output.numel() * module.weight[0].numel()

    parameter = next(net.parameters())
    was_training = net.training
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(add):
        net.eval().embed(parameter.new_zeros(1, 3, side, side))
    net.train(was_training)
    return sum(parameter.numel() for parameter in net.parameters()), multiply_adds


# ----------------------------------------------------------------------------------------------------------- embeddings


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is the GPU, NVIDIA's or Apple's, if there is one. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


class PixelEmbedder(nn.Module):
    """(B, 3, size, size) pixels, uint8 or float32 in 0..255 -> (B, D) float32 embeddings of length 1."""

    def __init__(self, net: Embedder):
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.net(self.net.normalise(pixels)))


@torch.inference_mode()
def embed(net: Embedder, images: Tensor, batch: int = 250) -> Tensor:
    """Embed (N, 3, H, W) uint8 images, or `data.Images`, in evaluation mode: (N, D) float32, whatever the precision of
    the training.

    The images go to the network's device; the network's training mode is restored.
    """
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    parts = [net(net.normalise(part.to(device))).float().cpu() for part in images.split(batch)]
    net.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def refresh_batch_norm(net: Embedder, batches: Iterable[Tensor]) -> None:
    """Replace batch norm's running statistics by averages over normalised images, batches of (B, 3, H, W) float32.

    The statistics then belong to the weights in `net` now, whatever weights the last forward passes had (as for
    averaged weights: Izmailov et al. 2018, arXiv:1803.05407, sec. 3.2). Frozen ones stay.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.weight.requires_grad]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    was_training, device = net.training, next(net.parameters()).device
    net.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # for dropout
        torch.manual_seed(0)
        for batch in batches:
            net(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.train(was_training)
