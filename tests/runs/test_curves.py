"""ROC and PR on a grid are those of scikit-learn, read off at its places."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, roc_curve

from bmjax.runs.curves import GRID, precision_recall, roc


@pytest.fixture(params=[10, 200])
def cells(request):
    r = np.random.default_rng(request.param)
    positive = r.random(request.param) < 0.4
    return positive, (0.5 * positive + r.random(request.param)).round(1)  # with equal scores


def test_roc(cells):
    rates, reached, _ = roc_curve(*cells, drop_intermediate=False)
    expected = [reached[rates <= x + 1e-12].max() for x in GRID]
    np.testing.assert_allclose(roc(*cells), expected, atol=1e-12)


def test_precision_recall(cells):
    precision, recall, _ = precision_recall_curve(*cells)
    pairs = list(zip(recall[:-1], precision[:-1], strict=True))  # by falling recall; the last is no threshold's
    expected = [next(p for r, p in reversed(pairs) if r >= max(x, 1e-12) - 1e-12 and r > 0) for x in GRID]
    np.testing.assert_allclose(precision_recall(*cells), expected, atol=1e-12)


def test_of_one_side_alone_nothing_is_known():
    assert np.isnan(roc(np.ones(3, bool), np.arange(3.0))).all()
    assert np.isnan(precision_recall(np.zeros(3, bool), np.arange(3.0))).all()
