"""Training: one public entry, and what a loop of one's own is made of. The names load when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmjax.training.optim import make_optimizer
    from bmjax.training.parallel import Parallel
    from bmjax.training.predict import evaluate, predict_probs
    from bmjax.training.progress import Event
    from bmjax.training.run import Result, train
    from bmjax.training.steps import make_eval_step, make_train_step

__all__ = [
    "Event", "Parallel", "Result", "evaluate", "make_eval_step", "make_optimizer", "make_train_step",
    "predict_probs", "train",
]  # fmt: skip
_HOMES = {
    "optim": ("make_optimizer",),
    "parallel": ("Parallel",),
    "predict": ("evaluate", "predict_probs"),
    "progress": ("Event",),
    "run": ("Result", "train"),
    "steps": ("make_eval_step", "make_train_step"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bmjax.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bmjax.training' has no attribute {name!r}")
