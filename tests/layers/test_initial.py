"""Initial values are those of one compiled program, and need no program of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import ModelConfig
from bmjax.layers.initial import evaluated, he_normal
from bmjax.model.create import create, init


@pytest.mark.parametrize("shape", [(3, 3, 20, 7), (1, 1, 64, 64), (7, 7, 3, 1), (5, 1, 1, 1)])
def test_he_normal_is_flaxs(shape):
    key = jax.random.key(3)
    expected = nn.initializers.variance_scaling(2.0, "fan_in", "normal")(key, shape, jnp.float32)
    # Where Flax's is one program, it rounds the product of two constants otherwise.
    np.testing.assert_allclose(he_normal(key, shape), expected, rtol=3e-7)


def test_variables_are_those_of_one_program():
    model = create(ModelConfig("densenet_tiny", None, attention="cbam"), 3)
    found = init(model, jax.random.key(1), 32)
    whole = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False))(jax.random.key(1))
    assert found.keys() == {"params", "batch_stats"}
    for kind in found:
        # A program may round a product of two constants and a value at another place.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), found[kind], dict(whole[kind]))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


class Whitened(nn.Module):
    """A scale that begins at what the data are, behind a product."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4)(x)
        return y * self.param("scale", lambda key: 1 / y.std())


def test_values_that_depend_on_data_are_compiled_whole():
    x = jnp.arange(12.0).reshape(3, 4)
    found = evaluated(lambda key: Whitened().init(key, x), jax.random.key(0))
    expected = jax.jit(lambda key: Whitened().init(key, x))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_the_results_do_not_need_is_not_computed():
    def function(key):
        jax.debug.callback(lambda: pytest.fail("computed"))
        return {"a": jax.random.normal(key, (3,)), "b": jnp.zeros((2, 2)), "c": jnp.float32(1)}

    found = evaluated(function, jax.random.key(0))
    np.testing.assert_array_equal(found["a"], jax.random.normal(jax.random.key(0), (3,)))
    np.testing.assert_array_equal(found["b"], np.zeros((2, 2)))
    assert found["c"] == 1


def test_kernels_of_many_shapes_share_programs():
    """Else a fresh machine compiles one for each shape before its first step."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    def function(key):
        shapes = [(1, 1, 64, n) for n in range(33, 65)]  # of one power of four in all
        return [he_normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)], jnp.zeros((3, 5))

    key = jax.random.key(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        found, zeros = evaluated(function, key)
        jax.block_until_ready((found, zeros))
        jax.jit(lambda: jnp.ones(3))().block_until_ready()  # always a new program: what listens does hear
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert 1 <= len(compiled) <= 4  # fewer where an earlier test of this process has compiled them
    np.testing.assert_array_equal(found[5], he_normal(jax.random.fold_in(key, 5), (1, 1, 64, 38)))


def test_within_a_trace_it_is_traced():
    shape = jax.eval_shape(lambda: evaluated(lambda key: he_normal(key, (3, 3, 2, 5)), jax.random.key(0)))
    assert shape.shape == (3, 3, 2, 5)
