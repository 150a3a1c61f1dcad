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

from bmjax.cpu.dense_layer import norm_conv, norm_conv_backward, norm_conv_into, norm_product_backward, write
from bmjax.layers.collectives import batch_count
from bmjax.layers.dense_block import Layer, Statistics
from bmjax.layers.dispatch import platform
from bmjax.layers.norm import norm_affine, through_statistics
from bmjax.layers.ops import apply_affine


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
    buffer = write(jnp.zeros((*x.shape[:-1], channels + len(params) * growth), x.dtype), x, 0)
    means, variances = ([], []) if statistics is None else ([statistics[0]], [statistics[1]])
    kept, bottlenecks, by_batch = [], [], statistics is not None
    for i, p in enumerate(params):
        c = channels + i * growth
        before = running[i][0] if statistics is None else (jnp.concatenate(means), jnp.concatenate(variances))
        affine = norm_affine((p.scale0, p.bias0, *before), epsilon, x.dtype)
        y, inner = norm_conv(buffer, affine, p.kernel1, moments=by_batch)
        kept.append(y)
        used = running[i][1] if inner is None else inner
        affine = norm_affine((p.scale1, p.bias1, *used), epsilon, x.dtype)
        buffer, added = norm_conv_into(y, affine, p.kernel2, buffer, c, moments=by_batch)
        if added is not None:
            means.append(added[0])
            variances.append(added[1])
            bottlenecks.append(inner)
    if statistics is not None:
        statistics = (jnp.concatenate(means), jnp.concatenate(variances))
    return (buffer, statistics, bottlenecks), (buffer, statistics, bottlenecks, kept, params, running)


def _in_place_backward(epsilon, residuals, gradients):
    buffer, statistics, bottlenecks, kept, params, running = residuals
    into, into_statistics, into_bottlenecks = gradients
    count, growth = batch_count(buffer), params[0].kernel2.shape[-1]
    c = buffer.shape[-1]
    grads, into_running = [], []
    for i in reversed(range(len(params))):
        p = params[i]
        c -= growth
        # Nothing after this layer's output is left to come: its gradient is whole but for the statistics' share.
        dy = into[..., c : c + growth]
        if statistics is not None:
            mean = statistics[0][c : c + growth]
            shift, slope = through_statistics(mean, tuple(g[c : c + growth] for g in into_statistics), count)
            dy = (dy + apply_affine(buffer[..., c : c + growth], slope, shift)).astype(dy.dtype)
        y = kept[i]
        inner = running[i][1] if statistics is None else bottlenecks[i]
        affine, vjp = jax.vjp(lambda *a: norm_affine(a, epsilon, y.dtype), p.scale1, p.bias1, *inner)  # noqa: B023
        dz, dkernel2, sums = norm_conv_backward(y, affine, p.kernel2, dy)
        dscale1, dbias1, *dinner = vjp(sums)
        shift = slope = jnp.zeros_like(affine[0])
        if statistics is not None:
            share = jax.tree.map(jnp.add, tuple(dinner), tuple(into_bottlenecks[i]))
            shift, slope = through_statistics(inner[0], share, count)
        combine = (affine[0], shift, slope)
        before = running[i][0] if statistics is None else tuple(s[:c] for s in statistics)
        affine, vjp = jax.vjp(lambda *a: norm_affine(a, epsilon, y.dtype), p.scale0, p.bias0, *before)  # noqa: B023
        into, dkernel1, sums = norm_product_backward(buffer, affine, p.kernel1, dz, y, combine, into)
        dscale0, dbias0, *dbefore = vjp(sums)
        if statistics is None:
            into_running.insert(0, (tuple(dbefore), tuple(dinner)))
        else:
            into_statistics = tuple(g.at[:c].add(d) for g, d in zip(into_statistics, dbefore, strict=True))
        grads.insert(0, Layer(dscale0, dbias0, dkernel1, dscale1, dbias1, dkernel2))
    if statistics is None:
        return into[..., :c], None, tuple(grads), tuple(into_running)
    return into[..., :c], tuple(g[:c] for g in into_statistics), tuple(grads), None


_in_place.defvjp(_in_place_forward, _in_place_backward)
