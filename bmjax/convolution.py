"""One convolution that takes, on CPUs, the formulation that measured fastest; elsewhere it is XLA's own.

XLA's CPU backend is uneven: the gradient of a convolution with respect to its kernel transposes whole feature maps
first, where a matrix product over the same numbers needs no copy. So the forward pass and both gradients each choose
among formulations that are equal but for rounding. The choice is the fastest in `convolution_table.json` for the
nearest measured shape; tools/tune_conv.py makes that table. On GPUs and TPUs there is no choice, and no trace of it in
the lowered program.

Derivatives of any order work in reverse mode and forward-over-reverse; plain forward mode (`jax.jvp` of the
convolution itself) does not on CPUs, as with any `jax.custom_vjp`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from bmjax import native

Operation = Literal["forward", "input_gradient", "kernel_gradient"]
Padding = tuple[tuple[int, int], tuple[int, int]]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
NO_PADDING: Padding = ((0, 0), (0, 0))
_platform: list[str] = []
_in_loop: list[bool] = []


def platform() -> str:
    """The platform that code is being traced for: "cpu", "gpu", "tpu"."""
    return _platform[-1] if _platform else jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Traces what is inside for another platform: for tests, ahead-of-time lowering and comparisons.

    `traced_for("gpu")` on a CPU gives XLA's own convolution throughout. What jit has traced before it does not trace
    anew.
    """
    _platform.append(name)
    try:
        yield
    finally:
        _platform.pop()


@contextlib.contextmanager
def inside_loop() -> Iterator[None]:
    """Traces what is inside for the body of a loop (`lax.scan`), as far as CPUs are concerned.

    XLA's CPU backend runs a convolution whose dimensions are in another order than the usual one, such as a gradient,
    many times slower in a loop than outside (jaxlib 0.10.2). So here gradients take a formulation other than XLA's own,
    where there is one.
    """
    _in_loop.append(True)
    try:
        yield
    finally:
        _in_loop.pop()


def slow_in_loop(jaxpr: Any) -> bool:
    """Whether a (closed) jaxpr holds, at any depth, a convolution that XLA's CPU backend runs slowly in a loop."""
    if platform() != "cpu":
        return False
    usual = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), DIMENSIONS)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "conv_general_dilated" and equation.params["dimension_numbers"] != usual:
            return True
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if (hasattr(inner, "eqns") or hasattr(inner, "jaxpr")) and slow_in_loop(inner):
                return True
    return False


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
        if self.size == (1, 1):
            return f"1x1 stride {max(self.strides)}"
        return f"spatial stride {max(self.strides)}"


