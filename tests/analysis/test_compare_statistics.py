"""The statistics of comparisons, against published and hand-computed cases and by simulation."""

import numpy as np
import pytest

from bmjax.analysis.compare.statistics import compare, crossed_bootstrap, decided, holm, mcnemar_exact, verdict


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (1, 7, 0.0703125),  # Fagerland, Lydersen and Laake 2013, table 1: exact conditional p = 0.070
        (9, 2, 0.0654296875),  # R's exact2x2, mcnemar.exact(matrix(c(21, 9, 2, 12), 2, 2)): p = 0.06543
        (0, 5, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (4, 4, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_exact(better, worse, p):
    assert mcnemar_exact(better, worse) == pytest.approx(p, rel=1e-12)
    assert mcnemar_exact(worse, better) == pytest.approx(p, rel=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_an_image_counts_once_however_many_seeds():
    hits = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1], [1, 0, 0, 0, 0]], bool)
    base = np.array([[0, 1, 0, 1, 1], [0, 1, 0, 1, 1], [0, 1, 0, 0, 0]], bool)
    assert decided(hits, base) == (1, 2)
    assert decided(np.repeat(hits, 4, 0), np.repeat(base, 4, 0)) == (1, 2)
    assert decided(hits[:1], base[:1]) == (1, 1), "McNemar's table"


def test_bootstrap_of_one_seed_is_that_of_images():
    rng = np.random.default_rng(0)
    hits = rng.random((1, 400)) < 0.8
    low, high = crossed_bootstrap(hits)
    error = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 400)
    assert (low, high) == pytest.approx((hits.mean() - error, hits.mean() + error), abs=0.004)
    assert crossed_bootstrap(np.ones((3, 50))) == (1.0, 1.0)


def draw(rng, n, seeds, effect, luck=0.15):
    """Hits [2, s, n] of a baseline and a variant: images differ in difficulty, trainings in luck."""
    difficulty = rng.normal(1.5, 1.5, n)
    lucky = rng.normal(0, luck, (2, seeds, 1))
    logits = difficulty + lucky + np.array([0, effect])[:, None, None]
    return rng.random((2, seeds, n)) < 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("effect", [0.0, 0.5])
def test_intervals_cover_what_they_say(effect):
    rng = np.random.default_rng(1)
    many = draw(rng, 400_000, 5, effect, luck=0.0)
    truth = float(many[1].mean() - many[0].mean())
    assert (truth > 0.03) == (effect > 0)
    covered, shown, trials = 0, 0, 300
    for i in range(trials):
        base, variant = draw(rng, 200, 5, effect)
        low, high = crossed_bootstrap(variant.astype(int) - base, seed=i, resamples=500)
        covered += low <= truth <= high
        shown += mcnemar_exact(*decided(variant, base)) < 0.05 and (low > 0 or high < 0)
    # The bound is three standard errors of 300 trials below 95 %; it may cover more, since it is conservative.
    assert covered / trials > 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials)
    if effect == 0:
        assert shown / trials < 0.05
    else:
        assert shown / trials > 0.3, "a difference that is there must be found at times"


def test_compare_says_what_is_shown_and_what_is_not():
    rng = np.random.default_rng(2)
    base = rng.random((3, 300)) < 0.7
    luck = rng.random((3, 300)) < 0.7
    best = base | (rng.random((3, 300)) < 0.5)
    rows = {r.variant: r for r in compare({"none": base, "luck": luck, "best": best, "twin": base}, "none")}
    assert list(rows) == ["none", "luck", "best", "twin"]
    assert rows["none"].difference is None
    assert rows["none"].low < rows["none"].accuracy == base.mean() < rows["none"].high
    assert rows["best"].shown
    assert rows["best"].worse == 0
    assert rows["best"].difference == pytest.approx(best.mean() - base.mean())
    assert rows["best"].p_holm == pytest.approx(3 * rows["best"].p)
    assert rows["luck"].difference_low < rows["luck"].difference < rows["luck"].difference_high
    assert not rows["luck"].shown
    assert (rows["twin"].p, rows["twin"].difference_low, rows["twin"].difference_high) == (1.0, 0.0, 0.0)
    assert verdict(rows["luck"], "none", 300, 3) == (
        "luck: no difference to none can be shown with this n (300 images, 3 seeds)"
    )
    assert verdict(rows["best"], "none", 300, 3).startswith("best: better than none by 1")
    worse = next(r for r in compare({"none": best, "less": base}, "none") if r.variant == "less")
    assert verdict(worse, "none", 300, 1).startswith("less: worse than none by")
    with pytest.raises(ValueError, match="baseline 'se' is none of the variants: none"):
        compare({"none": base}, "se")
    with pytest.raises(ValueError, match="seeds and images differ"):
        compare({"none": base, "a": base[:2]}, "none")
