"""Augmentation on the device: small pure functions of one image, keyed by the image's own key.

An image is floating [h, w, 3], RGB 0..255, and stays in that range. A batch is a vmap over images and keys, so what
happens to an image depends neither on the rest of its batch nor on the number of devices.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config import AugmentConfig

# RGB -> YIQ (NTSC); hue is the angle in the I-Q plane.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


def flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrored left-right and up-down, each with probability one half."""
    up, left = jax.random.bernoulli(key, 0.5, (2,))
    image = jnp.where(up, image[::-1], image)
    return jnp.where(left, image[:, ::-1], image)


def right_angle(image: jax.Array, key: jax.Array) -> jax.Array:
    """Turned by 0, 90, 180 or 270 degrees, equally likely; the image is square."""
    quarter, half = jax.random.bernoulli(key, 0.5, (2,))
    image = jnp.where(half, image[::-1, ::-1], image)
    # Transposed and mirrored: a quarter turn.
    return jnp.where(quarter, image.swapaxes(0, 1)[::-1], image)


def warp(image: jax.Array, angle: jax.Array, shift: jax.Array, zoom: jax.Array) -> jax.Array:
    """Turned by `angle` (radians), shifted by `shift` [2] (pixels down, right) and magnified by `zoom`, about the
    centre; bilinear, the border mirrored."""
    h, w, _ = image.shape
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2], image.dtype)
    y, x = jnp.meshgrid(jnp.arange(h, dtype=image.dtype), jnp.arange(w, dtype=image.dtype), indexing="ij")
    y, x = y - centre[0] - shift[0], x - centre[1] - shift[1]
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    places = [cos * y - sin * x + centre[0], sin * y + cos * x + centre[1]]

    def mirrored(i: jax.Array, n: int) -> jax.Array:
        i = jnp.abs(i) % max(2 * (n - 1), 1)
        return jnp.where(i > n - 1, 2 * (n - 1) - i, i)

    lower = [jnp.floor(p) for p in places]
    part = [(p - low)[..., None] for p, low in zip(places, lower, strict=True)]
    rows = [mirrored(lower[0].astype(jnp.int32) + i, h) for i in (0, 1)]
    columns = [mirrored(lower[1].astype(jnp.int32) + i, w) for i in (0, 1)]
    upper = image[rows[0], columns[0]] * (1 - part[1]) + image[rows[0], columns[1]] * part[1]
    below = image[rows[1], columns[0]] * (1 - part[1]) + image[rows[1], columns[1]] * part[1]
    return upper * (1 - part[0]) + below * part[0]


def brightness(image: jax.Array, amount: jax.Array) -> jax.Array:
    """Adds `amount` (share of 255)."""
    return image + amount * 255


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the distance of every value from the image's mean."""
    mean = image.mean()
    return (image - mean) * factor + mean


def hue(image: jax.Array, turn: jax.Array) -> jax.Array:
    """Turns the hue by `turn` (share of the full circle) in YIQ; brightness stays."""
    cos, sin = jnp.cos(2 * math.pi * turn), jnp.sin(2 * math.pi * turn)
    zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
    turned = jnp.array([[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]])
    # Full precision: some accelerators multiply matrices in 10 bits, and pixels have 8.
    matrix = jnp.einsum("ij,jk,kl->il", _RGB.astype(image.dtype), turned, _YIQ.astype(image.dtype), precision="highest")
    return jnp.einsum("hwc,dc->hwd", image, matrix, precision="highest")


def augment_one(image: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """One image, floating [h, w, 3], 0..255 -> the same; what the config switches off isn't computed."""
    keys = jax.random.split(key, 8)

    def uniform(i: int, half_width: float, shape: tuple[int, ...] = ()) -> jax.Array:
        # Drawn in float32, so that the draw is the same in a float64 run.
        draw = jax.random.uniform(keys[i], shape, jnp.float32, -1.0, 1.0)
        return draw.astype(image.dtype) * half_width

    if config.flip:
        image = flip(image, keys[0])
    if config.right_angles:
        image = right_angle(image, keys[1])
    if config.rotate or config.shift or config.zoom:
        side = image.shape[0]
        angle = uniform(2, math.radians(config.rotate))
        image = warp(image, angle, uniform(3, config.shift * side, (2,)), 1 + uniform(4, config.zoom))
    if config.brightness:
        image = brightness(image, uniform(5, config.brightness))
    if config.contrast:
        image = contrast(image, 1 + uniform(6, config.contrast))
    if config.hue:
        image = hue(image, uniform(7, config.hue))
    return jnp.clip(image, 0, 255)


def augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    """Images floating [b, h, w, 3], 0..255, and keys [b] -> images augmented, each by its own key."""
    return jax.vmap(lambda image, key: augment_one(image, key, config))(images, keys)
