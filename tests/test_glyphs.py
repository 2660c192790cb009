"""The embedded data set: real characters, no homoglyphs, the same bytes every time, a cache that heals."""

import itertools
import math
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import glyphs

CLASSES = glyphs.classes()
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
ALIKE = 0.85  # correlation from which two characters count as homoglyphs
HOMOGLYPHS = ("AΑ", "Oo", "0O", "cс", "Zz", "l1", "bd", "ΓГ", "θΘ", "mт", "3З", "NИ", "ШЩ", "uս", "Жж", "عغ")


@pytest.fixture(scope="module")
def masks() -> dict[str, Tensor]:
    fonts = glyphs.open_faces()
    return {char: glyphs.render(fonts, char) for char in CLASSES + list("".join(HOMOGLYPHS))}


# ----------------------------------------------------------------------------------------------------------- characters


def test_classes_are_many_and_the_last_ones_mix_the_scripts():
    names = [unicodedata.name(char) for char in CLASSES]
    assert 100 <= len(set(names)) == len(CLASSES) <= 256
    scripts = {"ARABIC", "ARMENIAN", "CYRILLIC", "DIGIT", "GEORGIAN", "GREEK", "HEBREW", "LAO", "LATIN"}
    assert scripts <= {name.split()[0] for name in names}
    assert len({name.split()[0] for name in names[-10:]}) >= 8
    assert len({name.split()[0] for name in names[:10]}) >= 8


def test_faces_really_have_the_characters():
    """Against fontTools' reading of the fonts: the code point is there, with the right glyph if a name says which."""
    fonts = glyphs.open_faces()
    assert not any("LastResort" in face for face in fonts)
    for char in CLASSES:
        assert sum(glyphs.covers(face, font, char) for face, font in fonts.items()) >= 4, char
    for face, font in fonts.items():
        cmap = TTFont(FONTS / f"{face}.ttf").getBestCmap()
        for char in CLASSES + list("αЖ!<"):
            if glyphs.covers(face, font, char):
                assert cmap.get(ord(char), ".notdef") != ".notdef", (face, char)
                assert not face.startswith("cm") or cmap[ord(char)] in (char, unicodedata.name(char)[6:].lower())


