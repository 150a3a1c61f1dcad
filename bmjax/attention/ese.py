"""Effective squeeze-and-excitation: one layer, no bottleneck (Lee and Park 2020, https://arxiv.org/abs/1911.06667)."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
from einops import rearrange

from bmjax.layers import global_average


class EffectiveSE(nn.Module):
    """y = x * sigmoid(W mean(x) + b), W over all channels: the paper's section 3.3 (VoVNetV2)."""

    gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid"
    """`hard_sigmoid`, relu6(z + 3) / 6, is that of the authors' code and of timm."""

    commutes_with_pooling = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]; sows the gate [b, c], 0..1.

        Raises:
          ValueError: no such gate.
        """
        gates = {"sigmoid": nn.sigmoid, "hard_sigmoid": nn.hard_sigmoid}
        if self.gate not in gates:
            raise ValueError(f"option 'gate' of attention 'ese' is {self.gate!r}; expected sigmoid or hard_sigmoid")
        z = nn.Dense(x.shape[-1], dtype=x.dtype, name="dense")(global_average(x).astype(x.dtype))
        gate = gates[self.gate](z)
        self.sow("intermediates", "map", gate)
        return x * rearrange(gate, "b c -> b 1 1 c")
