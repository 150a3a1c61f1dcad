"""The layers of a dense block in place, with a derivative of their own, for CPUs.

Memory traffic is what a step waits for there.

One buffer takes each layer's output in place, one takes the gradients, and what is cheap (norm and ReLU) is computed
again on the way back, as in Pleiss et al. 2017 (https://arxiv.org/abs/1707.06990).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bmjax.cpu.dense_layer import (
    Norm,
    Result,
    norm_conv,
    norm_conv_backward,
    norm_conv_into,
    norm_product_backward,
    write,
)
from bmjax.layers.collectives import batch_count
from bmjax.layers.dense_block import Layer, Statistics
from bmjax.layers.dispatch import platform
from bmjax.layers.ops import at_least_float32


def dense_layers(
    epsilon: float, x: jax.Array, statistics: Statistics | None, params: tuple[Layer, ...], running: Any
) -> Any:
    """Takes the place of bmjax.layers.dense_block.dense_layers; on CPUs in float32 and float64 alone."""
    if platform() == "cpu" and x.dtype not in (jnp.float32, jnp.float64):
        return NotImplemented
    return _in_place(epsilon, x, statistics, params, running)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_place(epsilon, x, statistics, params, running):
    """As bmjax.layers.dense_block.dense_layers."""
    return _in_place_forward(epsilon, x, statistics, params, running)[0]


def _in_place_forward(epsilon, x, statistics, params, running):
    channels, growth = x.shape[-1], params[0].kernel2.shape[-1]
    by_batch, room = statistics is not None, len(params) * growth
    buffer = write(jnp.zeros((*x.shape[:-1], channels + room), x.dtype), x, 0)
    nothing = jnp.zeros(channels + room, at_least_float32(x.dtype))
    means, variances = (write(nothing, s, 0) for s in statistics) if by_batch else (nothing, nothing)
    kept, bottlenecks = [], []
    for i, p in enumerate(params):
        norm = Norm(p.scale0, p.bias0, *((means, variances) if by_batch else running[i][0]))
        y, inner = norm_conv(buffer, norm, p.kernel1, epsilon=epsilon, moments=by_batch)
        norm = Norm(p.scale1, p.bias1, *(running[i][1] if inner is None else inner))
        buffer, means, variances = norm_conv_into(
            y, norm, p.kernel2, (buffer, means, variances), channels + i * growth, epsilon=epsilon, moments=by_batch
        )
        kept.append(y)
        if by_batch:
            bottlenecks.append(inner)
    statistics = (means, variances) if by_batch else None
    return (buffer, statistics, bottlenecks), (buffer, statistics, bottlenecks, kept, params, running)


def _in_place_backward(epsilon, residuals, gradients):
    buffer, statistics, bottlenecks, kept, params, running = residuals
    into, into_statistics, into_bottlenecks = gradients
    c, growth = buffer.shape[-1], params[0].kernel2.shape[-1]
    by_batch = statistics is not None
    count, nothing = batch_count(buffer) if by_batch else 0, jnp.zeros(c, at_least_float32(buffer.dtype))
    means, dmeans, dvars = (statistics[0], *into_statistics) if by_batch else (nothing,) * 3
    grads, into_running = [], []
    for i in reversed(range(len(params))):
        p, y = params[i], kept[i]
        c -= growth
        outer, inner = (statistics, bottlenecks[i]) if by_batch else running[i]
        # Nothing after this layer's output is left to come: its gradient is whole but for the statistics' share.
        dz, dkernel2, of_inner = norm_conv_backward(
            y,
            Norm(p.scale1, p.bias1, *inner),
            p.kernel2,
            Result(buffer, means, into, dmeans, dvars),
            c,
            epsilon=epsilon,
            count=count,
        )
        dinner: Statistics = (of_inner.mean, of_inner.var)
        if by_batch:
            dinner = (dinner[0] + into_bottlenecks[i][0], dinner[1] + into_bottlenecks[i][1])
        else:
            dmeans, dvars = (jnp.zeros_like(v) for v in outer)
        (into, dmeans, dvars), dkernel1, of_outer = norm_product_backward(
            buffer,
            Norm(p.scale0, p.bias0, *outer),
            p.kernel1,
            dz,
            y,
            (p.scale1, inner[0], inner[1], *dinner),
            (into, dmeans, dvars),
            epsilon=epsilon,
            count=count,
        )
        if not by_batch:
            into_running.insert(0, ((dmeans, dvars), dinner))
            dmeans, dvars = nothing, nothing
        grads.insert(0, Layer(*of_outer, dkernel1, of_inner.scale, of_inner.bias, dkernel2))
    if not by_batch:
        return into[..., :c], None, tuple(grads), tuple(into_running)
    return into[..., :c], (dmeans[:c], dvars[:c]), tuple(grads), None


_in_place.defvjp(_in_place_forward, _in_place_backward)
