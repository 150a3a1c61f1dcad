"""Defocus against SciPy, JPEG against Pillow, and the recipe that holds both."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from bmjax.config import AugmentConfig
from bmjax.data.augment.augment import augment
from bmjax.data.augment.optics import blur, jpeg
from bmjax.data.sources.synthetic import render


@pytest.fixture(scope="module")
def cell():
    return render("EOS", 60, 0, 0)


@pytest.mark.parametrize("sigma", [0.5, 1.3, 3.0])
def test_defocus_is_a_gaussian(cell, sigma):
    found = blur(jnp.asarray(cell, jnp.float32), jnp.float32(sigma), 3.0)
    expected = gaussian_filter(cell.astype(np.float32), (sigma, sigma, 0), mode="mirror", truncate=9 / sigma)
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_no_defocus_is_the_image(cell):
    np.testing.assert_allclose(blur(jnp.asarray(cell, jnp.float32), jnp.float32(0), 2.0), cell, atol=1e-4)


@pytest.mark.parametrize("quality", [30, 60, 90])
def test_jpeg_loses_what_libjpeg_loses(cell, quality):
    file = io.BytesIO()
    Image.fromarray(cell).save(file, "JPEG", quality=quality, subsampling=0)
    expected = np.asarray(Image.open(file), np.float32)
    found = np.asarray(jpeg(jnp.asarray(cell, jnp.float32), jnp.float32(quality)))
    assert np.abs(found - expected).mean() < 0.5
    assert np.abs(expected - cell).mean() > 1.5, "there is a loss to be equal in"
    assert found.shape == cell.shape == (60, 60, 3)


def test_the_recipe_is_its_fields(cell):
    recipe = AugmentConfig(preset="other_laboratory")
    colours = AugmentConfig(hed=0.05, balance=0.15, gamma=0.2, saturation=0.3, brightness=0.1, contrast=0.2, hue=0.02)
    spelled = dataclasses.replace(colours, zoom=0.35, blur=0.008, jpeg=40)
    assert recipe.resolved() == spelled
    assert AugmentConfig(preset="other_laboratory", jpeg=70).resolved().jpeg == 70
    images, keys = jnp.asarray(np.stack([cell] * 6), jnp.float32), jax.random.split(jax.random.key(0), 6)
    step = jax.jit(lambda x, keys: augment(x, keys, recipe))
    found = np.asarray(step(images, keys))
    assert found.min() >= 0
    assert found.max() <= 255
    assert len({one.tobytes() for one in found}) == 6
    alone = np.asarray(step(images[2:3], keys[2:3]))
    np.testing.assert_allclose(alone[0], found[2], atol=1e-3)
    np.testing.assert_array_equal(np.asarray(augment(images[:1], keys[:1], AugmentConfig()))[0].sum(), cell.sum())


@pytest.mark.parametrize(("field", "value"), [("blur", 0.5), ("blur", -0.1), ("jpeg", 101), ("preset", "x")])
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=rf"augment\.{field}"):
        AugmentConfig(**{field: value})
