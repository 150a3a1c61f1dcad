"""The folder of a run: what is written into it, and how a trained classifier is read from it.

config.json  environment.json  code/  dataset.json  split.csv  metrics.jsonl  checkpoints/{last,best}/
predictions_<split>.npz  results.json  openings.jsonl (each opening of the test split)
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config.arguments import check_choice, check_type, check_whole
from bmjax.config.base import Config, from_json, to_json
from bmjax.data.dataset import Dataset
from bmjax.data.load import load_dataset
from bmjax.data.splits import Splits, dataset_summary, read_split, split_dataset, write_split
from bmjax.files import read_json, write_bytes, write_text
from bmjax.model.classifier import Classifier
from bmjax.model.create import create, init, resolve
from bmjax.model.parameters import Tree
from bmjax.runs.checkpoint import Checkpoints, check_place
from bmjax.runs.identity import as_recorded, check_trust, located
from bmjax.runs.lock import locked
from bmjax.runs.tracking import local_run

log = logging.getLogger(__name__)
Which = Literal["best", "last"]

# What may differ between a run and its resume: it changes where and how fast, never which numbers.
_FREE_TO_CHANGE = {"run_dir", "tracking", "train.devices", "train.workers", "train.parallel", "data.cache_dir"}
_FREE_TO_CHANGE |= {"train.mesh", "train.shard_params", "train.remat"}
_FREE_TO_CHANGE |= {"train.checkpoint_epochs", "train.checkpoint_steps", "train.checkpoint_minutes", "train.keep_last"}
_FREE_TO_CHANGE |= {"train.final_test", "train.profile", "data.root"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained classifier, read from its folder. `variables` is {"params", "batch_stats"} on the host, `which` the
    checkpoint that they are from."""

    run_dir: Path
    config: Config
    model: Classifier
    variables: dict[str, Tree]
    classes: tuple[str, ...]
    step: int
    which: Which = "best"

    def command(self, options: str) -> str:
        """The `bmjax eval` that does what options ask for, of this checkpoint."""
        return f"bmjax eval {self.run_dir} {options}" + (" --which last" if self.which == "last" else "")


def run_folder(config: Config) -> Path:
    """The folder that a configuration names."""
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


def holds_run(run_dir: Path) -> bool:
    """Whether a folder holds a run."""
    return (run_dir / "config.json").exists()


def free_name(config: Config) -> Config:
    """The configuration under a name whose folder holds no run yet: its own, or with the next free number."""
    name, number = config.name, 1
    while holds_run(run_folder(config)):
        number += 1
        config = dataclasses.replace(config, name=f"{name}-{number}")
    return config


def read_config(run_dir: Path) -> Config:
    """A run's configuration.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: config.json is damaged; names the file.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected the folder of a run that `bmjax train` made")
    try:
        return from_json(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def check_folder(run_dir: Path, config: Config, resume: bool) -> None:
    """Checks that the folder is free, or that a resume continues the same run; writes nothing.

    Raises:
      FileExistsError: the folder holds a run and `resume` is not set.
      ValueError: no checkpoint could be kept there, or the configuration to resume differs in fields that change the
        numbers.
    """
    check_place(run_dir)
    if not holds_run(run_dir):
        return
    if not resume:
        raise FileExistsError(
            f"{run_dir} holds a run already; go on with it (--resume), or give another --run_dir or --name"
        )
    old = read_config(run_dir)
    old = dataclasses.replace(old, model=resolve(old.model))  # runs of older versions left this open
    # A name may have got a number, when it was free.
    free = (*_FREE_TO_CHANGE, "name")
    changed = [d for d in differences(old, config) if not any(d == f or d.startswith(f + ".") for f in free)]
    if changed:
        raise ValueError(
            f"{run_dir / 'config.json'}: cannot resume with another configuration; fields that differ: "
            f"{', '.join(changed)}"
        )


def write_config(run_dir: Path, config: Config) -> None:
    """Makes the folder and writes config.json; that of a resumed run stays, but for where its data are now."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() != 0:
        return
    path = run_dir / "config.json"
    if not path.exists():
        write_text(path, to_json(config))
        return
    old = read_config(run_dir)
    if old.data.root != config.data.root:
        moved = dataclasses.replace(old, data=dataclasses.replace(old.data, root=config.data.root))
        write_text(path, to_json(moved))


