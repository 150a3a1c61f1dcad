"""Trains attention variants on equal terms, several seeds each, paired over images, and sets them side by side.

runs/<name>/<row>/seed<k> is the run of each (<row>/fold<f>/seed<k> over folds); runs/<name>/comparison.json, .md and
.html hold the table. Called again it goes on where it was: finished runs stay as they are, the others are trained.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import threading
import time
from collections.abc import Sequence

import numpy as np

from bmjax.analysis.compare import planning, statistics
from bmjax.analysis.compare.checks import check_networks, hopeless, refuse_failed
from bmjax.analysis.compare.cost import Cost, costs
from bmjax.analysis.compare.design import Configs, Design, by_row, configurations, trials, tuned
from bmjax.analysis.compare.opening import open_test
from bmjax.analysis.compare.page import track, write_page
from bmjax.analysis.compare.table import Comparison, about, markdown
from bmjax.analysis.several import Crew, Failure, Shared, attempt, width
from bmjax.config.base import Config
from bmjax.data.load import check_sides
from bmjax.data.progress import saying
from bmjax.files import write_text
from bmjax.runs.folder import run_folder
from bmjax.runs.records import read_predictions
from bmjax.training import hosts
from bmjax.training.progress import Callback
from bmjax.training.run import Result, train_run

log = logging.getLogger(__name__)
__all__ = ["Comparison", "Cost", "Design", "compare", "configurations", "markdown"]


def compare(
    config: Config,
    variants: Sequence[str],
    seeds: int = 5,
    baseline: str = "none",
    at_once: int | None = None,
    design: Design | None = None,
) -> Comparison:
    """Trains what is not trained yet and compares on the test split, which is opened once, when all are trained.

    On cached features where `features.cached` is set, and then `at_once` runs at a time: by default one a device, on
    CPUs two, since one leaves cores idle while it evaluates and writes. The baseline is trained too where `variants`
    lack it. `design` says what else is varied; where it adds seeds, the test split is opened at each planned look,
    and the design's error allows for that.

    Raises:
      Interrupted: a signal stopped it; called again, it goes on.
      ValueError: as `configurations`; no image for validation or test; `at_once` is not positive, or more than one end
        to end; a variant's network can't be traced; a run's folder holds one of another configuration; or, once the
        others are trained and before the test split is opened, runs failed in training. With several hosts the first
        that fails ends it.
    """
    design = design or Design()
    looks = planning.looks(design.max_seeds) if design.wanted is not None else (seeds,)
    configs = configurations(config, variants, looks[0], baseline, design)
    check_sides(configs[baseline][0].data, ("val", "test"), "a comparison")
    at_once = width(at_once, config.features.cached)
    check_networks(configs)
    shared, tried = Shared(), trials(configs, design) if design.tune else {}
    log.info("%s", _announced(configs, tried, design, at_once))
    began, rates = time.perf_counter(), dict[str, tuple[float, ...]]()
    if tried:
        refuse_failed(hopeless(_Runs(tried, shared, "trial").train(at_once), tried), tried, baseline)
    for look in looks:
        configs = configurations(config, variants, look, baseline, design)
        if tried:
            configs, rates = tuned(configs, tried)
        refuse_failed(_Runs(configs, shared).train(at_once), configs, baseline)
        with hosts.signals() as signals:
            openings = open_test(run_folder(config), configs, shared.prepared, signals)
        found = collect(config, configs, baseline, design, looks)
        if design.wanted is None or len(found.decided) == len(found.rows) - 1:
            break
        log.info("after %d seeds: %d of %d differences are decided", look, len(found.decided), len(found.rows) - 1)
    log.info("%d runs in %.1f min", sum(map(len, configs.values())), (time.perf_counter() - began) / 60)
    found = dataclasses.replace(found, openings=openings, rates=rates, costs=costs(configs, found.classes))
    folder = run_folder(config)
    if hosts.leads():
        write_text(folder / "comparison.json", json.dumps(dataclasses.asdict(found), indent=2))
        write_text(folder / "comparison.md", markdown(found))
        log.info("the page: %s", write_page(folder, found))
        if config.tracking.wandb != "off":
            track(folder, found, config.tracking)
    return found


def collect(config: Config, configs: Configs, baseline: str, design: Design, looks: Sequence[int] = ()) -> Comparison:
    """The comparison of finished and tested runs, from their folders, without costs.

    Raises:
      ValueError: two runs were tested on other images.
    """
    hits, folds, classes = read_hits(configs)
    decided: dict[str, int] = {}
    if design.wanted is None:
        rows = tuple(statistics.compare(hits, baseline, folds=folds))
    else:
        progress = planning.until_shown(hits, baseline, design.wanted, looks)
        rows, decided = progress.rows, progress.shown | progress.excluded
    return Comparison(
        name=config.name,
        baseline=baseline,
        seeds=tuple(by_row(configs)[baseline]),
        n=next(iter(hits.values())).shape[1],
        about=about(configs[baseline][0], design),
        rows=rows,
        costs={},
        accuracies={row: tuple(h.mean(1).tolist()) for row, h in hits.items()},
        classes=classes,
        apart=statistics.told_apart(hits, folds) if design.wanted is None else None,
        folds=design.folds,
        wanted=design.wanted,
        decided=decided,
    )


def _announced(configs: Configs, tried: Configs, design: Design, at_once: int) -> str:
    """What is about to be done, in a line."""
    runs = next(iter(configs.values()))
    text = f"{len(configs)} variants, {len({run.seed for run in runs})} seeds"
    text += f", {design.folds} folds" if design.folds else ""
    text += f", up to {design.max_seeds} seeds until shown" if design.wanted is not None else ""
    text += f": {sum(map(len, configs.values()))} runs"
    text += f" after {sum(map(len, tried.values()))} trials of learning rates" if tried else ""
    return f"{text}; {at_once} at a time, " + ("on cached features" if runs[0].features.cached else "end to end")


class _Runs:
    """Runs by name of their group, trained by one thread or more."""

    def __init__(self, configs: Configs, shared: Shared | None = None, word: str = "run"):
        runs = [(variant, run) for variant, runs in configs.items() for run in runs]
        self._waiting = sorted(runs, key=lambda pair: pair[1].data.fold)  # a fold's maps fill the memory
        self._count, self._done, self._word = len(self._waiting), 0, word
        self._trained = 0  # of those done, the ones that had not finished in an earlier call
        self._now: dict[str, str] = {}
        self._failed: dict[str, Failure] = {}
        self._lock, self._crew, self._shared = threading.Lock(), Crew(), shared or Shared()

    def train(self, at_once: int) -> list[Failure]:
        """Trains all, so many at a time; those that failed in training. Raises what else a run raised, once others that
        were under way have ended."""
        self._began, order = time.monotonic(), [run.run_dir for _, run in self._waiting]
        if at_once > 1:
            self._waiting = _interleaved(self._waiting, at_once)  # so that they don't wait for the same to be compiled
        with saying(self._state):
            self._crew.work(self._next, at_once)
        return [self._failed[run_dir] for run_dir in order if run_dir in self._failed]

    def _state(self) -> str:
        """How far it is, for a line now and then."""
        with self._lock:
            done, trained, now = self._done, self._trained, ", ".join(self._now.values())
        left = (time.monotonic() - self._began) / trained * (self._count - done) / 60 if trained else None
        forecast = "" if left is None else f"; about {left:.0f} min to go at this pace"
        return f"{done} of {self._count} {self._word}s done, under way: {now}{forecast}" if now else ""

    def _next(self) -> bool:
        """Trains the next run; False where there is none left."""
        with self._lock:
            if not self._waiting:
                return False
            variant, run = self._waiting.pop(0)
            what = f"{variant}, seed {run.seed}" + (f", fold {run.data.fold}" if run.data.folds else "")
            what += f", rate {run.optim.lr:g}" if self._word == "trial" else ""
            self._now[run.run_dir] = what
        start, trained = time.perf_counter(), not (run_folder(run) / "results.json").is_file()
        result = attempt(what, run, functools.partial(self._train_run, run))
        self._crew.signals.check()
        took = time.perf_counter() - start
        with self._lock:
            self._done += 1
            self._trained += trained
            del self._now[run.run_dir]
            if isinstance(result, Failure):
                self._failed[run.run_dir] = result
                log.warning("%d of %d: %s failed: %s", self._done, self._count, what, result.reason)
                return True
            figure = run.train.monitor.removeprefix("-")
            text = f"{figure} {result.metrics['val'][figure]:.3f} on validation"
            log.info("%d of %d: %s: %s, %.1f s", self._done, self._count, what, text, took)
        return True

    def _train_run(self, run: Config, begun: Callback) -> Result:
        prepared = self._shared.prepared(run) if run.features.cached else None
        return train_run(run, resume=True, callbacks=[begun], prepared=prepared, signals=self._crew.signals)


def _interleaved(runs: list[tuple[str, Config]], width: int) -> list[tuple[str, Config]]:
    """The runs, fold by fold, `width` variants at a time in turns."""
    found = []
    for _, of_fold in itertools.groupby(runs, key=lambda pair: pair[1].data.fold):
        by_variant: dict[str, list[tuple[str, Config]]] = {}
        for run in of_fold:
            by_variant.setdefault(run[0], []).append(run)
        groups = list(by_variant.values())
        for i in range(0, len(groups), width):
            found += [run for turn in itertools.zip_longest(*groups[i : i + width]) for run in turn if run]
    return found


def read_hits(configs: Configs) -> tuple[dict[str, np.ndarray], np.ndarray | None, int]:
    """(of each row bool [s, n], whether each seed's runs were right about each image; int [n], the fold that tested
    it, None without folds; the number of classes).

    Raises:
      ValueError: two rows or seeds were tested on other images.
    """
    hits: dict[str, np.ndarray] = {}
    first, folds, classes = None, None, 0
    for row, of_seed in by_row(configs).items():
        found = []
        for runs in of_seed.values():
            parts = [read_predictions(run.run_dir, "test") for run in runs]
            if None in parts:
                missing = runs[parts.index(None)].run_dir
                raise ValueError(f"{missing} has no predictions of the test split; expected a finished run")
            whole = [part for part in parts if part is not None]
            ids = [name for part in whole for name in part.ids]
            first = first or ids
            if ids != first:
                raise ValueError(f"{runs[0].run_dir}: tested on other images than {next(iter(hits), row)}; expected "
                                 "the same")  # fmt: skip
            found.append(np.concatenate([part.predicted == part.labels for part in whole]))
            classes = len(whole[0].classes)
            if runs[0].data.folds:
                folds = np.repeat(np.arange(len(whole)), [len(part.ids) for part in whole])
        hits[row] = np.stack(found)
    return hits, folds, classes
