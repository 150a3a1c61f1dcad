"""The statistics of comparisons: by hand, against SciPy, and how often they err, by simulation."""

import numpy as np
import pytest
from scipy import optimize, stats

from bmjax.analysis.compare import statistics as comparison
from bmjax.analysis.compare.planning import detectable
from bmjax.analysis.compare.statistics import (
    compare,
    corrected_resampled_t,
    largest_of_family,
    moderated,
    told_apart,
    verdict,
)
from tests.helpers.verdicts import draw


def test_largest_of_a_family_is_dunnetts():
    def at_most(c):  # P(all seven |z| <= c), given the part that they share
        x, w = np.polynomial.hermite_e.hermegauss(80)
        return (w * (stats.norm.cdf(np.sqrt(2) * c - x) - stats.norm.cdf(-np.sqrt(2) * c - x)) ** 7).sum() / w.sum()

    equal = np.full((7, 7), 0.5) + 0.5 * np.eye(7)
    found = np.quantile(largest_of_family(equal), 0.95)
    assert found == pytest.approx(optimize.brentq(lambda c: at_most(c) - 0.95, 1, 4), abs=0.02)
    alone = np.quantile(largest_of_family(np.eye(1)), 0.95)
    assert alone == pytest.approx(1.96, abs=0.02)
    same = np.quantile(largest_of_family(np.ones((7, 7))), 0.95)
    assert same == pytest.approx(1.96, abs=0.02), "seven times the same comparison is one"


def test_moderated_variances():
    alike, df = moderated(np.full(8, 2.0), 4)
    np.testing.assert_allclose(alike, 2.0)
    assert 8 < df < 10, "many alike are believed, but not without limit"
    apart, few = moderated(np.array([0.01, 0.01, 0.02, 4.0, 5.0, 0.03, 3.0, 2.0]), 4)
    assert 4 <= few < df, "variances that differ are left as they are"
    assert apart[0] < 1 < apart[3]
    one, own = moderated(np.array([3.0]), 2)
    assert (one[0], own) == (3.0, 2.0)
    two, both = moderated(np.array([1.0, 3.0]), 2)
    assert two.mean() == pytest.approx(2.0)
    assert both == 4, "no more degrees of freedom than all variants have together"


def test_two_variants_by_hand():
    """Two images wrong more often, no luck to speak of: the variance is that of the images alone."""
    base = np.ones((3, 50), bool)
    variant = base.copy()
    variant[:, :10] = False
    row = compare({"none": base, "se": variant}, "none")[1]
    assert row.difference == pytest.approx(-0.2)
    error = np.sqrt(0.2 * 0.8 / 49)  # 10 of 50 images count -1, the rest 0
    assert row.p == pytest.approx(2 * stats.t.sf(0.2 / error, 49))
    half = stats.t.isf(0.05 * comparison._SPENT / 2, 49) * error
    assert (row.difference_low, row.difference_high) == pytest.approx((-0.2 - half, -0.2 + half))
    assert row.p_corrected == pytest.approx(row.p / comparison._SPENT)
    assert row.shown


def test_luck_by_hand():
    """Answers equal over images within a run: all variance is the runs' luck, and pooled over two variants."""
    rng = np.random.default_rng(0)
    n, s = 2000, 4
    accuracy = np.array([[0.60, 0.70, 0.65, 0.63], [0.72, 0.80, 0.77, 0.69]])
    hits = rng.random((2, s, n)) < accuracy[..., None]
    found = hits.mean(2)
    row = compare({"none": hits[0], "se": hits[1]}, "none")[1]
    luck = found.var(1, ddof=1)
    both = np.sqrt(luck.sum() / s)
    # The answers' own variance is in the spread of runs and in that of images; it counts once.
    assert np.sqrt(row.spread.runs / s) == pytest.approx(both, rel=0.05)
    assert row.difference_high - row.difference == pytest.approx(
        stats.t.isf(0.05 * comparison._SPENT / 2, 6) * both, rel=0.05
    )