def test_the_drawn_glyph_is_the_right_one(masks):
    """Each mask correlates with Pillow's drawing of the same character more than with that of any other class."""
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 80, layout_engine=ImageFont.Layout.BASIC)
    drawn = []
    for char in CLASSES:
        image = Image.new("L", (240, 240))
        ImageDraw.Draw(image).text((80, 80), char, fill=255, font=font)
        ink = image.crop(image.getbbox())
        scale = glyphs.GLYPH / max(ink.size)
        ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BOX)
        image = Image.new("L", (glyphs.CANVAS, glyphs.CANVAS))
        image.paste(ink, ((glyphs.CANVAS - ink.width) // 2, (glyphs.CANVAS - ink.height) // 2))
        drawn.append(np.asarray(image, np.float32).ravel())
    ours = np.stack([masks[char][0].numpy().ravel() for char in CLASSES])
    correlation = np.corrcoef(ours, np.stack(drawn))[: len(CLASSES), len(CLASSES) :]
    assert (correlation.argmax(1) == np.arange(len(CLASSES))).all()
    assert correlation.diagonal().min() > 0.75


# ----------------------------------------------------------------------------------------------------------- homoglyphs


def transforms() -> Tensor:
    """(V, 2, 2) linear maps: what separates two drawings of one class, and mirroring, the usual augmentation."""
    maps = []
    for degrees, shear, squeeze, mirror in itertools.product((-15, 0, 15), (-0.2, 0, 0.2), (0.85, 1, 1.18), (1, -1)):
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        stretch = torch.tensor([[squeeze * mirror, 0], [0, 1 / squeeze]])
        maps.append(torch.tensor([[cos, -sin], [sin, cos]]) @ torch.tensor([[1.0, shear], [0, 1]]) @ stretch)
    return torch.stack(maps)


def describe(masks: Tensor, maps: Tensor, side: int = 24) -> Tensor:
    """Every mask (G, S, S) seen through every map (V, 2, 2), moved to its centre of mass and scaled to unit radius of
    gyration: (G * V, side^2) vectors of mean 0 and norm 1, so that a product of two is their correlation."""
    axis = (torch.arange(masks.shape[1]) + 0.5) / masks.shape[1] * 2 - 1
    weight = masks / masks.sum((1, 2), keepdim=True)
    x, y = (weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)
    dx, dy = axis - x[:, None], axis - y[:, None]
    xx, yy = (weight.sum(1) * dx**2).sum(1), (weight.sum(2) * dy**2).sum(1)
    xy = torch.einsum("gyx,gy,gx->g", weight, dy, dx)
    covariance = torch.stack((xx, xy, xy, yy), 1).view(-1, 1, 2, 2)
    inverse = torch.linalg.inv(maps)
    radius = (inverse @ covariance @ inverse.mT).diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()  # (G, V), after the map
    linear = maps * 2 * radius[..., None, None]
    centre = torch.stack((x, y), 1)[:, None, :, None].expand(-1, len(maps), -1, -1)
    theta = torch.cat((linear, centre), 3).flatten(0, 1)
    grid = F.affine_grid(theta, (len(theta), 1, side, side), align_corners=False)
    grid = grid.view(len(masks), len(maps) * side, side, 2)  # all maps of a mask in one tall picture
    seen = F.grid_sample(masks[:, None], grid, align_corners=False).view(len(theta), -1)
    return F.normalize(seen - seen.mean(1, keepdim=True), dim=1)


def likeness(masks: dict[str, Tensor], chars: list[str]) -> Tensor:
    """(C, C) largest correlation of a transformed face of one character with a face of the other; 0 on the diagonal."""
    every = torch.cat([masks[char] for char in chars])
    owner = torch.arange(len(chars)).repeat_interleave(torch.tensor([len(masks[char]) for char in chars]))
    plain, maps = describe(every, torch.eye(2)[None]).T, transforms()
    best = torch.stack([(describe(masks[char], maps) @ plain).amax(0) for char in chars])  # (C, G)
    best = torch.zeros(len(chars), len(chars)).scatter_reduce(1, owner.expand_as(best), best, "amax")
    return torch.maximum(best, best.T).fill_diagonal_(0)


def test_no_two_classes_are_homoglyphs(masks):
    alike = likeness(masks, CLASSES)
    worst = divmod(int(alike.argmax()), len(CLASSES))
    assert alike.max() < ALIKE, f"{CLASSES[worst[0]]} and {CLASSES[worst[1]]}: {alike.max():.3f}"
    assert alike.max() > 0.5  # the measure is not blind


@pytest.mark.parametrize("pair", HOMOGLYPHS)
def test_the_measure_finds_known_homoglyphs(masks, pair):
    assert likeness(masks, list(pair)).max() >= ALIKE


# --------------------------------------------------------------------------------------------------------------- images


def test_layout_and_determinism():
    first, again, other = (glyphs.generate(CLASSES[:3], 6, 2, seed) for seed in (0, 0, 1))
    assert first.train_images.shape == (18, 32, 32, 3) and first.test_images.shape == (6, 32, 32, 3)
    assert all(array.dtype == np.uint8 for array in first[:4])
    assert first.train_labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6 and first.test_labels.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert first.class_names == [unicodedata.name(char) for char in CLASSES[:3]]
    assert np.array_equal(first.train_images, again.train_images) and np.array_equal(
        first.test_images, again.test_images
    )
    assert not np.array_equal(first.train_images, other.train_images)
    alone = glyphs.generate(CLASSES[1:2], 6, 2)  # a class does not change with the others
    assert np.array_equal(alone.train_images, first.train_images[6:12])


def test_pictures_differ_and_fill_the_range():
    images = np.concatenate([part for part in glyphs.generate(CLASSES[:2], 500, 100)[0:3:2]])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert images.min() == 0 and images.max() == 255
    assert 90 < images.mean() < 165
    assert images.mean((1, 2)).std(0).min() > 35  # colours vary from picture to picture


def test_glyphs_stand_out_from_the_background():
    """With ink everywhere and with none, from the same seed: the same colours, far enough apart."""
    full, empty = (glyphs.draw(torch.full((1, 64, 64), ink), 400, 0)[:, 14:18, 14:18] for ink in (1.0, 0.0))
    luminance = [(part / 255 @ np.array([0.299, 0.587, 0.114])).mean((1, 2)) for part in (full, empty)]
    gap = np.abs(luminance[0] - luminance[1])
    assert (gap > 0.12).mean() > 0.97 and np.median(gap) > 0.3
    assert 0.3 < (luminance[0] > luminance[1]).mean() < 0.7  # light on dark as often as dark on light


def test_glyphs_are_placed_whole_and_varied(masks):
    placed = glyphs.place(masks["Σ"], glyphs.Chance(400, 0))
    ink = placed.sum((1, 2, 3))
    assert placed.amax((1, 2, 3)).min() > 0.5
    assert ink.std() / ink.mean() > 0.2
    border = ink - placed[:, :, 1:-1, 1:-1].sum((1, 2, 3))
    assert (border / ink).mean() < 0.02 and (border / ink).max() < 0.25


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def drawings(monkeypatch) -> list[int]:
    """A small data set; the list grows with every drawing."""
    calls, generate = [], glyphs.generate

    def small(chars: list[str]) -> glyphs.Arrays:
        calls.append(len(chars))
        return generate(chars[:3], 4, 2)

    monkeypatch.setattr(glyphs, "generate", small)
    return calls


def equal(a: glyphs.Arrays, b: glyphs.Arrays) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) and isinstance(b.class_names, list)


def test_cache_is_used_and_keyed(tmp_path, drawings):
    first, again = glyphs.load(tmp_path / "new" / "folder"), glyphs.load(tmp_path / "new" / "folder")
    assert equal(first, again) and drawings == [len(CLASSES)]
    assert list((tmp_path / "new" / "folder").iterdir()) == [glyphs.cache_path(tmp_path / "new" / "folder")]


def test_other_fonts_and_drawings_have_another_cache(tmp_path, monkeypatch):
    path = glyphs.cache_path(tmp_path)
    with monkeypatch.context() as changed:
        (tmp_path / "glyphs.py").write_text("another way to draw")
        changed.setattr(glyphs, "__file__", str(tmp_path / "glyphs.py"))
        assert glyphs.cache_path(tmp_path) != path
    monkeypatch.setattr(matplotlib, "__version__", "0.1")
    assert glyphs.cache_path(tmp_path) != path


@pytest.mark.parametrize("damage", ("truncated", "flipped byte", "empty", "text", "lacks an array"))
def test_damaged_cache_is_drawn_anew(tmp_path, drawings, damage):
    first, path = glyphs.load(tmp_path), glyphs.cache_path(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 3] ^= 1
    kept = {"truncated": content[:-3000], "flipped byte": content, "empty": b"", "text": b"not an archive"}
    if damage == "lacks an array":
        np.savez(path, train_images=first.train_images)
    else:
        path.write_bytes(kept[damage])
    assert equal(first, glyphs.load(tmp_path)) and len(drawings) == 2
    assert equal(first, glyphs.load(tmp_path)) and len(drawings) == 2


def test_interrupted_write_leaves_nothing_behind(tmp_path, drawings, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        glyphs.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet(tmp_path):
    glyphs.sheet(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (660, 660)
        drawn = glyphs.generate(CLASSES[10:11], 1, 0).train_images[0].repeat(2, 0).repeat(2, 1)
        assert np.array_equal(np.asarray(image)[67:131, 1:65, :3], drawn)


@pytest.mark.parametrize("part", ["scratches", "blur", "noise"])
def test_pictures_have_clutter_blur_and_noise(monkeypatch, part):
    usual = glyphs.draw(torch.zeros(1, 64, 64), 50, 0)
    if part == "blur":
        monkeypatch.setattr(glyphs, "blur", lambda images, _: images)
    else:
        place, name = (glyphs, "scratches") if part == "scratches" else (torch, "randn")
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, **options: 0 * real(*given, **options))
    assert not np.array_equal(glyphs.draw(torch.zeros(1, 64, 64), 50, 0), usual)


def test_all_faces_are_drawn():
    faces = torch.stack([torch.zeros(64, 64), *[torch.ones(64, 64)] * 3])
    drawn = glyphs.place(faces, glyphs.Chance(800, 0)).sum((1, 2, 3)) > 0
    assert 0.68 < drawn.float().mean() < 0.82


def test_glyphs_are_tilted_and_shifted():
    bar = torch.zeros(1, 64, 64)
    bar[0, 8:56, 30:34] = 1
    found, axis = glyphs.place(bar, glyphs.Chance(300, 0))[:, 0], torch.arange(32.0)
    parts = found[:, :14], found[:, 18:]
    whole = (parts[0].sum((1, 2)) > 3) & (parts[1].sum((1, 2)) > 3)
    top, bottom = ((part.sum(1) @ axis / part.sum((1, 2)).clamp(min=1e-6))[whole] for part in parts)
    assert (top - bottom).std() > 1.5 and ((top + bottom) / 2).std() > 2
