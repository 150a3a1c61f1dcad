"""Fixtures of the backbones' tests."""

import keras_parity
import pytest


@pytest.fixture
def float64():
    """Keras and JAX in float64, where float32's rounding hides what is compared."""
    with keras_parity.float64():
        yield
