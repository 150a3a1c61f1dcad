"""Fixtures of the weights' tests."""

import pytest

from tests.helpers.keras_saved import FAMILIES


@pytest.fixture(autouse=True)
def _members(monkeypatch):
    """Members whose Keras twin is small enough to build and save."""
    for name, module, make, _ in FAMILIES.values():
        if module is not None:
            monkeypatch.setitem(module.VARIANTS, name, make)
