"""MobileNetV2 against keras.applications: counts, features, logits, and one train step."""

import jax
import jax.numpy as jnp
import pytest
from keras.applications import MobileNetV2 as KerasMobileNetV2

from bmjax.backbones import create_backbone
from bmjax.backbones.mobilenet_v2 import MobileNetV2
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


def keras_mobilenet_v2(alpha, size, include_top=False, **options):
    if include_top:
        options["classifier_activation"] = None
    return random_keras(KerasMobileNetV2, (*size, 3), alpha, include_top, **options)


@pytest.mark.parametrize(
    ("name", "top", "expected"),
    [
        ("mobilenet_v2_035", False, 410_208),
        ("mobilenet_v2_035", True, 1_691_208),
        ("mobilenet_v2_050", False, 706_224),
        ("mobilenet_v2_050", True, 1_987_224),
        ("mobilenet_v2_075", False, 1_382_064),
        ("mobilenet_v2_075", True, 2_663_064),
        ("mobilenet_v2", False, 2_257_984),
        ("mobilenet_v2", True, 3_538_984),
        ("mobilenet_v2_130", False, 3_766_048),
        ("mobilenet_v2_130", True, 5_431_048),
        ("mobilenet_v2_140", False, 4_363_712),
        ("mobilenet_v2_140", True, 6_156_712),
    ],
)
def test_parameter_counts_are_keras(name, top, expected):
    assert count(create_backbone(name, include_top=top)) == expected


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (61, 47)])
def test_features_and_logits_are_keras(size):
    assert_output_is_keras(MobileNetV2(0.35), keras_mobilenet_v2(0.35, size), images(size))
    assert_output_is_keras(MobileNetV2(0.35, **TOP), keras_mobilenet_v2(0.35, size, **TOP), images(size))


@pytest.mark.parametrize(("alpha", "size"), [(0.35, (61, 47)), (1.0, (64, 64))])
@pytest.mark.slow
def test_a_train_step_is_keras(float64, alpha, size):
    model, keras_model = MobileNetV2(alpha, **TOP), keras_mobilenet_v2(alpha, size, **TOP)
    x = images(size).astype("float64")
    assert_train_step_is_keras(model, keras_model, x, rtol=1e-10, cancelled=("_project_BN",))


@pytest.mark.slow
def test_forward_of_the_full_width_and_the_order_of_its_layers_are_keras():
    keras_model = keras_mobilenet_v2(1.0, (64, 64))
    assert_output_is_keras(create_backbone("mobilenet_v2"), keras_model, images((64, 64)))
    assert list(network_shapes(create_backbone("mobilenet_v2"))[1]) == list(to_flax(keras_model)["params"])


@pytest.mark.parametrize("padding", ["SAME", 1])
def test_sizes_are_rounded_up(padding):
    model, sizes = create_backbone("mobilenet_v2", padding=padding), {}
    tap = lambda stage, x: sizes.setdefault(stage, x.shape[1:3]) and x  # noqa: E731
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 97, 1, 3)), tap=tap))
    expected = {"Conv1": (49, 1), "block_2": (25, 1), "block_5": (13, 1), "block_12": (7, 1), "Conv_1": (4, 1)}
    assert {stage: sizes[stage] for stage in expected} == expected
