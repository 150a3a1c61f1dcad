"""What a report says of a run, read from its folder alone: the test split is never opened, nor any code run."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.analysis.evaluate import scores as evaluation
from bmjax.data.splits import groups_in
from bmjax.files import read_json
from bmjax.runs.records import Predictions, class_rows, read_predictions, read_records, reported_split

log = logging.getLogger(__name__)
SPLITS = {"train": "training split", "val": "validation", "test": "test"}
_PURPOSE = {"train": "to train on", "val": "for validation", "test": "for the test"}
_OF_DATA = {"name": str, "n": int, "classes": list, "image_size": int, "fingerprint": str}
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
        kept = read_json(self.run_dir / f"evaluation_{self.split}.json")
        same = kept.get("confusion") == self.metrics["confusion"]
        same = same and list(kept.get("classes", ())) == list(predictions.classes)
        if same and ("groups" in kept["scores"]["accuracy"]["by"]) == bool(self.metrics.get("intervals_groups")):
            return kept
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
    names = ("config", "dataset", "environment", "results", "calibration")
    config, data, environment, results, calibration = (read_json(run_dir / f"{name}.json") for name in names)
    for name, kind in _OF_DATA.items() if data else ():
        if not isinstance(data.get(name), kind):
            raise ValueError(
                f"{run_dir / 'dataset.json'} is damaged: its {name!r} is {str(data.get(name))[:40]!r}; expected it as "
                "`bmjax train` wrote it"
            )
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
    return Facts(
        run_dir=run_dir,
        config=config,
        data=data,
        environment=environment,
        results=results,
        steps=read_records(run_dir, "train"),
        epochs=read_records(run_dir, "epoch"),
        openings=len(openings.read_bytes().splitlines()) if openings.is_file() else 0,
        split=split,
        predictions=predictions,
        calibration=calibration,
    )


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
