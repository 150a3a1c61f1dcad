"""What a report says of a run, read from its folder alone: the test split is never opened, nor any code run."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.analysis.evaluate import scores as evaluation
from bmjax.data.splits import groups_in
from bmjax.files import printable, read_json
from bmjax.runs.records import Predictions, class_rows, read_predictions, read_records, reported_split

log = logging.getLogger(__name__)
SPLITS = {"train": "training split", "val": "validation", "test": "test"}
_PURPOSE = {"train": "to train on", "val": "for validation", "test": "for the test"}
_OF_DATA = {"name": str, "n": int, "classes": list, "image_size": int, "fingerprint": str}
_OF_RESULTS = ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "balanced_accuracy", "loss", "ece")
_OF_RECORDS = {"train": ("step", "time", "images_per_second"), "epoch": ("step", "time", "epoch")}
TOO_SURE = 0.03
"""Difference of mean confidence and accuracy from which on probabilities are called too high or too low."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """A run's records; dicts and lists are empty where the folder holds no such file."""

    run_dir: Path
    config: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    openings: int
    split: str | None
    predictions: Predictions | None
    calibration: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.run_dir.name))

    @property
    def metrics(self) -> dict[str, Any]:
        """Those of the split that the report dwells on."""
        return self.results[self.split] if self.split else {}

    @functools.cached_property
    def scores(self) -> dict[str, Any]:
        """Every score of that split, as `bmjax eval` prints it: what it has written, or the same computed here."""
        predictions = self.predictions
        assert predictions is not None
        path = self.run_dir / f"evaluation_{self.split}.json"
        kept = read_json(path)
        try:
            same = kept.get("confusion") == self.metrics["confusion"]
            same = same and list(kept.get("classes", ())) == list(predictions.classes)
            if same and ("groups" in kept["scores"]["accuracy"]["by"]) == bool(self.metrics.get("intervals_groups")):
                return kept
        except (KeyError, TypeError) as e:
            raise ValueError(
                f"{path} is damaged: it has no scores as `bmjax eval` wrote them; `bmjax eval RUN --split "
                f"{self.split}` writes it again"
            ) from e
        groups = groups_in(self.run_dir / "split.csv", predictions.ids.tolist())
        return evaluation.score(predictions.labels, predictions.probs, predictions.classes, groups=groups).to_json()

    @property
    def by(self) -> str:
        """What the interval of the accuracy is by."""
        groups = self.metrics.get("intervals_groups")
        return f"a bootstrap over {groups} groups" if groups else "Wilson's"

    @functools.cached_property
    def classes(self) -> list[dict[str, Any]]:
        """A row for each class, see `class_rows`, with `scores`."""
        if self.predictions is None:
            return []
        rows = class_rows(self.metrics, self.predictions.classes)
        return [row | {"scores": self.scores["classes"][row["name"]]} for row in rows]


