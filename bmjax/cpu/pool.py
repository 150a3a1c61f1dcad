"""The gradient of max-pooling for CPUs: XLA's adds padded maps; here a kernel gathers from one."""

from __future__ import annotations

import functools

import jax

from bmjax.cpu import build
from bmjax.layers.ops import Pixels, plain_pool_gradient


def pool_gradient(
    gradient: jax.Array, place: jax.Array, window: int, stride: int, pads: Pixels, spatial: tuple[int, int]
) -> jax.Array:
    """Takes the place of bmjax.layers.ops.pool_gradient."""
    reference = functools.partial(plain_pool_gradient, window=window, stride=stride, pads=pads, spatial=spatial)
    numbers = (window, stride, pads[0][0], pads[1][0])
    return build.call("max_pool_backward", reference, gradient, place, window=numbers)
