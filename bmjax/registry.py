"""Finds named things: a folder of modules is the registry, one file one thing; or `package.module:Name`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
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
