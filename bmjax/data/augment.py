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


def draw_turn(key: jax.Array, config: AugmentConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three booleans: mirror up-down, mirror left-right, then a quarter turn. The eight together are every way to lay
    a square on itself."""
    up, left, half, quarter = jax.random.bernoulli(key, jnp.float32(0.5), (4,))  # float32: the same in a float64 run
    if not config.right_angles:
        half = quarter = jnp.zeros_like(up)
    if not config.flip:
        up = left = jnp.zeros_like(up)
    return up ^ half, left ^ half, quarter


def turn(image: jax.Array, up: jax.Array, left: jax.Array, quarter: jax.Array) -> jax.Array:
    """The square image mirrored and turned as the booleans say; exact."""
    image = jnp.where(up, image[::-1], image)
    image = jnp.where(left, image[:, ::-1], image)
    return jnp.where(quarter, image.swapaxes(0, 1)[::-1], image)


def warp(
    image: jax.Array,
    angle: jax.Array,
    shift: jax.Array,
    zoom: jax.Array,
    turned: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """`turn(image, *turned)`, turned by `angle` (radians, clockwise), magnified by `zoom` about the centre and shifted
    by `shift` [2] (pixels down, right); bilinear, the border mirrored."""
    h, w, _ = image.shape
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2], image.dtype)
    y, x = jnp.meshgrid(jnp.arange(h, dtype=image.dtype), jnp.arange(w, dtype=image.dtype), indexing="ij")
    y, x = y - centre[0] - shift[0], x - centre[1] - shift[1]
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    y, x = cos * y - sin * x, sin * y + cos * x
    # The turn by its coordinates: turned first, pixels would be turned again for each of the four neighbours.
    up, left, quarter = turned
    y, x = jnp.where(quarter, x, y), jnp.where(quarter, -y, x)
    places = [jnp.where(up, -y, y) + centre[0], jnp.where(left, -x, x) + centre[1]]

    def mirrored(i: jax.Array, n: int) -> jax.Array:
        i = jnp.abs(i) % max(2 * (n - 1), 1)
        return jnp.where(i > n - 1, 2 * (n - 1) - i, i)

    lower = [jnp.floor(p) for p in places]
    (down, right) = (p - low for p, low in zip(places, lower, strict=True))
    rows = [mirrored(lower[0].astype(jnp.int32) + i, h) for i in (0, 1)]
    columns = [mirrored(lower[1].astype(jnp.int32) + i, w) for i in (0, 1)]
    down, right = down[..., None], right[..., None]
    upper = image[rows[0], columns[0]] * (1 - right) + image[rows[0], columns[1]] * right
    below = image[rows[1], columns[0]] * (1 - right) + image[rows[1], columns[1]] * right
    return upper * (1 - down) + below * down


def brightness(image: jax.Array, amount: jax.Array) -> jax.Array:
    """Adds `amount` (share of 255)."""
    return image + amount * 255


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the distance of every value from the image's mean."""
    mean = image.mean()
    return (image - mean) * factor + mean


def hue(image: jax.Array, amount: jax.Array) -> jax.Array:
    """Turns the hue by `amount` (share of the full circle) in YIQ; brightness stays."""
    cos, sin = jnp.cos(2 * math.pi * amount), jnp.sin(2 * math.pi * amount)
    zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
    turned = jnp.array([[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]])
    matrix = jnp.einsum("ij,jk,kl->il", _RGB.astype(image.dtype), turned, _YIQ.astype(image.dtype), precision="highest")
    # Sums instead of a matrix product: faster on a CPU, and exact on accelerators that round products to 10 bits.
    r, g, b = image[..., 0], image[..., 1], image[..., 2]
    return jnp.stack([row[0] * r + row[1] * g + row[2] * b for row in matrix], axis=-1)


def augment_one(image: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """One image, floating [h, w, 3], 0..255 -> the same; what the config switches off isn't computed."""
    keys = jax.random.split(key, 7)

    def uniform(i: int, half_width: float, shape: tuple[int, ...] = ()) -> jax.Array:
        # Drawn in float32, so that the draw is the same in a float64 run.
        draw = jax.random.uniform(keys[i], shape, jnp.float32, -1.0, 1.0)
        return draw.astype(image.dtype) * half_width

    # Colour comes first: it is affine, so it commutes with the warp, and is cheaper to compute before.
    if config.brightness:
        image = brightness(image, uniform(4, config.brightness))
    if config.contrast:
        image = contrast(image, 1 + uniform(5, config.contrast))
    if config.hue:
        image = hue(image, uniform(6, config.hue))
    turned = draw_turn(keys[0], config)
    if config.rotate or config.shift or config.zoom:
        angle = uniform(1, math.radians(config.rotate))
        shift = uniform(2, config.shift * image.shape[0], (2,))
        image = warp(image, angle, shift, 1 + uniform(3, config.zoom), turned)
    elif config.flip or config.right_angles:
        image = turn(image, *turned)
    return jnp.clip(image, 0, 255)


def augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    """Images floating [b, h, w, 3], 0..255, and keys [b] -> images augmented, each by its own key."""
    return jax.vmap(lambda image, key: augment_one(image, key, config))(images, keys)
