"""Probabilities of images by a trained classifier, and the metrics of a split."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bmjax.config.arguments import check_choice, check_type
from bmjax.config.base import Config
from bmjax.data.batches import eval_batches, read_ahead
from bmjax.data.dataset import Dataset
from bmjax.data.load import read_arrays, with_usable_cache
from bmjax.data.splits import NAMES, Splits
from bmjax.model.classifier import Classifier
from bmjax.model.parameters import Tree
from bmjax.runs.folder import (
    Run,
    Which,
    image_dtype,
    load_data,
    load_run,
    record_opening,
    save_predictions,
    save_results,
)
from bmjax.runs.metrics import classification_metrics, load_metrics
from bmjax.runs.records import most_wrong, read_predictions
from bmjax.runs.resampling import over_groups
from bmjax.runs.tables import MISTAKES, Finished
from bmjax.runs.tracking import Tracker
from bmjax.training import hosts
from bmjax.training.parallel import Parallel
from bmjax.training.signals import Signals
from bmjax.training.steps import at_precision, make_eval_step

log = logging.getLogger(__name__)
SplitName = Literal["train", "val", "test"]
IN_FLIGHT = 2
"""Batches that the device has before the host waits for the first of them."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 [n, k] of logits [n, k], computed in float64."""
    wide = np.asarray(logits, np.float64)
    return np.exp(wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)).astype(np.float32)


