"""The kernels against the references they stand for, and what happens where they can't be had."""

import functools
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import layers
from bmjax.cpu import build as native
from bmjax.cpu import dense_layer, formulations
from bmjax.cpu import norm as cpu_norm
from bmjax.layers import norm, ops

native.prepare()
if not native.available():
    pytest.skip(f"the kernels are {native.build().said}", allow_module_level=True)

# batch, height and width, kernel, stride, padding per axis, inputs, outputs: whole and broken panels, tiles and lanes
CONVS = {
    "pointwise": (3, (9, 7), 1, 1, ((0, 0), (0, 0)), 37, 45),
    "pointwise, whole panels": (2, (14, 14), 1, 1, ((0, 0), (0, 0)), 64, 64),
    "pointwise, stride 2": (2, (9, 8), 1, 2, ((0, 0), (0, 0)), 20, 33),
    "3x3": (2, (13, 29), 3, 1, ((1, 1), (1, 1)), 32, 40),
    "3x3, uneven padding": (2, (10, 11), 3, 1, ((0, 2), (2, 0)), 17, 3),
    "3x3, stride 2": (2, (15, 12), 3, 2, ((1, 1), (0, 1)), 24, 32),
    "5x3, valid": (1, (12, 11), (5, 3), 1, ((0, 0), (0, 0)), 16, 7),
    "many small images": (40, (3, 4), 3, 1, ((1, 1), (1, 1)), 48, 32),
    "stem": (2, (31, 30), 7, 2, ((3, 3), (3, 3)), 3, 64),
    "stem, wide padding": (1, (4, 3), 5, 1, ((4, 4), (4, 4)), 2, 5),
    "many kernels": (2, (6, 5), 3, 1, ((1, 1), (1, 1)), 260, 256),
    "one pixel": (1, (1, 1), 1, 1, ((0, 0), (0, 0)), 5, 100),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def equal(ours, expected):
    """To 1e-5 of the largest value."""
    ours, expected = jax.tree.leaves(ours), jax.tree.leaves(expected)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def with_and_without(function, *args):
    """What a function gives with the kernels and without, and how many kernels it calls."""
    program = jax.jit(lambda *args: function(*args)).trace(*args)
    with native.off():
        expected = jax.jit(lambda *args: function(*args))(*args)
    text = program.lower().as_text()
    return program.lower().compile()(*args), expected, text.count("stablehlo.custom_call @bmjax_")


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name):
    batch, spatial, size, stride, padding, inputs, outputs = CONVS[name]
    size = (size, size) if isinstance(size, int) else size
    how = ((stride, stride), padding, 1)
    x, kernel = normal(0, batch, *spatial, inputs), normal(1, *size, inputs, outputs)
    y = formulations.plain(x, kernel, *how)
    shape = formulations.Shape(y[..., 0].size, size, how[0], inputs, outputs, 1)
    arguments = {
        "forward": (x, kernel),
        "kernel_gradient": (x, y, kernel.shape),
        "input_gradient": (y, kernel, x.shape),
    }
    calls = 0
    for operation, given in arguments.items():
        fn = formulations.formulations(operation, shape, padding).get("native")
        if fn is None:
            assert operation == "input_gradient"
            continue
        arrays, result = given[:2], given[2:]
        ours, expected, found = with_and_without(lambda a, b, fn=fn, r=result: fn(a, b, *r, *how), *arrays)
        equal(ours, expected)
        calls += found
    assert calls == (2 if name in ("stem", "3x3, stride 2") else 3)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("relu", "added"), [(True, False), (False, True), (True, True)])
def test_a_norm_within_the_convolution(name, relu, added):
    batch, spatial, size, stride, padding, inputs, outputs = CONVS[name]
    size = (size, size) if isinstance(size, int) else size
    fixed = norm.Around((stride, stride), padding, relu)
    x, kernel = normal(0, batch, *spatial, inputs), normal(1, *size, inputs, outputs)
    others = [kernel, normal(2, outputs), normal(3, outputs)]
    if added:
        others.append(normal(4, *formulations.plain(x, kernel, (stride, stride), padding).shape))
    ours, expected, calls = with_and_without(lambda *arrays: norm.conv_norm(fixed, *arrays), x, *others)
    equal(ours, expected)
    assert calls == 1
    grad = jax.grad(lambda x: (norm.conv_norm(fixed, x, *others) ** 2).sum())
    equal(*with_and_without(grad, x)[:2])


