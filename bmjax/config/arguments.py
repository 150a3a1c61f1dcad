"""Checks of the arguments of public functions: a wrong one is named, with its value and what was expected."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Sequence
from typing import Any


def _shown(value: object) -> str:
    """A value in one short line, with its type where the value alone would not tell."""
    text = " ".join(repr(value).split())
    short = text if len(text) <= 80 else f"{text[:77]}..."
    return short if isinstance(value, (str, int, float, type(None))) else f"{short} ({type(value).__name__})"


def check_type(argument: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises a TypeError that names the argument, its value and what was expected, unless it is of these types.

    True and False are no whole numbers here.
    """
    is_bool = isinstance(value, bool) and kinds is not bool
    if is_bool or not isinstance(value, kinds):
        raise TypeError(f"{argument} is {_shown(value)}; expected {expected}")


def check_whole(argument: str, value: Any, least: int) -> int:
    """The whole number given, NumPy's included.

    Raises:
      TypeError, ValueError: it is none, or too small.
    """
    check_type(argument, value, numbers.Integral, f"a whole number, at least {least}")  # type: ignore[type-abstract]
    if value < least:
        raise ValueError(f"{argument} is {value}; expected at least {least}")
    return int(value)


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Raises a ValueError, with the nearest choice, unless the value is one of them."""
    if isinstance(value, str) and value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{argument} is {_shown(value)}; expected one of {', '.join(map(repr, choices))}{hint}")
