"""Operations on arrays: what layers are made of, and what each kernel of bmjax/cpu is held to.

Letters: b h w c; a kernel is [kh, kw, c/groups, n]. Those marked `replaceable` may be computed by a platform's own
code (see bmjax/layers/dispatch.py), with the same result but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.layers.dispatch import platform, replaceable, wants

Padding = str | int | Sequence[tuple[int, int]]
"""Of a convolution or a pool: "SAME" (as TensorFlow: more at the end where uneven), "VALID", or pixels before and after
per axis; a number is the same on all sides, as in torch."""
Pixels = tuple[tuple[int, int], tuple[int, int]]
"""Padding in pixels before and after, per axis."""
NO_PADDING: Pixels = ((0, 0), (0, 0))
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def at_least_float32(dtype: Any) -> Any:
    """float32 for a shorter float, else the type itself."""
    return jnp.promote_types(dtype, jnp.float32)


def over_channels(v: jax.Array, ndim: int) -> jax.Array:
    """[c] -> [1, ..., 1, c] with `ndim` axes: rank promotion is an error here, so it is written out."""
    return v.reshape((1,) * (ndim - 1) + v.shape)


def in_pixels(padding: Padding, spatial: tuple[int, int], size: tuple[int, int], strides: tuple[int, int]) -> Pixels:
    """Padding as pixels before and after, per axis, of an input of `spatial` size and a window of `size`."""
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    pairs = lax.padtype_to_pads(spatial, size, strides, padding) if isinstance(padding, str) else padding
    (top, bottom), (left, right) = pairs
    return (top, bottom), (left, right)


def within_reach(kernel: jax.Array, spatial: tuple[int, int], dilation: int = 1) -> jax.Array:
    """The middle of a kernel [kh, kw, ...] of odd sides that meets an input of `spatial` size in a convolution of
    stride 1 and padding "SAME"; what is left off sees only padding."""
    reach = [min(side // 2, (size - 1) // dilation) for side, size in zip(kernel.shape[:2], spatial, strict=True)]
    rows, columns = (slice(side // 2 - r, side // 2 + r + 1) for side, r in zip(kernel.shape[:2], reach, strict=True))
    return kernel[rows, columns]


def plain_convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pixels, groups: int = 1
) -> jax.Array:
    """XLA's convolution of x [b, h, w, c] with a kernel [kh, kw, c/groups, n] -> [b, h', w', n]."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def views(x: jax.Array, size: tuple[int, int], strides: tuple[int, int], padding: Pixels) -> list[jax.Array]:
    """For each place in a kernel of that size, row by row, what it sees of x [b, h, w, c]: [b, h', w', c]."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    b, h, w, c = x.shape
    (kh, kw), (sh, sw) = size, strides
    out_h, out_w = (h - kh) // sh + 1, (w - kw) // sw + 1
    return [
        lax.slice(x, (0, i, j, 0), (b, i + (out_h - 1) * sh + 1, j + (out_w - 1) * sw + 1, c), (1, sh, sw, 1))
        for i in range(kh)
        for j in range(kw)
    ]


def depthwise_taps(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pixels) -> jax.Array:
    """Convolution of each channel of x [b, h, w, c] by itself, kernel [kh, kw, 1, c], as a sum of shifted maps.

    Summed in at least float32.
    """
    dtype = at_least_float32(x.dtype)
    seen = views(x, (kernel.shape[0], kernel.shape[1]), strides, padding)
    weights = kernel.astype(dtype).reshape(len(seen), 1, 1, 1, -1)
    terms = [view.astype(dtype) * weight for view, weight in zip(seen, weights, strict=True)]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _by_taps(kernel: jax.Array) -> bool:
    """Whether a depthwise convolution is a sum of shifted maps.

    On an NVIDIA H200 MobileNetV2 trains faster so than timm does (docs/speed.md), and its program was compiled in half
    the time after which the library's depthwise kernels were still being tried out.
    """
    small = kernel.shape[0] * kernel.shape[1] <= 9
    return wants("depthwise_taps") or (platform() == "gpu" and small and not wants("plain_depthwise"))


def pointwise_dot(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Convolution of x [b, h, w, c] with a kernel [1, 1, c, n] as a product of matrices."""
    return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]


