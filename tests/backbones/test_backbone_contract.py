"""Every listed backbone names its stages and keeps the contract; the small ones are also run."""

import dataclasses
import functools
import json
import re

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
    with pytest.raises(ValueError, match="unknown option of backbone 'densenet121' 'grow'; did you mean 'growth'"):
        create_backbone("densenet121", grow=3)
    with pytest.raises(TypeError, match=r"^name is None; expected text: a backbone's name"):
        create_backbone(None)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("densenet_tiny", {"growth": "8"}, "a whole number, at least 1"),
        ("densenet_tiny", {"growth": True}, "a whole number, at least 1"),
        ("densenet_tiny", {"stem": 0}, "a whole number, at least 1"),
        ("densenet_tiny", {"blocks": 4}, "a list, each a whole number, at least 1; not empty"),
        ("densenet_tiny", {"blocks": []}, "a list, each a whole number, at least 1; not empty"),
        ("densenet_tiny", {"blocks": [2, 0]}, "a list, each a whole number, at least 1; not empty"),
        ("densenet_tiny", {"reduction": 1.5}, "a number, above 0 and at most 1"),
        ("densenet_tiny", {"include_top": "yes"}, "True or False"),
        ("resnet_tiny", {"width": 8.0}, "a whole number, at least 1"),
        ("xception_tiny", {"stem": [8]}, "a list of 2: a whole number, a whole number, at least 1"),
        ("xception_tiny", {"pool_padding": "VALID"}, "'SAME' or 1"),
        ("mobilenet_v2_tiny", {"alpha": 0}, "a number, above 0"),
        (
            "mobilenet_v2_tiny",
            {"rows": [[1, 16, 1]]},
            "a list, each [expansion, channels, repeats, stride], at least 1; not empty",
        ),
        ("efficientnet_tiny", {"dropout": 1}, "a number, 0..1, 1 excluded"),
    ],
)
def test_each_option_is_held_to_its_field(name, options, expected):
    ((option, value),) = options.items()
    words = re.escape(f"option {option!r} of backbone {name!r} is {value!r}; expected {expected}")
    with pytest.raises(ValueError, match=f"^{words}$"):
        create_backbone(name, **options)


@pytest.mark.parametrize("name", list_backbones())
def test_its_own_fields_are_options(name):
    """As from a run's record, where tuples are lists."""
    module = create_backbone(name)
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in ("parent", "name")}
    assert create_backbone(name, **json.loads(json.dumps(fields))) == module
    assert create_backbone("xception_tiny", middle=0).stages == tuple(f"block{i}" for i in range(1, 6))


def test_options_of_ones_own_are_held_to_their_types(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        "import flax.linen as nn\nclass Net(nn.Module):\n    wide: int\n    stages: tuple[str, ...] = ('one',)\n"
        "    def __call__(self, x, *, train=False, mode='train', tap=None):\n        return tap('one', x)\n"
    )
    assert create_backbone(str(path), wide=-2, stages=["a", "b"], dtype="float32").stages == ("a", "b")
    for options, message in [
        ({"wide": "8"}, "is '8'; expected a whole number$"),
        ({"wid": 8}, "unknown option of backbone .* 'wid'; did you mean 'wide'"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_backbone(str(path), **{"wide": 8} | options)
    with pytest.raises(TypeError, match=r"has no default for 'wide'; expected one, or a value in its options$"):
        create_backbone(str(path))
