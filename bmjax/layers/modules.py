"""Layers that give the same numbers on any number of devices.

Parameters are float32; a layer computes in its `dtype`, or in that of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.layers import norm as operations
from bmjax.layers.collectives import BATCH_AXIS, axis_size
from bmjax.layers.initial import he_normal
from bmjax.layers.norm import Before, affine, batch_statistics, norm_affine
from bmjax.layers.ops import Padding, convolution, dilated_convolution, in_pixels, over_channels, within_reach

NormMode = Literal["train", "stats_frozen", "frozen"]

Tap = Callable[[str, jax.Array], jax.Array]
"""What a backbone calls on each stage's output, with the stage's name; what it returns goes on instead."""


class ConvVariables(nn.Module):
    """What a `Conv` of that name would have, for layers that compute it their own way: (kernel, bias or None)."""

    use_bias: bool = False

    @nn.compact
    def __call__(self, shape: tuple[int, int, int, int]) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", he_normal, shape, jnp.float32)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros_init(), shape[-1:], jnp.float32)


class Conv(nn.Module):
    """Convolution, NHWC, kernel HWIO."""

    features: int
    kernel_size: int | tuple[int, int] = 1
    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"
    use_bias: bool = False
    groups: int = 1
    dilation: int = 1
    """Distance between the places that the kernel sees; above one only with stride 1 and padding "SAME"."""
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, before: Before | None = None) -> jax.Array:
        """[b, h, w, c] -> [b, h', w', features]; c and features divide by groups.

        `before`: what x goes through first. On CPUs that is computed again on the way back instead of being kept.

        Raises:
          ValueError: dilation with a stride, with other padding, with a kernel of an even side, or with `before`.
        """
        dtype = self.dtype or x.dtype
        size = (self.kernel_size, self.kernel_size) if isinstance(self.kernel_size, int) else self.kernel_size
        strides = (self.strides, self.strides) if isinstance(self.strides, int) else self.strides
        spatial = (x.shape[1], x.shape[2])
        kernel = self.param("kernel", he_normal, (*size, x.shape[-1] // self.groups, self.features), jnp.float32)
        if self.padding == "SAME" and strides == (1, 1) and size[0] % 2 == size[1] % 2 == 1:
            kernel = within_reach(kernel, spatial, self.dilation)
        padding = in_pixels(self.padding, spatial, (kernel.shape[0], kernel.shape[1]), strides)
        if before is not None and self.dilation == 1:
            fixed = operations.Convolution(before.activation, strides, padding, self.groups)
            gate = () if before.gate is None else (before.gate.astype(dtype),)
            y = operations.normed_convolution(
                fixed, x.astype(dtype), before.factor, before.offset, kernel.astype(dtype), *gate
            )
        elif self.dilation == 1:
            y = convolution(x.astype(dtype), kernel.astype(dtype), strides, padding, self.groups)
        elif strides == (1, 1) and self.padding == "SAME" and before is None:
            y = dilated_convolution(x.astype(dtype), kernel.astype(dtype), self.dilation, self.groups)
        else:
            raise ValueError(
                f"dilation {self.dilation} with strides {strides}, padding {self.padding!r}; expected stride 1, 'SAME'"
                + (", and nothing before it" if before is not None else "")
            )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + over_channels(bias.astype(dtype), y.ndim)
        return y


class NormVariables(NamedTuple):
    """Parameters and running statistics of a batch-norm, each [c]."""

    scale: jax.Array
    bias: jax.Array
    mean: nn.Variable
    var: nn.Variable
    momentum: float
    initializing: bool

    def update(self, mean: jax.Array, var: jax.Array) -> None:
        """Moves the running statistics towards a batch's, but not while the module is initialised."""
        if self.initializing:
            return
        for running, new in ((self.mean, mean), (self.var, var)):
            kept = self.momentum * running.value + (1 - self.momentum) * new
            running.value = kept.astype(running.value.dtype)


def _norm_variables(module: nn.Module, channels: int, momentum: float) -> NormVariables:
    return NormVariables(
        module.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32),
        module.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32),
        module.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32),
        module.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32),
        momentum,
        module.is_initializing(),
    )


