"""Gaussian context transformer: the further from the mean channel, the less (Ruan et al. 2021, https://openaccess.thecvf.com/content/CVPR2021/html/Ruan_Gaussian_Context_Transformer_CVPR_2021_paper.html)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import global_average


class GaussianContext(nn.Module):
    """y = x * exp(-z^2 / (2 c^2)), z the channels' means over places normalised over the channels (section 3).

    GCT-B0 has no parameters and c = 2; GCT-B1 learns theta of c = 3 sigmoid(theta) + 1, from theta = 0.
    """

    width: float = 2.0
    """c, where it is not learnt."""
    learned: bool = False

    commutes_with_pooling = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate [b, c], 0..1."""
        z = global_average(x)
        z = z - z.mean(-1, keepdims=True)
        z = z * jax.lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + 1e-5)
        width = jnp.asarray(self.width, z.dtype)
        if self.learned:
            theta = self.param("theta", nn.initializers.zeros_init(), (), jnp.float32)
            width = 3 * nn.sigmoid(theta.astype(z.dtype)) + 1
        gate = jnp.exp(-jnp.square(z / width) / 2).astype(x.dtype)
        self.sow("intermediates", "map", gate)
        return x * rearrange(gate, "b c -> b 1 1 c")
