"""Xception (Chollet 2017, https://arxiv.org/abs/1610.02357), as in keras.applications and with its layer names.

The shortcuts have the names that Keras gives in a fresh session: `conv2d`, `batch_normalization`, `conv2d_1`, ...
The pools are "SAME" in Keras, symmetric in timm: the field `pool_padding`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from bmjax.layers import BatchNorm, Before, Conv, NormMode, Tap, by_stage, global_average, max_pool, norm_before
from bmjax.layers.ops import Padding


class Xception(nn.Module):
    """The network in the paper's three flows."""

    stem: tuple[int, int] = (32, 64)
    """Channels of the first two convolutions, both without padding."""
    entry: tuple[int, ...] = (128, 256, 728)
    """Channels of the entry flow's blocks, each of which halves."""
    middle: int = 8
    """Blocks of the middle flow, with as many channels as the entry flow's last."""
    exit: tuple[int, int, int] = (1024, 1536, 2048)
    """Channels of the exit flow: its block, which halves, and the last two convolutions."""
    pool_padding: Padding = "SAME"
    """Of the pools: "SAME" as in Keras, or 1, on all sides, as in timm."""
    include_top: bool = False
    classes: int = 1000
    """Classes of the top, where it is included."""
    epsilon: float = 1e-3
    dtype: Any = None
    """Compute type; None: the input's."""

    @property
    def stages(self) -> tuple[str, ...]:
        """block1 is the two first convolutions, then a stage a block; the last is after the final norm and ReLU."""
        return tuple(f"block{i}" for i in range(1, len(self.entry) + self.middle + 4))

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, mode: NormMode = "train", tap: Tap | None = None
    ) -> jax.Array:
        """Preprocessed images [b, h, w, 3] -> features [b, h/32, w/32, c], or logits [b, classes] with the top.

        `mode` is that of the batch-norms (bmjax.layers.BatchNorm). What `tap(stage, x)` returns replaces the output of
        each stage.

        Raises:
          ValueError: the images are too small for the first convolutions.
        """
        tap = tap or (lambda stage, x: x)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return BatchNorm(epsilon=self.epsilon, name=name)(x, train=train, mode=mode)

        def norm_relu(name: str, x: jax.Array) -> Before:
            """Norm and ReLU of x, for what takes x next."""
            return norm_before(x, nn.relu, name=name, epsilon=self.epsilon, train=train, mode=mode)

        def separable(name: str, x: jax.Array, channels: int, before: Before | None = None) -> jax.Array:
            c = x.shape[-1]
            y = Conv(c, 3, groups=c, name=f"{name}_depthwise")(x, before)
            return Conv(channels, 1, name=f"{name}_pointwise")(y)

        def halving(name: str, x: jax.Array, first: int, second: int, shortcut: int) -> jax.Array:
            number = f"_{shortcut}" if shortcut else ""
            y = nn.relu(x) if shortcut else x  # the network's first block comes after a ReLU
            y = separable(f"{name}_sepconv1", y, first)
            y = separable(f"{name}_sepconv2", y, second, norm_relu(f"{name}_sepconv1_bn", y))
            y = norm(f"{name}_sepconv2_bn", y)
            # After the others: the order of Keras's layers, which is that of the published files.
            x = norm(f"batch_normalization{number}", Conv(second, 1, strides=2, name=f"conv2d{number}")(x))
            return x + max_pool(y, window=3, stride=2, padding=self.pool_padding)

        def first(name: str, x: jax.Array) -> jax.Array:
            x = Conv(self.stem[0], 3, strides=2, padding="VALID", name=f"{name}_conv1")(x)
            x = Conv(self.stem[1], 3, padding="VALID", name=f"{name}_conv2")(x, norm_relu(f"{name}_conv1_bn", x))
            return norm_relu(f"{name}_conv2_bn", x).of(x)

        def residual(name: str, x: jax.Array) -> jax.Array:
            y = separable(f"{name}_sepconv1", nn.relu(x), self.entry[-1])
            for i in (1, 2):
                y = separable(f"{name}_sepconv{i + 1}", y, self.entry[-1], norm_relu(f"{name}_sepconv{i}_bn", y))
            return x + norm(f"{name}_sepconv3_bn", y)

        def last(name: str, x: jax.Array) -> jax.Array:
            before = None
            for i, channels in enumerate(self.exit[1:], start=1):
                x = separable(f"{name}_sepconv{i}", x, channels, before)
                before = norm_relu(f"{name}_sepconv{i}_bn", x)
            return x if before is None else before.of(x)

        if min(x.shape[1:3]) < 7:
            raise ValueError(f"images are {x.shape[1]}x{x.shape[2]} pixels; expected at least 7x7")
        if self.dtype is not None:
            x = x.astype(self.dtype)
        names = iter(self.stages)
        name = next(names)
        x = tap(name, by_stage(self, name, functools.partial(first, name), x))
        for i, channels in enumerate(self.entry):
            name = next(names)
            block = functools.partial(halving, name, first=channels, second=channels, shortcut=i)
            x = tap(name, by_stage(self, name, block, x))
        for _ in range(self.middle):
            name = next(names)
            x = tap(name, by_stage(self, name, functools.partial(residual, name), x))
        name = next(names)
        widths = {"first": self.entry[-1], "second": self.exit[0]}
        block = functools.partial(halving, name, **widths, shortcut=len(self.entry))
        x = tap(name, by_stage(self, name, block, x))
        name = next(names)
        x = tap(name, by_stage(self, name, functools.partial(last, name), x))
        if self.include_top:
            x = global_average(x)
            x = nn.Dense(self.classes, dtype=x.dtype, name="predictions")(x)
        return x


