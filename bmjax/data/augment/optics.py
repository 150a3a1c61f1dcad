"""What a microscope and a file format do to an image: defocus, and JPEG's loss."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# ITU-T T.81, Annex K: quantisation of luminance and chrominance.
_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
_TABLES = np.stack([np.array(t.split(), np.float32).reshape(8, 8) for t in (_LUMA, _CHROMA, _CHROMA)])
_PLACES = np.arange(8)
_DCT = np.where(_PLACES[:, None] == 0, math.sqrt(1 / 8), 0.5) * np.cos(
    math.pi * (2 * _PLACES[None] + 1) * _PLACES[:, None] / 16
)
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_RGB = np.linalg.inv(_YCC)


def blur(image: jax.Array, sigma: jax.Array, most: float) -> jax.Array:
    """The image [h, w, 3] under a Gaussian of deviation `sigma` pixels, at most `most`; the border is mirrored."""
    radius = max(1, math.ceil(3 * most))
    radius = min(radius, image.shape[0] - 1, image.shape[1] - 1)
    places = jnp.arange(-radius, radius + 1, dtype=image.dtype)
    weights = jnp.exp(-0.5 * (places / jnp.maximum(sigma, 1e-3)) ** 2)
    weights = weights / weights.sum()
    for axis in (0, 1):
        n = image.shape[axis]
        padded = jnp.pad(image, [(radius, radius) if a == axis else (0, 0) for a in range(3)], "reflect")
        shifted = [jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(2 * radius + 1)]
        image = sum((w * part for w, part in zip(weights, shifted, strict=True)), jnp.zeros_like(image))
    return image


def _colours(image: jax.Array, matrix: np.ndarray) -> jax.Array:
    """[..., 3] by rows times a matrix, as sums: exact on accelerators that round products to 10 bits."""
    m = matrix.astype(image.dtype)
    return jnp.stack([sum(row[i] * image[..., i] for i in range(3)) for row in m], axis=-1)  # type: ignore[misc]


def jpeg(image: jax.Array, quality: jax.Array) -> jax.Array:
    """The image [h, w, 3], 0..255, as a JPEG of a quality 1..100 shows it, without subsampling of colours.

    Each block of 8 by 8 in YCbCr is rounded in its cosine transform by the tables of ITU-T T.81 at the scale of
    libjpeg's quality; the transform is exact, where libjpeg's is of whole numbers.
    """
    h, w, _ = image.shape
    scale = jnp.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    tables = jnp.clip(jnp.floor((_TABLES.astype(image.dtype) * scale + 50) / 100), 1, 255)
    padded = jnp.pad(jnp.round(image), ((0, -h % 8), (0, -w % 8), (0, 0)), "edge")
    planes = jnp.round(_colours(padded, _YCC) + jnp.array([0, 128, 128], image.dtype)[None, None]) - 128
    blocks = planes.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8, 3)
    dct = _DCT.astype(image.dtype)
    found = jnp.einsum("ui,aibjc,vj->abcuv", dct, blocks, dct, precision="highest")
    kept = jnp.round(found / tables[None, None]) * tables[None, None]
    back = jnp.einsum("ui,abcuv,vj->aibjc", dct, kept, dct, precision="highest").reshape(padded.shape)
    # Halves, which a lone constant often gives, go up as libjpeg's do.
    planes = jnp.clip(jnp.floor(back + 0.5) + 128, 0, 255) - jnp.array([0, 128, 128], image.dtype)[None, None]
    return jnp.clip(jnp.round(_colours(planes, _RGB)), 0, 255)[:h, :w]