@replaceable
def convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int] = (1, 1), padding: Pixels = NO_PADDING, groups: int = 1
) -> jax.Array:
    """Convolution of x [b, h, w, c] with a kernel [kh, kw, c/groups, n] -> [b, h', w', n], one dtype throughout.

    On CPUs derivatives of any order work in reverse mode and forward-over-reverse; plain forward mode (`jax.jvp` of
    the convolution itself) does not, as with any `jax.custom_vjp`.
    """
    if groups > 1 and groups == x.shape[-1] == kernel.shape[-1] and _by_taps(kernel):
        return depthwise_taps(x, kernel, strides, padding)
    if groups == 1 and kernel.shape[:2] == (1, 1) and padding == NO_PADDING and wants("pointwise_dot"):
        return pointwise_dot(x, kernel, strides)
    return plain_convolution(x, kernel, strides, padding, groups)


@replaceable
def dilated_convolution(x: jax.Array, kernel: jax.Array, dilation: int, groups: int = 1) -> jax.Array:
    """Convolution of stride 1 and padding "SAME" whose kernel sees each `dilation`-th place; shapes as `convolution`.

    Raises:
      ValueError: the kernel has an even side.
    """
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"a dilated kernel has shape {kernel.shape}; expected odd sides")
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [c] of [..., c] over every axis but the last, on this device, in x's type.

    In two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    """
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x - over_channels(mean, x.ndim)).mean(axes)


def channel_sums(gradient: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums [c] of the gradient and of gradient * x over all but the channels, in at least float32."""
    axes, dtype = tuple(range(x.ndim - 1)), at_least_float32(x.dtype)
    gradient = gradient.astype(dtype)
    return gradient.sum(axes), (gradient * x.astype(dtype)).sum(axes)


def apply_affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """factor * x + offset per channel of x [..., c], in the type of the factor."""
    return x.astype(factor.dtype) * over_channels(factor, x.ndim) + over_channels(offset, x.ndim)


def through_relu(
    x: jax.Array, gradient: jax.Array, factor: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient dz before the ReLU of `norm_relu`, and its sums that the norm's parameters need: (dz, sum of dz, sum
    of dz * x)."""
    dz = jnp.where(apply_affine(x, factor, offset) > 0, gradient, 0)
    return dz, *channel_sums(dz, x)


def relu6(x: jax.Array) -> jax.Array:
    """x, but at least 0 and at most 6."""
    return jnp.clip(x, 0, 6)


def norm_relu(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """relu(factor * x + offset), in the type of x."""
    return jnp.maximum(apply_affine(x, factor, offset), 0).astype(x.dtype)


def global_average(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, c], summed in at least float32."""
    return x.astype(at_least_float32(x.dtype)).mean((1, 2))


