"""Mixing within the batch, and random erasing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import AugmentConfig
from bmjax.data.augment.augment import erase, mix
from bmjax.layers import BATCH_AXIS, all_reversed

OFF = {"flip": False, "right_angles": False}
mixed = jax.jit(mix, static_argnums=3)


def batch(n=64, size=20):
    """Images of one level each, their number, which is also the label."""
    labels = jnp.arange(n)
    images = jnp.broadcast_to(labels.astype(jnp.float32)[:, None, None, None], (n, size, size, 3))
    return images, labels, jax.random.split(jax.random.key(0), n)


def test_mixup_is_the_weighted_sum():
    images, labels, keys = batch()
    out, others, share = mixed(images, labels, keys, AugmentConfig(**OFF, mixup=1.0))
    np.testing.assert_array_equal(others, labels[::-1])
    expected = share * labels + (1 - share) * others
    np.testing.assert_allclose(out, np.broadcast_to(expected[:, None, None, None], out.shape), rtol=1e-5)
    assert np.abs(np.quantile(share, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.2  # Beta(1, 1) is uniform


def test_small_alpha_leaves_most_images_nearly_alone():
    images, labels, keys = batch(400, 2)
    _, _, share = mixed(images, labels, keys, AugmentConfig(**OFF, mixup=0.1))
    assert ((share < 0.05) | (share > 0.95)).mean() > 0.6


def test_cutmix_puts_in_a_rectangle_and_counts_its_pixels():
    images, labels, keys = batch()
    out, others, share = (np.asarray(x) for x in mixed(images, labels, keys, AugmentConfig(**OFF, cutmix=1.0)))
    own = out == np.asarray(labels)[:, None, None, None]
    assert (own | (out == others[:, None, None, None])).all()
    np.testing.assert_allclose(own.mean((1, 2, 3)), share, atol=1e-6)
    for cut in ~own[..., 0]:
        rows, columns = cut.any(1), cut.any(0)
        np.testing.assert_array_equal(cut, rows[:, None] & columns[None])
        assert (np.diff(np.flatnonzero(rows)) == 1).all()
        assert (np.diff(np.flatnonzero(columns)) == 1).all()
    assert 0.5 < share.mean() < 0.9  # the rectangle is cut off at the border


def test_both_take_turns():
    images, labels, keys = batch()
    out, _, _ = mixed(images, labels, keys, AugmentConfig(**OFF, mixup=1.0, cutmix=1.0))
    levels = np.array([len(set(image.ravel().tolist())) for image in np.asarray(out)])
    assert 16 < (levels == 2).sum() < 48  # cut; an image that is added up has one level


def test_the_reverse_of_a_batch_that_devices_share():
    x = jnp.arange(24).reshape(4, 3, 2)
    shared = jax.pmap(all_reversed, axis_name=BATCH_AXIS)(x)
    np.testing.assert_array_equal(np.asarray(shared).reshape(12, 2), np.asarray(x).reshape(12, 2)[::-1])


def test_erasing():
    n, size = 300, 32
    keys = jax.random.split(jax.random.key(1), n)
    image = jnp.full((size, size, 3), -1.0)
    out = np.asarray(jax.jit(jax.vmap(lambda key: erase(image, key, 0.5)))(keys))
    gone = (out != -1).all(-1)
    assert ((out != -1).any(-1) == gone).all()
    hit = gone.any((1, 2))
    assert abs(hit.mean() - 0.5) < 0.12
    area = gone[hit].mean((1, 2))
    assert area.min() > 0.01
    assert area.max() < 0.45
    assert 0.1 < area.mean() < 0.3
    assert out[gone].min() >= 0
    assert out[gone].max() <= 255
    assert out[gone].std() == pytest.approx(255 / 12**0.5, rel=0.05)
    for mask in gone[hit]:
        np.testing.assert_array_equal(mask, mask.any(1)[:, None] & mask.any(0)[None])
