"""Selective kernel: each channel chooses among kernel sizes (Li et al. 2019, SKNet, https://arxiv.org/abs/1903.06586)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from bmjax.layers import BatchNorm, Conv, at_least_float32, global_average, largest_divisor


class SelectiveKernel(nn.Module):
    """Split, fuse, select (section 3.1): y = sum_m a_m U_m, a the softmax over m of A_m relu(bn(W mean(sum_m U_m))).

    U_m = relu(bn(3x3 grouped convolution of dilation m)), m = 1, 2, ...: kernels of 3, 5, ... places.
    """

    branches: int = 2
    groups: int = 32
    """At most: the largest divisor of c not above it is taken."""
    ratio: int = 16
    min_width: int = 32
    """W has c / ratio rows, at least min_width (the paper's L)."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the share a_m [b, c] of the largest kernel, 0..1."""
        c = x.shape[-1]
        groups = largest_divisor(c, self.groups)
        branches = []
        for m in range(1, self.branches + 1):
            z = Conv(c, 3, dilation=m, groups=groups, name=f"branch{m}")(x)
            branches.append(nn.relu(BatchNorm(epsilon=1e-5, name=f"branch{m}_bn")(z, train=train)))
        u = jnp.stack(branches)
        z = global_average(u.sum(0)).astype(x.dtype)
        z = nn.Dense(max(self.min_width, c // self.ratio), use_bias=False, dtype=x.dtype, name="reduce")(z)
        z = nn.relu(BatchNorm(epsilon=1e-5, name="reduce_bn")(z, train=train))
        z = nn.Dense(self.branches * c, use_bias=False, dtype=x.dtype, name="expand")(z)
        z = rearrange(z.astype(at_least_float32(z.dtype)), "b (m c) -> m b c", m=self.branches)
        share = nn.softmax(z, axis=0)
        self.sow("intermediates", "map", share[-1])
        return jnp.einsum("mbc,mbhwc->bhwc", share.astype(x.dtype), u)
