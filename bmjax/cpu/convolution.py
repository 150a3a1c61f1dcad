"""One convolution that takes, on CPUs, the formulation that measured fastest.

XLA's CPU backend is uneven: the gradient of a convolution with respect to its kernel transposes whole feature maps
first, where a matrix product over the same numbers needs no copy. So the forward pass and both gradients each choose
among formulations that are equal but for rounding. The choice is the fastest in `convolution_table.json` for the
nearest measured shape; tools/bench/tune_conv.py makes that table.

In the body of a loop gradients take a formulation other than XLA's own, where there is one: see `fits_loop`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from bmjax.cpu import build
from bmjax.cpu.formulations import Operation, Shape, formulations
from bmjax.cpu.order import after
from bmjax.layers.dispatch import in_loop, platform
from bmjax.layers.ops import DIMENSIONS, NO_PADDING, Pixels, in_pixels
from bmjax.layers.ops import plain_convolution as plain


def fits_loop(jaxpr: Any) -> bool:
    """Whether a (closed) jaxpr holds, at any depth, no convolution that XLA's CPU backend runs slowly in a loop.

    It runs one whose dimensions are in another order than the usual one, such as a gradient, many times slower in a
    loop than outside (jaxlib 0.10.2).
    """
    usual = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), DIMENSIONS)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "conv_general_dilated" and equation.params["dimension_numbers"] != usual:
            return False
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if (hasattr(inner, "eqns") or hasattr(inner, "jaxpr")) and not fits_loop(inner):
                return False
    return True


@functools.cache
def table() -> dict[str, Any]:
    """What tools/bench/tune_conv.py measured: {"machine", "command", "rows"}, a row {shape..., "operation", "ms"}."""
    return json.loads(resources.files("bmjax.cpu").joinpath("convolution_table.json").read_text())


def _distance(a: Shape, b: Shape) -> float:
    pairs = ((a.pixels, b.pixels), (a.inputs, b.inputs), (a.outputs, b.outputs), (a.size[0], b.size[0]))
    return sum(abs(math.log(m / n)) for m, n in pairs)


def shape_of_row(row: dict[str, Any]) -> Shape:
    """The shape that a row of the table is about."""
    return Shape(row["pixels"], tuple(row["size"]), tuple(row["strides"]), row["inputs"], row["outputs"], row["groups"])


@functools.cache
def choose(
    operation: Operation, shape: Shape, padding: Pixels, with_native: bool = False, in_loop: bool = False
) -> str:
    """The name of the formulation for CPUs: the fastest at the nearest measured shape of its kind, else "plain"."""
    valid = [name for name in formulations(operation, shape, padding) if with_native or name != "native"]
    if in_loop and operation != "forward" and len(valid) > 1:
        valid.remove("plain")
    rows = [row for row in table()["rows"] if row["operation"] == operation and shape_of_row(row).kind == shape.kind]
    ms = min(rows, key=lambda row: _distance(shape_of_row(row), shape))["ms"] if rows else {}
    unmeasured = "native" if "native" in valid and "plain" not in valid else valid[0]
    return min((name for name in ms if name in valid), key=ms.__getitem__, default=unmeasured)


def _name(operation: Operation, shape: Shape, padding: Pixels, dtype: Any) -> str:
    if platform() != "cpu":
        return "plain"
    return choose(operation, shape, padding, build.usable(dtype), in_loop())


def _chosen(operation: Operation, shape: Shape, padding: Pixels, dtype: Any) -> Callable[..., jax.Array]:
    return formulations(operation, shape, padding)[_name(operation, shape, padding, dtype)]


def _shape(y_shape: tuple[int, ...], kernel_shape: tuple[int, ...], strides: tuple[int, int], groups: int) -> Shape:
    kh, kw, c, n = kernel_shape
    return Shape(math.prod(y_shape[:-1]), (kh, kw), strides, c * groups, n, groups)


def by_kernel(
    operation: Operation,
    y: jax.Array | jax.ShapeDtypeStruct,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: Pixels,
    groups: int,
) -> bool:
    """Whether a kernel of bmjax/cpu/kernels is chosen for an operation on a convolution with the result y."""
    return _name(operation, _shape(y.shape, kernel_shape, strides, groups), padding, y.dtype) == "native"


def forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pixels, groups: int = 1) -> jax.Array:
    """As `plain`, in the formulation chosen for this platform; see `conv` for derivatives."""
    y = jax.eval_shape(lambda x, k: plain(x, k, strides, padding, groups), x, kernel)
    shape = _shape(y.shape, kernel.shape, strides, groups)
    return _chosen("forward", shape, padding, x.dtype)(x, kernel, strides, padding, groups)


def input_gradient(
    y_gradient: jax.Array,
    kernel: jax.Array,
    x_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: Pixels,
    groups: int = 1,
) -> jax.Array:
    """The gradient [b, h, w, c] of `plain` with respect to x, from that with respect to its result."""
    shape = _shape(y_gradient.shape, kernel.shape, strides, groups)
    return _chosen("input_gradient", shape, padding, y_gradient.dtype)(
        y_gradient, kernel, x_shape, strides, padding, groups
    )


def kernel_gradient(
    x: jax.Array,
    y_gradient: jax.Array,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: Pixels,
    groups: int = 1,
) -> jax.Array:
    """The gradient [kh, kw, c/groups, n] of `plain` with respect to the kernel, from that of its result."""
    shape = _shape(y_gradient.shape, kernel_shape, strides, groups)
    return _chosen("kernel_gradient", shape, padding, x.dtype)(x, y_gradient, kernel_shape, strides, padding, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, strides, padding, groups):
    return forward(x, kernel, strides, padding, groups)


def _conv_forward(x, kernel, strides, padding, groups):
    return forward(x, kernel, strides, padding, groups), (x, kernel)


def _conv_backward(strides, padding, groups, residuals, y_gradient):
    x, kernel = residuals
    into_kernel = kernel_gradient(x, y_gradient, kernel.shape, strides, padding, groups)
    if kernel.size < y_gradient.size:
        # The kernel's first: then what comes next needs neither x nor y's gradient.
        kernel = after(kernel, into_kernel)
    return input_gradient(y_gradient, kernel, x.shape, strides, padding, groups), into_kernel


_conv.defvjp(_conv_forward, _conv_backward)


def _rows_as_channels(x: jax.Array, kernel: jax.Array, padding: Pixels) -> jax.Array:
    """A convolution of stride 1 to one channel over a low, wide map, its rows taken as channels of a single row.

    A kernel of bmjax/cpu/kernels fills a register tile of outputs whether they are there or not; so rows fill it.
    """
    kh, h, (top, bottom) = kernel.shape[0], x.shape[1], padding[0]
    # Which row of the kernel meets an input row on behalf of an output row.
    below = np.arange(h)[:, None] + top - np.arange(h + top + bottom - kh + 1)
    met = (below >= 0) & (below < kh)
    rows = jnp.where(met[..., None, None], kernel[np.clip(below, 0, kh - 1), ..., 0], 0)  # [h, h', kw, c]
    y: Any = _conv(
        rearrange(x, "b h w c -> b 1 w (h c)"),
        rearrange(rows, "h out kw c -> 1 kw (h c) out"),
        (1, 1),
        (NO_PADDING[0], padding[1]),
        1,
    )
    return rearrange(y, "b 1 w out -> b out w 1")


def convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int] = (1, 1), padding: Pixels = NO_PADDING, groups: int = 1
) -> Any:
    """Takes the place of bmjax.layers.ops.convolution; shorter floats keep to XLA's own, which accumulates them in
    float32."""
    if x.dtype not in (jnp.float32, jnp.float64):
        return NotImplemented
    low = kernel.shape[0] > 1 and kernel.shape[3] == groups == 1 and x.shape[1] <= 16 and x.shape[2] >= 8 * x.shape[1]
    if low and strides == (1, 1):
        return _rows_as_channels(x, kernel, padding)
    return _conv(x, kernel, strides, padding, groups)


def dilated_convolution(x: jax.Array, kernel: jax.Array, dilation: int, groups: int = 1) -> Any:
    """Takes the place of bmjax.layers.ops.dilated_convolution.

    It is a plain one over each of dilation x dilation interleaved sub-images, so the table's choices apply.
    """
    if x.dtype not in (jnp.float32, jnp.float64) or 0 in (kernel.shape[0] % 2, kernel.shape[1] % 2):
        return NotImplemented
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, -h % dilation), (0, -w % dilation), (0, 0)))
    x = rearrange(x, "b (h i) (w j) c -> (b i j) h w c", i=dilation, j=dilation)
    around = in_pixels("SAME", (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1]), (1, 1))
    y = _conv(x, kernel, (1, 1), around, groups)
    whole: Any = rearrange(y, "(b i j) h w c -> b (h i) (w j) c", i=dilation, j=dilation)
    return whole[:, :h, :w]
