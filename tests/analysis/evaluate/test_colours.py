"""Another laboratory's colours are brought to those of training by one map for all images."""

import numpy as np
import pytest

from bmjax.analysis.evaluate.colours import ColourMap, colour_shares, match_colours
from bmjax.data.sources.synthetic import CLASSES, render

LABELS = np.arange(70) % len(CLASSES)


@pytest.fixture(scope="module")
def rendered():
    return np.stack([render(CLASSES[label], 48, 0, i) for i, label in enumerate(LABELS)])


def shares_of(images):
    return colour_shares(images, np.zeros(len(images), int), 1)[0]


def test_shares_are_how_often_values_come(rendered):
    found = colour_shares(rendered, LABELS, len(CLASSES) + 1)
    values = rendered[LABELS == 2][..., 1].ravel()
    np.testing.assert_allclose(found[2, 1], np.bincount(values, minlength=256) / len(values), atol=1e-7)
    assert (found[-1] == 0).all()
    np.testing.assert_allclose(found[:-1].sum(-1), 1, rtol=1e-5)


def test_a_map_is_a_gain_and_a_power_of_each_channel(rendered):
    found = ColourMap((1.2, 1.0, 3.0), (1.0, 1.0, 0.8))(rendered[:3])
    wide = rendered[:3].astype(float)
    np.testing.assert_allclose(found[..., 0], np.clip(1.2 * (wide[..., 0] + 2) - 2, 0, 255), atol=0.51)
    np.testing.assert_array_equal(found[..., 1], rendered[:3, ..., 1])
    np.testing.assert_allclose(found[..., 2], np.clip(3 * (wide[..., 2] + 2) ** 0.8 - 2, 0, 255), atol=0.51)


@pytest.mark.parametrize("gains", [(0.8, 0.9, 0.7), (1.0, 0.85, 1.15), (0.6, 0.6, 0.6)])
@pytest.mark.parametrize("gamma", [1.0, 0.8, 1.25])
def test_another_lamp_and_camera_are_undone(rendered, gains, gamma):
    shifted = np.clip(255 * (rendered / 255 * np.array(gains)) ** gamma, 0, 255).round().astype(np.uint8)
    found = match_colours(shares_of(shifted), shares_of(rendered))(shifted)
    cut = (shifted > 250).any(-1)  # what was cut off is not there
    apart = np.abs(shifted.astype(float) - rendered)[~cut].mean()
    assert np.abs(found.astype(float) - rendered)[~cut].mean() < max(0.25 * apart, 2.5)


def test_the_same_colours_stay_and_classes_keep_their_own(rendered):
    found = match_colours(shares_of(rendered), shares_of(rendered))
    np.testing.assert_array_equal(found(rendered), rendered)
    one = CLASSES.index("EOS") == LABELS
    training = colour_shares(rendered, LABELS, len(CLASSES))
    own = match_colours(shares_of(rendered[one]), training[CLASSES.index("EOS")])
    np.testing.assert_array_equal(own(rendered[one]), rendered[one])
    mixed = match_colours(shares_of(rendered[one]), training.mean(0))
    assert (mixed(rendered[one]) != rendered[one]).mean() > 0.2, "held against all classes it would be another stain"


def test_empty_images_tell_no_power():
    plain = shares_of(np.full((4, 16, 16, 3), 120, np.uint8))
    bright = shares_of(np.full((4, 16, 16, 3), 180, np.uint8))
    found = match_colours(plain, bright)
    assert found.powers == (1, 1, 1)
    assert found.tables[:, 120].tolist() == [180, 180, 180]
    noise = shares_of(noise_of(256).astype(np.uint8))
    nearly = np.full((4, 16, 16, 3), 120, np.uint8)
    nearly[:, :8] = 121
    assert match_colours(shares_of(nearly), noise).powers == (1, 1, 1)
    for level in (0, 5, 255):
        flat = match_colours(shares_of(np.full((2, 16, 16, 3), level, np.uint8)), noise)
        assert flat.powers == (1, 1, 1)
        assert flat.gains == (1, 1, 1) or 2 < level < 253, "what was cut off is not there"
    steep = shares_of((100 + noise_of(20)).astype(np.uint8))
    assert match_colours(steep, noise).powers == (2, 2, 2)


def noise_of(levels):
    return np.random.default_rng(0).integers(0, levels, (4, 16, 16, 3))
