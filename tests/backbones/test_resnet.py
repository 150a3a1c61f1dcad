"""ResNet against keras.applications: counts, features, logits, and one train step."""

import jax
import jax.numpy as jnp
import pytest
from keras.src.applications.resnet import ResNet as KerasResNet
from keras.src.applications.resnet import stack_residual_blocks_v1

from bmjax.backbones import create_backbone
from bmjax.backbones.resnet import ResNet
from bmjax.weights.network import network_shapes
from tests.helpers.keras_parity import (
    assert_output_is_keras,
    assert_train_step_is_keras,
    count,
    images,
    random_keras,
    to_flax,
)

BLOCKS = (2, 3)
RESNET50 = (3, 4, 6, 3)
TOP = {"include_top": True, "classes": 11}


def keras_resnet(blocks, size, include_top=False, **options):
    def stages(x):
        for i, n in enumerate(blocks):
            x = stack_residual_blocks_v1(x, 64 * 2**i, n, stride1=2 if i else 1, name=f"conv{i + 2}")
        return x

    if include_top:
        options["classifier_activation"] = None
    return random_keras(KerasResNet, stages, False, True, include_top, input_shape=(*size, 3), **options)


@pytest.mark.parametrize(
    ("name", "top", "expected"),
    [
        ("resnet50", False, 23_587_712),
        ("resnet50", True, 25_636_712),
        ("resnet101", False, 42_658_176),
        ("resnet101", True, 44_707_176),
        ("resnet152", False, 58_370_944),
        ("resnet152", True, 60_419_944),
    ],
)
def test_parameter_counts_are_keras(name, top, expected):
    assert count(create_backbone(name, include_top=top)) == expected


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (61, 47)])
def test_features_and_logits_are_keras(size):
    assert_output_is_keras(ResNet(BLOCKS), keras_resnet(BLOCKS, size), images(size))
    assert_output_is_keras(ResNet(BLOCKS, **TOP), keras_resnet(BLOCKS, size, **TOP), images(size))


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (61, 47)])
def test_a_train_step_is_keras(size):
    model, keras_model = ResNet(BLOCKS, **TOP), keras_resnet(BLOCKS, size, **TOP)
    assert_train_step_is_keras(model, keras_model, images(size, b=4), rtol=1e-3, cancelled=("_conv",))


@pytest.mark.slow
def test_a_train_step_of_resnet50_is_keras(float64):
    keras_model, x = keras_resnet(RESNET50, (64, 64), **TOP), images((64, 64)).astype("float64")
    assert_train_step_is_keras(create_backbone("resnet50", **TOP), keras_model, x, rtol=1e-10, cancelled=("_conv",))


@pytest.mark.slow
def test_resnet50_forward_and_the_order_of_its_layers_are_keras():
    keras_model = keras_resnet(RESNET50, (64, 64))
    assert_output_is_keras(create_backbone("resnet50"), keras_model, images((64, 64)))
    assert list(network_shapes(create_backbone("resnet50"))[1]) == list(to_flax(keras_model)["params"])


@pytest.mark.parametrize("stride_in_3x3", [False, True])
def test_sizes_are_rounded_up(stride_in_3x3):
    model, seen = create_backbone("resnet50", stride_in_3x3=stride_in_3x3), []
    tap = lambda stage, x: seen.append(x.shape[1:3]) or x  # noqa: E731
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 97, 1, 3)), tap=tap))
    assert seen == [(49, 1), (25, 1), (13, 1), (7, 1), (4, 1)]
