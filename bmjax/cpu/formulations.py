"""The ways to compute a convolution and its gradients: equal but for rounding, unequal in speed on CPUs.

bmjax/cpu/convolution.py chooses among them. Letters: x [b, h, w, c], kernel [kh, kw, c/groups, n], result
[b, h', w', n].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from bmjax.cpu import build
from bmjax.layers.ops import NO_PADDING, Pixels, views
from bmjax.layers.ops import plain_convolution as plain

Operation = Literal["forward", "input_gradient", "kernel_gradient"]


class Shape(NamedTuple):
    """What a choice depends on."""

    pixels: int
    """Of the output, over the batch."""
    size: tuple[int, int]
    strides: tuple[int, int]
    inputs: int
    outputs: int
    groups: int

    @property
    def kind(self) -> str:
        """Shapes are compared within a kind."""
        if self.groups > 1:
            depthwise = self.groups == self.inputs == self.outputs
            return f"depthwise stride {max(self.strides)}" if depthwise else "grouped"
        size = "1x1" if self.size == (1, 1) else "spatial"
        # A kernel of ours fills a register tile of outputs whether they are there or not.
        alone = " to one" if self.outputs == 1 else ""
        return f"{size} stride {max(self.strides)}{alone}"


# Every formulation computes the same as `plain` or a gradient of it. Of the arguments, those named `*_gradient` are
# cotangents; `x_shape` and `kernel_shape` say what the result looks like.


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _columns_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """[n, i], [n, j] -> [i, j], summed over n."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _patches(x: jax.Array, size: tuple[int, int], strides: tuple[int, int], padding: Pixels) -> jax.Array:
    """[b, h, w, c] -> [b h' w', kh kw c]."""
    stacked = jnp.stack(views(x, size, strides, padding), axis=3)
    return stacked.reshape(-1, math.prod(size) * x.shape[-1])


