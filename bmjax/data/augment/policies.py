"""RandAugment and TrivialAugment on the device: random operations of Pillow's, drawn for each image by its own key.

An image is floating [h, w, 3] of whole grey levels 0..255, and what comes back is too: operations round as Pillow does.
Ranges of strength are those of torchvision. Geometry mirrors the border, where torchvision draws black.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.data.augment.geometry import centred_grid, sample

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
BINS = 31  # of strength
_GREY = np.array([19595, 38470, 7471])  # Pillow's L = (19595 R + 38470 G + 7471 B + 0x8000) >> 16


def magnitudes(kind: Literal["randaugment", "trivialaugment"], width: int) -> np.ndarray:
    """Strength by operation and bin, [14, 31]: shears as slopes, translations in pixels, rotation in degrees, factors
    less 1, bits kept, a threshold."""
    wide = kind == "trivialaugment"
    bins = np.linspace(0, 1, BINS)
    table = dict.fromkeys(OPERATIONS, np.zeros(BINS))
    table |= dict.fromkeys(("shear_x", "shear_y"), bins * (0.99 if wide else 0.3))
    table |= dict.fromkeys(("translate_x", "translate_y"), bins * (32.0 if wide else 150.0 / 331.0 * width))
    table["rotate"] = bins * (135.0 if wide else 30.0)
    table |= dict.fromkeys(("brightness", "color", "contrast", "sharpness"), bins * (0.99 if wide else 0.9))
    table["posterize"] = 8 - np.round(np.arange(BINS) / ((BINS - 1) / (6 if wide else 4)))
    table["solarize"] = 255 - 255 * bins
    return np.stack([table[name] for name in OPERATIONS])


def _grey(image: jax.Array) -> jax.Array:
    levels = image.astype(jnp.int32)
    return (((levels * jnp.asarray(_GREY, jnp.int32)[None, None]).sum(-1) + 0x8000) >> 16).astype(image.dtype)


def _smooth(image: jax.Array) -> jax.Array:
    """Pillow's SMOOTH filter: 3x3 with 5 in the middle, over 13; the outermost pixels stay."""
    h, w, _ = image.shape
    total = sum(image[i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3)) + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set(jnp.floor(total / 13 + 0.5))


def _blend(image: jax.Array, strength: jax.Array, operation: jax.Array) -> jax.Array:
    """Pillow's ImageEnhance: between what the operation would take everything out of, and the image."""
    grey = jnp.broadcast_to(_grey(image)[..., None], image.shape)
    flat = jnp.full_like(image, jnp.floor(grey[..., 0].mean() + 0.5))
    without = jax.lax.switch(operation, [
        lambda: jnp.zeros_like(image), lambda: grey, lambda: flat, lambda: _smooth(image)
    ])  # fmt: skip
    return jnp.floor(jnp.clip(without + (1 + strength) * (image - without), 0, 255))


def _histograms(image: jax.Array) -> jax.Array:
    """Counts of the levels of each channel, [3, 256]."""
    levels = image.reshape(-1, 3).astype(jnp.int32) + 256 * jnp.arange(3)[None]
    return jnp.zeros(768, jnp.int32).at[levels.ravel()].add(1).reshape(3, 256)


def _lookup(image: jax.Array, strength: jax.Array, operation: jax.Array) -> jax.Array:
    """Operations that give each level of a channel another: Pillow's ImageOps."""
    levels = jnp.arange(256, dtype=jnp.int32)
    counts = _histograms(image)

    def posterize() -> jax.Array:
        step = jnp.exp2(8 - strength)
        return jnp.broadcast_to((jnp.floor(levels / step) * step).astype(jnp.int32)[None], (3, 256))

    def solarize() -> jax.Array:
        return jnp.broadcast_to(jnp.where(levels < strength, levels, 255 - levels)[None], (3, 256))

    def autocontrast() -> jax.Array:
        low = (counts > 0).argmax(-1)[:, None]
        high = 255 - (counts[:, ::-1] > 0).argmax(-1)[:, None]
        spread = jnp.clip((levels[None] - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
        return jnp.where(high > low, spread, levels[None])

    def equalize() -> jax.Array:
        last = 255 - (counts[:, ::-1] > 0).argmax(-1)
        step = (counts.sum(-1) - jnp.take_along_axis(counts, last[:, None], 1)[:, 0])[:, None] // 255
        before = jnp.cumsum(counts, -1) - counts
        table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
        return jnp.where(((counts > 0).sum(-1)[:, None] > 1) & (step > 0), table, levels[None])

    branches = [lambda f=f: f().astype(jnp.int32) for f in (posterize, solarize, autocontrast, equalize)]
    table = jax.lax.switch(operation, branches)
    chosen = image.astype(jnp.int32)
    return jnp.stack([table[c][chosen[..., c]] for c in range(3)], axis=-1).astype(image.dtype)


def _move(image: jax.Array, strength: jax.Array, operation: jax.Array) -> jax.Array:
    """Shears along x and y, translations along x and y, and a rotation about the centre; bilinear."""
    y, x = centred_grid(image)
    shear_x, shear_y, translate_x, translate_y, rotate = (operation == i for i in range(5))
    angle = jnp.where(rotate, strength * (np.pi / 180), 0.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    along_x = cos * x + sin * y + jnp.where(shear_x, strength, 0.0) * y - jnp.where(translate_x, strength, 0.0)
    along_y = cos * y - sin * x + jnp.where(shear_y, strength, 0.0) * x - jnp.where(translate_y, strength, 0.0)
    return jnp.floor(sample(image, along_y, along_x) + 0.5)


def apply(image: jax.Array, operation: jax.Array, strength: jax.Array) -> jax.Array:
    """One operation, by its place in `OPERATIONS`, at a strength as of `magnitudes`, with its sign where it has one."""
    # In groups, for under vmap every branch of a switch is computed for every image.
    group = jnp.asarray([0, *[1] * 5, *[2] * 4, *[3] * 4])[operation]
    first = jnp.asarray([0, 1, 6, 10])[group]
    within = operation - first
    branches = [
        lambda: image,
        lambda: _move(image, strength, within),
        lambda: _blend(image, strength, jnp.clip(within, 0, 3)),
        lambda: _lookup(image, strength, jnp.clip(within, 0, 3)),
    ]
    return jax.lax.switch(group, branches)


def randaugment(image: jax.Array, key: jax.Array, operations: int, magnitude: int) -> jax.Array:
    """So many operations in a row, drawn alike, all at one bin of strength 0..30 (Cubuk et al. 2020)."""
    table = magnitudes("randaugment", image.shape[1])[:, magnitude]
    for one in jax.random.split(key, operations):
        image = _draw(image, one, jnp.asarray(table, image.dtype))
    return image


def trivialaugment(image: jax.Array, key: jax.Array) -> jax.Array:
    """One operation, drawn alike, at a strength drawn alike, in the wide ranges (Müller and Hutter 2021)."""
    bin_key, key = jax.random.split(key)
    place = jax.random.randint(bin_key, (), 0, BINS, jnp.int32)
    return _draw(image, key, jnp.asarray(magnitudes("trivialaugment", image.shape[1]), image.dtype)[:, place])


def _draw(image: jax.Array, key: jax.Array, strengths: jax.Array) -> jax.Array:
    which, sign = jax.random.split(key)
    operation = jax.random.randint(which, (), 0, len(OPERATIONS), jnp.int32)
    signed = (operation >= 1) & (operation <= 9)
    negative = jax.random.bernoulli(sign, jnp.float32(0.5)) & signed
    strength = strengths[operation]
    return apply(image, operation, jnp.where(negative, -strength, strength))