def unit_mean(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """The mean over axes of numbers 0..1, which rounding does not take above one."""
    return jnp.minimum(x.mean(axes), 1)


def mean_and_deviation(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (biased) over axes, which are kept with length one, in at least float32.

    Where all values are equal the deviation is zero and passes no gradient: a square root's would be infinite.
    """
    x = x.astype(at_least_float32(x.dtype))
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    positive = variance > 0
    return mean, jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def maximum_over(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """The largest value over axes, which go; its gradient is shared by all that equal it but for rounding.

    XLA may compute x a second time where the gradient is taken, with other roundings. Then nothing equals the maximum
    bit for bit, and the gradient of `jnp.max` is 0 / 0.
    """
    return x.max(axes)


@maximum_over.defjvp
def _maximum_over_jvp(
    axes: int | tuple[int, ...], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    largest = x.max(axes, keepdims=True)
    gone = tuple(axis % x.ndim for axis in (axes if isinstance(axes, tuple) else (axes,)))
    return lax.squeeze(largest, gone), (dx * lax.stop_gradient(shares_of(x, largest, axes))).sum(axes)


def shares_of(x: jax.Array, largest: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """Each element's share of the gradient of a maximum over axes, which `largest` keeps with length one."""
    near = (x >= largest - 4 * jnp.finfo(x.dtype).eps * jnp.abs(largest)).astype(x.dtype)
    return near / jnp.maximum(near.sum(axes, keepdims=True), 1)


def max_pool(x: jax.Array, window: int, stride: int, padding: Padding) -> jax.Array:
    """The largest value of each square window: [b, h, w, c] -> [b, h', w', c]. Padded with -inf.

    The gradient goes to the first of equal values, row by row.
    """
    return max_pool_in_pixels(
        x, window, stride, in_pixels(padding, (x.shape[1], x.shape[2]), (window, window), (stride, stride))
    )


def plain_max_pool(x: jax.Array, window: int, stride: int, pads: Pixels) -> jax.Array:
    """As `max_pool_in_pixels`, by XLA."""
    sides = ((0, 0), *pads, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), sides)


def plain_pool_gradient(
    gradient: jax.Array, place: jax.Array, window: int, stride: int, pads: Pixels, spatial: tuple[int, int]
) -> jax.Array:
    """As `pool_gradient`, by a padded map for each place."""
    (top, _), (left, _) = pads
    zero = jnp.zeros((), gradient.dtype)

    def spread(n: int) -> jax.Array:
        """The gradients of the windows whose maximum was at place n, where they came from."""
        sides = [
            (start, size + before + after - start - (count - 1) * stride - 1, stride - 1)
            for start, size, (before, after), count in zip(
                divmod(n, window), spatial, pads, place.shape[1:3], strict=True
            )
        ]
        return lax.pad(jnp.where(place == n, gradient, zero), zero, ((0, 0, 0), *sides, (0, 0, 0)))

    total = functools.reduce(jnp.add, [spread(n) for n in range(window * window)])
    return total[:, top : top + spatial[0], left : left + spatial[1]]


@replaceable
def pool_gradient(
    gradient: jax.Array, place: jax.Array, window: int, stride: int, pads: Pixels, spatial: tuple[int, int]
) -> jax.Array:
    """The gradient of a pool's input [b, *spatial, c] from that of its output [b, h', w', c] and the place in its
    window, int8, that each maximum came from."""
    return plain_pool_gradient(gradient, place, window, stride, pads, spatial)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _pool_by_place(x: jax.Array, window: int, stride: int, pads: Pixels) -> jax.Array:
    return plain_max_pool(x, window, stride, pads)


def _pool_forward(x, window, stride, pads):
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    seen = views(padded, (window, window), (stride, stride), NO_PADDING)
    y = functools.reduce(jnp.maximum, seen)
    place = jnp.zeros(y.shape, jnp.int8)
    for n in reversed(range(len(seen))):  # so that the first of equal values is written last
        place = jnp.where(seen[n] == y, jnp.int8(n), place)
    return y, (place, x.shape[1:3])


def _pool_backward(window, stride, pads, residuals, gradient):
    place, spatial = residuals
    return (pool_gradient(gradient, place, window, stride, pads, spatial),)


_pool_by_place.defvjp(_pool_forward, _pool_backward)


def max_pool_in_pixels(x: jax.Array, window: int, stride: int, pads: Pixels) -> jax.Array:
    """As `max_pool`, its padding in pixels.

    Kept for the way back is the place in its window that each maximum came from, in a byte; XLA's own derivative keeps
    four indices of 32 bits, and adds gradients one by one where they belong.
    """
    if window**2 > 127 or wants("plain_pool"):
        return plain_max_pool(x, window, stride, pads)
    return _pool_by_place(x, window, stride, pads)


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, but no less than 8 or nine tenths of the channels: as MobileNet and its followers."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most the limit: into how many groups n channels divide."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
