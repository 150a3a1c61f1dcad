"""Gather-excite: a gate from each channel's neighbourhood (Hu et al. 2018, https://arxiv.org/abs/1810.12348)."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
from einops import rearrange, repeat

from bmjax.layers import BatchNorm, Conv, at_least_float32, unit_mean


class GatherExcite(nn.Module):
    """y = x * sigmoid(nearest-neighbour upsampling of the gathered x), the paper's section 2.

    `theta-` gathers by the mean over windows of 2 extent - 1 places, extent apart, and has no parameters; `theta` by
    depthwise 3x3 convolutions of stride 2 with batch-norm, ReLU between; `theta+` has two 1x1 convolutions after those.
    """

    kind: Literal["theta-", "theta", "theta+"] = "theta-"
    extent: int = 0
    """Side of a neighbourhood, a power of two for `theta` and `theta+`; 0 is the whole map (for `theta-` only: a
    convolution over the whole map would need maps of one size)."""
    ratio: int = 16
    """`theta+`: the hidden layer has c / ratio channels, at least one."""

    @property
    def commutes_with_pooling(self) -> bool:
        return self.extent == 0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate over the whole map [b, c], or with an extent its mean over
        channels [b, h, w]; 0..1.

        Raises:
          ValueError: no such kind, or an extent that it does not take.
        """
        h, w = x.shape[1:3]
        gate = nn.sigmoid(self._gather(x, train))
        if self.extent == 0:
            self.sow("intermediates", "map", rearrange(gate, "b 1 1 c -> b c"))
            return x * gate
        gate = repeat(gate, "b h w c -> b (h i) (w j) c", i=self.extent, j=self.extent)[:, :h, :w]
        self.sow("intermediates", "map", unit_mean(gate, -1))
        return x * gate

    def _gather(self, x: jax.Array, train: bool) -> jax.Array:
        """[b, h, w, c] -> [b, h / extent, w / extent, c], rounded up."""
        e, c = self.extent, x.shape[-1]
        if self.kind not in ("theta-", "theta", "theta+"):
            raise ValueError(
                f"option 'kind' of attention 'gather_excite' is {self.kind!r}; expected theta-, theta or theta+"
            )
        if e < 0 or (self.kind != "theta-" and (e < 2 or e & (e - 1))):
            expected = "0 or more" if self.kind == "theta-" else "a power of two, at least 2"
            raise ValueError(f"option 'extent' of {self.kind} in attention 'gather_excite' is {e}; expected {expected}")
        if self.kind == "theta-":
            z = x.astype(at_least_float32(x.dtype))
            if e == 0:
                return z.mean((1, 2), keepdims=True).astype(x.dtype)
            sides: Any = ((e - 1, e - 1), (e - 1, e - 1))  # Flax documents pairs, its annotation has str alone
            return nn.avg_pool(z, (2 * e - 1,) * 2, (e, e), sides, count_include_pad=False).astype(x.dtype)
        for i in range(e.bit_length() - 1):
            x = nn.relu(x) if i else x
            x = Conv(c, 3, strides=2, padding=1, groups=c, name=f"gather{i + 1}")(x)
            x = BatchNorm(epsilon=1e-5, name=f"gather{i + 1}_bn")(x, train=train)
        if self.kind == "theta+":
            x = nn.relu(Conv(max(1, c // self.ratio), use_bias=True, name="reduce")(x))
            x = Conv(c, use_bias=True, name="expand")(x)
        return x