def _forward_dot(x, kernel, strides, padding, groups):
    del padding, groups
    x = x[:, :: strides[0], :: strides[1]]
    return (_rows(x) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def _forward_patches(x, kernel, strides, padding, groups):
    del groups
    size = kernel.shape[:2]
    y = _patches(x, size, strides, padding) @ kernel.reshape(-1, kernel.shape[-1])
    out = [(n + sum(p) - k) // s + 1 for n, p, k, s in zip(x.shape[1:3], padding, size, strides, strict=True)]
    return y.reshape(x.shape[0], *out, -1)


def _forward_taps(x, kernel, strides, padding, groups):
    del groups
    seen = views(x, kernel.shape[:2], strides, padding)
    weights = kernel.reshape(len(seen), 1, 1, 1, -1)
    return functools.reduce(jnp.add, [view * weight for view, weight in zip(seen, weights, strict=True)])


def _input_plain(y_gradient, kernel, x_shape, strides, padding, groups):
    x = jax.ShapeDtypeStruct(x_shape, y_gradient.dtype)
    return jax.linear_transpose(lambda x: plain(x, kernel, strides, padding, groups), x)(y_gradient)[0]


def _spread(
    y_gradient: jax.Array, x_shape: tuple[int, ...], size: tuple[int, int], strides: tuple[int, int], padding: Pixels
) -> jax.Array:
    """Zeros between and around a gradient [b, h', w', n], over which a turned kernel of stride 1 gives x's."""
    sides = []
    for n, m, k, s, (before, _) in zip(x_shape[1:3], y_gradient.shape[1:3], size, strides, padding, strict=True):
        low = k - 1 - before
        sides.append((low, n + k - 2 - low - (m - 1) * s, s - 1))
    return lax.pad(y_gradient, jnp.zeros((), y_gradient.dtype), ((0, 0, 0), *sides, (0, 0, 0)))


def _input_dot(y_gradient, kernel, x_shape, strides, padding, groups):
    del groups
    x_gradient = (_rows(y_gradient) @ kernel[0, 0].T).reshape(*y_gradient.shape[:-1], x_shape[-1])
    return _spread(x_gradient, x_shape, (1, 1), strides, padding)


def _input_patches(y_gradient, kernel, x_shape, strides, padding, groups):
    del groups
    size = kernel.shape[:2]
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2).reshape(-1, kernel.shape[2])
    spread = _spread(y_gradient, x_shape, size, strides, padding)
    return (_patches(spread, size, (1, 1), NO_PADDING) @ turned).reshape(x_shape)


def _input_taps(y_gradient, kernel, x_shape, strides, padding, groups):
    spread = _spread(y_gradient, x_shape, kernel.shape[:2], strides, padding)
    return _forward_taps(spread, kernel[::-1, ::-1], (1, 1), NO_PADDING, groups)


def _kernel_plain(x, y_gradient, kernel_shape, strides, padding, groups):
    kernel = jax.ShapeDtypeStruct(kernel_shape, x.dtype)
    return jax.linear_transpose(lambda k: plain(x, k, strides, padding, groups), kernel)(y_gradient)[0]


def _kernel_dot(x, y_gradient, kernel_shape, strides, padding, groups):
    del padding, groups
    x = x[:, :: strides[0], :: strides[1]]
    return _columns_product(_rows(y_gradient), _rows(x)).T.reshape(kernel_shape)


def _kernel_patches(x, y_gradient, kernel_shape, strides, padding, groups):
    del groups
    return _columns_product(_patches(x, kernel_shape[:2], strides, padding), _rows(y_gradient)).reshape(kernel_shape)


def _kernel_gradient_patches(x, y_gradient, kernel_shape, strides, padding, groups):
    """Patches of the gradient instead of the input: fewer numbers where the outputs are few."""
    del groups
    kh, kw, c, n = kernel_shape
    patches = _patches(_spread(y_gradient, x.shape, (kh, kw), strides, padding), (kh, kw), (1, 1), NO_PADDING)
    product = _columns_product(_rows(x), patches).reshape(c, kh, kw, n)
    return product[:, ::-1, ::-1].transpose(1, 2, 0, 3)


def _kernel_taps(x, y_gradient, kernel_shape, strides, padding, groups):
    del groups
    seen = views(x, kernel_shape[:2], strides, padding)
    return jnp.stack([(view * y_gradient).sum((0, 1, 2)) for view in seen]).reshape(kernel_shape)


def _kernel_products(x, y_gradient, kernel_shape, strides, padding, groups):
    """A matrix product for each group, where XLA's own is a plain loop."""
    size = kernel_shape[:2]
    seen = rearrange(jnp.stack(views(x, size, strides, padding)), "t b h w (g c) -> g (b h w) (t c)", g=groups)
    product = seen.mT @ rearrange(y_gradient, "b h w (g n) -> g (b h w) n", g=groups)
    return rearrange(product, "g (i j c) n -> i j c (g n)", i=size[0], j=size[1])


# Of one channel: without the axis of channels, and a row of places last, where vectors go along it.


def _planes(x: jax.Array, size: tuple[int, int], strides: tuple[int, int], padding: Pixels) -> list[jax.Array]:
    """As `views`, of x [b, h, w, 1]: each [b, h', w'], or [b, h'] where w is 1."""
    column = x.shape[2] == 1 and size[1] == 1 and padding[1] == (0, 0)
    sizes, pads, steps = (size, padding, strides) if not column else (size[:1], padding[:1], strides[:1])
    x = jnp.pad(x[..., 0, 0] if column else x[..., 0], ((0, 0), *pads))
    ends = [(n - k) // s * s + 1 for n, k, s in zip(x.shape[1:], sizes, steps, strict=True)]
    return [
        lax.slice(x, (0, *at), (len(x), *(i + end for i, end in zip(at, ends, strict=True))), (1, *steps))
        for at in np.ndindex(*sizes)
    ]


def _forward_planes(x, kernel, strides, padding, groups):
    del groups
    seen = _planes(x, kernel.shape[:2], strides, padding)
    y = functools.reduce(jnp.add, [view * weight for view, weight in zip(seen, kernel.reshape(-1), strict=True)])
    return y.reshape(*y.shape, *(1,) * (4 - y.ndim))


def _input_planes(y_gradient, kernel, x_shape, strides, padding, groups):
    spread = _spread(y_gradient, x_shape, kernel.shape[:2], strides, padding)
    return _forward_planes(spread, kernel[::-1, ::-1], (1, 1), NO_PADDING, groups)


def _kernel_planes(x, y_gradient, kernel_shape, strides, padding, groups):
    del groups
    seen = _planes(x, kernel_shape[:2], strides, padding)
    return jnp.stack([(view * y_gradient.reshape(view.shape)).sum() for view in seen]).reshape(kernel_shape)


# The kernels of bmjax/cpu/kernels, on CPUs and in float32.


def window_of(strides: tuple[int, int], padding: Pixels) -> tuple[int, int, int, int]:
    """A convolution's strides and padding before, as the kernels take them."""
    return *strides, padding[0][0], padding[1][0]


def _depthwise(kernel_shape: tuple[int, ...], groups: int) -> bool:
    """Whether each channel is convolved by itself."""
    return groups > 1 and kernel_shape[2] == 1 and kernel_shape[3] == groups


def forward_native(x, kernel, strides, padding, groups):
    reference = functools.partial(plain, strides=strides, padding=padding, groups=groups)
    window = window_of(strides, padding)
    if _depthwise(kernel.shape, groups):
        return build.call("depthwise_conv", reference, x, kernel, window=window, back=False)
    return build.call("conv", reference, x, kernel, window=window, turned=False)


def input_native(y_gradient, kernel, x_shape, strides, padding, groups):
    reference = functools.partial(_input_plain, x_shape=x_shape, strides=strides, padding=padding, groups=groups)
    if _depthwise(kernel.shape, groups):
        window = window_of(strides, padding)
        like = jax.ShapeDtypeStruct(x_shape, y_gradient.dtype)
        return build.call("depthwise_conv", reference, y_gradient, kernel, like=like, window=window, back=True)
    if strides != (1, 1):  # 1x1: the gradient of the pixels that it sees
        small = (*y_gradient.shape[:-1], x_shape[-1])
        return _spread(
            input_native(y_gradient, kernel, small, (1, 1), padding, groups), x_shape, (1, 1), strides, padding
        )
    (top, _), (left, _) = padding
    around = (kernel.shape[0] - 1 - top, kernel.shape[1] - 1 - left)
    like = jax.ShapeDtypeStruct(x_shape, y_gradient.dtype)
    return build.call("conv", reference, y_gradient, kernel, like=like, window=(1, 1, *around), turned=True)


def kernel_native(x, y_gradient, kernel_shape, strides, padding, groups):
    reference = functools.partial(
        _kernel_plain, kernel_shape=kernel_shape, strides=strides, padding=padding, groups=groups
    )
    name = "depthwise_conv_kernel_gradient" if _depthwise(kernel_shape, groups) else "conv_kernel_gradient"
    like = jax.ShapeDtypeStruct(kernel_shape, x.dtype)
    return build.call(name, reference, x, y_gradient, like=like, window=window_of(strides, padding))


def _turnable(shape: Shape, padding: Pixels) -> bool:
    """Stride 1, and no more padding than the kernel reaches."""
    return shape.strides == (1, 1) and all(p < k for pair, k in zip(padding, shape.size, strict=True) for p in pair)


def formulations(operation: Operation, shape: Shape, padding: Pixels) -> dict[str, Callable[..., jax.Array]]:
    """The formulations that are valid for a convolution, by name; "plain", XLA's own, always first."""
    pointwise = shape.size == (1, 1) and shape.groups == 1 and padding == NO_PADDING
    depthwise = shape.kind.startswith("depthwise")
    spatial = shape.groups == 1 and not pointwise
    single = spatial and shape.inputs == shape.outputs == 1
    candidates: dict[str, tuple[bool, Callable[..., jax.Array]]]
    if operation == "forward":
        candidates = {
            "plain": (True, plain),
            "dot": (pointwise, _forward_dot),
            "patches": (spatial, _forward_patches),
            "taps": (depthwise, _forward_taps),
            "planes": (single, _forward_planes),
            "native": (shape.groups == 1 or depthwise, forward_native),
        }
    elif operation == "input_gradient":
        candidates = {
            "plain": (True, _input_plain),
            "dot": (pointwise, _input_dot),
            "patches": (spatial and _turnable(shape, padding), _input_patches),
            "taps": (depthwise, _input_taps),
            "planes": (single and _turnable(shape, padding), _input_planes),
            "native": (pointwise or depthwise or (spatial and _turnable(shape, padding)), input_native),
        }
    else:
        candidates = {
            "plain": (True, _kernel_plain),
            "dot": (pointwise, _kernel_dot),
            "patches": (spatial, _kernel_patches),
            "gradient_patches": (spatial and _turnable(shape, padding), _kernel_gradient_patches),
            "taps": (depthwise, _kernel_taps),
            "planes": (single, _kernel_planes),
            "products": (shape.kind == "grouped", _kernel_products),
            "native": (shape.groups == 1 or depthwise, kernel_native),
        }
    return {name: fn for name, (valid, fn) in candidates.items() if valid}