def after_norm_and_relu(batch, spatial, size, stride, padding, inputs, outputs, groups):
    """The convolution of relu(norm(x)), and its kernel's gradient, each as one kernel."""
    fixed = norm.Convolution(jax.nn.relu, (stride, stride), padding, groups)
    x, factor, offset = normal(0, batch, *spatial, inputs), normal(2, inputs), normal(3, inputs)
    kernel = normal(1, *size, inputs // groups, outputs)
    before = norm.plain_normed(jax.nn.relu, x, factor, offset)
    y = formulations.plain(before, kernel, (stride, stride), padding, groups)

    def forward(*arrays):
        return cpu_norm.packing("", fixed, lambda *a: norm.plain_normed_convolution(fixed, *a), *arrays, like=y)

    def gradient(x, factor, offset, y):
        def reference(x, factor, offset, y):
            before = norm.plain_normed(jax.nn.relu, x, factor, offset)
            return formulations.formulations("kernel_gradient", shape, padding)["plain"](
                before, y, kernel.shape, (stride, stride), padding, groups
            )

        return cpu_norm.packing("_kernel_gradient", fixed, reference, x, factor, offset, y, like=kernel)

    shape = formulations.Shape(y[..., 0].size, size, (stride, stride), inputs, outputs, groups)
    for function, other in ((forward, kernel), (gradient, y)):
        ours, expected, calls = with_and_without(function, x, factor, offset, other)
        equal(ours, expected)
        assert calls == 1


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_packs_what_norm_and_relu_make(name):
    batch, spatial, size, stride, padding, inputs, outputs = CONVS[name]
    size = (size, size) if isinstance(size, int) else size
    after_norm_and_relu(batch, spatial, size, stride, padding, inputs, outputs, 1)


def activated_convs(activation, x, kernels, affines, gate):
    """Convolutions, each of a norm and an activation of what came before; the last is gated too."""
    for i, (kernel, (factor, offset)) in enumerate(zip(kernels, affines, strict=True)):
        fixed = norm.Convolution(activation, (1, 1), ((1, 1), (1, 1)), 1)
        gates = (gate,) if i == len(kernels) - 1 else ()
        x = norm.normed_convolution(fixed, x, factor, offset, kernel, *gates)
    return x


def activated_arguments(depth, c, side):
    kernels = [0.1 * normal(i, 3, 3, c, c) for i in range(depth)]
    affines = [(normal(10 + i, c), normal(20 + i, c)) for i in range(depth)]
    return normal(30, 2, side, side, c), kernels, affines, normal(31, 2, 1, 1, c)


@pytest.mark.parametrize("activation", [jax.nn.swish, jax.nn.relu])
def test_norm_and_activation_before_a_convolution(activation):
    def loss(*args):
        return (activated_convs(activation, *args) ** 2).sum()

    args = activated_arguments(2, 20, 7)
    equal(*with_and_without(jax.grad(loss, (0, 1, 2, 3)), *args)[:2])
    # Of second order as well.
    second = jax.grad(lambda *args: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss, (0, 2))(*args))), (0, 3))
    equal(*with_and_without(second, *args)[:2])
    x, _, ((factor, offset), _), _ = args
    grad = jax.grad(lambda *args: (norm.normed(activation, *args) ** 2).sum(), (0, 1, 2))
    equal(*with_and_without(grad, x, factor, offset)[:2])