@pytest.mark.parametrize("s", [3, 5])
def test_a_difference_is_shown_exactly_where_its_interval_leaves_out_zero(s):
    rng, seen = np.random.default_rng(0), set()
    for i in range(40):
        for row in compare(draw(rng, 5, s, 150, 1.0, worse=9.0), "0")[1:]:
            outside = row.difference_low > 0 or row.difference_high < 0
            assert row.shown == outside == (row.p_corrected < 0.05), (i, row)
            assert row.difference_low < row.difference < row.difference_high
            assert row.p_corrected >= row.p
            seen.add(row.shown)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("v", "s", "n", "luck"), [(2, 3, 422, 3), (2, 5, 100, 1), (8, 3, 422, 2), (8, 5, 422, 0), (22, 3, 100, 1)]
)
def test_equal_variants_are_seldom_told_apart(v, s, n, luck):
    rng, repeats = np.random.default_rng(1), 300
    wrong = sum(any(r.shown for r in compare(draw(rng, v, s, n, luck), "0")) for _ in range(repeats))
    # Exactly 5 % would be above this in 1 of 400 cases; tools/simulate_verdicts.py repeats it a thousand times.
    assert wrong / repeats < 0.05 + 3 * np.sqrt(0.05 * 0.95 / repeats)


def test_what_is_there_is_shown():
    rng, repeats = np.random.default_rng(2), 60
    found = [compare(draw(rng, 8, 5, 422, 2.0, worse=10.0), "0")[1] for _ in range(repeats)]
    assert np.mean([r.shown for r in found]) > 0.9
    assert all(r.difference < 0 for r in found)


@pytest.mark.parametrize(("s", "luck", "accuracy"), [(1, 0.0, 0.64), (3, 2.0, 0.64), (5, 1.0, 0.95), (10, 3.0, 0.64)])
def test_intervals_of_accuracies_cover(s, luck, accuracy):
    rng, repeats, n = np.random.default_rng(3), 300, 200
    sigma, middle = np.hypot(1.5, 0.35), stats.norm.ppf(accuracy)
    spread = np.hypot(sigma, luck / 100 * sigma / stats.norm.pdf(middle))
    covered = 0
    for _ in range(repeats):
        x = 1.5 * rng.standard_normal(n) + 0.35 * rng.standard_normal((4, s, n)) + middle * spread
        x += np.sqrt(spread**2 - sigma**2) * rng.standard_normal((4, s, 1))
        row = compare({str(i): h for i, h in enumerate(x > 0)}, "0")[1]
        covered += row.low <= accuracy <= row.high
    assert covered / repeats > 0.95 - 3 * np.sqrt(0.95 * 0.05 / repeats)


def test_an_accuracy_of_one_seed_has_wilsons_interval():
    hits = np.zeros((1, 400), bool)
    hits[:, :320] = True
    row = compare({"none": hits}, "none")[0]
    wilson = stats.binomtest(320, 400).proportion_ci(0.95, method="wilson")
    assert (row.low, row.high) == pytest.approx((wilson.low, wilson.high), abs=2e-4)
    assert compare({"none": np.ones((3, 50), bool)}, "none")[0].high == 1.0


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_verdict_with_one_or_two_seeds(seeds):
    hits = draw(np.random.default_rng(4), 3, seeds, 300, 0.0, worse=40.0)
    row = compare(hits, "0")[1]
    assert row.difference < -0.2
    assert (row.difference_low, row.difference_high, row.p, row.shown, row.spread) == (None,) * 5
    many = "1 seed" if seeds == 1 else "2 seeds"
    assert (
        verdict(row, "0", 300, seeds) == f"1: no verdict with {many}; at least 3 are needed to know the luck of a run"
    )


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
    assert rows["best"].difference == pytest.approx(best.mean() - base.mean())
    assert not rows["luck"].shown
    assert (rows["twin"].difference, rows["twin"].p_corrected) == (0.0, 1.0)
    assert verdict(rows["luck"], "none", 300, 3) == (
        "luck: no difference to none can be shown with this n (300 images, 3 seeds)"
    )
    assert verdict(rows["best"], "none", 300, 3).startswith("best: better than none by 1")
    worse = next(r for r in compare({"none": best, "less": base}, "none") if r.variant == "less")
    assert verdict(worse, "none", 300, 3).startswith("less: worse than none by")


