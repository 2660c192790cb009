"""Images in memory: class splits, held-back images, P x K batches, augmentation, and the data of a training.

A data set is one uint8 tensor; a batch is a tensor of indices into it; cropping and flipping happen while the batch is
gathered. There are no worker processes and no Python code that runs once per image. sources.py reads the images.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from checkpoints import trained_classes
from cli import DataOptions
from sources import Data, Images, OwnSplit, listed, load, load_runs  # noqa: F401 (data.load is how scripts read a data set)

HELD_BACK = 25  # images of each seen class, or an eighth, its last training images, to validate and calibrate with
BEND = 0.4  # of `distort`
USUAL_SPLIT = "90-10"
VALIDATION = 100  # images of each validation class, at most: its last training images

# Validation and test classes of the standard few-shot splits of CIFAR-100; the others are for training.
STANDARD_SPLITS = {
    "cifar-fs": (  # Bertinetto et al. 2019, arXiv:1805.08136
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark "
        "television tractor",
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table "
        "telephone wardrobe whale woman worm",
    ),
    "fc100": (  # Oreshkin et al. 2018, arXiv:1805.10123: whole superclasses, four for validation and four for testing
        "bear leopard lion tiger wolf camel cattle chimpanzee elephant kangaroo crab lobster snail spider worm "
        "hamster mouse rabbit shrew squirrel",
        "beaver dolphin otter seal whale bee beetle butterfly caterpillar cockroach fox porcupine possum raccoon skunk "
        "baby boy girl man woman",
    ),
}


# --------------------------------------------------------------------------------------------------------------- splits


def split_classes(
    class_names: list[str], split: str = USUAL_SPLIT, split_seed: int | None = None, own: OwnSplit | None = None
) -> tuple[list[int], list[int]]:
    """Labels of the seen and of the unseen classes. Raises ValueError.

    `own`: the split that the data set has; `split` must then be "own", or "0-b".
    "a-b": max(2, round(C b / (a + b))) classes are unseen, none in "a-0" and all in "0-b": `split_seed` draws them, or
    they are the last labels, rounded to `whole_groups`.
    "k/n": those of the k-th of n folds, drawn by `split_seed` or 0: each class is unseen in one of them.
    "cifar-fs", "fc100": the test classes are unseen, the training classes seen; the validation classes are neither, so
    that a recipe can be chosen on them. "cifar-fs+val", "fc100+val": they are seen too, as in final runs.
    """
    if split_seed is not None and not 0 <= split_seed < 2**63:
        raise ValueError(f"--split-seed must be 0 or more and below 2**63, got {split_seed}")
    if own is not None and not split.startswith("0-"):
        if split != "own" or split_seed is not None:
            raise ValueError("the data set has seen and unseen classes of its own; leave --split and --split-seed out")
        return own[0], own[2]
    name, with_validation = split.removesuffix("+val"), split.endswith("+val")
    if name in STANDARD_SPLITS:
        if split_seed is not None:
            raise ValueError(f"split {split} names its classes; leave --split-seed out")
        validation, test = (standard_classes(class_names, name, part) for part in (0, 1))
        kept_out = {*test} if with_validation else {*test, *validation}
        return [label for label in range(len(class_names)) if label not in kept_out], test
    n_classes = len(class_names)
    match = re.fullmatch(r"(\d{1,9})([-/])(\d{1,9})", split)
    if not match or int(match[3]) + int(match[1]) == 0:
        choices = ", ".join(f"{name}, {name}+val" for name in STANDARD_SPLITS)
        like = "like 90-10 (seen-unseen shares of the classes) or 3/10 (the third of ten folds)"
        raise ValueError(f"split must be {choices}, {like}, got {split!r}")
    a, b = int(match[1]), int(match[3])
    if match[2] == "/":
        if not (1 <= a <= b and 2 <= b <= n_classes // 2):
            raise ValueError(
                f"split {split}: there are 2 to {n_classes // 2} folds of {n_classes} classes, from 1/{b} on"
            )
        order = torch.randperm(n_classes, generator=torch.Generator().manual_seed(split_seed or 0))
        unseen = {*order[a - 1 :: b].tolist()}
        return [label for label in range(n_classes) if label not in unseen], sorted(unseen)
    n_unseen = max(2, round(n_classes * b / (a + b))) if b else 0
    if a and n_classes - n_unseen < 2:
        raise ValueError(f"split {split} of {n_classes} classes leaves fewer than 2 to train on")
    order, first = list(range(n_classes)), n_classes - n_unseen
    if split_seed is not None:
        order = torch.randperm(n_classes, generator=torch.Generator().manual_seed(split_seed)).tolist()
    elif a and b:
        first = whole_groups(class_names, first)
    return sorted(order[:first]), sorted(order[first:])


def whole_groups(class_names: list[str], first: int) -> int:
    """The place nearest to `first` that divides no group of classes, with two classes or more on both sides.

    "Greek/character01" is in the group "Greek", an alphabet; a class with no / in its name is a group of its own.
    Where every place divides one, `first` itself.
    """
    groups = [name.rpartition("/")[0] or name for name in class_names]
    last = {group: place for place, group in enumerate(groups)}
    ends = [*itertools.accumulate((last[group] for group in groups), max)]  # of the groups that have begun
    begins = [n for n in range(2, len(groups) - 1) if ends[n - 1] < n]
    return min(begins, key=lambda place: abs(place - first), default=first)


def pick_classes(
    data: Data, trained: dict, facts: dict, split: str | None, split_seed: int | None
) -> tuple[list[int], list[int], str]:
    """Labels of the seen and the unseen classes of a data set, and the split in words. Raises ValueError.

    Without a split, its own or those of a checkpoint with options `trained` and data `facts`; if classes came or went
    since, or the split did, what it was trained on is seen, by name, and all others unseen. Its validation classes are
    never seen.
    """
    names, usual = data.class_names, {"split": "own"} if data.own_split else trained
    known, validation = facts["classes"], {facts["classes"][label] for label in facts.get("validation", [])}
    by_name = bool(known) and split is None and split_seed is None
    if not by_name or known == names:
        split = split or usual.get("split") or USUAL_SPLIT
        if by_name and split == "own" and not data.own_split:
            split = USUAL_SPLIT
        split_seed = usual.get("split_seed") if split_seed is None else split_seed
        seen, unseen = split_classes(names, split, split_seed, data.own_split)
        seen = [label for label in seen if names[label] not in validation]
        if not by_name or seen == facts["seen"]:
            return seen, unseen, split if split_seed is None else f"{split}, seed {split_seed}"
    learned = {names[label] for label in facts["seen"]} if known == names else trained_classes(facts)
    seen = [label for label, name in enumerate(names) if name in learned - validation]
    unseen = [label for label, name in enumerate(names) if name not in learned | validation]
    return seen, unseen, f"{len(seen)}-{len(unseen)} by the checkpoint's class names"


def standard_classes(class_names: list[str], name: str, part: int) -> list[int]:
    """Labels of the validation (part 0) or test classes (1) of a standard split. Raises ValueError."""
    wanted = STANDARD_SPLITS[name][part].split()
    missing = [each for each in wanted if each not in class_names]
    if len(class_names) != 100 or missing:
        lacking = f", but {', '.join(missing[:5])} is missing" if missing else ""
        raise ValueError(f"split {name} is for the 100 classes of CIFAR-100; there are {len(class_names)}{lacking}")
    return sorted(map(class_names.index, wanted))


def withhold(class_names: list[str], split: str, seen: list[int], share: float) -> tuple[list[int], list[int]]:
    """(seen classes without the validation classes, validation classes), as labels. Raises ValueError.

    Recipes are compared on the validation classes: the last `share` of the seen classes, rounded to `whole_groups`, or
    for a share of 0 those that a standard split names, if any.
    """
    if share == 0:
        own = split in STANDARD_SPLITS
        return seen, standard_classes(class_names, split, 0) if own else []
    n = round(share * len(seen))
    if not 2 <= n <= len(seen) - 2:
        raise ValueError(f"--withhold {share} of {len(seen)} seen classes is {n}; 2 or more must stay on each side")
    first = whole_groups([class_names[label] for label in seen], len(seen) - n)
    return seen[:first], seen[first:]


def is_standard(split: str) -> bool:
    """Is this a split of the few-shot literature, which uses the test images of all classes as well?"""
    return split.removesuffix("+val") in STANDARD_SPLITS


def few_shot_images(data: Data, classes: list[int], split: str) -> Images:
    """Images for N-way K-shot: the test images; with the standard splits all of them."""
    test = data.test.of(classes)
    return data.train.of(classes) + test if is_standard(split) else test


def copies(train: Images, test: Images) -> tuple[int, int]:
    """How many test images equal a training image, pixel for pixel, and how many an earlier test image."""
    batches = ((batch.permute(0, 2, 3, 1).numpy() for batch in part.split(1000)) for part in (train, test))
    hashes = ([hash(image.tobytes()) for batch in part for image in batch] for part in batches)
    known, tested = (torch.tensor(part, dtype=torch.int64) for part in hashes)
    return int(torch.isin(tested, known).sum()), len(tested) - len(tested.unique())


def hold_back(train: Images) -> tuple[Images, Images]:
    """(kept, held back): the last HELD_BACK images of each class are held back, never trained on.

    That is at most an eighth of the class; 2, a pair, of a class of 4 to 23 images, and none of a smaller one.
    """
    counts = torch.bincount(train.labels)
    return train.part(torch.where(counts >= 4, (counts // 8).clamp(min=2, max=HELD_BACK), 0))


def parts_of_training(
    data: Data, seen: list[int], validation: list[int], with_tests: bool
) -> tuple[Images, Images, Images]:
    """What a training has: images to train on, `with_tests` those of the seen classes too, held-back ones, and those of
    the validation classes."""
    kept, held_back = hold_back(data.train.of(seen))
    return kept + data.test.of(seen) if with_tests else kept, held_back, data.train.of(validation)


# -------------------------------------------------------------------------------------------------------------- batches


class Sampler:
    """Draws P classes x K images, with equal chances for each class and, within it, for each image."""

    def __init__(self, labels: Tensor, generator: torch.Generator, tasks: torch.Generator | None = None):
        """`labels` (N,) on the CPU; `generator` makes the draws repeatable, those of classes, if given, `tasks`."""
        self.classes, self.counts = labels.unique(return_counts=True)
        self.order, self.starts = torch.argsort(labels, stable=True), self.counts.cumsum(0) - self.counts
        self.largest = int(self.counts.max())
        self.generator, self.tasks = generator, tasks or generator

    def task(self, way: int) -> Tensor:
        """`way` different classes (fewer if there are fewer), as places in `classes`: (way,)."""
        return torch.randperm(len(self.classes), generator=self.tasks)[:way]

    def against(self, place: int, n: int) -> Tensor:
        """Indices (n,) of images of other classes than that at `place`, which must not be the only one."""
        others = torch.randint(len(self.classes) - 1, (n,), generator=self.generator)
        return self.batch(others + (others >= place), 1)

    def batch(self, places: Tensor, per_class: int) -> Tensor:
        """`per_class` images of each class at `places`, as indices (len(places) * per_class,), class after class.

        Images of a class differ, unless the class is smaller than `per_class`.
        """
        counts = self.counts[places, None]
        chance = torch.rand(len(places), self.largest, generator=self.generator)
        chance -= (torch.arange(self.largest) >= counts).float()  # what is no image of a smaller class comes last
        draw = chance.topk(min(per_class, self.largest)).indices
        draw = draw.gather(1, torch.arange(per_class) % counts.clamp(max=draw.shape[1]))
        return self.order[self.starts[places, None] + draw].flatten()


def augment(
    images: Tensor, generator: torch.Generator, turns: Tensor | None = None, flip: bool = True, shift: bool = True
) -> Tensor:
    """Images (B, 3, H, W) with a random `shift` by up to an eighth of the side, reflected, and a random `flip`.

    Images are stored channels last. `turns` (B,) int64, 0..7: quarters of a circle by which square images are rotated
    as well, counter-clockwise, 4 to 7 after being mirrored.
    """
    count, channels, height, width = images.shape
    y = shifted(height, count, generator, shift)
    x = shifted(width, count, generator, shift)
    if flip:
        x = torch.where(torch.rand(count, 1, generator=generator) < 0.5, x.flip(1), x)
    if turns is not None:
        quarters = turns[:, None] % 4
        x = torch.where(turns[:, None] >= 4, x.flip(1), x)
        y = torch.where(quarters >= 2, y.flip(1), y)
        x = torch.where((quarters == 1) | (quarters == 2), x.flip(1), x)
    y, x = y.to(images.device), x.to(images.device)  # small: no wait for a GPU
    first = torch.arange(count, device=images.device)[:, None, None] * height
    pixel = (first + y[:, :, None]) * width + x[:, None, :]  # (B, H, W)
    if turns is not None:
        odd = (turns % 2 == 1).to(images.device)[:, None, None]
        pixel = torch.where(odd, pixel.mT, pixel)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)  # a view: channels are last in memory
    batch = pixels.index_select(0, pixel.flatten())
    return batch.view(count, height, width, channels).permute(0, 3, 1, 2)


def crop_and_colour(images: Tensor, size: int, crop: float, jitter: float, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) uint8, each cropped and coloured at random: (B, 3, size, size) uint8.

    With `crop`, a part of at least this share of the area, of sides 3:4 to 4:3, is scaled to `size` (Szegedy et al.
    2014, arXiv:1409.4842, sec. 6). Brightness, contrast and saturation change by a factor of 1 - `jitter` to
    1 + `jitter`, in random order.
    """
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(size, (crop, 1.0))] if crop else []
    change = v2.Compose([*steps, v2.ColorJitter(jitter, jitter, jitter)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.stack([change(image) for image in images])  # of a batch, all would change alike


def distort(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W), each rotated, scaled, sheared, shifted and bent at random; borders are continued.

    In coordinates of -1..1: an affine map whose matrix (2, 3) has entries within `strength` of the identity's, and a
    smooth displacement, normal with standard deviation BEND * `strength` at 5 x 5 points.
    """
    matrix = torch.eye(2, 3) + strength * (2 * torch.rand(len(images), 2, 3, generator=generator) - 1)
    bend = BEND * strength * torch.randn(len(images), 2, 5, 5, generator=generator)
    bend = F.interpolate(bend.to(images.device), images.shape[2:], mode="bicubic", align_corners=True)
    grid = F.affine_grid(matrix.to(images.device), images.shape, align_corners=False) + bend.permute(0, 2, 3, 1)
    distorted = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return distorted.contiguous(memory_format=torch.channels_last)


def cut_out(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) with 0 in a square around a random pixel of each, its side a `share` of the image's.

    Cutout (DeVries and Taylor 2017, arXiv:1708.04552); the square may reach over the border.
    """
    hit = []
    for side in images.shape[2:]:
        middle = torch.randint(side, (len(images), 1), generator=generator).to(images.device)
        hit.append((2 * (torch.arange(side, device=images.device) - middle) + 1).abs() <= share * side)
    return images.masked_fill(hit[0][:, None, :, None] & hit[1][:, None, None, :], 0)


def shifted(side: int, n: int, generator: torch.Generator, shift: bool) -> Tensor:
    """Source coordinates (n, side) of n random shifts by up to side/8 pixels, reflected at the borders, or of none."""
    reach = side // 8 if shift else 0
    coordinate = torch.arange(side) + torch.randint(-reach, reach + 1, (n, 1), generator=generator)
    coordinate = coordinate.abs()
    return torch.where(coordinate >= side, 2 * (side - 1) - coordinate, coordinate)


def channel_statistics(images: Tensor | Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, 3, H, W) uint8 images, on the scale 0..1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for batch in images.split(1000):
        counts += torch.stack([torch.bincount(channel.flatten().cpu(), minlength=256) for channel in batch.unbind(1)])
    mean, std = [], []
    for share in counts.double() / counts.sum(1, keepdim=True):
        mean.append(float(share @ levels))
        std.append(max(float(share @ (levels - mean[-1]).square()) ** 0.5, 1e-3))  # a constant channel stays finite
    return mean, std


# ---------------------------------------------------------------------------------------------------------- a training


@dataclass(frozen=True)
class TrainingData:
    """The seen classes' images, on the device, and what a checkpoint needs to know of the data."""

    kept: Images
    held_back: Images
    validation: Images | None  # images of classes that are not trained on, none of them unseen
    sampler: Sampler
    generator: torch.Generator  # of this process's images and their augmentation
    options: DataOptions  # of the augmentation
    device: torch.device  # of the batches
    facts: dict  # name, source, classes, seen, validation, unseen, fingerprint, ...

    @functools.cached_property
    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the kept images' channels, on the scale 0..1."""
        return channel_statistics(self.kept)

    @property
    def ways(self) -> int:
        """In how many ways a class is shown with --rotate, each as a class of its own; see `augment`."""
        return 4 if self.options.flip else 8

    def turns(self, n: int) -> Tensor:
        """How each of n classes is shown (n,), as `augment` takes it: 1..ways-1 with probability --rotate, else 0."""
        turned = torch.rand(n, generator=self.generator) < (self.options.rotate or 0)
        return torch.where(turned, torch.randint(1, self.ways, (n,), generator=self.generator), 0)

    def batch(self, normalise: Callable, index: Tensor, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Augmented images (B, 3, H, W) float32 and labels (B,) of an index (B,).

        `normalise` is the network's; `turns` (B,) say how each image is rotated or mirrored.
        """
        options, generator = self.options, self.generator
        if not options.rotate:
            turns = None  # all are upright
        images = self.kept.pixels(index, border=bool(options.crop))
        if options.crop or options.jitter:
            images = crop_and_colour(images, self.kept.size, options.crop, options.jitter, generator)
        images = augment(images, generator, turns, options.flip, not options.crop)
        images = normalise(images.to(self.device))
        if options.distort:
            images = distort(images, options.distort, generator)
        if options.cutout:
            images = cut_out(images, options.cutout, generator)
        return images, self.kept.labels[index].to(self.device)

    def samples(self, normalise: Callable, augmented: bool, batches: int = 20, size: int = 250) -> Iterator[Tensor]:
        """Images (B, 3, H, W) float32 of any classes in batches, as they are or augmented; the same at every call."""
        own = replace(self, generator=torch.Generator().manual_seed(0))
        drawn = torch.randperm(len(self.kept), generator=own.generator)[: batches * size]
        for index in drawn.tensor_split(-(-len(drawn) // size)):  # of one size: all count alike
            if augmented:
                yield own.batch(normalise, index, own.turns(len(index)))[0]
            else:
                yield normalise(self.kept.pixels(index).to(self.device))


def fingerprint(parts: Iterable[Images], facts: dict) -> str:
    """A hash of all that a training sees of its data, so that a run is not resumed with other images or labels."""
    found = hashlib.sha256(repr([facts[name] for name in ("classes", "seen", "validation", "unseen")]).encode())
    for images in parts:
        if images.mapped:
            found.update(images.mapped.fingerprint.encode() + images.rows.numpy().tobytes())
        else:
            for batch in images.split(1000):
                found.update(batch.permute(0, 2, 3, 1).contiguous().numpy())
        found.update(images.labels.numpy())
    return found.hexdigest()


def load_for_training(options: DataOptions, seed: int, device: torch.device) -> TrainingData:
    """Load the data, take the seen classes and hold back their last images. Raises ValueError or OSError."""
    with distributed.first_process_first():  # it downloads
        border = options.image_size // 14 if options.crop else 0  # the usual crop of 224 pixels from 256
        loaded = load(options.data, options.data_root, options.image_size, border)
    split = options.split or ("own" if loaded.own_split else USUAL_SPLIT)
    seen, unseen = split_classes(loaded.class_names, split, options.split_seed, loaded.own_split)
    if not seen:
        raise ValueError(f"--split {split} leaves no class to train on; evaluate.py takes it")
    seen, withheld = withhold(loaded.class_names, split, seen, options.withhold)
    if loaded.own_split and not withheld:
        withheld = loaded.own_split[1]
    kept, held_back, others = parts_of_training(loaded, seen, withheld, is_standard(split))
    validation = others.part(torch.full((len(loaded.class_names),), VALIDATION))[1] if withheld else None
    counts = torch.bincount((kept + others).labels, minlength=len(loaded.class_names)).tolist()
    for kind, labels in (("seen", seen), ("validation", withheld)):
        few = [loaded.class_names[label] for label in labels if counts[label] < 2]
        if few:
            raise ValueError(f"{kind} classes need 2 training images or more, an anchor and a positive: {listed(few)}")
    if len(held_back.labels.unique()) < 2:
        raise ValueError("two seen classes need 4 training images or more: some are held back to measure")
    if len(withheld) == 1:
        raise ValueError(f"there is one validation class, {loaded.class_names[withheld[0]]}; two are needed, or none")
    facts = {"name": loaded.name, "source": options.data, "classes": loaded.class_names}
    facts |= {"seen": seen, "validation": withheld, "unseen": unseen, "trained_on_test": is_standard(split)}
    facts["fingerprint"] = fingerprint((kept, held_back, others), facts)
    generator = torch.Generator().manual_seed(seed)
    tasks = generator
    if distributed.world() > 1:
        tasks = torch.Generator().manual_seed(seed)  # all processes draw the same tasks
        generator.manual_seed(int(torch.randint(2**62, (distributed.rank() + 1,), generator=generator)[-1]))
    print(
        f"{loaded.name}: {len(kept)} training images of {len(seen)} seen classes, {len(held_back)} more held back; "
        f"{len(unseen)} classes unseen" + (f"; validation on {len(withheld)} others" if withheld else "")
    )
    return TrainingData(
        kept=kept.to(device),
        held_back=held_back,
        validation=validation,
        sampler=Sampler(kept.labels, generator, tasks),
        generator=generator,
        options=options,
        device=device,
        facts=facts,
    )
