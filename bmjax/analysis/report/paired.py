"""Several runs beside each other: what differs between them, and their paired differences on the same images."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bmjax.analysis.compare import statistics
from bmjax.analysis.report.facts import Facts
from bmjax.runs.records import REPORTED, Predictions, read_predictions

# What says where and how fast a run was trained, not what.
_ASIDE = ("seed", "name", "run_dir", "tracking", "train.devices", "train.workers", "train.parallel", "data.cache_dir")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One run or variant beside the first: `alone` counts images that only it, and only the first, was right about.

    `low` and `high` bound the difference: over images alone for two trained networks, over images and runs where there
    are enough seeds for a `verdict`.
    """

    name: str
    accuracy: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    alone: tuple[int, int] | None = None
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Paired:
    """Runs or variants on the n images of one split; `why_not` says what stands against a comparison."""

    split: str = ""
    n: int = 0
    seeds: int = 1
    pairs: tuple[Pair, ...] = ()
    why_not: str = ""


def fields_that_differ(runs: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """(dotted name, each run's value) of the configuration's fields in which the runs differ."""
    flat = [_flat(facts.config) for facts in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    found = [(name, [json.dumps(one.get(name)) for one in flat]) for name in names]
    return [(name, values) for name, values in found if len(set(values)) > 1 and name not in ("name", "run_dir")]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, one in tree.items() for k, v in _flat(one, f"{prefix}.{name}" if prefix else name).items()}


def image_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two networks' accuracy, hits bool [n] each on the same images.

    Wald's with half an image added to each cell of the two by two table (Agresti and Min 2005,
    https://doi.org/10.1002/sim.1781). It speaks of these two trained networks, not of how they were trained.
    """
    n = len(first) + 2
    only_first, only_second = int((first & ~second).sum()) + 0.5, int((second & ~first).sum()) + 0.5
    difference = (only_second - only_first) / n
    half = 1.959964 * math.sqrt(only_first + only_second - n * difference**2) / n
    return max(-1.0, difference - half), min(1.0, difference + half)


def paired(runs: Sequence[Facts]) -> Paired:
    """The first run is what the others are held to; with the same three seeds or more of each variant, variants are.

    Reads predictions only: of test where all runs were evaluated on it, else of validation.
    """
    split = next((s for s in REPORTED if all(s in facts.results for facts in runs)), None)
    read = [read_predictions(facts.run_dir, split) if split else None for facts in runs]
    found = [predictions for predictions in read if predictions is not None]
    if split is None or len(found) < len(runs):
        return Paired(
            why_not="The runs were not all evaluated on validation, or all on test, so nothing can be paired."
        )
    if any(p.ids.tolist() != found[0].ids.tolist() or p.classes != found[0].classes for p in found[1:]):
        return Paired(split, why_not="The runs were evaluated on other images, so nothing can be paired.")
    variants = _variants(runs, found)
    if variants is not None:
        return _of_variants(variants, split)
    hits = [predictions.predicted == predictions.labels for predictions in found]
    pairs = [Pair(runs[0].name, float(hits[0].mean()))]
    for facts, own in zip(runs[1:], hits[1:], strict=True):
        low, high = image_interval(hits[0], own)
        alone = (int((own & ~hits[0]).sum()), int((hits[0] & ~own).sum()))
        difference = float(own.mean() - hits[0].mean())
        pairs.append(Pair(facts.name, float(own.mean()), difference, low, high, alone))
    return Paired(split, len(hits[0]), 1, tuple(pairs))


def _variants(runs: Sequence[Facts], found: Sequence[Predictions]) -> dict[str, np.ndarray] | None:
    """Hits bool [s, n] by variant, the name of its first run, where each has the same seeds, enough for a verdict."""
    groups: dict[str, dict[int, np.ndarray]] = {}
    names: dict[str, str] = {}
    for facts, predictions in zip(runs, found, strict=True):
        flat = {k: v for k, v in _flat(facts.config).items() if k.split(".")[0] not in _ASIDE and k not in _ASIDE}
        key = json.dumps(flat, sort_keys=True)
        names.setdefault(key, facts.name)
        of_seed = groups.setdefault(key, {})
        if facts.config.get("seed") in of_seed:
            return None
        of_seed[facts.config.get("seed", 0)] = predictions.predicted == predictions.labels
    seeds = [sorted(of_seed) for of_seed in groups.values()]
    if len(groups) < 2 or len(seeds[0]) < statistics.FEWEST_SEEDS or any(s != seeds[0] for s in seeds):
        return None
    labels = {key: name if list(names.values()).count(name) == 1 else f"{name} ({i})"
              for i, (key, name) in enumerate(names.items(), 1)}  # fmt: skip
    return {labels[key]: np.stack([of_seed[s] for s in seeds[0]]) for key, of_seed in groups.items()}


def _of_variants(hits: dict[str, np.ndarray], split: str) -> Paired:
    baseline = next(iter(hits))
    s, n = hits[baseline].shape
    pairs = []
    for row in statistics.compare(hits, baseline):
        text = "" if row.variant == baseline else statistics.verdict(row, baseline, n, s)
        pairs.append(
            Pair(row.variant, row.accuracy, row.difference, row.difference_low, row.difference_high, verdict=text)
        )
    return Paired(split, n, s, tuple(pairs))
