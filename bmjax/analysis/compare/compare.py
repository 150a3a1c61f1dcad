"""Trains attention variants on equal terms, paired over seeds, and sets them side by side.

runs/<name>/<variant>/seed<k> is the run of each; runs/<name>/comparison.json and comparison.md hold the table. Called
again it goes on where it was: finished runs stay as they are, the others are trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.analysis.compare import planning, statistics
from bmjax.config.base import Config
from bmjax.files import read_json, write_text
from bmjax.model.classifier import at_last
from bmjax.model.create import create, resolve
from bmjax.model.parameters import count_parameters, part_of, split_params
from bmjax.runs.folder import run_folder
from bmjax.runs.records import read_predictions, read_records
from bmjax.training import hosts
from bmjax.training.run import Prepared, Result, prepare, train_run
from bmjax.training.signals import GRACE_SECONDS, exit_now

log = logging.getLogger(__name__)
_NOTE = """Accuracy is the mean over seeds, of each run's best epoch on validation. Images and runs are both taken as
samples: another test set and another training would have given other figures. Intervals of differences hold together
for all variants at 95 %, and a difference counts as shown exactly where its interval leaves out zero: of tables of
equal variants at most one in twenty claims any difference. The corrected p says the same. The smallest difference is
the true one that so many seeds and images show four times in five. The intervals of accuracies are each one's own.
Images are taken as independent: where several come from one slide, the intervals are too narrow. Parameters are those
of the attention, FLOPs those of the forward pass beyond the backbone, images/s those of one run in training, others
beside it where several train at once. Each run opened the test split once: a variant chosen by this table needs other
data for its final figure. The method: docs/statistics.md."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a variant costs: its parameters, FLOPs of an image's forward pass beyond the backbone, and images/s in
    training, the median over steps."""

    parameters: int
    flops: float
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The table: a row of statistics and the cost of each variant, accuracies [variant][seed], and what it is about."""

    name: str
    baseline: str
    seeds: tuple[int, ...]
    n: int
    about: str
    rows: tuple[statistics.Row, ...]
    costs: dict[str, Cost]
    accuracies: dict[str, tuple[float, ...]]


def configurations(config: Config, variants: Sequence[str], seeds: int) -> dict[str, list[Config]]:
    """The runs of each variant, alike in all but attention and seed: the same split, schedule and budget.

    Options of attention are those of the experiment for the experiment's own variant, and the defaults for the others.

    Raises:
      ValueError: a variant is given twice or unknown, or there is no seed.
    """
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; expected at least 1")
    folders = [v.replace("/", "_").replace(":", "_") for v in variants]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--variants is {' '.join(variants)}; expected each once")
    base = run_folder(config)
    tracking = dataclasses.replace(config.tracking, group=config.tracking.group or config.name)
    train = dataclasses.replace(config.train, final_test=True)
    configs: dict[str, list[Config]] = {}
    for variant, folder in zip(variants, folders, strict=True):
        options = config.model.attention_options if variant == config.model.attention else {}
        model = resolve(dataclasses.replace(config.model, attention=variant, attention_options=options))
        create(model, 2, config.train.dtype)  # an unknown name fails here, before anything is trained
        configs[variant] = [
            dataclasses.replace(
                config,
                name=f"{config.name}-{folder}-{seed}",
                seed=seed,
                run_dir=str(base / folder / f"seed{seed}"),
                model=model,
                tracking=tracking,
                train=train,
            )
            for seed in range(config.seed, config.seed + seeds)
        ]
    return configs


def compare(
    config: Config, variants: Sequence[str], seeds: int = 5, baseline: str = "none", at_once: int | None = None
) -> Comparison:
    """Trains what is not trained yet and compares on the test split.

    On cached features where `features.cached` is set, and then `at_once` runs at a time: by default one a device, on
    CPUs two, since one leaves cores idle while it evaluates and writes. The baseline is trained too where `variants`
    lack it.

    Raises:
      Interrupted: a signal stopped it; called again, it goes on.
      ValueError: as `configurations`; `at_once` is not positive, or more than one end to end; or a run's folder holds
        one of another configuration.
    """
    variants = list(variants) if baseline in variants else [baseline, *variants]
    configs = configurations(config, variants, seeds)
    cached = config.features.cached
    if at_once is None:
        cpus = jax.default_backend() == "cpu"
        at_once = (min(2, os.cpu_count() or 1) if cpus else jax.local_device_count()) if cached else 1
    if at_once < 1 or (at_once > 1 and not cached):
        expected = "at least 1" if cached else "1 end to end, where a run has all devices"
        raise ValueError(f"--at-once is {at_once}; expected {expected}")
    began = time.perf_counter()
    _Runs(configs).train(at_once)
    log.info("%d runs in %.1f min", sum(map(len, configs.values())), (time.perf_counter() - began) / 60)
    found = collect(config, configs, baseline)
    folder = run_folder(config)
    if hosts.leads():
        write_text(folder / "comparison.json", json.dumps(dataclasses.asdict(found), indent=2))
        write_text(folder / "comparison.md", markdown(found))
    return found


