"""DenseNet (Huang et al. 2017, https://arxiv.org/abs/1608.06993), as in keras.applications and with its layer names.

Padding is explicit and symmetric, as in torch. Two things are computed elsewhere than in Keras, with the same result:
the batch statistics of a feature map are taken once for all later norms of its block, and a transition averages before
its 1x1 convolution (both are linear, so they commute), which then sees a quarter of the pixels.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from einops import reduce

from bmjax.layers import BatchNorm, Conv, NormMode, Tap, by_stage, conv_norm, global_average, max_pool
from bmjax.layers.dense_block import dense_block


class DenseNet(nn.Module):
    """The family; `blocks` is the number of layers in each dense block."""

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    """Channels a layer adds; its bottleneck has four times as many."""
    stem: int = 64
    """Channels of the first convolution."""
    reduction: float = 0.5
    """Share of the channels that a transition keeps."""
    include_top: bool = False
    classes: int = 1000
    """Classes of the top, where it is included."""
    epsilon: float = 1.001e-5
    dtype: Any = None
    """Compute type; None: the input's."""

    @property
    def stages(self) -> tuple[str, ...]:
        """conv1 is the first convolution, then a stage a dense block; the last is after the final norm and ReLU."""
        return tuple(f"conv{i}" for i in range(1, len(self.blocks) + 2))

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, mode: NormMode = "train", tap: Tap | None = None
    ) -> jax.Array:
        """Preprocessed images [b, h, w, 3] -> features [b, h/32, w/32, c], or logits [b, classes] with the top.

        `mode` is that of the batch-norms (bmjax.layers.BatchNorm). What `tap(stage, x)` returns replaces the output of
        each stage.

        Raises:
          ValueError: the images are too small for the number of blocks.
        """
        tap = tap or (lambda stage, x: x)

        def norm_relu(name: str, x: jax.Array, statistics: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
            norm = BatchNorm(epsilon=self.epsilon, name=name)
            return nn.relu(norm(x, train=train, mode=mode, statistics=statistics))

        def stem(x: jax.Array) -> jax.Array:
            if not train:
                options: dict[str, Any] = {"conv": "conv1_conv", "norm": "conv1_bn", "epsilon": self.epsilon}
                return conv_norm(x, self.stem, 7, 2, use_bias=False, **options)
            return norm_relu("conv1_bn", Conv(self.stem, 7, strides=2, padding=3, name="conv1_conv")(x))

        block = functools.partial(dense_block, growth=self.growth, epsilon=self.epsilon, train=train, mode=mode)

        def transition(name: str, x: jax.Array, statistics: Any) -> jax.Array:
            x = norm_relu(f"{name}_bn", x, statistics)
            h, w = (n // 2 * 2 for n in x.shape[1:3])
            x = reduce(x[:, :h, :w], "b (h i) (w j) c -> b h w c", "mean", i=2, j=2)
            return Conv(int(x.shape[-1] * self.reduction), 1, name=f"{name}_conv")(x)

        if self.dtype is not None:
            x = x.astype(self.dtype)
        size = x.shape[1:3]
        x = tap("conv1", by_stage(self, "conv1", stem, x))
        # Pads with -inf where Keras pads with zero: the same after a ReLU.
        x = max_pool(x, window=3, stride=2, padding=1)
        for number, layers in enumerate(self.blocks, start=2):
            stage, last = f"conv{number}", number == len(self.blocks) + 1
            x, statistics = by_stage(self, stage, functools.partial(block, name=stage, layers=layers), x)
            if last:
                x = tap(stage, norm_relu("bn", x, statistics))
                break
            tapped = tap(stage, x)
            if tapped is not x:
                x, statistics = tapped, None
            if min(x.shape[1:3]) < 2:
                raise ValueError(f"images are {size[0]}x{size[1]} pixels; expected more for {len(self.blocks)} blocks")
            pool = functools.partial(transition, f"pool{number}")
            x = by_stage(self, f"conv{number + 1}", pool, x, statistics)
        if self.include_top:
            x = global_average(x)
            x = nn.Dense(self.classes, dtype=x.dtype, name="predictions")(x)
        return x


VARIANTS: dict[str, Callable[..., DenseNet]] = {
    "densenet121": functools.partial(DenseNet, blocks=(6, 12, 24, 16)),
    "densenet169": functools.partial(DenseNet, blocks=(6, 12, 32, 32)),
    "densenet201": functools.partial(DenseNet, blocks=(6, 12, 48, 32)),
    # Ours, without published weights: for small images on CPUs, and for tests.
    "densenet_small": functools.partial(DenseNet, blocks=(2, 4, 6, 4), growth=16, stem=32),
    "densenet_tiny": functools.partial(DenseNet, blocks=(1, 2, 2), growth=4, stem=8),
}
PREPROCESS = "torch"
TIMM: dict[str, Any] = {"epsilon": 1e-5}


def timm_name(module: DenseNet, layer: str) -> str:
    """The path in timm's module of a layer, by the layer's name here.

    Raises:
      ValueError: the module has no such layer.
    """
    del module
    simple = {"conv1_conv": "features.conv0", "conv1_bn": "features.norm0", "bn": "features.norm5"}
    simple["predictions"] = "classifier"
    if layer in simple:
        return simple[layer]
    if match := re.fullmatch(r"pool(\d+)_(bn|conv)", layer):
        number, kind = int(match[1]), {"bn": "norm", "conv": "conv"}[match[2]]
        return f"features.transition{number - 1}.{kind}"
    if match := re.fullmatch(r"conv(\d+)_block(\d+)_([012]_(?:bn|conv))", layer):
        kind = {"0_bn": "norm1", "1_conv": "conv1", "1_bn": "norm2", "2_conv": "conv2"}[match[3]]
        return f"features.denseblock{int(match[1]) - 1}.denselayer{match[2]}.{kind}"
    raise ValueError(f"layer is {layer!r}; expected one of DenseNet's")