def load_data(run_dir: Path, config: Config, dataset: Dataset | None = None) -> tuple[Dataset, Splits]:
    """The run's data, or those given, and split: the recorded one, or where none is recorded yet a new one. Writes
    nothing.

    Raises:
      ValueError: the data are not those the run began with.
    """
    dataset = dataset or load_dataset(config.data)
    # The record and not the rule: a list of duplicates or a manifest may have changed meanwhile.
    recorded = recorded_split(run_dir, dataset)
    return dataset, split_dataset(dataset, config.data) if recorded is None else recorded


def recorded_split(run_dir: Path, dataset: Dataset) -> Splits | None:
    """The split that the run's folder records; None where it records none yet.

    Raises:
      ValueError: the data are not those the run began with.
    """
    record = run_dir / "dataset.json"
    if not record.exists():
        return None
    old = _recorded(record, "fingerprint", str)
    if old != dataset.fingerprint:
        raise ValueError(
            f"{record}: the run began with data {old[:16]}; expected those, found {dataset.fingerprint[:16]}"
        )
    return read_split(run_dir / "split.csv", dataset)


def split_size(run_dir: Path, split: str) -> int:
    """Images of a split, as the run's folder records it.

    Raises:
      ValueError: the record is damaged.
    """
    path = run_dir / "dataset.json"
    counts = _recorded(path, "counts", dict).get(split)
    if not isinstance(counts, dict) or not all(isinstance(n, int) for n in counts.values()):
        raise ValueError(
            f"{path} is damaged: its counts of {split!r} are {str(counts)[:40]!r}; expected those of `bmjax train`"
        )
    return sum(counts.values())


def _classes(run_dir: Path) -> tuple[str, ...]:
    """The classes by dataset.json, in their order there, which the counts have, too."""
    path = run_dir / "dataset.json"
    found = _recorded(path, "classes", list)
    counts = _recorded(path, "counts", dict)
    for each in (found, *(list(of) for of in counts.values() if isinstance(of, dict))):
        if not found or [name for name in dict.fromkeys(found) if isinstance(name, str)] != each:
            raise ValueError(
                f"{path} is damaged: its classes are {str(found)[:60]} and those counted {str(each)[:60]}; expected "
                "the same names, each once, as `bmjax train` wrote them"
            )
    return tuple(found)


def _recorded(path: Path, name: str, kind: type) -> Any:
    """An entry of a JSON record that has to be there."""
    found = read_json(path).get(name)
    if not isinstance(found, kind):
        raise ValueError(
            f"{path} is damaged: its {name!r} is {str(found)[:40]!r}; expected it as `bmjax train` wrote it"
        )
    return found


def record_split(run_dir: Path, dataset: Dataset, splits: Splits) -> None:
    """Writes split.csv and dataset.json into the run's folder, if they are not there."""
    if jax.process_index() == 0 and not (run_dir / "dataset.json").exists():
        write_split(run_dir / "split.csv", dataset, splits)
        write_text(run_dir / "dataset.json", json.dumps(dataset_summary(dataset, splits), indent=2))


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Makes the folder this process's for as long as it is inside; the lock goes with the process, however that ends.

    Raises:
      BlockingIOError: another process holds it; names its host and process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir / "lock"))
        except BlockingIOError as e:
            raise BlockingIOError(
                f"{run_dir} is being trained by another process ({e}); expected one at a time: wait, or give "
                "another --run_dir"
            ) from e
        _remove_half_written(run_dir)
        yield


