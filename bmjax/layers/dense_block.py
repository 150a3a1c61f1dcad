"""The dense block: each layer sees what all before it gave (Huang et al. 2017, https://arxiv.org/abs/1608.06993).

Here stand its parameters, and its layers written down plainly: a block of n layers copies its growing concatenation n
times and keeps every copy for the backward pass. `bmjax.cpu` computes the layers with a derivative of their own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from bmjax.layers.dispatch import replaceable, wants
from bmjax.layers.modules import BatchNormVariables, ConvVariables, NormMode
from bmjax.layers.norm import batch_statistics, norm_affine, norm_relu
from bmjax.layers.ops import NO_PADDING, convolution

Statistics = tuple[jax.Array, jax.Array]
"""Mean and biased variance over the batch, each [c]."""
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
        kernel1, _ = ConvVariables(name=f"{prefix}_1_conv")((1, 1, c, 4 * growth))
        norm1 = BatchNormVariables(name=f"{prefix}_1_bn")(4 * growth)
        kernel2, _ = ConvVariables(name=f"{prefix}_2_conv")((3, 3, 4 * growth, growth))
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
    x, statistics, bottlenecks = dense_layers(epsilon, x, given, params, running)
    if by_batch:
        assert statistics is not None
        for i, (norm0, norm1) in enumerate(norms):
            c = channels + i * growth
            norm0.update(statistics[0][:c], statistics[1][:c])
            inner = bottlenecks[i]
            norm1.update(inner[0], inner[1])
    return x, statistics


def _layer(
    epsilon: float, maps: tuple[jax.Array, ...], before: Statistics, p: Layer, inner: Statistics | None
) -> tuple[jax.Array, Statistics, Statistics | None]:
    """A layer of the concatenated maps -> (what it adds, the bottleneck's statistics, those of what it adds).

    `before`: statistics of the concatenation. `inner`: the bottleneck's running ones, or None where norms go by the
    batch.
    """
    x = jnp.concatenate(maps, axis=-1)
    y = norm_relu(x, *norm_affine((p.scale0, p.bias0, *before), epsilon, x.dtype))
    y = checkpoint_name(convolution(y, p.kernel1, (1, 1), NO_PADDING), "convolution")
    by_batch = inner is None
    used = batch_statistics(y) if inner is None else inner
    y = norm_relu(y, *norm_affine((p.scale1, p.bias1, *used), epsilon, x.dtype))
    y = checkpoint_name(convolution(y, p.kernel2, (1, 1), SAME_3X3), "convolution")
    return y, used, batch_statistics(y) if by_batch else None


@replaceable
def dense_layers(
    epsilon: float, x: jax.Array, statistics: Statistics | None, params: tuple[Layer, ...], running: Any
) -> tuple[jax.Array, Statistics | None, list[Statistics]]:
    """-> the block's output, its statistics and those of the bottlenecks (none where norms don't go by the batch)."""
    bottlenecks, maps = [], (x,)
    again = wants("dense_remat")
    layer = functools.partial(_layer, epsilon)
    if again:  # concatenation, norm and ReLU are computed again on the way back; what convolutions gave is kept
        layer = jax.checkpoint(layer, policy=checkpoint_policies.save_only_these_names("convolution"))
    for i, p in enumerate(params):
        before, inner = (statistics, None) if statistics is not None else running[i]
        y, used, added = layer(maps, before, p, inner)
        maps = (*maps, y) if again else (jnp.concatenate([*maps, y], axis=-1),)
        if statistics is not None:
            # Per channel, so those of the concatenation are the concatenated ones.
            statistics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), statistics, added)
            bottlenecks.append(used)
    return jnp.concatenate(maps, axis=-1), statistics, bottlenecks
