"""Intervals about images of new groups: those of the scores' table, in the form of a run's figures."""

import numpy as np
import pytest

from bmjax.analysis.evaluate.scores import score
from bmjax.runs.metrics import classification_metrics
from bmjax.runs.resampling import group_numbers, over_groups


def test_figures_have_the_intervals_of_the_table():
    rng = np.random.default_rng(0)
    labels, groups = np.arange(240) % 3, [f"patient {i // 12}" for i in range(240)]
    easy = rng.random(20)[np.arange(240) // 12] < 0.7  # images of a group are right or wrong together
    predicted = np.where(easy, labels, rng.integers(0, 3, 240))
    probs = np.eye(3)[predicted] * 0.8 + 0.2 / 3
    plain = classification_metrics(labels, probs, intervals=True)
    found = over_groups(plain, labels, predicted, groups)
    table = score(labels, probs, list("abc"), groups=groups)
    for name in ("accuracy", "macro_f1", "balanced_accuracy"):
        assert found[name] == plain[name]
        bounds = table.scores[name].low, table.scores[name].high
        assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx(bounds, abs=1e-6)
        assert found[f"{name}_high"] - found[f"{name}_low"] > 1.5 * (plain[f"{name}_high"] - plain[f"{name}_low"])
    for one, name in zip(found["per_class"], "abc", strict=True):
        for figure, same in (("recall", "sensitivity"), ("precision", "precision"), ("f1", "f1")):
            own = table.classes[name][same]
            assert (one[figure], one[f"{figure}_low"], one[f"{figure}_high"]) == pytest.approx(
                (own.value, own.low, own.high), abs=1e-6
            )
    assert "new groups, by a bootstrap over 20 of them" in found["intervals_note"]


def test_without_groups_of_several_images_nothing_changes():
    labels = np.arange(30) % 3
    plain = classification_metrics(labels, np.eye(3)[labels], intervals=True)
    assert over_groups(plain, labels, labels, ()) == plain
    assert over_groups(plain, labels, labels, [""] * 30) == plain
    assert over_groups(plain, labels, labels, [str(i) for i in range(30)]) == plain


def test_one_group_tells_nothing_of_others():
    labels = np.arange(30) % 3
    plain = classification_metrics(labels, np.eye(3)[labels], intervals=True)
    found = over_groups(plain, labels, labels, ["slide"] * 30)
    assert (found["accuracy"], found["accuracy_low"], found["accuracy_high"]) == (1, 0, 1)
    assert found["per_class"][0]["recall_low"] == 0


def test_images_without_a_name_are_groups_of_their_own():
    assert group_numbers(["a", "", "b", "", "a"]).tolist() == [0, 1, 2, 3, 0]
