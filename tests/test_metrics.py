import numpy as np
import pytest
from sklearn import metrics as sk

from bmjax.metrics import bootstrap_interval, classification_metrics, expected_calibration_error, wilson_interval


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    probs = rng.dirichlet(np.ones(4), 200) + 0.7 * np.eye(4)[labels]
    return labels, (probs / probs.sum(1, keepdims=True)).astype(np.float32)


def test_figures_are_scikit_learns(predictions):
    labels, probs = predictions
    m, top, wide = classification_metrics(labels, probs), probs.argmax(-1), probs.astype(np.float64)
    assert m["n"] == 200
    assert 0.5 < m["accuracy"] < 0.999
    np.testing.assert_allclose(m["accuracy"], sk.accuracy_score(labels, top))
    np.testing.assert_allclose(m["macro_f1"], sk.f1_score(labels, top, average="macro"))
    np.testing.assert_allclose(m["balanced_accuracy"], sk.balanced_accuracy_score(labels, top))
    np.testing.assert_allclose(m["loss"], sk.log_loss(labels, wide / wide.sum(1, keepdims=True)), rtol=1e-5)
    np.testing.assert_array_equal(m["confusion"], sk.confusion_matrix(labels, top))
    p, r, f, n = sk.precision_recall_fscore_support(labels, top)
    got = [[c[k] for c in m["per_class"]] for k in ("precision", "recall", "f1", "n")]
    np.testing.assert_allclose(got, [p, r, f, n])
    assert m["accuracy_low"] < m["accuracy"] < m["accuracy_high"]
    assert m["macro_f1_low"] < m["macro_f1"] < m["macro_f1_high"]


def test_absent_classes_and_certain_mistakes_do_not_break_it():
    m = classification_metrics(np.array([0, 0, 1]), np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]], np.float32))
    assert np.isfinite(m["loss"])
    assert m["per_class"][2] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 0}
    np.testing.assert_allclose(m["macro_f1"], (2 / 3 + 2 / 3) / 2)


def test_intervals_have_their_coverage():
    low, high = wilson_interval(8, 10)
    np.testing.assert_allclose([low, high], [0.4902, 0.9433], atol=1e-4)  # Newcombe 1998's method 3, by hand
    assert wilson_interval(10, 10)[0] < 1
    assert wilson_interval(10, 10)[1] == 1
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        hit = (rng.random(80) < 0.8).astype(int)
        same = lambda y, p: float((y == p).mean())  # noqa: E731
        low, high = bootstrap_interval(same, np.ones(80, int), hit, seed=seed, resamples=200)
        covered += low <= 0.8 <= high
    assert 0.88 < covered / 200 < 0.99


def test_calibration_error_by_hand():
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = np.array([0, 1, 1, 1])
    np.testing.assert_allclose(expected_calibration_error(labels, probs), 0.5 * 0.4 + 0.5 * 0.4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="labels range from 0 to 5; expected 0 to 1"):
        classification_metrics(np.array([0, 5]), np.ones((2, 2)) / 2)
    with pytest.raises(ValueError, match="n >= 1"):
        classification_metrics(np.array([]), np.ones((0, 2)))
