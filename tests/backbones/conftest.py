"""Fixtures of the backbones' tests."""

import pytest

from tests.helpers import keras_parity


@pytest.fixture
def float64():
    """Keras and JAX in float64, where float32's rounding hides what is compared."""
    with keras_parity.float64():
        yield
