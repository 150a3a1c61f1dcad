"""Fixtures of the backbones' tests."""

import jax
import pytest


@pytest.fixture
def float64(monkeypatch):
    """Keras and JAX in float64: over a hundred layers float32's rounding grows to 1e-2 of some gradients."""
    import keras
    from keras.src.backend.common import dtypes

    # On JAX Keras computes norms and means in at most float32, by this function.
    original = dtypes.result_type

    def result_type(*args):
        return "float64" if "float64" in map(str, args) else original(*args)

    monkeypatch.setattr(dtypes, "result_type", result_type)
    monkeypatch.setattr(keras.src.backend, "result_type", result_type)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    with jax.enable_x64(True):
        yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
