"""Checkpoints: a thin class over Orbax's CheckpointManager. The only file that imports orbax.

A checkpoint has three items: `model` (params, batch_stats, ema), `train` (step, opt_state, key) and `meta` (JSON).
Arrays are saved from host memory, so a checkpoint does not know on how many devices it was made.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bmjax.runs.state import TrainState

Tree = Any
# Orbax numbers a process's saves by one count: of two at the same time one takes the other's for its own.
_SAVING = threading.Lock()


class Checkpoints:
    """Checkpoints of one kind in one folder, written in the background; the newest `keep` stay.

    With `one_at_a_time` a save returns when it is on disk, so that several threads may save, each to its folder.
    """

    def __init__(self, folder: Path, keep: int = 2, *, one_at_a_time: bool = False):
        self.folder, self._one_at_a_time = Path(folder).resolve(), one_at_a_time
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("model", "train", "meta"))

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves a host copy of the state (numpy leaves). A step that is there already is left as it is: the same
        run at the same step has the same state."""
        with _SAVING if self._one_at_a_time else contextlib.nullcontext():
            self._save(state, meta)
            if self._one_at_a_time:
                self._manager.wait_until_finished()

    def _save(self, state: TrainState, meta: dict[str, Any]) -> None:
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(_model_item(state)),
                train=ocp.args.StandardSave(_train_item(state)),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        if not saved:
            raise RuntimeError(f"{self.folder}: checkpoint of step {step} was not saved")

    def latest(self) -> int | None:
        """The newest step whose checkpoint is complete, or None."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, template: TrainState) -> TrainState:
        """The state of a step, numpy leaves; `template` gives structure, shapes and dtypes.

        Raises:
          ValueError: the checkpoint does not have the template's structure (from orbax, naming the leaf).
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(_abstract(_model_item(template))),
                train=ocp.args.StandardRestore(_abstract(_train_item(template))),
            ),
        )
        return TrainState(**({"ema": None} | restored["model"] | restored["train"]))

    def restore_variables(self, step: int, template: dict[str, Tree], ema: bool) -> dict[str, Tree]:
        """{"params", "batch_stats"} for evaluation, the moving average where the run kept one."""
        both = {"params": template["params"], "batch_stats": template["batch_stats"]}
        item = both | ({"ema": both} if ema else {})
        args = ocp.args.Composite(model=ocp.args.StandardRestore(_abstract(item)))
        model = self._manager.restore(step, args=args)["model"]
        return model["ema"] if ema else model

    def raw(self, step: int) -> dict[str, np.ndarray]:
        """Every array of a checkpoint, by its path, read without a template."""
        args = ocp.args.Composite(model=ocp.args.StandardRestore(), train=ocp.args.StandardRestore())
        items = self._manager.restore(step, args=args)
        leaves = jax.tree_util.tree_leaves_with_path({"model": items["model"], "train": items["train"]})
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _model_item(state: TrainState) -> dict[str, Tree]:
    item = {"params": state.params, "batch_stats": state.batch_stats}
    return item | ({"ema": state.ema} if state.ema is not None else {})


def _train_item(state: TrainState) -> dict[str, Tree]:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _abstract(tree: Tree) -> Tree:
    # numpy in the template: orbax then restores into host memory, whatever devices there are.
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
