"""BAM: channels and places in two parallel branches, added (Park et al. 2018, https://arxiv.org/abs/1807.06514)."""

from __future__ import annotations

import flax.linen as nn
import jax
from einops import rearrange

from bmjax.layers import BatchNorm, Conv, global_average, unit_mean


class BAM(nn.Module):
    """y = x + x * sigmoid(channels + places), equations 1 to 4; one batch-norm ends each branch.

    Channels: bn(W1 relu(W0 mean(x) + b0)). Places: bn(f3(f2(f1(f0(x))))), f0 and f3 1x1 and f1, f2 dilated 3x3
    convolutions. The equations name no activation: the ReLUs within both branches are those of the authors' code
    (https://github.com/Jongchan/attention-module), which places the norms otherwise and multiplies the branches.
    """

    ratio: int = 16
    """Both branches have c / ratio channels within, at least one."""
    dilation: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate's mean over channels [b, h, w], 0..1."""
        c = x.shape[-1]
        hidden = max(1, c // self.ratio)
        z = nn.relu(nn.Dense(hidden, dtype=x.dtype, name="reduce")(global_average(x).astype(x.dtype)))
        z = nn.Dense(c, use_bias=False, dtype=x.dtype, name="expand")(z)
        channels = BatchNorm(epsilon=1e-5, name="channel_bn")(z, train=train)
        z = nn.relu(Conv(hidden, use_bias=True, name="conv0")(x))
        for i in (1, 2):
            z = nn.relu(Conv(hidden, 3, dilation=self.dilation, use_bias=True, name=f"conv{i}")(z))
        places = BatchNorm(epsilon=1e-5, name="spatial_bn")(Conv(1, name="conv3")(z), train=train)
        gate = nn.sigmoid(rearrange(channels, "b c -> b 1 1 c") + places)
        self.sow("intermediates", "map", unit_mean(gate, -1))
        return x + x * gate
