"""CBAM: attention over channels, then over places (Woo et al. 2018, https://arxiv.org/abs/1807.06521).

As in the authors' code (https://github.com/Jongchan/attention-module): biases in the shared network, a batch-norm after
the 7x7 convolution.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from bmjax.layers import BatchNorm, Conv, global_average, maximum_over


class CBAM(nn.Module):
    """Channels: sigmoid(f(mean(x)) + f(max(x))), f a shared two-layer net. Places: sigmoid(bn(conv([max, mean])))."""

    ratio: int = 16
    """The hidden layer of f has c / ratio channels, at least one."""
    kernel_size: int = 7
    """Odd side of the convolution over places."""
    use_bias: bool = True
    """Biases in f: the authors' code has them, the paper's formula and timm do not."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the map over places [b, h, w] as `map`, that over channels [b, c] as
        `channel_map`, both 0..1."""
        x = x * rearrange(self._channels(x), "b c -> b 1 1 c")
        places = jnp.stack([maximum_over(x, -1), x.mean(-1)], axis=-1)
        z = Conv(1, self.kernel_size, padding=self.kernel_size // 2, name="spatial_conv")(places)
        gate = nn.sigmoid(BatchNorm(epsilon=1e-5, name="spatial_bn")(z, train=train))
        self.sow("intermediates", "map", reduce(gate, "b h w 1 -> b h w", "sum"))
        return x * gate

    def _channels(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        first = nn.Dense(max(1, c // self.ratio), use_bias=self.use_bias, dtype=x.dtype, name="reduce")
        second = nn.Dense(c, use_bias=self.use_bias, dtype=x.dtype, name="expand")
        pooled = (global_average(x).astype(x.dtype), maximum_over(x, (1, 2)))
        gate = nn.sigmoid(sum(second(nn.relu(first(p))) for p in pooled))
        self.sow("intermediates", "channel_map", gate)
        return gate
