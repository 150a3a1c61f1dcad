"""EfficientNet (Tan and Le 2019, https://arxiv.org/abs/1905.11946), as in keras.applications and with its layer names.

Keras's models scale their input themselves; here that is the preprocessing mode "torch". Keras pads by hand before a
convolution of stride 2: that is "SAME" at every size, as in timm's `tf_` members.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from bmjax.layers import (
    BatchNorm,
    Before,
    Conv,
    Dropout,
    NormMode,
    Tap,
    by_stage,
    global_average,
    norm_before,
    round_channels,
)


class Row(NamedTuple):
    """A row of the paper's table 1: `repeats` blocks, of which the first has the stride."""

    kernel: int
    expansion: int
    channels: int
    repeats: int
    stride: int


class Block(NamedTuple):
    """One block of a network, after scaling; `drop` is the chance that training leaves it out."""

    name: str
    kernel: int
    expansion: int
    channels: int
    stride: int
    drop: float


ROWS = (
    Row(3, 1, 16, 1, 1),
    Row(3, 6, 24, 2, 2),
    Row(5, 6, 40, 2, 2),
    Row(3, 6, 80, 3, 2),
    Row(5, 6, 112, 3, 1),
    Row(5, 6, 192, 4, 2),
    Row(3, 6, 320, 1, 1),
)


