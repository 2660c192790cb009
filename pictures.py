"""Picture files as tensors: one decoder for data folders and for one's own pictures.

Files are not trusted: only the formats below are tried (none that runs another program), a picture of too many pixels
is refused before it is decoded, and whatever a decoder stumbles over ends in a ValueError with the file's name.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = 80_000_000  # 320 MB as RGBA


def list_pictures(folder: Path) -> list[Path]:
    """The picture files directly in `folder`, by name; hidden files and other suffixes are passed over.

    Raises OSError if there is no such folder.
    """
    files = sorted(Path(folder).iterdir())
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def read_picture(path: Path, size: int) -> Tensor:
    """The centre square of a picture, scaled to `size` pixels, antialiased: (3, size, size) uint8, channels last.

    EXIF rotation is applied, transparent parts become white, greyscale, palette and 16-bit pictures become RGB; of an
    animation the first frame counts. A picture of size x size pixels keeps them as they are. Raises ValueError.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such picture: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=FORMATS) as image:
                square = centre_square(image, size)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture in a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise errors of many kinds over broken files
        raise ValueError(f"{path} cannot be read: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """An opened file as an RGB image of size x size pixels. Raises errors of many kinds."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
    image.draft(None, (2 * size, 2 * size))  # JPEG decodes at 1/2, 1/4 or 1/8 of its size where that is enough
    image = colours(ImageOps.exif_transpose(image))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def colours(image: Image.Image) -> Image.Image:
    """In mode RGB, or RGBA where something may be transparent."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # one channel of 16 bits; some decoders hand it out as 32
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixel values {values.min()}..{values.max()} are not of 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