def test_what_is_computed_again_is_not_kept():
    shapes = jax.eval_shape(lambda: activated_arguments(8, 16, 64))
    a_map = 4 * shapes[0].size

    def maps():
        program = jax.jit(jax.grad(lambda *args: activated_convs(jax.nn.swish, *args).sum(), (0, 1, 2, 3))).trace(
            *shapes
        )
        return program.lower().compile().memory_analysis().temp_size_in_bytes / a_map

    ours = maps()
    with native.off():
        plain = maps()
    # A map or two a convolution; else those of norm and activation, and gradients, too.
    assert ours < 0.65 * plain


# batch, height and width, kernel, stride, padding per axis, channels
DEPTHWISE = {
    "3x3": (2, (9, 11), 3, 1, ((1, 1), (1, 1)), 48),
    "3x3, stride 2, uneven padding": (3, (9, 8), 3, 2, ((0, 1), (0, 1)), 21),
    "3x3, stride 2, even side": (2, (8, 8), 3, 2, ((0, 1), (1, 1)), 16),
    "5x5": (2, (7, 6), 5, 1, ((2, 2), (2, 2)), 300),
    "5x5, stride 2": (1, (11, 10), 5, 2, ((1, 2), (2, 2)), 7),
    "2x7, valid, stride 3": (2, (8, 20), (2, 7), 3, ((0, 0), (0, 0)), 33),
    "more padding than kernel": (1, (4, 5), 3, 1, ((3, 3), (4, 2)), 8),
}


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_convolutions(name):
    batch, spatial, size, stride, padding, channels = DEPTHWISE[name]
    size = (size, size) if isinstance(size, int) else size
    how = ((stride, stride), padding, channels)
    x, kernel = normal(0, batch, *spatial, channels), normal(1, *size, 1, channels)
    y = formulations.plain(x, kernel, *how)
    shape = formulations.Shape(y[..., 0].size, size, how[0], channels, channels, channels)
    arguments = {
        "forward": (x, kernel),
        "kernel_gradient": (x, y, kernel.shape),
        "input_gradient": (y, kernel, x.shape),
    }
    for operation, (a, b, *result) in arguments.items():
        fn = formulations.formulations(operation, shape, padding)["native"]
        ours, expected, calls = with_and_without(lambda a, b, fn=fn, r=result: fn(a, b, *r, *how), a, b)
        equal(ours, expected)
        assert calls == 1


@pytest.mark.parametrize("name", DEPTHWISE)
def test_a_depthwise_convolution_packs_what_norm_and_relu_make(name):
    batch, spatial, size, stride, padding, channels = DEPTHWISE[name]
    size = (size, size) if isinstance(size, int) else size
    after_norm_and_relu(batch, spatial, size, stride, padding, channels, channels, channels)


@pytest.mark.parametrize("shape", [(3, 17, 18, 96), (2, 3, 1, 5), (5, 1, 1, 40), (64, 30, 30, 24)])
def test_a_norm_by_the_batch_and_its_gradients(shape):
    layer = layers.BatchNorm()
    x, into = 3 + 2 * normal(0, *shape), normal(1, *shape)
    variables = layer.init(jax.random.key(0), x)
    variables["params"]["scale"] += normal(2, shape[-1])

    def run(x, params):
        y, new = layer.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return (y * into).sum(), new

    def both(x, params):
        return jax.value_and_grad(run, (0, 1), has_aux=True)(x, params)

    ((ours, new), grads), ((expected, new_expected), expected_grads), calls = with_and_without(
        both, x, variables["params"]
    )
    assert calls == 2
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * into.size**0.5)
    equal(new, new_expected)
    equal(grads[1], expected_grads[1])
    np.testing.assert_allclose(grads[0], expected_grads[0], atol=3e-5 * float(jnp.abs(into).max()))


# batch, height and width, channels before, of the bottleneck, new, of the buffer
LAYERS = {
    "whole panels": (2, (14, 15), 64, 128, 32, 160),
    "broken panels": (3, (7, 5), 21, 44, 5, 40),
    "less than a lane": (2, (5, 6), 3, 8, 2, 9),
    "images of a strip": (30, (3, 3), 40, 64, 32, 100),
}


