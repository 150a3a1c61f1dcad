"""Large kernel attention: a 21x21 convolution in three steps as the gate (Guo et al. 2022, VAN, https://arxiv.org/abs/2202.09741)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.layers import Conv, at_least_float32


class LargeKernelAttention(nn.Module):
    """y = x * a, a = conv1x1(dilated depthwise 7x7(depthwise 5x5(x))), without a sigmoid (equations 1 and 2)."""

    kernel_size: int = 21
    """K: the depthwise convolutions have sides 2 dilation - 1 and K / dilation, rounded up."""
    dilation: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the mean of |a| over channels [b, h, w] over its largest value, 0..1: a
        itself has no bounds.

        Raises:
          ValueError: K / dilation, rounded up, is even.
        """
        c, d = x.shape[-1], self.dilation
        side = -(-self.kernel_size // d)
        if side % 2 == 0:
            raise ValueError(
                f"option 'kernel_size' of attention 'large_kernel' is {self.kernel_size}, over the dilation {side}; "
                "expected an odd side"
            )
        a = Conv(c, 2 * d - 1, groups=c, use_bias=True, name="near")(x)
        a = Conv(c, side, dilation=d, groups=c, use_bias=True, name="far")(a)
        a = Conv(c, use_bias=True, name="mix")(a)
        size = jnp.abs(a.astype(at_least_float32(a.dtype))).mean(-1)
        largest = size.max((1, 2), keepdims=True)
        self.sow("intermediates", "map", size / jnp.where(largest > 0, largest, 1))
        return x * a
