"""Every score of a split's predictions, each with a 95 % interval, and as the text that `bmjax eval` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from bmjax.analysis.evaluate.areas import BOOTSTRAP, FEW, mean_interval, pr_interval, roc_interval
from bmjax.analysis.evaluate.resampling import COUNTED, Ranking, counted, mean_over_classes
from bmjax.files import printable
from bmjax.registry import unknown
from bmjax.runs.confusion import check_labels, class_shares, confusion_matrix
from bmjax.runs.intervals import class_intervals, intervals_note, macro_intervals, proportion_intervals, wilson_interval
from bmjax.runs.resampling import (
    DRAWS,
    Scale,
    group_numbers,
    group_resamples,
    groups_note,
    images_told_by,
    normal_interval,
    resamples,
    share_of,
)

WILSON, BAYES, CLASSES = "Wilson", "Bayesian bootstrap", "classes' intervals"
_NOT_KNOWN = (float("nan"), float("nan"))
_SCALES: dict[str, Scale] = {"kappa": "signed", "mcc": "signed", "nll": "log", "brier": "log"}


@dataclasses.dataclass(frozen=True)
class Score:
    """A figure, its 95 % interval and what that is by; NaN where it can't be told."""

    value: float
    low: float
    high: float
    by: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """All scores of n predictions. `classes` has those of each class; `confusion` counts and `rates` shares of the true
    class, [true][predicted]. `note`: what the intervals rest on beside the images; "" where on little else."""

    n: int
    scores: dict[str, Score]
    classes: dict[str, dict[str, Score]]
    confusion: list[list[int]]
    rates: list[list[float]]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As nested dicts of numbers; what can't be told is None."""
        return _without_nan(dataclasses.asdict(self))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def tolerance(pairs: Sequence[tuple[str, str]], classes: Sequence[str]) -> np.ndarray:
    """Which class may be taken for which, bool [k, k]: itself, and each of the pairs either way.

    Raises:
      ValueError: a pair names no class.
    """
    allowed, place = np.eye(len(classes), dtype=bool), {name: i for i, name in enumerate(classes)}
    for pair in pairs:
        for name in pair:
            if name not in place:
                raise ValueError(f"tolerated pair {':'.join(pair)}: {unknown('class', name, list(classes))}")
        a, b = (place[name] for name in pair)
        allowed[a, b] = allowed[b, a] = True
    return allowed


