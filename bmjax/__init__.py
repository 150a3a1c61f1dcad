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
    from bmjax.data import load_dataset, split_dataset
    from bmjax.heads import train
    from bmjax.loop import evaluate, load_run, predict_probs
    from bmjax.model import Classifier, create, init

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "Classifier": "model",
    "create": "model",
    "init": "model",
    "create_attention": "attention",
    "list_attention": "attention",
    "create_backbone": "backbones",
    "list_backbones": "backbones",
    "load_dataset": "data",
    "split_dataset": "data",
    "train": "heads",
    "evaluate": "loop",
    "load_run": "loop",
    "predict_probs": "loop",
}

__all__ = [
    "Classifier",
    "Config",
    "create",
    "create_attention",
    "create_backbone",
    "evaluate",
    "init",
    "list_attention",
    "list_backbones",
    "load_dataset",
    "load_run",
    "predict_probs",
    "split_dataset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bmjax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bmjax' has no attribute {name!r}")