class Predictor:
    """Probabilities of images in evaluation mode.

    Compiles once for whole batches, and once for each smaller size that `bucket` finds.
    """

    def __init__(
        self,
        config: Config,
        model: Classifier,
        signals: Signals | None = None,
        parallel: Parallel | None = None,
        *,
        features: bool = False,
    ):
        kind = "jit" if hosts.several() else config.train.parallel
        self._parallel = parallel or Parallel.create(kind, config.train.devices)
        self.batch_size = math.ceil(config.train.eval_batch_size / self._parallel.divides) * self._parallel.divides
        self._signals = signals
        self._metrics = load_metrics(config.train.metrics)
        step = at_precision(
            make_eval_step(model, image_dtype=image_dtype(config), features=features), config.train.precision
        )
        self._step = self._parallel.compile_step(step, donate=False)

    def __call__(self, variables: Tree, dataset: Dataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities float32 [n, k], rows [n]): every image once, padding left out.

        Raises:
          Interrupted: a signal came between two batches.
        """
        return self.on_devices(self.to_devices(variables), dataset, rows)

    def to_devices(self, variables: Tree) -> Tree:
        """Variables for `on_devices` and `outputs`."""
        return self._parallel.to_devices(variables)

    def on_devices(self, variables: Tree, dataset: Dataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As a call, of variables that are on the devices already."""
        outputs, done = self.outputs(variables, dataset, rows)
        return softmax(outputs["logits"]), done

    def outputs(
        self,
        variables: Tree,
        dataset: Dataset,
        rows: np.ndarray,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As `on_devices`, with logits [n, k] in place of probabilities, and features [n, c] if they are asked for.
        `change`: of each batch of images uint8 [b, s, s, 3] before the network sees them."""
        landed, done = [], []
        flying: deque[tuple[Any, dict[str, np.ndarray]]] = deque()

        def land() -> None:
            outputs, batch = flying.popleft()
            real = batch["weight"] > 0
            landed.append({name: x[real] for name, x in self._parallel.batch_to_host(outputs).items()})
            done.append(batch["index"][real])

        for batch in read_ahead(eval_batches(dataset, rows, self.bucket(len(rows)), self._parallel.rows)):
            if self._signals is not None:
                self._signals.check()
            images = batch["image"] if change is None else change(batch["image"])
            flying.append((self._step(variables, self._parallel.put_batch({"image": images})), batch))
            if len(flying) > IN_FLIGHT:
                land()
        while flying:
            land()
        return {name: np.concatenate([one[name] for one in landed]) for name in landed[0]}, np.concatenate(done)

    def bucket(self, n: int) -> int:
        """Images in a batch where n are asked for. Where whole batches would be padding for the most part, it is the
        power of two (times devices) that holds n."""
        if 4 * n > self.batch_size:
            return self.batch_size
        return self._parallel.divides * 2 ** (math.ceil(n / self._parallel.divides) - 1).bit_length()

    def metrics(self, labels: np.ndarray, probs: np.ndarray, *, intervals: bool = False) -> dict[str, Any]:
        """The figures of labels int [n] and probabilities [n, k], those of the configuration's own included."""
        return classification_metrics(labels, probs, self._metrics, intervals=intervals)


def evaluate(
    run_dir: str | Path,
    split: SplitName = "val",
    which: Which = "best",
    *,
    data: tuple[Dataset, Splits] | None = None,
    data_root: str | None = None,
    devices: int | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Metrics of a split by a run's checkpoint; writes predictions_<split>.npz and results.json.

    On all devices there are, or so many of them, whatever the run was trained on; `trust` as in `load_run`.
    `data_root`: where the run's data are now; their contents are held to the run's record. Each opening of the test
    split is recorded in openings.jsonl.

    Raises:
      FileNotFoundError: the folder holds no run or no checkpoint.
      TypeError, ValueError: an argument is wrong, or the data are not those the run began with.
    """
    check_choice("split", split, NAMES)
    given = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Dataset) and isinstance(data[1], Splits)
    if data is not None and not given:
        raise TypeError(f"data is {type(data).__name__}; expected None or (bmjax.Dataset, its Splits)")
    run = load_run(run_dir, which, devices=devices, trust=trust)
    dataset, splits = data or data_of(run, data_root)
    return evaluate_run(run, split, which, Predictor(run.config, run.model), dataset, splits)


def data_of(run: Run, data_root: str | None = None) -> tuple[Dataset, Splits]:
    """The data that a run was trained on, from where they are now. Where the training machine's `data.cache_dir` can't
    be made here, this user's cache takes its place.

    Raises:
      ValueError: the data are not those the run began with.
    """
    data = run.config.data
    if data_root is not None:
        data = dataclasses.replace(data, root=data_root)
    return load_data(run.run_dir, dataclasses.replace(run.config, data=with_usable_cache(data, run.run_dir)))


def evaluate_run(
    run: Run, split: SplitName, which: Which, predictor: Predictor | Any, dataset: Dataset, splits: Splits
) -> dict[str, Any]:
    """As `evaluate`, of a run that is read already; one predictor serves several splits."""
    if not len(getattr(splits, split)):
        raise ValueError(f"split is {split!r}, which holds no image; expected one that does")
    if split == "test" and hosts.leads() and (openings := record_opening(run.run_dir, run.step)) > 1:
        log.warning(
            "%s: the test split is opened for time %d; a choice made on it is no longer a test", run.run_dir, openings
        )
    probs, done = predictor(run.variables, dataset, getattr(splits, split))
    metrics = predictor.metrics(dataset.labels[done], probs, intervals=True) | {"step": run.step, "checkpoint": which}
    if dataset.groups:
        groups = [dataset.groups[i] for i in done]
        metrics = over_groups(metrics, dataset.labels[done], probs.argmax(1), groups)
    with hosts.together("the predictions were written"):
        if hosts.leads():
            save_predictions(run.run_dir, split, dataset, probs, done)
            save_results(run.run_dir, split, metrics)
    return metrics


def predict_probs(run: Run, images: np.ndarray, predictor: Predictor | None = None) -> np.ndarray:
    """Class probabilities float32 [n, k] of images uint8 0..255 RGB [n, h, w, 3].

    Those at the run's image size are taken as `load_dataset` gives them; those of any other are resized as the run
    reads files, and their stain is normalised where the run does so. `predictor`: one made before, where this is
    called again and again; it compiles once.

    Raises:
      TypeError, ValueError: `run` is no Run, or the images are of another type, range or shape; names the remedy.
    """
    check_type("run", run, Run, "a Run, as bmjax.load_run gives")
    images = read_arrays(images, run.config.data)
    n = len(images)
    if not n:
        return np.zeros((0, len(run.classes)), np.float32)
    predictor = predictor or Predictor(run.config, run.model)
    return predictor(run.variables, unlabelled(images, run.classes), np.arange(n))[0]


def unlabelled(images: np.ndarray, classes: tuple[str, ...]) -> Dataset:
    """Images uint8 [n, s, s, 3] of which nothing is known, as a dataset; all labels are 0."""
    n = len(images)
    return Dataset(
        name="images",
        classes=classes,
        images=images,
        labels=np.zeros(n, np.int32),
        ids=tuple(map(str, range(n))),
        hashes=("",) * n,
        fingerprint="",
        skipped=(),
    )


def track_results(
    run_dir: Path, tracker: Tracker, dataset: Dataset, results: dict[str, dict[str, Any]], pages: Sequence[Path] = ()
) -> None:
    """Hands the tracker what the run has come to: metrics, the predictions of the last split evaluated, pages."""
    saved = read_predictions(run_dir, list(results)[-1])
    assert saved is not None, "written by the evaluation before"
    images = dataset.images[saved.index[most_wrong(saved, MISTAKES)]]
    tracker.finished(Finished(run_dir, results, saved, np.asarray(images), tuple(pages)))
