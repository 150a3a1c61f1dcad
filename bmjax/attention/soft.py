"""Soft attention over places: our reading of the study's unnamed "attention mechanism".

The study (https://doi.org/10.3390/life13102091) says that an attention mechanism follows the backbone, not which. This
is the plainest that makes average pooling a learned weighted mean: a mask from 1x1 convolutions, divided by its mean.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from einops import rearrange, reduce

from bmjax.layers import Conv, at_least_float32


class SoftAttention(nn.Module):
    """y = x * m / mean(m), with m = sigmoid(z) over places and z from 1x1 convolutions with ReLU between.

    The mean over h, w of y is then the mean of x weighted by m. m / mean(m) is computed as h*w * softmax(log m), which
    is the same number and never 0/0: masks that underflow everywhere still weigh places against each other.
    """

    widths: tuple[int, ...] = (64, 16)
    """Channels of the convolutions before the one that gives the mask."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mask [b, h, w], 0..1."""
        h, w = x.shape[1:3]
        z = x
        for i, width in enumerate(self.widths, start=1):
            z = nn.relu(Conv(width, use_bias=True, name=f"conv{i}")(z))
        z = Conv(1, use_bias=True, name="mask")(z)
        z = reduce(z.astype(at_least_float32(z.dtype)), "b h w 1 -> b h w", "sum")
        self.sow("intermediates", "map", nn.sigmoid(z))
        weights = nn.softmax(rearrange(nn.log_sigmoid(z), "b h w -> b (h w)")) * (h * w)
        return x * rearrange(weights, "b (h w) -> b h w 1", h=h).astype(x.dtype)
