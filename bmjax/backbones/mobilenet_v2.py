"""MobileNetV2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381), as in keras.applications and with its layer
names.

Where a 3x3 convolution of stride 2 meets an even size, Keras pads only below and to the right, torch and timm on all
sides: the field `padding`. Keras's rule for the channels and timm's give the same at every published width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from bmjax.layers import (
    BatchNorm,
    Before,
    Conv,
    NormMode,
    Tap,
    by_stage,
    global_average,
    norm_before,
    relu6,
    round_channels,
)
from bmjax.layers.ops import Padding


class Row(NamedTuple):
    """A row of the paper's table 2: `repeats` blocks, of which the first has the stride."""

    expansion: int
    channels: int
    repeats: int
    stride: int


ROWS = (
    Row(1, 16, 1, 1),
    Row(6, 24, 2, 2),
    Row(6, 32, 3, 2),
    Row(6, 64, 4, 2),
    Row(6, 96, 3, 1),
    Row(6, 160, 3, 2),
    Row(6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """The family; `alpha` multiplies the channels of every layer, of the last only where it is more than 1."""

    alpha: float = 1.0
    rows: tuple[Row, ...] = ROWS
    last: int = 1280
    """Channels of the last convolution."""
    padding: Padding = "SAME"
    """Of the 3x3 convolutions: "SAME" as in Keras, or 1, on all sides, as in timm."""
    include_top: bool = False
    classes: int = 1000
    """Classes of the top, where it is included."""
    epsilon: float = 1e-3
    momentum: float = 0.999
    """Of the batch-norms' running statistics."""
    dtype: Any = None
    """Compute type; None: the input's."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The first convolution, each block, and the last convolution, after its norm and ReLU6."""
        blocks = range(1, sum(row.repeats for row in self.rows))
        return ("Conv1", "expanded_conv", *(f"block_{i}" for i in blocks), "Conv_1")

    def blocks(self) -> Iterator[tuple[str, int, int, int]]:
        """Of each block: name, expansion, channels, stride."""
        names = iter(self.stages[1:-1])
        for row in self.rows:
            for i in range(row.repeats):
                yield next(names), row.expansion, round_channels(row.channels * self.alpha), row.stride if i == 0 else 1

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, mode: NormMode = "train", tap: Tap | None = None
    ) -> jax.Array:
        """Preprocessed images [b, h, w, 3] of any size -> features [b, h/32, w/32, c], or logits [b, classes] with the
        top; sizes are rounded up.

        `mode` is that of the batch-norms (bmjax.layers.BatchNorm). What `tap(stage, x)` returns replaces the output of
        each stage.
        """
        tap = tap or (lambda stage, x: x)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return BatchNorm(momentum=self.momentum, epsilon=self.epsilon, name=name)(x, train=train, mode=mode)

        def norm_relu6(name: str, x: jax.Array) -> Before:
            """Norm and ReLU6 of x, for what takes x next."""
            options = {"momentum": self.momentum, "epsilon": self.epsilon, "train": train, "mode": mode}
            return norm_before(x, relu6, name=name, **options)

        def block(name: str, x: jax.Array, expansion: int, channels: int, stride: int) -> jax.Array:
            y, c, before = x, x.shape[-1] * expansion, None
            if expansion > 1:
                y = Conv(c, 1, name=f"{name}_expand")(y)
                before = norm_relu6(f"{name}_expand_BN", y)
            y = Conv(c, 3, strides=stride, padding=self.padding, groups=c, name=f"{name}_depthwise")(y, before)
            y = Conv(channels, 1, name=f"{name}_project")(y, norm_relu6(f"{name}_depthwise_BN", y))
            y = norm(f"{name}_project_BN", y)
            return x + y if x.shape == y.shape else y

        def first(x: jax.Array) -> jax.Array:
            x = Conv(round_channels(32 * self.alpha), 3, strides=2, padding=self.padding, name="Conv1")(x)
            return norm_relu6("bn_Conv1", x).of(x)

        def last(x: jax.Array) -> jax.Array:
            x = Conv(round_channels(self.last * max(1.0, self.alpha)), 1, name="Conv_1")(x)
            return norm_relu6("Conv_1_bn", x).of(x)

        if self.dtype is not None:
            x = x.astype(self.dtype)
        x = tap("Conv1", by_stage(self, "Conv1", first, x))
        for name, expansion, channels, stride in self.blocks():
            one = functools.partial(block, name, expansion=expansion, channels=channels, stride=stride)
            x = tap(name, by_stage(self, name, one, x))
        x = tap("Conv_1", by_stage(self, "Conv_1", last, x))
        if self.include_top:
            x = global_average(x)
            x = nn.Dense(self.classes, dtype=x.dtype, name="predictions")(x)
        return x


# At 64 pixels: a stride of 16 in all, and running statistics that follow in a short training.
_SMALL = functools.partial(MobileNetV2, momentum=0.99)

VARIANTS: dict[str, Callable[..., MobileNetV2]] = {
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_035": functools.partial(MobileNetV2, alpha=0.35),
    "mobilenet_v2_050": functools.partial(MobileNetV2, alpha=0.5),
    "mobilenet_v2_075": functools.partial(MobileNetV2, alpha=0.75),
    "mobilenet_v2_130": functools.partial(MobileNetV2, alpha=1.3),
    "mobilenet_v2_140": functools.partial(MobileNetV2, alpha=1.4),
    # Ours, without published weights: for small images on CPUs, and for tests.
    "mobilenet_v2_small": functools.partial(
        _SMALL, alpha=0.75, rows=(Row(1, 16, 1, 1), Row(6, 24, 2, 2), Row(6, 32, 3, 2), Row(6, 64, 3, 2)), last=320
    ),
    "mobilenet_v2_tiny": functools.partial(
        _SMALL, alpha=0.35, rows=(Row(1, 16, 1, 1), Row(6, 24, 2, 2), Row(6, 32, 2, 2)), last=64
    ),
}
PREPROCESS = "tf"
TIMM: dict[str, Any] = {"padding": 1, "epsilon": 1e-5}


def timm_name(module: MobileNetV2, layer: str) -> str:
    """The path in timm's module of a layer, by the layer's name here.

    Raises:
      ValueError: the module has no such layer.
    """
    simple = {"Conv1": "conv_stem", "bn_Conv1": "bn1", "Conv_1": "conv_head", "Conv_1_bn": "bn2"}
    simple["predictions"] = "classifier"
    if layer in simple:
        return simple[layer]
    # A block without an expansion is timm's depthwise-separable block, with names of its own.
    inverted = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
    inverted |= {"expand_BN": "bn1", "depthwise_BN": "bn2", "project_BN": "bn3"}
    separable = {"depthwise": "conv_dw", "depthwise_BN": "bn1", "project": "conv_pw", "project_BN": "bn2"}
    names = module.stages[1:-1]
    for number, row in enumerate(module.rows):
        for i in range(row.repeats):
            block, names = names[0], names[1:]
            parts = inverted if row.expansion > 1 else separable
            if layer.startswith(f"{block}_") and (part := layer.removeprefix(f"{block}_")) in parts:
                return f"blocks.{number}.{i}.{parts[part]}"
    raise ValueError(f"layer is {layer!r}; expected one of MobileNetV2's")


def torchvision_name(module: MobileNetV2, layer: str) -> str:
    """As `timm_name`, of torchvision's module: blocks are counted through, their layers have numbers."""
    simple = {"Conv1": "features.0.0", "bn_Conv1": "features.0.1", "predictions": "classifier.1"}
    last = sum(row.repeats for row in module.rows) + 1
    simple |= {"Conv_1": f"features.{last}.0", "Conv_1_bn": f"features.{last}.1"}
    if layer in simple:
        return simple[layer]
    inverted = {"expand": "0.0", "expand_BN": "0.1", "depthwise": "1.0", "depthwise_BN": "1.1", "project": "2"}
    separable = {"depthwise": "0.0", "depthwise_BN": "0.1", "project": "1", "project_BN": "2"}
    parts = [inverted | {"project_BN": "3"} if row.expansion > 1 else separable for row in module.rows]
    numbers = [number for number, row in enumerate(module.rows) for _ in range(row.repeats)]
    for i, (block, number) in enumerate(zip(module.stages[1:-1], numbers, strict=True)):
        if layer.startswith(f"{block}_") and (part := layer.removeprefix(f"{block}_")) in parts[number]:
            return f"features.{i + 1}.conv.{parts[number][part]}"
    raise ValueError(f"layer is {layer!r}; expected one of MobileNetV2's")
