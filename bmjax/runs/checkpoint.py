"""Checkpoints, each proven when it is read: a thin class over Orbax. The only file that imports orbax.

A checkpoint has three items: `model` (params, batch_stats, ema), `train` (step, opt_state, key) and `meta` (JSON: what
the run says of it, the sha256 of every array, and a sha256 of the two). Arrays are saved from host memory, so a
checkpoint does not know on how many devices it was made. Those of versions before the digests are read unproven.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from bmjax.environment import check_utf8
from bmjax.runs.state import TrainState

log = logging.getLogger(__name__)
Tree = Any
Digests = dict[str, str]
T = TypeVar("T")
# Orbax numbers a process's saves by one count: of two at the same time one takes the other's for its own.
_SAVING = threading.Lock()
_PROVEN = {"meta", "digests", "sum"}
_SPARE = 1 << 20
"""Bytes that a checkpoint may take beside its arrays."""
_PATTERN = "*?["


class Damaged(ValueError):
    """A checkpoint that can't be read, or does not hold what was saved."""


def check_place(run_dir: Path) -> None:
    """Refuses a folder for a run in which no checkpoint could be kept; writes nothing.

    Raises:
      ValueError: its path is not UTF-8, or has a character that Orbax takes for a pattern.
    """
    path = run_dir.resolve()
    check_utf8("run_dir", path)
    # Orbax 0.12 looks by a glob of the whole path for what it has just written: by [ it finds nothing, and then no
    # checkpoint can be read; by * and ? it may find, and take, what another run is writing.
    if found := next((c for c in str(path) if c in _PATTERN), None):
        raise ValueError(
            f"run_dir is '{path}', which has a {found!r}: no checkpoint could be kept there; expected a path without "
            f"{' '.join(_PATTERN)} in any of its folders: give another --run_dir, or rename the folder"
        )


