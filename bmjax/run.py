"""The folder of a run: what is written into it, and how a trained classifier is read from it.

config.json  dataset.json  split.csv  metrics.jsonl  checkpoints/{last,best}/  predictions_<split>.npz
results.json  openings.jsonl (each opening of the test split)
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.checkpoint import Checkpoints
from bmjax.config import Config, from_json, to_json
from bmjax.data import Dataset, Splits, dataset_summary, load_dataset, read_split, split_dataset, write_split
from bmjax.files import write_text
from bmjax.model import Classifier, create, init, resolve
from bmjax.state import Tree

Which = Literal["best", "last"]

# What may differ between a run and its resume: it changes where and how fast, never which numbers.
_FREE_TO_CHANGE = {"run_dir", "tracking", "train.devices", "train.workers", "train.parallel", "data.cache_dir"}
_FREE_TO_CHANGE |= {"train.checkpoint_epochs", "train.checkpoint_steps", "train.final_test", "data.root"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained classifier, read from its folder. `variables` is {"params", "batch_stats"} on the host."""

    run_dir: Path
    config: Config
    model: Classifier
    variables: dict[str, Tree]
    classes: tuple[str, ...]
    step: int


def run_folder(config: Config) -> Path:
    return Path(config.run_dir or f"runs/{config.name}")


def image_dtype(config: Config) -> Any:
    """Parameters and images are float32 (float64 in a float64 run), whatever the network computes in."""
    return jnp.float64 if config.train.dtype == "float64" else jnp.float32


def new_variables(config: Config, model: Classifier, *, pretrained: bool = True) -> dict[str, Tree]:
    """Fresh variables: random from the run's seed, with the backbone's weights as configured if `pretrained`."""
    settings = config.model if pretrained else None
    variables = init(model, jax.random.key(config.seed), config.data.image_size, settings)
    return jax.tree.map(lambda x: jnp.asarray(x, image_dtype(config)), variables)


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two configurations differ."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        names = [f.name for f in dataclasses.fields(a)]
        return [d for n in names for d in differences(getattr(a, n), getattr(b, n), f"{prefix}.{n}" if prefix else n)]
    return [] if a == b else [prefix]


def open_run(run_dir: Path, config: Config, resume: bool) -> None:
    """Makes the folder and writes config.json, or checks that a resume continues the same run.

    Raises:
      FileExistsError: the folder holds a run and `resume` is not set.
      ValueError: the configuration to resume differs in fields that change the numbers.
    """
    path = run_dir / "config.json"
    if path.exists():
        if not resume:
            raise FileExistsError(f"{run_dir} holds a run already; resume it (--resume) or choose another run_dir")
        free = tuple(_FREE_TO_CHANGE)
        old = from_json(path.read_text())
        old = dataclasses.replace(old, model=resolve(old.model))  # runs of older versions left this open
        changed = [d for d in differences(old, config) if not any(d == f or d.startswith(f + ".") for f in free)]
        if changed:
            raise ValueError(
                f"{path}: cannot resume with another configuration; fields that differ: {', '.join(changed)}"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0 and not path.exists():
        write_text(path, to_json(config))


def load_data(run_dir: Path, config: Config) -> tuple[Dataset, Splits]:
    """The run's data and split; recorded in the folder the first time, taken from the record afterwards.

    Raises:
      ValueError: the data are not those the run began with.
    """
    dataset = load_dataset(config.data)
    # The record and not the rule: a list of duplicates or a manifest may have changed meanwhile.
    if (recorded := recorded_split(run_dir, dataset)) is not None:
        return dataset, recorded
    splits = split_dataset(dataset, config.data)
    record_split(run_dir, dataset, splits)
    return dataset, splits


def recorded_split(run_dir: Path, dataset: Dataset) -> Splits | None:
    """The split that the run's folder records; None where it records none yet.

    Raises:
      ValueError: the data are not those the run began with.
    """
    record = run_dir / "dataset.json"
    if not record.exists():
        return None
    old = json.loads(record.read_text())["fingerprint"]
    if old != dataset.fingerprint:
        raise ValueError(
            f"{record}: the run began with data {old[:16]}; expected those, found {dataset.fingerprint[:16]}"
        )
    return read_split(run_dir / "split.csv", dataset)


def record_split(run_dir: Path, dataset: Dataset, splits: Splits) -> None:
    """Writes split.csv and dataset.json into the run's folder."""
    if jax.process_index() == 0:
        write_split(run_dir / "split.csv", dataset, splits)
        write_text(run_dir / "dataset.json", json.dumps(dataset_summary(dataset, splits), indent=2))


def load_run(run_dir: str | Path, which: Which = "best") -> Run:
    """Reads a classifier from a run's folder.

    Raises:
      FileNotFoundError: the folder holds no run, or no checkpoint of that kind yet.
    """
    run_dir = Path(run_dir)
    for name in ("config.json", "dataset.json"):
        if not (run_dir / name).is_file():
            raise FileNotFoundError(
                f"{run_dir / name} is not there; expected the folder of a run that `bmjax train` made"
            )
    config = from_json((run_dir / "config.json").read_text())
    classes = tuple(json.loads((run_dir / "dataset.json").read_text())["classes"])
    model = create(config.model, len(classes), config.train.dtype)
    folder = run_dir / "checkpoints" / which
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; the run has no checkpoint yet")
    checkpoints = Checkpoints(folder)
    step = checkpoints.latest()
    if step is None:
        raise FileNotFoundError(f"{folder} holds no finished checkpoint yet")
    template = jax.eval_shape(lambda: init(model, jax.random.key(0), config.data.image_size))
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, image_dtype(config)), template)
    variables = checkpoints.restore_variables(step, template, ema=config.train.ema_decay is not None)
    checkpoints.close()
    return Run(run_dir, config, model, variables, classes, step)


def record_opening(run_dir: Path, step: int) -> int:
    """Notes that the test split is opened; returns how many times it has been, this one included."""
    path = run_dir / "openings.jsonl"
    entry = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
    }
    with path.open("a") as f:
        f.write(json.dumps(entry) + "\n")
    return len(path.read_text().splitlines())


def save_predictions(run_dir: Path, split: str, dataset: Dataset, probs: np.ndarray, rows: np.ndarray) -> None:
    """predictions_<split>.npz: probs float32 [n, k], labels [n], index [n], ids [n], classes [k]."""
    np.savez_compressed(
        run_dir / f"predictions_{split}.npz",
        probs=probs,
        labels=dataset.labels[rows],
        index=rows,
        ids=np.array([dataset.ids[i] for i in rows]),
        classes=np.array(dataset.classes),
    )


def saved_results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """results.json by split; empty before the first evaluation."""
    path = run_dir / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save_results(run_dir: Path, split: str, metrics: dict[str, Any]) -> None:
    """Sets one split's metrics in results.json."""
    write_text(run_dir / "results.json", json.dumps(saved_results(run_dir) | {split: metrics}, indent=2))
