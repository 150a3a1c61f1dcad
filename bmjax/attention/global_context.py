"""Global context block: one weighted mean for all places, added back (Cao et al. 2019, https://arxiv.org/abs/1904.11492)."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
from einops import rearrange

from bmjax.layers import Conv, at_least_float32


class GlobalContext(nn.Module):
    """y = x + W2 relu(layer_norm(W1 sum_j a_j x_j)), a the softmax over places of a 1x1 convolution (equation 5)."""

    ratio: int = 16
    """The hidden layer has c / ratio channels, at least one."""
    fuse: Literal["add", "scale"] = "add"
    """`scale`: y = x * sigmoid(W2 ...), the default of timm, with a ratio of 8."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows a [b, h, w], 0..1, of sum one.

        Raises:
          ValueError: no such fusion.
        """
        if self.fuse not in ("add", "scale"):
            raise ValueError(f"option 'fuse' of attention 'global_context' is {self.fuse!r}; expected add or scale")
        c, h = x.shape[-1], x.shape[1]
        # A bias would cancel in the softmax.
        scores = rearrange(Conv(1, name="scores")(x), "b h w 1 -> b (h w)")
        a = rearrange(nn.softmax(scores.astype(at_least_float32(x.dtype))), "b (h w) -> b h w", h=h)
        self.sow("intermediates", "map", a)
        z = (x * rearrange(a, "b h w -> b h w 1").astype(x.dtype)).sum((1, 2))
        z = nn.Dense(max(1, c // self.ratio), dtype=x.dtype, name="reduce")(z)
        z = nn.relu(nn.LayerNorm(dtype=x.dtype, use_fast_variance=False, name="norm")(z))
        z = rearrange(nn.Dense(c, dtype=x.dtype, name="expand")(z), "b c -> b 1 1 c")
        return x + z if self.fuse == "add" else x * nn.sigmoid(z)
