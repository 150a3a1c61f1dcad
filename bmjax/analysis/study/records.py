"""What a part of the study leaves beside its runs, part.json, and what a run's own folder says of it.

A study's folder holds one folder for each part; `experiments/study/` writes them. The figures stand in the runs'
folders alone; part.json says which runs there are, what was varied, and what the published abstract left open.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.files import read_json, write_text
from bmjax.runs.records import read_predictions, read_records

PARTS = ("backbones", "head", "optimizers", "attention", "best", "protocol")
PUBLISHED = {"train": 0.9997, "test": 0.9701}
"""Accuracy in the study's abstract, as fractions; it gives neither n nor an interval."""
_LONGEST_PAUSE = 3600.0  # seconds between two records of a run beyond which it was stopped, not at work


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a part: its folder relative to the study's, the fields that were varied, the roles it has in the
    tables, and facts that its folder does not hold (parameters, bytes of memory)."""

    run: str
    fields: dict[str, Any]
    roles: tuple[str, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the study; `open_choices` are (field, value, comment) of what the abstract leaves open, `seconds` the
    wall time of the calls that ran to their end, `device` where they ran."""

    name: str
    about: str
    command: str
    entries: tuple[Entry, ...]
    open_choices: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    device: str = ""

    def of(self, role: str) -> list[Entry]:
        """The finished runs that have a role."""
        return [entry for entry in self.entries if role in entry.roles and not entry.error]


def write_part(study: Path, part: Part) -> Path:
    """Writes part.json, whole or not at all."""
    path = study / part.name / "part.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dataclasses.asdict(part), indent=1))
    return path


def read_part(study: Path, name: str) -> Part | None:
    """A part as it was written; None where it has not run to its end.

    Raises:
      ValueError: part.json is damaged; names the file.
    """
    path = study / name / "part.json"
    found = read_json(path)
    if not found:
        return None
    try:
        entries = tuple(Entry(**entry | {"roles": tuple(entry["roles"])}) for entry in found.pop("entries"))
        choices = tuple((field, value, why) for field, value, why in found.pop("open_choices"))
        return Part(**found | {"entries": entries, "open_choices": choices, "notes": tuple(found["notes"])})
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged: {e!r}; run this part of the study again to write it") from e


def read_study(study: str | Path) -> dict[str, Part]:
    """The parts that a study's folder holds, by name, in order.

    Raises:
      FileNotFoundError: there is none.
      ValueError: as `read_part`.
    """
    found = {name: part for name in PARTS if (part := read_part(Path(study), name)) is not None}
    if not found:
        raise FileNotFoundError(
            f"{study} holds no part of a study; expected the folder that experiments/study/run.py was given as --out"
        )
    return found


def results_of(run: Path) -> dict[str, dict[str, Any]]:
    """A finished run's metrics by split.

    Raises:
      FileNotFoundError: it has none.
    """
    found = read_json(run / "results.json")
    if not found:
        raise FileNotFoundError(f"{run / 'results.json'} is not there; expected a finished run")
    return found


def running_accuracy(run: Path) -> float:
    """Accuracy on the training images over the best epoch, with dropout and augmentation, as a progress bar does."""
    step = results_of(run)["val"]["step"]
    epochs = read_records(run, "epoch")
    return next(float(r["train/accuracy_running"]) for r in epochs if r["step"] == step)


def seconds_of(run: Path) -> float:
    """Seconds from a run's first record to its last, without pauses beyond an hour."""
    times = sorted(r["time"] for kind in ("train", "epoch") for r in read_records(run, kind))
    return float(sum(d for d in np.diff(times) if d < _LONGEST_PAUSE))


def speed_of(run: Path) -> float:
    """Images/s in training, the median over steps."""
    return float(np.median([r["images_per_second"] for r in read_records(run, "train")]))


def hits_of(runs: Sequence[Path], split: str) -> np.ndarray:
    """Whether each run was right about each image of a split, bool [s, n].

    Raises:
      ValueError: a run has no predictions of the split, or the runs were evaluated on other images.
    """
    rows, first = [], None
    for run in runs:
        predictions = read_predictions(run, split)
        if predictions is None:
            raise ValueError(f"{run} has no predictions of the {split} split; expected a finished run")
        first = first or predictions
        if list(predictions.ids) != list(first.ids):
            raise ValueError(f"{run}: evaluated on other images than {runs[0]}; expected the same")
        rows.append(predictions.predicted == predictions.labels)
    return np.stack(rows)
