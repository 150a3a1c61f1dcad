"""Finds named things: a folder of modules is the registry, one file one thing; or `package.module:Name`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """An error for a name that is not known, with the nearest ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known)}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")


def module_names(package: str) -> list[str]:
    """Public modules of a package, sorted."""
    folder = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))


def modules(package: str) -> dict[str, ModuleType]:
    """Name -> imported module, for every public module of a package."""
    return {name: importlib.import_module(f"{package}.{name}") for name in module_names(package)}


def import_file(path: str | Path) -> ModuleType:
    """A Python file as a module, imported once for each of its contents; what it raises is passed on.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Python file")
    # By place and contents: the same file gives the same classes, an edited one new ones, and none hides a package.
    name = f"{path.stem}_{hashlib.sha256(bytes(path) + path.read_bytes()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None, path
        assert spec.loader is not None, path
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # there before it runs: dataclasses look
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def import_object(path: str) -> object:
    """`package.module:Name` -> that object.

    Raises:
      ValueError: the module does not import or has no such name; the message says which.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as e:
        raise ValueError(f"cannot import {module_name!r} of {path!r}: {e}") from e
    if not hasattr(module, attribute):
        raise unknown(f"name in module {module_name!r}", attribute, (n for n in dir(module) if not n.startswith("_")))
    return getattr(module, attribute)
