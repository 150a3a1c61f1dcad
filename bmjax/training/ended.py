"""Whether a run's training has ended, and what it reports then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmjax.config.base import Config
from bmjax.data.splits import Splits
from bmjax.runs.checkpoint import Checkpoints, Damaged
from bmjax.runs.folder import saved_results
from bmjax.runs.records import read_records
from bmjax.runs.state import Progress
from bmjax.training.loop import Engine
from bmjax.training.predict import SplitName


def wanted(config: Config, splits: Splits) -> tuple[SplitName, ...]:
    """The splits to report on. Training images beside others only: alone they would pass for a result."""
    measured: tuple[SplitName, ...] = ("train", "val") if len(splits.val) else ()
    return (*measured, "test") if config.train.final_test else measured


def ended_at(run_dir: Path, engine: Engine) -> tuple[int, int] | None:
    """(the steps, the best one) of a run whose training has ended; None of any other, whatever `bmjax eval` has
    reported of it meanwhile."""
    newest = Checkpoints(run_dir / "checkpoints/last")
    step = newest.latest()
    if step is not None:
        try:
            at = Progress(**newest.meta(step))
        except (Damaged, TypeError):  # training reads the one before it, and says so
            return None
        done = at.stopped_early or at.epochs_evaluated * engine.per_epoch >= engine.plans[-1].end
        return (step, at.best_step) if done else None
    # One without a last checkpoint (train.keep_last) has ended where its best one was reported on.
    best = {m["step"] for m in saved_results(run_dir).values() if m.get("checkpoint") == "best"}
    there = best & set(Checkpoints(run_dir / "checkpoints/best").steps())
    if not there:
        return None
    steps = [record["step"] for record in read_records(run_dir, "epoch")]
    return max([*steps, *there]), max(there)


def reported(config: Config, run_dir: Path, splits: Splits) -> dict[str, dict[str, Any]] | None:
    """The results of a run whose training has ended, where none that is wanted is missing; else None."""
    found, names = saved_results(run_dir), wanted(config, splits)
    best = {split: found[split] for split in names if found.get(split, {}).get("checkpoint") == "best"}
    whole = len(best) == len(names) and len({m["step"] for m in best.values()}) == 1
    return best if whole and (run_dir / "checkpoints" / "best").is_dir() else None
