"""No attention against attention: a network's frozen feature maps, the same seeds, split and budget.

    python experiments/study/attention.py --data FOLDER --weights FILE [--out OUT] [--seeds 5] [--smoke]

The abstract does not name the attention's kind: four stand for it. The verdict is that of `bmjax compare`'s statistics
over images and runs, on validation, so that the test split stays shut until the model is chosen. docs/study.md has the
result.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from common import DEFAULT, Settings, about, base, choices, finish, start, sweep_cells

from bmjax.analysis.study.records import Part
from bmjax.config import Config

VARIANTS = ("none", "soft", "se", "cbam", "scse")  # Ours, the first is what the others are held against.


def config(s: Settings = DEFAULT) -> Config:
    return base(s, "attention")


def sweep(s: Settings = DEFAULT) -> Iterator[dict[str, Any]]:
    for variant in VARIANTS[: 2 if s.smoke else None]:
        for seed in range(s.seeds):
            yield {"model.attention": variant, "seed": seed}


def run(s: Settings) -> Part:
    """Trains what is not trained yet, and writes the part."""
    began, plan = time.monotonic(), config(s)
    entries = [dataclasses.replace(entry, roles=("attention",)) for entry in sweep_cells(s, plan, list(sweep(s)))]
    return finish(s, Part("attention", about(plan), "", tuple(entries), choices(plan, {"model.attention"})), began)


if __name__ == "__main__":
    start(run, __doc__)
