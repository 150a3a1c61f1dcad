"""Backbones with their `TIMM` fields against timm's outputs of the same weights (tests/golden/backbone_timm.md)."""

import json
import pathlib
import zlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from bmjax import registry
from bmjax.backbones import create_backbone

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def family_of(name):
    return next(m for m in registry.modules("bmjax.backbones").values() if name in m.VARIANTS)


def value_of(key, shape):
    """The weight of a timm key, in torch's layout: the rule by which the golden outputs were made."""
    r = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(r)
    if key.endswith(("running_mean", "bias")):
        return 0.1 * r
    if len(shape) == 1:
        return 1 + 0.1 * r
    return np.float32(1.4142135) * r / np.sqrt(np.float32(max(1, np.prod(shape[1:]))))


def from_torch(array):
    """OIHW -> HWIO, [out, in] -> [in, out]."""
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


@pytest.mark.parametrize(
    ("name", "timm"),
    [
        ("densenet121", "densenet121"),
        ("resnet50", "resnet50"),
        ("mobilenet_v2", "mobilenetv2_100"),
        ("efficientnetb5", "tf_efficientnet_b5"),
        ("xception", "legacy_xception"),
    ],
)
def test_weights_named_as_timm_names_them_give_its_outputs(name, timm):
    family, golden = family_of(name), np.load(GOLDEN / f"backbone_{timm}_timm.npz")
    keys = json.loads((GOLDEN / f"backbone_{timm}_timm_keys.json").read_text())
    keys = {key: tuple(shape) for key, shape in keys.items() if not key.endswith("num_batches_tracked")}
    x = np.random.default_rng(int(golden["input_seed"])).standard_normal(golden["input_shape"]).astype(np.float32)

    model = create_backbone(name, include_top=True, **family.TIMM)
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x))
    key_of = {path: f"{family.timm_name(model, path[1])}.{LEAVES[path[2]]}" for path in shapes}
    assert sorted(key_of.values()) == sorted(keys)
    flat = {path: from_torch(value_of(key, keys[key])) for path, key in key_of.items()}
    assert {path: value.shape for path, value in flat.items()} == {path: leaf.shape for path, leaf in shapes.items()}

    seen = {}

    @jax.jit
    def run(variables, x):
        logits = model.apply(variables, x, tap=lambda stage, x: seen.setdefault(stage, x))
        return seen[model.stages[-1]], logits

    features, logits = run(traverse_util.unflatten_dict(flat), x)
    assert features.shape == tuple(golden["features_shape"])
    features = np.asarray(features)
    ours = {"features_mean": features.mean((1, 2)), "features_first": features[0, 0, 0], "logits": np.asarray(logits)}
    for what, value in ours.items():
        error, largest = np.abs(value - golden[what]).max(), np.abs(golden[what]).max()
        assert error <= 1e-4 * largest, (what, error, largest)


@pytest.mark.parametrize("name", ["densenet121", "resnet50", "mobilenet_v2", "efficientnetb5", "xception"])
def test_a_layer_without_a_name_in_timm_is_refused(name):
    with pytest.raises(ValueError, match="layer is 'conv9_conv'"):
        family_of(name).timm_name(create_backbone(name), "conv9_conv")
