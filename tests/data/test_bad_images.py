"""Every colour mode becomes the right RGB; every bad file is named, skipped, and an error under `strict`."""

import io
import logging
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from bmjax.config import DataConfig
from bmjax.data.images.decode import MAX_BYTES, MAX_PIXELS, decode_image
from bmjax.data.load import load_dataset

SIZE = 16


def decoded(path):
    return decode_image(path, SIZE)


def solid(mode, colour, path, **save):
    Image.new(mode, (SIZE, SIZE), colour).save(path, **save)
    return decoded(path)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (10, 120, 230), "png", (10, 120, 230)),
        ("RGB", (10, 120, 230), "bmp", (10, 120, 230)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("LA", (50, 255), "png", (50, 50, 50)),
        ("LA", (50, 0), "png", (255, 255, 255)),
        ("RGBA", (200, 0, 100, 255), "png", (200, 0, 100)),
        ("RGBA", (200, 0, 100, 0), "png", (255, 255, 255)),
        ("RGBA", (200, 0, 100, 51), "png", (244, 204, 224)),  # a fifth of the colour over white
        ("RGBA", (200, 0, 100, 51), "tif", (244, 204, 224)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("CMYK", (255, 0, 0, 128), "tif", (0, 127, 127)),
        ("YCbCr", (128, 128, 128), "tif", (128, 128, 128)),
        ("I;16", 65535, "png", (255, 255, 255)),
        ("I;16", 32896, "png", (128, 128, 128)),
        ("I;16", 257, "png", (1, 1, 1)),
        ("I;16", 32896, "tif", (128, 128, 128)),
        ("I", 32896, "tif", (128, 128, 128)),
        ("F", 0.5, "tif", (128, 128, 128)),
        ("F", 99.0, "tif", (99, 99, 99)),
    ],
)
def test_colour_modes(tmp_path, mode, colour, suffix, expected):
    image = solid(mode, colour, tmp_path / f"a.{suffix}")
    assert image.dtype == np.uint8
    assert image.shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(expected), image.shape))


def test_cmyk_jpeg(tmp_path):
    image = solid("CMYK", (0, 255, 255, 0), tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(image.reshape(-1, 3).mean(0), (255, 0, 0), atol=3)


def test_palette_with_and_without_transparency(tmp_path):
    picture = Image.new("P", (SIZE, SIZE), 1)
    picture.putpalette([0, 0, 0, 30, 60, 90])
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(tmp_path / "a.png")[3, 3], (30, 60, 90))
    picture.save(tmp_path / "b.png", transparency=1)
    np.testing.assert_array_equal(decoded(tmp_path / "b.png")[3, 3], (255, 255, 255))
    picture.save(tmp_path / "c.gif", save_all=True, append_images=[Image.new("P", (SIZE, SIZE), 0)])
    np.testing.assert_array_equal(decoded(tmp_path / "c.gif")[3, 3], (30, 60, 90))  # the first frame


def test_16_bit_ramp_keeps_its_shades(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(SIZE, SIZE) * 257
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(tmp_path / "a.png")[..., 1], np.arange(256).reshape(SIZE, SIZE))


def test_exif_orientation_is_applied(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise to see it upright
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), np.rot90(values, -1))


def test_exif_orientation_of_a_jpeg(tmp_path):
    halves = np.zeros((SIZE, SIZE, 3), np.uint8)
    halves[: SIZE // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(halves).save(tmp_path / "a.jpg", exif=exif)
    image = decoded(tmp_path / "a.jpg")
    assert image[: SIZE // 2].max() < 9
    assert image[SIZE // 2 :].min() > 246


def test_16_bit_colour_keeps_its_high_byte(tmp_path):
    """Pillow has no such mode, and reads the high byte of each value; written by hand, for Pillow can't."""
    values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png_of(("IHDR", head), ("IDAT", zlib.compress(rows)), ("IEND", b"")))
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), values >> 8)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 700), (700, 1), (13, 29), (250, 250), (2000, 1500)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_any_size_becomes_a_square(tmp_path, width, height, suffix):
    Image.new("RGB", (width, height), (40, 80, 120)).save(tmp_path / f"a.{suffix}")
    image = decoded(tmp_path / f"a.{suffix}")
    assert image.shape == (SIZE, SIZE, 3)
    np.testing.assert_allclose(image.reshape(-1, 3).astype(int), np.tile([40, 80, 120], (SIZE * SIZE, 1)), atol=2)


@pytest.mark.parametrize("values", [[0, 70000], [-1, 5], [0.5, np.nan], [0.0, np.inf], [0.0, 1e6]])
def test_values_without_a_scale_are_an_error(tmp_path, values):
    array = np.array([values], np.int32 if isinstance(values[1], int) else np.float32)
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"expected finite ones within 0 to 65535"):
        decoded(tmp_path / "a.tif")


def test_what_a_file_is_its_content_says(tmp_path):
    picture = Image.new("RGB", (SIZE, SIZE), (1, 200, 3))
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(decoded(tmp_path / "a.jpg")[0, 0], (1, 200, 3))
    # Pillow would hand PostScript to Ghostscript, a program.
    picture.save(tmp_path / "b.eps")
    (tmp_path / "b.eps").rename(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="not an image of a known kind"):
        decoded(tmp_path / "b.jpg")


