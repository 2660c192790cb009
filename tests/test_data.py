"""data.py: splits, held-back images, P x K batches, augmentation."""

import dataclasses
import hashlib
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import data
import evaluate
import tiny
import train_classic

# --------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("classes", "split", "unseen"),
    [
        *((100, f"{100 - unseen}-{unseen}", unseen) for unseen in range(0, 100, 10)),
        (7, "90-10", 2),
        (37, "80-20", 7),
        (10, "3-1", 2),
        (5, "0-100", 5),
        (1, "0-1", 1),
    ],
)
def test_split_sizes(classes, split, unseen):
    names = [f"class {label}" for label in range(classes)]
    seen, last = data.split_classes(names, split)
    assert last == list(range(classes - unseen, classes)) and seen == list(range(classes - unseen))
    assert (seen, last) != data.split_classes(names, split, split_seed=1) or unseen in (0, classes)
    drawn_seen, drawn = data.split_classes(names, split, split_seed=1)
    assert len(drawn) == unseen and sorted(drawn_seen + drawn) == list(range(classes))
    assert data.split_classes(names, split, 1) == data.split_classes(names, split, 1)


@pytest.mark.parametrize("split", ["90", "90/10", "0-0", "a-b", "10-1000000", "cifar", "90-10+val", "-1-2", ""])
def test_wrong_splits_are_refused(split):
    with pytest.raises(ValueError, match="split"):
        data.split_classes([f"class {label}" for label in range(100)], split)


CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm""".split()


@pytest.mark.parametrize(
    ("split", "sizes", "digests"),
    [  # first 12 digits of the sha256 of the sorted names, joined by spaces, in the splits' own files
        ("cifar-fs", (64, 16, 20), ("9c1c5737bdab", "a4d5a75dcb3f", "fa4f899ce873")),
        ("fc100", (60, 20, 20), ("d8d596ceda4a", "3012221eb4c2", "aad1cace7c8f")),
    ],
)
def test_standard_splits(split, sizes, digests):
    seen, unseen = data.split_classes(CIFAR100, split)
    more, same = data.split_classes(CIFAR100, f"{split}+val")
    validation = sorted(set(more) - set(seen))
    assert same == unseen and sorted(more + unseen) == list(range(100)) and not set(seen) & set(validation)
    parts = seen, validation, unseen
    assert tuple(map(len, parts)) == sizes
    names = [" ".join(CIFAR100[label] for label in sorted(part)) for part in parts]
    assert tuple(hashlib.sha256(joined.encode()).hexdigest()[:12] for joined in names) == digests
    backwards = CIFAR100[::-1]
    assert {backwards[label] for label in data.split_classes(backwards, split)[1]} == set(names[2].split())


def test_each_class_is_unseen_in_one_fold():
    for seed in (None, 1):
        folds = [data.split_classes(CIFAR100[:95], f"{number}/10", seed) for number in range(1, 11)]
        assert sorted(label for _, unseen in folds for label in unseen) == list(range(95))
        assert all(sorted(seen + unseen) == list(range(95)) and len(unseen) in (9, 10) for seen, unseen in folds)
    assert folds[0] != data.split_classes(CIFAR100[:95], "1/10")
    for split in ("0/10", "11/10", "1/1", "1/48"):
        with pytest.raises(ValueError, match=f"split {split}: there are 2 to 47 folds of 95 classes"):
            data.split_classes(CIFAR100[:95], split)


def test_standard_splits_are_of_cifar100_alone():
    with pytest.raises(ValueError, match="leave --split-seed out"):
        data.split_classes(CIFAR100, "cifar-fs", split_seed=1)
    for names in (CIFAR100[:99], ["axe", *CIFAR100], [*CIFAR100[:99], "axe"]):
        with pytest.raises(ValueError, match="is for the 100 classes of CIFAR-100"):
            data.split_classes(names, "fc100")


def test_validation_classes_are_withheld_from_the_seen_ones():
    seen = data.split_classes(CIFAR100, "80-20")[0]
    assert data.withhold(CIFAR100, "80-20", seen, 0) == (seen, [])
    assert data.withhold(CIFAR100, "80-20", seen, 0.1) == (list(range(72)), list(range(72, 80)))
    for share in (0.01, 0.99, 2.0):
        with pytest.raises(ValueError, match="of 80 seen classes"):
            data.withhold(CIFAR100, "80-20", seen, share)
    for split, n in (("cifar-fs", 16), ("fc100", 20)):  # these name their own
        seen, unseen = data.split_classes(CIFAR100, split)
        left, validation = data.withhold(CIFAR100, split, seen, 0)
        assert left == seen and len(validation) == n and not {*validation} & {*seen, *unseen}
        everything = data.split_classes(CIFAR100, f"{split}+val")[0]
        assert data.withhold(CIFAR100, f"{split}+val", everything, 0) == (everything, [])


def test_a_data_set_can_have_a_split_of_its_own(tmp_path, monkeypatch, refusal):
    """train/, val/ and test/ of different classes, from training to the report; no option says so."""
    arrays = tiny.arrays(classes=9, train=24)
    parts = ["train", "test", "train", "val", "train", "test", "val", "train", "train"]  # of each class
    for number, (pixels, label) in enumerate(zip(arrays["train_images"], arrays["train_labels"].tolist(), strict=True)):
        folder = tmp_path / "photos" / parts[label] / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    own = {part: [label for label in range(9) if parts[label] == part] for part in ("train", "val", "test")}
    monkeypatch.chdir(tmp_path)
    options = cli.DataOptions("photos", image_size=16)
    train = data.load_for_training(options, 0, torch.device("cpu"))
    assert [train.facts[name] for name in ("seen", "validation", "unseen")] == [*own.values()]
    assert train.kept.labels.unique().tolist() == own["train"] == train.held_back.labels.unique().tolist()
    assert train.validation.labels.unique().tolist() == own["val"]
    withheld = data.load_for_training(dataclasses.replace(options, withhold=0.4), 0, torch.device("cpu"))
    assert withheld.facts["seen"] == [0, 2, 4] and withheld.facts["validation"] == [7, 8]
    usual = ["--image-size", 16, "--width", 4, "--device", "cpu", "--epochs", 4, "--batch-classes", 5]
    for more in (["--split", "80-20"], ["--split", "90-10"], ["--split-seed", 1]):
        assert "leave --split and --split-seed out" in refusal(train_classic, "--data", "photos", *usual, *more)
    tiny.run(train_classic, "--data", "photos", "--out", "run", *usual)
    tiny.run(evaluate, "run/best.pt", "--json", "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["split"] == "own" and [row["label"] for row in report["per_class"]] == own["test"]
    np.savez(tmp_path / "flat.npz", **arrays)  # the same classes, without that split
    loaded = evaluate.load("run/best.pt", evaluate.Options((), data="flat.npz"), torch.device("cpu"))
    assert (loaded.seen, loaded.unseen) == (own["train"], own["test"]) and "by the checkpoint's class" in loaded.split
    tiny.run(train_classic, "--data", "flat.npz", "--out", "flat", *usual[2:], "--split", "80-20")
    loaded = evaluate.load("flat/best.pt", evaluate.Options((), data="photos"), torch.device("cpu"))
    assert (loaded.seen, loaded.unseen) == ([*range(7)], [7, 8])
    loaded = evaluate.load("run/best.pt", evaluate.Options(()), torch.device("cpu"))
    assert len(loaded.data.test.of(own["train"])) == 5 * 4 and len(loaded.data.test.of(own["test"])) == 2 * 24
    assert loaded.calibration is not None
    assert "needs training images of unseen classes" in refusal(evaluate, "run/best.pt", "--adapt-published")
    tiny.run(evaluate, "run/best.pt", "--on", "validation", "--json", "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    assert [row["label"] for row in report["per_class"]] == own["val"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = f"../run/best.pt was trained on photos, which is not found from {tmp_path}/elsewhere; give --data PATH"
    assert message in refusal(evaluate, "../run/best.pt")
    tiny.run(evaluate, "../run/best.pt", "--data", "../photos")


def test_few_shot_images_are_all_of_them_in_standard_splits():
    labels = torch.tensor([0, 1, 2, 1])
    numbers = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13], dtype=torch.uint8)
    both = data.Images(numbers.view(8, 1, 1, 1).expand(8, 3, 2, 2), labels.repeat(2))
    made = data.Data("x", both[:4], both[4:], ["a", "b", "c"])
    assert data.few_shot_images(made, [1, 2], "90-10").images[:, 0, 0, 0].tolist() == [11, 12, 13]
    for split in ("cifar-fs", "fc100+val"):
        images = data.few_shot_images(made, [1, 2], split)
        assert images.images[:, 0, 0, 0].tolist() == [1, 2, 3, 11, 12, 13]
        assert images.labels.tolist() == [1, 2, 1, 1, 2, 1]


def test_standard_splits_train_on_the_test_images_of_seen_classes(tmp_path):
    """As the literature does. The seen classes are then measured on held-back images, the others on all theirs."""
    npz = tmp_path / "cifar.npz"
    np.savez(npz, **tiny.arrays(classes=100, train=8, test=3) | {"class_names": np.array(CIFAR100)})
    for split, images in (("80-20", 6), ("fc100", 6 + 3), ("fc100+val", 6 + 3)):
        train = data.load_for_training(cli.DataOptions(str(npz), split=split), 0, torch.device("cpu"))
        assert torch.bincount(train.kept.labels)[train.facts["seen"]].unique().tolist() == [images]
        assert torch.bincount(train.held_back.labels)[train.facts["seen"]].unique().tolist() == [2]
    options = ["--data", npz, "--split", "fc100", "--width", 4, "--device", "cpu", "--epochs", 0.2]
    tiny.run(train_classic, *options, "--out", tmp_path / "run")
    loaded = evaluate.load(str(tmp_path / "run/last.pt"), evaluate.Options(()), torch.device("cpu"))
    assert "their test images were trained on" in loaded.notes[-1]
    own = loaded.data.test.of(loaded.seen)
    assert torch.equal(own.images, data.hold_back(loaded.data.train.of(loaded.seen))[1].images)
    assert len(loaded.data.test.of(loaded.unseen)) == 20 * 3 and len(loaded.pictures) == 20 * (8 + 3)
    assert len(loaded.trained_on) == 60 * (6 + 3)
    choosing = evaluate.load(str(tmp_path / "run/last.pt"), evaluate.Options((), on="validation"), torch.device("cpu"))
    assert torch.equal(choosing.trained_on.images, loaded.trained_on.images)
    assert len(choosing.data.test.of(choosing.seen)) == 60 * 2 and len(choosing.pictures) == 20 * 8
    shutil.copy(npz, tmp_path / "other.npz")  # the same images by another name
    other = evaluate.load(
        str(tmp_path / "run/last.pt"), evaluate.Options((), data=str(tmp_path / "other.npz")), torch.device("cpu")
    )
    assert torch.equal(other.data.test.of(loaded.seen).images, own.images) and other.notes == loaded.notes
    more = ["--weights", tmp_path / "run/last.pt", "--out", tmp_path / "next"]
    tiny.run(train_classic, *options, "--split", "100-0", *more)  # what weights were trained on is not forgotten
    after = evaluate.load(str(tmp_path / "next/last.pt"), evaluate.Options(()), torch.device("cpu"))
    assert "their test images were trained on" in after.notes[-1]


def test_copies_are_counted_among_all_images_that_are_measured_or_trained_on(tmp_path):
    """Also test images that a standard split trains on, and training images of unseen classes."""
    npz, arrays = tmp_path / "cifar.npz", tiny.arrays(classes=100, train=8, test=3)
    options = ["--data", npz, "--split", "fc100", "--width", 4, "--device", "cpu", "--epochs", 0.2]
    np.savez(npz, **arrays | {"class_names": np.array(CIFAR100)})
    tiny.run(train_classic, *options, "--out", tmp_path / "run")
    loaded = evaluate.load(str(tmp_path / "run/last.pt"), evaluate.Options(()), torch.device("cpu"))
    ours, theirs = (
        (arrays[f"{part}_labels"] == label).nonzero()[0]
        for part, label in (("test", loaded.seen[0]), ("train", loaded.unseen[0]))
    )
    arrays["train_images"][theirs[0]] = arrays["test_images"][ours[0]]
    arrays["train_images"][theirs[1]] = arrays["train_images"][theirs[2]]
    np.savez(tmp_path / "copies.npz", **arrays | {"class_names": np.array(CIFAR100)})
    tiny.run(evaluate, tmp_path / "run/last.pt", "--data", tmp_path / "copies.npz", "--json", tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["measured"]["copies"] == {"of_training_images": 1, "of_test_images": 1}


def test_held_back_are_the_last_images_of_each_class():
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 2, 2, 2])  # seven 0s, four 1s, three 2s
    images = torch.arange(14, dtype=torch.uint8).view(14, 1, 1, 1).expand(14, 3, 2, 2)
    kept, held = data.hold_back(data.Images(images, labels))
    assert held.images[:, 0, 0, 0].tolist() == [5, 8, 9, 10]  # a pair of each class of 4 to 23 images
    assert kept.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 11, 12, 13]
    kept, held = data.hold_back(data.Images(images.repeat(32, 1, 1, 1), labels.repeat(32)))
    assert torch.bincount(held.labels).tolist() == [25, 16, 12]  # an eighth at most
    assert len(kept) == 14 * 32 - 53


def test_copies_are_counted():
    """Of training images, and of each other; a picture differs if one value does, or its labels' order in memory."""
    pixels = torch.randint(0, 256, (6, 4, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    train, test = data.Images(pixels[:4], torch.zeros(4)), data.Images(pixels[[0, 4, 4, 5, 0, 2, 4]], torch.zeros(7))
    assert data.copies(train, test) == (3, 3)
    test.store[0, 2, 3, 3] ^= 1
    assert data.copies(train, test) == (2, 2)
    assert data.copies(train[torch.empty(0, dtype=torch.int64)], test) == (0, 2)


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_have_p_classes_of_k_different_images():
    labels = torch.tensor([5, 3, 9]).repeat_interleave(torch.tensor([6, 4, 2]))
    shuffled = labels[torch.randperm(12)]
    sampler = data.Sampler(shuffled, torch.Generator().manual_seed(0))
    for _ in range(20):
        assert len(sampler.batch(sampler.task(2), 2).unique()) == 4
    index = sampler.batch(sampler.task(3), 4)
    by_class = shuffled[index].view(3, 4)
    assert (by_class == by_class[:, :1]).all() and sorted(by_class[:, 0].tolist()) == [3, 5, 9]
    for row, images in zip(by_class[:, 0].tolist(), index.view(3, 4), strict=True):
        assert len(images.unique()) == {5: 4, 3: 4, 9: 2}[row]  # a class of 2 shows each image twice


def test_a_large_class_beside_many_small_ones_takes_little_memory():
    labels = torch.cat((torch.arange(100_000).repeat_interleave(2), torch.zeros(1_000_000, dtype=torch.int64)))
    sampler = data.Sampler(labels, torch.Generator().manual_seed(0))  # a table of them would take 800 GB
    index = sampler.batch(torch.tensor([0, 7]), 3)
    assert labels[index].tolist() == [0] * 3 + [7] * 3 and len(index.unique()) == 5


def test_every_image_is_drawn_equally_often():
    sampler = data.Sampler(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.Generator().manual_seed(0))
    drawn = torch.cat([sampler.batch(sampler.task(1), 2) for _ in range(4000)])
    assert (torch.bincount(drawn, minlength=8) - 1000).abs().max() < 150  # 5 standard deviations


def test_images_of_small_classes_are_drawn_equally_often():
    """Each is repeated as often as any other of its class, however large another is."""
    sampler = data.Sampler(torch.tensor([0] * 3 + [1] * 4 + [2] * 7), torch.Generator().manual_seed(0))
    drawn = torch.cat([sampler.batch(torch.tensor([0, 1, 2]), 5) for _ in range(3000)])
    counts = torch.bincount(drawn, minlength=14)
    for own, expected in ((counts[:3], 5000), (counts[3:7], 3750), (counts[7:], 15000 / 7)):
        assert (own - expected).abs().max() < 250


def test_the_images_against_a_class_are_of_all_others():
    labels = torch.tensor([3, 5, 5, 7, 7, 7, 9])
    sampler = data.Sampler(labels, torch.Generator().manual_seed(0))
    for row in range(4):
        counts = torch.bincount(labels[sampler.against(row, 3000)], minlength=10)[[3, 5, 7, 9]]
        assert counts[row] == 0 and (counts[counts > 0] - 1000).abs().max() < 150 and (counts > 0).sum() == 3


ALPHABETS = [f"{alphabet}/{n:02}" for alphabet, n in (("A", 20), ("B", 30), ("C", 26), ("D", 24)) for n in range(n)]


@pytest.mark.parametrize(
    ("split", "share", "sizes"),
    [("90-10", 0.0, (76, 24)), ("60-40", 0.1, (20, 50)), ("100-0", 0.2, (76, 0)), ("100-0", 0.4, (50, 0))],
)
def test_splits_and_validation_classes_are_whole_alphabets(split, share, sizes):
    """The nearest number of them; classes without a / in their names are counted one by one, random ones not moved."""
    seen, unseen = data.split_classes(ALPHABETS, split)
    seen, validation = data.withhold(ALPHABETS, split, seen, share)
    assert [len(seen), len(unseen)] == [*sizes] and seen + validation + unseen == list(range(100))
    groups = [{ALPHABETS[label][0] for label in part} for part in (seen, validation, unseen)]
    assert sum(map(len, groups)) == 4 and bool(validation) == (share > 0)
    assert len(data.split_classes(ALPHABETS, split, 3)[1]) == int(split.split("-")[1])
    assert len(data.split_classes(ALPHABETS[:20], "80-20")[1]) == 4  # one alphabet


def test_whole_alphabets_are_not_divided_where_names_are_in_no_order():
    """Names in turns cannot be parted between alphabets; where one place can, it is taken."""
    mixed = [f"{alphabet}/{n}" for n in range(10) for alphabet in "AB"]
    assert len(data.split_classes(mixed, "90-10")[1]) == 2
    seen, unseen = data.split_classes(mixed + [f"C/{n}" for n in range(4)], "90-10")
    assert (len(seen), len(unseen)) == (20, 4)


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_is_a_shifted_reflected_flipped_copy(flip):
    side, reach, flips = 16, 2, flip
    images = torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    index = torch.tensor([4, 0, 2, 2, 1, 3] * 10)
    out = data.augment(images[index], torch.Generator().manual_seed(0), flip=flips)
    assert out.shape == (60, 3, side, side) and out.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(images.float(), (reach,) * 4, mode="reflect").to(torch.uint8)
    seen = set()
    for row, image in zip(index.tolist(), out, strict=True):
        matches = [
            (dy, dx, flip)
            for dy, dx in itertools.product(range(2 * reach + 1), repeat=2)
            for flip, crop in enumerate([padded[row, :, dy : dy + side, dx : dx + side]] * 2)
            if torch.equal(image, crop.flip(2) if flip else crop)
        ]
        assert matches
        seen.add(matches[0])
    assert len(seen) > (20 if flips else 15) and {flip for *_, flip in seen} == {0, int(flips)}  # of 50 or 25 ways


def test_an_image_is_distorted_by_an_affine_map_and_bent(monkeypatch):
    """A bright dot goes where the matrix drawn for its image says, and from there as far as documented; 0 changes
    nothing; what is outside is border."""
    y, x = torch.meshgrid(*[(torch.arange(64) + 0.5) / 32 - 1] * 2, indexing="ij")
    images = (-80 * ((x - 0.3).square() + (y + 0.2).square())).exp().expand(20, 3, 64, 64)
    assert torch.allclose(data.distort(images, 0.0, torch.Generator()), images, atol=1e-4)
    monkeypatch.setattr(data, "BEND", 0)
    out = data.distort(images, 0.3, torch.Generator().manual_seed(0))
    matrix = torch.eye(2, 3) + 0.3 * (2 * torch.rand(20, 2, 3, generator=torch.Generator().manual_seed(0)) - 1)
    expected = torch.linalg.solve(matrix[:, :, :2], torch.tensor([0.3, -0.2]) - matrix[:, :, 2])  # (20, 2): x, y
    for image, (column, row) in zip(out, expected.tolist(), strict=True):
        place = int(image[0].argmax())
        if max(abs(column), abs(row)) < 0.9:
            assert abs(float(x.flatten()[place]) - column) < 0.06 and abs(float(y.flatten()[place]) - row) < 0.06
    monkeypatch.undo()
    bent = data.distort(images[:1].expand(400, 3, 64, 64), 0.1, torch.Generator().manual_seed(0))[:, 0].flatten(1)
    monkeypatch.setattr(data, "BEND", 0)
    straight = data.distort(images[:1].expand(400, 3, 64, 64), 0.1, torch.Generator().manual_seed(0))[:, 0].flatten(1)
    moved = x.flatten()[bent.argmax(1)] - x.flatten()[straight.argmax(1)]
    assert 0.5 * 0.04 < float(moved.std()) < 1.1 * 0.04 and abs(float(moved.mean())) < 0.01
    monkeypatch.undo()
    assert torch.allclose(data.distort(torch.ones(9, 3, 16, 16), 1.0, torch.Generator()), torch.ones(1))


@pytest.mark.parametrize("way", range(8))
def test_a_turned_image_is_the_augmented_one_turned(way):
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    index = torch.tensor([4, 0, 2, 2, 1, 3] * 10)
    upright = data.augment(images[index], torch.Generator().manual_seed(0))
    turns = torch.where(torch.arange(60) % 2 == 0, way, 0)
    out = data.augment(images[index], torch.Generator().manual_seed(0), turns)
    assert torch.equal(out[1::2], upright[1::2])
    mirrored = upright.flip(3) if way >= 4 else upright
    assert torch.equal(out[::2], torch.rot90(mirrored, way, (2, 3))[::2])


def test_classes_are_turned_as_often_as_wanted(tmp_path):
    def turns(n: int, **given) -> torch.Tensor:
        options = cli.DataOptions(data=str(tiny.write_npz(tmp_path / "tiny.npz")), split="75-25", **given)
        return torch.bincount(data.load_for_training(options, 0, torch.device("cpu")).turns(n), minlength=8)

    assert (turns(30_000, rotate=0.3) - torch.tensor([21_000, 3000, 3000, 3000, 0, 0, 0, 0])).abs().max() < 400
    assert turns(99, rotate=0.0)[0] == 99
    assert turns(8000, rotate=0.875, flip=False).sub(1000).abs().max() < 150


@pytest.mark.parametrize(("share", "sides"), [(0.375, {3, 4, 5, 6}), (0.25, {2, 3, 4}), (3.0, {16})])
def test_a_square_is_cut_out_of_each_image(share, sides):
    images = torch.rand(200, 3, 16, 16) + 1
    out = data.cut_out(images, share, torch.Generator().manual_seed(0))
    lost = out == 0
    assert torch.equal(out[~lost], images[~lost]) and (lost == lost[:, :1]).all()
    rows, columns = lost[:, 0].any(2), lost[:, 0].any(1)
    assert torch.equal(lost[:, 0], rows[:, :, None] & columns[:, None, :])  # a rectangle: a square, or what is inside
    assert {*rows.sum(1).tolist(), *columns.sum(1).tolist()} == sides


def test_channel_statistics():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    mean, std = data.channel_statistics(images)
    exact = images.double() / 255
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), exact.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), exact.std((0, 2, 3), correction=0))


