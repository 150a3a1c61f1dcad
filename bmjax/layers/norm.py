"""Batch normalisation of a feature map: its sums, and its derivatives by hand.

What a norm costs is how often the map is read. Autodiff of mean and variance sums over the map a third time on the way
back, for a term that is zero; by hand there are two sums each way, and what is kept for the way back is the map alone.
Derivatives of higher order work in reverse mode and forward-over-reverse, as with any `jax.custom_vjp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bmjax.layers import ops
from bmjax.layers.collectives import all_sum, batch_count, over_devices
from bmjax.layers.dispatch import replaceable
from bmjax.layers.ops import Pixels, apply_affine, at_least_float32, over_channels


@replaceable
def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [c] of [..., c] over every axis but the last, on this device, in at least float32.

    In one pass over x, shifted by the value in the middle of the first image: E[d^2] - E[d]^2 of d = x - shift loses
    what the shift is away from the mean, in standard deviations, squared; of x itself it would lose all where the mean
    is large. The two sums have one operand, so a compiler takes both in one pass.
    """
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(at_least_float32(x.dtype))
    shift = lax.stop_gradient(wide[(0, *(n // 2 for n in x.shape[1:-1]))])
    apart = wide - over_channels(shift, x.ndim)
    mean, square = apart.mean(axes), jnp.square(apart).mean(axes)
    return shift + mean, jnp.maximum(square - jnp.square(mean), 0)


@replaceable
def channel_sums(gradient: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums [c] of the gradient and of gradient * x over all but the channels, in at least float32."""
    return ops.channel_sums(gradient, x)


@replaceable
def by_hand(x: jax.Array) -> bool:
    """Whether the derivatives of a norm of x are the ones here; else autodiff's, of statistics in two passes."""
    del x
    return True


def through_statistics(
    mean: jax.Array, gradients: tuple[jax.Array, jax.Array], count: int
) -> tuple[jax.Array, jax.Array]:
    """(shift, slope): the gradient of x that comes through its statistics over the batch is shift + slope * x.

    `gradients`: those of mean and variance on this device, each [c]; `count` as `batch_count` gives it.
    """
    # Every device's loss depends on statistics of the whole batch.
    dmean, dvar = all_sum(gradients)
    return through_summed_statistics(mean, dmean, dvar, count)


def through_summed_statistics(
    mean: jax.Array, dmean: jax.Array, dvar: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """As `through_statistics`, of gradients that are summed over the devices already."""
    slope = 2 * dvar / count
    return dmean / count - slope * mean, slope


@jax.custom_vjp
def _statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return over_devices(*moments(x))


def _statistics_forward(x):
    mean, var = over_devices(*moments(x))
    return (mean, var), (x, mean)


def _statistics_backward(residuals, gradients):
    x, mean = residuals
    shift, slope = through_statistics(mean, gradients, batch_count(x))
    dx = over_channels(shift, x.ndim) + over_channels(slope, x.ndim) * x.astype(slope.dtype)
    return (dx.astype(x.dtype),)


_statistics.defvjp(_statistics_forward, _statistics_backward)


def batch_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [c] of [..., c] over every axis but the last, and over the devices.

    Computed in at least float32.
    """
    if by_hand(x):
        return _statistics(x)
    return over_devices(*ops.moments(x.astype(at_least_float32(x.dtype))))


def norm_affine(values: tuple[jax.Array, ...], epsilon: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Batch normalisation of an input in `dtype` as one affine map: (factor, offset), each [c], at least float32.

    `values`: scale, bias, mean and variance, each [c].
    """
    scale, bias, mean, var = (v.astype(at_least_float32(dtype)) for v in values)
    factor = scale * jax.lax.rsqrt(var + epsilon)
    return factor, bias - mean * factor


@jax.custom_vjp
def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return apply_affine(x, factor, offset)


def _affine_forward(x, factor, offset):
    return apply_affine(x, factor, offset), (x, factor)


def _affine_backward(residuals, gradient):
    x, factor = residuals
    total, total_x = channel_sums(gradient, x)
    return (gradient * over_channels(factor, x.ndim)).astype(x.dtype), total_x, total


_affine.defvjp(_affine_forward, _affine_backward)


def affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """factor * x + offset per channel of x [..., c], in the type of the factor."""
    return _affine(x, factor, offset) if by_hand(x) else apply_affine(x, factor, offset)


class Around(NamedTuple):
    """What is fixed of a `conv_norm`."""

    strides: tuple[int, int]
    padding: Pixels
    relu: bool


def plain_conv_norm(
    fixed: Around, x: jax.Array, kernel: jax.Array, factor: jax.Array, offset: jax.Array, add: jax.Array | None = None
) -> jax.Array:
    """As `conv_norm`, one operation after another."""
    y = affine(ops.convolution(x, kernel, fixed.strides, fixed.padding), factor, offset).astype(x.dtype)
    y = y if add is None else add + y
    return jax.nn.relu(y) if fixed.relu else y


@replaceable
def conv_norm(fixed: Around, *arrays: jax.Array) -> jax.Array:
    """factor * convolution(x, kernel) + offset [+ add], and its ReLU where wanted: what a norm by running statistics
    makes of a convolution.

    `arrays`: x and kernel, shaped as for `ops.convolution`, factor and offset [n], and `add`, of the result's shape,
    where there is one.
    """
    return plain_conv_norm(fixed, *arrays)


Activation = Callable[[jax.Array], jax.Array]


def plain_normed(
    activation: Activation, x: jax.Array, factor: jax.Array, offset: jax.Array, gate: jax.Array | None = None
) -> jax.Array:
    """As `normed`, times the gate where there is one, kept for the way back as autodiff has it."""
    y = activation(affine(x, factor, offset).astype(x.dtype))
    return y if gate is None else y * gate


@replaceable
def normed(activation: Activation, x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """activation(factor * x + offset) of x [..., c], in its type."""
    return plain_normed(activation, x, factor, offset)


class Before(NamedTuple):
    """What the input of a convolution goes through first: a norm as one affine map, each [c], an activation, and a gate
    [b, 1, 1, c] that it is multiplied by, where there is one."""

    factor: jax.Array
    offset: jax.Array
    activation: Activation
    gate: jax.Array | None = None

    def of(self, x: jax.Array) -> jax.Array:
        """What it makes of x, in the type of x."""
        y = normed(self.activation, x, self.factor, self.offset)
        return y if self.gate is None else y * self.gate


class Convolution(NamedTuple):
    """What is fixed of a `normed_convolution`."""

    activation: Activation
    strides: tuple[int, int]
    padding: Pixels
    groups: int


def plain_normed_convolution(
    fixed: Convolution,
    x: jax.Array,
    factor: jax.Array,
    offset: jax.Array,
    kernel: jax.Array,
    gate: jax.Array | None = None,
) -> jax.Array:
    """As `normed_convolution`, one operation after another."""
    y = plain_normed(fixed.activation, x, factor, offset, gate)
    return ops.convolution(y, kernel, fixed.strides, fixed.padding, fixed.groups)


@replaceable
def normed_convolution(fixed: Convolution, *arrays: jax.Array) -> jax.Array:
    """convolution(activation(factor * x + offset) [* gate], kernel).

    `arrays`: x [b, h, w, c], factor and offset [c], the kernel, shaped as for `ops.convolution`, and the gate
    [b, 1, 1, c] where there is one.
    """
    return plain_normed_convolution(fixed, *arrays)


@jax.custom_vjp
def norm_relu(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """relu(factor * x + offset), in the type of x."""
    return ops.norm_relu(x, factor, offset)


def _norm_relu_forward(x, factor, offset):
    return ops.norm_relu(x, factor, offset), (x, factor, offset)


def _norm_relu_backward(residuals, gradient):
    x, factor, offset = residuals
    gradient = jnp.where(apply_affine(x, factor, offset) > 0, gradient.astype(factor.dtype), 0)
    total, total_x = channel_sums(gradient, x)
    return (gradient * over_channels(factor, x.ndim)).astype(x.dtype), total_x, total


norm_relu.defvjp(_norm_relu_forward, _norm_relu_backward)
