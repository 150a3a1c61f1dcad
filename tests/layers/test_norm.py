"""A norm away from CPUs: one pass, two sums each way, derivatives by hand; and formulations that can be asked for."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.layers import BatchNorm, Conv, batch_statistics, max_pool, ops
from bmjax.layers.dense_block import dense_block
from bmjax.layers.dispatch import traced_for, wants, with_forms
from bmjax.layers.norm import affine, moments, norm_affine, norm_relu


def normal(seed, *shape):
    """In the widest float that is switched on."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(jax.dtypes.canonicalize_dtype(float)))


@pytest.mark.parametrize("shape", [(16, 14, 14, 32), (64, 32), (2, 1, 7, 5)])
@pytest.mark.parametrize("deviations", [0, 1, 1000])
def test_one_pass_is_two_passes(shape, deviations):
    """To 1e-5 where the mean is a thousand standard deviations, and means of either sign."""
    signs = np.where(np.arange(shape[-1]) % 2, 1.0, -1.0)
    x = jnp.asarray(np.asarray(3 * normal(0, *shape)) + 3 * deviations * signs, jnp.float32)
    with traced_for("gpu"):
        mean, var = jax.jit(lambda x: moments(x))(x)
    expected_mean, expected_var = ops.moments(x)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(var, expected_var, rtol=1e-5)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(var, exact.var(tuple(range(x.ndim - 1))), rtol=2e-5)


def test_a_channel_without_variance_has_none_and_nan_stays_nan():
    x = jnp.full((4, 3, 3, 2), 1e4).at[0, 1, 2, 1].set(jnp.nan)
    with traced_for("gpu"):
        mean, var = moments(x)
    assert (float(mean[0]), float(var[0])) == (1e4, 0.0)
    assert np.isnan(mean[1])
    assert np.isnan(var[1])


def test_shorter_floats_are_summed_in_float32():
    x = normal(0, 64, 16, 16, 3).astype(jnp.bfloat16) + jnp.bfloat16(8)
    with traced_for("gpu"):
        mean, var = moments(x)
    assert mean.dtype == var.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)


def by_autodiff(x, scale, bias):
    """A norm by the batch as autodiff takes it: two passes, then the map."""
    factor, offset = norm_affine((scale, bias, *ops.moments(x)), 1e-3, x.dtype)
    return ops.apply_affine(x, factor, offset)


def ours(x, scale, bias):
    return affine(x, *norm_affine((scale, bias, *batch_statistics(x)), 1e-3, x.dtype))


def derivatives(norm, x, scale, bias):
    """Gradients, gradients of their squares, and a derivative along a direction of the gradients."""

    def loss(x, scale, bias):
        y = norm(x, scale, bias)
        return (jnp.sin(y) * y).sum()

    grad = jax.grad(loss, (0, 1, 2))

    def of_gradients(*args):
        return sum((g * g).sum() for g in grad(*args))

    args = (x, scale, bias)
    tangents = tuple(jnp.cos(a) for a in args)
    return grad(*args), jax.grad(of_gradients, (0, 1, 2))(*args), jax.jvp(grad, args, tangents)[1]


