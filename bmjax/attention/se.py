"""Squeeze-and-excitation: attention over channels (Hu et al. 2018, https://arxiv.org/abs/1709.01507)."""

from __future__ import annotations

import flax.linen as nn
import jax
from einops import rearrange

from bmjax.layers import global_average


class SqueezeExcitation(nn.Module):
    """y = x * sigmoid(W2 relu(W1 mean(x))), both layers with biases."""

    ratio: int = 16
    """The hidden layer has c / ratio channels, at least one."""

    commutes_with_pooling = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate [b, c], 0..1."""
        c = x.shape[-1]
        z = global_average(x).astype(x.dtype)
        z = nn.relu(nn.Dense(max(1, c // self.ratio), dtype=x.dtype, name="reduce")(z))
        gate = nn.sigmoid(nn.Dense(c, dtype=x.dtype, name="expand")(z))
        self.sow("intermediates", "map", gate)
        return x * rearrange(gate, "b c -> b 1 1 c")
