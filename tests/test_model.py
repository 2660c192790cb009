"""model.py: the networks' shape, size, names and arithmetic, frozen stages, published weights, embedding."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

import model
import train_classic


@pytest.mark.parametrize(
    ("backbone", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)]
)
def test_parameter_counts_are_those_of_the_paper(backbone, millions):
    """He et al. 2015, table 6; the paper's counts include a classifier of 10 classes."""
    count = sum(parameter.numel() for parameter in model.build(backbone).parameters()) + 64 * 10 + 10
    assert round(count / 1e6, 2) == millions


def test_multiply_adds_are_the_known_ones():
    """Known: 40.81 and 125.75 million for ResNet-20 and -56 with a classifier of 10 classes and two 1x1 convolutions in
    place of parameter-free shortcuts (16 to 32 channels at 16 x 16, 32 to 64 at 8 x 8)."""
    other = 16 * 32 * 16 * 16 + 32 * 64 * 8 * 8 + 64 * 10
    for backbone, millions, parameters in (("resnet20", 40.81, 0.27), ("resnet56", 125.75, 0.85)):
        found, multiply_adds = model.count(model.build(backbone), 32)
        assert round((multiply_adds + other) / 1e6, 2) == millions
        assert round((found + 650) / 1e6, 2) == parameters


def test_counts_of_resnet18_are_torchvisions():
    meta = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta
    net = model.build("resnet18", stem="full").train()
    parameters, multiply_adds = model.count(net, 224)
    assert parameters + 513_000 == meta["num_params"]
    assert round((multiply_adds + 512_000) / 1e9, 3) == meta["_ops"]
    assert net.training and not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(("stem", "enlarge"), [("full", 1), ("full", 2), ("small", 1)])
def test_resnet18_agrees_with_torchvision(stem, enlarge):
    net = model.build("resnet18", stem=stem, enlarge=enlarge).eval()
    peer = torchvision.models.resnet18()
    peer.fc = torch.nn.Identity()
    if stem == "small":
        peer.conv1, peer.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    peer.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 32, 32)
    larger = torch.nn.Upsample(scale_factor=enlarge, mode="bilinear")(images)
    with torch.no_grad():
        assert torch.allclose(net(images), peer.eval()(larger), atol=1e-4)
    assert net(images).shape == (2, net.dimension) and model.build(**net.settings).stem == stem


@pytest.mark.parametrize(
    ("side", "kernel", "options", "expected"),
    [
        (32, None, {}, ("small", 1)),
        (64, None, {}, ("full", 2)),
        (224, None, {}, ("full", 1)),
        (32, 7, {}, ("full", 4)),
        (128, 3, {}, ("small", 1)),
        (32, 7, {"enlarge": 2}, ("full", 2)),
        (32, None, {"stem": "full"}, ("full", 4)),
        (96, None, {"stem": "small", "enlarge": 3}, ("small", 3)),
    ],
)
def test_the_stem_fits_the_images_and_the_weights(side, kernel, options, expected):
    state = kernel and {"conv1.weight": torch.zeros(64, 3, kernel, kernel)}
    chosen = model.fit("resnet18", 16, side, state, **options)
    assert chosen == {"backbone": "resnet18", "stem": expected[0], "enlarge": expected[1], "size": side}


