"""Batch-norm for CPUs: its sums over a feature map, and its running form within the convolution before it."""

from __future__ import annotations

import functools

import jax

from bmjax.cpu import build
from bmjax.layers import ops
from bmjax.layers.norm import Around, plain_conv_norm
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


def conv_norm(fixed: Around, *arrays: jax.Array) -> jax.Array:
    """Takes the place of bmjax.layers.norm.conv_norm: a tile of the result is finished while it is in the cache."""
    if not build.usable(arrays[0].dtype):
        return NotImplemented
    name = "conv_norm_add" if len(arrays) == 5 else "conv_norm"
    (top, _), (left, _) = fixed.padding
    window = (*fixed.strides, top, left)
    return build.call(name, functools.partial(plain_conv_norm, fixed), *arrays, window=window, relu=fixed.relu)
