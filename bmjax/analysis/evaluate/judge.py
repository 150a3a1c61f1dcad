"""One run or several as one classifier: what it says of a split or of other images, and whether it should answer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bmjax.analysis.evaluate.calibration import Calibration, cross_fitted, read_calibration
from bmjax.analysis.evaluate.reader import Reader, Seen, adapted_priors, at_priors
from bmjax.analysis.evaluate.reference import Reference, read_reference
from bmjax.analysis.evaluate.refusal import Refusal, fit_refusal
from bmjax.config.data import DataConfig
from bmjax.data.batches import evenly
from bmjax.data.dataset import Dataset
from bmjax.data.images.colours import ColourMap, colour_shares, match_colours
from bmjax.data.load import load_elsewhere, with_usable_cache
from bmjax.data.splits import sides_of
from bmjax.files import printable
from bmjax.runs.folder import Run, record_opening, saved_results, split_size
from bmjax.runs.records import Predictions, read_predictions
from bmjax.training.predict import SplitName, data_of

log = logging.getLogger(__name__)
NO_VALIDATION = (
    "has no validation split, which thresholds, calibrations, frequencies and features to compare with are set by; for "
    "those, train with --data.split 0.85 0.15 0"
)
READING = ("image_size", "stain", "stain_reference", "pixel_size", "field_size")
"""Fields of a data configuration that decide how a file is read."""
_ROUNDS = 2
TO_ADAPT = 2048
"""Images at most that norms and colours are adapted to."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The same n images for each run, as it reads them: `parts` of (dataset, rows [n]); their labels [n] and ids."""

    parts: tuple[tuple[Dataset, np.ndarray], ...]
    labels: np.ndarray
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def same_classes(runs: Sequence[Run]) -> tuple[str, ...]:
    """The classes of several runs, which are to be one classifier.

    Raises:
      ValueError: they differ, or a run is given twice; names the first such run.
    """
    for i, run in enumerate(runs[1:], 1):
        if Path(run.run_dir).resolve() in {Path(other.run_dir).resolve() for other in runs[:i]}:
            raise ValueError(f"{run.run_dir} is given twice; expected each run once")
        if run.classes != runs[0].classes:
            raise ValueError(
                f"{run.run_dir} has the classes {', '.join(run.classes)}; expected those of {runs[0].run_dir}: "
                f"{', '.join(runs[0].classes)}"
            )
    return runs[0].classes


def target_of_split(runs: Sequence[Run], split: SplitName, data_root: str | None = None) -> Target:
    """A split of the runs' own data; an opening of the test split is recorded with each.

    Raises:
      ValueError: the split holds no image, or other images for one of the runs, which may have been trained on them.
    """
    parts = []
    ids: tuple[str, ...] = ()
    for run in runs:
        dataset, splits = data_of(run, data_root)
        rows = getattr(splits, split)
        if not len(rows):
            raise ValueError(f"split is {split!r}, which holds no image in {run.run_dir}; expected one that does")
        found = tuple(dataset.ids[i] for i in rows)
        if parts and found != ids:
            raise ValueError(
                f"{run.run_dir} has other images in its {split} split than {runs[0].run_dir}, and may have been "
                "trained on some of them; expected runs of one split (folds: `bmjax folds`), or --on FOLDER"
            )
        ids = found
        parts.append((dataset, rows))
    if split == "test":
        for run in runs:
            if (openings := record_opening(run.run_dir, run.step)) > 1:
                log.warning("%s: the test split is opened for time %d", run.run_dir, openings)
    dataset, rows = parts[0]
    return Target(tuple(parts), dataset.labels[rows], ids)


def check_knows_scale(data: DataConfig, pixel_size: float, of: str) -> None:
    """Refuses a pixel size beside a classifier `of` this place that was trained without a scale."""
    if not data.field_size:
        raise ValueError(
            f"--pixel-size is {pixel_size}, but {of} was trained without data.field_size and knows no scale"
        )


