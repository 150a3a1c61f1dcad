"""EfficientNet against keras.applications: counts, features, logits, and one train step; stochastic depth.

Keras's models begin with a Rescaling by 1/255 and a Normalization, here without statistics: they are given 255 times
what ours are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from keras.src.applications.efficientnet import EfficientNet as KerasEfficientNet

from bmjax.backbones import create_backbone
from bmjax.backbones.efficientnet import ROWS, EfficientNet, Row
from bmjax.weights.network import network_shapes
from tests.helpers.keras_parity import (
    assert_output_is_keras,
    assert_train_step_is_keras,
    images,
    random_keras,
    to_flax,
)

TOP = {"include_top": True, "classes": 11}
NOT_RANDOM = {"drop_connect": 0.0, "dropout": 0.0}
# Channels that round both ways; both kernels, both kinds of block, strides and residuals.
REDUCED = {"width": 0.6, "rows": (Row(3, 1, 16, 1, 1), Row(5, 6, 24, 2, 2), Row(3, 4, 40, 3, 2))}
CANCELLED = ("_project_bn",)
NORMALIZATION = 7
"""Variables of Keras's Normalization layer (mean, variance, count), which is preprocessing here."""


def keras_efficientnet(
    size, width=1.0, depth=1.0, rows=ROWS, drop_connect=0.2, dropout=0.2, include_top=False, **options
):
    inputs = (32, *(row.channels for row in rows))
    blocks = [
        {
            "kernel_size": row.kernel,
            "repeats": row.repeats,
            "filters_in": before,
            "filters_out": row.channels,
            "expand_ratio": row.expansion,
            "id_skip": True,
            "strides": row.stride,
            "se_ratio": 0.25,
        }
        for row, before in zip(rows, inputs, strict=False)
    ]
    if include_top:
        options["classifier_activation"] = None
    options |= {"include_top": include_top, "input_shape": (*size, 3), "blocks_args": blocks}
    return random_keras(KerasEfficientNet, width, depth, 224, dropout, drop_connect, **options)


@pytest.mark.parametrize(
    ("name", "no_top", "top"),
    [
        ("efficientnetb0", 4_049_571, 5_330_571),
        ("efficientnetb1", 6_575_239, 7_856_239),
        ("efficientnetb2", 7_768_569, 9_177_569),
        ("efficientnetb3", 10_783_535, 12_320_535),
        ("efficientnetb4", 17_673_823, 19_466_823),
        ("efficientnetb5", 28_513_527, 30_562_527),
        ("efficientnetb6", 40_960_143, 43_265_143),
        ("efficientnetb7", 64_097_687, 66_658_687),
    ],
)
def test_parameter_counts_are_keras_without_normalization(name, no_top, top):
    model = create_backbone(name, include_top=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 96, 96, 3))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == top - NORMALIZATION
    del shapes["params"]["predictions"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == no_top - NORMALIZATION


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (61, 47)])
def test_features_and_logits_are_keras(size):
    x = images(size)
    for top in ({}, TOP):
        model, keras_model = EfficientNet(**REDUCED, **top), keras_efficientnet(size, **REDUCED, **top)
        assert_output_is_keras(model, keras_model, x, keras_input=255 * x)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (61, 47)])
def test_a_train_step_is_keras(float64, size):
    options, x = REDUCED | TOP | NOT_RANDOM, images(size, b=4).astype("float64")
    model, keras_model = EfficientNet(**options), keras_efficientnet(size, **options)
    assert_train_step_is_keras(model, keras_model, x, rtol=1e-10, keras_input=255 * x, cancelled=CANCELLED)


@pytest.mark.slow
def test_a_train_step_of_efficientnetb0_is_keras(float64):
    options, x = TOP | NOT_RANDOM, images((64, 64)).astype("float64")
    model, keras_model = create_backbone("efficientnetb0", **options), keras_efficientnet((64, 64), **options)
    assert_train_step_is_keras(model, keras_model, x, rtol=1e-10, keras_input=255 * x, cancelled=CANCELLED)


@pytest.mark.slow
def test_efficientnetb0_forward_order_and_rates_are_keras():
    model, keras_model = create_backbone("efficientnetb0"), keras_efficientnet((64, 64), include_top=True)
    rates = {layer.name: layer.rate for layer in keras_model.layers if layer.name.endswith("drop")}
    ours = {f"{block.name}_drop": block.drop for block in model.blocks()}
    assert len(rates) == 9
    assert {name: ours[name] for name in rates} == pytest.approx(rates)
    assert keras_model.get_layer("top_dropout").rate == model.dropout
    assert list(network_shapes(create_backbone("efficientnetb0", include_top=True))[1]) == list(
        to_flax(keras_model)["params"]
    )
    x, model = images((64, 64)), create_backbone("efficientnetb0", include_top=True)
    assert_output_is_keras(model, keras_model, x, keras_input=255 * x)


def test_sizes_are_rounded_up():
    model, sizes = create_backbone("efficientnetb0"), []
    tap = lambda stage, x: sizes.append(x.shape[1:3]) or x  # noqa: E731
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 97, 1, 3)), tap=tap))
    assert sorted(set(sizes), reverse=True) == [(49, 1), (25, 1), (13, 1), (7, 1), (4, 1)]


def test_stochastic_depth_leaves_whole_residuals_out_and_keeps_their_mean():
    x = images((32, 32), b=32)
    variables = jax.jit(create_backbone("efficientnet_tiny").init)(jax.random.key(0), x)

    @functools.partial(jax.jit, static_argnames="drop_connect")
    def residual(key, drop_connect):
        """What block2b adds to its input: the first residual block, the third of five."""
        model, seen = create_backbone("efficientnet_tiny", drop_connect=drop_connect), {}
        tap = lambda stage, x: seen.setdefault(stage, x)  # noqa: E731
        model.apply(variables, x, train=True, tap=tap, mutable=["batch_stats"], rngs={"dropout": key})
        return seen["block2b"] - seen["block2a"]

    whole, drop, kept = np.asarray(residual(jax.random.key(0), 0.0)), 0.75 * 2 / 5, []
    largest = np.abs(whole).max()
    for key in jax.random.split(jax.random.key(1), 20):
        seen = np.asarray(residual(key, 0.75))
        kept.append(seen.any((1, 2, 3)))
        expected = np.where(kept[-1][:, None, None, None], whole / (1 - drop), 0)
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5 * largest)
    assert abs(np.mean(kept) - (1 - drop)) < 0.09  # five standard deviations
    assert len({tuple(k) for k in kept}) == 20


def test_nothing_is_drawn_unless_norms_train_too():
    x = images((32, 32))
    model = create_backbone("efficientnet_tiny", drop_connect=0.5, dropout=0.5, **TOP)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def run(model, **options):
        return jax.jit(functools.partial(model.apply, mutable=["batch_stats"], **options))(variables, x)[0]

    expected = run(model)
    for mode in ("stats_frozen", "frozen"):
        np.testing.assert_array_equal(run(model, train=True, mode=mode), expected)
    with pytest.raises(InvalidRngError, match="dropout"):
        run(model, train=True)
    run(create_backbone("efficientnet_tiny", **TOP, **NOT_RANDOM), train=True)


def test_the_top_has_dropout():
    x = images((32, 32))
    model = create_backbone("efficientnet_tiny", drop_connect=0.0, dropout=0.5, **TOP)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    run = jax.jit(lambda key: model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0])
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)), rtol=1e-3)
