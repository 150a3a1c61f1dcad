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
    gated: bool = False
    """Gated attention pooling (Ilse et al. 2018, https://arxiv.org/abs/1802.04712, equations 7 and 9): the last of the
    convolutions is tanh(V x) * sigmoid(U x), and the weights are softmax(z). With widths=(128,) it is the paper's."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mask [b, h, w], 0..1; the gated form sows its weights, of sum one.

        Raises:
          ValueError: the gated form has no widths.
        """
        if self.gated and not self.widths:
            raise ValueError("option 'widths' of the gated attention 'soft' is (); expected at least one")
        h, w = x.shape[1:3]
        z = x
        for i, width in enumerate(self.widths, start=1):
            conv = Conv(width, use_bias=True, name=f"conv{i}")
            if self.gated and i == len(self.widths):
                z = nn.tanh(conv(z)) * nn.sigmoid(Conv(width, use_bias=True, name="gate")(z))
            else:
                z = nn.relu(conv(z))
        # A bias would cancel in the gated form's softmax.
        z = Conv(1, use_bias=not self.gated, name="mask")(z)
        z = reduce(z.astype(at_least_float32(z.dtype)), "b h w 1 -> b h w", "sum")
        scores = z if self.gated else nn.log_sigmoid(z)
        weights = rearrange(nn.softmax(rearrange(scores, "b h w -> b (h w)")), "b (h w) -> b h w", h=h)
        self.sow("intermediates", "map", weights if self.gated else nn.sigmoid(z))
        return x * rearrange(weights * (h * w), "b h w -> b h w 1").astype(x.dtype)