class EfficientNet(nn.Module):
    """The family; `width` multiplies the channels of every layer, `depth` the blocks of every row, rounded up."""

    width: float = 1.0
    depth: float = 1.0
    rows: tuple[Row, ...] = ROWS
    stem: int = 32
    """Channels of the first convolution."""
    last: int = 1280
    """Channels of the last convolution."""
    drop_connect: float = 0.2
    """Stochastic depth (Huang et al. 2016): the chance that training leaves a residual block out, for an image, grows
    from 0 at the first block towards this."""
    dropout: float = 0.2
    """Rate before the top, where it is included."""
    include_top: bool = False
    classes: int = 1000
    """Classes of the top, where it is included."""
    epsilon: float = 1e-3
    dtype: Any = None
    """Compute type; None: the input's."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The first convolution, each block, and the last convolution, after its norm and swish."""
        return ("stem", *(block.name for block in self.blocks()), "top")

    def blocks(self) -> Iterator[Block]:
        """The blocks, in order."""
        repeats = [math.ceil(self.depth * row.repeats) for row in self.rows]
        before = 0
        for number, (row, count) in enumerate(zip(self.rows, repeats, strict=True), start=1):
            for i in range(count):
                name, stride = f"block{number}{chr(ord('a') + i)}", row.stride if i == 0 else 1
                drop = self.drop_connect * before / sum(repeats)
                yield Block(name, row.kernel, row.expansion, round_channels(row.channels * self.width), stride, drop)
                before += 1

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, mode: NormMode = "train", tap: Tap | None = None
    ) -> jax.Array:
        """Preprocessed images [b, h, w, 3] of any size -> features [b, h/32, w/32, c], or logits [b, classes] with the
        top; sizes are rounded up.

        `mode` is that of the batch-norms (bmjax.layers.BatchNorm). Stochastic depth and dropout take any mode but
        `train` as evaluation, so that a frozen backbone gives the same features in every epoch; where they are on they
        need the rng "dropout". What `tap(stage, x)` returns replaces the output of each stage.
        """
        tap = tap or (lambda stage, x: x)
        random = train and mode == "train"

        def norm(name: str, x: jax.Array) -> jax.Array:
            return BatchNorm(epsilon=self.epsilon, name=name)(x, train=train, mode=mode)

        def swish(name: str, x: jax.Array) -> Before:
            """Norm and swish of x, for what takes x next."""
            return norm_before(x, nn.swish, name=name, epsilon=self.epsilon, train=train, mode=mode)

        def squeeze_excite(name: str, x: jax.Array, squeezed: int) -> jax.Array:
            y = global_average(x).astype(x.dtype)[:, None, None]
            y = nn.swish(Conv(squeezed, 1, use_bias=True, name=f"{name}_se_reduce")(y))
            return nn.sigmoid(Conv(x.shape[-1], 1, use_bias=True, name=f"{name}_se_expand")(y))

        def inverted_residual(x: jax.Array, block: Block) -> jax.Array:
            name, inputs = block.name, x.shape[-1]
            y, c, before = x, inputs * block.expansion, None
            if block.expansion > 1:
                y = Conv(c, 1, name=f"{name}_expand_conv")(y)
                before = swish(f"{name}_expand_bn", y)
            y = Conv(c, block.kernel, strides=block.stride, groups=c, name=f"{name}_dwconv")(y, before)
            before = swish(f"{name}_bn", y)
            gate = squeeze_excite(name, before.of(y), max(1, inputs // 4))
            y = Conv(block.channels, 1, name=f"{name}_project_conv")(y, before._replace(gate=gate))
            y = norm(f"{name}_project_bn", y)
            if block.stride > 1 or block.channels != inputs:
                return y
            return x + Dropout(block.drop, shared=(1, 2, 3))(y, train=random)

        def stem(x: jax.Array) -> jax.Array:
            x = Conv(round_channels(self.stem * self.width), 3, strides=2, name="stem_conv")(x)
            return swish("stem_bn", x).of(x)

        def top(x: jax.Array) -> jax.Array:
            x = Conv(round_channels(self.last * self.width), 1, name="top_conv")(x)
            return swish("top_bn", x).of(x)

        if self.dtype is not None:
            x = x.astype(self.dtype)
        x = tap("stem", by_stage(self, "stem", stem, x))
        for block in self.blocks():
            x = tap(block.name, by_stage(self, block.name, functools.partial(inverted_residual, block=block), x))
        x = tap("top", by_stage(self, "top", top, x))
        if self.include_top:
            x = Dropout(self.dropout)(global_average(x), train=random)
            x = nn.Dense(self.classes, dtype=x.dtype, name="predictions")(x)
        return x


VARIANTS: dict[str, Callable[..., EfficientNet]] = {
    "efficientnetb0": EfficientNet,
    "efficientnetb1": functools.partial(EfficientNet, width=1.0, depth=1.1),
    "efficientnetb2": functools.partial(EfficientNet, width=1.1, depth=1.2, dropout=0.3),
    "efficientnetb3": functools.partial(EfficientNet, width=1.2, depth=1.4, dropout=0.3),
    "efficientnetb4": functools.partial(EfficientNet, width=1.4, depth=1.8, dropout=0.4),
    "efficientnetb5": functools.partial(EfficientNet, width=1.6, depth=2.2, dropout=0.4),
    "efficientnetb6": functools.partial(EfficientNet, width=1.8, depth=2.6, dropout=0.5),
    "efficientnetb7": functools.partial(EfficientNet, width=2.0, depth=3.1, dropout=0.5),
    # Ours, without published weights: for small images on CPUs (a stride of 16 in all), and for tests.
    "efficientnet_small": functools.partial(
        EfficientNet,
        rows=(Row(3, 1, 16, 1, 1), Row(3, 6, 24, 2, 2), Row(5, 6, 40, 2, 2), Row(3, 6, 80, 2, 2)),
        last=320,
        drop_connect=0.1,
    ),
    "efficientnet_tiny": functools.partial(
        EfficientNet,
        rows=(Row(3, 1, 8, 1, 1), Row(3, 4, 16, 2, 2), Row(5, 4, 24, 2, 2)),
        stem=16,
        last=64,
    ),
}
PREPROCESS = "torch"
TIMM: dict[str, Any] = {}


def timm_name(module: EfficientNet, layer: str) -> str:
    """The path in timm's module of a layer, by the layer's name here.

    Raises:
      ValueError: the module has no such layer.
    """
    names = {"stem_conv": "conv_stem", "stem_bn": "bn1", "top_conv": "conv_head", "top_bn": "bn2"}
    names["predictions"] = "classifier"
    parts = {"dwconv": "conv_dw", "se_reduce": "se.conv_reduce", "se_expand": "se.conv_expand"}
    inverted = {"expand_conv": "conv_pw", "expand_bn": "bn1", "bn": "bn2", "project_conv": "conv_pwl"}
    inverted |= {"project_bn": "bn3"} | parts
    # A block without an expansion is timm's depthwise-separable block, with names of its own.
    separable = {"bn": "bn1", "project_conv": "conv_pw", "project_bn": "bn2"} | parts
    for block in module.blocks():
        row, i = int(block.name[len("block") : -1]) - 1, ord(block.name[-1]) - ord("a")
        for ours, timm in (inverted if block.expansion > 1 else separable).items():
            names[f"{block.name}_{ours}"] = f"blocks.{row}.{i}.{timm}"
    if layer not in names:
        raise ValueError(f"layer is {layer!r}; expected one of EfficientNet's")
    return names[layer]
