"""Scores against scikit-learn, and how often their intervals hold the truth."""

import dataclasses
import json
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from bmjax.analysis.evaluate.resampling import Ranking, counted
from bmjax.analysis.evaluate.scores import score, text
from bmjax.runs.confusion import confusion_matrix
from bmjax.runs.resampling import normal_interval, resamples


def draw(n, k, *, strength=1.5, seed=0, rounded=False):
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    logits = rng.normal(size=(n, k)) + strength * np.eye(k)[labels]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return labels, (probs.round(1) if rounded else probs).astype(np.float32)


@pytest.mark.parametrize("rounded", [False, True])  # rounded probabilities are tied
def test_equal_to_scikit_learn(rounded):
    k, names = 5, list("abcde")
    labels, probs = draw(300, k, rounded=rounded)
    predicted, found = probs.argmax(-1), score(labels, probs, names, tolerated=[("a", "b")], draws=50)
    value = {name: s.value for name, s in found.scores.items()}
    for average in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(labels, predicted, average=average, zero_division=0)
        for name, one in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            assert value[f"{average}_{name}"] == pytest.approx(one), (average, name)
    one_hot = np.eye(k)[labels]
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "kappa": sk.cohen_kappa_score(labels, predicted),
        "mcc": sk.matthews_corrcoef(labels, predicted),
        "roc_auc": sk.roc_auc_score(one_hot, probs, average="macro"),
        "pr_auc": sk.average_precision_score(one_hot, probs, average="macro"),
        "brier": ((probs - one_hot) ** 2).sum(1).mean(),
        "tolerant_accuracy": np.mean((labels == predicted) | (labels + predicted == 1)),
    }
    if not rounded:
        wide = probs.astype(np.float64)
        expected["nll"] = sk.log_loss(labels, wide / wide.sum(1, keepdims=True), labels=range(k))
        expected["top2_accuracy"] = sk.top_k_accuracy_score(labels, probs, k=2)
    for name, one in expected.items():
        assert value[name] == pytest.approx(one, abs=1e-6), name
    report = sk.classification_report(labels, predicted, target_names=names, output_dict=True, zero_division=0)
    for c, name in enumerate(names):
        own = {what: s.value for what, s in found.classes[name].items()}
        assert own["sensitivity"] == pytest.approx(report[name]["recall"])
        assert own["f1"] == pytest.approx(report[name]["f1-score"])
        rest = labels != c
        assert own["specificity"] == pytest.approx((predicted[rest] != c).mean())
        assert own["roc_auc"] == pytest.approx(sk.roc_auc_score(labels == c, probs[:, c]))
        assert own["pr_auc"] == pytest.approx(sk.average_precision_score(labels == c, probs[:, c]))
    assert found.confusion == sk.confusion_matrix(labels, predicted).tolist()
    np.testing.assert_allclose(found.rates, sk.confusion_matrix(labels, predicted, normalize="true"))


@pytest.mark.parametrize("rounded", [False, True])
def test_a_resample_is_a_sample(rounded):
    """Weights of an image drawn twice give what scikit-learn gives of the images themselves."""
    labels, probs = draw(120, 3, rounded=rounded)
    weights = np.concatenate(list(resamples(120, 300, seed=1)), axis=1)
    assert weights.shape == (120, 300)
    assert (weights.sum(0) == 120).all()
    area, precision = Ranking(labels == 1, probs[:, 1]).areas(weights)
    for j in (0, 7, 299):
        rows = np.repeat(np.arange(120), weights[:, j].astype(int))
        assert area[j] == pytest.approx(sk.roc_auc_score(labels[rows] == 1, probs[rows, 1]), abs=1e-6)
        assert precision[j] == pytest.approx(sk.average_precision_score(labels[rows] == 1, probs[rows, 1]), abs=1e-6)
        found = counted(confusion_matrix(labels[rows], probs[rows].argmax(-1), 3).astype(float))
        assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(labels[rows], probs[rows].argmax(-1)))


def test_intervals_hold_the_value_and_are_plain_numbers():
    labels, probs = draw(60, 4)
    found = score(labels, probs, list("abcd"), draws=200)
    for own in (found.scores, *found.classes.values()):
        for name, s in own.items():
            assert s.low <= s.value <= s.high, name
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert found == score(labels, probs, list("abcd"), draws=200), "the same each time"
    for name in (*found.scores, *found.classes):
        assert name in text(found)


