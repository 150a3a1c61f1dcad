"""A backbone of two convolutions, for tests that compile many steps."""

import functools
from typing import Any

import flax.linen as nn

from bmjax.layers import BatchNorm, Conv, by_stage


class Net(nn.Module):
    stages: tuple[str, ...] = ("fine", "coarse")
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, train=False, mode="train", tap=lambda stage, x: x):
        def one(x, stage, width):
            x = Conv(width, 3, strides=2, name=stage)(x)
            return nn.relu(BatchNorm(name=f"{stage}_norm")(x, train=train, mode=mode))

        x = x if self.dtype is None else x.astype(self.dtype)
        for stage, width in zip(self.stages, (16, 32), strict=True):
            x = tap(stage, by_stage(self, stage, functools.partial(one, stage=stage, width=width), x))
        return x
