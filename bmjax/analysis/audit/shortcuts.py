"""Can the classes be told without the cell? Classifiers that see only the border, the file, or colour and focus.

A network learns what is easiest. If slides of one class were stained, focused or saved in another way, that is easiest,
and its accuracy says nothing of cells (Geirhos et al. 2020, "Shortcut learning in deep neural networks").
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from bmjax.analysis.baseline import PROBE_C, logistic
from bmjax.runs.confusion import balanced_accuracy, confusion_matrix
from bmjax.runs.intervals import bootstrap_interval

FOLDS = 5
TOLD = 0.9
TREES = 200
PER_CLASS = 1000  # images of a class that a classifier sees at most
STATISTICS = ("red", "green", "blue", "contrast", "saturation", "focus", "clipped")


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """What a classifier reached without seeing cells: balanced accuracy over n images, with its 95 % interval, and
    what guessing reaches; `told` are the classes that it tells from all others, with an F1 of TOLD or more."""

    name: str
    sees: str
    n: int
    balanced_accuracy: float
    low: float
    high: float
    chance: float
    told: tuple[str, ...]

    @property
    def excess(self) -> float:
        """The lower bound on a scale where guessing is 0 and no error is 1."""
        return (self.low - self.chance) / (1 - self.chance)


def border_features(image: np.ndarray) -> np.ndarray:
    """Image uint8 [h, w, 3] -> float32 [15]: of the outermost twelfth of each side, by channel the mean, the standard
    deviation, and the 5 %, 50 % and 95 % quantiles."""
    h, w, _ = image.shape
    frame = np.ones((h, w), bool)
    frame[h // 12 or 1 : -(h // 12 or 1), w // 12 or 1 : -(w // 12 or 1)] = False
    pixels = image[frame].astype(np.float32)
    quantiles = np.quantile(pixels, (0.05, 0.5, 0.95), axis=0).ravel()
    return np.concatenate([pixels.mean(0), pixels.std(0), quantiles]).astype(np.float32)


def image_statistics(image: np.ndarray) -> np.ndarray:
    """Image uint8 [h, w, 3] -> float32 [7], in the order of `STATISTICS`.

    Means of the channels and their joint standard deviation, 0..255; mean saturation 0..1 (HSV); focus, the standard
    deviation of the grey image's Laplacian (Pech-Pacheco et al. 2000 take its square); share of pixels at 0 or 255.
    """
    from scipy.ndimage import laplace

    values = image.astype(np.float32)
    high, low = values.max(-1), values.min(-1)
    saturation = ((high - low) / np.maximum(high, 1)).mean()
    grey = values.mean(-1)
    clipped = ((low >= 255) | (high <= 0)).mean()
    focus = laplace(grey, mode="nearest").std()
    return np.array([*values.mean((0, 1)), grey.std(), saturation, focus, clipped], np.float32)


def out_of_fold(model, features: np.ndarray, labels: np.ndarray, units: np.ndarray, k: int, seed: int = 0):
    """Probabilities [n, k] of each row by a scikit-learn classifier that saw no row of its unit.

    `units` int [n] number what must stay together: copies, near duplicates, patients.

    Raises:
      ValueError: fewer units than folds.
    """
    from sklearn.base import clone
    from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    probs = np.zeros((len(labels), k))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        for rows, held in folds.split(features, labels, units):
            fitted = clone(model).fit(features[rows], labels[rows])
            probs[np.ix_(held, fitted.classes_)] = fitted.predict_proba(features[held])
    return probs


def sample(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows, sorted: at most PER_CLASS of each class, at random."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:PER_CLASS] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def shortcut(
    name: str, sees: str, features: np.ndarray, labels: np.ndarray, units: np.ndarray, classes: Sequence[str]
) -> Shortcut:
    """How well a random forest tells the classes by these features, cross-validated over units."""
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(TREES, min_samples_leaf=3, class_weight="balanced", random_state=0, n_jobs=-1)
    k = len(classes)
    predicted = out_of_fold(forest, features, labels, units, k).argmax(-1)
    counts = confusion_matrix(labels, predicted, k)
    low, high = bootstrap_interval(balanced_accuracy, counts)
    chance = 1 / len(np.unique(labels))
    f1 = 2 * np.diag(counts) / np.maximum(counts.sum(0) + counts.sum(1), 1)
    told = tuple(name for name, score in zip(classes, f1, strict=True) if score >= TOLD)
    return Shortcut(name, sees, len(labels), float(balanced_accuracy(counts)), low, high, chance, told)


def likely_label_errors(
    features: np.ndarray, labels: np.ndarray, units: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose label is likely wrong, the likeliest first; out-of-fold probabilities [n, k]).

    Confident learning (Northcutt et al. 2021) by cleanlab, on a logistic regression of a network's features with the
    strength of regularisation that does best out of fold.

    Raises:
      ValueError: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as e:
        raise ValueError("--features needs the library cleanlab: pip install 'bmjax[audit]'") from e
    # On a sample, as each regularisation takes as long as the whole.
    rows = sample(labels)

    def reached(c: float) -> float:
        probs = out_of_fold(logistic(c, 0), features[rows], labels[rows], units[rows], k)
        return float(balanced_accuracy(confusion_matrix(labels[rows], probs.argmax(-1), k)))

    best = max(PROBE_C, key=reached)
    probs = out_of_fold(logistic(best, 0), features, labels, units, k)
    order = find_label_issues(labels, probs, return_indices_ranked_by="normalized_margin", n_jobs=1)
    return np.asarray(order, np.int64), probs


def medians_by(statistics: np.ndarray, numbers: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The median of each of `STATISTICS` [n, 7] in each class or laboratory, whose number in `names` each row has."""
    return {
        name: dict(zip(STATISTICS, np.median(statistics[numbers == i], axis=0).round(3).tolist(), strict=True))
        for i, name in enumerate(names)
    }