def read_facts(run_dir: str | Path) -> Facts:
    """Reads a run's folder, finished or not.

    Raises:
      FileNotFoundError: it holds no config.json, so it is no run.
      ValueError: a file is damaged; names it.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir / 'config.json'} is not there; expected the folder of a run")
    from bmjax.runs.folder import read_config

    read_config(run_dir)  # held to its kinds; what is told is what was written
    names = ("config", "dataset", "environment", "results", "calibration")
    config, data, environment, results, calibration = (read_json(run_dir / f"{name}.json") for name in names)
    _check_data(run_dir / "dataset.json", data)
    _check_sessions(run_dir / "environment.json", environment)
    for name in SPLITS:
        if name in results:
            _check_results(run_dir / "results.json", name, results[name])
    openings, split = run_dir / "openings.jsonl", reported_split(results)
    predictions = read_predictions(run_dir, split) if split else None
    if predictions is not None and len(predictions.labels) != results[split]["n"]:  # type: ignore[index]
        raise ValueError(
            f"{run_dir}: predictions_{split}.npz has {len(predictions.labels)} images, results.json "
            f"{results[split]['n']}; `bmjax eval RUN --split {split}` writes both again"  # type: ignore[index]
        )
    if predictions is not None and (odd := int((~np.isfinite(predictions.probs).all(1)).sum())):
        log.warning(
            "%s: %d of %d rows hold no numbers; what is told by them is left out of the report",
            run_dir / f"predictions_{split}.npz", odd, len(predictions.labels),
        )  # fmt: skip
        predictions = None
    if split and predictions is not None:
        _check_matrix(run_dir / "results.json", split, results[split], len(predictions.classes))
    return Facts(
        run_dir=run_dir,
        config=config,
        data=data,
        environment=environment,
        results=results,
        steps=_records(run_dir, "train", ("loss", "lr")),
        epochs=_records(run_dir, "epoch"),
        openings=len(openings.read_bytes().splitlines()) if openings.is_file() else 0,
        split=split,
        predictions=predictions,
        calibration=calibration,
    )


def _damaged(path: Path, what: str, found: object) -> ValueError:
    return ValueError(
        f"{path} is damaged: {what} is {printable(str(found)[:40])!r}; expected it as `bmjax train` wrote it"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_data(path: Path, data: dict[str, Any]) -> None:
    if not data:
        return
    for name, kind in _OF_DATA.items():
        if not isinstance(data.get(name), kind):
            raise _damaged(path, f"its {name!r}", data.get(name))
    if not all(isinstance(name, str) for name in data["classes"]):
        raise _damaged(path, "its 'classes'", data["classes"])
    if not isinstance(data.get("skipped", []), list):
        raise _damaged(path, "its 'skipped'", data["skipped"])
    counts = data.get("counts", {})
    if not isinstance(counts, dict):
        raise _damaged(path, "its 'counts'", counts)
    for split, of_split in counts.items():
        if not isinstance(of_split, dict) or not all(map(_is_count, of_split.values())):
            raise _damaged(path, f"its counts of {split!r}", of_split)


def _check_sessions(path: Path, environment: dict[str, Any]) -> None:
    sessions = environment.get("sessions") or []
    if not isinstance(sessions, list):
        raise _damaged(path, "its 'sessions'", sessions)
    for session in sessions:
        if not isinstance(session, dict):
            raise _damaged(path, "one of its sessions", session)
        for name, kind in (("source", dict), ("versions", dict), ("command", list), ("devices", list)):
            found = session.get(name, kind())
            if not isinstance(found, kind) and not (found is None and kind is dict):
                raise _damaged(path, f"{name!r} of one of its sessions", found)
        if not all(isinstance(device, str) for device in session.get("devices", [])):
            raise _damaged(path, "'devices' of one of its sessions", session["devices"])


def _check_results(path: Path, split: str, metrics: Any) -> None:
    """Holds the figures that a report tells of a split to their kinds."""
    if not isinstance(metrics, dict):
        raise _damaged(path, f"its entry {split!r}", metrics)
    if not _is_count(metrics.get("n")):
        raise _damaged(path, f"'n' of {split!r}", metrics.get("n"))
    bounds = (f"{name}_{end}" for name in _OF_RESULTS for end in ("low", "high") if f"{name}_low" in metrics)
    for name in (*_OF_RESULTS, *bounds):
        if not _is_number(metrics.get(name)):
            raise _damaged(path, f"{name!r} of {split!r}", metrics.get(name))


def _check_matrix(path: Path, split: str, metrics: dict[str, Any], k: int) -> None:
    """Holds the figures of each of k classes to their kinds."""
    rows, figures = metrics.get("confusion"), metrics.get("per_class")
    if not isinstance(rows, list) or len(rows) != k or not all(_is_row(row, k) for row in rows):
        raise _damaged(path, f"'confusion' of {split!r}, for {k} classes,", rows)
    if not isinstance(figures, list) or len(figures) != k or not all(map(_is_class, figures)):
        raise _damaged(path, f"'per_class' of {split!r}, for {k} classes,", figures)


def _is_row(row: object, k: int) -> bool:
    return isinstance(row, list) and len(row) == k and all(map(_is_count, row))


def _is_class(found: object) -> bool:
    return isinstance(found, dict) and all(_is_number(found.get(n)) for n in ("n", "precision", "recall", "f1"))


def _records(run_dir: Path, kind: str, or_none: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of a kind, held to what is told of them; `or_none`: what has to be there, but need be no number."""
    records = read_records(run_dir, kind)
    for i, record in enumerate(records, start=1):
        for name in (*_OF_RECORDS[kind], *or_none):
            found = record.get(name)
            if not _is_number(found) and not (name in or_none and name in record and found is None):
                path = run_dir / "metrics.jsonl"
                raise _damaged(path, f"{name!r} of the record {i} of the kind {kind!r}", found)
    return records


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def trained(facts: Facts) -> str:
    """What was trained, in a sentence."""
    model = facts.config.get("model", {})
    weights, attention = model.get("weights"), model.get("attention", "?")
    start = f"from the weights {Path(weights).name}" if weights else "from random weights"
    stages = facts.config.get("stages") or []
    frozen = bool(stages) and all("backbone" not in _parts(stage) for stage in stages)
    with_attention = "without attention" if attention == "none" else f"with {attention} attention"
    return (
        f"{model.get('backbone', '?')} {with_attention}, {start}"
        + (", the backbone frozen" if frozen else "")
        + (f", {len(facts.epochs)} epochs." if facts.epochs else ".")
    )


