"""What a resume needs: the arrays in one pytree, and the loop's progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bmjax.layers.initial import evaluated
from bmjax.model.parameters import Path, Tree, split_params


class TrainState(flax.struct.PyTreeNode):
    """State between two updates; `step` counts completed updates.

    `key` holds the raw data of the run's PRNG key and never changes: every draw folds the step into it. `ema` is
    {"params", "batch_stats"} or None. `opt_state` covers the trainable parameters of the current stage only.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    ema: Tree
    key: jax.Array

    def variables(self) -> dict[str, Tree]:
        """What evaluation uses: the moving average where there is one."""
        return self.ema if self.ema is not None else {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    variables: dict[str, Tree],
    tx: optax.GradientTransformation,
    is_trainable: Callable[[Path], bool],
    *,
    seed: int,
    ema: bool,
) -> TrainState:
    """State at step 0. `variables` is {"params", "batch_stats"}."""
    both = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=both["params"],
        batch_stats=both["batch_stats"],
        opt_state=evaluated(tx.init, split_params(both["params"], is_trainable)[0]),
        ema=jax.tree.map(jnp.copy, both) if ema else None,
        key=jax.random.key_data(jax.random.key(seed)),
    )


@dataclasses.dataclass
class Progress:
    """What a resume needs beside the arrays; the `meta` item of a checkpoint."""

    run_id: str
    stage: int = 0
    epochs_evaluated: int = 0
    best: float | None = None
    best_step: int = 0
    epochs_since_best: int = 0
    stopped_early: bool = False
    # Running sums of the epoch under way.
    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0
