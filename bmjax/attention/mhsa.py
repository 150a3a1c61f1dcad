"""Multi-head self-attention with 2-D relative positions (Srinivas et al. 2021, BoTNet, https://arxiv.org/abs/2101.11605)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import Conv, at_least_float32, unit_mean


class SelfAttention(nn.Module):
    """y = x + W_o concat over heads of softmax(q . k + q . (r_h + r_w)) v, the paper's figure 4.

    q is scaled by d^-1/2; r_h and r_w are vectors learnt for each distance in rows and columns. Ours: q, k and v have
    fewer channels than x, as within BoTNet's bottleneck block, without its norms, and W_o leads back; distances
    beyond `max_distance` share a vector (Shaw et al. 2018, https://arxiv.org/abs/1803.02155), so that any size fits.
    """

    heads: int = 4
    ratio: int = 4
    """q, k and v have about c / ratio channels over all heads, at least one a head."""
    max_distance: int = 15

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mean attention that a place gets from all places and heads [b, h, w],
        0..1, of sum one."""
        c, (h, w) = x.shape[-1], x.shape[1:3]
        d = max(1, c // self.ratio // self.heads)
        q, k, v = (
            rearrange(Conv(self.heads * d, name=name)(x), "b h w (n d) -> b n h w d", d=d) for name in ("q", "k", "v")
        )
        q = q * d**-0.5
        scores = jnp.einsum("bnhwd,bnkld->bnhwkl", q, k)
        scores += rearrange(jnp.einsum("bnhwd,hkd->bnhwk", q, self._relative("rows", h, q)), "b n h w k -> b n h w k 1")
        scores += rearrange(
            jnp.einsum("bnhwd,wld->bnhwl", q, self._relative("columns", w, q)), "b n h w l -> b n h w 1 l"
        )
        a = nn.softmax(scores.astype(at_least_float32(x.dtype)), axis=(-2, -1))
        self.sow("intermediates", "map", unit_mean(a, (1, 2, 3)))
        z = jnp.einsum("bnhwkl,bnkld->bnhwd", a.astype(x.dtype), v)
        return x + Conv(c, name="expand")(rearrange(z, "b n h w d -> b h w (n d)"))

    def _relative(self, name: str, side: int, q: jax.Array) -> jax.Array:
        """[side, side, d]: the vector for each pair of places along one axis, the query's first."""
        shape = (2 * self.max_distance + 1, q.shape[-1])
        table = self.param(name, nn.initializers.normal(shape[1] ** -0.5), shape, jnp.float32)
        places = jnp.arange(side)
        distance = rearrange(places, "k -> 1 k") - rearrange(places, "q -> q 1")
        return table.astype(q.dtype)[jnp.clip(distance, -self.max_distance, self.max_distance) + self.max_distance]
