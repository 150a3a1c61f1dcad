"""Augmentation against NumPy: exact where it can be, in range, and each image by its own key alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from bmjax.config import AugmentConfig
from bmjax.data.augment.augment import augment as augment_eagerly
from bmjax.data.augment.augment import draw_turn, turn, warp
from bmjax.data.augment.colour import balance, brightness, contrast, gamma, hue, saturation

augment = jax.jit(augment_eagerly, static_argnums=2)

OFF = AugmentConfig(flip=False, right_angles=False)
ALL = AugmentConfig(rotate=180, shift=0.1, zoom=0.2, brightness=0.1, contrast=0.2, hue=0.1)
NOT_TURNED = (jnp.array(False),) * 3


def pictures(n=8, size=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.float32)


def keys(n=8, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_off_changes_nothing():
    images = pictures()
    np.testing.assert_array_equal(augment(jnp.asarray(images), keys(), OFF), images)


ISOMETRIES = [lambda x, k=k, m=m: np.rot90(x[:, ::-1] if m else x, k) for k in range(4) for m in (False, True)]


def kinds_seen(config, n=400):
    """How often each of the eight ways to lay a square on itself came, in an augmented batch of one image."""
    image = pictures(1, 5)[0]
    out = np.asarray(augment(jnp.broadcast_to(image, (n, 5, 5, 3)), keys(n), config))
    ways = np.stack([way(image) for way in ISOMETRIES])
    matches = (out[:, None] == ways).all((2, 3, 4))
    assert (matches.sum(1) == 1).all(), "an image that is no exact turn of the original"
    return matches.sum(0)


def test_flips_and_turns_are_exact_and_as_likely():
    both = kinds_seen(AugmentConfig())
    assert (both > 0).all()
    assert np.abs(both - 50).max() < 4 * (400 / 8 * 7 / 8) ** 0.5
    turns = kinds_seen(dataclasses.replace(OFF, right_angles=True))
    assert (turns[::2] > 60).all()  # the four turns,
    assert (turns[1::2] == 0).all()  # and no mirror image
    flips = kinds_seen(dataclasses.replace(OFF, flip=True))
    assert sorted((flips > 60).nonzero()[0]) == [0, 1, 4, 5]  # as it is, half a turn, both mirrors
    assert flips.sum() == 400


@pytest.mark.parametrize("size", [8, 9])
def test_the_warp_turns_as_turn_does(size):
    image = jnp.asarray(pictures(1, size)[0])
    still = (jnp.float32(0), jnp.zeros(2), jnp.float32(1))
    for seed in range(40):
        turned = draw_turn(jax.random.key(seed), AugmentConfig())
        np.testing.assert_allclose(warp(image, *still, turned), turn(image, *turned), atol=1e-3)


@pytest.mark.parametrize(("angle", "shift", "zoom"), [(0.3, (0, 0), 1.0), (0, (2.5, -1.25), 1.0), (-2, (1, 3), 1.3)])
def test_warp_is_scipys(angle, shift, zoom):
    image = pictures(1, 21)[0].astype(np.float64)
    centre = np.array([10.0, 10.0])
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    offset = centre - matrix @ (centre + shift)
    expected = np.stack(
        [ndimage.affine_transform(image[..., c], matrix, offset, order=1, mode="mirror") for c in range(3)], -1
    )
    with jax.enable_x64(True):
        out = warp(jnp.asarray(image), jnp.float64(angle), jnp.asarray(shift, float), jnp.float64(zoom), NOT_TURNED)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, atol=1e-9)


def test_zoom_magnifies_and_shift_goes_down_and_right():
    image = np.zeros((21, 21, 3), np.float32)
    image[10, 13] = 255
    still = jnp.float32(0)
    moved = np.asarray(warp(jnp.asarray(image), still, jnp.array([2.0, 3.0]), jnp.float32(1), NOT_TURNED))
    assert np.unravel_index(moved[..., 0].argmax(), (21, 21)) == (12, 16)
    larger = np.asarray(warp(jnp.asarray(image), still, jnp.zeros(2), jnp.float32(2), NOT_TURNED))
    assert np.unravel_index(larger[..., 0].argmax(), (21, 21)) == (10, 16)


def test_brightness_and_contrast():
    image = pictures(1)[0]
    np.testing.assert_allclose(brightness(image, jnp.float32(0.1)), image + 25.5, rtol=1e-6)
    expected = (image - image.mean()) * 1.5 + image.mean()
    np.testing.assert_allclose(contrast(jnp.asarray(image), jnp.float32(1.5)), expected, rtol=1e-4, atol=1e-3)


def test_hue():
    image = jnp.asarray(pictures(1)[0])
    for whole in (0.0, 1.0, -2.0):
        np.testing.assert_allclose(hue(image, jnp.float32(whole)), image, atol=2e-3)
    twice = hue(hue(image, jnp.float32(0.2)), jnp.float32(0.15))
    np.testing.assert_allclose(twice, hue(image, jnp.float32(0.35)), atol=2e-3)
    luma = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(np.asarray(hue(image, jnp.float32(0.3))) @ luma, np.asarray(image) @ luma, atol=2e-3)
    assert np.abs(hue(image, jnp.float32(0.3)) - image).max() > 20
    grey = jnp.full((4, 4, 3), 99.0)
    np.testing.assert_allclose(hue(grey, jnp.float32(0.4)), grey, atol=0.1)  # the NTSC matrix is rounded to 3 digits
    # Half a turn about the grey axis, checked by another route: chroma changes its sign.
    grey_of = (np.asarray(image) @ luma)[..., None] * np.ones(3)
    np.testing.assert_allclose(hue(image, jnp.float32(0.5)) + image, 2 * grey_of, atol=1.5)


def test_saturation_gamma_and_balance_against_pillow_and_numpy():
    image = pictures(1)[0]
    for factor in (0.0, 0.6, 1.4):
        found = np.clip(saturation(jnp.asarray(image), jnp.float32(factor)), 0, 255)
        expected = ImageEnhance.Color(Image.fromarray(image.astype(np.uint8))).enhance(factor)
        np.testing.assert_allclose(found, np.asarray(expected), atol=1.5)  # Pillow's grey and result are whole
    np.testing.assert_allclose(gamma(jnp.asarray(image), jnp.float32(1)), image, rtol=1e-5)
    expected = 255 * (image / 255) ** 0.7
    np.testing.assert_allclose(gamma(jnp.asarray(image), jnp.float32(0.7)), expected, rtol=1e-4)
    assert gamma(jnp.array([-3.0, 0.0, 255.0]), jnp.float32(1.3)).tolist() == pytest.approx([0, 0, 255])
    gains = np.array([1.1, 1.0, 0.8], np.float32)
    np.testing.assert_allclose(balance(jnp.asarray(image), jnp.asarray(gains)), image * gains, rtol=1e-6)


@pytest.mark.parametrize(
    "field",
    ["rotate", "shift", "zoom", "brightness", "contrast", "hue", "balance", "gamma", "saturation"],
)
def test_each_setting_alone_changes_images_within_its_width(field):
    images = jnp.asarray(pictures(6) * 0.5 + 60)
    small, large = ({"rotate": 2.0}.get(field, 0.01), {"rotate": 60.0}.get(field, 0.2))
    changes = [
        float(jnp.abs(augment(images, keys(6), dataclasses.replace(OFF, **{field: width})) - images).mean())
        for width in (small, large)
    ]
    assert 0 < changes[0] < changes[1]
    if field == "brightness":
        out = augment(images, keys(6), dataclasses.replace(OFF, brightness=0.2)) - images
        assert float(jnp.abs(out).max()) <= 0.2 * 255 + 1e-3
        np.testing.assert_allclose(out, jnp.broadcast_to(out[:, :1, :1, :1], out.shape), atol=1e-3)


def test_values_stay_in_range_and_finite():
    wild = AugmentConfig(rotate=180, shift=1.0, zoom=0.9, brightness=1.0, contrast=1.0, hue=0.5)
    out = np.asarray(augment(jnp.asarray(pictures(64)), keys(64), wild))
    assert np.isfinite(out).all()
    assert out.min() == 0
    assert out.max() == 255


def test_an_image_depends_on_its_own_key_alone():
    images, each = jnp.asarray(pictures(8)), keys(8)
    whole = np.asarray(augment(images, each, ALL))
    np.testing.assert_array_equal(whole, augment(images, each, ALL))
    order = np.array([5, 2, 7])
    np.testing.assert_allclose(augment(images[order], each[order], ALL), whole[order], atol=2e-3)
    np.testing.assert_allclose(augment_eagerly(images, each, ALL), whole, atol=2e-3)
    other = np.asarray(augment(images, keys(8, seed=1), ALL))
    assert (np.abs(other - whole).mean((1, 2, 3)) > 1).all()
    same_image = np.asarray(augment(jnp.broadcast_to(images[:1], images.shape), each, ALL))
    assert len({image.tobytes() for image in same_image}) == 8


def test_four_devices_as_one():
    """Under jit over a mesh, each device's rows are those of a single device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    images, each = jnp.asarray(pictures(8)), keys(8)
    one = augment(images, each, ALL)
    four = augment(jax.device_put(images, rows), jax.device_put(each, rows), ALL)
    assert len(four.sharding.device_set) == 4
    np.testing.assert_allclose(one, four, atol=2e-3)


def test_float64_makes_the_same_draws():
    low = augment(jnp.asarray(pictures()), keys(), ALL)
    assert low.dtype == jnp.float32
    with jax.enable_x64(True):
        high = augment(jnp.asarray(pictures(), jnp.float64), keys(), ALL)
        assert high.dtype == jnp.float64
        np.testing.assert_allclose(low, high, atol=0.02)
