"""Images of several scales become images of one, with the cell in the middle."""

import csv
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

import bmjax
from bmjax.config import DataConfig
from bmjax.data.images.decode import decode_image
from bmjax.data.load import load_dataset, read_arrays, read_files


def disc(side, diameter, path=None):
    """A dark disc in the middle of a light field, drawn eight times too large and shrunk."""
    image = Image.new("RGB", (side * 8, side * 8), (230, 220, 230))
    low, high = (side - diameter) * 4, (side + diameter) * 4
    ImageDraw.Draw(image).ellipse((low, low, high, high), fill=(90, 40, 130))
    image = image.resize((side, side), Image.Resampling.BOX)
    if path is not None:
        image.save(path)
    return np.asarray(image)


def diameter(image):
    return 2 * np.sqrt((image[..., 1] < 130).sum() / np.pi)


@pytest.fixture
def table(tmp_path):
    """Discs of 10 micrometres, photographed at 0.1, 0.2 and 0.05 micrometres to a pixel."""
    rows = []
    for i, (size, side) in enumerate([(0.1, 200), (0.2, 90), (0.05, 300), (0.1, 150)] * 3):
        disc(side, round(10 / size), tmp_path / f"{i}.png")
        rows.append((f"{i}.png", "ab"[i % 2], size))
    path = tmp_path / "cells.csv"
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([("path", "label", "pixel_size"), *rows])
    return path


def test_a_table_of_several_scales_becomes_one(table, tmp_path):
    config = DataConfig(source="table", root=str(table), image_size=64, field_size=16.0, cache_dir=str(tmp_path / "c"))
    dataset = load_dataset(config)
    for image in dataset.images:
        assert diameter(image) == pytest.approx(40, abs=1), "10 of 16 micrometres are 40 of 64 pixels"
        assert tuple(image[0, 0]) == (230, 220, 230)
    whole = load_dataset(DataConfig(source="table", root=str(table), image_size=64, cache_dir=str(tmp_path / "c")))
    assert whole.fingerprint != dataset.fingerprint
    assert len({round(diameter(image)) for image in whole.images}) > 2


def test_a_field_beyond_the_image_is_mirrored():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    buffer = np.pad(np.asarray(image), ((20, 20), (20, 20), (0, 0)), "symmetric")
    file = io.BytesIO()
    image.save(file, "PNG")
    np.testing.assert_array_equal(decode_image(file.getvalue(), 80, 80.0), buffer)
    np.testing.assert_array_equal(decode_image(file.getvalue(), 40, 40.0), np.asarray(image))
    np.testing.assert_array_equal(decode_image(file.getvalue(), 20, 20.0), np.asarray(image)[10:30, 10:30])
    with pytest.raises(ValueError, match="the field is 400 pixels, the image 40x40; expected at most 8 times"):
        decode_image(file.getvalue(), 20, 400.0)
    with pytest.raises(ValueError, match=r"the field is 0\.5 pixels of an image of 40x40; expected at least 16"):
        decode_image(file.getvalue(), 20, 0.5)


def test_files_and_arrays_are_read_alike(tmp_path):
    own = disc(120, 50, tmp_path / "a.png")
    config = DataConfig(image_size=64, pixel_size=0.2, field_size=16.0)
    (file,) = read_files([tmp_path / "a.png"], config)
    np.testing.assert_array_equal(read_arrays(own[None], config)[0], file)
    assert diameter(file) == pytest.approx(40, abs=1)


def test_a_scale_that_is_not_known_is_an_error(tmp_path):
    for i in range(4):
        disc(40, 20, tmp_path / f"{i}.png")
    path = tmp_path / "cells.csv"
    lines = ["path,label,pixel_size", "0.png,a,0.1", "1.png,b,", "2.png,a,0.1", "3.png,b,0.1"]
    path.write_text("\n".join(lines))
    given = {"source": "table", "root": str(path), "image_size": 16, "field_size": 4.0, "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"1\.png.*the pixels' size is not known"):
        load_dataset(DataConfig(**given))
    assert len(load_dataset(DataConfig(**given, pixel_size=0.1))) == 4
    path.write_text("\n".join(lines).replace("1.png,b,", "1.png,b,small"))
    with pytest.raises(ValueError, match="row 2 has pixel_size 'small'; expected micrometres"):
        load_dataset(DataConfig(**given))
    with pytest.raises(ValueError, match=r"data\.field_size.*rendered cells"):
        bmjax.load_dataset(DataConfig(image_size=16, field_size=4.0))
