"""model.py: the networks' shape, names and arithmetic, loading of published weights, embedding."""

import pytest
import torch
import torch.nn.functional as F

import model


@pytest.mark.parametrize(
    ("backbone", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)]
)
def test_parameter_counts_are_those_of_the_paper(backbone, millions):
    """He et al. 2015, table 6; the paper's counts include a classifier of 10 classes."""
    count = sum(parameter.numel() for parameter in model.build(backbone).parameters()) + 64 * 10 + 10
    assert round(count / 1e6, 2) == millions


def test_parameter_names_are_the_familys():
    names = set(model.build("resnet20").state_dict())
    expected = {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "layer2.0.bn1.weight"}
    assert expected <= names
    assert not [name for name in names if "shortcut" in name or "linear" in name]


def reference(state: dict, x: torch.Tensor, blocks: int) -> torch.Tensor:
    """The network in evaluation mode, written from its parameters alone."""

    def conv_bn(x, conv, bn, stride):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
        scale = state[f"{bn}.weight"] / (var + 1e-5).sqrt()
        return x * scale[:, None, None] + (state[f"{bn}.bias"] - mean * scale)[:, None, None]

    x = conv_bn(x, "conv1", "bn1", 1).relu()
    for layer in (1, 2, 3):
        for block in range(blocks):
            stride = 2 if layer > 1 and block == 0 else 1
            name = f"layer{layer}.{block}"
            out = conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            out = conv_bn(out, f"{name}.conv2", f"{name}.bn2", 1)
            if stride == 2:  # option A: every other pixel, new channels zero on both sides
                shortcut = torch.zeros_like(out)
                quarter = out.shape[1] // 4
                shortcut[:, quarter : 3 * quarter] = x[:, :, ::2, ::2]
                x = shortcut
            x = (out + x).relu()
    return x.flatten(2).mean(2)


def test_forward_agrees_with_a_reference():
    net = model.build("resnet20", width=4).double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(net.eval()(images), reference(net.state_dict(), images, 3))


def test_published_weights_load():
    net = model.build("resnet20")
    state = {
        f"module.{name}": torch.randn_like(t) if t.is_floating_point() else t for name, t in net.state_dict().items()
    }
    state |= {"module.linear.weight": torch.zeros(10, 64), "module.linear.bias": torch.zeros(10)}
    assert model.load_weights(net, state) == ["linear.weight", "linear.bias"]
    assert torch.equal(net.layer3[1].conv2.weight, state["module.layer3.1.conv2.weight"])
    with pytest.raises(ValueError, match="wrong --backbone or --width"):
        model.load_weights(model.build("resnet32"), state)
    del state["module.conv1.weight"]
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        model.load_weights(net, state)


def test_embed_needs_no_training_mode_and_does_not_depend_on_the_batch():
    net = model.build("resnet20", width=4).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]
    whole = model.embed(net, images, mean, std)
    assert net.training and whole.shape == (9, 16) and whole.dtype == torch.float32
    assert torch.allclose(whole, model.embed(net, images, mean, std, batch=2), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    pixels = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(model.normalise_pixels(images, mean, std), pixels, atol=1e-5)


def test_normalised_softmax_is_cross_entropy_of_scaled_cosines():
    head = model.NormalisedSoftmax(5, 7, scale=3.0)
    embeddings, target = torch.randn(4, 7), torch.tensor([4, 0, 2, 2])
    cosine = torch.cosine_similarity(embeddings[:, None], head.weight[None], dim=2)
    expected = -torch.log_softmax(3 * cosine, 1)[torch.arange(4), target].mean()
    assert torch.allclose(head(embeddings, target), expected)
    assert torch.allclose(head(embeddings * 9, target), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "width", "message"), [("resnet18", 16, "unknown backbone"), ("resnet20", 0, "width")]
)
def test_wrong_networks_are_refused(backbone, width, message):
    with pytest.raises(ValueError, match=message):
        model.build(backbone, width)