def at_pixel_size(runs: Sequence[Run], pixel_size: float | None) -> list[Run]:
    """Runs that read files of another microscope, of so many micrometres to a pixel; None: as in training, which is
    said. Rows of a table that name their own are read by those.

    Raises:
      ValueError: a run was trained without a scale.
    """
    if pixel_size is None:
        data = runs[0].config.data
        if data.field_size and data.pixel_size:
            log.info(
                "files are read at %g micrometres to a pixel, the run's own data.pixel_size: the middle %.0f pixels; "
                "--pixel-size is for files of another microscope",
                data.pixel_size,
                data.field_size / data.pixel_size,
            )
        return list(runs)
    for run in runs:
        check_knows_scale(run.config.data, pixel_size, str(run.run_dir))
    configs = [dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, pixel_size=pixel_size))
               for run in runs]  # fmt: skip
    return [dataclasses.replace(run, config=config) for run, config in zip(runs, configs, strict=True)]


def target_of_path(runs: Sequence[Run], path: str, source: str) -> tuple[Target, Target]:
    """Labelled images from elsewhere: (those of the runs' classes, those of classes that the runs don't know). Images
    that not every run can read, as of a field too small for one, are left out and said.

    Raises:
      FileNotFoundError, ValueError: they are not there or not as expected, or none is of a class that the runs know.
    """
    classes, loaded = same_classes(runs), {}
    parts = []
    for run in runs:
        config = dataclasses.replace(run.config.data, root=path, source=source)
        key = elsewhere(config)
        if key not in loaded:
            loaded[key] = load_elsewhere(with_usable_cache(config, run.run_dir), classes)
        parts.append(loaded[key])
    ids, at = _shared(path, parts)
    first = parts[0]
    _say_trained_on(runs, path, [first.hashes[i] for i in at[0]])
    place = {name: i for i, name in enumerate(classes)}
    labels = np.array([place.get(first.classes[label], -1) for label in first.labels[at[0]]], np.int64)
    known = np.flatnonzero(labels >= 0)
    if not len(known):
        raise ValueError(f"{path}: no image of the runs' classes can be read by every run; expected at least one")

    def of(which: np.ndarray) -> Target:
        pairs = zip(parts, at, strict=True)
        return Target(tuple((data, rows[which]) for data, rows in pairs), labels[which], tuple(ids[i] for i in which))

    return of(known), of(np.flatnonzero(labels < 0))


def say_unmatched(runs: Sequence[Run], matched: bool = False) -> None:
    """Warns of images from elsewhere in colours of their own, for a run that was trained on matched ones."""
    for run in runs:
        if run.config.data.match_colours and not matched:
            log.warning(
                "%s was trained on laboratories in the colours of all (data.match_colours), and these images are in "
                "their own; --match-colours of `bmjax predict` and `bmjax eval --on` brings them to those of training",
                run.run_dir,
            )


def _say_trained_on(runs: Sequence[Run], path: str, hashes: Sequence[str]) -> None:
    """Warns of images that a run was trained on or chosen by, under whatever names."""
    for run in runs:
        sides = sides_of(run.run_dir / "split.csv", hashes)
        trained, chosen = sides.count("train"), sides.count("val")
        if trained or chosen:
            log.warning(
                "%s: %s was trained on %d of these %d images and chosen by %d: figures on them say how well they are "
                "remembered, not what it is worth on new images", path, run.run_dir, trained, len(sides), chosen,
            )  # fmt: skip


def _shared(path: str, parts: Sequence[Dataset]) -> tuple[list[str], list[np.ndarray]]:
    """(ids [n] of the images that are in all datasets, the row of each in each dataset)."""
    places = [{name: i for i, name in enumerate(data.ids)} for data in parts]
    ids = [name for name in parts[0].ids if all(name in place for place in places)]
    left = sorted(set().union(*places) - set(ids))
    if left:
        log.warning("%s: %d images can't be read by every run and are left out: %s", path, len(left),
                    ", ".join(map(printable, left[:5])) + ", ..." * (len(left) > 5))  # fmt: skip
    return ids, [np.array([place[name] for name in ids], np.int64) for place in places]


def elsewhere(config: DataConfig) -> DataConfig:
    """What of a data configuration decides how a file is read; configurations that read alike are equal in it."""
    return DataConfig(**{name: getattr(config, name) for name in READING})


