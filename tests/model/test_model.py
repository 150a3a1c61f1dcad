"""The classifier: its parts, its head, where attention goes, and what frozen means."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bmjax.backbones import create_backbone, list_backbones
from bmjax.config import BatchNormConfig, HeadConfig, ModelConfig
from bmjax.config.training import PARTS
from bmjax.model.create import create, init
from bmjax.model.parameters import count_parameters, parameter_table, part_of
from bmjax.weights.preprocess import preprocess
from tests.helpers.slow import slow_but

TINY = ModelConfig(backbone="densenet_tiny", weights=None, attention="cbam", head=HeadConfig(widths=(16,)))
NETS = [name for name in list_backbones() if name.endswith("_tiny")]
K = 5


def pixels(b=4, h=32, w=37, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (b, h, w, 3), dtype=np.uint8)


@functools.cache
def made(config_key=(), dtype="float32"):
    config = dataclasses.replace(TINY, **dict(config_key))
    model = create(config, K, dtype)
    return model, init(model, jax.random.key(0), 32, config)


def apply(model, variables, images, **options):
    return jax.jit(functools.partial(model.apply, **options))(variables, images)


def test_logits_of_pixels_have_shape_and_type():
    model, variables = made()
    logits = apply(model, variables, pixels())
    assert logits.shape == (4, K)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(apply(model, variables, pixels().astype(np.float32)), logits, rtol=1e-5, atol=1e-6)
    # In evaluation a sample does not see the others.
    np.testing.assert_allclose(apply(model, variables, pixels()[:1]), logits[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "soft"])
def test_top_level_names_are_the_parts(name):
    model, variables = made((("attention", name),))
    has_params = name != "none"
    assert set(variables["params"]) == {"backbone", "head"} | ({"attention"} if has_params else set())
    assert set(variables["params"]["head"]) == {"batch_norm", "dense1", "logits"}
    assert type(variables) is dict
    assert type(variables["params"]["head"]) is dict
    logits = apply(model, variables, pixels())
    assert np.isfinite(logits).all()


def gated_everywhere(backbone):
    """(gated, plain, variables): attention behind gates after all stages, and the same network without any."""
    stages = create_backbone(backbone).stages
    config = dataclasses.replace(TINY, backbone=backbone, attention="none")
    gated = create(dataclasses.replace(config, attention="eca+simam", attach=stages, attention_gate=True), K)
    shapes = jax.eval_shape(lambda: gated.init(jax.random.key(0), pixels()))
    r = np.random.default_rng(0)

    def leaf(path, v):
        if path[-1].key == "gamma":
            return np.zeros(v.shape, v.dtype)
        near_one = path[-1].key in ("scale", "var")
        noise = r.standard_normal(v.shape) / np.sqrt(max(1, np.prod(v.shape[:-1])))
        return (1 + 0.5 * np.tanh(noise) if near_one else noise).astype(v.dtype)

    variables = {name: jax.tree_util.tree_map_with_path(leaf, dict(shapes[name])) for name in ("params", "batch_stats")}
    return gated, create(config, K), variables


@pytest.mark.parametrize("backbone", slow_but({"mobilenet_v2_tiny"}, NETS))
def test_behind_gates_the_network_starts_as_without_attention_bit_by_bit(backbone):
    gated, plain, variables = gated_everywhere(backbone)
    without = {
        name: {part: tree[part] for part in ("backbone", "head") if part in tree} for name, tree in variables.items()
    }
    # Not under jit: XLA fuses the two networks' loops differently, and that rounds differently.
    np.testing.assert_array_equal(gated.apply(variables, pixels()), plain.apply(without, pixels()))
    # What pretrained weights are merged into, leaf by leaf, is the backbone's own tree.
    alone = jax.eval_shape(create_backbone(backbone).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    for name, tree in without.items():
        assert jax.tree.map(jnp.shape, tree["backbone"]) == jax.tree.map(jnp.shape, dict(alone[name]))


def test_every_gamma_has_a_gradient_at_the_start_and_attention_none_yet():
    gated, _, variables = gated_everywhere("resnet_tiny")

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = gated.apply(variables | {"params": params}, pixels())
        return (logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)).sum()

    grads = gradient(variables["params"])
    for stage, _ in gated.attention:
        assert np.abs(grads[f"attention_{stage}_gate"]["gamma"]).max() > 1e-6, stage
        assert not any(np.any(g) for g in jax.tree.leaves(grads[f"attention_{stage}"])), stage


def test_the_gate_leaves_the_names_of_the_other_parameters():
    def names(**changes):
        model = create(dataclasses.replace(TINY, **changes), K)
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels(1)))
        return {"/".join(path) for path in traverse_util.flatten_dict(dict(variables["params"]))}

    assert names(attention_gate=True) - names() == {"attention_gate/gamma"}
    assert names(attention="se+cbam") - names(attention="none") >= {"attention/se/reduce/kernel"}
    several = names(attention="se", attach=("conv3", "last"), attention_gate=True)
    assert several >= {"attention_conv3/reduce/kernel", "attention_conv3_gate/gamma", "attention_conv4_gate/gamma"}


def test_bfloat16_computes_features_and_returns_float32_logits():
    model, variables = made(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = apply(model, variables, pixels())
    assert logits.dtype == jnp.float32
    assert apply(model, variables, pixels(), method="feature_map").dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, apply(*made(), pixels()), atol=0.1)


def test_float64_is_float64_throughout():
    with jax.enable_x64(True):
        model, variables = made(dtype="float64")
        variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        logits = np.asarray(apply(model, variables, pixels()))
    assert logits.dtype == np.float64
    single = np.asarray(apply(*made(), pixels()))
    assert 0 < np.abs(logits - single).max() < 1e-4  # zero would mean float32 somewhere within


def test_init_is_reproducible_and_depends_on_the_key():
    model, variables = made()
    again = init(model, jax.random.key(0), 32)
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    other = init(model, jax.random.key(1), 48)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, variables)
    assert not np.array_equal(
        other["params"]["head"]["logits"]["kernel"], variables["params"]["head"]["logits"]["kernel"]
    )


def test_features_are_what_the_head_gets():
    model, variables = made()
    features = apply(model, variables, pixels(), method="features")
    p = jax.tree.map(np.asarray, variables["params"]["head"])
    stats = jax.tree.map(np.asarray, variables["batch_stats"]["head"]["batch_norm"])
    norm = p["batch_norm"]
    x = (np.asarray(features) - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * norm["scale"] + norm["bias"]
    x = np.maximum(x @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    x = x @ p["logits"]["kernel"] + p["logits"]["bias"]
    np.testing.assert_allclose(apply(model, variables, pixels()), x, rtol=1e-4, atol=1e-5)


def test_feature_map_comes_before_attention_and_features_after():
    model, variables = made((("attention", "soft"),))
    feature_map = apply(model, variables, pixels(), method="feature_map")
    attention = dict(model.attention)["conv4"]
    weighted = attention.apply({"params": variables["params"]["attention"]}, feature_map)
    features = apply(model, variables, pixels(), method="features")
    np.testing.assert_allclose(features, np.asarray(weighted).mean((1, 2)), rtol=1e-4, atol=1e-5)
    assert not np.allclose(features, np.asarray(feature_map).mean((1, 2)), rtol=1e-3)
    assert feature_map.shape == (4, 2, 2, features.shape[-1])


def test_the_backbone_gets_its_weights_preprocessing():
    model, variables = made((("attention", "none"),))
    assert model.preprocess == "torch"
    x = preprocess(jnp.asarray(pixels(), jnp.float32), "torch")
    backbone = {name: tree["backbone"] for name, tree in variables.items()}
    expected = model.backbone.apply(backbone, x)
    np.testing.assert_allclose(apply(model, variables, pixels(), method="feature_map"), expected, rtol=1e-4, atol=1e-5)


def test_attention_after_several_stages():
    attach = ("conv2", "conv3", "last")
    model, variables = made((("attention", "se"), ("attach", attach)))
    names = ["attention_conv2", "attention_conv3", "attention_conv4"]
    assert [n for n in sorted(variables["params"]) if n.startswith("attention")] == names
    base = apply(model, variables, pixels())
    _, sown = apply(model, variables, pixels(), mutable=["intermediates"])
    # Beside them each stage's own output, which explanations read.
    assert [n for n in sorted(sown["intermediates"]) if not n.startswith("stage_")] == names
    channels = {n: sown["intermediates"][n]["map"][0].shape[1] for n in names}
    for name in names:
        assert variables["params"][name]["expand"]["bias"].shape == (channels[name],)
        # Each is in the path: a gate shut to almost nothing changes the logits.
        params = {**variables["params"], name: jax.tree.map(lambda v: v - 3.0, variables["params"][name])}
        assert not np.allclose(apply(model, {**variables, "params": params}, pixels()), base, rtol=1e-3), name
    # Those before the last stage are in the last stage's map, its own is not.
    shut = lambda n: {**variables["params"], n: jax.tree.map(lambda v: v - 3.0, variables["params"][n])}  # noqa: E731
    maps = [
        apply(model, {**variables, "params": shut(n)}, pixels(), method="feature_map") for n in (names[0], names[2])
    ]
    plain = apply(model, variables, pixels(), method="feature_map")
    assert not np.allclose(maps[0], plain, rtol=1e-3)
    np.testing.assert_array_equal(maps[1], plain)


def test_errors_of_create_name_what_is_wrong():
    def bad(**changes):
        return create(dataclasses.replace(TINY, **changes), K)

    with pytest.raises(ValueError, match=r"in model\.attach 'conv9'; did you mean"):
        bad(attach=("conv9",))
    with pytest.raises(ValueError, match=r"model\.attach.*expected each stage once"):
        bad(attach=("conv4", "last"))
    attention, backbone = "^config field 'model.attention_options': ", "^config field 'model.backbone_options'"
    words = "unknown option of attention 'cbam' 'kernel'; did you mean 'kernel_size'"
    with pytest.raises(ValueError, match=attention + words):
        bad(attention_options={"kernel": 3})
    words = "option 'ratio' of attention 'cbam' is 0; expected a whole number, at least 1$"
    with pytest.raises(ValueError, match=attention + words):
        bad(attention_options={"ratio": 0})
    with pytest.raises(ValueError, match=attention + "option 'se' of attention .* is 3; expected a dict"):
        bad(attention="cbam+se", attention_options={"se": 3})
    with pytest.raises(ValueError, match=attention + "unknown option of attention 'cbam' 'name'"):
        bad(attention_options={"name": "x"})
    words = ": option 'growth' of backbone 'densenet_tiny' is '8'; expected a whole number, at least 1$"
    with pytest.raises(ValueError, match=backbone + words):
        bad(backbone_options={"growth": "8"})
    with pytest.raises(ValueError, match=backbone + " is {'dtype': 'bfloat16'}; expected no dtype"):
        bad(backbone_options={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"unknown part of attention 'cbam\+se' in its options 'cban'; did you mean"):
        bad(attention="cbam+se", attention_options={"cban": {}})
    with pytest.raises(ValueError, match="num_classes is 0"):
        create(TINY, 0)


def test_a_module_with_a_dtype_field_gets_the_compute_type(tmp_path, monkeypatch):
    source = "from typing import Any\nimport flax.linen as nn\nclass Typed(nn.Module):\n    dtype: Any = None\n"
    source += "    def __call__(self, x, *, train=False):\n        return x.astype(self.dtype)\n"
    (tmp_path / "typed_attn.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = create(dataclasses.replace(TINY, attention="typed_attn:Typed"), K, "bfloat16")
    assert dict(model.attention)["conv4"].dtype == jnp.bfloat16
    options = {"Typed_2": {"dtype": "float32"}}
    twice = dataclasses.replace(TINY, attention="typed_attn:Typed+typed_attn:Typed", attention_options=options)
    chain = dict(create(twice, K, "bfloat16").attention)["conv4"]
    assert {name: module.dtype for name, module in chain.variants} == {"Typed": jnp.bfloat16, "Typed_2": "float32"}


def test_parts_and_counts():
    _, variables = made((("attach", ("conv3", "last")),))
    flat = traverse_util.flatten_dict(variables["params"])
    assert {part_of(path) for path in flat} == set(PARTS)
    assert all(part_of(path) == path[0].split("_")[0] for path in flat)
    for path in [("conv1_conv", "kernel"), ("params", "head"), ("attentive",), ()]:
        with pytest.raises(ValueError, match="begins with no part"):
            part_of(path)
    assert count_parameters(variables) == sum(np.size(v) for v in jax.tree.leaves(variables))


def test_full_size_counts():
    """DenseNet121 with `soft` and the default head: backbone + (1024*64+64 + 64*16+16 + 17) + head."""
    model = create(ModelConfig(weights=None), 7)
    variables = jax.eval_shape(lambda: init(model, jax.random.key(0), 64))
    params = {name: count_parameters(tree) for name, tree in variables["params"].items()}
    stats = {name: count_parameters(tree) for name, tree in variables["batch_stats"].items()}
    assert params["backbone"] + stats["backbone"] == 7_037_504
    assert params["attention"] == 1024 * 64 + 64 + 64 * 16 + 16 + 16 + 1
    assert params["head"] == 2 * 1024 + 1024 * 256 + 256 + 256 * 7 + 7
    assert stats == {"backbone": 7_037_504 - params["backbone"], "head": 2 * 1024}


def test_parameter_table_has_every_leaf_once():
    _, variables = made()
    rows = parameter_table(variables)
    assert len(rows) == len(jax.tree.leaves(variables))
    assert sum(row.count for row in rows) == count_parameters(variables)
    by_path = {(row.collection, row.path): row for row in rows}
    assert by_path["params", "backbone/conv1_bn/scale"].is_norm
    assert by_path["batch_stats", "head/batch_norm/mean"].is_norm
    kernel = by_path["params", "backbone/conv1_conv/kernel"]
    assert (kernel.is_norm, kernel.part, kernel.shape) == (False, "backbone", (7, 7, 3, 8))


# Training.


def train_apply(model, variables, batch_norm, seed=0, images=None):
    logits, new = apply(
        model,
        variables,
        pixels() if images is None else images,
        train=True,
        batch_norm=batch_norm,
        rngs={"dropout": jax.random.key(seed)},
        mutable=["batch_stats"],
    )
    return logits, new["batch_stats"]


def unchanged(old, new):
    """Which leaves are bit-equal, by path."""
    old, new = traverse_util.flatten_dict(old), traverse_util.flatten_dict(new)
    assert old.keys() == new.keys()
    return {path: bool(np.array_equal(old[path], new[path])) for path in old}


@pytest.mark.parametrize("mode", ["frozen", "stats_frozen"])
@pytest.mark.parametrize("part", PARTS)
def test_frozen_statistics_stay_bit_equal_and_the_others_move(part, mode):
    model, variables = made()
    _, stats = train_apply(model, variables, BatchNormConfig(**{part: mode}))
    for path, same in unchanged(variables["batch_stats"], stats).items():
        assert same == (part_of(path) == part), path


def test_a_frozen_part_runs_as_in_evaluation():
    model, variables = made()
    frozen = BatchNormConfig(backbone="frozen", attention="frozen", head="frozen")
    still = create(dataclasses.replace(TINY, head=HeadConfig(widths=(16,), dropout=0.0)), K)
    logits, stats = train_apply(still, variables, frozen)
    np.testing.assert_array_equal(logits, apply(model, variables, pixels()))
    assert all(unchanged(variables["batch_stats"], stats).values())
    # Dropout is no norm: it follows train.
    assert not np.array_equal(train_apply(model, variables, frozen)[0], logits)
    assert not np.array_equal(
        train_apply(model, variables, frozen, seed=1)[0], train_apply(model, variables, frozen)[0]
    )


@pytest.mark.parametrize(("mode", "norms_train"), [("train", True), ("stats_frozen", True), ("frozen", False)])
def test_norms_of_the_backbone_get_gradients_unless_frozen(mode, norms_train):
    model, variables = made()

    def loss(backbone):
        params = {**variables["params"], "backbone": backbone}
        return train_apply(model, variables | {"params": params}, BatchNormConfig(backbone=mode))[0].std()

    grads = traverse_util.flatten_dict(jax.grad(loss)(variables["params"]["backbone"]))
    assert sum(path[0].endswith("bn") for path in grads) == 2 * 14
    for path, g in grads.items():
        assert bool(np.abs(g).max() > 0) == (norms_train or not path[0].endswith("bn")), path


def test_head_order_widths_and_rate_are_fields():
    head = HeadConfig(order=("dense", "batch_norm", "dense", "dropout", "batch_norm"), widths=(8, 6), dropout=0.2)
    _, variables = made((("head", head),))
    shapes = {k: v["kernel"].shape for k, v in variables["params"]["head"].items() if "kernel" in v}
    features = shapes["dense1"][0]
    assert shapes == {"dense1": (features, 8), "dense2": (8, 6), "logits": (6, K)}
    stats = variables["batch_stats"]["head"]
    assert {k: v["mean"].shape for k, v in stats.items()} == {"batch_norm": (8,), "batch_norm2": (6,)}
    _, bare = made((("head", HeadConfig(order=(), widths=())),))
    assert set(bare["params"]["head"]) == {"logits"}
    assert "head" not in bare["batch_stats"]


def test_the_classifier_is_hashable_with_options_from_json():
    config = dataclasses.replace(TINY, attention="soft", attention_options={"widths": [8]})
    assert hash(create(config, K)) == hash(create(config, K))
    assert create(config, K) == create(config, K)
