"""What a run was trained on, kept with it in reference.npz, so that other images can be held against it."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.analysis.evaluate.looks import LOOKS, looks
from bmjax.analysis.evaluate.reader import Reader, Seen
from bmjax.data.dataset import Dataset
from bmjax.data.images.colours import colour_shares
from bmjax.data.splits import Splits
from bmjax.files import read_npz

FILE = "reference.npz"
_MOST, _OF_A_CLASS = 2000, 300
"""Cells of each split that are kept, and cells of each class whose colours are."""
_NEIGHBOURS = 10
_RARE = 0.01  # share of the images below which classes say nothing of all images' colours
SCORES = ("probability", "energy", "mahalanobis", "neighbours", "looks", "maps", "together")


@dataclasses.dataclass(frozen=True)
class Reference:
    """`looks` float32 [m, 6], `features` float32 [m, c] and `maps` float32 [m, s, 128] of training cells (see
    bmjax.analysis.evaluate.reader.Seen) with their labels [m]; `known` float32 [v, 5 + s]: the `parts` of validation
    cells, which training did not see, and their rows `rows` [v]; `step` of the checkpoint. `colours` float32
    [k, 3, 256]: see bmjax.data.images.colours. Without a network's pass there are looks, labels and colours
    alone: c, s, v and step are 0. A file of before has no colours: k is 0."""

    looks: np.ndarray
    features: np.ndarray
    maps: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    rows: np.ndarray
    step: int
    colours: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 3, 256), np.float32))

    @classmethod
    def of_looks(cls, looks: np.ndarray, labels: np.ndarray | None = None) -> Reference:
        """Of looks [m, 6] and, where they are known, labels [m] alone."""
        none, no_row = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
        return cls(looks, none, none[..., None], no_row if labels is None else labels, none, no_row, 0)

    def colours_at(self, shares: np.ndarray) -> np.ndarray:
        """The shares of colours [3, 256] of training cells with the classes' shares [k]. Classes without a training
        cell count as the others."""
        there = self.colours.sum((1, 2)) > 0
        mixed = np.tensordot(shares[there], self.colours[there], 1)
        return mixed if shares[there].sum() > _RARE else self.colours[there].mean(0)

    @property
    def has_features(self) -> bool:
        return len(self.known) > 0

    @functools.cached_property
    def _unit(self) -> np.ndarray:
        return _to_length_one(self.features)

    @functools.cached_property
    def _whitened(self) -> tuple[np.ndarray, np.ndarray]:
        """(matrix [c, c] that makes the features' covariance within classes the identity, class means so [k, c])."""
        from sklearn.covariance import ledoit_wolf

        wide = self.features.astype(np.float64)
        means = np.stack([wide[self.labels == c].mean(0) for c in np.unique(self.labels)])
        of_row = means[np.searchsorted(np.unique(self.labels), self.labels)]
        covariance, _ = ledoit_wolf(wide - of_row, assume_centered=True)
        values, vectors = np.linalg.eigh(covariance)
        matrix = vectors / np.sqrt(np.maximum(values, 1e-12 * max(float(values[-1]), 1e-300)))
        return matrix, means @ matrix

    def parts(self, seen: Seen) -> np.ndarray:
        """What the scores are made of, float32 [n, 5 + s], the stranger the higher: 1 - the largest probability; energy
        (Liu et al. 2020, https://arxiv.org/abs/2010.03759); Mahalanobis's distance from the nearest class (Lee et al.
        2018, https://arxiv.org/abs/1807.03888); distance from the 10th nearest training cell by features of length one
        (Sun et al. 2022, https://arxiv.org/abs/2204.06507), and the logarithm of that by looks and by each stage."""
        matrix, means = self._whitened
        at = seen.features.astype(np.float64) @ matrix
        squares = (at**2).sum(1)[:, None] - 2 * at @ means.T + (means**2).sum(1)
        near = [_tenth(self._unit, _to_length_one(seen.features))]
        deviation = np.maximum(self.looks.std(0), 1e-3)
        pairs = [(self.looks / deviation, seen.looks / deviation)]
        pairs += [(self.maps[:, i], seen.maps[:, i]) for i in range(self.maps.shape[1])]
        near += [np.log(np.maximum(_tenth(own, there), 1e-6)) for own, there in pairs]
        return np.stack([1 - seen.probs.max(1), seen.energy, squares.min(1), *near], axis=1).astype(np.float32)

    def scores(self, parts: np.ndarray) -> np.ndarray:
        """Scores float32 [n, 7] in the order of `SCORES`, of parts [n, 5 + s]: the first five as they are; the mean of
        the stages'; and "together", the mean of energy, looks and stages, each in validation's deviations."""
        middle, deviation = self.known.mean(0, np.float64), np.maximum(self.known.std(0, np.float64), 1e-3)
        apart = ((parts - middle) / deviation).astype(np.float32)
        used = [SCORES.index("energy"), *range(SCORES.index("looks"), parts.shape[1])]
        return np.column_stack([parts[:, :5], parts[:, 5:].mean(1), apart[:, used].mean(1)])

    def strangeness(self, seen: Seen) -> np.ndarray:
        """Scores float32 [n, 7] of images, the stranger the higher: see `parts` and `scores`."""
        return self.scores(self.parts(seen))

    @functools.cached_property
    def known_scores(self) -> np.ndarray:
        """Those of the validation cells, float32 [v, 7]."""
        return self.scores(self.known)

    def familiarity(self, scores: np.ndarray, score: str = "together") -> np.ndarray:
        """Of scores [n, 7]: the share of validation cells at least as strange, [n], by one score: a conformal p-value,
        at most p with probability p for cells as in training."""
        known = np.sort(self.known_scores[:, SCORES.index(score)])
        stranger = len(known) - np.searchsorted(known, scores[:, SCORES.index(score)], side="left")
        return (1 + stranger) / (1 + len(known))


def _tenth(own: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The distance [n] of rows [n, d] from the 10th nearest, or the farthest, of own rows [m, d]."""
    squares = (there**2).sum(1)[:, None] - 2 * there @ own.T + (own**2).sum(1)
    place = min(_NEIGHBOURS, len(own)) - 1
    return np.sqrt(np.maximum(np.partition(squares, place, axis=1)[:, place], 0))


def _to_length_one(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _some(rows: np.ndarray) -> np.ndarray:
    """At most `_MOST` rows, the same each time."""
    if len(rows) <= _MOST:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, _MOST, replace=False))


def _colours(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """The shares of colours of each class, by so many cells of each that a rare one is there, too."""
    rows = np.random.default_rng(0).permutation(rows)
    each = [rows[dataset.labels[rows] == c][:_OF_A_CLASS] for c in range(len(dataset.classes))]
    chosen = np.sort(np.concatenate(each))
    return colour_shares(dataset.images[chosen], dataset.labels[chosen], len(dataset.classes))


def make_reference(dataset: Dataset, splits: Splits, reader: Reader | None = None) -> Reference:
    """The reference of a run's data; with a reader of the run, its features too, where there is a validation split."""
    rows = _some(splits.train)
    labels = dataset.labels[rows].astype(np.int64)
    colours = _colours(dataset, splits.train)
    plain = dataclasses.replace(Reference.of_looks(looks(dataset.images[rows]), labels), colours=colours)
    if reader is None or not len(splits.val):
        return plain
    seen = reader(dataset, rows)
    plain = dataclasses.replace(plain, features=seen.features, maps=seen.maps)
    known = _some(splits.val)
    parts = plain.parts(reader(dataset, known))
    return dataclasses.replace(plain, known=parts, rows=known.astype(np.int64), step=reader.run.step)


def write_reference(run_dir: Path, reference: Reference) -> None:
    """Keeps a reference with its run."""
    temporary = run_dir / f".{FILE}.{os.getpid()}.npz"
    arrays: dict[str, Any] = {f.name: np.asarray(getattr(reference, f.name)) for f in dataclasses.fields(reference)}
    np.savez_compressed(temporary, names=np.array(LOOKS), **arrays)
    os.replace(temporary, run_dir / FILE)


def keep_looks(run_dir: Path, dataset: Dataset, splits: Splits) -> None:
    """Keeps what the training cells look like with a run that keeps no reference yet."""
    if not (run_dir / FILE).is_file():
        write_reference(run_dir, make_reference(dataset, splits))


def read_reference(run_dir: str | Path) -> Reference | None:
    """The run's reference; None where none is kept.

    Raises:
      ValueError: the file is damaged; names it and the remedy.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        return None
    remedy = "`bmjax eval RUN --reference` writes it again"
    try:
        needed = [f.name for f in dataclasses.fields(Reference) if f.name != "colours"]
        arrays = read_npz(path, ("names", *needed), ("colours",))
    except ValueError as e:
        raise ValueError(f"{e}; {remedy}") from e
    arrays.setdefault("colours", np.zeros((0, 3, 256), np.float32))
    m, v = len(arrays["looks"]), len(arrays["rows"])
    c = arrays["features"].shape[-1] if arrays["features"].ndim == 2 else -1
    s, p = arrays["maps"].shape[1:] if arrays["maps"].ndim == 3 else (-1, -1)
    own, labels = m if v else 0, (m,) if v or arrays["labels"].size else (0,)
    shapes = {"looks": (m, len(LOOKS)), "features": (own, c), "maps": (own, s, p), "labels": labels, "rows": (v,)}
    shapes |= {"known": (v, 5 + s) if v else (0, 0), "step": (), "names": (len(LOOKS),)}
    shapes |= {"colours": (len(arrays["colours"]), 3, 256) if arrays["colours"].ndim else (0, 3, 256)}
    odd = [name for name, shape in shapes.items() if arrays[name].shape != shape]
    kinds = {"f": ("looks", "features", "maps", "known", "colours"), "i": ("labels", "rows", "step"), "U": ("names",)}
    numbers = {name: kind for kind, names in kinds.items() for name in names}
    odd += [name for name, kind in numbers.items() if arrays[name].dtype.kind != kind]
    odd += [name for name in kinds["f"] if name not in odd and not np.isfinite(arrays[name]).all()]
    if "colours" not in odd and not _are_shares(arrays["colours"]):
        odd.append("colours")
    if odd or not m or tuple(arrays["names"].tolist()) != LOOKS:
        raise ValueError(f"{path} is damaged: array {(odd or ['names'])[0]!r} is not as expected; {remedy}")
    arrays.pop("names")
    step = int(arrays.pop("step"))
    return Reference(**arrays, step=step)


def _are_shares(colours: np.ndarray) -> bool:
    """Whether colours [k, 3, 256] are shares of all values, or nothing, of each class."""
    sums = colours.sum(-1)
    whole = (np.abs(sums - 1) < 1e-3).all(1)
    return bool((colours >= 0).all() and (whole | (sums == 0).all(1)).all() and (not len(colours) or whole.any()))
