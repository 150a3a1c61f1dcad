"""Batch-norm's sums over a feature map, and their gradients, for CPUs."""

from __future__ import annotations

from typing import Any

import jax

from bmjax.cpu import build
from bmjax.layers.collectives import batch_count, over_devices
from bmjax.layers.ops import apply_affine, moments, over_channels, through_statistics


def channel_sums(gradient: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of the gradient and of gradient * x over all but the channels."""
    axes = tuple(range(x.ndim - 1))
    return gradient.sum(axes), (gradient * x).sum(axes)


@jax.custom_vjp
def _statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return over_devices(*build.call("moments", moments, x))


def _statistics_forward(x):
    mean, var = _statistics(x)
    return (mean, var), (x, mean)


def _statistics_backward(residuals, gradients):
    x, mean = residuals
    shift, slope = through_statistics(mean, gradients, batch_count(x))
    return (over_channels(shift, x.ndim) + over_channels(slope, x.ndim) * x,)


_statistics.defvjp(_statistics_forward, _statistics_backward)


@jax.custom_vjp
def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return apply_affine(x, factor, offset)


def _affine_forward(x, factor, offset):
    return _affine(x, factor, offset), (x, factor)


def _affine_backward(residuals, gradient):
    x, factor = residuals
    total, total_x = build.call("channel_sums", channel_sums, gradient, x)
    return gradient * over_channels(factor, x.ndim), total_x, total


_affine.defvjp(_affine_forward, _affine_backward)


def _serves(x: jax.Array) -> bool:
    return x.ndim == 4 and build.usable(x.dtype)


def batch_statistics(x: jax.Array) -> Any:
    """Takes the place of bmjax.layers.ops.batch_statistics for maps [b, h, w, c]."""
    return _statistics(x) if _serves(x) else NotImplemented


def affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> Any:
    """Takes the place of bmjax.layers.ops.affine for maps [b, h, w, c]."""
    return _affine(x, factor, offset) if _serves(x) else NotImplemented
