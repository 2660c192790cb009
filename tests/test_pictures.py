"""Picture files in pictures.py: of every kind a user may have: rotated, transparent, grey, 16-bit, huge, broken."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

import pictures

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def read(path, size):
    return torch.from_numpy(pictures.read(path, size))


def colour(picture, y, x):
    return tuple(picture[:, y, x].tolist())


def test_pixels_of_the_right_size_are_kept(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for suffix in ("png", "bmp", "tif", "ppm", "webp"):
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
        found = read(tmp_path / f"a.{suffix}", 32)
        assert found.dtype == torch.uint8 and np.array_equal(found.permute(1, 2, 0).numpy(), pixels), suffix


def test_the_centre_square_is_scaled_with_antialiasing(tmp_path):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, 20:80] = np.where(np.indices((60, 60)).sum(0)[:, :, None] % 2, 255, 0)  # a chess board between black bars
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "b.png")
    wide, high = (read(tmp_path / name, 6).int() for name in ("a.png", "b.png"))
    assert wide.shape == (3, 6, 6) and (wide[:, 1:-1, 1:-1] - 127).abs().max() <= 3
    assert (wide - high.mT).abs().max() <= 1


def test_an_opened_picture_stays_as_it_is(tmp_path):
    Image.effect_noise((640, 480), 50).convert("RGB").save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        pixels = pictures.read(image, 32)
        assert image.size == (640, 480) and np.array_equal(pictures.read(image, 32), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = RED, GREEN, BLUE
    # what a camera stores for each orientation: rows and columns of the upright picture in another order
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    found = read(tmp_path / "a.jpg", 32).int()
    assert (found - torch.from_numpy(upright).permute(2, 0, 1).int()).abs().max() < 8


def test_transparent_parts_are_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (*RED, 255)
    rgba[:, 4:] = (*BLUE, 0)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*BLUE, *RED])
    palette.paste(0, (4, 0, 8, 8))
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "palette.gif", transparency=0)
    for name in ("rgba.png", "palette.png", "palette.gif"):
        found = read(tmp_path / name, 8)
        assert colour(found, 3, 0) == RED and colour(found, 3, 7) == WHITE, name
    Image.fromarray(np.full((8, 8, 2), (0, 127), np.uint8), "LA").save(tmp_path / "la.png")
    assert colour(read(tmp_path / "la.png", 8), 0, 0) == (128, 128, 128)


def test_grey_bilevel_and_cmyk(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.jpg", quality=100)
    Image.new("1", (8, 8), 1).save(tmp_path / "bilevel.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "cmyk.jpg", quality=100)
    Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((8, 8), 90 * 257, np.uint16)).save(tmp_path / "deep.tif")
    for name, level in (("grey.jpg", 77), ("bilevel.png", 255), ("cmyk.jpg", 0), ("deep.png", 200), ("deep.tif", 90)):
        assert colour(read(tmp_path / name, 4), 2, 2) == (level,) * 3, name
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif cannot be read: pixels are floating-point"):
        read(tmp_path / "float.tif", 4)


def test_deep_grey_keeps_its_levels_and_its_transparency(tmp_path):
    """32 bits that hold 8, as `convert("I")` gives, are those; one value of 16 bits can be transparent."""
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    assert np.array_equal(pictures.read(grey.convert("I"), 8), pictures.read(grey, 8))
    values = np.full((8, 8), 90 * 257, np.uint16)
    values[:, 4:] = 1000
    Image.fromarray(values).save(tmp_path / "deep.png", transparency=1000)
    found = read(tmp_path / "deep.png", 8)
    assert colour(found, 3, 0) == (90, 90, 90) and colour(found, 3, 7) == WHITE


def test_exif_that_cannot_be_written_anew_turns_a_picture_all_the_same(tmp_path):
    # big-endian, two tags: orientation, a number of 16 bits: 6; horizontal resolution, a ratio, here a text
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHHHI4sI", 8, 2, 0x0112, 3, 1, 6, 0, 0x011A, 2, 4, b"odd\0", 0)
    top = np.zeros((32, 32, 3), np.uint8)
    top[:16] = RED
    Image.fromarray(np.ascontiguousarray(np.rot90(top))).save(tmp_path / "a.png", exif=exif)
    found = read(tmp_path / "a.png", 32)
    assert colour(found, 8, 16) == RED and colour(found, 24, 16) == (0, 0, 0)


def test_threads_read_one_opened_picture(tmp_path):
    Image.effect_noise((300, 300), 50).convert("RGB").save(tmp_path / "a.png")
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            with Image.open(tmp_path / "a.png") as image:
                first, *others = pool.map(lambda _, image=image: pictures.read(image, 32), range(8))
                assert all(np.array_equal(first, each) for each in others)


def test_big_and_narrow_pictures(tmp_path):
    Image.new("RGB", (6000, 4000), RED).save(tmp_path / "big.jpg", quality=100)
    assert (read(tmp_path / "big.jpg", 32)[0] > 250).all()
    Image.new("RGB", (60_000, 1), GREEN).save(tmp_path / "narrow.png")  # its shorter side scaled would be 32 x 1.9 M
    assert colour(read(tmp_path / "narrow.png", 32), 0, 31) == GREEN


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_bombs_are_refused_before_they_are_decoded(tmp_path, side, recwarn):
    """A few bytes that claim a picture of 81 million pixels, or of 3.6 billion."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    file = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(file)
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read: .*(allowed|exceeds limit)"):
        read(tmp_path / "bomb.png", 32)
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif"])
def test_truncated_files_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix} (cannot be read|is not a picture)"):
        read(path, 32)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "drawing.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would run Ghostscript
    for name in ("a.jpg", "empty.png", "drawing.png"):
        with pytest.raises(ValueError, match=f"{name} is not a picture in a known format"):
            read(tmp_path / name, 32)
    with pytest.raises(ValueError, match="no such picture"):
        read(tmp_path / "missing.png", 32)


