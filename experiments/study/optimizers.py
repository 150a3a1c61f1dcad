"""The study's five optimizers times four batch sizes, at Keras's default rates and at rates tuned on validation.

    python experiments/study/optimizers.py --data FOLDER --weights FILE [--out OUT] [--at-once K] [--smoke]

A table at default rates compares rates: Keras's AdaDelta moves weights hundreds of times less than the others. So each
optimizer and batch size also tries the same five rates, an equal budget, with a seed of its own; the one that does best
on validation and Keras's default are then run with other seeds, and those runs make the tables. A head is trained on a
network's frozen features. docs/study.md has the result. `bmjax sweep experiments/study/optimizers.py --data.root
FOLDER` runs the twenty cells at default rates.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

from common import BATCHES, DEFAULT, OPTIMIZERS, Settings, about, base, choices, finish, start, sweep_cells

from bmjax.analysis.study.records import Entry, Part, results_of
from bmjax.analysis.study.tables import grouped
from bmjax.config import Config
from bmjax.training.optim import PRESETS

RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # Ours. They hold every optimizer's default.
TUNING_SEED = 0
CELL = ("optim.name", "train.batch_size")


def config(s: Settings = DEFAULT) -> Config:
    return base(s, "optimizers")


def sweep(s: Settings = DEFAULT) -> Iterator[dict[str, Any]]:
    """The grid at Keras's default rates, one seed."""
    for name, batch in itertools.product(OPTIMIZERS, batches(s)):
        yield {"optim.name": name, "train.batch_size": batch, "optim.lr": default_rate(name)}


def batches(s: Settings) -> tuple[int, ...]:
    return BATCHES[::2] if s.smoke else BATCHES


def rates(s: Settings) -> tuple[float, ...]:
    return RATES[1:3] if s.smoke else RATES


def default_rate(optimizer: str) -> float:
    return PRESETS[optimizer]["keras"]["lr"]


def trials(s: Settings) -> list[dict[str, Any]]:
    """Every cell at every rate."""
    return [
        {"optim.name": name, "train.batch_size": batch, "optim.lr": rate, "seed": TUNING_SEED}
        for name, batch, rate in itertools.product(OPTIMIZERS, batches(s), rates(s))
    ]


def reported(s: Settings, tuned: dict[tuple, float]) -> dict[tuple, tuple[dict[str, Any], list[str]]]:
    """What is run for the tables, with the roles it has: a default rate may be the tuned one."""
    found: dict[tuple, tuple[dict[str, Any], list[str]]] = {}
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + (1 if s.smoke else 3))
    for name, batch, seed in itertools.product(OPTIMIZERS, batches(s), seeds):
        for role, rate in (("default", default_rate(name)), ("tuned", tuned.get((name, batch)))):
            if rate is not None:
                fields = {"optim.name": name, "train.batch_size": batch, "optim.lr": rate, "seed": seed}
                found.setdefault(tuple(fields.values()), (fields, []))[1].append(role)
    return found


def best_rates(s: Settings, tried: list[Entry]) -> dict[tuple, float]:
    """The rate of each optimizer and batch size with the highest validation accuracy, of equals that of the least
    loss. Runs that failed, as a rate that is too high may, are passed over."""

    def figure(entry: Entry) -> tuple[float, float]:
        val = results_of(s.out / entry.run)["val"]
        return val["accuracy"], -val["loss"]

    groups = grouped([entry for entry in tried if not entry.error], CELL)
    return {key: max(entries, key=figure).fields["optim.lr"] for key, entries in groups.items()}


def run(s: Settings) -> Part:
    """Trains what is not trained yet, and writes the part."""
    began, plan = time.monotonic(), config(s)
    under = {kind: dataclasses.replace(plan, run_dir=f"{plan.run_dir}/{kind}") for kind in ("trials", "reported")}
    tried = [dataclasses.replace(entry, roles=("trial",)) for entry in sweep_cells(s, under["trials"], trials(s))]
    chosen = list(reported(s, best_rates(s, tried)).values())
    found = sweep_cells(s, under["reported"], [fields for fields, _ in chosen])
    entries = [dataclasses.replace(entry, roles=tuple(r)) for entry, (_, r) in zip(found, chosen, strict=True)]
    tried_rates = ", ".join(f"{rate:g}" for rate in rates(s))
    notes = (
        f"Tuned: of the rates {tried_rates} the best on validation in one run, of seed {TUNING_SEED}, which is not in "
        "the table. The images are those that chose it, so tuned figures are a little too good.",
    )
    left_open = choices(plan, {"optim.name", "optim.lr", "train.batch_size"})
    return finish(s, Part("optimizers", about(plan), "", (*tried, *entries), left_open, notes), began)


if __name__ == "__main__":
    start(run, __doc__)
