"""Batch-norm for CPUs: its sums over a feature map, its running form within the convolution before it, and before the
convolution after it, without keeping what it gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.cpu import build
from bmjax.cpu.convolution import by_kernel, input_gradient, kernel_gradient
from bmjax.cpu.formulations import window_of
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
from bmjax.layers.ops import apply_affine, at_least_float32, over_channels, through_relu


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
    window = window_of(fixed.strides, fixed.padding)
    return build.call(name, functools.partial(plain_conv_norm, fixed), *arrays, window=window, relu=fixed.relu)


def _plain_normed_backward(activation: Activation, arrays: Sequence[Any], gradient: jax.Array) -> Any:
    """The gradients of plain_normed(activation, *arrays) with respect to the arrays.

    Through a ReLU its sums come of a kernel, so that the gradient before it, a map of its own, is never written.
    """
    if activation is not jax.nn.relu or len(arrays) > 3:
        return jax.vjp(functools.partial(plain_normed, activation), *arrays)[1](gradient)
    x, factor, offset = arrays
    like = (jax.ShapeDtypeStruct(factor.shape, x.dtype),) * 2
    total, total_x = build.call(
        "relu_sums", lambda d, x, *affine: through_relu(x, d, *affine)[1:], gradient, x, factor, offset, like=like
    )
    into_x = jnp.where(apply_affine(x, factor, offset) > 0, gradient * over_channels(factor, x.ndim), 0)
    return into_x, total_x, total


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
    return _plain_normed_backward(activation, (x, *(after(v, gradient) for v in affine)), gradient)


_normed.defvjp(_normed_forward, _normed_backward)


def _packs(fixed: Convolution, gate: Sequence[jax.Array]) -> bool:
    """Whether what comes before a convolution is what kernels do as they pack: norm and ReLU, and no gate."""
    return not gate and fixed.activation is jax.nn.relu


def packing(name: str, fixed: Convolution, reference: Callable[..., Any], *arrays: jax.Array, like: Any) -> Any:
    """What `reference` computes, by the kernel that takes the map through norm and ReLU as it packs it."""
    kind = "normed_depthwise_conv" if fixed.groups > 1 else "normed_conv"
    window = window_of(fixed.strides, fixed.padding)
    return build.call(kind + name, reference, *arrays, like=like, window=window)


def normed_convolution(fixed: Convolution, *arrays: jax.Array) -> jax.Array:
    """Takes the place of bmjax.layers.norm.normed_convolution: what the convolution sees is computed again on the way
    back, so that of norm, activation and gate x alone is kept."""
    return _normed_convolution(fixed, *arrays) if build.usable(arrays[0].dtype) else NotImplemented


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed_convolution(fixed, *arrays):
    x, _, _, kernel, *gate = arrays
    how = (fixed.strides, fixed.padding, fixed.groups)
    if _packs(fixed, gate):
        y = jax.eval_shape(lambda x, kernel: ops.plain_convolution(x, kernel, *how), x, kernel)
        if by_kernel("forward", y, kernel.shape, *how):
            return packing("", fixed, functools.partial(plain_normed_convolution, fixed), *arrays, like=y)
    return plain_normed_convolution(fixed, *arrays)


def _normed_convolution_forward(fixed, *arrays):
    return _normed_convolution(fixed, *arrays), arrays


def _normed_convolution_backward(fixed, arrays, gradient):
    x, factor, offset, kernel, *gate = arrays
    how = (fixed.strides, fixed.padding, fixed.groups)
    affine = (after(factor, gradient), after(offset, gradient))

    def of_kernel(x, factor, offset, gradient):
        before = plain_normed(fixed.activation, x, factor, offset, *gate)
        return kernel_gradient(before, gradient, kernel.shape, *how)

    given = (x, *affine, gradient)
    if _packs(fixed, gate) and by_kernel("kernel_gradient", gradient, kernel.shape, *how):
        into_kernel = packing("_kernel_gradient", fixed, of_kernel, *given, like=kernel)
    else:
        into_kernel = of_kernel(*given)
    affine = tuple(after(v, into_kernel) for v in affine)
    into = input_gradient(gradient, kernel, x.shape, *how)
    into_x, into_factor, into_offset, *into_gate = _plain_normed_backward(fixed.activation, (x, *affine, *gate), into)
    return into_x, into_factor, into_offset, into_kernel, *into_gate


_normed_convolution.defvjp(_normed_convolution_forward, _normed_convolution_backward)
