"""Colour of one image on the device: brightness, contrast, hue, saturation, gamma, the lamp's balance.

An image is floating [h, w, 3], RGB 0..255; what comes out may lie outside and is clipped by who calls.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# RGB -> YIQ (NTSC); hue is the angle in the I-Q plane, and saturation the distance from the grey axis.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


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


def saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the distance of every pixel from the grey of its own brightness (luma of ITU-R BT.601); 0 is grey."""
    grey = sum(share * image[..., i] for i, share in enumerate(_YIQ[0].tolist()))
    grey = jnp.asarray(grey)[..., None]
    return grey + (image - grey) * factor


def gamma(image: jax.Array, exponent: jax.Array) -> jax.Array:
    """Every value, as a share of 255, to the power `exponent` > 0: above 1 darkens the middle, black and white stay."""
    return 255 * jnp.maximum(image / 255, 0) ** exponent  # what colour made negative has no power


def balance(image: jax.Array, gains: jax.Array) -> jax.Array:
    """Each channel times its gain [3], as another lamp or another white balance has it."""
    return image * gains[None, None]
