"""Every listed attention variant keeps the contract."""

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import SHAPE, SMALL, C, features, forward, ordinary, run, variables_of

from bmjax.attention import IdentityGate, create_attention, list_attention
from bmjax.layers import BATCH_AXIS

ALL = list_attention()
every_variant = pytest.mark.parametrize("name", ALL)


def all_finite(tree):
    return all(np.isfinite(np.asarray(v, np.float32)).all() for v in jax.tree.leaves(tree))


def test_the_variants_are_listed_and_have_their_formulas():
    expected = "bam cbam coordinate double eca ese gather_excite gaussian_context global_context large_kernel mhsa "
    expected += "non_local none scse se selective_kernel sge shuffle simam soft style_recalibration triplet"
    assert set(expected.split()) <= set(ALL)
    assert all(hasattr(formulas, name) for name in expected.split())


@every_variant
def test_shapes_types_and_the_map(name):
    for (dtype, *size), out in ordinary(name).items():
        shape = (SHAPE[0], *size, C) if len(size) == 2 else SHAPE
        assert (out["y"].shape, out["y"].dtype) == (shape, jnp.dtype(dtype))
        m = np.asarray(out["map"], np.float32)
        assert m.shape in (shape[:3], (shape[0], C))
        assert 0 <= m.min() <= m.max() <= 1
        assert all_finite(out)
    assert {key[1:] for key in ordinary(name) if len(key) == 3} == set(SMALL)


@every_variant
def test_the_gradient_reaches_every_parameter_and_the_input(name):
    grads, grad_x = ordinary(name)["float32", True]["grads"]
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 1e-6, f"no gradient at {jax.tree_util.keystr(path)}"
    assert (np.abs(grad_x).max((1, 2, 3)) > 0).all()


@every_variant
def test_constant_and_huge_features_give_no_nan(name):
    for value in (0.0, 1.0, -300.0, 1e4):
        assert all_finite(run(name, jnp.full(SHAPE, value, jnp.float32))), value
    assert all_finite(run(name, 1e4 * features()))


@every_variant
def test_samples_do_not_leak_into_each_other_in_evaluation(name):
    changed = run(name, features().at[0].set(17 * features(seed=9)[0]))
    for dtype in ("float32", "bfloat16"):
        for kind in ("y", "map"):
            assert np.array_equal(ordinary(name)[dtype, False][kind][1:], changed[dtype, False][kind][1:])


@every_variant
def test_eager_is_jit_and_one_sample_is_as_among_others(name):
    eager = forward(create_attention(name), variables_of(name), features()[1:2])
    compiled = ordinary(name)["float32", False]
    for kind in ("y", "map"):
        np.testing.assert_allclose(eager[kind], compiled[kind][1:2], rtol=1e-5, atol=1e-5)


@every_variant
def test_behind_the_gate_every_variant_starts_as_the_identity(name):
    x, out = features(), ordinary(name)["float32", True]
    gamma = {"params": {"gamma": jnp.zeros(C)}}
    assert np.array_equal(IdentityGate().apply(gamma, x, out["y"]), x)
    gradient = jax.grad(lambda v: (IdentityGate().apply(v, x, out["y"]) * features(seed=5)).sum())(gamma)
    assert np.array_equal(gradient["params"]["gamma"] != 0, np.any(out["y"] != x, (0, 1, 2)))


@every_variant
def test_evaluation_moves_no_statistics_and_training_all(name):
    old = jax.tree.leaves(variables_of(name).get("batch_stats", {}))
    for train in (False, True):
        new = jax.tree.leaves(ordinary(name)["float32", train]["stats"])
        assert [np.array_equal(a, b) for a, b in zip(old, new, strict=True)] == [not train] * len(old)


@every_variant
def test_variables_do_not_depend_on_train_or_size(name):
    def shapes(train, shape):
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = jax.eval_shape(lambda: create_attention(name).init(rngs, features(shape), train=train))
        return jax.tree.map(jnp.shape, {k: v for k, v in variables.items() if k != "intermediates"})

    assert shapes(False, SHAPE) == shapes(True, SHAPE) == shapes(True, (1, 3, 2, C))
    # A stage may have any even number of channels.
    for c in (2, 14, 136):
        shapes(False, (1, 2, 2, c))


@every_variant
def test_float64_is_float64_and_four_devices_are_one(name):
    """Devices as pmap has them, by a map over the same axis name: a sample each."""
    module = create_attention(name)

    @jax.jit
    def one_and_four(variables, x):
        four = jax.vmap(lambda x: forward(module, variables, x, train=True), axis_name=BATCH_AXIS)(x[:, None])
        return forward(module, variables, x, train=True), four

    with jax.enable_x64(True):
        double = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), variables_of(name))
        one, four = one_and_four(double, jnp.asarray(features(), jnp.float64))
    assert {leaf.dtype for leaf in jax.tree.leaves((one, four))} == {jnp.dtype("float64")}
    for kind in ("y", "map"):
        np.testing.assert_allclose(four[kind][:, 0], one[kind], rtol=1e-10, atol=1e-10)
    for a, b in zip(jax.tree.leaves(one["stats"]), jax.tree.leaves(four["stats"]), strict=True):
        np.testing.assert_allclose(b, np.broadcast_to(a, b.shape), rtol=1e-10, atol=1e-10)
    single = ordinary(name)["float32", True]["y"]
    np.testing.assert_allclose(single, one["y"], rtol=1e-4, atol=1e-5)
    # A hidden cast to float32 would leave these equal in every digit.
    assert np.array_equal(single, features()) or not np.array_equal(single, one["y"])


@every_variant
def test_modules_are_hashable_and_equal(name):
    assert hash(create_attention(name)) == hash(create_attention(name))
    assert create_attention(name) == create_attention(name)
