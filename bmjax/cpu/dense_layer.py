"""The four computations of a layer in a dense block, two forward and two back, for CPUs.

Each is norm, ReLU and a convolution at once, or the gradients of that, so that a feature map is read as seldom as can
be; the norm's own arithmetic, which is a dozen small operations otherwise, is within. Where the kernels can be used
they compute it, tile by tile; elsewhere XLA does, as written here.

Letters: b h w; x has c channels, or more of which the first c are taken; a map of m channels lies between the layer's
two convolutions; n new channels come out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.cpu import build
from bmjax.cpu.convolution import forward, input_gradient, kernel_gradient
from bmjax.layers import norm, ops
from bmjax.layers.collectives import all_sum, batch_axis_bound, over_devices
from bmjax.layers.dense_block import Statistics
from bmjax.layers.dispatch import platform
from bmjax.layers.norm import norm_affine, through_summed_statistics
from bmjax.layers.ops import NO_PADDING, Pixels, apply_affine, norm_relu, over_channels, through_relu


class Norm(NamedTuple):
    """Parameters of a batch-norm [c], and the statistics it goes by, of which the first c are taken."""

    scale: jax.Array
    bias: jax.Array
    mean: jax.Array
    var: jax.Array

    def affine(self, epsilon: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """(factor, offset), as `bmjax.layers.norm.norm_affine` gives them."""
        return norm_affine(self.of_channels(), epsilon, dtype)

    def of_channels(self) -> Norm:
        """With the statistics of its own channels alone."""
        c = self.scale.shape[0]
        return self._replace(mean=self.mean[:c], var=self.var[:c])

    def gradients(self, epsilon: float, dtype: Any, total: jax.Array, total_x: jax.Array) -> Norm:
        """Those [c] of all four, from the sums of the gradient of the norm's result and of that times its input."""
        _, vjp = jax.vjp(lambda *values: norm_affine(values, epsilon, dtype), *self.of_channels())
        return Norm(*vjp((total_x, total)))


def _padding(kernel: jax.Array) -> Pixels:
    """ "SAME", for stride 1 and odd sides."""
    i, j = kernel.shape[0] // 2, kernel.shape[1] // 2
    return (i, i), (j, j)


def _compute(name: str, reference: Callable[..., Any], *args: jax.Array, **options: Any) -> Any:
    on_cpu = platform() == "cpu"
    return build.call(name, reference, *args, **options) if on_cpu else reference(*args)


def _map(x: jax.Array, channels: int) -> jax.ShapeDtypeStruct:
    """Of a map as x is, with so many channels."""
    return jax.ShapeDtypeStruct((*x.shape[:-1], channels), x.dtype)


def _moments(y: jax.Array) -> Statistics:
    return ops.moments(y) if platform() == "cpu" else norm.moments(y)


def write(buffer: jax.Array, y: jax.Array, channel: int) -> jax.Array:
    """The buffer with y in its channels, the last axis, from `channel` on."""
    return lax.dynamic_update_slice(buffer, y, (*(0,) * (y.ndim - 1), channel))


def _everywhere(change: Callable[..., Statistics], values: Statistics, channel: int, count: int) -> Statistics:
    """Where devices share a batch, the two vectors with some channels put through what they do together."""
    if not batch_axis_bound():
        return values
    part = change(*(lax.dynamic_slice_in_dim(v, channel, count) for v in values))
    first, second = (write(v, p, channel) for v, p in zip(values, part, strict=True))
    return first, second


def norm_conv(
    x: jax.Array, around: Norm, kernel: jax.Array, *, epsilon: float, moments: bool = True
) -> tuple[jax.Array, Statistics | None]:
    """(conv(relu(norm(x))) [b, h, w, m], its statistics): stride 1, padding "SAME", kernel [i, j, c, m].

    Without `moments` there are no statistics.
    """

    def reference(x, scale, bias, mean, var, kernel):
        affine = Norm(scale, bias, mean, var).affine(epsilon, x.dtype)
        y = forward(norm_relu(x[..., : kernel.shape[2]], *affine), kernel, (1, 1), _padding(kernel))
        nothing = jnp.zeros(y.shape[-1:], y.dtype)
        return y, *(_moments(y) if moments else (nothing, nothing))

    channels = jax.ShapeDtypeStruct(kernel.shape[-1:], x.dtype)
    options = {"epsilon": epsilon, "moments": moments, "like": (_map(x, kernel.shape[-1]), channels, channels)}
    y, mean, var = _compute("norm_conv", reference, x, *around, kernel, **options)
    return y, over_devices(mean, var) if moments else None


