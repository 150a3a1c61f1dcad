"""Fixtures of the backbones' tests."""

import pytest


@pytest.fixture
def float64():
    """Keras and JAX in float64, where float32's rounding hides what is compared."""
    from tests.helpers import keras_parity  # needs Keras, which not every test here does

    with keras_parity.float64():
        yield
