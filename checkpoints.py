"""Checkpoints: read and checked, and the networks in them; state dicts of others too.

A checkpoint of train_classic.py or train_reptile.py is a dict: the state dict "model", the "options" of the training,
the "data" it learned from, the arguments of `model.build` as "network", and the calibrated "threshold" or None.
"""

import hashlib
import json
import math
import os
import textwrap
import zipfile
from pathlib import Path

import torch
from torch import Tensor

if __package__:  # installed by pip, in the package oneshot
    from .model import Embedder, build
else:
    from model import Embedder, build

CALIBRATION = {"value", "false_accept", "false_reject", "calibrated_on", "logistic", "strangers"}
OPTIONAL = ("num_batches_tracked", "mean_embedding", "penultimate_mean", "penultimate_std")  # a state dict may lack


def read(path: str | os.PathLike) -> dict:
    """A dict of tensors and plain values, its checksums verified; no code in the file is run. Raises ValueError or
    OSError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    safe = Path(path).suffix == ".safetensors"
    if safe:
        from safetensors.torch import load_file
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # PyTorch reads no bytes of a member that is said to be a folder
                folders = any(info.external_attr & 0x10 for info in archive.infolist())
                if folders or archive.testzip() is not None:
                    raise zipfile.BadZipFile("a checksum or an attribute is wrong")
        checkpoint = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of every kind
        raise ValueError(f"{path} is not a checkpoint that can be read: {what_it_is(path, error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    if is_ours(checkpoint):
        check_structure(checkpoint, path)
    return checkpoint


def what_it_is(path: str | os.PathLike, error: Exception) -> str:
    """What a file is that is no checkpoint, for the user."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; `git lfs pull` fetches the file it stands for"
    if start.lstrip().startswith(b"<"):
        return "it is a web page; download the file itself"
    if "Unsupported global" in str(error) or "GLOBAL" in str(error):
        return "it holds more than tensors and plain values, which could run programs"
    return "it is damaged, cut short or of another kind"


def check_structure(saved: dict, path: str | os.PathLike) -> None:
    """Raise ValueError unless a checkpoint of ours has the fields, types and values that the scripts rely on."""

    def numbers(values: object, count: int, low: float, high: float) -> bool:
        known = isinstance(values, (list, tuple)) and len(values) == count
        return known and all(isinstance(value, (int, float)) and low <= value <= high for value in values)

    def labels(values: object, classes: list) -> bool:
        return isinstance(values, list) and all(type(label) is int and 0 <= label < len(classes) for label in values)

    data, threshold, network = saved["data"], saved["threshold"], saved.get("network", {})
    defaults = {"seen": None, "validation": [], "unseen": []}  # the last two may be missing, and "learned_before"
    wrong = []
    if not isinstance(saved["options"], dict):
        wrong.append("options")
    classes, before = (data.get("classes"), data.get("learned_before", [])) if isinstance(data, dict) else (None, None)
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in (classes, before)):
        wrong.append("classes")
    elif not all(labels(data.get(name, default), classes) for name, default in defaults.items()):
        wrong.append("labels of the classes")
    if not isinstance(network, dict):
        wrong.append("network settings")
    elif not wrong:
        settings = {name: data[name] for name in ("size", "mean", "std") if name in data} | network
        known = {"backbone", "width", "input_size", "mirror", "turned", "penultimate", "size", "border", "mean", "std"}
        sizes = [settings.get(name, 1) for name in ("width", "input_size", "size", "border")]
        valid = all(type(size) is int for size in sizes) and numbers(sizes, 4, 1, 2**16)
        if not (valid and settings.keys() <= known and isinstance(settings.get("backbone", ""), str)):
            wrong.append("network settings")
        mean, std = settings.get("mean", [0, 0, 0]), settings.get("std", [1, 1, 1])
        if not (numbers(mean, 3, 0, 1) and numbers(std, 3, 1e-9, 1)):
            wrong.append("pixel statistics")
        if not numbers([settings.get(name, 0.0) for name in ("turned", "penultimate")], 2, 0, 1):
            wrong.append("weights of the embedding's parts")
    if threshold is not None:
        known = isinstance(threshold, dict) and isinstance(threshold.get("calibrated_on", ""), str)
        known = known and numbers([threshold.get(name, 0.0) for name in ("false_accept", "false_reject")], 2, 0, 100)
        known = known and numbers(threshold.get("logistic", [0, 0]), 2, -math.inf, math.inf)
        if not (known and numbers([threshold.get("value")], 1, -1, 1)):
            wrong.append("threshold")
        elif "strangers" in threshold and not is_table(threshold["strangers"]):
            wrong.append("table of strangers")
    if wrong:
        raise ValueError(f"{path} is a damaged checkpoint: {', '.join(wrong)} missing or of no use")


