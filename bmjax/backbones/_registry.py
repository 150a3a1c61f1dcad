"""Finds backbones by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from bmjax import registry
from bmjax.config.arguments import check_type
from bmjax.config.checks_options import AT_LEAST_0, RATE, SHARE, SOME_AT_LEAST_1, Bound, held_options

# Field of a family -> its bound, where that is not the usual one of `held_options`.
_PADDING = Bound(lambda value: value in ("SAME", 1), "'SAME' or 1", alone=True)
_BOUNDS = {
    "blocks": SOME_AT_LEAST_1,
    "drop_connect": RATE,
    "dropout": RATE,
    "entry": SOME_AT_LEAST_1,
    "middle": AT_LEAST_0,
    "momentum": RATE,
    "padding": _PADDING,
    "pool_padding": _PADDING,
    "reduction": SHARE,
    "rows": SOME_AT_LEAST_1,
}
KEYWORDS = ("train", "mode", "tap")
"""What a backbone's `__call__` is given beside the images."""


def _families() -> dict[str, ModuleType]:
    return {name: module for module in registry.modules("bmjax.backbones").values() for name in module.VARIANTS}


def list_backbones() -> list[str]:
    """Names that `create_backbone` knows, sorted."""
    return sorted(_families())


def family_of(name: str) -> ModuleType:
    """The module of bmjax/backbones that a backbone is of.

    Raises:
      ValueError: the name is not known.
    """
    families = _families()
    if name not in families:
        raise registry.unknown("backbone", name, families)
    return families[name]


def create_backbone(name: str, /, **options: Any) -> nn.Module:
    """A backbone by name; options are fields of its module. One of the user's own is `module:Net` or `path.py`.

    Options are held to the fields' types, those of a backbone here also to their bounds.

    Raises:
      TypeError: the name is no text, or a field of a module of the user's has neither a default nor a value.
      ValueError: the name is not known, or stands for no Flax module with `stages`; an option is not known, or its
        value is not one of its field.
      FileNotFoundError: there is no such `.py` file.
    """
    check_type("name", name, str, "text: a backbone's name, 'path.py' or 'module:Net'")
    part = f"backbone {name!r}"
    if not registry.is_own(name):
        make = family_of(name).VARIANTS[name]
        return make(**held_options(part, type(make()), options, _BOUNDS))
    made_by = registry.load_own("backbone", name, is_module_class, "a Flax module")
    fields = {field.name for field in dataclasses.fields(made_by)}
    # A compute type is passed on to those that have the field.
    given = {key: value for key, value in options.items() if key != "dtype" or key in fields}
    backbone = made_by(**held_options(part, made_by, given))
    if fault := fault_of(backbone):
        raise ValueError(f"{part} {fault}")
    return backbone


def fault_of(backbone: nn.Module) -> str | None:
    """What keeps a Flax module from being a backbone, as far as it shows before it runs; None where nothing does."""
    stages = getattr(backbone, "stages", None)
    if not isinstance(stages, (tuple, list)) or not stages or not all(isinstance(s, str) for s in stages):
        return f"has stages {stages!r}; expected a tuple of names, first to last"
    if len(set(stages)) < len(stages):
        return f"has stages {stages!r}; expected names that differ"
    if missing := registry.missing_keywords(type(backbone).__call__, KEYWORDS):
        return (
            f"takes no {', '.join(missing)} in __call__; expected __call__(self, x, *, train=False, mode='train', "
            "tap=None): `train` switches dropout, `mode` is that of its batch-norms (a net without any may ignore it), "
            "tap(stage, x) is called after each stage and its result goes on"
        )
    return None


def is_module_class(value: object) -> bool:
    """Whether an object is a class of Flax modules."""
    return inspect.isclass(value) and issubclass(value, nn.Module)


def default_preprocess(name: str) -> str:
    """The mode of bmjax.weights.preprocess of a backbone without weights; `raw` for one of the user's own."""
    return "raw" if registry.is_own(name) else family_of(name).PREPROCESS


@functools.lru_cache(maxsize=8)
def stage_of_parameters(backbone: nn.Module, size: int = 128) -> dict[tuple[str, ...], str]:
    """Path of a parameter -> its stage: the first that is reached after it is made; of a top's, the last stage.

    `size` is that of the square images that it is traced on.
    """
    stages: dict[tuple[str, ...], str] = {}

    def trace() -> None:
        def run(module: Any, x: jax.Array) -> None:
            def enter(stage: str) -> None:
                paths = traverse_util.flatten_dict(dict(module.variables.get("params", {})))
                stages.update(dict.fromkeys(paths.keys() - stages.keys(), stage))

            def tap(stage: str, x: jax.Array) -> jax.Array:
                enter(stage)
                return x

            module(x, tap=tap)
            enter(module.stages[-1])

        nn.init(run, backbone)(jax.random.key(0), jnp.zeros((1, size, size, 3)))

    jax.eval_shape(trace)
    return stages
