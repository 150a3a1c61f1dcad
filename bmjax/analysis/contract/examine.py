"""Every kind of part: which contract it must honour, how it is loaded by name, and which kind a part is of."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax

from bmjax.analysis.contract import (
    attention,
    augmentation,
    backbone,
    callback,
    head,
    loss,
    metric,
    optimizer,
    source,
)
from bmjax.analysis.contract.verdict import Contract, Verdict
from bmjax.attention import create_attention, list_attention
from bmjax.backbones import create_backbone, is_module_class, list_backbones
from bmjax.config import DataConfig, HeadConfig, OptimConfig, TrainConfig
from bmjax.config.data import SOURCES
from bmjax.config.training import LOSSES, OPTIMIZERS
from bmjax.data.load import list_source
from bmjax.model.create import create_head
from bmjax.registry import is_own, load_own, unknown
from bmjax.training import optim
from bmjax.training.losses import make_loss

CONTRACTS: dict[str, Contract] = {
    m.CONTRACT.kind: m.CONTRACT
    for m in (attention, loss, metric, optimizer, backbone, head, augmentation, source, callback)
}
# The name of a function's first parameter tells its kind.
_FIRST = {
    "counts": "loss", "labels": "metric", "learning_rate": "optimizer", "image": "augmentation", "root": "source",
    "event": "callback",
}  # fmt: skip
_MODULES = ("attention", "backbone", "head")


def examine(kind: str, part: Any) -> list[Verdict]:
    """Every check of a kind's contract on a part: the function, or what makes the Flax module (of num_classes for a
    head).

    Raises:
      ValueError: there is no such kind.
    """
    if kind not in CONTRACTS:
        raise unknown("kind of part", kind, CONTRACTS)
    return list(CONTRACTS[kind].verdicts(part))


def verdicts(kind: str, name: str, options: dict[str, Any] | None = None, root: str = "") -> Iterator[Verdict]:
    """As `examine`, of the part of that name, each verdict as it is reached.

    `options` are the part's; `root` is a source's: where its images are, by default a small folder made for it.

    Raises:
      ValueError, FileNotFoundError: there is no such part, or its file has an error.
    """
    if kind not in CONTRACTS:
        raise unknown("kind of part", kind, CONTRACTS)
    if kind == "source" and not root:
        with tempfile.TemporaryDirectory() as folder:
            make_cells(Path(folder))
            yield from CONTRACTS[kind].verdicts(_load(kind, name, options or {}, folder))
        return
    yield from CONTRACTS[kind].verdicts(_load(kind, name, options or {}, root))


def kind_of(name: str) -> str:
    """The kind of the part of that name: by where it is built in, else by what the object looks like.

    Raises:
      ValueError: it could be of several kinds, or its file has an error.
    """
    if name.startswith("optax:"):
        return "optimizer"
    if not is_own(name) or "+" in name:
        known = {"backbone": list_backbones(), "optimizer": OPTIMIZERS, "loss": LOSSES, "source": SOURCES}
        if name in list_attention():
            return "attention"
        return next((kind for kind, names in known.items() if name in names), "attention")
    value = load_own("part", name, lambda v: is_module_class(v) or inspect.isroutine(v), "Flax module or function")
    if is_module_class(value):
        fields = getattr(value, "__dataclass_fields__", {})
        kind = "backbone" if hasattr(value, "stages") or "stages" in fields else "attention"
        return "head" if "num_classes" in fields else kind
    first = next(iter(inspect.signature(value).parameters), "")
    if first not in _FIRST:
        raise ValueError(f"{name} begins with the parameter {first!r}, which tells no kind; expected --kind KIND")
    return _FIRST[first]


def make_cells(folder: Path) -> None:
    """Writes four images a class into folders `a` and `b`: what a source is tried on."""
    from PIL import Image

    r = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir()
        for i in range(4):
            Image.fromarray(r.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / name / f"{name}{i}.png")


def _load(kind: str, name: str, options: dict[str, Any], root: str) -> Any:
    if kind in _MODULES:
        return _maker(kind, name, options)
    if kind == "source":
        config = DataConfig(source=name, root=root)
        return functools.partial(list_source, config)
    part = _function(kind, name)
    return functools.partial(part, **options) if options else part


def _function(kind: str, name: str) -> Callable[..., Any]:
    if kind == "loss" and name in LOSSES:
        return functools.partial(make_loss, TrainConfig(loss=name))
    if kind == "optimizer" and name in OPTIMIZERS:
        return lambda learning_rate: _built_in(name, learning_rate)
    if not is_own(name):
        known = {"loss": LOSSES, "optimizer": OPTIMIZERS}.get(kind, ())
        raise unknown(kind, name, [*known, "module:name", "path.py"])
    return load_own(kind, name, callable, "function")


def _built_in(name: str, lr: float) -> optax.GradientTransformation:
    return optim.make_optimizer(OptimConfig(name=name, lr=lr), total_steps=1000, steps_per_epoch=100).tx


def _maker(kind: str, name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """What makes a module. One of the user's own is the class itself, so that its contract says what it lacks."""
    if kind == "attention":
        make = functools.partial(create_attention, name, **options)
        try:
            make()
        except (ValueError, OSError):  # there is no such variant
            raise
        except Exception:  # the contract says what is wrong with it
            pass
        return make
    if kind == "head":
        if not is_own(name):
            return functools.partial(create_head, HeadConfig(name=name))
    elif not is_own(name):
        create_backbone(name, **options)
        return functools.partial(create_backbone, name, **options)
    cls = load_own(kind, name, is_module_class, "Flax module")
    return functools.partial(cls, **options) if options else cls