def remove_leftovers(run_dir: Path) -> None:
    """Removes what a process that was killed left in the folder, its lock too, unless another process owns it."""
    with contextlib.suppress(BlockingIOError), owned(run_dir):
        pass


def _remove_half_written(run_dir: Path) -> None:
    """Removes what killed processes of this machine left half written: `.<name>.<process>`, see `write_text`."""
    for path in run_dir.glob(".*.*"):
        pid = path.suffix[1:]
        if not pid.isdecimal():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (OSError, OverflowError):
            continue


def load_run(run_dir: str | Path, which: Which = "best", *, devices: int | None = None, trust: bool = False) -> Run:
    """Reads a classifier from a run's folder, or as `wandb:ENTITY/PROJECT/NAME` from W&B (`local_run`), for any number
    of devices: all, or `devices` of them.

    A run that uses code of its own (an attention file, say) and was trained elsewhere is read only with `trust`.

    Parts of one's own that changed since are taken from the run's copies (code/); that is said.

    Raises:
      FileNotFoundError: the folder holds no run, or no checkpoint of that kind yet.
      PermissionError: the run names code, this user did not train it, and `trust` is not set.
      TypeError, ValueError: an argument is wrong, or a file of the folder is damaged; names it.
    """
    check_type("run_dir", run_dir, (str, Path), "the path of a run's folder")
    check_choice("which", which, ("best", "last"))
    if devices is not None:
        check_whole("devices", devices, 1)
    run_dir = local_run(run_dir)
    config = read_config(run_dir)
    if not (run_dir / "dataset.json").is_file():
        raise FileNotFoundError(f"{run_dir / 'dataset.json'} is not there; expected the folder of a run")
    if not trust:
        check_trust(config, run_dir)
    config = as_recorded(located(config, run_dir), run_dir)
    # The number of devices is the training machine's, not the run's.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, devices=devices))
    classes = _classes(run_dir)
    model = create(config.model, len(classes), config.train.dtype)
    folder = run_dir / "checkpoints" / which
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; the run has no checkpoint yet")
    template = jax.eval_shape(lambda: init(model, jax.random.key(0), config.data.image_size))
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, image_dtype(config)), template)
    checkpoints, ema = Checkpoints(folder), config.train.ema_decay is not None
    step, variables = checkpoints.newest_whole(lambda step: checkpoints.restore_variables(step, template, ema))
    return Run(run_dir, config, model, variables, classes, step, which)


def record_opening(run_dir: Path, step: int) -> int:
    """Notes that the test split is opened, of a run at a step, or of a comparison for so many runs; returns how many
    times it has been, this one included."""
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
    ids = np.array([dataset.ids[i] for i in rows])
    save_arrays(run_dir, split, probs=probs, labels=dataset.labels[rows], index=rows, ids=ids, classes=dataset.classes)


def save_arrays(run_dir: Path, name: str, **arrays: Any) -> None:
    """predictions_<name>.npz of these arrays, written whole or not at all."""
    buffer = io.BytesIO()
    whole: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
    np.savez_compressed(buffer, **whole)
    write_bytes(run_dir / f"predictions_{name}.npz", buffer.getvalue())


def saved_results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """results.json by split; empty before the first evaluation.

    Raises:
      ValueError: it is damaged; names the file.
    """
    path = run_dir / "results.json"
    found = read_json(path)
    for split, metrics in found.items():
        if not isinstance(metrics, dict) or "step" not in metrics:
            raise ValueError(f"{path} is damaged at {split!r}; remove it, and `bmjax eval RUN` writes it again")
    return found


def save_results(run_dir: Path, split: str, metrics: dict[str, Any]) -> None:
    """Sets one split's metrics in results.json."""
    write_text(run_dir / "results.json", json.dumps(saved_results(run_dir) | {split: metrics}, indent=2))
