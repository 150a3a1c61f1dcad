"""Batch-norm's sums over a feature map for CPUs; what is made of them is in bmjax/layers/norm.py."""

from __future__ import annotations

import jax

from bmjax.cpu import build
from bmjax.layers import ops
from bmjax.layers.ops import at_least_float32


def by_hand(x: jax.Array) -> bool:
    """Takes the place of bmjax.layers.norm.by_hand: for maps [b, h, w, c] that the kernels serve."""
    return x.ndim == 4 and build.usable(x.dtype)


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes the place of bmjax.layers.norm.moments: two passes over what is in the cache."""
    return build.call("moments", ops.moments, x.astype(at_least_float32(x.dtype)))


def channel_sums(gradient: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes the place of bmjax.layers.norm.channel_sums."""
    return build.call("channel_sums", ops.channel_sums, gradient, x)
