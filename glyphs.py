"""The embedded data set: letters of eight scripts, digits and signs, drawn with the fonts that matplotlib ships.

It has the shape of CIFAR-100 (100 classes, 500 training and 100 test images each, 32 x 32 RGB) and needs no download. A
class is a character, in every face that covers it. No two classes are homoglyphs: neither their tilted, sheared,
squeezed nor mirrored forms resemble each other (tests/test_glyphs.py measures it), so case pairs and look-alikes of
other scripts are out.

    python train_reptile.py --data glyphs
    python glyphs.py sheet.png      # one picture of each class
"""

import hashlib
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.image
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.ft2font import FT2Font
from torch import Tensor
from tqdm import tqdm

import cli

SCRIPTS = (
    "EFGMTYciktvwxæ",  # Latin
    "24579",
    "ΔΘΞΣΦβδζξπςψ",  # Greek
    "ЉЋДШЫЮжкчѦѪѮ",  # Cyrillic
    "ԲԵՀՃՆՇՊՎՒՖխկչպ",  # Armenian
    "დვკლორუფჭჯჱჴ",  # Georgian
    "ຊຕຜຟມຣລສຫ",  # Lao
    "אהלמעףצקש",  # Hebrew
    "ئؤخظعكموي",  # Arabic, isolated forms
    "@§∞☺",
)
STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    "cm": ("r10", "b10", "ss10", "ti10", "tt10"),
}
FACES = tuple(family + style for family, styles in STYLES.items() for style in styles)
TRAIN, TEST = 500, 100  # images a class
SIDE = 32  # pixels
CANVAS, GLYPH = 64, 44  # side of a mask and longer side of the glyph in it, pixels: up to twice what is drawn
LUMINANCE = torch.tensor((0.299, 0.587, 0.114))  # ITU-R BT.601


class Arrays(NamedTuple):
    """The layout of `--data FILE.npz`: images (N, 32, 32, 3) uint8, sorted labels (N,) uint8, their Unicode names."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]


def classes() -> list[str]:
    """The characters in the order of their labels: each script spread evenly, so that the last labels, which most class
    splits make the unseen ones, are a fair sample of all scripts."""
    places = [((i + 0.5) / len(script), char) for script in SCRIPTS for i, char in enumerate(script)]
    return [char for _, char in sorted(places, key=lambda place: place[0])]


# --------------------------------------------------------------------------------------------------------------- glyphs


def open_faces() -> dict[str, FT2Font]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return {face: FT2Font(str(folder / f"{face}.ttf")) for face in FACES}


def covers(face: str, font: FT2Font, char: str) -> bool:
    """Does the face have this character? The cm faces have the right glyphs only for ASCII letters and digits."""
    return ord(char) in font.get_charmap() and (not face.startswith("cm") or (char.isascii() and char.isalnum()))


def bitmap(font: FT2Font, char: str, size: float) -> np.ndarray:
    """The glyph at `size` pixels an em, cropped to its ink: (h, w) uint8 coverage."""
    font.set_size(size, 72)
    font.set_text(char)
    font.draw_glyphs_to_bitmap()
    ink = np.asarray(font.get_image())
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def render(fonts: dict[str, FT2Font], char: str) -> Tensor:
    """The character in every face that covers it, all of one size: (faces, CANVAS, CANVAS) float coverage in 0..1."""
    masks = []
    for face, font in fonts.items():
        if covers(face, font, char):
            ink = bitmap(font, char, GLYPH * 100 / max(bitmap(font, char, 100).shape))
            margins = [((CANVAS - side) // 2, (CANVAS - side + 1) // 2) for side in ink.shape]
            masks.append(np.pad(ink / 255, margins))
    return torch.from_numpy(np.stack(masks)).float()


# --------------------------------------------------------------------------------------------------------------- images


class Chance:
    """Seeded random numbers for one batch of images."""

    def __init__(self, count: int, seed: int):
        self.count = count
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(count, *shape) in low..high."""
        return torch.rand(self.count, *shape, generator=self.generator) * (high - low) + low

    def field(self, channels: int, cells: int) -> Tensor:
        """(count, channels, SIDE, SIDE) smooth noise in -1..1, `cells` random values a side."""
        values = self.uniform(-1, 1, channels, cells, cells)
        return F.interpolate(values, size=SIDE, mode="bilinear", align_corners=True)

    def colour(self, luminance: Tensor) -> Tensor:
        """(count, 3, 1, 1) random colours of this luminance (count, 1), clipped to 0..1."""
        tint = self.uniform(-0.45, 0.45, 3)
        tint = tint - (tint @ LUMINANCE)[:, None]
        return (luminance + tint).clamp(0, 1)[:, :, None, None]


def place(masks: Tensor, chance: Chance) -> Tensor:
    """A mask for each image, tilted, sheared, squeezed, scaled, shifted, a little warped: (count, 1, SIDE, SIDE)."""
    face = (chance.uniform(0, 1) * len(masks)).long()
    angle, shear = chance.uniform(-0.26, 0.26), chance.uniform(-0.2, 0.2)  # radians (15 degrees), ratio
    squeeze, size = chance.uniform(-0.16, 0.16).exp(), chance.uniform(18, 29)  # width / height, longer side in pixels
    zoom = (GLYPH / CANVAS) * SIDE / size  # the map runs from image to mask
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack((cos, shear * cos - sin, sin, shear * sin + cos), 1).view(-1, 2, 2)
    linear = linear * zoom[:, None, None] * torch.stack((squeeze, 1 / squeeze), 1)[:, :, None].sqrt()
    shift = chance.uniform(-1, 1, 2, 1) * (1 - size / SIDE)[:, None, None]  # up to the edge
    theta = torch.cat((linear, linear @ shift), 2)
    grid = F.affine_grid(theta, (chance.count, 1, SIDE, SIDE), align_corners=False)
    grid = grid + 0.05 * chance.field(2, 4).permute(0, 2, 3, 1)
    ink = F.grid_sample(masks[face, None], grid, align_corners=False)
    return ink ** chance.uniform(0.45, 1.4, 1, 1, 1)  # the power thickens or thins the soft edge of the strokes


