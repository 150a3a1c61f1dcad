"""Every colour mode becomes the right RGB; every bad file is named, skipped, and an error under `strict`."""

import logging
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from bmjax.config import DataConfig
from bmjax.data import load_dataset
from bmjax.data.decode import MAX_PIXELS, decode_image

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


def png_of_claimed_size(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.fixture
def bad(tmp_path):
    """A tree with good images and every kind of bad one -> (config, {path: words in its reason})."""
    root = tmp_path / "cells"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("BLA", "NGS"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.roll(noise, i)).save(root / name / f"good{i}.png")
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
        assert "10 of 18 images can't be read" in record.message
        for path in expected:
            assert f"{config.root}/{path}: " in record.message
        # Rows still belong to their names.
        for name, image in zip(dataset.ids, dataset.images, strict=True):
            np.testing.assert_array_equal(image, decode_image(f"{config.root}/{name}", SIZE))


def test_strict_is_an_error_that_lists_them(bad):
    config, expected = bad
    for _ in range(2):  # also from the cache
        with pytest.raises(ValueError, match=r"10 of 18 images can't be read") as error:
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
