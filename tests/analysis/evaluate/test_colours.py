"""Another laboratory's colours are brought to those of training by one map for all images."""

import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.analysis.evaluate.colours import ColourMap, match_colours
from bmjax.analysis.evaluate.looks import LOOKS, as_frequent, looks
from bmjax.data.images.stain import lab_to_rgb, rgb_to_lab
from bmjax.data.sources.synthetic import CLASSES, render

COLOURS = [LOOKS.index(name) for name in ("lightness", "green to red", "blue to yellow", "contrast")]


@pytest.fixture(scope="module")
def rendered():
    return np.stack([render(CLASSES[i % len(CLASSES)], 48, 0, i) for i in range(70)])


def test_a_map_is_of_lightness_contrast_and_colour(rendered):
    """Within sRGB's colours, whose conversions tests/data/test_stain.py holds to scikit-image's figures."""
    found = ColourMap(60.0, 0.9, (-3.0, 2.0, -4.0))(rendered[:3])
    lab = np.array(rgb_to_lab(jnp.asarray(rendered[0], jnp.float32)))
    lab[..., 0] = 60 + (lab[..., 0] - 60) * 0.9
    expected = np.asarray(lab_to_rgb(jnp.asarray(lab + np.array([-3.0, 2.0, -4.0])))).round()
    assert np.abs(found[0] - expected).max() <= 1
    assert np.abs(ColourMap(50.0, 1.0, (0.0, 0.0, 0.0))(rendered[:3]).astype(int) - rendered[:3]).max() <= 1


def test_shifted_cells_get_the_colours_of_training_again(rendered):
    """And a folder of one class, held against that class, keeps its own: by all classes it would be another stain."""
    training = looks(rendered)
    deviation = training.std(0)

    def apart(images, target):
        return (np.abs(np.median(looks(images), 0) - np.median(target, 0)) / deviation)[COLOURS].max()

    shifted = np.clip(rendered * np.array([0.9, 0.8, 0.7]) + 5, 0, 255).astype(np.uint8)
    found = match_colours(looks(shifted), training)(shifted)
    assert apart(shifted, training) > 1
    assert apart(found, training) < 0.25
    labels = np.arange(70) % len(CLASSES)
    one = CLASSES.index("EOS")
    weights = as_frequent(labels, np.eye(len(CLASSES))[[one]])
    own = match_colours(looks(rendered[labels == one]), training, weights)
    other = match_colours(looks(rendered[labels == one]), training)
    assert np.abs(own.shift).max() < 1e-3
    assert own.contrast == pytest.approx(1, abs=1e-4)
    assert np.abs(other.shift).max() > 1


def test_empty_images_change_no_contrast_beyond_measure():
    plain = looks(np.full((4, 32, 32, 3), 120, np.uint8))
    busy = plain.copy()
    busy[:, LOOKS.index("contrast")] = 20
    assert match_colours(plain, busy).contrast == 2
