"""model.py, checkpoints.py: the networks' shape, names and arithmetic, frozen stages, published weights, embedding."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

import checkpoints
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


def test_the_size_of_resnet12_is_the_known_one():
    """Known: 12.4 million parameters with 64, 160, 320 and 640 channels."""
    net = model.build("resnet12", 64)
    parameters, multiply_adds = model.count(net, 32)
    channels, sides = (3, 64, 160, 320, 640), (32, 16, 8, 4)
    products = norms = work = 0
    for before, after, side in zip(channels, channels[1:], sides, strict=False):
        weights = 9 * before * after + 2 * 9 * after * after + before * after
        products, norms, work = products + weights, norms + 4 * 2 * after, work + weights * side * side
    assert (parameters, multiply_adds) == (products + norms, work) and round(parameters / 1e6, 1) == 12.4
    assert net.dimension == 640 and model.build("resnet12", 5).dimension == 50


def test_counts_of_resnet18_are_torchvisions():
    meta = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta
    net = model.build("torchvision:resnet18").train()
    parameters, multiply_adds = model.count(net, 32)  # enlarged to 224
    assert parameters + 513_000 == meta["num_params"]
    assert round((multiply_adds + 512_000) / 1e9, 3) == meta["_ops"]
    assert net.training and not any(module._forward_hooks for module in net.modules())


LIBRARIES = ["torchvision:resnet18", "torchvision:squeezenet1_1", "timm:test_vit", "timm:test_efficientnet"]
SIDES = {"torchvision:squeezenet1_1": 64, "torchvision:resnet18": 48}  # at others, these networks' own


def library_network(backbone):
    """A network of a library, and the same one as the library makes it, with its classifier and other weights."""
    library, name = backbone.split(":")
    torch.manual_seed(0)
    if library == "torchvision":
        peer = torchvision.models.get_model(name)
    else:
        peer = timm.create_model(name)
    return model.build(backbone, input_size=SIDES.get(backbone), size=32), peer.eval()


@pytest.mark.parametrize("backbone", LIBRARIES)
def test_embeddings_are_what_the_librarys_classifier_gets(backbone):
    """Its weights are taken over, with the classifier left out; images are scaled to the network's input size."""
    net, peer = library_network(backbone)
    state = {f"module.{name}": tensor for name, tensor in peer.state_dict().items()}
    left_out = checkpoints.load_weights(net.eval(), state)
    layer = left_out[0].rpartition(".")[0]
    assert {f"{layer}.weight", f"{layer}.bias"} == {*left_out}
    inputs, images, side = [], torch.randn(2, 3, 32, 32), net.input_size
    peer.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    larger = F.interpolate(images, (side, side), mode=model.made_for(backbone)["interpolation"], antialias=True)
    with torch.no_grad():
        peer(larger)
        features = inputs[0] if inputs[0].ndim == 2 else inputs[0].mean((2, 3))  # SqueezeNet pools its class scores
        assert torch.allclose(net(images), F.normalize(features), atol=1e-5)
        assert torch.equal(net(images), net.embed(images))
    assert net(images).shape == (2, net.dimension) and net.settings["input_size"] == side


@pytest.mark.parametrize("backbone", ["torchvision:resnet18", "timm:test_vit"])
def test_a_network_is_centred_on_images(backbone):
    """And so it is when it is built again: the mean embedding is in the state dict, and starts as zero."""
    net, _ = library_network(backbone)
    net.mirror = True
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    raw = model.embed(net, images)
    assert torch.allclose(raw.norm(dim=1), torch.ones(6), atol=0.2)  # averages of two of length 1
    for _ in range(2):  # a second time changes nothing
        net.centre(images)
        centred = model.embed(net, images)
        assert torch.allclose(centred, raw - raw.mean(0), atol=1e-5) and centred.mean(0).norm() < 1e-5
    again, left_out = checkpoints.build_with_weights(net.settings | {"mirror": True}, net.state_dict())
    assert torch.equal(model.embed(again, images), centred) and not left_out
    net.turned = 0.5
    net.centre(images)
    assert net.turned == 0.5 and torch.allclose(net.mean_embedding, again.mean_embedding, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "parts", "first", "last"),
    [
        ("torchvision:resnet18", 5, "conv1 bn1", "layer4"),
        ("torchvision:mobilenet_v3_small", 14, "features.0", "classifier.0"),
        ("torchvision:vit_b_32", 13, "conv_proj class_token encoder.pos_embedding", "encoder.layers.encoder_layer_11"),
        ("timm:test_vit", 7, "patch_embed cls_token pos_embed", "blocks.5"),
        ("timm:test_efficientnet", 7, "conv_stem bn1", "conv_head"),
    ],
)
def test_the_stages_of_any_network(backbone, parts, first, last):
    """The first can be frozen alone, the last one never is."""
    net = model.build(backbone)
    net.freeze(1)
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    names = tuple(f"body.{name}" for name in first.split())
    assert frozen and frozen == {name for name, _ in net.named_parameters() if name.startswith(names)}
    net.freeze(parts - 1)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert any(name.startswith(f"body.{last}") for name in trained) and not trained & frozen
    with pytest.raises(ValueError, match=f"--freeze must be in 0..{parts - 1} for this network, got {parts}"):
        net.freeze(parts)


