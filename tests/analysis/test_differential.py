"""Intervals of a differential count hold the truth as often as they say; the count itself by hand."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from bmjax.analysis.differential.estimate import draw_shares, estimate_shares

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))  # the tool has a module beside it
    try:
        spec = importlib.util.spec_from_file_location("simulate_differential", TOOLS / "simulate_differential.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(TOOLS))
        sys.modules.pop("simulate_differential", None)


def test_intervals_hold_the_truth(tool):
    """At 100 cells, also where the rarest class of training is 60 % of the smear; what is counted alone does not."""
    found = tool.simulate(tool.SEVEN, 100, 40, chains=50)
    assert set(found) == {"as in training", "the rarest at 60 %", "half of them absent"}
    held, raw, n = (sum(getattr(t, name)[0] for t in found.values()) for name in ("held", "raw", "all"))
    assert n > 500
    # 95 % of about 700; they come by sevens, so chance is taken as if of a third of them.
    assert abs(held / n - 0.95) < 3 * np.sqrt(0.95 * 0.05 / (n / 3)), held / n
    assert raw / n < 0.85, raw / n
    assert found["half of them absent"].coverage[2] >= 95


def test_a_perfect_classifier_gives_the_binomials_interval():
    """With no errors and many labelled cells the interval is that of 30 in 100 by Jeffreys, nearly Wilson's."""
    shares = estimate_shares(np.array([30, 70]), np.diag([100_000, 100_000]))
    np.testing.assert_allclose(shares.mean, [0.3, 0.7], atol=0.01)
    np.testing.assert_allclose([shares.low[0], shares.high[0]], [0.219, 0.394], atol=0.01)


def test_errors_are_taken_out():
    """All cells are of the first class, a fifth of them taken for the second: the second may be absent."""
    confusion = np.array([[800, 200, 0], [0, 1000, 0], [0, 0, 1000]])
    shares = estimate_shares(np.array([80, 20, 0]), confusion)
    assert shares.mean[0] > 0.93
    assert shares.high[0] > 0.98
    assert shares.low[1] == 0
    assert shares.low[2] == 0
    drawn, none = draw_shares(np.array([80, 20, 0]), confusion)
    np.testing.assert_allclose(drawn.sum(1), 1)
    assert none[0] == 0
    assert none[2] > 0.5


def test_few_labelled_cells_widen_the_interval():
    counts = np.array([40, 60])
    many, few = (estimate_shares(counts, n * np.array([[9, 1], [2, 8]])) for n in (100, 1))
    assert (few.high - few.low > 1.3 * (many.high - many.low)).all()


def test_the_same_again():
    given = np.array([3, 5, 1]), np.array([[9, 1, 0], [1, 9, 0], [2, 0, 8]])
    np.testing.assert_array_equal(estimate_shares(*given).high, estimate_shares(*given).high)


def test_wrong_input_is_told():
    with pytest.raises(ValueError, match="no cell to count"):
        estimate_shares(np.zeros(2, int), np.eye(2))
    with pytest.raises(ValueError, match=r"is \[3, 3\]; expected \[2, 2\]"):
        estimate_shares(np.ones(2, int), np.eye(3))
