"""Max-pooling for CPUs.

XLA's CPU backend scatters a pool's gradient one value at a time. Here a kernel gathers them, or, where there is none,
each place of the window is one strided view.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.cpu import build
from bmjax.layers.ops import NO_PADDING, Pixels, plain_max_pool, views


def max_pool_in_pixels(x: jax.Array, window: int, stride: int, pads: Pixels) -> jax.Array:
    """Takes the place of bmjax.layers.ops.max_pool_in_pixels."""
    return _max_pool(x, window, stride, pads)


def _pool_views(x: jax.Array, window: int, stride: int, pads: Pixels) -> list[jax.Array]:
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    return views(x, (window, window), (stride, stride), NO_PADDING)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, stride, pads):
    return plain_max_pool(x, window, stride, pads)


def _max_pool_forward(x, window, stride, pads):
    views = _pool_views(x, window, stride, pads)
    y = functools.reduce(jnp.maximum, views)
    place = jnp.zeros(y.shape, jnp.int8)
    for n in reversed(range(len(views))):
        place = jnp.where(views[n] == y, jnp.int8(n), place)
    return y, (place, x.shape)


def _max_pool_backward(window, stride, pads, residuals, gradient):
    place, (_, height, width, _) = residuals
    (top, _), (left, _) = pads

    def reference(gradient: jax.Array, place: jax.Array) -> jax.Array:
        zero = jnp.zeros((), gradient.dtype)

        def spread(n: int) -> jax.Array:
            """The gradients of the windows whose maximum was at place n, where they came from."""
            sides = [
                (start, size + before + after - start - (count - 1) * stride - 1, stride - 1)
                for start, size, (before, after), count in zip(
                    divmod(n, window), (height, width), pads, place.shape[1:3], strict=True
                )
            ]
            return lax.pad(jnp.where(place == n, gradient, zero), zero, ((0, 0, 0), *sides, (0, 0, 0)))

        total = functools.reduce(jnp.add, [spread(n) for n in range(window * window)])
        return total[:, top : top + height, left : left + width]

    return (build.call("max_pool_backward", reference, gradient, place, window=(window, stride, top, left)),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
