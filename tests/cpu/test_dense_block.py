"""The block's own derivative against the plain one's, which autodiff takes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.layers import batch_statistics
from bmjax.layers.dense_block import dense_block
from bmjax.layers.dispatch import traced_for


class Block(nn.Module):
    """As a backbone calls it: statistics of the result are used, so their gradients enter."""

    layers: int = 3
    growth: int = 4

    @nn.compact
    def __call__(self, x, *, train, mode="train"):
        options = {"layers": self.layers, "growth": self.growth, "epsilon": 1e-3, "train": train, "mode": mode}
        x, statistics = dense_block(x, name="conv2", **options)
        if statistics is None:
            return jnp.sin(x)
        return jnp.sin(x) * (1 + statistics[0] * jnp.sqrt(statistics[1] + 1))[None, None, None]


def variables_and_input(block, dtype=np.float64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 6, 8)).astype(dtype))
    variables = block.init(jax.random.key(0), x, train=False)
    moved = jax.tree.map(lambda v: v + 0.1 * jnp.asarray(rng.standard_normal(v.shape), v.dtype), variables["params"])
    stats = jax.tree.map(lambda v: v + 0.1 * jnp.asarray(rng.uniform(0, 1, v.shape), v.dtype), variables["batch_stats"])
    return {"params": moved, "batch_stats": stats}, x


def results(block, variables, x, train, mode):
    """Output, new statistics, gradients by parameters and input, and a gradient of their sum of squares."""

    def loss(params, x):
        y, new = block.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            x,
            train=train,
            mode=mode,
            mutable=["batch_stats"],
        )
        return (y * jnp.cos(y)).sum(), (y, new)

    def of_gradients(params, x):
        return sum((g * g).sum() for g in jax.tree.leaves(jax.grad(lambda p, x: loss(p, x)[0], (0, 1))(params, x)))

    @jax.jit  # as one program, not one an operation
    def everything(params, x):
        grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, new, grads, jax.grad(of_gradients, 1)(params, x)

    return everything(variables["params"], x)


@pytest.mark.parametrize(
    ("train", "mode"), [(True, "train"), (True, "stats_frozen"), (True, "frozen"), (False, "train")]
)
def test_in_place_is_plain(train, mode):
    with jax.enable_x64(True):
        block = Block()
        variables, x = variables_and_input(block)
        ours = results(block, variables, x, train, mode)
        with traced_for("gpu"):
            plain = results(block, variables, x, train, mode)
        moved = [
            not np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(ours[1]), jax.tree.leaves({"batch_stats": variables["batch_stats"]}), strict=True
            )
        ]
        assert all(moved) if train and mode == "train" else not any(moved)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            # Parameters and statistics are kept in float32, so what is read from or written to them is too.
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_the_statistics_are_those_of_the_result():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense_block(x, name="b", layers=2, growth=3, epsilon=1e-3, train=True, mode="train")

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 5, 4)), jnp.float32)
    (y, statistics), variables = Both().init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y[..., :4], x)
    for ours, expected in zip(statistics, batch_statistics(y), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert y.shape[-1] == 10
    assert set(variables["params"]) == {f"b_block{i}_{n}" for i in (1, 2) for n in ("0_bn", "1_conv", "1_bn", "2_conv")}


def gradient_program(layers):
    block = Block(layers=layers, growth=16)
    x = jnp.zeros((4, 32, 32, 16))
    variables = jax.eval_shape(lambda: block.init(jax.random.key(0), x, train=False))

    def loss(params, stats, x):
        return block.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])[0].sum()

    return jax.jit(jax.grad(loss)).trace(variables["params"], variables["batch_stats"], x)


@pytest.mark.slow
def test_memory_grows_with_the_layers_not_with_their_square():
    def temporaries(layers):
        return gradient_program(layers).lower().compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(4), temporaries(16)
    with traced_for("gpu"):
        plain = temporaries(16)
    assert many < plain
    assert many < 6 * few


def test_on_accelerators_it_is_the_plain_block():
    with traced_for("gpu"):
        text = gradient_program(3).lower(lowering_platforms=("cuda",)).as_text()
    # Per layer two convolutions, each with two gradients, but for the first's input's.
    assert text.count("stablehlo.convolution") == 3 * 6
    assert "stablehlo.dot_general" not in text
    assert "dynamic_update_slice" not in text
