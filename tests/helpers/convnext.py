"""ConvNeXt's blocks (Liu et al. 2022) in plain Flax, with submodules made in `setup`; it has no batch-norm."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """A depthwise 7x7 convolution, a norm, an inverted bottleneck, and a scale for each channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        y = nn.Conv(c, (7, 7), feature_group_count=c, dtype=x.dtype, name="depthwise")(x)
        y = nn.Dense(4 * c, dtype=x.dtype, name="expand")(nn.LayerNorm(dtype=x.dtype, name="norm")(y))
        y = nn.Dense(c, dtype=x.dtype, name="reduce")(nn.gelu(y))
        scale = self.param("scale", nn.initializers.constant(0.1), (c,), jnp.float32)
        return x + scale.astype(x.dtype).reshape(1, 1, 1, c) * y


class ConvNeXt(nn.Module):
    """A stem of 4x4 patches, then a stage for each width, halved in between."""

    widths: tuple[int, ...] = (16, 32)
    dtype: Any = None

    @property
    def stages(self) -> list[str]:
        return [f"stage{i}" for i in range(len(self.widths))]

    def setup(self) -> None:
        halve = [
            nn.Conv(w, (4, 4) if i == 0 else (2, 2), strides=4 if i == 0 else 2) for i, w in enumerate(self.widths)
        ]
        self.halve, self.blocks = halve, [Block() for _ in self.widths]

    def __call__(self, x: jax.Array, **keywords: Any) -> jax.Array:
        tap = keywords.get("tap") or (lambda stage, x: x)
        x = (x / 128 - 1).astype(self.dtype or x.dtype)
        for stage, halve, block in zip(self.stages, self.halve, self.blocks, strict=True):
            x = tap(stage, block(halve(x).astype(x.dtype)))
        return x