def test_derivatives_by_hand_are_autodiffs():
    """First, second, and forward over reverse; in float64."""
    with jax.enable_x64(True):
        args = 2 + normal(0, 3, 5, 4, 6), normal(1, 6), normal(2, 6)
        with traced_for("gpu"):
            found = derivatives(ours, *args)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(derivatives(by_autodiff, *args)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_norm_relus_derivatives_by_hand_are_autodiffs():
    with jax.enable_x64(True):
        x, factor, offset = normal(0, 3, 5, 4, 6), normal(1, 6), normal(2, 6)

        def results(function):
            def loss(*args):
                return jnp.sin(function(*args)).sum()

            grad = jax.grad(loss, (0, 1, 2))
            second = jax.grad(lambda *a: sum((g * g).sum() for g in grad(*a)), (0, 1, 2))
            return grad(x, factor, offset), second(x, factor, offset)

        for a, b in zip(*map(jax.tree.leaves, (results(norm_relu), results(ops.norm_relu))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def reductions(function, *args):
    """(sums over whole maps in the program, the longest chain of them, each waiting for the one before)."""
    jaxpr, depth, count = jax.make_jaxpr(function)(*args).jaxpr, {}, 0

    def walk(jaxpr, given):
        nonlocal count
        depth.update(zip(jaxpr.invars, given, strict=True))
        for equation in jaxpr.eqns:
            before = [depth.get(v, 0) if not hasattr(v, "val") else 0 for v in equation.invars]
            inner = [v for v in equation.params.values() if hasattr(v, "jaxpr")]
            if inner:
                after = walk(inner[0].jaxpr, before[-len(inner[0].jaxpr.invars) :])
                depth.update(zip(equation.outvars, after, strict=True))
                continue
            sums = equation.primitive.name == "reduce_sum" and equation.invars[0].aval.ndim == 4
            count += sums
            depth.update({v: max(before, default=0) + sums for v in equation.outvars})
        return [depth.get(v, 0) if not hasattr(v, "val") else 0 for v in jaxpr.outvars]

    longest = max(walk(jaxpr, [0] * len(jaxpr.invars)))
    return count, longest


def test_a_norm_on_a_gpu_has_fewer_sums_and_waits_for_fewer():
    """Forward two sums side by side, where two passes wait for one another; with the way back four, not five."""
    args = normal(0, 3, 5, 4, 6), normal(1, 6), normal(2, 6)

    def step(norm):
        return jax.grad(lambda *args: (norm(*args) ** 2).sum((0, 1, 2)).sum(), (0, 1, 2))

    with traced_for("gpu"):
        assert reductions(lambda x: batch_statistics(x), args[0]) == (2, 1)
        found = reductions(step(ours), *args)
    assert reductions(lambda x: ops.moments(x), args[0]) == (2, 2)
    plain = reductions(step(by_autodiff), *args)
    loss = 1  # its own sum
    assert found[0] - loss == 4
    assert plain[0] - loss >= 5
    assert found[1] < plain[1]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        options = {"layers": 2, "growth": 4, "epsilon": 1e-3, "train": train, "mode": "train"}
        x, statistics = dense_block(x, name="conv2", **options)
        if statistics is not None:
            x = x * (1 + statistics[0] * jnp.sqrt(statistics[1] + 1))[None, None, None].astype(x.dtype)
        return jnp.sin(x)


class Depthwise(nn.Module):
    strides: int = 1
    size: int = 3

    @nn.compact
    def __call__(self, x, train=True):
        del train
        return jnp.sin(Conv(x.shape[-1], self.size, strides=self.strides, groups=x.shape[-1], name="depthwise")(x))


class Pointwise(nn.Module):
    strides: int = 1

    @nn.compact
    def __call__(self, x, train=True):
        del train
        return jnp.sin(Conv(6, 1, strides=self.strides, name="pointwise")(x))


class Pool(nn.Module):
    padding: Any = "SAME"
    window: int = 3
    stride: int = 2

    @nn.compact
    def __call__(self, x, train=True):
        del train
        x = self.param("scale", nn.initializers.ones, (x.shape[-1],))[None, None, None].astype(x.dtype) * x
        return jnp.sin(max_pool(x, self.window, self.stride, self.padding))


def outcome(module, variables, x, train):
    """Output, new statistics, and gradients of parameters and input."""

    def loss(params, x):
        y, new = module.apply(variables | {"params": params}, x, train, mutable=["batch_stats"])
        return (y.astype(jnp.float32) ** 2).sum() if x.dtype == jnp.bfloat16 else (y**2).sum(), (y, new)

    gradient = jax.grad(loss, (0, 1), has_aux=True)
    # As one program, but for bfloat16: within a program it rounds at other places.
    return (gradient if x.dtype == jnp.bfloat16 else jax.jit(gradient))(variables["params"], x)


FORMED = [
    pytest.param("dense_in_place", Block(), True, marks=pytest.mark.slow),
    pytest.param("dense_in_place", Block(), False, marks=pytest.mark.slow),
    pytest.param("dense_remat", Block(), True, marks=pytest.mark.slow),
    pytest.param("dense_remat", Block(), False, marks=pytest.mark.slow),
    pytest.param("depthwise_taps", Depthwise(1, 5), True, marks=pytest.mark.slow),
    ("plain_depthwise", Depthwise(), True),
    pytest.param("plain_depthwise", Depthwise(2), True, marks=pytest.mark.slow),
    ("pointwise_dot", Pointwise(), True),
    ("pointwise_dot", Pointwise(2), True),
    ("plain_pool", Pool(), True),
    ("plain_pool", Pool(1), True),
    ("plain_pool", Pool("VALID", 2, 2), True),
    ("plain_pool", Pool("VALID", 2, 3), True),
]


def test_equal_values_of_a_pool_give_the_gradient_to_the_first():
    x = jnp.asarray([[3.0, 3, 1], [3, 3, 3], [0, 3, 3]])[None, :, :, None]
    for forms in ((), ("plain_pool",)):
        with traced_for("gpu"), with_forms(*forms):
            found = jax.grad(lambda x: (max_pool(x, 2, 1, "VALID") * jnp.arange(1.0, 5).reshape(1, 2, 2, 1)).sum())(x)
        np.testing.assert_array_equal(found[0, :, :, 0], [[1, 2, 0], [3, 4, 0], [0, 0, 0]])


@pytest.mark.parametrize(("form", "module", "train"), FORMED)
def test_alternative_formulations_are_the_plain_ones(form, module, train):
    """In float64 to 1e-6 (parameters are kept in float32), in bfloat16 to its rounding."""
    for dtype, tolerance in ((np.float64, 1e-6), (jnp.bfloat16, 0.04)):
        with jax.enable_x64(dtype == np.float64), traced_for("gpu"):
            x = normal(0, 2, 6, 5, 8).astype(dtype)
            variables = module.init(jax.random.key(0), x)
            with with_forms():
                plain = outcome(module, variables, x, train)
            with with_forms(form):
                assert wants(form)
                found = outcome(module, variables, x, train)
            for a, b in zip(*map(jax.tree.leaves, (found, plain)), strict=True):
                assert a.dtype == b.dtype
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)


def test_forms_are_named_and_never_of_cpus(monkeypatch):
    with with_forms("dense_remat"):
        assert not wants("dense_remat")
    monkeypatch.setenv("BMJAX_FORMS", "dense_remat,depthwise_taps")
    with traced_for("gpu"):
        assert wants("depthwise_taps")
        assert not wants("dense_in_place")
        monkeypatch.setenv("BMJAX_FORMS", "faster")
        with pytest.raises(ValueError, match="BMJAX_FORMS holds faster; expected some of dense_in_place"):
            wants("dense_remat")


def test_a_norm_on_a_gpu_computes_what_it_does_on_a_cpu():
    x, norm = 3 + normal(0, 8, 6, 6, 5), BatchNorm()
    variables = norm.init(jax.random.key(0), x)

    def both(x):
        def loss(x):
            y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.sin(y).sum(), (y, new)

        return jax.grad(loss, has_aux=True)(x)

    with traced_for("gpu"):
        found = both(x)
    for a, b in zip(*map(jax.tree.leaves, (found, both(x))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