class _Runs:
    """The runs of a comparison and what they share, trained by one thread or more."""

    def __init__(self, configs: dict[str, list[Config]]):
        self._waiting = [(variant, run) for variant, runs in configs.items() for run in runs]
        self._count, self._done = len(self._waiting), 0
        self._shared: Prepared | None = None
        self._prepared: dict[str, Prepared] = {}
        self._lock, self._signals = threading.Lock(), hosts.signals()
        self._failure: BaseException | None = None

    def train(self, at_once: int) -> None:
        """Trains all, so many at a time. Raises what a run raised, once others that were under way have ended."""
        self._began = time.monotonic()
        if at_once == 1:
            with self._signals:
                while self._next() is not None:
                    pass
            return
        self._waiting = _interleaved(self._waiting, at_once)  # so that they don't wait for the same to be compiled
        with self._signals, self._signals.gently():
            threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(at_once)]
            for thread in threads:
                thread.start()
            asked = None
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.1) if threads[0].is_alive() else time.sleep(0.1)  # signals are handled between two
                if self._signals.stop is not None:
                    asked = asked or time.monotonic()
                    if time.monotonic() - asked > GRACE_SECONDS:
                        exit_now(self._signals.stop)
        if self._failure is not None:
            raise self._failure
        self._signals.check()

    def _work(self, i: int) -> None:
        devices = jax.local_devices()
        on_one = jax.default_device(devices[i % len(devices)]) if len(devices) > 1 else contextlib.nullcontext()
        try:
            with on_one:
                while self._signals.stop is None and self._failure is None and self._next():
                    pass
        except BaseException as e:
            self._failure = self._failure or e

    def _next(self) -> Result | None:
        """Trains the next run; None where there is none left."""
        with self._lock:
            if not self._waiting:
                return None
            variant, run = self._waiting.pop(0)
        start = time.perf_counter()
        prepared = self._prepare(variant, run) if run.features.cached else None
        result = train_run(run, resume=True, prepared=prepared, signals=self._signals)
        self._signals.check()
        if not result.interrupted:
            accuracy, took = result.metrics["test"]["accuracy"], time.perf_counter() - start
            with self._lock:
                self._done += 1
                log.info(
                    "%d of %d: %s, seed %d: %.3f on test, %.1f s",
                    self._done,
                    self._count,
                    variant,
                    run.seed,
                    accuracy,
                    took,
                )
        return result

    def _prepare(self, variant: str, run: Config) -> Prepared:
        if run.model.weights is None:  # random backbones are the seed's own; pretrained ones are one
            return prepare(run)
        with self._lock:
            if variant not in self._prepared:
                self._prepared[variant] = self._shared = prepare(run, shared=self._shared)
            return self._prepared[variant]


def _interleaved(runs: list[tuple[str, Config]], width: int) -> list[tuple[str, Config]]:
    """The runs, `width` variants at a time in turns."""
    variants = list(dict.fromkeys(variant for variant, _ in runs))
    groups = [variants[i : i + width] for i in range(0, len(variants), width)]
    of_group = [[[run for run in runs if run[0] == variant] for variant in group] for group in groups]
    return [run for group in of_group for turn in itertools.zip_longest(*group) for run in turn if run]


def collect(config: Config, configs: dict[str, list[Config]], baseline: str) -> Comparison:
    """The comparison of finished runs, from their folders.

    Raises:
      ValueError: two runs were tested on other images.
    """
    hits: dict[str, np.ndarray] = {}
    first = None
    for variant, runs in configs.items():
        rows = []
        for run in runs:
            predictions = read_predictions(run.run_dir, "test")
            if predictions is None:
                raise ValueError(f"{run.run_dir} has no predictions of the test split; expected a finished run")
            first = first or predictions
            if list(predictions.ids) != list(first.ids):
                raise ValueError(f"{run.run_dir}: tested on other images than {next(iter(configs))}; expected the same")
            rows.append(predictions.predicted == predictions.labels)
        hits[variant] = np.stack(rows)
    assert first is not None  # the baseline is there
    seeds = tuple(run.seed for run in configs[baseline])
    return Comparison(
        name=config.name,
        baseline=baseline,
        seeds=seeds,
        n=len(first.labels),
        about=_about(configs[baseline][0]),
        rows=tuple(statistics.compare(hits, baseline)),
        costs=_costs(configs, len(first.classes)),
        accuracies={variant: tuple(h.mean(1).tolist()) for variant, h in hits.items()},
    )