VARIANTS: dict[str, Callable[..., Xception]] = {
    "xception": Xception,
    # Ours, without published weights: for small images on CPUs (a stride of 16 in all), and for tests.
    "xception_small": functools.partial(Xception, stem=(16, 32), entry=(64, 128), middle=3, exit=(192, 256, 320)),
    "xception_tiny": functools.partial(Xception, stem=(8, 16), entry=(24, 32), middle=1, exit=(48, 64, 64)),
}
PREPROCESS = "tf"
TIMM: dict[str, Any] = {"pool_padding": 1, "epsilon": 1e-5}


def timm_name(module: Xception, layer: str) -> str:
    """The path in timm's module of a layer, by the layer's name here.

    Raises:
      ValueError: the module has no such layer.
    """
    count, names = len(module.stages), {"predictions": "fc"}

    def add_separable(name: str, conv: str, norm: str) -> None:
        names.update({f"{name}_depthwise": f"{conv}.conv1", f"{name}_pointwise": f"{conv}.pointwise"})
        names[f"{name}_bn"] = norm

    for i in (1, 2):
        names |= {f"block1_conv{i}": f"conv{i}", f"block1_conv{i}_bn": f"bn{i}"}
        add_separable(f"block{count}_sepconv{i}", f"conv{i + 2}", f"bn{i + 2}")
    halving = [*range(2, len(module.entry) + 2), count - 1]
    for number in range(2, count):
        for i in range(2 if number in halving else 3):
            # A block is a list of ReLU, convolution, norm, ...; the first lacks the ReLU that begins the others.
            place = 3 * i + (number > 2)
            block = f"block{number - 1}.rep"
            add_separable(f"block{number}_sepconv{i + 1}", f"{block}.{place}", f"{block}.{place + 1}")
    for shortcut, number in enumerate(halving):
        suffix = f"_{shortcut}" if shortcut else ""
        names |= {f"conv2d{suffix}": f"block{number - 1}.skip"}
        names |= {f"batch_normalization{suffix}": f"block{number - 1}.skipbn"}
    if layer not in names:
        raise ValueError(f"layer is {layer!r}; expected one of Xception's")
    return names[layer]