def test_classes_without_images_say_nothing():
    labels, probs = np.zeros(8, int), np.tile([0.7, 0.2, 0.1], (8, 1))
    found = score(labels, probs, ["a", "<b>", "c\n"], draws=20)
    assert np.isnan([found.scores["roc_auc"].value, found.scores["pr_auc"].value]).all(), "all images are of one class"
    assert np.isnan([*dataclasses.astuple(found.classes["a"]["pr_auc"])[:3]]).all()
    assert np.isnan(found.classes["<b>"]["sensitivity"].value)
    assert found.to_json()["scores"]["roc_auc"]["value"] is None
    assert np.isnan([found.scores["kappa"].value, found.scores["mcc"].value]).all(), "no class to take it for by chance"
    always = score(np.arange(8) % 2, np.tile([0.7, 0.2, 0.1], (8, 1)), ["a", "b", "c"], draws=20)
    assert always.scores["kappa"].value == always.scores["mcc"].value == 0
    assert np.isnan([always.scores["kappa"].low, always.scores["mcc"].low]).all(), "no resample tells how they vary"
    one = score(labels[:1], probs[:1], list("abc"), draws=20)
    assert np.isnan([one.scores[name].low for name in ("nll", "brier", "weighted_f1")]).all()
    assert "(not known)" in text(one)
    assert "c\\n" in text(found)
    with pytest.raises(ValueError, match="did you mean"):
        score(labels, probs, ["BLA", "MON", "LYT"], tolerated=[("MON", "LYD")])
    with pytest.raises(ValueError, match="expected"):
        score(labels, probs, ["a"])
    with pytest.raises(ValueError, match="labels range from 0 to 3; expected 0 to 2"):
        score(np.arange(4), probs[:4], list("abc"))
    with pytest.raises(ValueError, match="1 of 8 rows of probabilities hold NaN"):
        score(labels, np.where(np.arange(8)[:, None] == 3, np.nan, probs), list("abc"))


def test_few_images_of_a_class_are_said():
    labels, probs = draw(300, 4)
    assert "fewer than" not in text(score(labels, probs, list("abcd"), draws=20))
    few = np.flatnonzero(labels == 0)[:3]
    rows = np.concatenate([few, np.flatnonzero(labels > 0)])
    seen = text(score(labels[rows], np.where(np.arange(4) == 0, 1e-6, probs[rows]), list("abcd"), draws=20))
    assert "1 of 4 classes have fewer than 10 images" in seen


