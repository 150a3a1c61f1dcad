"""Coordinate attention: one gate along rows, one along columns (Hou et al. 2021, https://arxiv.org/abs/2103.02907)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import BatchNorm, at_least_float32, unit_mean


class CoordinateAttention(nn.Module):
    """y = x * g_h * g_w (equations 4 to 9).

    The means along w and along h, one after the other, go through one shared layer with batch-norm and hard-swish; then
    each half through a layer of its own and a sigmoid.
    """

    ratio: int = 32
    """The shared layer has c / ratio channels, at least eight as in the authors' code
    (https://github.com/houqb/CoordAttention)."""
    use_bias: bool = True
    """Biases in the last layers: the authors' code has them, the paper's formula and timm do not."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mean over channels of g_h * g_w [b, h, w], 0..1."""
        c, h = x.shape[-1], x.shape[1]
        wide = x.astype(at_least_float32(x.dtype))
        z = jnp.concatenate([wide.mean(2), wide.mean(1)], axis=1).astype(x.dtype)
        z = nn.Dense(max(8, c // self.ratio), use_bias=False, dtype=x.dtype, name="reduce")(z)
        z = nn.hard_swish(BatchNorm(epsilon=1e-5, name="bn")(z, train=train))
        rows = nn.sigmoid(nn.Dense(c, use_bias=self.use_bias, dtype=x.dtype, name="rows")(z[:, :h]))
        columns = nn.sigmoid(nn.Dense(c, use_bias=self.use_bias, dtype=x.dtype, name="columns")(z[:, h:]))
        gate = rearrange(rows, "b h c -> b h 1 c") * rearrange(columns, "b w c -> b 1 w c")
        self.sow("intermediates", "map", unit_mean(gate, -1))
        return x * gate