@pytest.mark.parametrize(("backbone", "stages"), [("resnet20", 2), ("resnet20", 0), ("resnet18", 1)])
def test_frozen_stages_stay_as_they_are(backbone, stages):
    net = model.build(backbone, width=4)
    net.freeze(stages)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net.eval().train()
    net(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    frozen = ["conv1.", "bn1.", "layer1.", "layer2."][: stages + 1 if stages else 0]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(tuple(frozen)), name


def test_freezing_everything_is_refused():
    for backbone, stages in (("resnet20", 4), ("resnet18", 5), ("resnet20", -1)):
        with pytest.raises(ValueError, match="--freeze must be in 0"):
            model.build(backbone).freeze(stages)


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
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]
    net = model.build("resnet20", width=4, mean=mean, std=std).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    whole = model.embed(net, images)
    assert net.training and whole.shape == (9, 16) and whole.dtype == torch.float32
    assert torch.allclose(whole, model.embed(net, images, batch=2), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    pixels = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(net.normalise(images), pixels, atol=1e-5)
    assert torch.equal(net.normalise(images.float()), net.normalise(images))


def test_a_network_is_built_again_with_its_pixel_statistics():
    """They are no part of the state dict, so that published weights load; `build` restores them from `settings`."""
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    net = model.build("resnet20", 4, size=24, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.1])
    again = model.build(**net.settings)
    again.load_state_dict(net.state_dict())
    assert again.size == 24 and torch.equal(model.embed(again, images), model.embed(net, images))
    assert not {"scale", "shift"} & net.state_dict().keys()


def test_an_older_checkpoint_keeps_its_pixel_statistics_with_the_data(tmp_path):
    net = model.build("resnet20", 4, size=24, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.1])
    saved = {"model": net.state_dict(), "options": {}, "threshold": {"value": 0.5, "logistic": [1.0, 0.0]}}
    pixels = {name: net.settings[name] for name in ("size", "mean", "std")}
    older = {
        "network": {"backbone": "resnet20", "width": 4},
        "data": pixels | {"classes": ["a"], "seen": [0]},
        "center": None,
    }
    torch.save(saved | older, tmp_path / "older.pt")
    loaded, _ = model.load(tmp_path / "older.pt")
    assert loaded.settings == net.settings and not loaded.training
    torch.save(saved | older | {"center": torch.zeros(16)}, tmp_path / "centred.pt")
    with pytest.raises(ValueError, match="subtracts a mean embedding"):
        model.load(tmp_path / "centred.pt")


def test_normalised_softmax_is_cross_entropy_of_scaled_cosines():
    head = train_classic.NormalisedSoftmax(5, 7, scale=3.0)
    embeddings, target = torch.randn(4, 7), torch.tensor([4, 0, 2, 2])
    cosine = torch.cosine_similarity(embeddings[:, None], head.weight[None], dim=2)
    expected = -torch.log_softmax(3 * cosine, 1)[torch.arange(4), target].mean()
    assert torch.allclose(head(embeddings, target), expected)
    assert torch.allclose(head(embeddings * 9, target), expected, atol=1e-6)


def test_a_mirror_averages_both_views_when_not_training():
    net, images = model.build("resnet20", 4, mirror=True).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(net(images), net(images.flip(3)), atol=1e-6)
        assert torch.allclose(net(images), (net.embed(images) + net.embed(images.flip(3))) / 2)
        assert torch.equal(net.train()(images), net.embed(images))  # batch statistics: no trace of the calls before
    assert model.build(**net.settings).mirror and not model.build("resnet20", 4).mirror
    assert model.count(net, 32) == model.count(model.build("resnet20", 4), 32)


@pytest.mark.parametrize("mirror", [True, False])
def test_turned_views_are_appended_when_not_training(mirror):
    net, images = model.build("resnet20", 4, mirror=mirror, turned=0.5).eval(), torch.randn(3, 3, 32, 32)
    plain = model.build("resnet20", 4, mirror=mirror).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        parts = net(images).split(net.dimension, 1)
        for way, part in enumerate(parts):
            view = images.rot90(way, (2, 3))
            expected = torch.nn.functional.normalize(plain(view.flip(3) if way >= 4 else view))
            assert torch.allclose(part, (0.5 if way else 1) * expected, atol=1e-6)
        assert len(parts) == (4 if mirror else 8) and net.train()(images).shape == (3, net.dimension)
    assert model.build(**net.settings).turned == 0.5


@pytest.mark.parametrize(("backbone", "width", "message"), [("vgg", 16, "unknown backbone"), ("resnet20", 0, "width")])
def test_wrong_networks_are_refused(backbone, width, message):
    with pytest.raises(ValueError, match=message):
        model.build(backbone, width)