def _parts(stage: dict[str, Any]) -> str:
    """The parts that a stage trains, as text; all by default."""
    return str(stage.get("train", "backbone"))


def trained_on(facts: Facts) -> str:
    """On what, in a sentence."""
    data = facts.data
    if not data:
        return "What it was trained on is not recorded."
    sizes = {split: sum(counts.values()) for split, counts in data.get("counts", {}).items()}
    parts = ", ".join(f"{n} {_PURPOSE.get(split, split)}" for split, n in sizes.items())
    return (
        f"{data['n']} images of {data['name']}, in {len(data['classes'])} classes, at {data['image_size']} pixels: "
        f"{parts}."
    )


def calibration_words(facts: Facts) -> str:
    """How far the probabilities can be believed, in a sentence or two."""
    predictions, m = facts.predictions, facts.metrics
    if predictions is None:
        return ""
    confidence = float(predictions.confidence.mean())
    gap = confidence - m["accuracy"]
    word = "about as sure as it is right" if abs(gap) < TOO_SURE else "too sure" if gap > 0 else "less sure than right"
    text = (
        f"It is {word}: its mean confidence is {percent(confidence)}, and {percent(m['accuracy'])} of the answers are "
        f"right. Expected calibration error {m['ece']:.3f}."
    )
    if facts.calibration:
        text += " A calibration is kept with the run; the figures here are without it (bmjax eval --calibrated)."
    return text


def worst_class(facts: Facts) -> str:
    """The class recognised least, in a sentence."""
    present = [row for row in facts.classes if row["n"]]
    if not present:
        return ""
    worst = min(present, key=lambda row: row["recall"])
    text = (
        f"{worst['name']}: {percent(worst['recall'])} of its {worst['n']} images are recognised "
        f"({between(worst['recall_low'], worst['recall_high'])})."
    )
    if worst["confused"]:
        text += f" It is most often taken for {worst['confused'][0]} ({worst['confused'][1]})."
    return text


NOT_FOR = (
    "Not for diagnosis. It names one of its own classes for every image, whatever the image shows, and its figures "
    "hold for images made as those it was tested on were: same laboratory, stain, microscope and choice of cells."
)


def no_result(facts: Facts) -> str:
    """Why there is no figure."""
    counts = facts.data.get("counts", {})
    if "val" in counts and not sum(counts["val"].values()):
        return "Trained without a validation split: nothing is reported on the images that were trained on."
    return "This run has no results yet: it did not finish, or is still running."


def duration(facts: Facts) -> str:
    """Steps, time and speed, in a sentence."""
    steps, epochs = facts.steps, facts.epochs
    if not steps and not epochs:
        return ""
    records = sorted(steps + epochs, key=lambda r: r["time"])
    # A run that was stopped and resumed has a gap of any length, which is no work: pauses over an hour are left out.
    seconds = sum(d for d in np.diff([r["time"] for r in records]) if d < 3600)
    text = f"{(steps or epochs)[-1]['step']} steps, {len(epochs)} epochs, {seconds / 60:.1f} minutes"
    if steps:
        text += f", {np.median([r['images_per_second'] for r in steps]):.1f} images/s (median)"
    waits = [r["input_wait"] for r in epochs if "input_wait" in r]
    if waits:
        text += f", {100 * np.median(waits):.1f} % of an epoch's time spent waiting for images (median)"
    text += "."
    if facts.config.get("train", {}).get("label_smoothing"):
        text += " The training loss is that of smoothed labels, the validation loss is not."
    return text


def environment_rows(facts: Facts) -> list[tuple[str, str]]:
    """What ran where, of the last session."""
    sessions = facts.environment.get("sessions") or []
    if not sessions:
        return []
    last = sessions[-1]
    source = last.get("source") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (last.get("versions") or {}).items() if version)
    rows = [
        ("time", last.get("time", "")),
        ("command", " ".join(["bmjax", *map(str, last.get("command", [])[1:])])),
        ("Python", f"{last.get('python', '')} on {last.get('system', '')}"),
        ("versions", versions),
        ("commit", f"{source.get('commit', '')}{', with changes' if source.get('dirty') else ''}"),
        ("devices", ", ".join(last.get("devices", []))),
        ("flags", json.dumps(last.get("flags", {}))),
        ("sessions", str(len(sessions))),
    ]
    return [(name, str(value)) for name, value in rows if value not in ("", "{}")]
