"""Pictures: files of any format, found in folders and zip files, one folder for each class, and read safely.

Picture files are not trusted: only the formats below are tried (none runs another program), a picture of too many
pixels is refused before it is decoded, and any decoder error becomes a ValueError with the file's name. Zip files are
read in memory, nothing is unpacked to disk; a damaged or hostile one is refused as a whole. Nothing here needs PyTorch.
"""

import io
import os
import sys
import threading
import unicodedata
import warnings
import zipfile
from collections import defaultdict
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

with suppress(ImportError):
    import pillow_heif  # makes Pillow read HEIC, the pictures of iPhones

    pillow_heif.register_heif_opener()

LISTED = 20  # pictures, folders or classes left out that are named one by one
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "QOI")
OTHERS = """.txt .md .csv .tsv .json .jsonl .xml .html .yaml .yml .toml .ini .log .db .py .ipynb .pdf .zip .tar .gz .npy
.npz .pkl .mat .pt .pth .h5 .pixels .mp4 .mov .avi .mp3 .wav .aae .xmp""".split()  # files that lie among pictures
MAX_PIXELS = 80_000_000  # 320 MB as RGBA
MAX_BYTES = 100_000_000  # of a picture in a zip file, unpacked
LARGE_PIXELS = 8_000_000  # of pictures larger than this, one is decoded at a time
LARGE = threading.Lock()
ORIENTATION, TURN = 0x0112, Image.Transpose  # an EXIF tag, and what its values ask for
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
UPRIGHT |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
File = Path | zipfile.Path


def content(file: str | os.PathLike | zipfile.Path) -> bytes:
    """Raises OSError."""
    if not isinstance(file, zipfile.Path):
        return Path(file).read_bytes()
    size = file.root.getinfo(file.at).file_size
    if size > MAX_BYTES:
        raise OSError(f"{file} has {size:,} bytes, more than the {MAX_BYTES:,} allowed")
    try:
        return file.root.read(file.at)
    except Exception as error:  # damaged and encrypted files raise errors of many kinds
        raise OSError(f"{file} cannot be unpacked: {error}") from error


class Folder(NamedTuple):
    """A folder, or a zip file or a folder in it, with the visible files in it and in folders beneath."""

    path: Path
    files: dict[tuple[str, ...], File]  # by the names of the folders they are in and their own

    def folders(self) -> list[str]:
        return sorted({parts[0] for parts in self.files if len(parts) > 1})

    def pictures(self) -> dict[tuple[str, ...], File]:
        """The files that may be pictures."""
        return {parts: file for parts, file in self.files.items() if Path(parts[-1]).suffix.lower() not in OTHERS}

    def inside(self, folder: str) -> "Folder":
        return Folder(self.path / folder, {parts[1:]: file for parts, file in self.files.items() if parts[0] == folder})


def open_folder(path: Path) -> Folder:
    """A folder or a zip file; files are always in the same order. In each folder of `path` what links lead to a second
    time is left out. Raises ValueError or OSError."""
    if not path.is_dir():
        return open_zip(path)
    files, visited = {}, set()
    for inside, folders, names in os.walk(path, followlinks=True):
        levels = Path(inside).relative_to(path).parts
        place = (levels[:1], os.path.realpath(inside))
        folders[:] = sorted(filter(is_visible, folders)) if place not in visited else []
        names = sorted(filter(is_visible, names)) if place not in visited else []
        files |= {(*levels, name): Path(inside, name) for name in names}
        visited.add(place)
    return Folder(path, files)


