"""The contract of a callback: f(event) -> stop?, which sees and changes nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from bmjax.analysis.contract.verdict import Contract, Tree, leaves, say
from bmjax.training.progress import Event, variables_refused

Kind = Literal["start", "step", "epoch", "end"]
KINDS: tuple[Kind, ...] = ("start", "step", "epoch", "end")
SECONDS = 0.1
"""The most that a callback may take at a step: the device waits meanwhile."""
_FIGURES: dict[str, dict[str, Any]] = {
    "start": {},
    "step": {"loss": 1.5, "accuracy": 0.25, "grad_norm": 2.0, "lr": 1e-3, "images_per_second": 100.0},
    "epoch": {
        "epoch": 1, "train/loss": 1.5, "train/accuracy_running": 0.25, "val/loss": 1.4, "val/accuracy": 0.5,
        "val/macro_f1": 0.4, "val/balanced_accuracy": 0.45, "val/n": 20,
    },
    "end": {},
}  # fmt: skip


class Subject:
    """A callback under examination."""

    def __init__(self, part: Callable[[Event], Any]):
        self.part = part

    def variables(self) -> dict[str, Tree]:
        """What a small classifier holds."""
        kernel = np.arange(12, dtype=np.float32).reshape(4, 3)
        params = {"backbone": {"conv": {"kernel": np.ones((3, 3, 3, 4), np.float32)}}, "head": {"kernel": kernel}}
        return {"params": params, "batch_stats": {"backbone": {"norm": {"mean": np.zeros(4, np.float32)}}}}

    def event(self, kind: Kind, step: int = 3, held: Any = None) -> Event:
        """An event as training makes it."""
        given = held if held is not None else self.variables()
        return Event(kind, step, copy.deepcopy(_FIGURES[kind]), variables_refused if kind == "step" else lambda: given)


def call(s: Subject) -> str | None:
    """Called with an event of each kind: start, step, epoch, end, in a run's order."""
    run: tuple[tuple[Kind, int], ...] = (("start", 0), ("step", 1), ("step", 2), ("epoch", 2), ("end", 2))
    for kind, step in run:
        s.part(s.event(kind, step))
    return None


def answer(s: Subject) -> str | None:
    """Returns True to end training, else False or None."""
    for kind in KINDS:
        found = s.part(s.event(kind))
        if found is not None and not isinstance(found, bool):
            hint = "Only True itself ends training: write bool(...) around a comparison of arrays, or return nothing."
            return say(f"at {kind!r} it returned {found!r}", "True, False or None", hint)
    return None


def read_only(s: Subject) -> str | None:
    """Leaves figures and variables as they are, so that a resume stays exact."""
    for kind in KINDS:
        held = s.variables()
        event = s.event(kind, held=held)
        s.part(event)
        if event.figures != _FIGURES[kind]:
            return say(f"at {kind!r} it changed the figures", "figures left as they are", "Copy them: dict(...).")
        for (path, now), (_, was) in zip(leaves(held), leaves(s.variables()), strict=True):
            if not np.array_equal(now, was):
                return say(f"at {kind!r} it changed {path}", "variables left as they are", "Copy before changing.")
    return None


def quick(s: Subject) -> str | None:
    """Takes less than 0.1 s at a step, for the device waits: the median of five."""
    took = []
    for step in range(1, 6):
        event = s.event("step", step)
        began = time.perf_counter()
        s.part(event)
        took.append(time.perf_counter() - began)
    if (median := float(np.median(took))) > SECONDS:
        hint = 'Do it at an "epoch", or every so many steps: if event.kind == "step" and event.step % 100 == 0.'
        return say(f"a step's event took {median:.2f} s", f"less than {SECONDS:g} s", hint)
    return None


CONTRACT = Contract("callback", Subject, (call, answer, read_only, quick), basis=("call",))
