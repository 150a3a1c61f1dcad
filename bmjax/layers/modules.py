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


def _convolved(
    x: jax.Array,
    kernel: jax.Array,
    before: Before | None,
    dtype: Any,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    groups: int = 1,
    dilation: int = 1,
) -> jax.Array:
    """A `Conv` of that kernel, without its bias."""
    strides = (strides, strides) if isinstance(strides, int) else strides
    spatial = (x.shape[1], x.shape[2])
    if padding == "SAME" and strides == (1, 1) and kernel.shape[0] % 2 == kernel.shape[1] % 2 == 1:
        kernel = within_reach(kernel, spatial, dilation)
    pixels = in_pixels(padding, spatial, (kernel.shape[0], kernel.shape[1]), strides)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if before is not None and dilation == 1:
        fixed = operations.Convolution(before.activation, strides, pixels, groups)
        gate = () if before.gate is None else (before.gate.astype(dtype),)
        return operations.normed_convolution(fixed, x, before.factor, before.offset, kernel, *gate)
    if dilation == 1:
        return convolution(x, kernel, strides, pixels, groups)
    if strides == (1, 1) and padding == "SAME" and before is None:
        return dilated_convolution(x, kernel, dilation, groups)
    raise ValueError(
        f"dilation {dilation} with strides {strides}, padding {padding!r}; expected stride 1, 'SAME'"
        + (", and nothing before it" if before is not None else "")
    )


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
        kernel = self.param("kernel", he_normal, (*size, x.shape[-1] // self.groups, self.features), jnp.float32)
        how: Any = {"strides": self.strides, "padding": self.padding, "groups": self.groups, "dilation": self.dilation}
        y = _convolved(x, kernel, before, dtype, **how)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + over_channels(bias.astype(dtype), y.ndim)
        return y


def conv_apart(
    x: jax.Array,
    features: int,
    size: int = 1,
    *,
    strides: int = 1,
    padding: Padding = "SAME",
    use_bias: bool,
    name: str,
    before: Before | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """What a `Conv` gives before its bias [features] is added, and that bias, where it has one: for a norm's `shift`.

    Called inside a Linen module, whose layer of that name it is.
    """
    kernel, bias = ConvVariables(use_bias, name=name)((size, size, x.shape[-1], features))
    with jax.named_scope(name):
        return _convolved(x, kernel, before, x.dtype, strides=strides, padding=padding), bias


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
        shift: jax.Array | None = None,
    ) -> jax.Array:
        """[..., c] -> [..., c].

        `statistics`: the batch's, where the caller has them already (`batch_statistics`); only used by a norm that
        normalises by the batch. `shift` [c]: normalises x + shift, without a pass over x for it: a norm by the batch
        takes it off again, so that it moves the running mean alone and has no gradient.

        Raises:
          ValueError: the mode is not one of the three.
        """
        variables = _norm_variables(self, x.shape[-1], self.momentum)
        # One affine map over x: a fused pass that keeps only x for the backward one.
        y = affine(x, *_affine_of(variables, x, self.epsilon, train, mode, statistics, shift))
        return y.astype(self.dtype or x.dtype)


def _affine_of(
    variables: NormVariables,
    x: jax.Array,
    epsilon: float,
    train: bool,
    mode: NormMode,
    statistics: tuple[jax.Array, jax.Array] | None = None,
    shift: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A norm of x + shift as (factor, offset) for x; its running statistics are updated as the mode says."""
    if mode not in ("train", "stats_frozen", "frozen"):
        raise ValueError(f"batch-norm mode is {mode!r}; expected 'train', 'stats_frozen' or 'frozen'")
    scale, bias = variables.scale, variables.bias
    if train and mode == "train":
        mean, var = batch_statistics(x) if statistics is None else statistics
        variables.update(mean if shift is None else mean + shift, var)
    else:
        mean, var = variables.mean.value, variables.var.value
        mean = mean if shift is None else mean - shift
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
    shift: jax.Array | None = None,
) -> Before:
    """A `BatchNorm` of x [..., c], with its `shift`, and an activation, for a `Conv` to take x through first.

    Called inside a Linen module, whose norm of that name it is.
    """
    variables = BatchNormVariables(momentum, name=name)(x.shape[-1])
    return Before(*_affine_of(variables, x, epsilon, train, mode, shift=shift), activation)


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
