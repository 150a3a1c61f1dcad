"""Attention-based transfer learning for bone-marrow cell images, in JAX.

The names below are the public API; they load when first used, so that `import bmjax` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bmjax import environment

environment.apply()

if TYPE_CHECKING:
    from bmjax.attention import create_attention, list_attention
    from bmjax.backbones import create_backbone, list_backbones
    from bmjax.config import Config
    from bmjax.data import Dataset, Listing, load_dataset, split_dataset
    from bmjax.model import Classifier, create, init
    from bmjax.runs import TrainState, create_state, load_run
    from bmjax.training import evaluate, make_train_step, predict_probs, train

__version__ = "0.1.0"

_HOMES = {
    "attention": ("create_attention", "list_attention"),
    "backbones": ("create_backbone", "list_backbones"),
    "config": ("Config",),
    "data": ("Dataset", "Listing", "load_dataset", "split_dataset"),
    "model": ("Classifier", "create", "init"),
    "runs": ("TrainState", "create_state", "load_run"),
    "training": ("evaluate", "make_train_step", "predict_probs", "train"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Classifier", "Config", "Dataset", "Listing", "TrainState", "create", "create_attention", "create_backbone",
    "create_state", "evaluate", "init", "list_attention", "list_backbones", "load_dataset", "load_run",
    "make_train_step", "predict_probs", "split_dataset", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bmjax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bmjax' has no attribute {name!r}")
