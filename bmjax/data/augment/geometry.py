"""Where a pixel of a warped image comes from, and what stands there."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def centred_grid(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(y, x) of each pixel of an image [h, w, 3] from its centre, pixels, each [h, w]."""
    h, w, _ = image.shape
    y, x = jnp.meshgrid(jnp.arange(h, dtype=image.dtype), jnp.arange(w, dtype=image.dtype), indexing="ij")
    return y - (h - 1) / 2, x - (w - 1) / 2


def sample(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """The image [h, w, 3] at places [h, w] from its centre: bilinear, the border mirrored."""
    h, w, _ = image.shape

    def mirrored(i: jax.Array, n: int) -> jax.Array:
        i = jnp.abs(i) % max(2 * (n - 1), 1)
        return jnp.where(i > n - 1, 2 * (n - 1) - i, i)

    places = [y + (h - 1) / 2, x + (w - 1) / 2]
    lower = [jnp.floor(p) for p in places]
    (down, right) = (p - low for p, low in zip(places, lower, strict=True))
    rows = [mirrored(lower[0].astype(jnp.int32) + i, h) for i in (0, 1)]
    columns = [mirrored(lower[1].astype(jnp.int32) + i, w) for i in (0, 1)]
    down, right = down[..., None], right[..., None]
    upper = image[rows[0], columns[0]] * (1 - right) + image[rows[0], columns[1]] * right
    below = image[rows[1], columns[0]] * (1 - right) + image[rows[1], columns[1]] * right
    return upper * (1 - down) + below * down
