"""The dense block: each layer sees what all before it gave (Huang et al. 2017, https://arxiv.org/abs/1608.06993).

Written down plainly, a block of n layers copies its growing concatenation n times and keeps every copy for the
backward pass. On GPUs and TPUs that is what runs. On CPUs, where memory traffic is what a step waits for, the block
has a derivative of its own: one buffer takes each layer's output in place, one takes the gradients, and what is cheap
(norm and ReLU) is computed again on the way back, as in Pleiss et al. 2017 (https://arxiv.org/abs/1707.06990). Both
give the same numbers but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from bmjax import convolution
from bmjax.dense_layer import (
    Statistics,
    norm_conv,
    norm_conv_backward,
    norm_conv_into,
    norm_product_backward,
    norm_relu,
    write,
)
from bmjax.formulations import NO_PADDING
from bmjax.layers import (
    BatchNormVariables,
    Kernel,
    NormMode,
    apply_affine,
    batch_count,
    batch_statistics,
    norm_affine,
    through_statistics,
)

SAME_3X3 = ((1, 1), (1, 1))


class Layer(NamedTuple):
    """The arrays of one layer: norm, ReLU, 1x1 convolution to a bottleneck, norm, ReLU, 3x3 convolution."""

    scale0: jax.Array
    bias0: jax.Array
    kernel1: jax.Array
    scale1: jax.Array
    bias1: jax.Array
    kernel2: jax.Array


def dense_block(
    x: jax.Array,
    *,
    name: str,
    layers: int,
    growth: int,
    epsilon: float,
    train: bool,
    mode: NormMode,
) -> tuple[jax.Array, Statistics | None]:
    """[b, h, w, c] -> [b, h, w, c + layers * growth] and, where norms go by the batch, its statistics.

    Called inside a Linen module, whose parameters `<name>_block<i>_0_bn`, `_1_conv`, `_1_bn`, `_2_conv` it makes.
    `train` and `mode` are bmjax.layers.BatchNorm's.
    """
    by_batch = train and mode == "train"
    channels = x.shape[-1]
    params, norms = [], []
    for i in range(layers):
        prefix, c = f"{name}_block{i + 1}", channels + i * growth
        norm0 = BatchNormVariables(name=f"{prefix}_0_bn")(c)
        kernel1 = Kernel(name=f"{prefix}_1_conv")((1, 1, c, 4 * growth))
        norm1 = BatchNormVariables(name=f"{prefix}_1_bn")(4 * growth)
        kernel2 = Kernel(name=f"{prefix}_2_conv")((3, 3, 4 * growth, growth))
        params.append(Layer(norm0.scale, norm0.bias, kernel1, norm1.scale, norm1.bias, kernel2))
        norms.append((norm0, norm1))
    if mode == "frozen":
        params = [
            layer._replace(**{k: lax.stop_gradient(getattr(layer, k)) for k in ("scale0", "bias0", "scale1", "bias1")})
            for layer in params
        ]
    params = jax.tree.map(lambda a: a.astype(x.dtype) if a.ndim == 4 else a, tuple(params))
    if by_batch:
        given = batch_statistics(x)
        running = None
    else:
        given = None
        running = tuple(((n0.mean.value, n0.var.value), (n1.mean.value, n1.var.value)) for n0, n1 in norms)
    on_cpu = convolution.platform() == "cpu" and x.dtype in (jnp.float32, jnp.float64)
    compute = cast(Callable[..., Any], _in_place if on_cpu else _plain)
    x, statistics, bottlenecks = compute(epsilon, x, given, params, running)
    if by_batch:
        assert statistics is not None
        for i, (norm0, norm1) in enumerate(norms):
            c = channels + i * growth
            norm0.update(statistics[0][:c], statistics[1][:c])
            inner = bottlenecks[i]
            norm1.update(inner[0], inner[1])
    return x, statistics


def _plain(
    epsilon: float, x: jax.Array, statistics: Statistics | None, params: tuple[Layer, ...], running: Any
) -> tuple[jax.Array, Statistics | None, list[Statistics]]:
    """-> the block's output, its statistics and those of the bottlenecks (none where norms don't go by the batch)."""
    bottlenecks = []
    for i, p in enumerate(params):
        before = running[i][0] if statistics is None else statistics
        y = norm_relu(x, *norm_affine((p.scale0, p.bias0, *before), epsilon, x.dtype))
        y = convolution.conv(y, p.kernel1, (1, 1), NO_PADDING)
        inner = running[i][1] if statistics is None else batch_statistics(y)
        y = norm_relu(y, *norm_affine((p.scale1, p.bias1, *inner), epsilon, x.dtype))
        y = convolution.conv(y, p.kernel2, (1, 1), SAME_3X3)
        x = jnp.concatenate([x, y], axis=-1)
        if statistics is not None:
            # Per channel, so those of the concatenation are the concatenated ones.
            statistics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), statistics, batch_statistics(y))
            bottlenecks.append(inner)
    return x, statistics, bottlenecks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_place(epsilon, x, statistics, params, running):
    """As `_plain`."""
    return _in_place_forward(epsilon, x, statistics, params, running)[0]


def _in_place_forward(epsilon, x, statistics, params, running):
    channels, growth = x.shape[-1], params[0].kernel2.shape[-1]
    buffer = write(jnp.zeros((*x.shape[:-1], channels + len(params) * growth), x.dtype), x, 0)
    means, variances = ([], []) if statistics is None else ([statistics[0]], [statistics[1]])
    kept, bottlenecks = [], []
    for i, p in enumerate(params):
        c = channels + i * growth
        before = running[i][0] if statistics is None else (jnp.concatenate(means), jnp.concatenate(variances))
        y, inner = norm_conv(buffer, norm_affine((p.scale0, p.bias0, *before), epsilon, x.dtype), p.kernel1)
        kept.append(y)
        if statistics is None:
            inner = running[i][1]
        affine = norm_affine((p.scale1, p.bias1, *inner), epsilon, x.dtype)
        buffer, (mean, var) = norm_conv_into(y, affine, p.kernel2, buffer, c)
        if statistics is not None:
            means.append(mean)
            variances.append(var)
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
            dy = dy + apply_affine(buffer[..., c : c + growth], slope, shift)
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