def is_table(strangers: object) -> bool:
    """Is this a table for `oneshot.Strangers`?"""
    try:
        axes = [torch.tensor(strangers[name], dtype=torch.float64) for name in ("shots", "classes", "rates")]
        similarities = torch.tensor(strangers["similarities"], dtype=torch.float64)
        rising = all(axis.ndim == 1 and axis[0] > 0 and (axis.diff() > 0).all() for axis in axes)
        return bool(rising and similarities.shape == tuple(map(len, axes)) and (similarities.abs() <= 1).all())
    except (LookupError, TypeError, ValueError, RuntimeError):
        return False


def is_ours(saved: dict) -> bool:
    """Is this a checkpoint of train_classic.py or train_reptile.py, rather than a bare state dict?"""
    return {"model", "options", "data", "threshold"} <= saved.keys()


def settings_of(saved: dict) -> dict:
    """The arguments of `build` that a checkpoint of ours holds; older ones keep size, mean and std with the data."""
    older = {name: saved["data"][name] for name in ("size", "mean", "std") if name in saved["data"]}
    return older | saved.get("network", {})


def trained_classes(facts: dict) -> set[str]:
    """Names of the classes that a checkpoint with these data `facts`, or weights it started from, was trained on."""
    seen = facts["seen"] if facts.get("trained", True) else []
    return {facts["classes"][label] for label in seen} | {*facts.get("learned_before", [])}


# ------------------------------------------------------------------------------------------------- the networks in them


def bare_state(saved: dict, name: str) -> dict[str, Tensor]:
    """The state dict in the contents of the file `name`, without DataParallel's prefix. Raises ValueError."""
    state = saved.get("model", saved.get("state_dict", saved))
    if not isinstance(state, dict) or not all(isinstance(x, str) and isinstance(y, Tensor) for x, y in state.items()):
        raise ValueError(f"{name} is neither a checkpoint of this project nor a state dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def build_with_weights(settings: dict, state: dict[str, Tensor]) -> tuple[Embedder, list[str]]:
    """A network with the weights `state`, and the names left out. Raises ValueError.

    Nothing is allocated before the weights are known to fit.
    """
    with torch.device("meta"):
        load_weights(build(**settings), state)
    net = build(**settings)
    return net, load_weights(net, state)


def load_weights(net: Embedder, state: dict[str, Tensor]) -> list[str]:
    """Load a state dict of ours, of the CIFAR ResNet family or of a library into `net`; return the names left out.

    A "module." prefix (DataParallel) is dropped and a classifier left out. Raises ValueError if anything else is
    missing, left over or of another shape, or if a weight is not finite.
    """
    own = dict(sorted(net.state_dict().items(), key=lambda item: item[0].endswith(OPTIONAL)))
    full = {name.removeprefix("body."): name for name in own}  # of a LibraryNetwork
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    ignored = [name for name in state if name.startswith(tuple(f"{layer}." for layer in net.classifier))]
    state = {full.get(name, name): tensor for name, tensor in state.items() if name not in ignored}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the weights are of no use: {broken[0]} holds NaN or infinity")
    ours, theirs = ({name: [*tensor.shape] for name, tensor in each.items()} for each in (own, state))
    wrong = {
        "missing": [name for name in ours if name not in theirs and not name.endswith(OPTIONAL)],
        "left over": [name for name in theirs if name not in ours],
        "of another shape": [f"{n} {theirs[n]} for {s}" for n, s in ours.items() if theirs.get(n, s) != s],
    }
    if any(wrong.values()):
        why = "; ".join(f"{len(each)} {kind} ({', '.join(each[:2])})" for kind, each in wrong.items() if each)
        why = f"(wrong --backbone or --width?): {why.replace('body.', '')}"
        raise ValueError(f"the weights do not fit this network {textwrap.shorten(why, 400)}")
    net.load_state_dict(state, strict=False, assign=next(net.parameters()).is_meta)  # which cannot be copied to
    return ignored


def load(path: str | os.PathLike) -> tuple[Embedder, dict]:
    """The network of a calibrated checkpoint of ours, in evaluation mode, and the checkpoint. Raises ValueError or
    OSError."""
    saved = read(path)
    if not is_ours(saved):
        raise ValueError(f"{path} is not a checkpoint of train_classic.py or train_reptile.py")
    settings, threshold = settings_of(saved), saved["threshold"]
    if not CALIBRATION <= {*(threshold or ())} or not {"backbone", "size"} <= settings.keys():
        raise ValueError(f"{path} lacks a calibration: `python evaluate.py {path} --store` adds it")
    net, _ = build_with_weights(settings, bare_state(saved, str(path)))
    return net.eval().requires_grad_(False), saved


def recogniser_facts(net: Embedder, saved: dict) -> dict:
    """What `oneshot.Recogniser` needs beside the network of a checkpoint, as plain values."""
    facts = {"size": net.size, "border": net.border, "threshold": saved["threshold"]}
    facts |= {"fingerprint": fingerprint(net.settings, saved["model"])}
    return facts | {"trained": sorted(trained_classes(saved["data"]))}


def fingerprint(settings: dict, state: dict[str, Tensor]) -> str:
    """A hash of a network's settings and weights."""
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(state.items()):
        hashed.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
