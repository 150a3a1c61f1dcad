"""Efficient channel attention: a short convolution over channels (Wang et al. 2020, https://arxiv.org/abs/1910.03151)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
from einops import rearrange

from bmjax.layers import Conv, global_average


class EfficientChannelAttention(nn.Module):
    """y = x * sigmoid(conv1d(mean(x))), the convolution of k places over the channels, without bias (section 3.2)."""

    gamma: float = 2.0
    beta: float = 1.0
    """k is |(log2(c) + beta) / gamma| without its fraction, plus one where that is even: the paper's equation for k
    (its b is beta) as the authors' code rounds it (https://github.com/BangguWu/ECANet)."""
    kernel_size: int | None = None
    """k itself, odd."""

    commutes_with_pooling = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate [b, c], 0..1."""
        k = self.kernel_size or int(abs((math.log2(x.shape[-1]) + self.beta) / self.gamma)) // 2 * 2 + 1
        z = rearrange(global_average(x).astype(x.dtype), "b c -> b c 1 1")
        gate = nn.sigmoid(Conv(1, (k, 1), name="conv")(z))
        self.sow("intermediates", "map", rearrange(gate, "b c 1 1 -> b c"))
        return x * rearrange(gate, "b c 1 1 -> b 1 1 c")
