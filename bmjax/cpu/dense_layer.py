"""The four computations of a layer in a dense block, two forward and two back, for CPUs.

Each is norm, ReLU and a convolution at once, or the gradients of that, so that a feature map is read as seldom as can
be. Where the kernels can be used they compute it, tile by tile; elsewhere XLA does, as written here.

Letters: b h w; x has c channels, or more of which the first c are taken; a map of m channels lies between the layer's
two convolutions; n new channels come out. `affine` is (factor, offset), each [c], as bmjax.layers.ops.norm_affine
gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.cpu import build
from bmjax.cpu.convolution import forward, input_gradient, kernel_gradient
from bmjax.layers import norm, ops
from bmjax.layers.collectives import over_devices
from bmjax.layers.dense_block import Statistics
from bmjax.layers.dispatch import platform
from bmjax.layers.ops import NO_PADDING, Pixels, apply_affine, norm_relu, over_channels
from bmjax.layers.ops import channel_sums as sums

Affine = tuple[jax.Array, jax.Array]


def _padding(kernel: jax.Array) -> Pixels:
    """ "SAME", for stride 1 and odd sides."""
    i, j = kernel.shape[0] // 2, kernel.shape[1] // 2
    return (i, i), (j, j)


def _compute(name: str, reference: Callable[..., Any], *args: jax.Array, **options: Any) -> Any:
    on_cpu = platform() == "cpu"
    return build.call(name, reference, *args, **options) if on_cpu else reference(*args)


def _moments(y: jax.Array, wanted: bool) -> Statistics:
    if not wanted:
        nothing = jnp.zeros(y.shape[-1:], y.dtype)
        return nothing, nothing
    return ops.moments(y) if platform() == "cpu" else norm.moments(y)


def write(buffer: jax.Array, y: jax.Array, channel: int) -> jax.Array:
    """The buffer with y in its channels from `channel` on."""
    return lax.dynamic_update_slice(buffer, y, (0, 0, 0, channel))


def norm_conv(
    x: jax.Array, affine: Affine, kernel: jax.Array, *, moments: bool = True
) -> tuple[jax.Array, Statistics | None]:
    """(conv(relu(norm(x))) [b, h, w, m], its statistics): stride 1, padding "SAME", kernel [i, j, c, m].

    Without `moments` there are no statistics.
    """

    def reference(x, factor, offset, kernel):
        y = norm_relu(x[..., : kernel.shape[2]], factor, offset)
        y = forward(y, kernel, (1, 1), _padding(kernel))
        return y, *_moments(y, moments)

    y, mean, var = _compute("norm_conv", reference, x, *affine, kernel, channel=0, moments=moments)
    return y, over_devices(mean, var) if moments else None


def norm_conv_into(
    x: jax.Array, affine: Affine, kernel: jax.Array, buffer: jax.Array, channel: int, *, moments: bool = True
) -> tuple[jax.Array, Statistics | None]:
    """As `norm_conv`, but the result is put into the buffer's channels from `channel` on: (buffer, statistics)."""

    def reference(x, factor, offset, kernel, buffer):
        y = forward(norm_relu(x, factor, offset), kernel, (1, 1), _padding(kernel))
        return write(buffer, y, channel), *_moments(y, moments)

    into = {"aliases": {4: 0}, "channel": channel, "moments": moments}
    buffer, mean, var = _compute("norm_conv_into", reference, x, *affine, kernel, buffer, **into)
    return buffer, over_devices(mean, var) if moments else None


def _through_relu(x, gradient, factor, offset):
    """The gradient before the ReLU, and its sums that the norm's parameters need: (dz, sum of dz, sum of dz * x)."""
    dz = jnp.where(apply_affine(x, factor, offset) > 0, gradient, 0)
    return dz, *sums(dz, x)


def norm_conv_backward(
    x: jax.Array, affine: Affine, kernel: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """The gradient `dy` [b, h, w, n] of conv(relu(norm(x))), taken back through convolution and ReLU.

    Returns:
      The gradient of norm(x) [b, h, w, m], that of the kernel, and those of the norm's (factor, offset).
    """

    def reference(x, factor, offset, kernel, dy):
        padding = _padding(kernel)
        dkernel = kernel_gradient(norm_relu(x, factor, offset), dy, kernel.shape, (1, 1), padding)
        dx = input_gradient(dy, kernel, x.shape, (1, 1), padding)
        dz, total, total_x = _through_relu(x, dx, factor, offset)
        return dz, dkernel, total, total_x

    dz, dkernel, total, total_x = _compute("norm_conv_backward", reference, x, *affine, kernel, dy)
    return dz, dkernel, (total_x, total)


def norm_product_backward(
    x: jax.Array,
    affine: Affine,
    kernel: jax.Array,
    dz: jax.Array,
    y: jax.Array,
    combine: tuple[jax.Array, jax.Array, jax.Array],
    into: jax.Array,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """As `norm_conv_backward` of a 1x1 convolution, and through the norm's factor, added to `into` [b, h, w, >= c].

    The gradient of the convolution's result y [b, h, w, m] is scale * dz + shift + slope * y, where `combine` is
    (scale, shift, slope), each [m]: what comes through the next norm, its statistics included.

    Returns:
      The sum, the gradient of the kernel, and those of the norm's (factor, offset).
    """

    def reference(x, factor, offset, kernel, dz, y, scale, shift, slope, into):
        x = x[..., : kernel.shape[2]]
        dy = (apply_affine(dz, scale, shift) + over_channels(slope, 4) * y).astype(y.dtype)
        dkernel = kernel_gradient(norm_relu(x, factor, offset), dy, kernel.shape, (1, 1), NO_PADDING)
        dx = input_gradient(dy, kernel, x.shape, (1, 1), NO_PADDING)
        dx, total, total_x = _through_relu(x, dx, factor, offset)
        into = write(into, (into[..., : x.shape[-1]] + over_channels(factor, 4) * dx).astype(into.dtype), 0)
        return into, dkernel, total, total_x

    into, dkernel, total, total_x = _compute(
        "norm_product_backward", reference, x, *affine, kernel, dz, y, *combine, into, aliases={9: 0}
    )
    return into, dkernel, (total_x, total)
