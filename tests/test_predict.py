"""predict.py and export.py end to end, on pictures of the classes that a tiny network was never trained on."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import checkpoints
import data
import export
import model
import oneshot
import predict
import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """best.pt of a moment's training, and the test images of its 3 unseen classes as picture files."""
    folder = tmp_path_factory.mktemp("predict")
    npz = str(tiny.write_npz(folder / "tiny.npz", classes=12, train=24, test=8))
    tiny.train_classic(npz, folder)
    test = data.load(npz).test.of([9, 10, 11])
    for number, (image, label) in enumerate(zip(test.images, test.labels.tolist(), strict=True)):
        place = folder / "support" / f"class {label}"
        if place.exists():
            place = folder / "queries"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{label}-{number:02}.png")
    return folder


def test_the_recogniser_is_what_evaluation_uses(folder):
    net, saved = checkpoints.load(folder / "best.pt")
    images = data.load(str(folder / "tiny.npz")).test.images
    plain = model.build(**saved["network"])
    plain.load_state_dict(saved["model"])
    recogniser, z = model.PixelEmbedder(net), normalize(model.embed(plain, images))
    assert torch.allclose(recogniser(images), z, atol=1e-6)
    assert torch.allclose(recogniser(images.float()), recogniser(images)) and net.size == 16


def test_queries(folder, tmp_path, capsys):
    """The answers of the files are those computed from the arrays; nearly all queries find their class."""
    arguments = ["--support", folder / "support", "--query", folder / "queries"]
    table, answered = tmp_path / "a.csv", tmp_path / "a.json"
    tiny.run(predict, folder / "best.pt", *arguments, "--csv", table, "--json", answered)
    found = json.loads(answered.read_text())
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(found["answers"]) == len(rows) == 21
    recogniser = model.PixelEmbedder(checkpoints.load(folder / "best.pt")[0])
    with oneshot.Gallery(":memory:", oneshot.load(folder / "best.pt")) as gallery:
        gallery.synchronise(folder / "support")
        assert found["threshold"] == gallery.threshold(0.1)
    read = {path: np.array(Image.open(path)) for path in sorted(folder.glob("*/**/*.png"))}
    z = {path: recogniser(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0] for path, pixels in read.items()}
    support = {path.parent.name: row for path, row in z.items() if path.parent.name != "queries"}
    for answer, row in zip(found["answers"], rows, strict=True):
        query = next(value for path, value in z.items() if str(path) == answer["picture"])
        similarity = sorted((float(query @ value), name) for name, value in support.items())[::-1]
        assert answer["nearest"] == similarity[0][1]
        assert answer["similarity"] == pytest.approx(similarity[0][0], abs=1e-5)
        assert answer["margin"] == pytest.approx(similarity[0][0] - similarity[1][0], abs=1e-5)
        assert answer["class"] == (answer["nearest"] if answer["similarity"] > found["threshold"] else "unknown")
        assert row["class"] == answer["class"] and float(row["similarity"]) == answer["similarity"]
    truth = [f"class {Path(answer['picture']).name.split('-')[0]}" for answer in found["answers"]]
    right = [answer["nearest"] == name for answer, name in zip(found["answers"], truth, strict=True)]
    assert np.mean(right) > 0.8
    assert "expected to give a name to 10 % of the pictures of classes that are not enrolled" in capsys.readouterr().out
    tiny.run(predict, folder / "best.pt", *arguments, "--threshold", "1", "--json", tmp_path / "a.json")
    assert {answer["class"] for answer in json.loads((tmp_path / "a.json").read_text())["answers"]} == {"unknown"}


def test_several_pictures_a_class_and_one_class(folder, tmp_path):
    """The support is the mean of the pictures' embeddings; with one class there is no runner-up."""
    own = tmp_path / "support" / "only"
    own.mkdir(parents=True)
    pictures = sorted((folder / "queries").iterdir())
    for path in pictures[:3]:
        shutil.copy(path, own)
    arguments = ["--support", tmp_path / "support", "--query", pictures[5], pictures[6], "--json", tmp_path / "a.json"]
    tiny.run(predict, folder / "best.pt", *arguments)
    answers = json.loads((tmp_path / "a.json").read_text())["answers"]
    z = oneshot.load(folder / "best.pt").embed([*pictures[:3], *pictures[5:7]])
    mean = z[:3].mean(0) / np.linalg.norm(z[:3].mean(0))
    for answer, row in zip(answers, z[3:], strict=True):
        assert answer["margin"] is None and answer["similarity"] == pytest.approx(float(row @ mean), abs=1e-5)


