"""Layers that give the same numbers on any number of devices.

Under jit over a mesh a reduction over the batch is global by itself. Under pmap (or shard_map) a layer sees one
device's rows; it then sums over the axis `BATCH_AXIS`, which is bound there. Parameters are float32; a layer computes
in its `dtype`, or in that of its input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bmjax import convolution, formulations, native

BATCH_AXIS = "data"
"""Name of the device axis over which a batch is split, where it is bound."""

NormMode = Literal["train", "stats_frozen", "frozen"]
Tap = Callable[[str, jax.Array], jax.Array]
"""What a backbone calls on each stage's output, with the stage's name; what it returns goes on instead."""
Padding = str | int | Sequence[tuple[int, int]]
"""Of a convolution or a pool: "SAME" (as TensorFlow: more at the end where uneven), "VALID", or pixels before and after
per axis; a number is the same on all sides, as in torch."""
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def batch_axis_bound() -> bool:
    """Whether the code runs inside pmap or shard_map with the axis `BATCH_AXIS`."""
    return _axis_size() is not None


def _axis_size() -> int | None:
    try:
        return jax.lax.axis_size(BATCH_AXIS)
    except NameError:
        return None


def all_sum(x: Any) -> Any:
    """The sum over the devices that share a batch, of an array or a tree; x itself where there is no such axis."""
    return jax.lax.psum(x, BATCH_AXIS) if batch_axis_bound() else x


def all_reversed(x: jax.Array) -> jax.Array:
    """x [b, ...] of the global batch in reverse order; where devices share a batch, this device's part of that."""
    if not batch_axis_bound():
        return x[::-1]
    # Device i of d holds the batch's i-th stretch, so the reverse's is that of device d - 1 - i, reversed.
    everyone = jax.lax.all_gather(x, BATCH_AXIS)
    return everyone[everyone.shape[0] - 1 - jax.lax.axis_index(BATCH_AXIS)][::-1]


def at_least_float32(dtype: Any) -> Any:
    """float32 for a shorter float, else the type itself."""
    return jnp.promote_types(dtype, jnp.float32)


def over_channels(v: jax.Array, ndim: int) -> jax.Array:
    """[c] -> [1, ..., 1, c] with `ndim` axes: rank promotion is an error here, so it is written out."""
    return v.reshape((1,) * (ndim - 1) + v.shape)


