"""Double attention (A2): gather into a few descriptors, then distribute (Chen et al. 2018, https://arxiv.org/abs/1810.11579)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import Conv, at_least_float32


class DoubleAttention(nn.Module):
    """y = x + W3 A softmax(B)^T softmax(V), with A, B, V from 1x1 convolutions (equations 3 to 6).

    softmax(B), over places, says where each of n descriptors gathers the m features of A; softmax(V), over the n, which
    descriptors a place gets.
    """

    ratio: int = 4
    """m = n = c / ratio, at least one."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mean attention that a place gets from all places [b, h, w], 0..1, of
        sum one."""
        c, h = x.shape[-1], x.shape[1]
        n = max(1, c // self.ratio)
        wide = at_least_float32(x.dtype)
        a, b, v = (
            rearrange(Conv(n, name=name)(x), "b h w n -> b (h w) n") for name in ("features", "gather", "distribute")
        )
        gather = nn.softmax(b.astype(wide), axis=1)
        distribute = nn.softmax(v.astype(wide), axis=2)
        received = rearrange(jnp.einsum("bn,bpn->bp", distribute.mean(1), gather), "b (h w) -> b h w", h=h)
        self.sow("intermediates", "map", jnp.minimum(received, 1))  # rounding can take it above
        descriptors = jnp.einsum("bpm,bpn->bmn", a, gather.astype(x.dtype))
        z = jnp.einsum("bmn,bpn->bpm", descriptors, distribute.astype(x.dtype))
        return x + Conv(c, name="expand")(rearrange(z, "b (h w) m -> b h w m", h=h))
