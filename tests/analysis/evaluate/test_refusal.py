"""Thresholds and sets keep the error they promise, by simulation; curves by hand."""

import math

import numpy as np
import pytest

from bmjax.analysis.evaluate.refusal import (
    UNSURE,
    Refusal,
    answers,
    error_threshold,
    fit_refusal,
    risk_coverage,
    set_bound,
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