RAMP = torch.arange(16, dtype=torch.uint8).expand(4000, 3, 16, 16).contiguous(memory_format=torch.channels_last)


def test_half_of_the_images_are_flipped_or_none(tmp_path):
    flipped = data.augment(RAMP, torch.Generator().manual_seed(0), shift=False)[:, 0, 0, 0] > 8
    assert 0.46 < flipped.float().mean() < 0.54
    npz = str(tiny.write_npz(tmp_path / "tiny.npz"))
    train = data.load_for_training(cli.DataOptions(npz, split="75-25", flip=False), 0, torch.device("cpu"))
    ramps = dataclasses.replace(train.kept, store=RAMP[: len(train.kept.store)])
    train = dataclasses.replace(train, kept=ramps)
    images = train.batch(lambda images: images.float(), torch.zeros(50, dtype=torch.int64))[0]
    assert (images[..., 9] > images[..., 6]).all()


def test_all_shifts_are_as_likely():
    found = data.shifted(16, 9000, torch.Generator().manual_seed(0), True)[:, 8]
    assert (torch.bincount(found, minlength=11)[6:11] - 1800).abs().max() < 200


def test_any_part_of_an_image_is_as_likely_to_be_cut_out():
    images = data.cut_out(torch.ones(8000, 3, 16, 16), 0.25, torch.Generator().manual_seed(0))
    lost = (images == 0)[:, 0].float().mean(0)
    assert torch.allclose(lost[4:12, 4:12], torch.tensor(1 / 16), atol=0.015)


def test_images_of_a_training_are_distorted(tmp_path):
    npz, made = str(tiny.write_npz(tmp_path / "tiny.npz")), []
    for strength in (0.0, 0.5):
        train = data.load_for_training(cli.DataOptions(npz, split="75-25", distort=strength), 0, torch.device("cpu"))
        made.append(train.batch(lambda images: images.float(), torch.arange(20))[0])
    assert not torch.equal(*made)
