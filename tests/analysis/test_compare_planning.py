"""What a difference needs, and sequential comparisons."""

import numpy as np
import pytest

from bmjax.analysis.compare.planning import (
    detectable,
    images_needed,
    look_level,
    looks,
    need,
    seeds_needed,
    standard_error,
    until_shown,
)
from bmjax.analysis.compare.statistics import Row, Spread, compare
from tests.helpers.verdicts import draw


def test_standard_error_is_the_tables():
    rng = np.random.default_rng(0)
    row = compare(draw(rng, 4, 5, 400, 2.0), "0")[1]
    found = standard_error(row.spread, 5, 400)
    runs = draw(rng, 4, 400, 400, 2.0)
    differences = runs["1"].reshape(80, 5, 400).mean((1, 2)) - runs["0"].reshape(80, 5, 400).mean((1, 2))
    assert found > 0.5 * differences.std(), "more than the luck alone"
    half = row.difference_high - row.difference
    assert 2 < half / found < 4


def test_more_seeds_or_images_show_less():
    spread = Spread(images=0.02, runs=0.0008, rest=0.09, runs_df=16.0, alpha=0.007)
    now = detectable(spread, 5, 400)
    assert detectable(spread, 10, 400, measured=5) < now
    assert detectable(spread, 5, 4000) < now
    assert detectable(spread, 5, 400, power=0.5) < now
    seeds = seeds_needed(spread, 5, 400, 0.03)
    assert detectable(spread, seeds, 400, measured=5) <= 0.03 < detectable(spread, seeds - 1, 400, measured=5)
    images = images_needed(spread, 5, 400, 0.055)
    assert detectable(spread, 5, images) <= 0.055 < detectable(spread, 5, images - 1)
    assert seeds_needed(spread, 5, 400, 0.01) is None, "the images alone leave more open"
    assert images_needed(spread, 5, 400, 0.01) is None, "the luck alone leaves more open"


def test_need_in_words():
    spread = Spread(images=0.02, runs=0.0008, rest=0.09, runs_df=16.0, alpha=0.007)
    row = Row("se", 0.7, 0.6, 0.8, 0.01, -0.02, 0.04, 0.4, 1.0, False, spread)
    assert need(row, 5, 400).startswith("se: this design shows ")
    assert "6" in need(row, 5, 400)
    assert need(row, 5, 400, 0.2).endswith("20.0 points need no more")
    assert need(row, 5, 400, 0.01).endswith("or more than images can give with these seeds")
    assert "seeds on these images" in need(row, 5, 400, 0.04)
    assert need(Row("se", 0.7, 0.6, 0.8, 0.01), 1, 400) == "se: at least 3 seeds are needed before anything can be said"


def test_looks():
    assert looks(20) == (3, 4, 5, 7, 9, 12, 16, 20)
    assert looks(3) == (3,)
    assert looks(12, first=5) == (5, 7, 9, 12)
    for wrong in ((2, 3), (10, 2)):
        with pytest.raises(ValueError, match="expected at least 3"):
            looks(*wrong)


def test_levels_of_looks_are_pococks():
    assert look_level((5,), 7) == 0.95
    # Pocock 1977, table 1: two looks 0.0294, five looks 0.0158 at equal information, one comparison.
    assert look_level((10, 20), 1) == pytest.approx(1 - 0.7 * 0.0294, abs=0.002)
    assert look_level((4, 8, 12, 16, 20), 1) == pytest.approx(1 - 0.7 * 0.0158, abs=0.002)
    assert look_level((10, 20), 7) > 0.95


def test_a_comparison_goes_on_until_all_is_decided():
    rng, at = np.random.default_rng(1), looks(12)
    hits = draw(rng, 3, 12, 2000, 1.0, worse=12.0)
    start = until_shown({k: h[:3] for k, h in hits.items()}, "0", 0.04, at)
    assert start.next_look in (4, None)
    end = until_shown(hits, "0", 0.04, at)
    assert list(end.shown) == ["1"]
    assert list(end.excluded) == ["2"]
    assert end.next_look is None
    assert end.rows[1].shown
    assert [r.variant for r in end.rows] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="6 seeds; expected one of the planned looks: 3, 4, 5"):
        until_shown({k: h[:6] for k, h in hits.items()}, "0", 0.04, at)


@pytest.mark.parametrize("luck", [0.0, 2.0])
def test_looking_often_errs_no_more(luck):
    rng, at, repeats = np.random.default_rng(2), looks(12), 150
    wrong = sum(bool(until_shown(draw(rng, 3, 12, 300, luck), "0", 0.02, at).shown) for _ in range(repeats))
    assert wrong / repeats < 0.05 + 3 * np.sqrt(0.05 * 0.95 / repeats)