SAVED = {
    "png": {},
    "png 16": {"mode": "I;16"},
    "png palette": {"mode": "P"},
    "png alpha": {"mode": "RGBA"},
    "png grey": {"mode": "L"},
    "jpeg": {},
    "jpeg progressive": {"progressive": True},
    "jpeg grey": {"mode": "L"},
    "jpeg cmyk": {"mode": "CMYK"},
    "tiff": {},
    "tiff lzw": {"compression": "tiff_lzw"},
    "tiff deflate": {"compression": "tiff_deflate"},
    "tiff jpeg": {"compression": "jpeg"},
    "bmp": {},
    "gif": {},
    "webp": {},
    "webp lossless": {"lossless": True},
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_truncated_file_is_never_half_an_image(kind):
    """Cut at every tenth: an error, or every pixel where only what follows the pixels is lost."""
    options = dict(SAVED[kind])
    mode = options.pop("mode", "RGB")
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    deep = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    picture = deep if mode == "I;16" else Image.fromarray(values).convert(mode)
    file = io.BytesIO()
    picture.save(file, kind.split()[0], **options)
    data, errors = file.getvalue(), 0
    whole = decode_image(data, SIZE)
    for tenth in range(10):
        try:
            part = decode_image(data[: len(data) * tenth // 10], SIZE)
        except ValueError:
            errors += 1
        else:
            np.testing.assert_array_equal(part, whole)
    assert errors >= 9


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as f:
        f.truncate(MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match=f"{MAX_BYTES + 1} bytes; expected at most {MAX_BYTES}"):
        decoded(tmp_path / "a.png")


def png_of(*chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind.encode(), data) for kind, data in chunks)


def png_of_claimed_size(width, height):
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png_of(("IHDR", head), ("IDAT", zlib.compress(b"\0" * 1000)), ("IEND", b""))


def text_bomb():
    text = b"a\0\0" + zlib.compress(b"x" * 80_000_000)
    head = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    return png_of(("IHDR", head), ("zTXt", text), ("IDAT", zlib.compress(b"\0" * 20)), ("IEND", b""))


@pytest.fixture
def bad(tmp_path):
    """A tree with good images and every kind of bad one -> (config, {path: words in its reason})."""
    root = tmp_path / "cells"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("BLA", "NGS"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.roll(noise, (i, len(name) + ord(name[0])), (0, 1))).save(root / name / f"good{i}.png")
    folder = root / "BLA"
    Image.fromarray(noise).save(folder / "whole.jpg")
    Image.fromarray(noise).save(folder / "whole.png")
    jpeg, png = (folder / "whole.jpg").read_bytes(), (folder / "whole.png").read_bytes()
    flipped = bytearray(png)
    for i in range(len(png) // 2, len(png) // 2 + 40):
        flipped[i] ^= 0xFF
    files = {
        "empty.png": (b"", "empty"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], ""),
        "head_only.jpg": (jpeg[:20], ""),
        "flipped.png": (bytes(flipped), ""),
        "text.jpg": (b"this is no image\n" * 10, "not an image"),
        "page.png": (b"<html><body>404</body></html>", "not an image"),
        "huge.png": (png_of_claimed_size(8_000, 8_000), f"expected at most {MAX_PIXELS}"),
        "huge.bmp": (
            struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 54, 40, 9000, 9000, 1, 24, 0, 0, 0, 0, 0, 0),
            f"expected at most {MAX_PIXELS}",
        ),
        # Text that unpacks to more than memory should hold.
        "text_bomb.png": (text_bomb(), "too large"),
        # Pillow itself warns above 89 million pixels, and refuses above 179 million.
        "bomb_warning.png": (png_of_claimed_size(10_000, 10_000), "decompression bomb"),
        "bomb_error.png": (png_of_claimed_size(60_000, 60_000), "decompression bomb"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    config = DataConfig(source="folder", root=str(root), image_size=SIZE, cache_dir=str(tmp_path / "cache"))
    return config, {f"BLA/{name}": words for name, (_, words) in files.items()}


def test_bad_files_are_skipped_and_named_in_one_summary(bad, caplog):
    config, expected = bad
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as leaked:
            warnings.simplefilter("always")
            dataset = load_dataset(config, progress=False)
        assert leaked == []
        assert len(dataset) == len(dataset.images) == 8
        assert not set(dataset.ids) & set(expected)
        assert {path for path, _ in dataset.skipped} == set(expected)
        for path, reason in dataset.skipped:
            assert expected[path] in reason
            assert reason
        (record,) = caplog.records
        assert "12 of 20 images can't be read" in record.message
        for path in expected:
            assert f"{config.root}/{path}: " in record.message
        # Rows still belong to their names.
        for name, image in zip(dataset.ids, dataset.images, strict=True):
            np.testing.assert_array_equal(image, decode_image(f"{config.root}/{name}", SIZE))


def test_strict_is_an_error_that_lists_them(bad):
    config, expected = bad
    for _ in range(2):  # also from the cache
        with pytest.raises(ValueError, match=r"12 of 20 images can't be read") as error:
            load_dataset(DataConfig(**{**vars(config), "strict": True}), progress=False)
        for path in expected:
            assert path in str(error.value)


def test_strict_is_content_with_good_images(bad):
    config, expected = bad
    for path in expected:
        os.remove(f"{config.root}/{path}")
    assert load_dataset(DataConfig(**{**vars(config), "strict": True}), progress=False).skipped == ()


@pytest.mark.parametrize("also_all_others", [False, True])
def test_a_class_without_a_readable_image_is_an_error(tmp_path, also_all_others):
    for name, data in (("BLA", b"junk"), ("NGS", b"junk")):
        (tmp_path / "cells" / name).mkdir(parents=True)
        (tmp_path / "cells" / name / "a.png").write_bytes(data)
    if not also_all_others:
        Image.new("RGB", (8, 8)).save(tmp_path / "cells" / "NGS" / "a.png")
    config = DataConfig(
        source="folder", root=str(tmp_path / "cells"), image_size=SIZE, cache_dir=str(tmp_path / "cache")
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=r"BLA: none of its images can be read; expected at least one"):
            load_dataset(config, progress=False)