@pytest.mark.parametrize(("backbone", "stages"), [("resnet20", 2), ("resnet20", 0), ("resnet12", 3)])
def test_frozen_stages_stay_as_they_are(backbone, stages):
    net = model.build(backbone, width=4)
    net.freeze(stages)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net.eval().train()
    net(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    first = "layer1. layer2. layer3." if backbone == "resnet12" else "conv1. bn1. layer1." if stages else ""
    frozen = ["penultimate_", *first.split()]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(tuple(frozen)), name


def test_freezing_everything_is_refused():
    for backbone, stages in (("resnet20", 4), ("resnet20", -1), ("resnet12", 4)):
        with pytest.raises(ValueError, match="--freeze must be in 0"):
            model.build(backbone).freeze(stages)


def test_parameter_names_are_the_familys():
    names = set(model.build("resnet20").state_dict())
    expected = {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "layer2.0.bn1.weight"}
    assert expected <= names
    assert not [name for name in names if "shortcut" in name or "linear" in name]


def conv_bn(state: dict, x: torch.Tensor, conv: str, bn: str, stride: int = 1) -> torch.Tensor:
    weight = state[f"{conv}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[3] // 2)
    mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
    scale = state[f"{bn}.weight"] / (var + 1e-5).sqrt()
    return x * scale[:, None, None] + (state[f"{bn}.bias"] - mean * scale)[:, None, None]


def reference(state: dict, x: torch.Tensor, blocks: int) -> torch.Tensor:
    """A CIFAR ResNet in evaluation mode, written from its parameters alone."""
    x = conv_bn(state, x, "conv1", "bn1").relu()
    for layer in (1, 2, 3):
        for block in range(blocks):
            stride = 2 if layer > 1 and block == 0 else 1
            name = f"layer{layer}.{block}"
            out = conv_bn(state, x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            out = conv_bn(state, out, f"{name}.conv2", f"{name}.bn2")
            if stride == 2:  # option A: every other pixel, new channels zero on both sides
                shortcut = torch.zeros_like(out)
                quarter = out.shape[1] // 4
                shortcut[:, quarter : 3 * quarter] = x[:, :, ::2, ::2]
                x = shortcut
            x = (out + x).relu()
    return x.flatten(2).mean(2)


def reference_12(state: dict, x: torch.Tensor) -> torch.Tensor:
    """A ResNet-12 in evaluation mode, written from its parameters alone."""
    for layer in (1, 2, 3, 4):
        name, out = f"layer{layer}.0", x
        for number in (1, 2, 3):
            out = conv_bn(state, out, f"{name}.conv{number}", f"{name}.bn{number}")
            if number == 3:
                out = out + conv_bn(state, x, f"{name}.downsample.0", f"{name}.downsample.1")
            out = torch.where(out > 0, out, 0.1 * out)
        rows, columns = out.shape[2:]
        blank = F.pad(out, (0, columns % 2, 0, rows % 2), value=-torch.inf)
        x = blank.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    return x.flatten(2).mean(2)


@pytest.mark.parametrize(("backbone", "side"), [("resnet20", 16), ("resnet12", 32), ("resnet12", 28), ("resnet12", 8)])
def test_forward_agrees_with_a_reference(backbone, side):
    net = model.build(backbone, width=4).double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)
    images, state = torch.randn(3, 3, side, side, dtype=torch.float64), net.state_dict()
    expected = reference_12(state, images) if backbone == "resnet12" else reference(state, images, 3)
    assert torch.allclose(net.eval()(images), expected)


def test_published_weights_load():
    net = model.build("resnet20")
    state = {
        f"module.{name}": torch.randn_like(t) if t.is_floating_point() else t for name, t in net.state_dict().items()
    }
    state |= {"module.linear.weight": torch.zeros(10, 64), "module.linear.bias": torch.zeros(10)}
    assert checkpoints.load_weights(net, state) == ["linear.weight", "linear.bias"]
    assert torch.equal(net.layer3[1].conv2.weight, state["module.layer3.1.conv2.weight"])
    with pytest.raises(ValueError, match=r"wrong --backbone or --width.*60 missing \(layer1.3.conv1.weight"):
        checkpoints.load_weights(model.build("resnet32"), state)
    wide = r"of another shape \(conv1.weight \[16, 3, 3, 3\] for \[8, 3, 3, 3\]"
    with pytest.raises(ValueError, match=wide):
        checkpoints.load_weights(model.build("resnet20", 8), state)
    state["module.conv0.weight"] = state.pop("module.conv1.weight")
    with pytest.raises(ValueError, match=r"1 missing \(conv1.weight\); 1 left over \(conv0.weight\)$"):
        checkpoints.load_weights(net, state)


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
    threshold = {
        "value": 0.5,
        "logistic": [1.0, 0.0],
        "false_accept": 5.0,
        "false_reject": 5.0,
        "calibrated_on": "some",
        "strangers": {"shots": [1], "classes": [2], "rates": [0.1], "similarities": [[[0.5]]]},
    }
    saved = {"model": net.state_dict(), "options": {}, "threshold": threshold}
    pixels = {name: net.settings[name] for name in ("size", "mean", "std")}
    older = {
        "network": {"backbone": "resnet20", "width": 4},
        "data": pixels | {"classes": ["a"], "seen": [0]},
    }
    torch.save(saved | older, tmp_path / "older.pt")
    loaded, _ = checkpoints.load(tmp_path / "older.pt")
    assert loaded.settings == net.settings and not loaded.training


def test_normalised_softmax_is_cross_entropy_of_scaled_cosines():
    head = train_classic.NormalisedSoftmax(5, 7, scale=3.0)
    embeddings, target = torch.randn(4, 7), torch.tensor([4, 0, 2, 2])
    cosine = torch.cosine_similarity(embeddings[:, None], head.weight[None], dim=2)
    expected = -torch.log_softmax(3 * cosine, 1)[torch.arange(4), target].mean()
    assert torch.allclose(head(embeddings, target), expected)
    assert torch.allclose(head(embeddings * 9, target), expected, atol=1e-6)


def test_divergence_is_that_of_similarities_to_the_other_rows():
    own, taught, expected = torch.randn(5, 3), torch.randn(5, 7), 0.0
    for row in range(5):
        others = [other for other in range(5) if other != row]
        p, q = (torch.softmax(torch.cosine_similarity(z[row], z[others]) / 0.2, 0) for z in (taught, own))
        expected += float((p * (p / q).log()).sum()) / 5
    assert float(train_classic.divergence(own, taught)) == pytest.approx(expected, abs=1e-5)
    turned = 3 * taught @ torch.linalg.qr(torch.randn(7, 7))[0]
    assert float(train_classic.divergence(turned, taught)) == pytest.approx(0, abs=1e-5)
    alone = torch.randn(1, 3, requires_grad=True)
    for images in (alone, alone[:0]):  # of a batch of which one image, or none, is upright
        loss = train_classic.divergence(images, taught[: len(images)])
        loss.backward()
        assert float(loss.detach()) == 0 and not alone.grad.any()


def test_a_mirror_averages_both_views_when_not_training():
    net, images = model.build("resnet20", 4, mirror=True).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(net(images), net(images.flip(3)), atol=1e-6)
        assert torch.allclose(net(images), (net.embed(images) + net.embed(images.flip(3))) / 2)
        assert torch.equal(net.train()(images), net.embed(images))  # batch statistics: no trace of the calls before
    assert model.build(**net.settings).mirror and not model.build("resnet20", 4).mirror
    assert model.count(net, 32) == model.count(model.build("resnet20", 4), 32)


@pytest.mark.parametrize("backbone", ["resnet20", "resnet12"])
def test_features_before_the_last_block_are_appended_when_not_training(backbone):
    pixels = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    net = model.build(backbone, 4, penultimate=0.5, mean=[0.5] * 3, std=[0.25] * 3).eval()
    plain = model.build(**net.settings | {"penultimate": 0.0}).eval()
    net.centre(pixels)
    plain.load_state_dict(net.state_dict())
    images = net.normalise(pixels)
    with torch.no_grad():
        z, inputs = net(images), plain.before_last(images).mean((2, 3)).double()
        standard = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
        last, before = z.split([net.dimension, inputs.shape[1]], 1)
        assert torch.equal(last, torch.nn.functional.normalize(plain(images)))
        assert torch.allclose(before.double(), 0.5 * torch.nn.functional.normalize(standard), atol=1e-5)
        assert torch.equal(net.train()(images), plain.train()(images))
    assert model.build(**net.settings).penultimate == 0.5 and "penultimate" not in plain.settings


@pytest.mark.parametrize("penultimate", [0.0, 0.5])
def test_features_before_the_last_block_are_averaged_before_they_are_scaled(penultimate):
    net = model.build("resnet20", 4, mirror=True, turned=0.3, penultimate=penultimate).eval()
    images = torch.randn(3, 3, 32, 32)
    plain = model.build("resnet20", 4, penultimate=penultimate).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        for way, part in enumerate(net(images).chunk(4, 1)):
            view = images.rot90(way, (2, 3))
            features = plain.join((plain.embed(view) + plain.embed(view.flip(3))) / 2)
            expected = torch.nn.functional.normalize(features)
            assert torch.allclose(part, (0.3 if way else 1) * expected, atol=1e-6)


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


@pytest.mark.parametrize(
    ("backbone", "settings", "message"),
    [
        ("resnet20", {"width": 0}, "width must be at least 1"),
        ("nothing", {}, "unknown backbone 'nothing'; near ones: resnet12, resnet20, .*torchvision:NAME, timm:NAME"),
        ("resnet18", {}, "unknown backbone 'resnet18'; near ones: .*torchvision:resnet18"),
        ("torchvision:resnet20", {}, "near ones: torchvision:resnet"),
        ("torchvision:googlenet", {}, "unknown backbone"),
        ("torchvision:vit_b_32", {"input_size": 128}, r"cannot take 128 pixels \(.*\); give --image-size 224"),
        ("torchvision:vgg11", {"input_size": 8}, r"cannot take 8 pixels \(.*\); give --image-size 224"),
        ("timm:vit_tiny_patch16", {}, "near ones: .*timm:vit_tiny_patch16_224,"),
        ("timm:test_vit.nobodys", {}, "near ones: timm:test_vit,"),
        ("timm:test_vit", {"input_size": 100}, r"cannot take 100 pixels \(.*\); give --image-size 160"),
    ],
)
def test_wrong_networks_are_refused(backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        model.build(backbone, **settings)


def test_batch_norm_is_the_mean_of_all_batches():
    net = model.build("resnet20", 4)
    batches = [torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + seed for seed in range(3)]
    model.refresh_batch_norm(net, batches)
    wanted = torch.stack([net.conv1(batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(net.bn1.running_mean, wanted, atol=1e-5)


def test_a_network_is_centred_on_images_of_all_classes():
    """Which may be sorted by class."""
    assert 2300 < model.to_centre(torch.arange(5000)).float().mean() < 2700


def test_settings_are_part_of_what_tells_networks_apart():
    state = {"weight": torch.ones(2)}
    assert checkpoints.fingerprint({"mirror": True}, state) != checkpoints.fingerprint({"mirror": False}, state)


def test_features_are_centred_on_more_images_than_pass_at_once():
    """And features that are always the same stay finite."""
    net = model.build("resnet20", 4, penultimate=0.5).eval()
    pixels = torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net.centre(pixels)
    with torch.no_grad():
        inputs = net.before_last(net.normalise(pixels)).mean((2, 3))
    assert torch.allclose(net.penultimate_mean, inputs.mean(0), rtol=1e-4)
    assert torch.allclose(net.penultimate_std, inputs.std(0, correction=0).clamp(min=1e-6), rtol=1e-3)
    net.centre(pixels[:1].expand(5, -1, -1, -1))
    assert torch.isfinite(model.embed(net, pixels[:3])).all()


def test_a_librarys_network_scales_images_as_it_was_made_for():
    for name in ("test_vit", "tf_efficientnet_lite0", "vit_base_patch16_clip_224.openai"):
        assert model.made_for(f"timm:{name}")["interpolation"] == timm.get_pretrained_cfg(name).interpolation
    assert model.made_for("timm:test_vit")["interpolation"] == "bicubic"
    assert model.made_for("torchvision:resnet18")["interpolation"] == "bilinear"