@pytest.mark.parametrize(
    ("hits", "message"),
    [
        ({"se": np.ones((3, 9), bool)}, "baseline 'none' is none of the variants: se"),
        ({"none": np.ones((3, 9), bool), "se": np.ones((2, 9), bool)}, "seeds and images differ"),
        ({"none": np.ones((3, 0), bool)}, "3 seeds of 0 images; expected at least one of each"),
    ],
)
def test_what_does_not_fit_is_refused(hits, message):
    with pytest.raises(ValueError, match=message):
        compare(hits, "none")


@pytest.mark.parametrize("right", [0, 1])
def test_tables_without_any_variance(right):
    same = np.full((3, 5), bool(right))
    row = compare({"none": same, "se": same}, "none")[1]
    assert (row.difference, row.p, row.shown) == (0.0, 1.0, False)
    assert row.difference_low < 0 < row.difference_high, "five images prove no equality"
    single = compare({"none": same[:, :1], "se": same[:, :1]}, "none")[1]
    assert verdict(single, "none", 1, 3) == "se: no verdict on one image"


def test_order_of_variants_does_not_matter():
    hits = draw(np.random.default_rng(5), 6, 4, 200, 1.0, worse=8.0)
    rows = {r.variant: r for r in compare(hits, "3")}
    back = {r.variant: r for r in compare(dict(reversed(hits.items())), "3")}
    for name, row in rows.items():
        assert (row.difference, row.p) == (pytest.approx(back[name].difference), pytest.approx(back[name].p))
        assert row.p_corrected == pytest.approx(back[name].p_corrected, abs=0.01)
    assert comparison.FEWEST_SEEDS == 3


def test_corrected_resampled_t_by_hand():
    differences = np.array([0.02, 0.04, 0.03, 0.01, 0.05])
    plain = stats.ttest_1samp(differences, 0.0).pvalue
    assert corrected_resampled_t(differences, 0.0) == pytest.approx(plain)
    t = 0.03 / np.sqrt(0.00025 * (1 / 5 + 1 / 4))  # their variance is 0.00025
    assert corrected_resampled_t(differences, 1 / 4) == pytest.approx(2 * stats.t.sf(t, 4))
    assert corrected_resampled_t(np.zeros(5), 0.25) == 1.0
    with pytest.raises(ValueError, match="at least two folds"):
        corrected_resampled_t(np.zeros(1), 0.25)


def draw_folds(rng, v, s, k, n, luck):
    """Hits of equal variants, and the fold of each image; folds have a luck of their own that their seeds share."""
    fold = rng.permutation(np.arange(n) % k)
    run = luck / 23.5 * (rng.standard_normal((v, 1, k)) + rng.standard_normal((v, s, k)))
    x = rng.normal(0.55, 1.5, n) + 0.25 * rng.standard_normal((v, 1, n)) + run[:, :, fold]
    return {str(i): h for i, h in enumerate(x + 0.35 * rng.standard_normal((v, s, n)) > 0)}, fold


@pytest.mark.parametrize(("v", "s"), [(2, 1), (6, 2)])
def test_over_folds_equal_variants_differ_in_at_most_one_table_in_twenty(v, s):
    rng, repeats, wrong = np.random.default_rng(v), 200, 0
    for _ in range(repeats):
        hits, fold = draw_folds(rng, v, s, 5, 400, 2.0)
        wrong += any(row.shown for row in compare(hits, "0", folds=fold))
    assert wrong / repeats < 0.05 + 3 * np.sqrt(0.05 * 0.95 / repeats)


def test_over_folds_one_seed_is_enough_and_a_large_difference_is_shown():
    hits, fold = draw_folds(np.random.default_rng(3), 3, 1, 5, 2000, 0.5)
    hits["2"] &= np.random.default_rng(4).random((1, 2000)) > 0.3
    rows = compare(hits, "0", folds=fold)
    assert [row.shown for row in rows] == [None, False, True]
    assert rows[2].difference_high < 0
    assert detectable(rows[2].spread, 1, 2000) < abs(rows[2].difference)
    assert compare(hits, "0")[2].shown is None, "as one split one seed gives no verdict"
    assert compare(hits, "0", folds=fold % 2)[2].shown is None, "two folds give none"
    assert told_apart(hits, fold) == (("0", "2"), ("1", "2"))
    assert told_apart(hits) is None
