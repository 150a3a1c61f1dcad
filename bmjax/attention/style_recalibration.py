"""SRM: channels weighed by their style, mean and deviation (Lee et al. 2019, https://arxiv.org/abs/1903.10829)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import BatchNorm, mean_and_deviation


class StyleRecalibration(nn.Module):
    """y = x * sigmoid(bn(w1 * mean(x) + w2 * std(x))), two weights a channel (equations 1 to 5)."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate [b, c], 0..1."""
        style = jnp.stack([rearrange(s, "b 1 1 c -> b c") for s in mean_and_deviation(x, (1, 2))])
        weights = self.param("weights", nn.initializers.normal(0.5), (2, x.shape[-1]), jnp.float32)
        z = jnp.einsum("sbc,sc->bc", style, weights.astype(style.dtype))
        gate = nn.sigmoid(BatchNorm(epsilon=1e-5, name="bn")(z, train=train)).astype(x.dtype)
        self.sow("intermediates", "map", gate)
        return x * rearrange(gate, "b c -> b 1 1 c")
