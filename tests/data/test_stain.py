"""Stain against scikit-image's and torchstain's figures (tools/stain_golden.py), and where nothing can be told."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bmjax.cli.main import main
from bmjax.config import DataConfig
from bmjax.data.images import stain as stains
from bmjax.data.load import load_dataset, read_files
from bmjax.data.sources.cells import CLASSES
from bmjax.data.sources.synthetic import render

macenko, macenko_statistics = jax.jit(stains.macenko), jax.jit(stains.macenko_statistics)


@pytest.fixture(scope="module")
def golden():
    with np.load(pathlib.Path(__file__).parents[1] / "golden/stain.npz") as saved:
        return {name: saved[name].astype(np.float32) for name in saved.files}


def test_haematoxylin_eosin_dab(golden):
    """scikit-image cuts amounts off at zero, so its way back differs where it did."""
    hed = stains.rgb_to_hed(jnp.asarray(golden["image"]))
    np.testing.assert_allclose(np.maximum(hed, 0), golden["hed"], atol=1e-6)
    np.testing.assert_allclose(stains.hed_to_rgb(jnp.asarray(golden["hed"])), golden["hed_to_rgb"], atol=2e-3)
    np.testing.assert_allclose(stains.hed_to_rgb(hed), golden["image"], atol=2e-3)


def test_lab(golden):
    lab = stains.rgb_to_lab(jnp.asarray(golden["image"]))
    np.testing.assert_allclose(lab, golden["lab"], atol=1e-3)
    np.testing.assert_allclose(stains.lab_to_rgb(jnp.asarray(golden["lab"])), golden["lab_to_rgb"], atol=5e-3)


def test_every_colour_comes_back():
    levels = np.linspace(1, 255, 12, dtype=np.float32)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    np.testing.assert_allclose(stains.hed_to_rgb(stains.rgb_to_hed(jnp.asarray(colours))), colours, atol=5e-3)
    np.testing.assert_allclose(stains.lab_to_rgb(stains.rgb_to_lab(jnp.asarray(colours))), colours, atol=5e-2)


def test_jitter_changes_each_stain_by_its_own(golden):
    image = jnp.asarray(np.clip(golden["image"], 60, 200))
    scale, shift = jnp.array([1.1, 0.9, 1.0]), jnp.array([0.14, 0.0, -0.07])
    moved = stains.rgb_to_hed(stains.hed_jitter(image, scale, shift))
    expected = stains.rgb_to_hed(image) * scale[None, None] + shift[None, None] / np.log(1e6)
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_reinhard(golden):
    target = stains.reinhard_statistics(jnp.asarray(golden["target"]))
    ours = np.floor(stains.reinhard(jnp.asarray(golden["image"]), target))
    assert np.abs(ours - golden["reinhard"]).max() <= 1
    assert (ours == golden["reinhard"]).mean() > 0.99


def test_macenko(golden):
    statistics = macenko_statistics(jnp.asarray(golden["target"]))
    np.testing.assert_allclose(statistics, golden["macenko_target"], rtol=1e-3)
    ours = np.floor(macenko(jnp.asarray(golden["image"]), statistics))
    assert np.abs(ours - golden["macenko"]).max() <= 1
    assert (ours == golden["macenko"]).mean() > 0.99


def test_an_image_in_the_reference_stain_stays(golden):
    image = jnp.asarray(golden["target"])
    assert np.abs(stains.reinhard(image, stains.reinhard_statistics(image)) - image).max() < 0.05
    # Two stains can't make every colour, but what they have made they make again, within a grey level.
    made = macenko(image, macenko_statistics(image))
    assert np.abs(np.asarray(macenko(made, macenko_statistics(made)) - made)).mean() < 1


@pytest.mark.parametrize("value", [0, 128, 240, 255])
def test_images_without_stains_stay_as_they_are(value):
    flat = jnp.full((48, 48, 3), float(value))
    assert np.isnan(macenko_statistics(flat)).all()
    np.testing.assert_array_equal(macenko(flat, jnp.asarray(stains.METHODS["macenko"].reference)), flat)
    normal = stains.reinhard(flat, jnp.asarray(stains.METHODS["reinhard"].reference))
    assert np.isfinite(normal).all()


@pytest.fixture
def folder(tmp_path):
    for name in CLASSES[:2]:
        (tmp_path / "cells" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(render(name, 40, 0, i)).save(tmp_path / "cells" / name / f"{i}.png")
    (tmp_path / "cells" / CLASSES[0] / "bad.png").write_bytes(b"no image")
    return tmp_path / "cells"


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_a_dataset_is_normalised_and_files_like_it(folder, tmp_path, method):
    plain = DataConfig(source="folder", root=str(folder), image_size=40, cache_dir=str(tmp_path / "cache"))
    config = dataclasses.replace(plain, stain=method)
    before, after = load_dataset(plain), load_dataset(config)
    assert before.fingerprint != after.fingerprint
    assert before.ids == after.ids
    expected = stains.normalise(np.asarray(before.images), method)
    np.testing.assert_array_equal(after.images, expected)
    assert (after.images != before.images).mean() > 0.5
    files = list(read_files([folder / name for name in ("../cells/" + CLASSES[0] + "/bad.png", after.ids[0])], config))
    assert isinstance(files[0], str)
    np.testing.assert_array_equal(files[1], after.images[0])
    other = dataclasses.replace(config, stain_reference=stains.statistics(before.images[:1], method))
    assert load_dataset(other).fingerprint != after.fingerprint


def test_command_prints_flags(folder, capsys):
    assert main(["data", "stain", str(folder), "--size", "40"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "medians over 4 images:"
    assert "bad.png: " in said.err, "what can't be read is named"
    for line, n in zip(lines[1:], (6, 8), strict=True):
        numbers = [float(word) for word in line.split()[3:]]
        assert len(numbers) == n
        assert np.isfinite(numbers).all()


def test_command_refuses_what_it_can_not_tell(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"none")
    for arguments, message in (
        (["--size", "0"], "--size is 0; expected 1 to 4096 pixels"),
        (["--size", "100000000"], "--size is 100000000; expected 1 to 4096 pixels"),
        ([], "none of 1 images can be read"),
    ):
        assert main(["data", "stain", str(tmp_path), *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"stain": "reinhard", "stain_reference": (1.0,)}, {"stain_reference": (1.0,) * 6}])
def test_a_reference_of_the_wrong_length_is_refused(wrong):
    with pytest.raises(ValueError, match=r"data\.stain_reference"):
        DataConfig(**wrong)


def test_rendered_cells_are_not_normalised(tmp_path):
    with pytest.raises(ValueError, match=r"'data\.stain' is 'macenko'"):
        load_dataset(DataConfig(stain="macenko", cache_dir=str(tmp_path)))
