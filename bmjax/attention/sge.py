"""Spatial group-wise enhance: places like the group's mean (Li et al. 2019, https://arxiv.org/abs/1905.09646)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import at_least_float32, largest_divisor, mean_and_deviation, unit_mean


class SpatialGroupEnhance(nn.Module):
    """In each group y = x * sigmoid(gamma * s + beta), s = x . mean(x) normalised over places (section 3)."""

    groups: int = 64
    """At most: the largest divisor of c not above it is taken."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate's mean over groups [b, h, w], 0..1."""
        groups = largest_divisor(x.shape[-1], self.groups)
        z = rearrange(x.astype(at_least_float32(x.dtype)), "b h w (g d) -> b h w g d", g=groups)
        similarity = (z * z.mean((1, 2), keepdims=True)).sum(-1)
        mean, deviation = mean_and_deviation(similarity, (1, 2))
        s = (similarity - mean) / (deviation + 1e-5)
        # The authors' start (https://github.com/implus/PytorchInsight): the same gate everywhere.
        gamma = self.param("gamma", nn.initializers.zeros_init(), (groups,), jnp.float32).astype(s.dtype)
        beta = self.param("beta", nn.initializers.ones_init(), (groups,), jnp.float32).astype(s.dtype)
        gate = nn.sigmoid(rearrange(gamma, "g -> 1 1 1 g") * s + rearrange(beta, "g -> 1 1 1 g"))
        self.sow("intermediates", "map", unit_mean(gate, -1))
        return rearrange(z * rearrange(gate, "b h w g -> b h w g 1"), "b h w g d -> b h w (g d)").astype(x.dtype)