def test_folders_without_pictures_are_left_out_of_the_support(folder, tmp_path, capsys):
    shutil.copytree(folder / "support", tmp_path / "support")
    for name in ("empty", "__MACOSX", ".cache"):
        (tmp_path / "support" / name).mkdir()
    found = []
    for support in (folder / "support", tmp_path / "support"):
        arguments = ["--support", support, "--query", folder / "queries", "--json", tmp_path / "a.json"]
        tiny.run(predict, folder / "best.pt", *arguments)
        found.append(json.loads((tmp_path / "a.json").read_text())["answers"])
    assert found[0] == found[1] and "support: left out .cache/, __MACOSX/, empty/\n" in capsys.readouterr().err


def test_the_support_can_be_zipped_and_its_classes_nested(folder, tmp_path):
    """As in training: the same answers, with names of two levels where a folder holds two classes."""
    for number, path in enumerate(sorted((folder / "support").iterdir())):
        shutil.copytree(path, tmp_path / "nested" / "more" / "ab"[number % 2] / path.name)
    shutil.make_archive(str(tmp_path / "nested"), "zip", tmp_path / "nested")
    found = []
    for support in (folder / "support", tmp_path / "nested", tmp_path / "nested.zip"):
        arguments = ["--support", support, "--query", folder / "queries", "--json", tmp_path / "a.json"]
        tiny.run(predict, folder / "best.pt", *arguments)
        found.append(json.loads((tmp_path / "a.json").read_text())["answers"])
    names = {"class 9": "a/class 9", "class 10": "a/class 10", "class 11": "b"}
    assert {answer["nearest"] for answer in found[0]} == {*names}
    for answer in found[0]:
        answer |= {name: names.get(answer[name], answer[name]) for name in ("nearest", "class")}
    assert found[0] == found[1] == found[2]


def test_classes_are_removed_all_or_none(folder, tmp_path, capsys, refusal):
    gallery = [folder / "best.pt", "--gallery", tmp_path / "a.gallery"]
    tiny.run(predict, *gallery, "--add", folder / "support")
    first, second, *_ = sorted(path.name for path in (folder / "support").iterdir() if path.is_dir())
    before = (tmp_path / "a.gallery").read_bytes()
    message = refusal(predict, *gallery, "--remove", first, "nosuch")
    assert f"no class 'nosuch' is enrolled in {tmp_path / 'a.gallery'}; nothing was removed" in message
    assert (tmp_path / "a.gallery").read_bytes() == before
    tiny.run(predict, *gallery, "--remove", first, second, first, "--list")
    assert f"{second} removed" in capsys.readouterr().out


def test_compare(folder, tmp_path, capsys):
    pictures = sorted((folder / "queries").iterdir())  # by class
    answers = []
    for other in (pictures[1], pictures[-1]):
        tiny.run(predict, folder / "best.pt", "--compare", pictures[0], other, "--json", tmp_path / "a.json")
        answers += json.loads((tmp_path / "a.json").read_text())["answers"]
    same, different = answers
    assert (same["answer"], different["answer"]) == ("same", "different")
    assert same["probability_same"] > 0.5 > different["probability_same"] >= 0
    printed = capsys.readouterr().out
    calibrated = "27 held-back training images of 9 seen classes"
    for text in (calibrated, "assuming that half of all pairs are of one class", f"{same['probability_same']:.3f}"):
        assert text in printed


