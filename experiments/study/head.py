"""The study's added head against a plain one: a network's frozen features, the same seeds, split and budget.

    python experiments/study/head.py --data FOLDER --weights FILE [--out OUT] [--seeds 5] [--smoke]

`plain` is one dense layer. `added` is batch-norm, dropout and two dense layers, of which the last gives the classes.
`added, 2 hidden` reads the abstract's two dense layers as two before the one that gives the classes. Compared on
validation, paired over images. docs/study.md has the result.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from common import DEFAULT, Settings, about, base, choices, finish, start, sweep_cells

from bmjax.analysis.study.records import Part
from bmjax.config import Config

# Order and widths are ours.
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"model.head.order": (), "model.head.widths": ()},
    "added": {"model.head.order": ("batch_norm", "dropout", "dense"), "model.head.widths": (256,)},
    "added, 2 hidden": {
        "model.head.order": ("batch_norm", "dropout", "dense", "dense"),
        "model.head.widths": (256, 64),
    },
}


def config(s: Settings = DEFAULT) -> Config:
    return base(s, "head")


def sweep(s: Settings = DEFAULT) -> Iterator[dict[str, Any]]:
    for name, fields in HEADS.items():
        for seed in range(s.seeds):
            yield fields | {"name": f"{name.replace(', ', '-').replace(' ', '_')}-{seed}", "seed": seed}


def run(s: Settings) -> Part:
    """Trains what is not trained yet, and writes the part."""
    began, plan, names = time.monotonic(), config(s), [name for name in HEADS for _ in range(s.seeds)]
    found = sweep_cells(s, plan, list(sweep(s)))
    entries = tuple(
        dataclasses.replace(entry, roles=("head",), fields=entry.fields | {"head": name})
        for name, entry in zip(names, found, strict=True)
    )
    left_open = choices(plan, {"model.head.order", "model.head.widths"})
    return finish(s, Part("head", about(plan), "", entries, left_open), began)


if __name__ == "__main__":
    start(run, __doc__)
