"""Backbones with their `TIMM` fields against timm's outputs of the same weights (tests/golden/backbone_timm.md)."""

import numpy as np
import pytest

from bmjax import backbones
from tests.helpers.timm_golden import NAMES, outputs


def test_every_family_has_golden_outputs():
    families = {backbones.family_of(name).__name__ for name in backbones.list_backbones()}
    assert {backbones.family_of(name).__name__ for name in NAMES} == families


@pytest.mark.accelerator
@pytest.mark.parametrize("name", NAMES)
def test_weights_named_as_timm_names_them_give_its_outputs(name):
    ours, theirs = outputs(name)
    assert ours.pop("features_shape") == tuple(theirs["features_shape"])
    for what, value in ours.items():
        error, largest = np.abs(value - theirs[what]).max(), np.abs(theirs[what]).max()
        assert error <= 1e-4 * largest, (what, error, largest)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_without_a_name_in_timm_is_refused(name):
    with pytest.raises(ValueError, match="layer is 'conv9_conv'"):
        backbones.family_of(name).timm_name(backbones.create_backbone(name), "conv9_conv")