def test_perfect_scores_are_not_certain():
    labels = np.repeat([0, 1], 20)
    found = score(labels, np.eye(2)[labels], ["a", "b"], draws=50)
    for name in ("kappa", "mcc", "roc_auc", "weighted_f1"):
        assert (found.scores[name].value, found.scores[name].high) == (1, 1)
        assert 0.8 < found.scores[name].low < 0.95, name
    labels9, classes = np.repeat([0, 1, 2], [2, 3, 4]), list("abc")
    nine = score(labels9, np.eye(3)[labels9], classes, draws=50).scores
    for name in ("weighted_precision", "weighted_recall", "weighted_f1"):
        assert nine[name].low == pytest.approx(nine["accuracy"].low), "though sums of shares are 1 but for rounding"
    few = score(labels, np.eye(2)[labels], ["a", "b"], groups=[str(i // 10) for i in range(40)], draws=50)
    assert few.scores["accuracy"].low < 0.6, "four patients without an error say little"


def test_groups_that_are_few_or_hold_one_class_say_no_more_than_they_know():
    labels, probs = draw(90, 3)
    one = score(labels, probs, list("abc"), groups=["slide"] * 90, draws=20)
    assert np.isnan(one.scores["accuracy"].low)
    assert "(not known)" in text(one)
    assert one.to_json()["scores"]["accuracy"]["low"] is None
    labels = np.repeat([0, 1], [10, 80])  # class a in one patient alone, and never named rightly
    said = np.eye(2, dtype=np.float32)[np.where(np.arange(90) % 9 == 0, 1 - labels, labels)]
    said[:10] = (0, 1)
    names = ["the only"] * 10 + [f"patient {i % 20}" for i in range(80)]
    found = score(labels, said, ["a", "b"], groups=names, draws=50)
    assert np.isnan(found.classes["a"]["sensitivity"].low)
    assert found.classes["a"]["sensitivity"].value == 0
    never = score(labels, np.tile(np.float32([1, 0]), (90, 1)), ["a", "b"], groups=names, draws=50)
    assert never.classes["b"]["sensitivity"].value == 0
    assert 0.1 < never.classes["b"]["sensitivity"].high < 0.3, "Wilson's of none in 20 patients"
    assert np.isnan(never.scores["macro_precision"].low), "b is never predicted"
    assert "about images of new groups, by a bootstrap over 21 of them" in text(never)
    with pytest.raises(ValueError, match="3 groups for 90 labels"):
        score(labels, said, ["a", "b"], groups=["x"] * 3)
    assert score(labels, said, ["a", "b"], groups=[""] * 90, draws=20) == score(labels, said, ["a", "b"], draws=20)


def test_groups_that_are_all_alike_do_not_tell_how_groups_vary():
    labels = np.arange(48) % 2
    probs = np.eye(2)[np.where(np.arange(48) % 6 < 3, labels, 1 - labels)] * 0.6 + 0.2
    found = score(labels, probs, ["a", "b"], groups=[str(i // 6) for i in range(48)], draws=100)
    assert found.scores["accuracy"].value == 0.5
    assert np.isnan([found.scores[name].low for name in ("accuracy", "weighted_f1", "nll", "brier")]).all()


@pytest.mark.parametrize(("groups", "mean"), [(3, 0.97), (5, 0.99), (10, 0.99), (8, 0.999)])
def test_intervals_over_few_groups_near_no_error(groups, mean):
    """Hardly one of a patient's hundred images is wrong: 94 % or more of 300 intervals hold the mean."""
    rng, each, held = np.random.default_rng(groups), 100, 0
    for repeat in range(300):
        right = rng.binomial(each, rng.beta(100 * mean, 100 * (1 - mean), groups))
        weights = np.concatenate(list(resamples(groups, 400, repeat)), axis=1)
        drawn = right @ weights / (each * groups)
        low, high = normal_interval(right.sum() / (each * groups), drawn, groups, images=each * groups)
        held += low <= mean <= high
    assert held >= 0.94 * 300


def draw_groups(rng, groups, each, deviation=0.7):
    """Two classes; some groups are easier than others, so that their images are right or wrong together."""
    labels = rng.integers(0, 2, (groups, each))
    logits = 1 + deviation * rng.normal(size=(groups, 1)) * 2 + rng.normal(size=(groups, each))
    right = 1 / (1 + np.exp(-logits))
    probs = np.stack([np.where(labels == c, right, 1 - right) for c in (0, 1)], axis=-1)
    names = np.repeat([f"patient {i}" for i in range(groups)], each)
    return labels.ravel(), probs.reshape(-1, 2).astype(np.float32), names


def test_intervals_over_groups_hold_the_truth_where_those_over_images_do_not():
    """30 patients of 10 images: of 200 samples 89 % or more of intervals hold what new patients have."""
    rng = np.random.default_rng(3)
    truth = score(*draw_groups(rng, 4000, 10)[:2], ["a", "b"], draws=2)
    expected = {name: s.value for name, s in truth.scores.items()} | {
        "sensitivity": truth.classes["a"]["sensitivity"].value
    }
    held, plain, repeats = dict.fromkeys(expected, 0), dict.fromkeys(expected, 0), 200
    for _ in range(repeats):
        labels, probs, names = draw_groups(rng, 30, 10)
        for counts, found in (
            (held, score(labels, probs, ["a", "b"], groups=names, draws=200)),
            (plain, score(labels, probs, ["a", "b"], draws=50)),
        ):
            for name, s in (found.scores | {"sensitivity": found.classes["a"]["sensitivity"]}).items():
                counts[name] += s.low <= expected[name] <= s.high
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "roc_auc", "nll", "sensitivity"):
        assert held[name] / repeats >= 0.89, (name, held[name])
        assert plain[name] < 0.85 * repeats, (name, plain[name])


def test_groups_of_one_image_are_images():
    labels, probs = draw(80, 3)
    alone = score(labels, probs, list("abc"), groups=[str(i) for i in range(80)], draws=50)
    assert alone == score(labels, probs, list("abc"), draws=50)
    pairs = score(labels, probs, list("abc"), groups=[str(i // 2) for i in range(80)], draws=50)
    assert all("bootstrap over 40 groups" in s.by for s in pairs.scores.values())
    assert pairs.scores["accuracy"].by == "bootstrap over 40 groups"
    assert pairs.scores["pr_auc"].by.startswith("classes' intervals"), "a class has fewer than 20 groups"
    for own, other in ((pairs.scores, alone.scores), *((pairs.classes[c], alone.classes[c]) for c in "abc")):
        assert {name: s.value for name, s in own.items()} == pytest.approx({name: s.value for name, s in other.items()})


def test_five_thousand_predictions_take_under_five_seconds():
    labels, probs = draw(5000, 7)
    start = time.process_time()
    score(labels, probs, list("abcdefg"))
    assert time.process_time() - start < 5


def test_intervals_cover_the_population():
    """95 % intervals of 200 images hold what a population of 50,000 has; 200 samples, so 92 to 98 is as good as 95."""
    names, held = list("abcd"), {}
    labels, probs = draw(50_000, 4, seed=9)
    truth = score(labels, probs, names, draws=2).scores
    rng, repeats = np.random.default_rng(0), 200
    for _ in range(repeats):
        rows = rng.integers(0, len(labels), 200)
        for name, s in score(labels[rows], probs[rows], names, draws=300).scores.items():
            held[name] = held.get(name, 0) + (s.low <= truth[name].value <= s.high)
    assert set(held) == set(truth)
    for name, count in held.items():
        assert 0.91 <= count / repeats <= 0.99, (name, count / repeats)
