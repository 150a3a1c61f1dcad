"""The formulations against XLA's own convolution, and the choice among them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.cpu import convolution, formulations
from bmjax.cpu.formulations import Shape
from bmjax.layers import ops
from bmjax.layers.dispatch import fits_loop, inside_loop, traced_for, with_forms

# size, stride, padding per side (before, after), inputs, outputs, groups, height and width
CASES = {
    "pointwise": (1, 1, (0, 0), 5, 7, 1, (6, 9)),
    "pointwise, stride 2": (1, 2, (0, 0), 5, 7, 1, (7, 8)),
    "pointwise, padded": (1, 1, (1, 0), 3, 4, 1, (5, 5)),
    "3x3": (3, 1, (1, 1), 4, 6, 1, (8, 7)),
    "3x3 valid": (3, 1, (0, 0), 4, 2, 1, (8, 7)),
    "3x3, uneven padding": (3, 1, (0, 2), 4, 2, 1, (8, 7)),
    "more padding than kernel": (2, 1, (3, 2), 3, 2, 1, (5, 6)),
    "stem": (7, 2, (3, 3), 3, 8, 1, (15, 14)),
    "depthwise": (3, 1, (1, 1), 6, 6, 6, (9, 7)),
    "depthwise, stride 2": (3, 2, (0, 1), 6, 6, 6, (9, 8)),
    "depthwise 5x5, stride 2": (5, 2, (2, 2), 4, 4, 4, (11, 10)),
    "grouped": (3, 1, (1, 1), 6, 4, 2, (7, 7)),
    "low and wide, to one channel": (7, 1, (3, 3), 2, 1, 1, (3, 40)),
    "low and wide, uneven padding": (2, 1, (0, 2), 3, 1, 1, (2, 20)),
}


def case(name, dtype=np.float64):
    """x, kernel, and strides, padding, groups."""
    size, stride, pad, inputs, outputs, groups, spatial = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *spatial, inputs)).astype(dtype)
    kernel = rng.standard_normal((size, size, inputs // groups, outputs)).astype(dtype)
    return jnp.asarray(x), jnp.asarray(kernel), ((stride, stride), (pad, pad), groups)


def shape_of(name):
    x, kernel, how = case(name, np.float32)
    y = formulations.plain(x, kernel, *how)
    return Shape(y[..., 0].size, kernel.shape[:2], how[0], x.shape[-1], kernel.shape[-1], how[2]), y.shape


@pytest.mark.parametrize("name", CASES)
def test_every_formulation_is_plain_convolution(name):
    shape, y_shape = shape_of(name)
    with jax.enable_x64(True):
        x, kernel, how = case(name)
        y_gradient = jnp.asarray(np.random.default_rng(1).standard_normal(y_shape))
        y, vjp = jax.vjp(lambda x, k: formulations.plain(x, k, *how), x, kernel)
        x_gradient, kernel_gradient = vjp(y_gradient)
        wanted = {
            "forward": ((x, kernel), y),
            "input_gradient": ((y_gradient, kernel, x.shape), x_gradient),
            "kernel_gradient": ((x, y_gradient, kernel.shape), kernel_gradient),
        }
        for operation, (arguments, expected) in wanted.items():
            found = formulations.formulations(operation, shape, how[1])
            assert next(iter(found)) == "plain"
            for formulation, fn in found.items():
                message = f"{operation}, {formulation}"
                np.testing.assert_allclose(fn(*arguments, *how), expected, rtol=1e-10, atol=1e-10, err_msg=message)


def test_the_formulations_that_shapes_have():
    def names(operation, name):
        return set(formulations.formulations(operation, shape_of(name)[0], case(name)[2][1]))

    assert names("forward", "pointwise") == {"plain", "dot", "native"}
    assert names("input_gradient", "3x3") == {"plain", "patches", "native"}
    assert names("input_gradient", "stem") == {"plain"}
    assert names("input_gradient", "more padding than kernel") == {"plain"}
    assert names("kernel_gradient", "3x3") == {"plain", "patches", "gradient_patches", "native"}
    assert names("kernel_gradient", "stem") == {"plain", "patches", "native"}
    assert names("kernel_gradient", "depthwise, stride 2") == {"plain", "taps", "native"}
    assert names("forward", "grouped") == {"plain"}
    assert names("kernel_gradient", "grouped") == {"plain", "products"}


@pytest.mark.parametrize("name", CASES)
def test_conv_and_its_first_and_second_derivatives(name):
    def of(conv, x, kernel):
        return jnp.sin(conv(x, kernel)).sum()

    def derivatives(conv, x, kernel):
        first = jax.grad(functools.partial(of, conv), (0, 1))
        # The gradient of the gradients' product with something not constant: all second derivatives enter.
        second = jax.grad(lambda x, k: sum((g * jnp.cos(g)).sum() for g in first(x, k)), (0, 1))
        return of(conv, x, kernel), first(x, kernel), second(x, kernel)

    with jax.enable_x64(True):
        x, kernel, how = case(name)
        ours, plain = (
            jax.jit(functools.partial(derivatives, lambda x, k, conv=conv: conv(x, k, *how)))(x, kernel)
            for conv in (ops.convolution, formulations.plain)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_named_padding(padding):
    x, kernel, (strides, _, groups) = case("stem", np.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=ops.DIMENSIONS, feature_group_count=groups
    )
    pads = ops.in_pixels(padding, x.shape[1:3], kernel.shape[:2], strides)
    np.testing.assert_allclose(ops.convolution(x, kernel, strides, pads, groups), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_on_accelerators_it_is_xlas_convolution_and_nothing_else(name):
    x, kernel, how = case(name, np.float32)

    def program(conv):
        def conv_and_gradients(x, k):
            y, vjp = jax.vjp(lambda x, k: conv(x, k, *how), x, k)
            return y, vjp(y)

        text = jax.jit(conv_and_gradients).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
        return "\n".join(line.split(" loc(")[0] for line in text.splitlines())

    with traced_for("gpu"), with_forms("plain_depthwise"):  # small depthwise ones are sums there by default
        ours = program(lambda x, k, *how: ops.convolution(x, k, *how))
    assert ours == program(lambda x, k, *how: formulations.plain(x, k, *how))
    assert ours.count("stablehlo.convolution") == 3


@pytest.mark.parametrize(("groups", "dilation", "size"), [(1, 2, (3, 5)), (4, 3, (7, 7))])
def test_dilated_and_its_gradients_are_xlas(groups, dilation, size):
    x, kernel = (np.random.default_rng(0).standard_normal(s) for s in ((2, 7, 8, 4), (*size, 4 // groups, 4)))

    def both(x, kernel):
        y, vjp = jax.vjp(lambda x, kernel: ops.dilated_convolution(x, kernel, dilation, groups), x, kernel)
        return y, vjp(jnp.cos(y))

    with jax.enable_x64(True):
        ours = jax.jit(both)(x, kernel)
        with traced_for("gpu"):
            xlas = jax.jit(lambda x, kernel: both(x, kernel))(x, kernel)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(xlas), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"a dilated kernel has shape \(2, 3, 4, 4\); expected odd sides"):
        ops.dilated_convolution(x, np.zeros((2, 3, 4, 4)), 2)


def test_the_nearest_measured_shape_of_the_kind_decides(monkeypatch):
    def row(pixels, inputs, ms):
        shape = Shape(pixels, (3, 3), (1, 1), inputs, 8, 1)
        return {**shape._asdict(), "operation": "forward", "ms": ms}

    rows = [row(100, 8, {"plain": 2.0, "patches": 1.0}), row(10_000, 8, {"plain": 1.0, "patches": 2.0})]
    monkeypatch.setattr(convolution, "table", lambda: {"rows": rows})
    convolution.choose.cache_clear()
    pad = ((1, 1), (1, 1))
    try:
        assert convolution.choose("forward", Shape(150, (3, 3), (1, 1), 8, 8, 1), pad) == "patches"
        assert convolution.choose("forward", Shape(5000, (3, 3), (1, 1), 8, 8, 1), pad) == "plain"
        # Another operation, another kind: nothing was measured.
        assert convolution.choose("input_gradient", Shape(150, (3, 3), (1, 1), 8, 8, 1), pad) == "plain"
        assert convolution.choose("forward", Shape(150, (3, 3), (2, 2), 8, 8, 1), pad) == "plain"
    finally:
        convolution.choose.cache_clear()


def test_the_table_names_formulations_that_exist():
    rows = convolution.table()["rows"]
    assert "tune_conv.py" in convolution.table()["command"]
    kinds = {convolution.shape_of_row(row).kind for row in rows}
    assert {"1x1 stride 1", "spatial stride 1", "spatial stride 2", "depthwise stride 1", "grouped"} <= kinds
    for row in rows:
        shape = convolution.shape_of_row(row)
        pad = (shape.size[0] - 1) // 2
        valid = formulations.formulations(row["operation"], shape, ((pad, pad), (pad, pad)))
        assert set(row["ms"]) <= set(valid), row
        assert set(row["ms"]) | {"native"} >= set(valid), row
        assert min(row["ms"].values()) > 0


def test_short_floats_keep_to_xlas_own():
    x, kernel, how = case("pointwise", np.float32)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    text = jax.jit(lambda x, k: ops.convolution(x, k, *how)).lower(x, kernel).as_text()
    assert "stablehlo.convolution" in text
    assert "dot_general" not in text


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (3, 4)])
def test_gradients_inside_a_loop_leave_xlas_own_convolution(size, groups):
    x = jnp.ones((2, 5, 5, 4))
    kernel = jnp.ones((size, size, 4 // groups, 4))

    def gradients(conv):
        def scanned(x, kernel):
            both = jax.grad(lambda x, k: conv(x, k).sum(), argnums=(0, 1))
            return jax.lax.scan(lambda carry, _: (both(*carry), None), (x, kernel), length=2)

        return jax.make_jaxpr(scanned)(x, kernel)

    plain = functools.partial(formulations.plain, strides=(1, 1), padding=((1, 1), (1, 1)), groups=groups)
    ours = functools.partial(ops.convolution, padding=((size // 2,) * 2,) * 2, groups=groups)
    assert not fits_loop(gradients(plain))
    with inside_loop():
        assert fits_loop(gradients(ours))
        with traced_for("gpu"), with_forms("plain_depthwise"):
            on_gpu = gradients(ours)
    with traced_for("gpu"), with_forms("plain_depthwise"):
        assert str(on_gpu) == str(gradients(ours)), "nothing changes elsewhere"
        assert fits_loop(on_gpu)
    assert not fits_loop(on_gpu)


@pytest.mark.parametrize("with_native", [False, True])
def test_a_shape_whose_formulations_were_not_measured_has_one_in_a_loop(with_native):
    shape = formulations.Shape(98, (1, 1), (1, 1), 8, 8, 1)
    padding = ((1, 1), (1, 1))  # so the matrix product that the table has for 1x1 does not apply
    name = convolution.choose("kernel_gradient", shape, padding, with_native, in_loop=True)
    assert name == ("native" if with_native else "patches")