def open_zip(path: Path) -> Folder:
    """As `open_folder`. Raises ValueError or OSError."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is no folder and no zip file, or was cut short: {error}") from error
    if sum(info.file_size for info in archive.infolist()) > 1100 * path.stat().st_size:  # deflate reaches 1032
        raise ValueError(f"{path} would unpack to more than a thousand times its size; that is no set of pictures")
    files: dict[tuple[str, ...], File] = {}
    for info in archive.infolist():
        parts = tuple(info.filename.removeprefix("./").removesuffix("/").split("/"))
        if parts == ("",) and info.is_dir():
            continue
        if {"", ".", ".."} & {*parts} or parts in files:
            raise ValueError(f"{path} is no archive to trust: {info.filename!r} is in it twice, or leads out of it")
        if not info.is_dir() and all(map(is_visible, parts)):
            files[parts] = zipfile.Path(archive, info.filename)
    return Folder(path, {parts: files[parts] for parts in sorted(files, key=lambda parts: (parts[:-1], parts))})


def is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"  # which macOS adds to archives


def find_classes(roots: dict[str, Folder]) -> dict[str, dict[str, list[File]]]:
    """The files that may be pictures in folders inside each of `roots`, by class; what is left out is printed.

    A folder is a class, with all that is in it, unless it has no pictures of its own but two or more folders with
    pictures: these are then classes, called "Greek/character01". All roots count for that, so that cat/ in one and
    cat/2026/ in another are of class "cat". Names are in Unicode's composed form (NFC). Raises ValueError.
    """
    pictures = {part: [place for place in root.pictures() if place[1:]] for part, root in roots.items()}
    places = {place[:-1] for found in pictures.values() for place in found}  # folders with pictures of their own
    inside = defaultdict(set)  # folders with pictures in or beneath them, in each folder
    for levels in places:
        for depth, level in enumerate(levels):
            inside[levels[:depth]].add(level)
    classes: dict[str, dict[str, list[File]]] = {part: {} for part in roots}
    for part, (path, files) in roots.items():
        for place in pictures[part]:
            depth = next(depth for depth in range(1, len(place)) if place[:depth] in places)
            named = [level for n, level in enumerate(place[:depth]) if len(inside[place[:n]]) > 1]
            name = unicodedata.normalize("NFC", "/".join(named) or place[0])
            classes[part].setdefault(name, []).append(files[place])
        if not classes[part]:
            raise ValueError(f"{path} has no folders with pictures, one for each class")
        others, tops = len(files) - len(pictures[part]), {place[0] for place in pictures[part]}
        left_out = [f"{others} other files"] if others else []
        left_out += sorted(f"{each.name}/" for each in path.glob("*") if each.is_dir() and each.name not in tops)
        if left_out:
            print(f"{path}: left out {listed(left_out)}", file=sys.stderr)
    return classes


def listed(names: list[str], between: str = ", ") -> str:
    """The first of these names, and how many more there are. Characters that a terminal may obey are escaped."""
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in name) for name in names[:LISTED]]
    return between.join(shown + ([f"and {len(names) - LISTED} more"] if len(names) > LISTED else []))


# ------------------------------------------------------------------------------------------------------ picture files


def read(picture: Any, size: int, border: int = 0) -> np.ndarray:
    """The centre square of a picture, scaled, antialiased, and without a `border` of so many pixels at each side:
    (3, size, size) uint8.

    A picture is a path, a file in a zip file, the bytes of a file, a PIL image, an array (H, W, 3) or (H, W) of uint8,
    or a tensor (3, H, W) of uint8. EXIF rotation is applied, transparent parts become white, greyscale, palette and
    16-bit pictures become RGB; of an animation the first frame counts. Without a border, a picture of size x size
    pixels keeps them as they are. Raises ValueError, or OSError if it is in a damaged zip file.
    """
    if isinstance(picture, (str, os.PathLike, zipfile.Path, bytes)):
        return read_file(picture, size, border)
    if not isinstance(picture, Image.Image):
        pixels = np.asarray(picture.cpu() if hasattr(picture, "cpu") else picture)
        if hasattr(picture, "cpu") and pixels.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
            known = "arrays (H, W, 3) or (H, W) and tensors (3, H, W) of uint8"
            raise ValueError(f"pictures are paths, PIL images, {known}, got {pixels.shape} of {pixels.dtype}")
        picture = Image.fromarray(np.ascontiguousarray(pixels))
    with LARGE:  # two threads may have the same image
        picture.load()
    return centre(picture, size, border)


def read_file(path: str | os.PathLike | zipfile.Path | bytes, size: int, border: int) -> np.ndarray:
    """As `read`, of a file or the bytes of one."""
    file, name = path, path
    if isinstance(path, zipfile.Path):
        file = io.BytesIO(content(path))
    elif isinstance(path, bytes):
        file, name = io.BytesIO(path), "this file"
    elif not os.path.isfile(path):
        raise ValueError(f"no such picture: {path}")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(file, formats=formats) as image:
                large = image.width * image.height > LARGE_PIXELS
                with LARGE if large else nullcontext():
                    return centre(image, size, border, file=True)
    except Image.UnidentifiedImageError as error:
        known = ", ".join(formats) + ("" if "HEIF" in formats else "; for HEIC: pip install pillow-heif, or convert it")
        raise ValueError(f"{name} is not a picture in a known format ({known})") from error
    except Exception as error:  # decoders raise errors of many kinds over broken files
        raise ValueError(f"{name} cannot be read: {error}") from error


def centre(image: Image.Image, size: int, border: int, file: bool = False) -> np.ndarray:
    """As `read`, of an image of PIL, perhaps an opened `file` that nobody else reads. Raises errors of many kinds."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
    if not min(image.size):
        raise ValueError(f"a picture of {image.width} x {image.height} pixels shows nothing")
    whole = size + 2 * border
    if file:
        image.draft(None, (2 * whole, 2 * whole))  # JPEG decodes at 1/2, 1/4 or 1/8 of its size where that is enough
    method = UPRIGHT.get(image.getexif().get(ORIENTATION))
    image = colours(image if method is None else image.transpose(method))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize((whole, whole), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB").crop((border, border, border + size, border + size))
    return np.array(image).transpose(2, 0, 1)


def colours(image: Image.Image) -> Image.Image:
    """In mode RGB, or RGBA where something may be transparent."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # one channel of 16 bits; some decoders hand it out as 32
        values, clear = np.asarray(image), image.info.get("transparency")
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixel values {values.min()}..{values.max()} are not of 8 or 16 bits")
        step = 1 if image.mode == "I" and values.max() < 256 else 257  # converted from 8 bits
        levels = np.empty(values.shape, np.uint8)
        for row, line in enumerate(values):  # line by line: no copy of the whole in a wider type
            levels[row] = (line.astype(np.int32) + step // 2) // step
        image = Image.fromarray(levels)
        if isinstance(clear, int):
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