def _about(config: Config) -> str:
    data = read_json(Path(config.run_dir) / "dataset.json")
    weights = f"weights {Path(config.model.weights).name}" if config.model.weights else "random weights"
    text = (
        f"{data['name']}, {data['n']} images at {config.data.image_size} pixels; {config.model.backbone}, {weights}, "
    )
    if config.features.cached:
        views = config.features.views
        seen = f"{views} augmented views of each training image" if views else "the images as they are"
        text += f"frozen, on cached features of {seen}; "
    else:
        text += "end to end; "
    epochs = " + ".join(str(stage.epochs) for stage in config.stages)
    return text + f"{epochs} epochs of {config.optim.name}, batch {config.train.batch_size}"


def _costs(configs: dict[str, list[Config]], classes: int) -> dict[str, Cost]:
    found = {}
    shape: Any = None
    for variant, runs in configs.items():
        config, size = runs[0], runs[0].data.image_size
        model = create(config.model, classes, config.train.dtype)
        image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        if at_last(model):
            shape = shape or _map_shape(model, image)
            parameters, flops = _forward(model, shape, start="feature_map")
        else:
            plain = create(dataclasses.replace(config.model, attention="none", attention_options={}), classes)
            parameters, flops = _forward(model, image)
            flops -= _forward(plain, image, output="feature_map")[1]
        speeds = [r["images_per_second"] for run in runs for r in read_records(run.run_dir, "train")]
        found[variant] = Cost(parameters, flops, float(np.median(speeds)))
    return found


def _map_shape(model: Any, image: jax.ShapeDtypeStruct) -> Any:
    def feature_map(x: jax.Array) -> Any:
        return model.init_with_output(jax.random.key(0), x, output="feature_map")[0]

    return jax.eval_shape(feature_map, image)


def _forward(model: Any, x: jax.ShapeDtypeStruct, **options: Any) -> tuple[int, float]:
    """(parameters of attention, FLOPs of the forward pass as XLA counts them before it optimises)."""
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **options), x)
    cost = jax.jit(lambda v, x: model.apply(v, x, **options)).lower(variables, x).cost_analysis()
    own, _ = split_params(variables["params"], lambda path: part_of(path) == "attention")
    return count_parameters(own), float(cost["flops"]) if cost else float("nan")


def _against(row: statistics.Row, seeds: int, n: int) -> list[str]:
    """The cells of a row that set it against the baseline."""
    if row.difference is None:
        return [""] * 4
    text = f"{100 * row.difference:+.1f}"
    if row.difference_low is None or row.difference_high is None or row.spread is None:
        return [text, "", "", ""]
    bounds = f"{100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f}"
    smallest = f"{100 * planning.detectable(row.spread, seeds, n):.1f}"
    return [f"{text} ({bounds})", f"{row.p:.3g}", f"{row.p_corrected:.3g}", smallest]


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: the table, what it is about, and a verdict on each variant."""
    c, many = comparison, len(comparison.seeds)
    seeds = f"{many} seed{'s' * (many > 1)} ({', '.join(map(str, c.seeds))})"
    header = (
        "variant",
        "accuracy, % (95 % interval)",
        f"difference to {c.baseline}, points (95 % interval for all at once)",
        "p, alone",
        "p, corrected",
        "smallest difference shown, points",
        "parameters",
        "MFLOP an image",
        "images/s",
    )
    lines = [f"## {c.name}: attention variants on equal terms", "", f"{c.about}. Test: {c.n} images, {seeds}.", ""]
    lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in c.rows:
        cost = c.costs[row.variant]
        cells = [
            row.variant,
            f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})",
            *_against(row, many, c.n),
            f"{cost.parameters:,}",
            f"{cost.flops / 1e6:.2f}",
            f"{cost.images_per_second:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {statistics.verdict(r, c.baseline, c.n, many)}" for r in c.rows if r.variant != c.baseline)]
    lines += ["", _NOTE, ""]
    return "\n".join(lines)