def norm_conv_into(
    x: jax.Array,
    around: Norm,
    kernel: jax.Array,
    into: tuple[jax.Array, jax.Array, jax.Array],
    channel: int,
    *,
    epsilon: float,
    moments: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `norm_conv`, but the result is put into the channels of `into` from `channel` on: a map [b, h, w, >= n], and
    means and variances [>= n], which without `moments` stay as they are."""

    def reference(x, scale, bias, mean, var, kernel, buffer, means, variances):
        affine = Norm(scale, bias, mean, var).affine(epsilon, x.dtype)
        y = forward(norm_relu(x, *affine), kernel, (1, 1), _padding(kernel))
        if moments:
            mean, var = _moments(y)
            means, variances = write(means, mean, channel), write(variances, var, channel)
        return write(buffer, y, channel), means, variances

    options = {"aliases": {6: 0, 7: 1, 8: 2}, "like": into, "epsilon": epsilon, "channel": channel, "moments": moments}
    buffer, means, variances = _compute("norm_conv_into", reference, x, *around, kernel, *into, **options)
    if moments:
        means, variances = _everywhere(over_devices, (means, variances), channel, kernel.shape[-1])
    return buffer, means, variances


class Result(NamedTuple):
    """A map [b, h, w, >= n] that dense layers wrote, its statistics, and the gradients of all three."""

    y: jax.Array
    mean: jax.Array
    dy: jax.Array
    dmean: jax.Array
    dvar: jax.Array


def norm_conv_backward(
    x: jax.Array, around: Norm, kernel: jax.Array, result: Result, channel: int, *, epsilon: float, count: int
) -> tuple[jax.Array, jax.Array, Norm]:
    """The gradient of conv(relu(norm(x))), which the channels of `result` from `channel` on are, taken back through its
    statistics, the convolution and the ReLU.

    `count`: how many values those are of, as `batch_count` gives it; 0 where nothing comes through them.

    Returns:
      The gradient of norm(x) [b, h, w, m], that of the kernel, and those of the norm.
    """
    n = kernel.shape[-1]

    def reference(x, scale, bias, mean, var, kernel, y, y_mean, dy, dmean, dvar):
        affine = Norm(scale, bias, mean, var).affine(epsilon, x.dtype)
        padding, dy = _padding(kernel), dy[..., channel : channel + n]
        if count:
            y, y_mean, dmean, dvar = (v[..., channel : channel + n] for v in (y, y_mean, dmean, dvar))
            shift, slope = through_summed_statistics(y_mean, dmean, dvar, count)
            dy = (dy + apply_affine(y, slope, shift)).astype(dy.dtype)
        dkernel = kernel_gradient(norm_relu(x, *affine), dy, kernel.shape, (1, 1), padding)
        dx = input_gradient(dy, kernel, x.shape, (1, 1), padding)
        dz, total, total_x = through_relu(x, dx, *affine)
        return dz, dkernel, *Norm(scale, bias, mean, var).gradients(epsilon, x.dtype, total, total_x)

    if count:
        both = _everywhere(lambda *d: all_sum(d), (result.dmean, result.dvar), channel, n)
        result = result._replace(dmean=both[0], dvar=both[1])
    options = {"like": (x, kernel, *(around.scale,) * 4), "epsilon": epsilon, "channel": channel, "count": count}
    dz, dkernel, *gradients = _compute("norm_conv_backward", reference, x, *around, kernel, *result, **options)
    return dz, dkernel, Norm(*gradients)


def norm_product_backward(
    x: jax.Array,
    around: Norm,
    kernel: jax.Array,
    dz: jax.Array,
    y: jax.Array,
    after: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    into: tuple[jax.Array, jax.Array, jax.Array],
    *,
    epsilon: float,
    count: int,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array, tuple[jax.Array, jax.Array]]:
    """As `norm_conv_backward` of a 1x1 convolution, and through the norm's factor and statistics, added to `into`: the
    gradients of x [b, h, w, >= c] and of its statistics, each [>= c].

    `dz` is the gradient of what the next norm made of the convolution's result y [b, h, w, m]. `after` is that norm's
    scale, mean and variance, and the gradients of those two, each [m]; `count` as above.

    Returns:
      The sums, the gradient of the kernel, and those of the norm's scale and bias.
    """
    dmean, dvar = all_sum(after[3:]) if count else after[3:]

    def reference(x, scale, bias, mean, var, kernel, dz, y, scale1, mean1, var1, dmean1, dvar1, into, dmean, dvar):
        c, around = kernel.shape[2], Norm(scale, bias, mean, var)
        x, (factor, offset) = x[..., :c], around.affine(epsilon, x.dtype)
        dy = apply_affine(
            dz, *norm_affine((scale1, jnp.zeros_like(scale1), jnp.zeros_like(mean1), var1), epsilon, y.dtype)
        )
        if count:
            shift, slope = through_summed_statistics(mean1, dmean1, dvar1, count)
            dy = dy + apply_affine(y, slope, shift)
        dy = dy.astype(y.dtype)
        dkernel = kernel_gradient(norm_relu(x, factor, offset), dy, kernel.shape, (1, 1), NO_PADDING)
        dx = input_gradient(dy, kernel, x.shape, (1, 1), NO_PADDING)
        dx, total, total_x = through_relu(x, dx, factor, offset)
        into = write(into, (into[..., :c] + over_channels(factor, 4) * dx).astype(into.dtype), 0)
        dscale, dbias, *share = around.gradients(epsilon, x.dtype, total, total_x)
        dmean, dvar = (d.at[:c].add(s) for d, s in zip((dmean, dvar), share, strict=True))
        return into, dkernel, dscale, dbias, dmean, dvar

    arrays = (x, *around, kernel, dz, y, *after[:3], dmean, dvar, *into)
    like = (into[0], kernel, around.scale, around.bias, *into[1:])
    options = {"aliases": {13: 0, 14: 4, 15: 5}, "like": like, "epsilon": epsilon, "count": count}
    total, dkernel, dscale, dbias, *share = _compute("norm_product_backward", reference, *arrays, **options)
    return (total, *share), dkernel, (dscale, dbias)
