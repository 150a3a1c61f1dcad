"""Every listed backbone names its stages and keeps the contract; the small ones are also run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import registry
from bmjax.backbones import create_backbone, list_backbones, stage_of_layers
from bmjax.layers import BATCH_AXIS, all_sum


@functools.cache
def shapes_of(name):
    return jax.eval_shape(lambda: create_backbone(name).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))


ALL = list_backbones()
# Those that are run: a family's other members differ in numbers only. DenseNet's small one has four blocks.
SMALL = [name for name in ALL if name.endswith("_tiny") or name == "densenet_small"]


def images(b=4, size=(40, 33), dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((b, *size, 3)), dtype)


@functools.cache
def variables_of(name):
    return jax.jit(create_backbone(name).init)(jax.random.key(0), images())


def test_every_family_has_a_small_and_a_tiny_member():
    for family in registry.modules("bmjax.backbones").values():
        sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(shapes_of(name))) for name in family.VARIANTS}
        (small,) = (size for name, size in sizes.items() if name.endswith("_small"))
        (tiny,) = (size for name, size in sizes.items() if name.endswith("_tiny"))
        assert tiny < 60_000 < small < 500_000, family.__name__


@pytest.mark.parametrize("name", ALL)
def test_stages_are_tapped_in_order_and_once(name):
    model, seen = create_backbone(name), []

    def tap(stage, x):
        seen.append((stage, x.shape))
        return x

    out = jax.eval_shape(lambda v: model.apply(v, jnp.zeros((2, 64, 96, 3), jnp.bfloat16), tap=tap), shapes_of(name))
    assert tuple(stage for stage, _ in seen) == model.stages
    assert seen[-1][1] == out.shape
    assert out.dtype == jnp.bfloat16
    sizes = [shape[1] for _, shape in seen]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("densenet_tiny", {"conv1_bn": "conv1", "conv2_block1_1_conv": "conv2", "pool2_conv": "conv3", "bn": "conv4"}),
        ("resnet_tiny", {"conv1_conv": "conv1", "conv2_block1_0_conv": "conv2", "predictions": "conv4"}),
        ("mobilenet_v2_tiny", {"bn_Conv1": "Conv1", "Conv_1_bn": "Conv_1", "predictions": "Conv_1"}),
        ("efficientnet_tiny", {"stem_bn": "stem", "top_bn": "top", "predictions": "top"}),
        ("xception_tiny", {"conv2d": "block2", "batch_normalization": "block2"}),
    ],
)
def test_each_layer_is_of_the_stage_that_comes_next(name, some):
    model = create_backbone(name, include_top=True)
    stages = stage_of_layers(model)
    assert stages.keys() == jax.eval_shape(model.init, jax.random.key(0), images())["params"].keys()
    assert set(stages.values()) == set(model.stages)
    assert {layer: stages[layer] for layer in some} == some


@functools.cache
def float64_variables_of(name):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), variables_of(name))


@pytest.mark.parametrize("name", SMALL)
def test_what_a_tap_returns_replaces_the_stage(name):
    model = create_backbone(name)
    with jax.enable_x64(True):
        x, variables = images(dtype=jnp.float64), float64_variables_of(name)

        @jax.jit
        def run(factors):
            return model.apply(variables, x, tap=lambda stage, x: factors[model.stages.index(stage)] * x)

        ones = jnp.ones(len(model.stages))
        plain = run(ones)
        np.testing.assert_allclose(plain, jax.jit(model.apply)(variables, x), rtol=1e-9, atol=1e-9)
        for i, stage in enumerate(model.stages):
            assert not np.allclose(run(ones.at[i].set(0.5)), plain, rtol=1e-3), stage
        np.testing.assert_allclose(run(ones.at[-1].set(0.5)), plain / 2, rtol=1e-9, atol=1e-9)


def loss_and_grads(name, variables, x, mode="train"):
    model, rngs = create_backbone(name), {"dropout": jax.random.key(7)}

    def loss(params):
        variables_ = variables | {"params": params}
        y, new = model.apply(variables_, x, train=True, mode=mode, mutable=["batch_stats"], rngs=rngs)
        return (jnp.sin(y) * jnp.cos(jnp.arange(y.size // len(y), dtype=y.dtype)).reshape(1, *y.shape[1:])).sum(), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    return all_sum(grads), new


@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_reaches_every_parameter(name):
    """By the stored statistics: those of the batch take a bias before them away again, and with it its gradient."""
    step = functools.partial(loss_and_grads, name, mode="stats_frozen")
    grads, _ = jax.jit(step)(variables_of(name), images())
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), jax.tree_util.keystr(path)
        assert np.abs(g).max() > 1e-7, f"no gradient at {jax.tree_util.keystr(path)}"


@pytest.mark.parametrize("name", SMALL)
def test_eager_is_jit_and_bfloat16_is_near(name):
    model, variables = create_backbone(name), variables_of(name)
    eager = model.apply(variables, images())
    jitted = np.asarray(jax.jit(model.apply)(variables, images()))
    np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-5 * jitted.max())
    half = jax.jit(create_backbone(name, dtype=jnp.bfloat16).apply)(variables, images())
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - jitted).max() < 0.05 * jitted.max()


@pytest.mark.parametrize("name", SMALL)
def test_four_devices_are_one(name):
    """Gradients and running statistics under pmap, in float64."""
    with jax.enable_x64(True):
        x = images(dtype=jnp.float64)
        fn = functools.partial(loss_and_grads, name, float64_variables_of(name))
        one, four = jax.jit(fn)(x), jax.pmap(fn, axis_name=BATCH_AXIS)(x[:, None])
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
            # The floor: a bias that a later norm takes away has a gradient of rounding only.
            floor = 1e-9 * np.abs(a).max() + 1e-12
            np.testing.assert_allclose(b, np.broadcast_to(a, b.shape), rtol=1e-9, atol=floor)


@pytest.mark.parametrize("name", SMALL)
def test_frozen_statistics_stay_bit_equal(name):
    model, variables = create_backbone(name), variables_of(name)
    for mode in ("stats_frozen", "frozen"):
        run = functools.partial(model.apply, train=True, mode=mode, mutable=["batch_stats"])
        y, new = jax.jit(run)(variables, images())
        np.testing.assert_array_equal(y, jax.jit(model.apply)(variables, images()))
        jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown backbone 'densnet121'; did you mean 'densenet121'"):
        create_backbone("densnet121")
    with pytest.raises(TypeError, match="depth"):
        create_backbone("densenet121", depth=3)