def score(
    labels: np.ndarray,
    probs: np.ndarray,
    classes: Sequence[str],
    *,
    tolerated: Sequence[tuple[str, str]] = (),
    groups: Sequence[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> Scores:
    """Scores of labels int [n] (0..k-1) and probabilities [n, k].

    Intervals are by a bootstrap over images (Efron 1979), `draws` resamples, but where one is known that holds its 95 %
    with fewer images: Wilson's for proportions, a Bayesian bootstrap for balanced accuracy, macro recall and macro F1
    (bmjax.runs.intervals), and formulas for areas of classes of few images (`areas`). Macro precision has none where a
    class is never predicted. With `groups` [n] (patient, slide; "": the image is its own) of which some hold several
    images, all are by a bootstrap over groups, and about images of new groups; with fewer than some 20 groups they are
    too narrow. `tolerated` pairs of classes count as right in `tolerant_accuracy`.

    Raises:
      ValueError: no image, shapes that don't fit, a label out of range, a probability that is no number, or a pair that
        names no class.
    """
    labels, probs = np.asarray(labels), np.asarray(probs)
    if probs.ndim != 2 or probs.shape != (len(labels), len(classes)) or not len(labels):
        expected = f"[n] and [n, {len(classes)}] with n >= 1"
        raise ValueError(f"labels {labels.shape} and probabilities {probs.shape}; expected {expected}")
    check_labels(labels, len(classes))
    if odd := int((~np.isfinite(probs).all(1)).sum()):
        raise ValueError(f"{odd} of {len(probs)} rows of probabilities hold NaN or infinity; expected numbers, 0 to 1")
    if len(groups) not in (0, len(labels)):
        raise ValueError(f"{len(groups)} groups for {len(labels)} labels; expected one an image, or none")
    n, k = probs.shape
    predicted = probs.argmax(-1)
    counts = confusion_matrix(labels, predicted, k)
    hits = {"accuracy": predicted == labels}
    # Ties count against the classifier.
    own = probs[np.arange(n), labels]
    hits["top2_accuracy"] = hits["accuracy"] | ((probs >= own[:, None]).sum(1) <= 2)
    if tolerated:
        hits["tolerant_accuracy"] = tolerance(tolerated, classes)[labels, predicted]
    wide = probs.astype(np.float64)
    means = {
        "nll": -np.log(np.maximum(wide[np.arange(n), labels], np.finfo(np.float32).tiny)),
        "brier": ((wide - np.eye(k)[labels]) ** 2).sum(1),
    }
    rankings = [Ranking(labels == c, probs[:, c]) for c in range(k)]
    value, areas, _ = _at(np.ones((n, 1), np.float32), (labels, predicted), means, rankings)
    blocks = [_at(w, (labels, predicted), means, rankings) for w in resamples(n, draws, seed)]
    drawn = {name: np.concatenate([block[0][name] for block in blocks]) for name in value}
    drawn_areas = np.concatenate([block[1] for block in blocks], axis=-1)
    scores = {name: Score(float(hit.mean()), *wilson_interval(int(hit.sum()), n), WILSON) for name, hit in hits.items()}
    for name, (low, high) in macro_intervals(counts).items():
        scores[name] = Score(float(value[name][0]), low, high, BAYES)
    for name in (*COUNTED, "roc_auc", "pr_auc", *means):
        scores[name] = _bootstrap(name, value[name][0], drawn[name], n)
    per_class = _of_classes(counts, classes, areas[..., 0], drawn_areas)
    scores |= _of_few(scores, per_class, counts.sum(1), counts.sum(0))
    recall, balanced = scores["macro_recall"], scores["balanced_accuracy"]
    # They differ where a class without images is predicted.
    bounds = (balanced.low, balanced.high) if np.isclose(recall.value, balanced.value) else _NOT_KNOWN
    scores["macro_recall"] = Score(recall.value, *bounds, BAYES)
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    found = Scores(n, scores, per_class, counts.tolist(), rates.tolist(), intervals_note(counts))
    of_group = group_numbers(groups)
    if len(np.unique(of_group)) == len(of_group):
        return found
    shares = means | {name: hit.astype(np.float64) for name, hit in hits.items()}
    blocks = [_at(w, (labels, predicted), shares, rankings) for w in group_resamples(of_group, draws, seed)]
    return _over_groups(found, (labels, predicted), of_group, blocks)


def _over_groups(
    found: Scores, decided: tuple[np.ndarray, np.ndarray], of_group: np.ndarray, blocks: Sequence[Any]
) -> Scores:
    """The same scores with the intervals of resamples of groups, `blocks` of `_at`. A figure of a class has as many
    independent draws as groups that hold some of what it is a share of."""
    labels, predicted = decided
    g = int(of_group.max()) + 1
    by = f"bootstrap over {g} groups"
    drawn = {name: np.concatenate([block[0][name] for block in blocks]) for name in blocks[0][0]}
    areas = np.concatenate([block[1] for block in blocks], axis=-1)
    counts = np.concatenate([block[2] for block in blocks])

    def again(name: str, score: Score, values: np.ndarray, those: np.ndarray) -> Score:
        groups = len(np.unique(of_group[those]))
        return dataclasses.replace(_bootstrap(name, score.value, values, groups, int(those.sum())), by=by)

    shares = {what: share_of(*part) for what, part in class_shares(counts).items()}
    classes = {}
    for c, (name, own) in enumerate(found.classes.items()):
        of_class = labels == c
        there = {"roc_auc": of_class, "pr_auc": of_class} | images_told_by(labels, predicted, c)
        values = {what: drawn_shares[:, c] for what, drawn_shares in shares.items()}
        values |= {"roc_auc": areas[0, c], "pr_auc": areas[1, c]}
        classes[name] = {what: again(what, score, values[what], there[what]) for what, score in own.items()}
    scores = {name: again(name, score, drawn[name], labels >= 0) for name, score in found.scores.items()}
    true, said = (
        np.array([len(np.unique(of_group[which == c])) for c in range(len(classes))]) for which in (labels, predicted)
    )
    few = _of_few(scores, classes, true, said)
    scores |= {name: dataclasses.replace(one, by=f"{one.by}, {by}") for name, one in few.items()}
    note = groups_note(np.bincount(labels, minlength=len(classes)), g)
    return dataclasses.replace(found, scores=scores, classes=classes, note=note)


def _at(
    weights: np.ndarray,
    decided: tuple[np.ndarray, np.ndarray],
    means: dict[str, np.ndarray],
    rankings: Sequence[Ranking],
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(scores [r] by name, areas of each class [2, k, r], confusion matrices [r, k, k]), images weighted by [n, r]."""
    k, (labels, predicted) = len(rankings), decided
    cells = np.zeros((len(labels), k * k), np.float32)
    cells[np.arange(len(labels)), labels * k + predicted] = 1
    counts = (weights.T @ cells).astype(np.float64).reshape(-1, k, k)
    areas = np.stack([np.stack(ranking.areas(weights)) for ranking in rankings], axis=1)
    found = counted(counts) | {"roc_auc": mean_over_classes(areas[0]), "pr_auc": mean_over_classes(areas[1])}
    total = weights.sum(0, dtype=np.float64)
    found |= {name: weights.T.astype(np.float64) @ each / total for name, each in means.items()}
    return found, areas, counts


def _bootstrap(name: str, value: float, drawn: np.ndarray, n: int, images: int = 0) -> Score:
    low, high = normal_interval(value, drawn, n, _SCALES.get(name, "share"), images)
    return Score(float(value), low, high, BOOTSTRAP)


def _of_classes(
    counts: np.ndarray, classes: Sequence[str], areas: np.ndarray, drawn: np.ndarray
) -> dict[str, dict[str, Score]]:
    """Sensitivity, specificity, precision, f1 and the areas, one against the rest, of each class."""
    bounds, parts = class_intervals(counts), class_shares(counts)
    held = bounds | {"sensitivity": bounds["recall"], "specificity": proportion_intervals(*parts["specificity"])}
    values = {what: (*part, held[what]) for what, part in parts.items()}
    found = {}
    for c, name in enumerate(classes):
        own = {
            what: Score(float(top[c] / below[c]) if below[c] else float("nan"), float(low[c]), float(high[c]), WILSON)
            for what, (top, below, (low, high)) in values.items()
        }
        positives = int(counts[c].sum())
        roc, pr = (float(area) for area in areas[:, c])
        own["roc_auc"] = Score(roc, *roc_interval(roc, drawn[0, c], positives, int(counts.sum()) - positives))
        own["pr_auc"] = Score(pr, *pr_interval(pr, drawn[1, c], positives))
        found[name] = own
    return found


def _of_few(
    scores: dict[str, Score], per_class: dict[str, dict[str, Score]], true: np.ndarray, said: np.ndarray
) -> dict[str, Score]:
    """Means over classes of which some have few images, whose resamples vary too little: by the classes' intervals.
    `true` and `said` [k]: images, or groups, that are of each class and that are taken for it."""
    found = {}
    if not said.all():  # a class never predicted counts as 0 here, but its precision may be above 0 in more images
        found["macro_precision"] = Score(scores["macro_precision"].value, *_NOT_KNOWN, CLASSES)
    elif said.min() < FEW:
        found["macro_precision"] = _of_means([own["precision"] for own in per_class.values()])
    if np.isfinite(scores["roc_auc"].value) and true[true > 0].min() < FEW:
        there = [own for own, n in zip(per_class.values(), true, strict=True) if n]
        found |= {name: _of_means([own[name] for own in there]) for name in ("roc_auc", "pr_auc")}
    return found


def _of_means(each: Sequence[Score]) -> Score:
    values = np.array([one.value for one in each])
    return Score(float(values.mean()), *mean_interval(values, [(one.low, one.high) for one in each]), CLASSES)


def text(scores: Scores) -> str:
    """The scores as a table, those of each class, and the confusion matrix as shares of the true class."""
    lines = [f"{'score':20}{'value':>8}  95 % interval"]
    lines += [f"{name:20}{_numbers(s)}   {s.by}" for name, s in scores.scores.items()]
    names = [printable(name) for name in scores.classes]
    width = max(6, *(len(name) + 1 for name in names))  # 100.0 and a space
    kinds = list(next(iter(scores.classes.values())))
    lines += ["", "class".ljust(width) + "".join(kind.rjust(25) for kind in kinds)]
    for name, own in zip(names, scores.classes.values(), strict=True):
        lines.append(name.ljust(width) + "".join(_numbers(s).strip().rjust(25) for s in own.values()))
    lines += ["", "".rjust(width) + "".join(name.rjust(width) for name in names) + "   (shares of the true class, %)"]
    for name, row in zip(names, scores.rates, strict=True):
        lines.append(name.rjust(width) + "".join(f"{100 * v:.1f}".rjust(width) for v in row))
    if scores.note:
        lines += ["", scores.note]
    return "\n".join(lines)


def _numbers(s: Score) -> str:
    bounds = f"({s.low:.3f} to {s.high:.3f})" if np.isfinite(s.low) else "(not known)"
    return f"{s.value:8.3f}  {bounds}" if np.isfinite(s.value) else f"{'-':>8}"