def test_a_broken_query_does_not_stop_the_others(folder, tmp_path, refusal):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    good = sorted((folder / "queries").iterdir())[0]
    for queries in ([good, tmp_path / "broken.jpg"], [tmp_path / "broken.jpg"]):
        arguments = ["--support", folder / "support", "--query", *queries, "--json", tmp_path / "a.json"]
        errors = refusal(predict, folder / "best.pt", *arguments, "--csv", tmp_path / "a.csv")
        assert "broken.jpg" in errors
        assert "1 of the pictures could not be read" in errors
        found = json.loads((tmp_path / "a.json").read_text())
        assert len(found["answers"]) == len(queries) - 1
        assert [error["picture"] for error in found["errors"]] == [str(tmp_path / "broken.jpg")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/best.pt"], "give --support FOLDER and --query PICTURES, or --compare A B"),
        (["{folder}/best.pt", "--support", "{folder}/support"], "give --support FOLDER and --query"),
        (["{folder}/best.pt", "--gallery", "{empty}.gallery", "--list"], "empty.gallery; --add FOLDER makes it"),
        (["{folder}/best.pt", "--compare", "a", "b", "--query", "c"], "--compare goes without"),
        (["{folder}/best.pt", "--compare", "a.png", "b.png"], "no such picture: a.png"),
        (
            ["{folder}/best.pt", "--support", "{folder}/tiny.npz", "--query", "a.png", "--json", "{folder}/tiny.npz"],
            "tiny.npz is an input; it would be overwritten",
        ),
        (
            ["{folder}/best.pt", "--support", "{folder}/queries", "--query", "a.png"],
            "queries has no folders with pictures",
        ),
        (["{folder}/best.pt", "--support", "{folder}/tiny.npz", "--query", "a.png"], "has no folders with pictures"),
        (["{folder}/best.pt", "--support", "{folder}/best.pt", "--query", "a.png"], "has no folders with pictures"),
        (["{folder}/best.pt", "--support", "{old}.png", "--query", "a.png"], "is no folder and no zip file"),
        (["{folder}/best.pt", "--support", "missing", "--query", "a.png"], "No such file or directory: 'missing'"),
        (["{folder}/best.pt", "--support", "{folder}/support", "--query", "{empty}"], "holds no picture"),
        (["{folder}/best.pt", "--compare", "a", "b", "--threshold", "2"], "--threshold must be auto or a number"),
        (["{folder}/best.pt", "--compare", "a", "b", "--csv", "/no/such/a.csv"], "no such folder"),
        (["{folder}/tiny.npz", "--compare", "a", "b"], "is not a checkpoint"),
        (["{old}", "--compare", "a", "b"], "lacks a calibration: `python evaluate.py {old} --store` adds it"),
    ],
)
def test_bad_input_gives_one_message(folder, tmp_path, refusal, arguments, message):
    saved = checkpoints.read(folder / "best.pt")
    saved["threshold"] = {name: saved["threshold"][name] for name in ("mode", "value", "calibrated_on")}
    torch.save(saved, tmp_path / "old.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.pt.png").write_text("no archive")
    names = {"folder": folder, "old": tmp_path / "old.pt", "empty": tmp_path / "empty"}
    assert message.format(**names) in refusal(predict, *[argument.format(**names) for argument in arguments])


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.slow
@pytest.mark.parametrize(("form", "pixels"), [("onnx", "uint8"), ("onnx", "float32"), ("torch", "uint8")])
def test_export(folder, tmp_path, capsys, form, pixels):
    out = tmp_path / f"model{export.SUFFIXES[form]}"
    tiny.run(export, folder / "best.pt", "--format", form, "--pixels", pixels, "--out", out)
    assert "largest difference from PyTorch" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    net, saved = checkpoints.load(folder / "best.pt")
    recogniser = model.PixelEmbedder(net)
    images = data.load(str(folder / "tiny.npz")).test.images.contiguous().to(getattr(torch, pixels))
    if form == "onnx":
        session = onnxruntime.InferenceSession(out)
        assert [axes.shape[0] for axes in (session.get_inputs()[0], session.get_outputs()[0])] == ["batch"] * 2
        metadata = session.get_modelmeta().custom_metadata_map
    else:
        extra = {"metadata.json": ""}
        loaded = torch.export.load(out, extra_files=extra).module()
        metadata = json.loads(extra["metadata.json"])
    assert float(metadata["threshold"]) == saved["threshold"]["value"] and metadata["criterion"] == "balanced"
    assert json.loads(metadata["classes"]) == saved["data"]["classes"] and metadata["commit"] == saved["commit"]
    for batch in (images[:1], images[:5], images):
        found = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) if form == "onnx" else loaded(batch)
        assert torch.allclose(found, recogniser(batch), atol=1e-5)
        assert torch.allclose(found.norm(dim=1), torch.ones(len(batch)), atol=1e-5)
    same, other = oneshot.load(folder / "best.pt"), oneshot.load(out)
    for name in ("size", "threshold", "trained", "fingerprint"):
        assert getattr(same, name) == getattr(other, name)
    pictures = sorted((folder / "queries").iterdir())
    assert np.allclose(same.embed(pictures), other.embed(pictures), atol=1e-5)