def scratches(chance: Chance, number: int = 3) -> Tensor:
    """Clutter: circular arcs, thin or thick, tight rings to nearly straight lines: (count, 1, SIDE, SIDE) in 0..1."""
    axis = torch.linspace(-1, 1, SIDE)
    x, y = (chance.uniform(-2, 2, number, 1, 1) for _ in range(2))
    distance = ((axis - x).square() + (axis[:, None] - y).square()).sqrt() - chance.uniform(0.2, 2.5, number, 1, 1)
    width = chance.uniform(0, 0.12, number, 1, 1)  # half of it, where the side of the image is 2
    return (1 + (width - distance.abs()) * SIDE / 2).clamp(0, 1).amax(1, keepdim=True)


def blur(images: Tensor, strength: Tensor) -> Tensor:
    """Mix in the mean of the 3 x 3 neighbours, weighted 1 2 1 either way."""
    soft = F.pad(images, (1, 1, 1, 1), mode="replicate")
    soft = (soft[..., :-2] + 2 * soft[..., 1:-1] + soft[..., 2:]) / 4
    soft = (soft[..., :-2, :] + 2 * soft[..., 1:-1, :] + soft[..., 2:, :]) / 4
    return torch.lerp(images, soft, strength)


def draw(masks: Tensor, count: int, seed: int) -> np.ndarray:
    """`count` images of the character with these `masks` (faces, CANVAS, CANVAS): (count, SIDE, SIDE, 3) uint8."""
    chance = Chance(count, seed)
    gap = chance.uniform(0.3, 0.75, 1)  # luminance between glyph and background
    dark = chance.uniform(0, 1, 1) * (1 - gap)
    light_glyph = chance.uniform(0, 1, 1) < 0.5
    glyph, ground = torch.where(light_glyph, dark + gap, dark), torch.where(light_glyph, dark, dark + gap)

    ramp = (chance.field(1, 2) + 0.6 * chance.field(1, 7)) * 0.5 + 0.5  # a gradient with a texture on it
    images = torch.lerp(chance.colour(ground), chance.colour(ground), ramp.clamp(0, 1))
    clutter = scratches(chance) * chance.uniform(0, 0.6, 1, 1, 1)
    images = torch.lerp(images, chance.colour(ground + 0.4 * (glyph - ground)), clutter)
    ink = torch.lerp(chance.colour(glyph), chance.colour(glyph), chance.field(1, 2) * 0.5 + 0.5)
    images = torch.lerp(images, ink, place(masks, chance))

    images = blur(images, chance.uniform(0, 1, 1, 1, 1))
    noise = torch.randn(images.shape, generator=chance.generator)
    images = images + noise * chance.uniform(0, 0.08, 1, 1, 1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def generate(chars: list[str], train: int = TRAIN, test: int = TEST, seed: int = 0) -> Arrays:
    """Draw `train` + `test` images of each character; labels follow the order of `chars`."""
    fonts = open_faces()
    images = np.empty((len(chars), train + test, SIDE, SIDE, 3), np.uint8)
    for label, char in enumerate(tqdm(chars, desc="drawing glyphs", unit="class")):
        images[label] = draw(render(fonts, char), train + test, seed * 0x110000 + ord(char))
    labels = np.arange(len(chars), dtype=np.uint8)
    return Arrays(
        images[:, :train].reshape(-1, SIDE, SIDE, 3),
        labels.repeat(train),
        images[:, train:].reshape(-1, SIDE, SIDE, 3),
        labels.repeat(test),
        [unicodedata.name(char) for char in chars],
    )


# ---------------------------------------------------------------------------------------------------------------- cache


def cache_path(cache_dir: Path) -> Path:
    """Where the set is kept: the name changes with this file and with the fonts."""
    key = hashlib.sha256(Path(__file__).read_bytes() + matplotlib.__version__.encode()).hexdigest()
    return cache_dir / f"glyphs-{key[:12]}.npz"


def load(cache_dir: Path) -> Arrays:
    """The data set, from `cache_dir`, or drawn in about 10 seconds and kept there (184 MB)."""
    path = cache_path(Path(cache_dir))
    with suppress(Exception), np.load(path) as arrays:  # not there, or damaged: zip members carry a checksum
        return Arrays(*(arrays[field] for field in Arrays._fields[:-1]), arrays["class_names"].tolist())
    arrays = generate(classes())
    path.parent.mkdir(parents=True, exist_ok=True)
    with cli.writing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays._asdict())
    return arrays


def sheet(path: tyro.conf.Positional[Path]) -> None:
    """Draw one picture of each class, ten in a row, to a PNG file."""
    with cli.user_errors():
        cli.check_output("PATH", path)
    images = generate(classes(), train=1, test=0).train_images.repeat(2, axis=1).repeat(2, axis=2)
    tiles = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    side = tiles.shape[1]
    rows = tiles.reshape(-1, 10, side, side, 3).swapaxes(1, 2).reshape(-1, 10 * side, 3)
    matplotlib.image.imsave(path, np.ascontiguousarray(rows), format="png")


if __name__ == "__main__":
    tyro.cli(sheet)
