"""Experiments: one Python file or a run's config.json, with fields overridden by their dotted names."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

from bmjax.config.base import Config, from_json
from bmjax.registry import explain_error, import_file


def _from_file(file: Path) -> Config:
    try:
        return from_json(file.read_text("utf-8"))
    except ValueError as e:
        raise ValueError(f"{file}: {e}; expected a configuration as `bmjax train` writes it") from e


def load_experiment(path: str) -> tuple[Config, ModuleType | None]:
    """The Config of an experiment file (its `config()`), of a config.json, or of a run's folder; and the file's module.

    The experiment's folder and the current one become importable, so that an experiment may say `from common import X`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file has an error, named with its line, or no `config()` that returns a Config.
    """
    file = Path(path)
    if (file / "config.json").is_file():
        return dataclasses.replace(_from_file(file / "config.json"), run_dir=str(file)), None
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no such experiment; expected a Python file with config(), a config.json, or a run's folder"
        )
    if file.suffix == ".json":
        return _from_file(file), None
    if file.suffix != ".py":
        raise ValueError(f"{path}: expected a file ending in .py or .json")
    for folder in (str(file.resolve().parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    module = import_file(file)
    try:
        config = module.config() if hasattr(module, "config") else None
    except Exception as e:
        raise ValueError(explain_error(e, file)) from e
    if not isinstance(config, Config):
        found = f"gives {config!r}" if hasattr(module, "config") else "is not there"
        raise ValueError(f"{path}: config() {found}; expected one that returns a bmjax.Config")
    return config, module
