"""scSE: concurrent squeeze-and-excitation of channels and places (Roy et al. 2018, https://arxiv.org/abs/1803.02579)."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import Conv, global_average


class ConcurrentSE(nn.Module):
    """y = x * sigmoid(W1 relu(W2 mean(x))) + x * sigmoid(q . x): the paper's section 2, cSE and sSE."""

    ratio: int = 2
    """The hidden layer has c / ratio channels, at least one."""
    combine: Literal["add", "max"] = "add"
    """`max` takes the larger of the two, as the same authors' https://arxiv.org/abs/1808.08127."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the map over places [b, h, w] as `map`, that over channels [b, c] as
        `channel_map`, both 0..1.

        Raises:
          ValueError: no such way to combine.
        """
        ways = {"add": jnp.add, "max": jnp.maximum}
        if self.combine not in ways:
            raise ValueError(f"option 'combine' of attention 'scse' is {self.combine!r}; expected add or max")
        c = x.shape[-1]
        z = nn.Dense(max(1, c // self.ratio), dtype=x.dtype, name="reduce")(global_average(x).astype(x.dtype))
        channels = nn.sigmoid(nn.Dense(c, dtype=x.dtype, name="expand")(nn.relu(z)))
        places = nn.sigmoid(Conv(1, name="places")(x))
        self.sow("intermediates", "channel_map", channels)
        self.sow("intermediates", "map", rearrange(places, "b h w 1 -> b h w"))
        return ways[self.combine](x * rearrange(channels, "b c -> b 1 1 c"), x * places)
