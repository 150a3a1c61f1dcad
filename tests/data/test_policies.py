"""Operations against Pillow's, and the policies' draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from bmjax.config import AugmentConfig
from bmjax.data.augment.augment import augment
from bmjax.data.augment.policies import BINS, OPERATIONS, apply, magnitudes, randaugment, trivialaugment
from bmjax.data.sources.synthetic import render

SIZE = 40
operate = jax.jit(apply)
augment_all = jax.jit(augment, static_argnums=2)


@pytest.fixture(scope="module")
def cell():
    """A rendered cell without its darkest and brightest levels, so that stretching does something."""
    return np.clip(render("PMO", SIZE, 0, 0), 30, 220)


def ours(image, name, strength=0.0):
    done = np.asarray(operate(jnp.asarray(image, jnp.float32), OPERATIONS.index(name), jnp.float32(strength)))
    np.testing.assert_array_equal(done, np.round(done))
    return done.astype(int)


@pytest.mark.parametrize("strength", [-0.9, -0.3, 0.0, 0.27, 0.9])
@pytest.mark.parametrize("name", ["brightness", "color", "contrast", "sharpness"])
def test_enhancements(cell, name, strength):
    """Pillow blends in single precision and cuts off: a rounding may turn out the other way."""
    expected = np.asarray(getattr(ImageEnhance, name.capitalize())(Image.fromarray(cell)).enhance(1 + strength)).astype(
        int
    )
    difference = np.abs(ours(cell, name, strength) - expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.97


def test_the_smooth_filter_is_pillows(cell):
    smooth = np.asarray(Image.fromarray(cell).filter(ImageFilter.SMOOTH)).astype(int)
    assert (ours(cell, "sharpness", -1.0) == smooth).mean() > 0.99


@pytest.mark.parametrize("bits", range(2, 9))
def test_posterize(cell, bits):
    np.testing.assert_array_equal(ours(cell, "posterize", bits), ImageOps.posterize(Image.fromarray(cell), bits))


@pytest.mark.parametrize("threshold", [0.0, 119.0, 127.5, 255.0])
def test_solarize(cell, threshold):
    np.testing.assert_array_equal(
        ours(cell, "solarize", threshold), ImageOps.solarize(Image.fromarray(cell), threshold)
    )


def pictures(cell):
    two = np.where(cell > 128, 200, 90).astype(np.uint8)
    return {"cell": cell, "flat": np.full_like(cell, 77), "two levels": two}


@pytest.mark.parametrize("picture", ["cell", "flat", "two levels"])
@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_stretching(cell, name, picture):
    image = pictures(cell)[picture]
    expected = np.asarray(getattr(ImageOps, name)(Image.fromarray(image))).astype(int)
    done = ours(image, name)
    if name == "equalize":
        np.testing.assert_array_equal(done, expected)
        return
    # Pillow divides in floating point, and comes out one below where the quotient is whole.
    low, high = image.min((0, 1)).astype(int), image.max((0, 1)).astype(int)
    is_whole = (image - low) * 255 % np.maximum(high - low, 1) == 0
    assert ((done == expected) | (is_whole & (done == expected + 1))).all()


@pytest.mark.parametrize(
    ("name", "strength", "coefficients"),
    [
        ("shear_x", 0.2, (1, 0.2, -0.2 * 20, 0, 1, 0)),
        ("shear_y", -0.2, (1, 0, 0, -0.2, 1, 0.2 * 20)),
        ("translate_x", 7.0, (1, 0, -7, 0, 1, 0)),
        ("translate_y", -4.5, (1, 0, 0, 0, 1, 4.5)),
        ("rotate", 20.0, None),
    ],
)
def test_geometry_away_from_the_border(cell, name, strength, coefficients):
    image, size = Image.fromarray(cell), (SIZE, SIZE)
    if coefficients is None:
        expected = image.rotate(-strength, Image.Resampling.BILINEAR)
    else:
        expected = image.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    inner = slice(12, -12)
    difference = np.abs(ours(cell, name, strength) - np.asarray(expected).astype(int))[inner, inner]
    assert difference.max() <= 1


def test_strengths_are_torchvisions():
    table = dict(zip(OPERATIONS, magnitudes("randaugment", 224), strict=True))
    assert table["shear_x"][-1] == pytest.approx(0.3)
    assert table["translate_y"][-1] == pytest.approx(150 / 331 * 224)
    assert table["rotate"][9] == pytest.approx(9)
    assert table["posterize"].tolist() == [8] * 4 + [7] * 8 + [6] * 7 + [5] * 8 + [4] * 4
    assert (table["solarize"][0], table["solarize"][-1]) == (255, 0)
    wide = dict(zip(OPERATIONS, magnitudes("trivialaugment", 224), strict=True))
    assert wide["rotate"][-1] == 135
    assert wide["translate_x"][-1] == 32
    assert set(wide["posterize"]) == {2, 3, 4, 5, 6, 7, 8}
    assert all(len(row) == BINS for row in wide.values())


def test_each_image_draws_its_own_and_stays_whole_levels(cell):
    n = 60
    keys = jax.random.split(jax.random.key(0), n)
    images = jnp.broadcast_to(jnp.asarray(cell, jnp.float32), (n, *cell.shape))
    one = np.asarray(jax.jit(jax.vmap(trivialaugment))(images, keys))
    two = np.asarray(jax.jit(jax.vmap(lambda image, key: randaugment(image, key, 2, 9)))(images, keys))
    for done in (one, two):
        assert done.min() >= 0
        assert done.max() <= 255
        np.testing.assert_array_equal(done, np.round(done))
        assert len({image.tobytes() for image in done}) > n / 2
    config = AugmentConfig(flip=False, right_angles=False, policy="trivialaugment")
    forth = augment_all(images[:7], keys[:7], config)
    back = augment_all(images[:7], keys[:7][::-1], config)
    np.testing.assert_array_equal(back[::-1], forth)


@pytest.mark.parametrize("wrong", [{"policy_operations": 0}, {"policy_magnitude": 31}, {"erase": 1.5}, {"mixup": -1.0}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=rf"augment\.{next(iter(wrong))}"):
        AugmentConfig(**wrong)
