"""Every listed backbone names its stages and keeps the contract; the small ones are also run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bmjax import registry
from bmjax.analysis.contract.examine import examine
from bmjax.backbones import create_backbone, list_backbones, stage_of_parameters
from tests.helpers.slow import slow_but


@functools.cache
def shapes_of(name):
    return jax.eval_shape(lambda: create_backbone(name).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))


ALL = list_backbones()
# Those that are run: a family's other members differ in numbers only. DenseNet's small one has four blocks.
SMALL = [name for name in ALL if name.endswith("_tiny") or name == "densenet_small"]


def images(b=4, size=(40, 33)):
    return jnp.asarray(np.random.default_rng(0).standard_normal((b, *size, 3)), jnp.float32)


def test_every_family_has_a_small_and_a_tiny_member():
    for family in registry.modules("bmjax.backbones").values():
        (small,), (tiny,) = (
            [
                sum(leaf.size for leaf in jax.tree.leaves(shapes_of(name)))
                for name in family.VARIANTS
                if name.endswith(end)
            ]
            for end in ("_small", "_tiny")
        )
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
    stages = stage_of_parameters(model)
    params = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
    assert stages.keys() == traverse_util.flatten_dict(dict(params)).keys()
    assert set(stages.values()) == set(model.stages)
    of_layer = {path[0]: stage for path, stage in stages.items()}
    assert {layer: of_layer[layer] for layer in some} == some


# The others', which are made of the same layers, are in CI's slow part.
QUICK = {"densenet_tiny"}


@pytest.mark.parametrize("name", slow_but(QUICK, SMALL))
def test_the_contract_is_kept(name):
    """What a tap returns replaces the stage; gradients reach everything; frozen statistics stay; bfloat16 is near; four
    devices are one, in float64."""
    assert [v for v in examine("backbone", functools.partial(create_backbone, name)) if v.status != "ok"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_eager_is_jit_and_bfloat16_is_near(name):
    model = create_backbone(name)
    variables = jax.jit(model.init)(jax.random.key(0), images())
    eager = model.apply(variables, images())
    jitted = np.asarray(jax.jit(model.apply)(variables, images()))
    np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-5 * jitted.max())
    half = jax.jit(create_backbone(name, dtype=jnp.bfloat16).apply)(variables, images())
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - jitted).max() < 0.05 * jitted.max()


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown backbone 'densnet121'; did you mean 'densenet121'"):
        create_backbone("densnet121")
    with pytest.raises(TypeError, match="depth"):
        create_backbone("densenet121", depth=3)