def random_norm(seed, c, statistics=None):
    """A norm of c channels, by more statistics than those where `statistics` says so."""
    values = [normal(seed + i, n) for i, n in enumerate((c, c, statistics or c, statistics or c))]
    return dense_layer.Norm(*values[:3], 0.5 + values[3] ** 2)


@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_dense_layers(name, by_batch):
    b, spatial, c, m, n, wide = LAYERS[name]
    buffer, y, into = normal(0, b, *spatial, wide), normal(1, b, *spatial, m), normal(2, b, *spatial, wide)
    outer, inner = random_norm(3, c, wide), random_norm(10, m)
    kernel1, kernel2 = normal(7, 1, 1, c, m), normal(8, 3, 3, m, n)
    statistics, gradients, dz = tuple(normal(20, 2, wide)), tuple(normal(21, 2, wide)), normal(22, *y.shape)
    after = (inner.scale, inner.mean, inner.var, *normal(23, 2, m))
    fixed = {"epsilon": 1e-3, "count": b * spatial[0] * spatial[1] if by_batch else 0}
    once = {"epsilon": 1e-3, "moments": by_batch}
    runs = [
        (functools.partial(dense_layer.norm_conv, **once), (buffer, outer, kernel1)),
        (
            functools.partial(dense_layer.norm_conv_into, channel=c, **once),
            (y, inner, kernel2, (buffer, *statistics)),
        ),
        (
            functools.partial(dense_layer.norm_conv_backward, channel=c, **fixed),
            (y, inner, kernel2, dense_layer.Result(buffer, statistics[0], into, *gradients)),
        ),
        (
            functools.partial(dense_layer.norm_product_backward, **fixed),
            (buffer, outer, kernel1, dz, y, after, (into, *gradients)),
        ),
    ]
    for function, args in runs:
        ours, expected, calls = with_and_without(function, *args)
        equal(ours, expected)
        assert calls == 1


IDENTITY = dense_layer.Norm(jnp.ones(16), jnp.zeros(16), jnp.zeros(16), jnp.ones(16))


def test_the_variance_survives_a_large_mean():
    x = 1e4 + normal(0, 2, 20, 20, 16)
    kernel = jnp.eye(16)[None, None]
    _, (mean, var) = jax.jit(functools.partial(dense_layer.norm_conv, epsilon=0.0))(x, IDENTITY, kernel)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-3)


def test_nan_stays_nan():
    x = normal(0, 1, 4, 4, 16).at[0, 1, 2, 3].set(jnp.nan)
    conv = functools.partial(dense_layer.norm_conv, epsilon=0.0)
    y, _ = jax.jit(conv)(x, IDENTITY, normal(1, 1, 1, 16, 32))
    assert np.isnan(y).any(-1).sum() == 1


def test_derivatives_of_kernels_are_those_of_their_references():
    x, kernel, dy = normal(0, 2, 6, 5, 8), normal(1, 3, 3, 8, 4), normal(2, 2, 6, 5, 4)
    around, nothing = random_norm(3, 8), jnp.zeros(4)

    def total(x, kernel, dy):
        result = dense_layer.Result(dy, nothing, dy, nothing, nothing)
        dz, dkernel, gradients = dense_layer.norm_conv_backward(
            x, around, kernel, result, 0, epsilon=1e-3, count=dy.size // 4
        )
        return (dz * dz).sum() + jnp.sin(dkernel).sum() + jnp.sin(gradients.var).sum()

    reverse = with_and_without(jax.grad(total, (0, 1, 2)), x, kernel, dy)
    equal(*reverse[:2])
    forward = with_and_without(lambda x, k, d: jax.jvp(total, (x, k, d), (x, k, d))[1], x, kernel, dy)
    equal(*forward[:2])


