"""Triplet attention: a gate over each pair of axes (Misra et al. 2021, https://arxiv.org/abs/2010.03045)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import BatchNorm, Conv, maximum_over, unit_mean


class TripletAttention(nn.Module):
    """y = x * (g_hw + g_hc + g_wc) / 3, each g = sigmoid(bn(conv([max, mean] over the third axis))) (section 3)."""

    kernel_size: int = 7
    """Odd side of the convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mean over channels of what x is multiplied by [b, h, w], 0..1."""
        hw = self._gate(x, "hw", train)
        hc = self._gate(rearrange(x, "b h w c -> b h c w"), "hc", train)
        wc = self._gate(rearrange(x, "b h w c -> b w c h"), "wc", train)
        gates = (hw, rearrange(hc, "b h c 1 -> b h 1 c"), rearrange(wc, "b w c 1 -> b 1 w c"))
        gate = (gates[0] + gates[1] + gates[2]) / 3
        self.sow("intermediates", "map", unit_mean(gate, -1))
        return x * gate

    def _gate(self, x: jax.Array, name: str, train: bool) -> jax.Array:
        """[b, p, q, r] -> [b, p, q, 1]."""
        z = jnp.stack([maximum_over(x, -1), x.mean(-1)], axis=-1)
        z = Conv(1, self.kernel_size, padding=self.kernel_size // 2, name=f"{name}_conv")(z)
        return nn.sigmoid(BatchNorm(epsilon=1e-5, name=f"{name}_bn")(z, train=train))
