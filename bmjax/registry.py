"""Finds parts by name, built-in or of one's own.

A built-in part is known by its name. A part of one's own is `package.module:name`, the path of a `.py` file that holds
one public object of the kind, or `path.py:name`. An object given from Python stands for its `module:name`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


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
    """A Python file as a module, imported once for each of its contents.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: running the file raises an error; names file, line and error.
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
        except Exception as e:
            del sys.modules[name]
            raise ValueError(explain_error(e, path)) from e
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def import_object(kind: str, path: str) -> object:
    """`package.module:Name` -> that object, `kind` is what it is called in errors.

    Raises:
      ValueError: the path is not of that form, the module does not import, or it has no such name; says which.
    """
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for name in (module_name, attribute) for part in name.split(".")):
        raise ValueError(f"{kind} {path!r} names no object of a module; expected 'package.module:name', 'path.py:name'")
    try:
        module = importlib.import_module(module_name)
    except Exception as e:
        file = _first_file(e)
        if file is None and isinstance(e, ImportError):
            why = str(e)
        else:
            why = explain_error(e, file or module_name)
        raise ValueError(f"cannot import {module_name!r} of {path!r}: {why}") from e
    return _attribute(module, attribute, f"module {module_name!r}")


def _first_file(error: BaseException) -> str | None:
    """The first file, as an import went, that ran until an error arose in it; None where none did."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    machinery = (__file__, importlib.__file__)
    return next((file for file in files if file not in machinery and not file.startswith("<frozen")), None)


def _attribute(module: ModuleType, attribute: str, place: str) -> object:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise unknown(f"name in {place}", part, (n for n in dir(found) if not n.startswith("_")))
        found = getattr(found, part)
    return found


def is_own(name: str) -> bool:
    """Whether a name is that of a part of one's own: `module:name`, `path.py` or `path.py:name`."""
    return ":" in name or name.endswith(".py")


def file_and_attribute(name: str) -> tuple[str, str] | None:
    """("path.py", "name" or "") of a part in a file; None of a built-in one or one in a module."""
    if name.endswith(".py"):
        return name, ""
    match = re.fullmatch(r"(.*\.py):([\w.]+)", name)
    return (match[1], match[2]) if match else None


def label_of(name: str) -> str:
    """What a part is called where a short name is needed: its own name, or that of its file."""
    found = file_and_attribute(name)
    if found is not None:
        return found[1] or Path(found[0]).stem
    return name.rpartition(":")[2]


def load_own(kind: str, name: str, accepts: Callable[[object], bool], expected: str) -> Any:
    """The object that a name of one's own stands for, or the one of its kind in a module; it is `accepts`ed, as
    `expected` says.

    Raises:
      FileNotFoundError: there is no such `.py` file.
      ValueError: the file has an error, there is no such name, or the object is of another kind.
    """
    found = file_and_attribute(name)
    if found is None and ":" in name:
        value = import_object(kind, name)
    else:
        path, attribute = found or (name, "")
        module = import_file(path) if found else importlib.import_module(name)
        if attribute:
            value = _attribute(module, attribute, path)
        else:
            public = {n: v for n, v in vars(module).items() if not n.startswith("_")}
            public = {n: v for n, v in public.items() if getattr(v, "__module__", None) == module.__name__}
            kept = [n for n, v in public.items() if accepts(v)]
            if len(kept) != 1:
                raise ValueError(
                    f"{kind} {name!r} holds {', '.join(kept) or 'none'}; expected exactly one {expected}, "
                    f"or its name as in {name + ':' + (kept[0] if kept else 'name')!r}"
                )
            value = public[kept[0]]
    if not accepts(value):
        raise ValueError(f"{kind} {name!r} is {value!r}; expected {expected}")
    return value


def missing_keywords(function: Callable[..., Any], keywords: Iterable[str]) -> list[str]:
    """Those of `keywords` that a function can't be called with by name."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return [name for name in keywords if name not in named]


def name_of(kind: str, value: object) -> str:
    """The name of a part: a string as it is, an object by its module and name.

    Raises:
      ValueError: the object cannot be found by its name, as a lambda or a function within another cannot.
    """
    if isinstance(value, str):
        return value
    module, attribute = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    found: Any = sys.modules.get(module or "")
    for part in (attribute or "").split("."):
        found = getattr(found, part, None)
    if found is not value or not module:
        raise ValueError(
            f"{kind} {value!r} has no name to find it by; expected a class or function at the top of a module, "
            "since a run records it by name"
        )
    file = getattr(sys.modules[module], "__file__", None)
    if file and sys.modules[module].__spec__ is not None and _is_of_file(module):
        return f"{file}:{attribute}"
    return f"{module}:{attribute}"


def _is_of_file(module: str) -> bool:
    """Whether a module was imported by `import_file`, under a name that another process does not know."""
    return re.search(r"_[0-9a-f]{12}$", module) is not None


def source_file(name: str) -> Path | None:
    """The file of a part of one's own; None of a built-in one, and of one in an installed library."""
    found = file_and_attribute(name)
    if found is not None:
        return Path(found[0])
    if not is_own(name):
        return None
    module = name.partition(":")[0]
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None)
    else:
        try:
            spec = importlib.util.find_spec(module)
        except Exception:  # it imports the packages above, which are the user's
            return None
        file = spec.origin if spec is not None else None
    installed = {sysconfig.get_paths()[key] for key in ("purelib", "platlib", "stdlib", "platstdlib")}
    if not file or not file.endswith(".py") or any(Path(file).is_relative_to(folder) for folder in installed):
        return None
    return Path(file)


def explain_error(error: BaseException, path: str | Path) -> str:
    """What went wrong in a file of the user's, in one line: the error, and the line in that file where it arose."""
    if isinstance(error, SyntaxError):
        line = f", line {error.lineno}" if error.lineno else ""
        return f"{error.filename or path}{line}: {error.msg}"
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == Path(path).resolve()
    ]
    where = f"{path}, line {frames[-1].lineno}" if frames else str(path)
    return " ".join(f"{where}: {type(error).__name__}: {error}".split("\n"))
