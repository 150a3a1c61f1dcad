"""Thresholds and sets keep the error they promise, by simulation; curves by hand."""

import math

import numpy as np
import pytest

from bmjax.analysis.evaluate.calibration import cross_fitted, fit
from bmjax.analysis.evaluate.refusal import (
    UNSURE,
    Refusal,
    answers,
    error_threshold,
    fit_refusal,
    risk_coverage,
    set_bound,
    sets_of,
)


def draw(rng, n, k=5, strength=2.0, sure=1.0):
    labels = rng.integers(0, k, n)
    logits = sure * (rng.normal(size=(n, k)) + strength * np.eye(k)[labels])
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return labels, (probs / probs.sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("rate", "sure"), [(0.1, 1.0), (0.15, 4.0), (0.2, 0.3)])
def test_the_error_among_answers_is_kept(rate, sure):
    """In 200 validation sets of 400 images at most 10 % of thresholds answer too much, and they are of use."""
    rng = np.random.default_rng(0)
    labels, probs = draw(rng, 100_000, sure=sure)
    confidence, right = probs.max(1), probs.argmax(1) == labels
    too_much, answered = 0, []
    for _ in range(200):
        rows = rng.integers(0, len(labels), 400)
        threshold = error_threshold(confidence[rows], right[rows], rate)
        mine = confidence >= threshold
        answered.append(mine.mean())
        too_much += mine.any() and (~right[mine]).mean() > rate
    assert too_much <= 29, "beyond 10 % of 200 by more than chance"
    best = risk_coverage(confidence, right)
    most = best[0][best[1] <= rate].max()
    assert np.median(answered) > 0.5 * most, (np.median(answered), most)


def test_no_threshold_where_none_is_known():
    rng = np.random.default_rng(0)
    assert error_threshold(rng.random(400), rng.random(400) < 0.5, 0.05) == math.inf
    assert error_threshold(np.full(10, 0.99), np.ones(10, bool), 0.05) == math.inf, "ten images show no 5 %"
    assert error_threshold(np.full(300, 1.0, np.float32), np.ones(300, bool), 0.05) == 1


def test_sets_hold_the_true_class():
    rng = np.random.default_rng(1)
    labels, probs = draw(rng, 50_000)
    held = []
    for _ in range(300):
        rows = rng.integers(0, len(labels), 60)
        bound = set_bound(labels[rows], probs[rows], 0.1)
        held.append((probs[np.arange(len(labels)), labels] >= bound).mean())
    # The mean over validation sets lies between 1 - rate and 1 - rate + 1 / (n + 1); its error here is about 0.002.
    assert 0.9 - 0.005 < np.mean(held) < 0.9 + 1 / 61 + 0.005
    assert set_bound(labels[:8], probs[:8], 0.1) == 0, "eight images can't say"


@pytest.mark.parametrize(("k", "n", "rate"), [(7, 60, 0.2), (7, 150, 0.2), (21, 200, 0.3)])
def test_the_promises_hold_of_calibrated_probabilities(k, n, rate):
    """New images are calibrated by a fit on validation, validation's by fits on others of them. By the same fit, sets
    would hold less than they promise."""
    rng = np.random.default_rng(0)
    labels, probs = draw(rng, 10_000, k, sure=2.0)
    own, held, by_the_same, too_much, repeats = np.arange(len(labels)), [], [], 0, 60
    for _ in range(repeats):
        rows = rng.integers(0, len(labels), n)
        val, said = labels[rows], probs[rows]
        calibration = fit(val, said, "vector")
        there = calibration(probs)
        found = fit_refusal(val, cross_fitted(val, said, "vector"), rate)
        held.append((there[own, labels] >= found.set_bound).mean())
        by_the_same.append((there[own, labels] >= set_bound(val, calibration(said), rate)).mean())
        answered = there.max(1) >= found.threshold
        too_much += answered.any() and (there.argmax(1) != labels)[answered].mean() > rate
    assert np.mean(held) > 1 - rate - 0.01
    assert np.mean(by_the_same) < np.mean(held) - 0.005
    assert too_much <= 11, "beyond 10 % of 60 by more than chance"


def test_sets_are_about_all_images_and_the_threshold_about_those_that_may_be_answered():
    """A tenth of images are strange, and hardly better than guesses."""
    rng = np.random.default_rng(0)
    labels, probs = draw(rng, 40_000)
    strange = rng.random(len(labels)) < 0.1
    probs[strange] = draw(rng, int(strange.sum()), strength=0)[1]
    held, wrong = [], []
    for _ in range(60):
        rows = rng.integers(0, len(labels), 400)
        found = fit_refusal(labels[rows], probs[rows], 0.1, ~strange[rows])
        assert found.n == (~strange[rows]).sum()
        held.append(sets_of(probs, found.set_bound)[np.arange(len(labels)), labels].mean())
        answered = ~strange & (probs.max(1) >= found.threshold)
        wrong.append(answered.any() and (probs.argmax(1) != labels)[answered].mean() > 0.1)
    assert np.mean(held) > 0.895
    assert sum(wrong) <= 11
    none = fit_refusal(labels[:50], probs[:50], 0.1, np.zeros(50, bool))
    assert none.threshold == math.inf


def test_no_set_is_empty():
    probs = np.float32([[0.4, 0.35, 0.25], [0.9, 0.05, 0.05]])
    assert sets_of(probs, 0.5).tolist() == [[True, False, False], [True, False, False]]
    assert answers(probs, ("a", "b", "c"), Refusal(0.1, 0.8, 0.5, 100, 0.5, 0.0)) == ([UNSURE, "a"], ["a", "a"])


def test_risk_and_coverage_by_hand():
    confidence, right = np.array([0.9, 0.8, 0.8, 0.6]), np.array([True, True, False, False])
    covered, risk, mean = risk_coverage(confidence, right)
    np.testing.assert_allclose(covered, [0.25, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 1 / 3, 1 / 2])
    assert mean == pytest.approx((0 + 1 / 3 + 1 / 3 + 1 / 2) / 4)


def test_answers_and_sets_in_words():
    refusal = Refusal(0.05, 0.6, 0.2, 100, 0.5, 0.0)
    probs = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [np.nan] * 3], np.float32)
    assert answers(probs, ("a", "b", "c"), refusal) == (["a", UNSURE, None], ["a|b", "a|b|c", None])
    fitted = fit_refusal(np.zeros(400, int), np.tile(np.float32([0.95, 0.05]), (400, 1)), 0.05)
    assert fitted.answered == 1
    assert fitted.wrong == 0
