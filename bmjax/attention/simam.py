"""SimAM: a gate without parameters, high where a value stands out (Yang et al. 2021, https://proceedings.mlr.press/v139/yang21o.html)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.layers import at_least_float32, unit_mean


class SimAM(nn.Module):
    """y = x * sigmoid(1 / e), e the least energy of each value (equations 5 and 6).

    1 / e = (x - m)^2 / (4 (v + lambda)) + 1/2, with mean m and variance v of the channel's h*w values. The variance is
    that of the equations; the code in the paper's appendix divides by h*w - 1.
    """

    e_lambda: float = 1e-4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate's mean over channels [b, h, w], 1/2..1."""
        z = x.astype(at_least_float32(x.dtype))
        square = jnp.square(z - z.mean((1, 2), keepdims=True))
        gate = nn.sigmoid(square / (4 * (square.mean((1, 2), keepdims=True) + self.e_lambda)) + 0.5).astype(x.dtype)
        self.sow("intermediates", "map", unit_mean(gate, -1))
        return x * gate