class Kernel(nn.Module):
    """A convolution's kernel alone, for layers that compute it their own way: as `Conv`'s, float32."""

    @nn.compact
    def __call__(self, shape: tuple[int, int, int, int]) -> jax.Array:
        return self.param("kernel", he_normal, shape, jnp.float32)


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
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, h', w', features]; c and features divide by groups.

        Raises:
          ValueError: dilation with a stride or with other padding.
        """
        dtype = self.dtype or x.dtype
        size = (self.kernel_size, self.kernel_size) if isinstance(self.kernel_size, int) else self.kernel_size
        strides = (self.strides, self.strides) if isinstance(self.strides, int) else self.strides
        padding = _pixels(self.padding, (x.shape[1], x.shape[2]), size, strides)
        kernel = self.param("kernel", he_normal, (*size, x.shape[-1] // self.groups, self.features), jnp.float32)
        if self.dilation == 1:
            y = convolution.conv(x.astype(dtype), kernel.astype(dtype), strides, padding, self.groups)
        elif strides == (1, 1) and self.padding == "SAME":
            y = convolution.dilated(x.astype(dtype), kernel.astype(dtype), self.dilation, self.groups)
        else:
            raise ValueError(
                f"dilation {self.dilation} with strides {strides}, padding {self.padding!r}; expected stride 1, 'SAME'"
            )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + over_channels(bias.astype(dtype), y.ndim)
        return y


def _pixels(
    padding: Padding, spatial: tuple[int, int], size: tuple[int, int], strides: tuple[int, int]
) -> formulations.Padding:
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    return formulations.explicit_padding(
        padding if isinstance(padding, str) else tuple(padding), spatial, size, strides
    )


def batch_count(x: jax.Array) -> int:
    """How many values a channel of [..., c] has over the batch, on all devices."""
    return x.size // x.shape[-1] * (_axis_size() or 1)


def over_devices(mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the whole batch from those of its parts, one a device and of equal size."""
    devices = _axis_size()
    if devices is None:
        return mean, var
    whole = all_sum(mean) / devices
    return whole, all_sum(var + jnp.square(mean - whole)) / devices


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [c] of [..., c] over every axis but the last, on this device, in x's type.

    In two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    """
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x - over_channels(mean, x.ndim)).mean(axes)


def through_statistics(
    mean: jax.Array, gradients: tuple[jax.Array, jax.Array], count: int
) -> tuple[jax.Array, jax.Array]:
    """(shift, slope): the gradient of x that comes through its statistics over the batch is shift + slope * x.

    `gradients`: those of mean and variance on this device, each [c]; `count` as `batch_count` gives it.
    """
    # Every device's loss depends on statistics of the whole batch.
    dmean, dvar = all_sum(gradients)
    slope = 2 * dvar / count
    return dmean / count - slope * mean, slope


@jax.custom_vjp
def _statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return over_devices(*native.call("moments", moments, x))


def _statistics_forward(x):
    mean, var = _statistics(x)
    return (mean, var), (x, mean)


def _statistics_backward(residuals, gradients):
    x, mean = residuals
    shift, slope = through_statistics(mean, gradients, batch_count(x))
    return (over_channels(shift, x.ndim) + over_channels(slope, x.ndim) * x,)


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _is_map_on_cpu(x: jax.Array) -> bool:
    return x.ndim == 4 and convolution.platform() == "cpu" and native.usable(x.dtype)


def batch_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [c] of [..., c] over every axis but the last, and over the devices.

    Computed in at least float32.
    """
    if _is_map_on_cpu(x):
        return _statistics(x)
    return over_devices(*moments(x.astype(at_least_float32(x.dtype))))


