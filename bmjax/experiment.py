"""Experiments: one Python file or a run's config.json, with fields overridden by their dotted names."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bmjax.config import Config, from_json, to_json
from bmjax.registry import unknown

_WORDS = {"none": "None", "null": "None", "true": "True", "false": "False"}


def load_experiment(path: str) -> tuple[Config, ModuleType | None]:
    """The Config of an experiment file (its `config()`), of a config.json, or of a run's folder; and the file's module.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file has no `config()` that returns a Config.
    """
    file = Path(path)
    if (file / "config.json").is_file():
        return dataclasses.replace(from_json((file / "config.json").read_text()), run_dir=str(file)), None
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no such experiment; expected a Python file with config(), a config.json, or a run's folder"
        )
    if file.suffix == ".json":
        return from_json(file.read_text()), None
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: expected a file ending in .py or .json")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.config() if hasattr(module, "config") else None
    if not isinstance(config, Config):
        found = f"gives {config!r}" if hasattr(module, "config") else "is not there"
        raise ValueError(f"{path}: config() {found}; expected one that returns a bmjax.Config")
    return config, module


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field below a dataclass; a tuple of dataclasses stands without its index."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if isinstance(inner, type):
            found |= field_types(inner, f"{name}.")
        else:
            found[name] = hint
    return found


def _spoken(arguments: Sequence[str]) -> list[str]:
    """Arguments with `none`, `true` and `false` as Python writes them, where the field takes such values."""
    hints, words = field_types(Config), list(arguments)
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        flag, equals, value = word[2:].partition("=")
        name = ".".join(p for p in flag.replace("-", "_").split(".") if not p.isdigit())
        hint = hints.get(name)
        options = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        known = {"None"} if types.NoneType in options else set()
        known |= {"True", "False"} if bool in options else set()
        at = i if equals else i + 1
        if not equals and at < len(words):
            value = words[at]
        spoken = _WORDS.get(value.lower())
        if spoken is not None and spoken in known:
            words[at] = f"--{flag}={spoken}" if equals else spoken
    return words


def override(config: Config, arguments: Sequence[str], prog: str) -> Config:
    """The configuration with fields set by their dotted names: `--optim.lr 0.1 --stages.0.epochs 5`.

    Types are checked; an unknown or wrong argument exits with status 2 and a suggestion. A dict is given as JSON.

    Raises:
      ValueError: a value is out of range.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    def parse(words: list[str]) -> dict[str, Any]:
        value = json.loads(words[0])
        if not isinstance(value, dict):
            raise ValueError(f"{words[0]!r} is no JSON object")
        return value

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if typing.get_origin(info.type) is not dict:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    # Every field is a plain flag: no sub-commands for optional values, no True/False pairs of flags.
    flags = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(Config, default=config, args=_spoken(arguments), prog=prog, config=flags, registry=registry)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with fields set by their dotted names: {"optim.lr": 0.1, "stages.0.epochs": 5}.

    Raises:
      ValueError: no such field, or a value of the wrong type or out of range; names it.
    """
    tree: Any = json.loads(to_json(config))
    for name, value in changes.items():
        holder: Any = None
        key: Any = None
        node: Any = tree
        for part in name.split("."):
            known = [str(i) for i in range(len(node))] if isinstance(node, list) else list(node)
            if part not in known:
                raise unknown(f"part of {name!r}:", part, known)
            holder, key = node, int(part) if isinstance(node, list) else part
            node = holder[key] if isinstance(holder[key], (dict, list)) else {}
        holder[key] = value
    return from_json(json.dumps(tree))


def sweep(config: Config, module: ModuleType | None, path: str) -> list[Config]:
    """A configuration for each of the overrides that the experiment's `sweep()` yields.

    Each has a name and a folder of its own: the run's name followed by what was changed, unless the override names it.

    Raises:
      ValueError: there is no sweep(), or two of its runs have the same name.
    """
    if module is None or not hasattr(module, "sweep"):
        raise ValueError(f"{path}: has no sweep(); expected one that yields overrides, such as {{'optim.lr': 0.1}}")
    configs = []
    for changes in module.sweep():
        words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in changes.items()]
        name = changes.get("name", "-".join([config.name, *words]).replace("/", "_").replace(" ", ""))
        run_dir = f"{config.run_dir}/{name}" if config.run_dir else ""
        configs.append(changed(config, {"run_dir": run_dir} | changes | {"name": name}))
    names = [c.name for c in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: sweep() gives two runs of the same name: {', '.join(names)}")
    return configs