def plain(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding, groups: int = 1) -> jax.Array:
    """XLA's convolution of x [b, h, w, c] with a kernel [kh, kw, c/groups, n] -> [b, h', w', n]."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def explicit_padding(
    padding: str | tuple[tuple[int, int], ...],
    spatial: tuple[int, int],
    size: tuple[int, int],
    strides: tuple[int, int],
) -> Padding:
    """ "SAME" or "VALID" as pixels before and after, per axis."""
    pairs = lax.padtype_to_pads(spatial, size, strides, padding) if isinstance(padding, str) else padding
    (top, bottom), (left, right) = pairs
    return (top, bottom), (left, right)


# Every formulation computes the same as `plain` or a gradient of it. Of the arguments, those named `*_gradient` are
# cotangents; `x_shape` and `kernel_shape` say what the result looks like.


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _columns_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """[n, i], [n, j] -> [i, j], summed over n."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def views(x: jax.Array, size: tuple[int, int], strides: tuple[int, int], padding: Padding) -> list[jax.Array]:
    """For each place in a kernel of that size, row by row, what it sees of x [b, h, w, c]: [b, h', w', c]."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    b, h, w, c = x.shape
    (kh, kw), (sh, sw) = size, strides
    out_h, out_w = (h - kh) // sh + 1, (w - kw) // sw + 1
    return [
        lax.slice(x, (0, i, j, 0), (b, i + (out_h - 1) * sh + 1, j + (out_w - 1) * sw + 1, c), (1, sh, sw, 1))
        for i in range(kh)
        for j in range(kw)
    ]


def _patches(x: jax.Array, size: tuple[int, int], strides: tuple[int, int], padding: Padding) -> jax.Array:
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
    y_gradient: jax.Array, x_shape: tuple[int, ...], size: tuple[int, int], strides: tuple[int, int], padding: Padding
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


# The kernels of bmjax/native, on CPUs and in float32.


def _window(strides: tuple[int, int], padding: Padding) -> tuple[int, int, int, int]:
    return *strides, padding[0][0], padding[1][0]


def _depthwise(kernel_shape: tuple[int, ...], groups: int) -> bool:
    """Whether each channel is convolved by itself."""
    return groups > 1 and kernel_shape[2] == 1 and kernel_shape[3] == groups


def _forward_native(x, kernel, strides, padding, groups):
    reference = functools.partial(plain, strides=strides, padding=padding, groups=groups)
    window = _window(strides, padding)
    if _depthwise(kernel.shape, groups):
        return native.call("depthwise_conv", reference, x, kernel, window=window, back=False)
    return native.call("conv", reference, x, kernel, window=window, turned=False)


def _input_native(y_gradient, kernel, x_shape, strides, padding, groups):
    reference = functools.partial(_input_plain, x_shape=x_shape, strides=strides, padding=padding, groups=groups)
    if _depthwise(kernel.shape, groups):
        window = _window(strides, padding)
        return native.call("depthwise_conv", reference, y_gradient, kernel, window=window, back=True)
    if strides != (1, 1):  # 1x1: the gradient of the pixels that it sees
        small = (*y_gradient.shape[:-1], x_shape[-1])
        return _spread(
            _input_native(y_gradient, kernel, small, (1, 1), padding, groups), x_shape, (1, 1), strides, padding
        )
    (top, _), (left, _) = padding
    around = (kernel.shape[0] - 1 - top, kernel.shape[1] - 1 - left)
    return native.call("conv", reference, y_gradient, kernel, window=(1, 1, *around), turned=True)


def _kernel_native(x, y_gradient, kernel_shape, strides, padding, groups):
    reference = functools.partial(
        _kernel_plain, kernel_shape=kernel_shape, strides=strides, padding=padding, groups=groups
    )
    name = "depthwise_conv_kernel_gradient" if _depthwise(kernel_shape, groups) else "conv_kernel_gradient"
    return native.call(name, reference, x, y_gradient, window=_window(strides, padding))


def _turnable(shape: Shape, padding: Padding) -> bool:
    """Stride 1, and no more padding than the kernel reaches."""
    return shape.strides == (1, 1) and all(p < k for pair, k in zip(padding, shape.size, strict=True) for p in pair)


def formulations(operation: Operation, shape: Shape, padding: Padding) -> dict[str, Callable[..., jax.Array]]:
    """The formulations that are valid for a convolution, by name; "plain", XLA's own, always first."""
    pointwise = shape.size == (1, 1) and shape.groups == 1 and padding == NO_PADDING
    depthwise = shape.kind.startswith("depthwise")
    spatial = shape.groups == 1 and not pointwise
    candidates: dict[str, tuple[bool, Callable[..., jax.Array]]]
    if operation == "forward":
        candidates = {
            "plain": (True, plain),
            "dot": (pointwise, _forward_dot),
            "patches": (spatial, _forward_patches),
            "taps": (depthwise, _forward_taps),
            "native": (shape.groups == 1 or depthwise, _forward_native),
        }
    elif operation == "input_gradient":
        candidates = {
            "plain": (True, _input_plain),
            "dot": (pointwise, _input_dot),
            "patches": (spatial and _turnable(shape, padding), _input_patches),
            "taps": (depthwise, _input_taps),
            "native": (pointwise or depthwise or (spatial and _turnable(shape, padding)), _input_native),
        }
    else:
        candidates = {
            "plain": (True, _kernel_plain),
            "dot": (pointwise, _kernel_dot),
            "patches": (spatial, _kernel_patches),
            "gradient_patches": (spatial and _turnable(shape, padding), _kernel_gradient_patches),
            "taps": (depthwise, _kernel_taps),
            "products": (shape.kind == "grouped", _kernel_products),
            "native": (shape.groups == 1 or depthwise, _kernel_native),
        }
    return {name: fn for name, (valid, fn) in candidates.items() if valid}


@functools.cache
def table() -> dict[str, Any]:
    """What tools/tune_conv.py measured: {"machine", "command", "rows": [{shape..., "operation", "ms": {name: ms}}]}."""
    return json.loads(resources.files("bmjax").joinpath("convolution_table.json").read_text())