class Checkpoints:
    """Checkpoints of one kind in one folder, written in the background; the newest `keep` stay.

    Reading alone changes nothing in the folder. The first save makes it this process's: what killed processes left half
    written is removed. With `one_at_a_time` a save returns when it is on disk, so that several threads may save, each
    to its folder.

    Raises:
      ValueError: the folder's path is not UTF-8.
    """

    def __init__(self, folder: Path, keep: int = 2, *, one_at_a_time: bool = False):
        self.folder, self._keep, self._one_at_a_time = Path(folder).resolve(), keep, one_at_a_time
        self._opened: ocp.CheckpointManager | None = None
        self._saved: set[int] = set()
        self._failed = False
        check_utf8("the folder of checkpoints", self.folder)

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                create=True,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # a damaged step must not keep others from being written
            )
            self._opened = ocp.CheckpointManager(self.folder, options=options, item_names=("model", "train", "meta"))
        return self._opened

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves a host copy of the state (numpy leaves). A step that is there already, and whole, is left as it is: the
        same run at the same step has the same state.

        Raises:
          OSError: the disk is full, or can't be written; checkpoints before, if any, are whole. An error in the
            background is raised by the next call.
        """
        with _SAVING if self._one_at_a_time else contextlib.nullcontext():
            self._save(state, meta)
            if self._one_at_a_time:
                self.wait()

    def _save(self, state: TrainState, meta: dict[str, Any]) -> None:
        step = int(state.step)
        if step in self._saved:
            return
        items = {"model": _model_item(state), "train": _train_item(state)}
        with self._writing(step):
            there = self.steps()
            if step in there and self._is_whole(step, state):
                self._saved.add(step)
                return
            # Later ones are from before a kill, after a checkpoint that the run has gone on from.
            for other in [other for other in there if other >= step]:
                if other == step:
                    self.set_aside(other)
                elif jax.process_index() == 0:
                    shutil.rmtree(self.folder / str(other))
                self._manager.reload()
            need = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) + _SPARE
            self._check_space(step, need)
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    meta=ocp.args.JsonSave(_proven({"meta": meta, "digests": _digests(items)})),
                ),
            )
            if not saved:
                raise OSError(f"{self.folder}: Orbax did not save step {step}")
            self._saved.add(step)

    def _check_space(self, step: int, need: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < need:
            raise OSError(
                errno.ENOSPC,
                f"the checkpoint of step {step} needs {need / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; "
                f"{self._left()}. Free some space and go on with --resume",
                str(self.folder),
            )

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        """Turns what Orbax raises over a disk, at once or for the save before, into an OSError of one line."""
        try:
            yield
        except Exception as e:
            self._failed = True
            if isinstance(e, OSError) and e.filename is not None:
                raise
            full = "No space left" in str(e) or "RESOURCE_EXHAUSTED" in str(e) or getattr(e, "errno", 0) == errno.ENOSPC
            what = "a checkpoint" if step is None else f"a checkpoint, at step {step} or before,"
            why = "the disk is full" if full else (str(e).splitlines() or [type(e).__name__])[0]
            number = errno.ENOSPC if full else errno.EIO
            said = f"{what} could not be written: {why}; {self._left()}. Go on with --resume"
            raise OSError(number, said, str(self.folder)) from e

    def _left(self) -> str:
        return "those before it are whole" if self._listed() else "there is none before it"

    def _is_whole(self, step: int, like: TrainState) -> bool:
        try:
            self.restore(step, like)
        except ValueError:
            return False
        return True

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way, into the folder `<name>-damaged` beside this; process 0 does."""
        if jax.process_index() != 0:
            return
        aside = self.folder.with_name(f"{self.folder.name}-damaged")
        aside.mkdir(exist_ok=True)
        number, target = 1, aside / str(step)
        while target.exists():
            number += 1
            target = aside / f"{step}-{number}"
        os.rename(self.folder / str(step), target)

    def steps(self) -> list[int]:
        """The steps there are, the newest first; Orbax gives a folder its number when the checkpoint is complete."""
        self.wait()
        return self._listed()

    def _listed(self) -> list[int]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((int(path.name) for path in found if path.name.isdecimal()), reverse=True)

    def latest(self) -> int | None:
        """The newest step whose checkpoint is complete, or None."""
        return next(iter(self.steps()), None)

    def newest_whole(
        self, read: Callable[[int], T], *, at_most: int | None = None, repair: bool = False
    ) -> tuple[int, T]:
        """(step, what `read` gives of it) of the newest checkpoint that is whole, of step `at_most` or before; says
        which are damaged, and with `repair` sets them aside.

        Raises:
          Damaged: none is whole; names the newest and the remedy.
          FileNotFoundError: there is none.
        """
        damaged: list[tuple[int, Damaged]] = []
        for step in (step for step in self.steps() if at_most is None or step <= at_most):
            try:
                found = read(step)
            except Damaged as e:
                damaged.append((step, e))
                continue
            for number, why in damaged:
                log.warning("%s; the checkpoint before it, of step %d, is used", why, step)
                if repair:
                    self.set_aside(number)
            return step, found
        if not damaged:
            raise FileNotFoundError(f"{self.folder} holds no finished checkpoint yet")
        raise Damaged(
            f"{damaged[0][1]}; no checkpoint in {self.folder} is whole. Put one back from a copy, or remove the folder "
            "of the run and train it again"
        )

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved with the arrays.

        Raises:
          Damaged: it is not what was saved.
        """
        return self._meta(step)[0]

    def _meta(self, step: int) -> tuple[dict[str, Any], Digests | None]:
        with self._reading(step):
            found = _reader().restore(self.folder / str(step), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            found = found["meta"]
            if not isinstance(found, dict):
                raise ValueError(f"its meta is {str(found)[:40]!r}")
            if not _PROVEN & found.keys():
                return found, None
            expected = _proven({name: found.get(name) for name in ("meta", "digests")})["sum"]
            if found.keys() != _PROVEN or found["sum"] != expected:
                raise ValueError("its meta is not what was saved")
            return found["meta"], found["digests"]

    def restore(self, step: int, template: TrainState) -> TrainState:
        """The state of a step, numpy leaves; `template` gives structure, shapes and dtypes.

        Raises:
          Damaged: a file is damaged or missing; names the checkpoint, and the array where it is another.
          ValueError: the checkpoint does not have the template's structure; names the leaf.
        """
        items = self._read(step, {"model": _model_item(template), "train": _train_item(template)})
        return TrainState(**({"ema": None} | items["model"] | items["train"]))

    def restore_variables(self, step: int, template: dict[str, Tree], ema: bool) -> dict[str, Tree]:
        """{"params", "batch_stats"} for evaluation, the moving average where the run kept one; raises as `restore`."""
        both = {"params": template["params"], "batch_stats": template["batch_stats"]}
        model = self._read(step, {"model": both | ({"ema": both} if ema else {})})["model"]
        return model["ema"] if ema else model

    def raw(self, step: int) -> dict[str, np.ndarray]:
        """Every array of a checkpoint, by its path, read without a template; raises as `restore`."""
        items = self._read(step, {"model": None, "train": None})
        leaves = jax.tree_util.tree_leaves_with_path(items)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def _read(self, step: int, templates: dict[str, Tree]) -> dict[str, Tree]:
        """Items of a checkpoint, held to their digests where it has any."""
        _, digests = self._meta(step)
        for name, template in templates.items():
            if digests is not None and template is not None:
                self._check_structure(step, name, template, digests)
        with self._reading(step):
            wanted = {name: _restored(template) for name, template in templates.items()}
            found = _reader().restore(self.folder / str(step), args=ocp.args.Composite(**wanted))
            items = {name: found[name] for name in templates}
            expected = digests and {k: v for k, v in digests.items() if k.split("/")[0] in templates}
            if expected is not None and (now := _digests(items)) != expected:
                wrong = sorted(path for path in expected.keys() | now.keys() if expected.get(path) != now.get(path))
                raise ValueError(f"array {wrong[0]} is not what was saved ({len(wrong)} of {len(expected)} differ)")
        return items

    def _check_structure(self, step: int, name: str, template: Tree, digests: Digests) -> None:
        wanted = {path: _kind(leaf) for path, leaf in _leaves({name: template})}
        there = {path: kind.rpartition(" ")[0] for path, kind in digests.items() if path.split("/")[0] == name}
        for path in sorted(wanted.keys() | there.keys()):
            if wanted.get(path) != there.get(path):
                found = f"array {path} is {there.get(path, 'not there')}"
                raise ValueError(f"{self.folder / str(step)}: {found}; expected {wanted.get(path, 'none of the name')}")

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns whatever a library raises over a damaged checkpoint into one error that names it."""
        path = self.folder / str(step)
        try:
            yield
        except (PermissionError, MemoryError):
            raise
        # Over damaged files Orbax and TensorStore raise nearly anything.
        except Exception as e:
            _hush()
            text = " ".join((str(e) or type(e).__name__).split())
            raise Damaged(f"{path} is damaged: {text[:300]}") from e

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises as `save`."""
        if self._opened is not None:
            with self._writing(None):
                self._opened.wait_until_finished()

    def close(self) -> None:
        """As `wait`; an error that was raised before is not raised again."""
        if self._opened is None:
            return
        with contextlib.suppress(Exception) if self._failed else self._writing(None):
            self._opened.close()


@functools.cache
def _hush() -> None:
    """After a failed read each other array of it would print a traceback of its own, from threads and when it is freed;
    what is wrong has been said by then."""
    before = sys.unraisablehook

    def hook(what: Any) -> None:
        if not (what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"):
            before(what)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())


@functools.cache
def _reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _model_item(state: TrainState) -> dict[str, Tree]:
    item = {"params": state.params, "batch_stats": state.batch_stats}
    return item | ({"ema": state.ema} if state.ema is not None else {})


def _train_item(state: TrainState) -> dict[str, Tree]:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _restored(template: Tree) -> Any:
    # numpy in the template: orbax then restores into host memory, whatever devices there are.
    arrays = None if template is None else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    return ocp.args.StandardRestore(arrays)


def _leaves(tree: Tree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)} {list(leaf.shape)}"


def _digests(items: dict[str, Tree]) -> Digests:
    """Path -> type, shape and sha256 of every array."""
    found = {}
    for path, leaf in _leaves(items):
        array = np.asarray(leaf)
        bytes_of = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        found[path] = f"{_kind(array)} {hashlib.sha256(bytes_of.data).hexdigest()}"
    return found


def _proven(found: dict[str, Any]) -> dict[str, Any]:
    """With a sha256 of itself."""
    return found | {"sum": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()}
