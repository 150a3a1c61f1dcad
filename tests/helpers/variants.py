"""What the tests of attention share: features, variables, and the outputs of a variant from one compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.attention import create_attention

C = 32
SHAPE = (4, 5, 4, C)
# Compiling is most of what these tests cost, so one program has all sizes.
SMALL = ((1, 1), (1, 4))


def features(shape=SHAPE, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def random_variables(name, **options):
    """Random variables, biases and statistics too, so that nothing hides behind a zero."""
    variables = jax.eval_shape(create_attention(name, **options).init, jax.random.key(0), features())
    r = np.random.default_rng(1)

    def leaf(path, v):
        noise = 0.1 * r.standard_normal(v.shape)
        kind = path[-1].key
        if kind == "var":
            noise = 1 + np.abs(noise)
        elif kind == "kernel":
            noise *= 10 * np.sqrt(2 / np.prod(v.shape[:-1]))
        elif kind in ("scale", "weights"):
            noise += 1
        return jnp.asarray(noise, v.dtype)

    kept = {k: v for k, v in variables.items() if k in ("params", "batch_stats")}
    return jax.tree_util.tree_map_with_path(leaf, kept)


@functools.cache
def variables_of(name):
    return random_variables(name)


def forward(module, variables, x, train=False):
    """{"y", "map", "stats"}."""
    y, new = module.apply(
        variables, x, train=train, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats", "intermediates"]
    )
    return {"y": y, "map": new["intermediates"]["map"][0], "stats": new.get("batch_stats", {})}


@functools.cache
def ordinary(name):
    """What `forward` gives of the ordinary features in evaluation, by height and width."""
    module, (h, w) = create_attention(name), SHAPE[1:3]

    @jax.jit
    def everything(variables, x):
        return {(h, w): forward(module, variables, x[:, :h, :w]) for h, w in ((h, w), *SMALL)}

    return everything(variables_of(name), features())