class BatchNormVariables(nn.Module):
    """What a `BatchNorm` of that name would have, for layers that compute it their own way."""

    momentum: float = 0.99

    @nn.compact
    def __call__(self, channels: int) -> NormVariables:
        return _norm_variables(self, channels, self.momentum)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) as in Keras: biased running variance, one explicit mode.

    Modes, where `train` is set: `train` normalises by the batch and updates the running statistics; `stats_frozen`
    normalises by the running ones and leaves them; `frozen` does so too and passes scale and bias no gradient.
    Without `train` all three are the same. Parameters scale and bias, batch_stats mean and var, all [c].
    """

    momentum: float = 0.99
    epsilon: float = 1e-3
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool = False,
        mode: NormMode = "train",
        statistics: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """[..., c] -> [..., c].

        `statistics`: the batch's, where the caller has them already (`batch_statistics`); only used by a norm that
        normalises by the batch.

        Raises:
          ValueError: the mode is not one of the three.
        """
        variables = _norm_variables(self, x.shape[-1], self.momentum)
        # One affine map over x: a fused pass that keeps only x for the backward one.
        y = affine(x, *_affine_of(variables, x, self.epsilon, train, mode, statistics))
        return y.astype(self.dtype or x.dtype)


def _affine_of(
    variables: NormVariables,
    x: jax.Array,
    epsilon: float,
    train: bool,
    mode: NormMode,
    statistics: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A norm of x as (factor, offset); its running statistics are updated as the mode says."""
    if mode not in ("train", "stats_frozen", "frozen"):
        raise ValueError(f"batch-norm mode is {mode!r}; expected 'train', 'stats_frozen' or 'frozen'")
    scale, bias = variables.scale, variables.bias
    if train and mode == "train":
        mean, var = batch_statistics(x) if statistics is None else statistics
        variables.update(mean, var)
    else:
        mean, var = variables.mean.value, variables.var.value
    if mode == "frozen":
        scale, bias = jax.lax.stop_gradient((scale, bias))
    return norm_affine((scale, bias, mean, var), epsilon, x.dtype)


def norm_before(
    x: jax.Array,
    activation: operations.Activation,
    *,
    name: str,
    epsilon: float,
    momentum: float = 0.99,
    train: bool,
    mode: NormMode,
) -> Before:
    """A `BatchNorm` of x [..., c] and an activation, for a `Conv` to take x through first.

    Called inside a Linen module, whose norm of that name it is.
    """
    variables = BatchNormVariables(momentum, name=name)(x.shape[-1])
    return Before(*_affine_of(variables, x, epsilon, train, mode), activation)


def conv_norm(
    x: jax.Array,
    features: int,
    size: int,
    stride: int,
    *,
    conv: str,
    norm: str,
    use_bias: bool,
    epsilon: float,
    relu: bool = True,
    add: jax.Array | None = None,
) -> jax.Array:
    """What `Conv` and then `BatchNorm`, by its running statistics, give of x [b, h, w, c], plus `add`, and the ReLU of
    it: [b, h', w', features], padded as torch does, by half the size.

    Called inside a Linen module, whose layers of the names `conv` and `norm` these are.
    """
    kernel, bias = ConvVariables(use_bias, name=conv)((size, size, x.shape[-1], features))
    v = BatchNormVariables(name=norm)(features)
    factor, offset = norm_affine((v.scale, v.bias, v.mean.value, v.var.value), epsilon, x.dtype)
    if bias is not None:
        offset = offset + factor * bias
    padding = in_pixels(size // 2, (x.shape[1], x.shape[2]), (size, size), (stride, stride))
    added = () if add is None else (add,)
    fixed = operations.Around((stride, stride), padding, relu)
    return operations.conv_norm(fixed, x, kernel.astype(x.dtype), factor, offset, *added)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): zeroes a share `rate` of the values and divides the others by 1 - rate.

    The mask of the whole batch is drawn and each device takes its rows, so it is the same on any number of devices;
    drawn in float32, so it is the same in every compute type. Needs the rng "dropout".
    """

    rate: float
    shared: tuple[int, ...] = ()
    """Axes along which values are kept or zeroed together: (1, 2, 3) of [b, h, w, c] drops whole images (stochastic
    depth)."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, ...] -> [b, ...]; x itself unless `train`."""
        if not train or self.rate == 0:
            return x
        b, devices = x.shape[0], axis_size()
        rest = (1 if axis in self.shared else n for axis, n in enumerate(x.shape[1:], start=1))
        shape = (b * (devices or 1), *rest)
        keep = jax.random.uniform(self.make_rng("dropout"), shape, jnp.float32) >= self.rate
        if devices is not None:
            keep = jax.lax.dynamic_slice_in_dim(keep, jax.lax.axis_index(BATCH_AXIS) * b, b)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))