class Judge:
    """One run, or several whose probabilities are averaged after each run's own calibration.

    `batch_size`: images at once, before the first are read; None: as configured.
    """

    def __init__(self, runs: Sequence[Run], *, views: int = 1, calibrated: bool = False):
        self.classes = same_classes(runs)
        self.runs, self.views = tuple(runs), views
        self.batch_size: int | None = None
        self.calibrations: tuple[Calibration | None, ...] = tuple(
            read_calibration(run.run_dir, len(run.classes), run.step, views) if calibrated else None for run in runs
        )
        self._priors: tuple[np.ndarray, np.ndarray] | None = None

    @functools.cached_property
    def readers(self) -> tuple[Reader, ...]:
        """One a run."""
        return tuple(Reader(run, self.views, self.batch_size) for run in self.runs)

    def __call__(self, target: Target) -> Seen:
        """Of the target's images; energy and features are the first run's."""
        seen = [reader(*part) for reader, part in zip(self.readers, target.parts, strict=True)]
        return dataclasses.replace(seen[0], probs=self._mean([one.probs for one in seen]))

    def images(self, images: Sequence[np.ndarray]) -> Seen:
        """Of images uint8 [n, s, s, 3], n >= 1, given for each run as it reads files."""
        seen = [reader.images(part) for reader, part in zip(self.readers, images, strict=True)]
        return dataclasses.replace(seen[0], probs=self._mean([one.probs for one in seen]))

    def _mean(self, probs: Sequence[np.ndarray]) -> np.ndarray:
        mean = _average(self._calibrated(probs))
        return mean if self._priors is None else at_priors(mean, *self._priors)

    def _calibrated(self, probs: Sequence[np.ndarray]) -> list[np.ndarray]:
        pairs = zip(probs, self.calibrations, strict=True)
        return [p if calibration is None else calibration(p) for p, calibration in pairs]

    def adapt(self, images: Sequence[np.ndarray]) -> None:
        """Estimates each run's norms on images uint8 [n, s, s, 3], given for each run; of many, on some of them."""
        for reader, part in zip(self.readers, images, strict=True):
            reader.adapt(part[evenly(len(part), TO_ADAPT)])

    def training_colours(self) -> list[Reference]:
        """What each run keeps of its training cells' colours.

        Raises:
          ValueError: a run keeps none; names the command that makes it.
        """
        found = []
        for run in self.runs:
            reference = read_reference(run.run_dir)
            if reference is None or not len(reference.colours):
                remedy = f"`{run.command('--reference')}` writes them"
                if not split_size(run.run_dir, "val"):
                    remedy = "runs trained by this version do"
                raise ValueError(f"{run.run_dir} keeps no colours of its training cells; {remedy}")
            if len(reference.colours) != len(run.classes):
                raise ValueError(
                    f"{run.run_dir}: reference.npz has colours of {len(reference.colours)} classes; expected "
                    f"{len(run.classes)}, as `{run.command('--reference')}` writes them"
                )
            found.append(reference)
        return found

    def match_colours(self, images: Sequence[np.ndarray]) -> list[ColourMap]:
        """From now on, images are seen in the colours of training: by one map for all, which brings images uint8
        [n, s, s, 3], given for each run, or some of them, to the training cells of the classes predicted here.

        Raises:
          ValueError: a run keeps no colours of its training cells.
        """
        references = self.training_colours()
        for reader, part, reference in zip(self.readers, images, references, strict=True):
            some = part[evenly(len(part), TO_ADAPT)]
            here = colour_shares(some, np.zeros(len(some), np.int64), 1)[0]
            reader.colours = None
            # What is seen in the first map's colours says better which classes there are.
            for _ in range(_ROUNDS):
                shares = reader.images(some, views=1).probs.mean(0, dtype=np.float64)
                reader.colours = match_colours(here, reference.colours_at(shares))
        return [reader.colours for reader in self.readers if reader.colours is not None]

    def adapt_priors(self, probs: np.ndarray) -> np.ndarray:
        """From now on, probabilities at the class frequencies [k] estimated from probs [n, k] of the images.

        Those that the network was trained at are the means of its probabilities on validation.

        Raises:
          ValueError: validation was not evaluated by these checkpoints.
        """
        source = self.validation().probs.mean(0, dtype=np.float64)
        found = adapted_priors(probs, source)
        self._priors = (source, found)
        return found

    def validation(self) -> Predictions:
        """What the runs say of validation in these views, calibrated. Raises a ValueError as `saved`."""
        return self.saved("val")

    def saved(self, split: SplitName) -> Predictions:
        """What the runs said of a split in these views, calibrated.

        Raises:
          ValueError: it was not evaluated by these checkpoints and views, or differs between runs.
        """
        each = self._saved_of_each(split)
        return dataclasses.replace(each[0], probs=_average(self._calibrated([one.probs for one in each])))

    def _saved_of_each(self, split: SplitName) -> list[Predictions]:
        found = [_saved(run, split, self.views) for run in self.runs]
        for run, one in zip(self.runs, found, strict=True):
            if one.ids.tolist() != found[0].ids.tolist():
                raise ValueError(
                    f"{run.run_dir} has another {split} split than {self.runs[0].run_dir}; expected one for all"
                )
        return found

    def reference(self) -> Reference | None:
        """What the first run was trained on; None where that is not kept. Features of another checkpoint are left out:
        only looks are the images' own."""
        found = read_reference(self.runs[0].run_dir)
        if found is not None and found.has_features and found.step != self.runs[0].step:
            return Reference.of_looks(found.looks, found.labels)
        return found

    def refusal(self, rate: float, unfamiliar: float = 0.0) -> Refusal:
        """The threshold for a wanted error rate, by the validation images at least as familiar as a share. Where runs
        are calibrated by a fit on these images, each is so by a fit on others of them: new images are no part of it.

        Raises:
          ValueError: as `validation`; too few images for that; or no features are kept.
        """
        each, keep = self._saved_of_each("val"), None
        val = dataclasses.replace(each[0], probs=_average(self._cross_fitted(each)))
        if unfamiliar:
            reference = self.featured_reference()
            if unfamiliar < (least := 1 / (1 + len(reference.known))):
                log.warning(
                    "--unfamiliar %g refuses nothing: beside the %d validation images whose features %s keeps, no "
                    "image is less familiar than %.3f", unfamiliar, len(reference.known), self.runs[0].run_dir, least,
                )  # fmt: skip
            at = {row: i for i, row in enumerate(reference.rows.tolist())}
            familiar = reference.familiarity(reference.known_scores)
            keep = np.array([row in at and familiar[at[row]] > unfamiliar for row in val.index.tolist()])
        return fit_refusal(val.labels, val.probs, rate, keep)

    def _cross_fitted(self, each: Sequence[Predictions]) -> list[np.ndarray]:
        """Each run's probabilities of validation, calibrated by fits on other validation images where its own
        calibration is the fit on all of them."""
        found = []
        for val, kept in zip(each, self.calibrations, strict=True):
            if kept is None:
                found.append(val.probs)
            elif kept.is_fit_of(val.labels, val.probs):
                found.append(cross_fitted(val.labels, val.probs, kept.method))
            else:
                found.append(kept(val.probs))
        return found

    def featured_reference(self) -> Reference:
        """As `reference`, with features.

        Raises:
          ValueError: there is none; names the command that makes it.
        """
        found = self.reference()
        if found is None or not found.has_features:
            run = self.runs[0]
            if not split_size(run.run_dir, "val"):
                raise ValueError(f"{run.run_dir} {NO_VALIDATION}")
            raise ValueError(f"{run.run_dir} keeps no features of this checkpoint; `{run.command('--reference')}` does")
        return found


