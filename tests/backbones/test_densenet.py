"""DenseNet against keras.applications: counts, features, logits, and one train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keras.src.applications.densenet import DenseNet as KerasDenseNet

from bmjax.backbones import create_backbone
from bmjax.backbones.densenet import DenseNet
from tests.helpers.keras_parity import assert_output_is_keras, assert_train_step_is_keras, count, images, random_keras

BLOCKS = (1, 2, 3, 1)
TOP = {"include_top": True, "classes": 11}


def keras_densenet(blocks, size, include_top=False, **options):
    if include_top:
        options["classifier_activation"] = None
    return random_keras(KerasDenseNet, list(blocks), input_shape=(*size, 3), include_top=include_top, **options)


@pytest.mark.parametrize(
    ("name", "top", "expected"),
    [
        ("densenet121", False, 7_037_504),
        ("densenet121", True, 8_062_504),
        ("densenet169", False, 12_642_880),
        ("densenet169", True, 14_307_880),
        ("densenet201", False, 18_321_984),
        ("densenet201", True, 20_242_984),
    ],
)
def test_parameter_counts_are_keras(name, top, expected):
    assert count(create_backbone(name, include_top=top)) == expected


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (61, 47)])
def test_features_and_logits_are_keras(size):
    assert_output_is_keras(DenseNet(BLOCKS), keras_densenet(BLOCKS, size), images(size))
    assert_output_is_keras(DenseNet(BLOCKS, **TOP), keras_densenet(BLOCKS, size, **TOP), images(size))


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (61, 47)])
def test_a_train_step_is_keras(size):
    assert_train_step_is_keras(DenseNet(BLOCKS, **TOP), keras_densenet(BLOCKS, size, **TOP), images(size, b=4), 1e-3)


@pytest.mark.slow
def test_a_train_step_of_densenet121_is_keras(float64):
    blocks, x = (6, 12, 24, 16), images((64, 64)).astype("float64")
    assert_train_step_is_keras(DenseNet(blocks, **TOP), keras_densenet(blocks, (64, 64), **TOP), x, rtol=1e-10)


def test_densenet121_forward_is_keras():
    keras_model = keras_densenet((6, 12, 24, 16), (64, 64))
    assert_output_is_keras(create_backbone("densenet121"), keras_model, images((64, 64)))


def test_small_images_are_refused_in_words():
    with pytest.raises(ValueError, match="images are 16x40 pixels; expected more for 4 blocks"):
        jax.eval_shape(lambda: create_backbone("densenet121").init(jax.random.key(0), jnp.zeros((1, 16, 40, 3))))


def test_batch_statistics_are_taken_anew_after_a_tap():
    """A tap that changes a stage's output changes the statistics of the norm behind it."""
    model = create_backbone("densenet_tiny")
    x = images((32, 32))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def stats(factor):
        tap = lambda stage, x: factor * x if stage == "conv2" else x  # noqa: E731
        _, new = model.apply(variables, x, train=True, tap=tap, mutable=["batch_stats"])
        return new["batch_stats"]["pool2_bn"]

    one, three = stats(1.0), stats(3.0)
    np.testing.assert_allclose(three["mean"], 3 * one["mean"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(three["var"] - 0.99, 9 * (one["var"] - 0.99), rtol=1e-3, atol=1e-5)
