"""Preprocessing against keras.applications."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.weights.preprocess import MODES, preprocess

X = np.random.default_rng(0).uniform(0, 255, (2, 5, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("mode", ["caffe", "torch", "tf"])
def test_modes_are_keras(mode):
    from keras.applications import imagenet_utils

    expected = imagenet_utils.preprocess_input(X.copy(), data_format="channels_last", mode=mode)
    np.testing.assert_allclose(jax.jit(preprocess, static_argnums=1)(jnp.asarray(X), mode), expected, atol=3e-5)


def test_raw_is_unchanged():
    assert np.array_equal(preprocess(jnp.asarray(X), "raw"), X)


@pytest.mark.parametrize("mode", MODES)
def test_types_are_kept(mode):
    assert preprocess(jnp.asarray(X, jnp.bfloat16), mode).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        assert preprocess(jnp.asarray(X, jnp.float64), mode).dtype == jnp.float64


def test_bad_calls_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown preprocessing mode 'torhc'; did you mean 'torch'"):
        preprocess(jnp.asarray(X), "torhc")
    with pytest.raises(TypeError, match="uint8; expected a floating type"):
        preprocess(jnp.zeros((1, 2, 2, 3), jnp.uint8), "torch")
