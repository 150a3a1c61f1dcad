"""Figures of merit against scikit-learn and by hand."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from bmjax.runs.confusion import balanced_accuracy, confusion_matrix, macro_f1
from bmjax.runs.intervals import (
    bootstrap_interval,
    class_draws,
    class_intervals,
    intervals_note,
    macro_intervals,
    proportion_intervals,
    wilson_interval,
)
from bmjax.runs.metrics import classification_metrics


def draw(n, k, strength=1.5):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) + strength * np.eye(k)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize(("n", "k"), [(1, 2), (13, 7), (500, 7), (97, 21)])
def test_equal_to_scikit_learn(n, k):
    labels, probs = draw(n, k)
    predictions, found = probs.argmax(-1), classification_metrics(labels, probs)
    precision, recall, f1, counts = sk.precision_recall_fscore_support(
        labels, predictions, labels=range(k), zero_division=0
    )
    assert found["n"] == n
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predictions))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, predictions, average="macro"))
    assert found["balanced_accuracy"] == pytest.approx(recall[counts > 0].mean())
    assert found["loss"] == pytest.approx(sk.log_loss(labels, probs, labels=range(k)))
    assert found["confusion"] == sk.confusion_matrix(labels, predictions, labels=range(k)).tolist()
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("n", counts)):
        np.testing.assert_allclose([c[name] for c in found["per_class"]], expected)


def test_everything_is_a_plain_number():
    labels, probs = draw(50, 3)
    found = classification_metrics(labels.astype(np.int32), probs.astype(np.float32))
    assert json.loads(json.dumps(found)) == found


def test_classes_without_examples_are_left_out_of_means():
    labels = np.array([0, 0, 1, 1])
    probs = np.eye(4)[[0, 0, 1, 0]]  # classes 2 and 3 are neither there nor predicted
    found = classification_metrics(labels, probs)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["per_class"][2] == {"precision": 0, "recall": 0, "f1": 0, "n": 0}
    assert np.isfinite(found["loss"]), "a probability of zero gave an infinite loss"


def test_wilson_interval_by_its_formula():
    k, n, z = 37, 50, 1.959963984540054
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    assert wilson_interval(k, n) == pytest.approx((middle - half, middle + half))
    assert wilson_interval(5, 5)[0] < 0.6, "five of five is no proof"
    found = classification_metrics(np.zeros(50, int), np.eye(2)[(np.arange(50) >= k).astype(int)])
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson_interval(k, n)


def test_bootstrap_agrees_with_drawing_images():
    labels, probs = draw(200, 4, strength=1.0)
    predictions = probs.argmax(-1)
    counts = confusion_matrix(labels, predictions, 4)
    rows = np.random.default_rng(1).integers(0, 200, (2000, 200))
    drawn = [macro_f1(confusion_matrix(labels[r], predictions[r], 4)) for r in rows]
    expected = np.quantile(drawn, [0.025, 0.975])
    assert bootstrap_interval(macro_f1, counts, resamples=2000) == pytest.approx(expected, abs=0.01)
    assert bootstrap_interval(macro_f1, counts) == bootstrap_interval(macro_f1, counts)
    narrow = bootstrap_interval(macro_f1, counts, level=0.5)
    assert expected[0] < narrow[0] < macro_f1(counts) < narrow[1] < expected[1]


def test_bootstrap_covers_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        hits = int(rng.binomial(80, 0.8))
        counts = np.array([[hits, 80 - hits], [0, 0]])
        low, high = bootstrap_interval(lambda c: c[:, 0, 0] / c.sum((1, 2)), counts, seed=seed, resamples=200)
        covered += low <= 0.8 <= high
    assert 0.88 < covered / 200 < 0.99


def test_proportions_intervals_are_wilsons():
    low, high = proportion_intervals(np.array([37, 5, 0, 0]), np.array([50, 5, 4, 0]))
    for i, (k, n) in enumerate([(37, 50), (5, 5), (0, 4)]):
        assert (low[i], high[i]) == pytest.approx(wilson_interval(k, n))
    assert (low[3], high[3]) == (0, 1), "of nothing, nothing is known"


def test_class_intervals_by_hand():
    counts = np.array([[6, 2], [1, 11]])
    found = {name: (low[0], high[0]) for name, (low, high) in class_intervals(counts).items()}
    assert found["recall"] == pytest.approx(wilson_interval(6, 8))
    assert found["precision"] == pytest.approx(wilson_interval(6, 7))
    low, high = wilson_interval(6, 9)  # six hits of nine images that are of the class or were taken for it
    assert found["f1"] == pytest.approx((2 * low / (1 + low), 2 * high / (1 + high)))
    f1 = 2 * 6 / (8 + 7)
    assert found["f1"][0] < f1 < found["f1"][1]


def test_intervals_on_demand():
    labels, probs = draw(60, 7)
    plain, full = classification_metrics(labels, probs), classification_metrics(labels, probs, intervals=True)
    assert "intervals_note" not in plain
    assert set(plain["per_class"][0]) == {"precision", "recall", "f1", "n"}
    for c in full["per_class"]:
        for name in ("precision", "recall", "f1"):
            assert 0 <= c[f"{name}_low"] <= c[name] <= c[f"{name}_high"] <= 1
    for found in (plain, full):
        for name in ("accuracy", "macro_f1", "balanced_accuracy"):
            assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert full["macro_f1_low"] == pytest.approx(plain["macro_f1_low"], abs=0.05), "few draws, but near"
    assert json.loads(json.dumps(full)) == full


def test_notes_say_where_intervals_rest_on_little():
    assert intervals_note(np.diag([50, 20, 12])) == ""
    note = intervals_note(np.array([[50, 0, 0], [1, 3, 0], [0, 0, 0]]))
    assert "1 of 3 classes have no image" in note
    assert "no interval of a mean then holds exactly 95 %" in note
    assert "1 of 3 classes have fewer than 10 images" in note


def test_means_of_many_images_have_the_bootstraps_interval():
    """With every class frequent, the prior does not matter, and both are the sampling of images."""
    labels, probs = draw(4000, 4, strength=1.0)
    counts = confusion_matrix(labels, probs.argmax(-1), 4)
    found = macro_intervals(counts)
    for name, figure in (("macro_f1", macro_f1), ("balanced_accuracy", balanced_accuracy)):
        assert found[name] == pytest.approx(bootstrap_interval(figure, counts, resamples=4000), abs=0.003)


@pytest.mark.parametrize("counts", [[[5]], [[0, 0], [0, 1]], [[9, 0], [0, 9]], [[0, 3], [3, 0]]])
def test_degenerate_matrices_have_intervals(counts):
    counts = np.array(counts)
    recall, f1 = class_draws(counts, resamples=50)
    assert recall.shape == f1.shape == (50, len(counts))
    assert np.isfinite(f1).all()
    for name, (low, high) in macro_intervals(counts).items():
        assert 0 <= low <= high <= 1, name
    assert macro_intervals(counts)["macro_f1"] == macro_intervals(counts)["macro_f1"], "the same each time"


@pytest.mark.parametrize(("k", "n", "decay"), [(21, 422, 0.75), (21, 30, 0.75), (7, 100, 0.9)])
def test_means_of_unequal_classes_cover_the_population(k, n, decay):
    """tools/simulate_verdicts.py has more settings, a thousand repeats and what the percentile bootstrap does there."""
    rng, repeats = np.random.default_rng(1), 200
    held = {"macro_f1": 0, "balanced_accuracy": 0}
    for _ in range(repeats):
        frequency, recall = decay ** np.arange(k), rng.beta(6.4, 1.6, k)
        to = rng.exponential(size=(k, k)) * frequency**0.8 * (1 - np.eye(k))
        p = frequency[:, None] * (np.diag(recall) + (1 - recall)[:, None] * to / to.sum(1, keepdims=True))
        found = macro_intervals(rng.multinomial(n, p.ravel() / p.sum()).reshape(k, k), resamples=300)
        held["macro_f1"] += found["macro_f1"][0] <= macro_f1(p) <= found["macro_f1"][1]
        held["balanced_accuracy"] += found["balanced_accuracy"][0] <= recall.mean() <= found["balanced_accuracy"][1]
    for name, count in held.items():
        assert count / repeats > 0.95 - 3 * np.sqrt(0.95 * 0.05 / repeats), name


def test_calibration_error_of_known_cases():
    labels = np.tile([0, 1], 500)
    sure = np.tile([[0.999, 0.001]], (1000, 1))  # right half of the time, sure always
    assert classification_metrics(labels, sure)["ece"] == pytest.approx(0.499)
    assert classification_metrics(labels, np.full((1000, 2), 0.5))["ece"] == pytest.approx(0.0)
    mixed = np.where(np.arange(1000)[:, None] < 500, [[0.9, 0.1]], [[0.6, 0.4]])
    assert classification_metrics(np.zeros(1000, int), mixed)["ece"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.4)


@pytest.mark.parametrize(
    ("labels", "probs", "message"),
    [
        (np.zeros(0, int), np.zeros((0, 3)), "n >= 1"),
        (np.zeros(2, int), np.zeros((3, 3)), r"\[n\] and \[n, k\]"),
        (np.array([3]), np.zeros((1, 3)), "expected 0 to 2"),
        (np.array([-1]), np.zeros((1, 3)), "expected 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(labels, probs, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(labels, probs)