def test_the_same_bits_every_time_and_when_many_run_at_once():
    x, kernel = normal(0, 8, 20, 20, 24), normal(1, 3, 3, 24, 40)
    how = {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "groups": 1}

    @jax.jit
    def many(x, kernel):
        y = [formulations.forward_native(x + i, kernel, **how) for i in range(8)]
        return y, [formulations.kernel_native(x, y, kernel.shape, **how) for y in y]

    first = many(x, kernel)
    for _ in range(10):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(many(x, kernel)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_vmap():
    x, kernel = normal(0, 3, 2, 6, 5, 8), normal(1, 1, 1, 8, 40)
    how = {"strides": (1, 1), "padding": ops.NO_PADDING, "groups": 1}
    run = jax.vmap(lambda x: formulations.forward_native(x, kernel, **how))
    equal(run(x), jnp.einsum("sbhwc,cn->sbhwn", x, kernel[0, 0]))


def test_programs_that_xla_divides_over_devices_have_none():
    from bmjax.training.parallel import Parallel

    x, kernel, how = normal(0, 4, 6, 5, 8), normal(1, 3, 3, 8, 32), {"strides": (1, 1), "padding": ((1, 1), (1, 1))}

    def calls(kind, count):
        parallel = Parallel.create(kind, count)
        step = parallel.compile_step(lambda k, b: formulations.forward_native(b["x"], k, **how, groups=1), donate=False)
        batch = parallel.put_batch({"x": np.asarray(x)})
        placed = parallel.to_devices(kernel)
        y = np.asarray(step(placed, batch)).reshape(4, 6, 5, 32)
        equal(y, formulations.plain(x, kernel, **how))
        return step.lower(placed, batch).as_text().count("@bmjax_conv")

    assert calls("jit", 1) == 1
    assert calls("jit", 4) == 0
    assert calls("pmap", 4) == 1


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    return native.build.__wrapped__


def test_without_a_compiler_nothing_is_built(fresh_build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert fresh_build() == (None, "not used: no C++ compiler found (CXX, c++, g++, clang++)")
    monkeypatch.setenv("BMJAX_NATIVE", "0")
    assert fresh_build() == (None, "not used: BMJAX_NATIVE is 0")


def test_what_can_not_be_compiled_is_said_and_leaves_nothing(fresh_build, monkeypatch, tmp_path, caplog):
    source = tmp_path / "broken.cc"
    source.write_text("int main() { this is not C++ }")
    monkeypatch.setattr(native, "SOURCE", source)
    with caplog.at_level(logging.WARNING):
        path, said = fresh_build()
    assert path is None
    assert said.endswith("can't compile them")
    assert f"{source} can't be compiled by" in caplog.text
    assert "error" in caplog.text
    assert list((tmp_path / "native").iterdir()) == []


def test_a_folder_that_can_not_be_written_is_said(fresh_build, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        path, said = fresh_build()
    assert path is None
    assert said == f"not used: {tmp_path / 'file' / 'native'} can't be written"
    assert "the kernels can't be kept in" in caplog.text


def test_a_build_is_found_again_and_depends_on_the_source(fresh_build, monkeypatch, tmp_path):
    source = tmp_path / "small.cc"
    source.write_text('extern "C" int bmjax_answer() { return 42; }')
    monkeypatch.setattr(native, "SOURCE", source)
    path, said = fresh_build()
    assert said.startswith("compiled by ")
    made = path.stat().st_mtime_ns
    assert fresh_build().path == path
    assert path.stat().st_mtime_ns == made
    source.write_text('extern "C" int bmjax_answer() { return 43; }')
    assert fresh_build().path != path


def test_a_network_trains_without_kernels_too():
    """And says so: the references are what then runs."""
    code = (
        "import bmjax, jax, jax.numpy as jnp\n"
        "from bmjax.cpu import build as native\n"
        "from bmjax.layers import ops, prepare\n"
        "prepare()\n"
        "assert not native.available()\n"
        "x = jnp.ones((1, 8, 8, 4))\n"
        "grad = jax.jit(jax.grad(lambda k: ops.convolution(x, k, padding=((1, 1), (1, 1))).sum()))\n"
        "assert 'bmjax_' not in grad.lower(jnp.ones((3, 3, 4, 32))).as_text()\n"
        "print(native.build().said)\n"
    )
    env = os.environ | {"BMJAX_NATIVE": "0", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "not used: BMJAX_NATIVE is 0"
