"""Non-local block: each place sees all places (Wang et al. 2018, https://arxiv.org/abs/1711.07971)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import BatchNorm, Conv, at_least_float32, unit_mean


class NonLocal(nn.Module):
    """y = x + bn(W_z softmax(theta(x)^T phi(x)) g(x)): the embedded Gaussian form, sections 3.2 and 3.3.

    The paper starts the norm's scale at zero, so that the block begins as the identity; here `model.attention_gate`
    does that for every variant.
    """

    ratio: int = 2
    """theta, phi and g have c / ratio channels, at least one."""
    scaled: bool = False
    """Scores times c^-1/2, as in timm."""
    use_bias: bool = False
    """A bias in theta. Those of phi, g and W_z cancel: in the softmax, and in the norm."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mean attention that a place gets from all places [b, h, w], 0..1, of
        sum one."""
        c, h = x.shape[-1], x.shape[1]
        n = max(1, c // self.ratio)
        theta = rearrange(Conv(n, use_bias=self.use_bias, name="theta")(x), "b h w n -> b (h w) n")
        phi = rearrange(Conv(n, name="phi")(x), "b h w n -> b (h w) n")
        g = rearrange(Conv(n, name="g")(x), "b h w n -> b (h w) n")
        scores = jnp.einsum("bqn,bkn->bqk", theta, phi).astype(at_least_float32(x.dtype))
        a = nn.softmax(scores * c**-0.5 if self.scaled else scores)
        self.sow("intermediates", "map", rearrange(unit_mean(a, 1), "b (h w) -> b h w", h=h))
        z = jnp.einsum("bqk,bkn->bqn", a.astype(x.dtype), g)
        z = Conv(c, name="expand")(rearrange(z, "b (h w) n -> b h w n", h=h))
        return x + BatchNorm(epsilon=1e-5, name="bn")(z, train=train)
