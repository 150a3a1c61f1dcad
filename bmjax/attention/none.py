"""No attention: the baseline that the variants are compared with."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class NoAttention(nn.Module):
    """Returns its input; the map is one everywhere."""

    commutes_with_pooling = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]."""
        self.sow("intermediates", "map", jnp.ones(x.shape[:3], x.dtype))
        return x
