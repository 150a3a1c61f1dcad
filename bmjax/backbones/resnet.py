"""ResNet (He et al. 2016, https://arxiv.org/abs/1512.03385) with bottlenecks, as in keras.applications and with its
layer names.

Keras's is the paper's: a stage halves in the first 1x1 convolution of its first block, and convolutions have biases,
which the norms behind them cancel in training. Torch's and timm's (v1.5) halves in the 3x3, and has no biases.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from bmjax.layers import (
    BatchNorm,
    Before,
    NormMode,
    Tap,
    by_stage,
    conv_apart,
    conv_norm,
    global_average,
    max_pool,
    norm_before,
)


class ResNet(nn.Module):
    """The family; `blocks` is the number of bottleneck blocks in each stage."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    """Channels of the first convolution and of the first stage's bottlenecks; those double from stage to stage."""
    stride_in_3x3: bool = False
    """Whether a stage halves in the 3x3 convolution of its first block (v1.5), not in the first 1x1."""
    use_bias: bool = True
    """Whether convolutions have biases."""
    include_top: bool = False
    classes: int = 1000
    """Classes of the top, where it is included."""
    epsilon: float = 1.001e-5
    dtype: Any = None
    """Compute type; None: the input's."""

    @property
    def stages(self) -> tuple[str, ...]:
        """conv1 is the first convolution, then a stage of blocks each, after its last ReLU."""
        return tuple(f"conv{i}" for i in range(1, len(self.blocks) + 2))

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
        conv = functools.partial(conv_apart, use_bias=self.use_bias)
        # Not where parameters are made, whose order is that of the published files.
        in_units = not train and not self.is_initializing()

        def norm(name: str, x: jax.Array, bias: jax.Array | None) -> jax.Array:
            return BatchNorm(epsilon=self.epsilon, name=name)(x, train=train, mode=mode, shift=bias)

        def norm_relu(name: str, x: jax.Array, bias: jax.Array | None) -> Before:
            """Norm and ReLU of x + bias, for what takes x next."""
            options = {"name": name, "epsilon": self.epsilon, "shift": bias}
            return norm_before(x, nn.relu, train=train, mode=mode, **options)

        def unit(name: str, x: jax.Array, features: int, size: int, stride: int = 1, **options: Any) -> jax.Array:
            """Convolution, norm by its running statistics, ReLU, as one operation."""
            names = {"conv": f"{name}_conv", "norm": f"{name}_bn"}
            return conv_norm(
                x, features, size, stride, **names, use_bias=self.use_bias, epsilon=self.epsilon, **options
            )

        def block(name: str, x: jax.Array, width: int, stride: int, project: bool) -> jax.Array:
            first, second = (1, stride) if self.stride_in_3x3 else (stride, 1)
            if in_units:
                y = unit(f"{name}_2", unit(f"{name}_1", x, width, 1, first), width, 3, second)
                if project:
                    x = unit(f"{name}_0", x, 4 * width, 1, stride, relu=False)
                return unit(f"{name}_3", y, 4 * width, 1, add=x)
            y, bias = conv(x, width, strides=first, name=f"{name}_1_conv")
            before = norm_relu(f"{name}_1_bn", y, bias)
            y, bias = conv(y, width, 3, strides=second, padding=1, name=f"{name}_2_conv", before=before)
            before = norm_relu(f"{name}_2_bn", y, bias)
            # In the order of Keras's layers, which is that of the published files.
            projected = conv(x, 4 * width, strides=stride, name=f"{name}_0_conv") if project else None
            y, bias = conv(y, 4 * width, name=f"{name}_3_conv", before=before)
            if projected is not None:
                x = norm(f"{name}_0_bn", *projected)
            return nn.relu(x + norm(f"{name}_3_bn", y, bias))

        def stem(x: jax.Array) -> jax.Array:
            if in_units:
                return unit("conv1", x, self.width, 7, 2)
            x, bias = conv(x, self.width, 7, strides=2, padding=3, name="conv1_conv")
            return norm_relu("conv1_bn", x, bias).of(x)

        def stage(x: jax.Array, number: int, blocks: int) -> jax.Array:
            for i in range(blocks):
                stride = 2 if i == 0 and number > 2 else 1
                x = block(f"conv{number}_block{i + 1}", x, self.width * 2 ** (number - 2), stride, project=i == 0)
            return x

        if self.dtype is not None:
            x = x.astype(self.dtype)
        x = tap("conv1", by_stage(self, "conv1", stem, x))
        # Pads with -inf where Keras pads with zero: the same after a ReLU.
        x = max_pool(x, window=3, stride=2, padding=1)
        for number, blocks in enumerate(self.blocks, start=2):
            name = f"conv{number}"
            x = tap(name, by_stage(self, name, functools.partial(stage, number=number, blocks=blocks), x))
        if self.include_top:
            x = global_average(x)
            x = nn.Dense(self.classes, dtype=x.dtype, name="predictions")(x)
        return x


VARIANTS: dict[str, Callable[..., ResNet]] = {
    "resnet50": functools.partial(ResNet, blocks=(3, 4, 6, 3)),
    "resnet101": functools.partial(ResNet, blocks=(3, 4, 23, 3)),
    "resnet152": functools.partial(ResNet, blocks=(3, 8, 36, 3)),
    # Ours, without published weights: for small images on CPUs, and for tests. v1.5, which is the more accurate.
    "resnet_small": functools.partial(ResNet, blocks=(2, 2, 2), width=16, stride_in_3x3=True, use_bias=False),
    "resnet_tiny": functools.partial(ResNet, blocks=(1, 1, 1), width=8, stride_in_3x3=True, use_bias=False),
}
PREPROCESS = "caffe"
TIMM: dict[str, Any] = {"stride_in_3x3": True, "use_bias": False, "epsilon": 1e-5}


def timm_name(module: ResNet, layer: str) -> str:
    """The path in timm's module of a layer, by the layer's name here.

    Raises:
      ValueError: the module has no such layer.
    """
    del module
    simple = {"conv1_conv": "conv1", "conv1_bn": "bn1", "predictions": "fc"}
    if layer in simple:
        return simple[layer]
    if match := re.fullmatch(r"conv(\d+)_block(\d+)_([0123])_(conv|bn)", layer):
        stage, block, place, kind = int(match[1]), int(match[2]), match[3], match[4]
        name = {"0conv": "downsample.0", "0bn": "downsample.1"}.get(place + kind, kind + place)
        return f"layer{stage - 1}.{block - 1}.{name}"
    raise ValueError(f"layer is {layer!r}; expected one of ResNet's")
