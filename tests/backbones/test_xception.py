"""Xception against keras.applications: counts, features, logits, and one train step."""

import types

import jax
import jax.numpy as jnp
import pytest
from keras.src.applications import xception as keras_applications

from bmjax.backbones import create_backbone
from bmjax.backbones.xception import Xception
from bmjax.weights.network import network_shapes
from tests.helpers.keras_parity import (
    assert_output_is_keras,
    assert_train_step_is_keras,
    count,
    images,
    random_keras,
    to_flax,
)

TOP = {"include_top": True, "classes": 11}
# An eighth of the channels of every layer.
THIN = {"stem": (4, 8), "entry": (16, 32, 91), "exit": (128, 192, 256)}
# Keras takes none below 71. Pools see odd sizes only at the first, and both at the second.
SIZES = [(71, 71), (96, 75)]


@pytest.fixture
def thin(monkeypatch):
    """Keras's network as `THIN`; it has no option for that."""
    layers = types.SimpleNamespace(**vars(keras_applications.layers))
    for name in ("Conv2D", "SeparableConv2D"):
        layer = getattr(layers, name)
        setattr(layers, name, lambda channels, *args, layer=layer, **options: layer(channels // 8, *args, **options))
    monkeypatch.setattr(keras_applications, "layers", layers)


def keras_xception(size, include_top=False, **options):
    if include_top:
        options["classifier_activation"] = None
    return random_keras(keras_applications.Xception, include_top, input_shape=(*size, 3), **options)


@pytest.mark.parametrize(("top", "expected"), [(False, 20_861_480), (True, 22_910_480)])
def test_parameter_counts_are_keras(top, expected):
    assert count(create_backbone("xception", include_top=top)) == expected


@pytest.mark.parametrize("size", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)])
def test_features_and_logits_are_keras(thin, size):
    assert_output_is_keras(Xception(**THIN), keras_xception(size), images(size))
    assert_output_is_keras(Xception(**THIN, **TOP), keras_xception(size, **TOP), images(size))


@pytest.mark.slow
def test_a_train_step_is_keras(thin, float64):
    x = images(SIZES[1]).astype("float64")
    assert_train_step_is_keras(Xception(**THIN, **TOP), keras_xception(SIZES[1], **TOP), x, rtol=1e-10)


@pytest.mark.slow
def test_a_train_step_of_the_full_width_is_keras(float64):
    model, keras_model = create_backbone("xception", **TOP), keras_xception(SIZES[0], **TOP)
    assert_train_step_is_keras(model, keras_model, images(SIZES[0]).astype("float64"), rtol=1e-10)


@pytest.mark.slow
def test_forward_of_the_full_width_and_the_order_of_its_layers_are_keras():
    keras_model = keras_xception((71, 71), **TOP)
    assert_output_is_keras(create_backbone("xception", **TOP), keras_model, images((71, 71)))
    assert list(network_shapes(create_backbone("xception", include_top=True))[1]) == list(
        to_flax(keras_model)["params"]
    )


@pytest.mark.parametrize("padding", ["SAME", 1])
def test_the_sizes_of_stages(padding):
    model, sizes = create_backbone("xception", pool_padding=padding), []
    tap = lambda stage, x: sizes.append(x.shape[1:3]) or x  # noqa: E731
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 299, 7, 3)), tap=tap))
    assert list(dict.fromkeys(sizes)) == [(147, 1), (74, 1), (37, 1), (19, 1), (10, 1)]


def test_small_images_are_refused_in_words():
    with pytest.raises(ValueError, match="images are 6x40 pixels; expected at least 7x7"):
        jax.eval_shape(lambda: create_backbone("xception").init(jax.random.key(0), jnp.zeros((1, 6, 40, 3))))
