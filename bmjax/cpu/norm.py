"""Batch-norm for CPUs: its sums over a feature map, its running form within the convolution before it, and before the
convolution after it, without keeping what it gives."""

from __future__ import annotations

import functools

import jax

from bmjax.cpu import build
from bmjax.cpu.convolution import input_gradient, kernel_gradient
from bmjax.cpu.order import after
from bmjax.layers import ops
from bmjax.layers.norm import (
    Activation,
    Around,
    Convolution,
    plain_conv_norm,
    plain_normed,
    plain_normed_convolution,
)
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


def normed(activation: Activation, *arrays: jax.Array) -> jax.Array:
    """Takes the place of bmjax.layers.norm.normed: computed again on the way back, so that x alone is kept."""
    usable = arrays[0].ndim == 4 and build.usable(arrays[0].dtype)
    return _normed(activation, *arrays) if usable else NotImplemented


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed(activation, *arrays):
    return plain_normed(activation, *arrays)


def _normed_forward(activation, *arrays):
    return plain_normed(activation, *arrays), arrays


def _normed_backward(activation, arrays, gradient):
    x, *affine = arrays
    _, vjp = jax.vjp(functools.partial(plain_normed, activation), x, *(after(v, gradient) for v in affine))
    return vjp(gradient)


_normed.defvjp(_normed_forward, _normed_backward)


def normed_convolution(fixed: Convolution, *arrays: jax.Array) -> jax.Array:
    """Takes the place of bmjax.layers.norm.normed_convolution: what the convolution sees is computed again on the way
    back, so that of norm, activation and gate x alone is kept."""
    return _normed_convolution(fixed, *arrays) if build.usable(arrays[0].dtype) else NotImplemented


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed_convolution(fixed, *arrays):
    return plain_normed_convolution(fixed, *arrays)


def _normed_convolution_forward(fixed, *arrays):
    return plain_normed_convolution(fixed, *arrays), arrays


def _normed_convolution_backward(fixed, arrays, gradient):
    x, factor, offset, kernel, *gate = arrays
    before = functools.partial(plain_normed, fixed.activation)
    how = (fixed.strides, fixed.padding, fixed.groups)
    affine = (after(factor, gradient), after(offset, gradient))
    into_kernel = kernel_gradient(before(x, *affine, *gate), gradient, kernel.shape, *how)
    affine = tuple(after(v, into_kernel) for v in affine)
    _, vjp = jax.vjp(before, x, *affine, *gate)
    into_x, into_factor, into_offset, *into_gate = vjp(input_gradient(gradient, kernel, x.shape, *how))
    return into_x, into_factor, into_offset, into_kernel, *into_gate


_normed_convolution.defvjp(_normed_convolution_forward, _normed_convolution_backward)
