"""Checks of a configuration's fields, made when a dataclass is built."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import typing
from typing import Any, Literal

import pydantic

from bmjax.registry import is_own, name_of, unknown

_DEEPEST = 50  # lists and dicts within each other


def check(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises a ValueError that names the field, its value and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"config field {field!r} is {value!r}; expected {expected}")


type_hints = functools.cache(typing.get_type_hints)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[pydantic.TypeAdapter, Any]]:
    strict = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
    found = {}
    for name, hint in type_hints(cls).items():
        inner = any(dataclasses.is_dataclass(t) for t in (hint, *typing.get_args(hint)))
        found[name] = (pydantic.TypeAdapter(hint, config=None if inner else strict), hint)
    return found


def described(hint: Any) -> str:
    """A type in words: what a user would write."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    scalars = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    if hint in scalars:
        return scalars[hint]
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple:
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else args
        words = described(inner) if not isinstance(inner, tuple) else ", ".join(map(described, inner))
        return f"a tuple, each {words}; one alone has a comma after it, as in (x,)"
    if origin is dict or hint is dict:
        return "a dict with names as keys"
    if args:
        return " or ".join(map(described, args))
    return f"a {getattr(hint, '__name__', hint)}"


def nearest(value: Any, hint: Any) -> str:
    """The nearest of the texts that a type names, as a question at the end of an error; else nothing."""
    choices = [a for a in typing.get_args(hint) if isinstance(a, str)] if isinstance(value, str) else []
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, also within a tuple or a list; others as they are."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def as_json(field: str, value: Any, depth: int = 0) -> Any:
    """A field's value as JSON gives it back: tuples as lists, NumPy's numbers and arrays as Python's.

    Raises:
      ValueError: JSON can't hold it; names the field.
    """
    if depth > _DEEPEST:
        raise ValueError(f"config field {field[:80]!r} has brackets within each other; expected at most {_DEEPEST}")
    value = value if isinstance(value, (list, tuple)) else plain(value)
    if isinstance(value, dict):
        check(all(isinstance(key, str) for key in value), field, value, "a dict with names as keys")
        return {key: as_json(f"{field}.{key}", one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(field, one, depth + 1) for one in value]
    if isinstance(value, os.PathLike):
        check(False, field, value, f"text, as str() of it is {str(value)!r}")
    known = value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    check(
        known, field, value, "text, a finite number, True, False or None, or lists and dicts of such: a run records it"
    )
    return value


def check_types(config: Any, prefix: str = "") -> None:
    """Holds every field of a dataclass to its annotation. A list where a tuple is expected becomes one, NumPy's numbers
    and arrays become Python's, and options become what a run's record would give back.

    Raises:
      ValueError: names the field, its value and what was expected, with the nearest choice.
    """
    for name, (adapter, hint) in _fields(type(config)).items():
        given, field = getattr(config, name), f"{prefix}{name}"
        value = as_json(field, given) if isinstance(given, dict) and typing.get_origin(hint) is dict else plain(given)
        if isinstance(value, list) and typing.get_origin(hint) is tuple:
            value = tuple(value)
        if value is not given:
            object.__setattr__(config, name, value)
        try:
            adapter.validate_python(value, strict=True)
        except pydantic.ValidationError:
            hint_text = nearest(value, hint)
            hint_text = f", as str() of it is {str(value)!r}" if isinstance(value, os.PathLike) else hint_text
            check(False, field, value, described(hint) + hint_text)


def check_part(config: Any, name: str, field: str, known: typing.Iterable[str] | None) -> None:
    """Turns a part given as an object into its name, and holds a name to the built-in ones or to the form of one's own.

    Raises:
      ValueError: neither; names the nearest.
    """
    given = getattr(config, name)
    if isinstance(given, os.PathLike):
        check(False, field, given, f"text, as str() of it is {str(given)!r}")
    value = name_of(f"config field {field!r}:", given)
    if value is not given:
        object.__setattr__(config, name, value)
    if known is not None and value not in (choices := list(known)) and not is_own(value):
        error = unknown(f"{field.rsplit('.', 1)[-1]}", value, choices)
        raise ValueError(f"config field {field!r} is {value!r}: {error}, or one of yours: 'module:name', 'path.py'")


def check_parts(config: Any, name: str, field: str) -> None:
    """As `check_part`, of a tuple of parts of one's own."""
    given = getattr(config, name)
    if not isinstance(given, (tuple, list)):
        given = (given,) if callable(given) else given
    if isinstance(given, (tuple, list)):
        names = tuple(name_of(f"config field {field!r}:", part) if callable(part) else part for part in given)
        object.__setattr__(config, name, names)
        odd = [part for part in names if isinstance(part, str) and not is_own(part)]
        check(not odd, field, odd, "'module:name' or 'path.py', or the function itself")