def setting(
    views: int, *, matched: bool = False, adapt: bool = False, prior: bool = False, calibrated: bool = False
) -> str:
    """What files of figures that were read otherwise than plainly have in their names: "" or "-views8-adapted"."""
    words = {f"views{views}": views > 1, "matched": matched, "adapted": adapt, "prior": prior, "calibrated": calibrated}
    return "".join(f"-{word}" for word, is_so in words.items() if is_so)


def _average(each: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of each run's probabilities float32 [n, k]."""
    return each[0] if len(each) == 1 else np.asarray(np.mean(np.stack(each), axis=0, dtype=np.float64), np.float32)


def _saved(run: Run, split: SplitName, views: int) -> Predictions:
    """A run's predictions of a split by its checkpoint."""
    name = f"{split}{setting(views)}"
    found = read_predictions(run.run_dir, name)
    step = saved_results(run.run_dir).get(name, {}).get("step")
    if found is None or step != run.step:
        if split == "val" and not split_size(run.run_dir, "val"):
            raise ValueError(f"{run.run_dir} {NO_VALIDATION}")
        command = run.command(f"--split {split}" + (f" --views {views}" if views > 1 else ""))
        raise ValueError(f"{run.run_dir} has no predictions of {split} by step {run.step}; `{command}` makes them")
    return found
