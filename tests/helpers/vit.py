"""A vision transformer (Dosovitskiy et al. 2021) in plain Flax: it knows of bmjax the contract of a backbone alone."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Attention and a hidden layer, each behind a norm and around it."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        y = nn.LayerNorm(dtype=x.dtype, name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=x.dtype, name="attention")(y, y)
        y = nn.Dense(2 * c, dtype=x.dtype, name="expand")(nn.LayerNorm(dtype=x.dtype, name="norm2")(x))
        return x + nn.Dense(c, dtype=x.dtype, name="reduce")(nn.gelu(y))


class Encoder(nn.Module):
    """Blocks in two stages; tokens go back to their places for `tap`."""

    depth: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, places: tuple[int, int], tap: Any) -> jax.Array:
        b, _, c = x.shape
        for stage in ("early", "late"):
            for i in range(self.depth):
                x = Block(self.heads, name=f"{stage}{i}")(x)
            if stage == "late":
                x = nn.LayerNorm(dtype=x.dtype, name="norm")(x)
            x = tap(stage, x.reshape(b, *places, c)).reshape(b, -1, c)
        return x.reshape(b, *places, c)


class ViT(nn.Module):
    """Patches of 8 pixels. It has no batch-norm, so that it ignores `mode`."""

    width: int = 32
    depth: int = 1
    heads: int = 2
    stages: tuple[str, ...] = ("early", "late")
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mode: str = "train", tap: Any = None) -> jax.Array:
        x = (x / 128 - 1).astype(self.dtype or x.dtype)
        x = nn.Conv(self.width, (8, 8), strides=8, padding="VALID", dtype=x.dtype, name="patches")(x)
        b, h, w, c = x.shape
        where = self.param("where", nn.initializers.normal(0.02), (1, h * w, c), jnp.float32)
        x = x.reshape(b, h * w, c) + where.astype(x.dtype)
        return Encoder(self.depth, self.heads, name="encoder")(x, (h, w), tap or (lambda stage, x: x))
