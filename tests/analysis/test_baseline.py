import numpy as np
import pytest

from bmjax.analysis.baseline import linear_pixels, linear_probe, shrink


def test_shrink_averages_blocks():
    images = np.random.default_rng(0).integers(0, 256, (2, 33, 32, 3), dtype=np.uint8)
    got = shrink(images, 16).reshape(2, 16, 16, 3)
    np.testing.assert_allclose(got[1, 3, 5], images[1, 6:8, 10:12].mean((0, 1)), rtol=1e-6)
    with pytest.raises(ValueError, match="expected at least 16x16"):
        shrink(images[:, :8], 16)


def test_a_linear_model_finds_what_is_linear_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    images = rng.integers(0, 100, (200, 16, 16, 3), dtype=np.uint8)
    bright = images + (60 * labels[:, None, None, None]).astype(np.uint8)
    assert linear_pixels(bright[:150], labels[:150], bright[150:], labels[150:])["accuracy"] == 1.0
    m = linear_pixels(images[:150], labels[:150], images[150:], labels[150:])
    assert m["accuracy_low"] < 0.5 < m["accuracy_high"]


def test_probe_chooses_on_validation_and_reports_each_split():
    rng = np.random.default_rng(0)
    labels = {s: rng.integers(0, 3, n) for s, n in (("train", 90), ("val", 30), ("test", 60))}
    features = {s: 2 * np.eye(3)[y] + rng.standard_normal((len(y), 3)) for s, y in labels.items()}
    results = linear_probe(features, labels)
    assert {s: m["n"] for s, m in results.items()} == {"train": 90, "val": 30, "test": 60}
    assert results["test"]["accuracy"] > 0.7