def test_names_cannot_command_a_terminal():
    assert pictures.listed(["猫", "a\x1b]0;b\x07", "it's C:\\x"]) == "猫, a\\x1b]0;b\\x07, it's C:\\x"


def test_files_of_a_folder(tmp_path):
    """All but hidden ones; names tell which may be pictures."""
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden").mkdir()
    names = ("b.JPG", "a.png", "c.heic", ".hidden.png", "notes.txt", "x.CSV", "picture", "folder/d", ".hidden/e.png")
    for name in names:
        (tmp_path / name).touch()
    folder = pictures.open_folder(tmp_path)
    assert all(path == tmp_path.joinpath(*place) for place, path in folder.files.items()) and len(folder.files) == 7
    assert [*folder.pictures()] == [("a.png",), ("b.JPG",), ("c.heic",), ("picture",), ("folder", "d")]


def test_a_large_jpeg_is_scaled_as_its_pixels_are(tmp_path):
    """What decodes at a part of its size is nearly as sharp."""
    photo = Image.fromarray(sklearn.datasets.load_sample_images().images[0][:, :427])
    photo.resize((512, 512)).save(tmp_path / "a.jpg", quality=95)
    decoded = np.asarray(Image.open(tmp_path / "a.jpg"))
    found, expected = (pictures.read(each, 64).astype(int) for each in (tmp_path / "a.jpg", decoded))
    assert abs(found - expected).mean() < 1.5


@pytest.mark.parametrize("shape", [(40, 61), (61, 40)])
def test_pictures_are_scaled_by_pillows_bicubic_filter(shape):
    """Of the square in the middle, also where that begins half a pixel in; as export.py says."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    box = ((shape[1] - 40) / 2, (shape[0] - 40) / 2, (shape[1] + 40) / 2, (shape[0] + 40) / 2)
    expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC, box=box)
    assert np.array_equal(pictures.read(pixels, 32), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_grey_is_rounded_and_stays_dark(tmp_path, suffix):
    """Values of 16 bits below 256 are nearly black, not of 8 bits."""
    for value, level in ((200, 1), (120, 0), (90 * 257 + 200, 91), (90 * 257 + 100, 90)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / f"a.{suffix}")
        assert np.unique(pictures.read(tmp_path / f"a.{suffix}", 8)).tolist() == [level], value


def test_integers_of_more_than_16_bits_are_refused(tmp_path):
    for values in ([-1, 5], [0, 65536]):
        with pytest.raises(ValueError, match="are not of 8 or 16 bits"):
            pictures.read(Image.fromarray(np.array([values], np.int32).repeat(2, 0)), 2)
