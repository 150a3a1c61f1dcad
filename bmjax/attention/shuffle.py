"""Shuffle attention: half a group's channels gated as channels, half by place (Zhang and Yang 2021, https://arxiv.org/abs/2102.00240)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import at_least_float32, largest_divisor, unit_mean


class ShuffleAttention(nn.Module):
    """The paper's section 3: x in groups, each in two halves, then a channel shuffle.

    First half: x * sigmoid(w1 * mean(x) + b1). Second: x * sigmoid(w2 * norm(x) + b2), norm over each channel's places.
    The weights, one a channel of a half, are the same in all groups. The norm has no scale and offset of its own: w2
    and b2 are those.
    """

    groups: int = 64
    """At most: the largest divisor of c / 2 not above it is taken."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mean over channels of what x is multiplied by [b, h, w], 0..1.

        Raises:
          ValueError: c is odd.
        """
        c = x.shape[-1]
        if c % 2:
            raise ValueError(f"attention 'shuffle' got {c} channels; expected an even number, for its two halves")
        groups = largest_divisor(c // 2, self.groups)
        halves = rearrange(x.astype(at_least_float32(x.dtype)), "b h w (g s d) -> s b h w g d", g=groups, s=2)
        mean = halves.mean((2, 3), keepdims=True)
        variance = jnp.square(halves[1] - mean[1]).mean((1, 2), keepdims=True)
        norm = (halves[1] - mean[1]) * jax.lax.rsqrt(variance + 1e-5)
        # The authors' start (https://github.com/wofmanaf/SA-Net): the same gate everywhere.
        shape = (2, c // 2 // groups)
        weight = self.param("weight", nn.initializers.zeros_init(), shape, jnp.float32).astype(norm.dtype)
        bias = self.param("bias", nn.initializers.ones_init(), shape, jnp.float32).astype(norm.dtype)
        weight, bias = (rearrange(p, "s d -> s 1 1 1 1 d") for p in (weight, bias))
        gate = nn.sigmoid(weight * jnp.stack([jnp.broadcast_to(mean[0], norm.shape), norm]) + bias)
        self.sow("intermediates", "map", unit_mean(gate, (0, 4, 5)))
        y = rearrange(halves * gate, "s b h w g d -> b h w (g s d)")
        return rearrange(y, "b h w (s d) -> b h w (d s)", s=2).astype(x.dtype)