def norm_affine(values: tuple[jax.Array, ...], epsilon: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Batch normalisation of an input in `dtype` as one affine map: (factor, offset), each [c], at least float32.

    `values`: scale, bias, mean and variance, each [c].
    """
    scale, bias, mean, var = (v.astype(at_least_float32(dtype)) for v in values)
    factor = scale * jax.lax.rsqrt(var + epsilon)
    return factor, bias - mean * factor


def apply_affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """factor * x + offset per channel of x [..., c], in the type of the factor."""
    return x.astype(factor.dtype) * over_channels(factor, x.ndim) + over_channels(offset, x.ndim)


def channel_sums(gradient: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of the gradient and of gradient * x over all but the channels."""
    axes = tuple(range(x.ndim - 1))
    return gradient.sum(axes), (gradient * x).sum(axes)


@jax.custom_vjp
def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return apply_affine(x, factor, offset)


def _affine_forward(x, factor, offset):
    return _affine(x, factor, offset), (x, factor)


def _affine_backward(residuals, gradient):
    x, factor = residuals
    total, total_x = native.call("channel_sums", channel_sums, gradient, x)
    return gradient * over_channels(factor, x.ndim), total_x, total


_affine.defvjp(_affine_forward, _affine_backward)


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
        if mode not in ("train", "stats_frozen", "frozen"):
            raise ValueError(f"batch-norm mode is {mode!r}; expected 'train', 'stats_frozen' or 'frozen'")
        variables = _norm_variables(self, x.shape[-1], self.momentum)
        scale, bias = variables.scale, variables.bias
        if train and mode == "train":
            mean, var = batch_statistics(x) if statistics is None else statistics
            variables.update(mean, var)
        else:
            mean, var = variables.mean.value, variables.var.value
        if mode == "frozen":
            scale, bias = jax.lax.stop_gradient((scale, bias))
        # One affine map over x: a fused pass that keeps only x for the backward one.
        affine = norm_affine((scale, bias, mean, var), self.epsilon, x.dtype)
        y = (_affine if _is_map_on_cpu(x) else apply_affine)(x, *affine)
        return y.astype(self.dtype or x.dtype)


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
        b, devices = x.shape[0], _axis_size()
        rest = (1 if axis in self.shared else n for axis, n in enumerate(x.shape[1:], start=1))
        shape = (b * (devices or 1), *rest)
        keep = jax.random.uniform(self.make_rng("dropout"), shape, jnp.float32) >= self.rate
        if devices is not None:
            keep = jax.lax.dynamic_slice_in_dim(keep, jax.lax.axis_index(BATCH_AXIS) * b, b)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


def global_average(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, c], summed in at least float32."""
    return x.astype(at_least_float32(x.dtype)).mean((1, 2))


def unit_mean(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """The mean over axes of numbers 0..1, which rounding does not take above one."""
    return jnp.minimum(x.mean(axes), 1)


def mean_and_deviation(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (biased) over axes, which are kept with length one, in at least float32.

    Where all values are equal the deviation is zero and passes no gradient: a square root's would be infinite.
    """
    x = x.astype(at_least_float32(x.dtype))
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    positive = variance > 0
    return mean, jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def max_pool(x: jax.Array, window: int, stride: int, padding: Padding) -> jax.Array:
    """The largest value of each square window: [b, h, w, c] -> [b, h', w', c]. Padded with -inf.

    The gradient goes to the first of equal values, row by row.
    """
    pads = _pixels(padding, (x.shape[1], x.shape[2]), (window, window), (stride, stride))
    if convolution.platform() == "cpu":
        return _max_pool(x, window, stride, pads)
    return _plain_max_pool(x, window, stride, pads)


def _plain_max_pool(x: jax.Array, window: int, stride: int, pads: formulations.Padding) -> jax.Array:
    sides = ((0, 0), *pads, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), sides)


# XLA's CPU backend scatters a pool's gradient one value at a time. Here a kernel gathers them, or, where there is none,
# each place of the window is one strided view.


def _pool_views(x: jax.Array, window: int, stride: int, pads: formulations.Padding) -> list[jax.Array]:
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    return formulations.views(x, (window, window), (stride, stride), formulations.NO_PADDING)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, stride, pads):
    return _plain_max_pool(x, window, stride, pads)


def _max_pool_forward(x, window, stride, pads):
    views = _pool_views(x, window, stride, pads)
    y = functools.reduce(jnp.maximum, views)
    place = jnp.zeros(y.shape, jnp.int8)
    for n in reversed(range(len(views))):
        place = jnp.where(views[n] == y, jnp.int8(n), place)
    return y, (place, x.shape)


def _max_pool_backward(window, stride, pads, residuals, gradient):
    place, (_, height, width, _) = residuals
    (top, _), (left, _) = pads

    def reference(gradient: jax.Array, place: jax.Array) -> jax.Array:
        zero = jnp.zeros((), gradient.dtype)

        def spread(n: int) -> jax.Array:
            """The gradients of the windows whose maximum was at place n, where they came from."""
            sides = [
                (start, size + before + after - start - (count - 1) * stride - 1, stride - 1)
                for start, size, (before, after), count in zip(
                    divmod(n, window), (height, width), pads, place.shape[1:3], strict=True
                )
            ]
            return lax.pad(jnp.where(place == n, gradient, zero), zero, ((0, 0, 0), *sides, (0, 0, 0)))

        total = functools.reduce(jnp.add, [spread(n) for n in range(window * window)])
        return total[:, top : top + height, left : left + width]

    return (native.call("max_pool_backward", reference, gradient, place, window=(window, stride, top, left)),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, but no less than 8 or nine tenths of the channels: as MobileNet and its followers."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is not above the limit: into how many groups n channels divide."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