def _distance(a: Shape, b: Shape) -> float:
    pairs = ((a.pixels, b.pixels), (a.inputs, b.inputs), (a.outputs, b.outputs), (a.size[0], b.size[0]))
    return sum(abs(math.log(m / n)) for m, n in pairs)


def shape_of_row(row: dict[str, Any]) -> Shape:
    """The shape that a row of the table is about."""
    return Shape(row["pixels"], tuple(row["size"]), tuple(row["strides"]), row["inputs"], row["outputs"], row["groups"])


@functools.cache
def choose(operation: Operation, shape: Shape, padding: Padding, with_native: bool = False) -> str:
    """The name of the formulation for CPUs: the fastest at the nearest measured shape of its kind, else "plain"."""
    rows = [row for row in table()["rows"] if row["operation"] == operation and shape_of_row(row).kind == shape.kind]
    if not rows:
        return "plain"
    nearest = min(rows, key=lambda row: _distance(shape_of_row(row), shape))
    valid = {name for name in formulations(operation, shape, padding) if with_native or name != "native"}
    return min((name for name in nearest["ms"] if name in valid), key=nearest["ms"].__getitem__)


def _chosen(operation: Operation, shape: Shape, padding: Padding, dtype: Any) -> Callable[..., jax.Array]:
    valid = formulations(operation, shape, padding)
    if platform() != "cpu":
        return valid["plain"]
    with_native = native.usable(dtype)
    name = choose(operation, shape, padding, with_native)
    if name == "plain" and _in_loop and operation != "forward":
        others = [other for other in valid if other not in ("plain", "native")]
        name = "native" if with_native and "native" in valid else next(iter(others), "plain")
    return valid[name]


def _shape(y_shape: tuple[int, ...], kernel_shape: tuple[int, ...], strides: tuple[int, int], groups: int) -> Shape:
    kh, kw, c, n = kernel_shape
    return Shape(math.prod(y_shape[:-1]), (kh, kw), strides, c * groups, n, groups)


def forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding, groups: int = 1) -> jax.Array:
    """As `plain`, in the formulation chosen for this platform; see `conv` for derivatives."""
    y = jax.eval_shape(lambda x, k: plain(x, k, strides, padding, groups), x, kernel)
    shape = _shape(y.shape, kernel.shape, strides, groups)
    return _chosen("forward", shape, padding, x.dtype)(x, kernel, strides, padding, groups)


def input_gradient(
    y_gradient: jax.Array,
    kernel: jax.Array,
    x_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: Padding,
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
    padding: Padding,
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
    return (
        input_gradient(y_gradient, kernel, x.shape, strides, padding, groups),
        kernel_gradient(x, y_gradient, kernel.shape, strides, padding, groups),
    )


_conv.defvjp(_conv_forward, _conv_backward)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: str | tuple[tuple[int, int], ...] = "SAME",
    groups: int = 1,
) -> jax.Array:
    """Convolution of x [b, h, w, c] with a kernel [kh, kw, c/groups, n] -> [b, h', w', n], one dtype throughout.

    `padding`: "SAME" (as TensorFlow), "VALID", or pixels before and after per axis.
    """
    pads = explicit_padding(padding, (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1]), strides)
    # Shorter floats keep to XLA's own, which accumulates them in float32.
    if platform() != "cpu" or x.dtype not in (jnp.float32, jnp.float64):
        return plain(x, kernel, strides, pads, groups)
    return _conv(x, kernel, strides, pads, groups)


def dilated(x: jax.Array, kernel: jax.Array, dilation: int, groups: int = 1) -> jax.Array:
    """Convolution of stride 1 and padding "SAME" whose kernel sees every `dilation`-th place; shapes as in `conv`.

    On CPUs it is a plain one over each of dilation x dilation interleaved sub-images, so the table's choices apply.

    Raises:
      ValueError: the kernel has an even side.
    """
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"a dilated kernel has shape {kernel.shape}; expected odd sides")
    if platform() != "cpu" or x.dtype not in (jnp.float32, jnp.float64):
        return lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=DIMENSIONS,
            feature_group_count=groups,
        )
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, -h % dilation), (0, -w % dilation), (0, 0)))
    x = rearrange(x, "b (h i) (w j) c -> (b i j) h w c", i=dilation, j=dilation)
    y = conv(x, kernel, groups=groups)
    return rearrange(y, "(b i j) h w c -> b (h i) (w j) c", i=dilation, j=dilation)[:, :h, :w]