@pytest.mark.slow
def test_export_needs_no_data_set(folder, tmp_path, capsys):
    saved = checkpoints.read(folder / "best.pt")
    saved["options"]["data"] = "nowhere.npz"
    torch.save(saved, tmp_path / "best.pt")
    tiny.run(export, tmp_path / "best.pt", "--format", "torch")
    assert "64 random images" in capsys.readouterr().out and (tmp_path / "best.pt2").exists()
    tiny.run(export, tmp_path / "best.pt", "--format", "torch", "--data", folder / "tiny.npz")
    assert "test images" in capsys.readouterr().out
    images = export.random_images(64, 32)
    assert images.shape == (64, 3, 32, 32) and images.float().std((1, 2, 3)).min() > 20
    assert torch.equal(images, export.random_images(64, 32))


@pytest.mark.slow
def test_a_wrong_export_is_not_written(folder, monkeypatch, tmp_path, refusal):
    original = export.to_torch

    def wrong(program, metadata):
        file, exported = original(program, metadata)
        return file, lambda images: exported(images) + 0.001

    monkeypatch.setattr(export, "to_torch", wrong)
    (tmp_path / "model.pt2").write_text("old")
    errors = refusal(export, folder / "best.pt", "--format", "torch", "--out", tmp_path / "model.pt2")
    assert "differs from PyTorch by 1.0e-03; nothing was written" in errors
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt2", "old")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/best.pt", "--out", "/no/such/model.onnx"], "--out: no such folder"),
        (["{folder}/best.pt", "--format", "torch", "--out", "{folder}/a.onnx"], "a.onnx should end in .pt2"),
        (["{folder}/best.pt", "--format", "onnx", "--out", "{folder}/a.pt"], "a.pt should end in .onnx"),
        (["{folder}/best.pt", "--data", "{big}"], "the images of --data are of 24 pixels, the checkpoint's of 16"),
        (["{folder}/best.pt", "--data", "{wide}"], "train_images must be square, got 12 x 16 pixels"),
        (["{folder}/best.pt", "--data", "nowhere.npz"], "no such file: nowhere.npz"),
        (["missing.pt"], "no such file: missing.pt"),
    ],
)
def test_exports_that_cannot_be(folder, tmp_path, refusal, arguments, message):
    arrays = tiny.arrays()
    arrays |= {f"{part}_images": arrays[f"{part}_images"][:, :12] for part in ("train", "test")}
    np.savez(tmp_path / "wide.npz", **arrays)
    names = {"folder": folder, "big": tiny.write_npz(tmp_path / "big.npz", side=24), "wide": tmp_path / "wide.npz"}
    assert message in refusal(export, *[argument.format(**names) for argument in arguments])
    assert not list(folder.glob("*.onnx"))


def test_onnx_says_what_it_needs(folder, monkeypatch, tmp_path, refusal):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    errors = refusal(export, folder / "best.pt", "--out", tmp_path / "model.onnx")
    assert "ONNX needs more packages (onnxruntime): pip install" in errors


def test_the_largest_difference_of_an_export_is_of_all_batches_and_not_a_number_is_infinite():
    net = model.PixelEmbedder(model.build("resnet20", 4, size=16).eval())
    images = export.random_images(64, 16)
    with torch.no_grad():
        assert export.largest_difference(net, net, images) == 0
        for size in export.BATCHES:
            for wrong, expected in ((0.25, 0.25), (torch.nan, float("inf"))):

                def one_off(batch, size=size, wrong=wrong):
                    z = net(batch)
                    z[-1, 0] += wrong * (len(batch) == size)
                    return z

                assert export.largest_difference(one_off, net, images) == pytest.approx(expected)


def test_an_export_says_how_it_is_used(folder):
    """Pictures are scaled to the size with the border."""
    saved = checkpoints.read(folder / "best.pt")
    net = model.build(**saved["network"] | {"size": 16, "border": 2})
    found = export.describe(net, saved, "uint8")
    assert "resize to 20 x 20, " in found["preprocessing"] and "its central 16 x 16;" in found["preprocessing"]
    assert json.loads(found["logistic"]) == saved["threshold"]["logistic"]
    assert json.loads(found["seen"]) == saved["data"]["seen"] == list(range(9))
    facts = json.loads(found["recogniser"])
    assert (facts["size"], facts["border"]) == (16, 2) and len(facts["trained"]) == 9
