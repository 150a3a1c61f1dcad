"""Checks of a part's options: each value is held to the type of the field that it sets, and to that field's bounds."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from bmjax.config.checks import described, nearest, plain, type_hints
from bmjax.registry import unknown

_SCALARS = (bool, int, float, str, type(None))
_SEQUENCES = (tuple, list, collections.abc.Sequence)
_UNIONS = (typing.Union, types.UnionType)


class OptionError(ValueError):
    """Options that a part does not take: an unknown name, or a value of another type or out of its bounds."""


class Bound(NamedTuple):
    """What an option's value holds to beyond its type, and that in words."""

    holds: Callable[[Any], bool]
    words: str
    alone: bool = False
    """Whether the words say what is expected without those of the type before them."""


def each(words: str, test: Callable[[float], bool], empty: bool = True) -> Bound:
    """A bound on every number in a value; None and text have none. `empty`: whether a list may be empty."""
    return Bound(lambda value: all(map(test, _numbers(value))) and (empty or value != ()), words)


AT_LEAST_0 = each("at least 0", lambda n: n >= 0)
AT_LEAST_1 = each("at least 1", lambda n: n >= 1)
SOME_AT_LEAST_1 = each("at least 1; not empty", lambda n: n >= 1, empty=False)
ODD = each("odd and at least 1", lambda n: n >= 1 and n % 2 == 1)
ABOVE_0 = each("above 0", lambda n: n > 0)
SHARE = each("above 0 and at most 1", lambda n: 0 < n <= 1)
RATE = each("0..1, 1 excluded", lambda n: 0 <= n < 1)
ANY = each("", lambda n: True)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def held_options(
    part: str, cls: type, options: Mapping[str, Any], bounds: Mapping[str, Bound] | None = None
) -> dict[str, Any]:
    """The options as fields of a module's class: lists as tuples, since modules must hash, NumPy's numbers as Python's.

    `part` is what an error calls the module, as "attention 'se'". A field `dtype`, and one whose annotation is none of
    Python's plain types, takes any value. `bounds`, by field, are those of a module of ours: where they name none,
    whole numbers are at least 1 and others above 0, unless the field's default is not. None: no bounds.

    Raises:
      OptionError: a field is unknown, or a value is not of its type or out of its bounds.
      TypeError: a field has neither a default nor a value, as when the class itself is called.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")}
    for option in options:
        if option not in fields:
            raise OptionError(str(unknown(f"option of {part}", option, fields)))
    nowhere = dataclasses.MISSING
    if lacking := [n for n, f in fields.items() if f.default is f.default_factory is nowhere and n not in options]:
        names = ", ".join(map(repr, lacking))
        raise TypeError(f"{part} has no default for {names}; expected one, or a value in its options")
    hints, found = _hints(cls), dict[str, Any]()
    for option, given in options.items():
        hint = Any if option == "dtype" else hints.get(option, Any)
        bound = None
        if bounds is not None:
            bound = bounds.get(option) or _usual_bound(fields[option].default, hint)
        try:
            value, fits = _fitted(plain(given), hint), True
        except (TypeError, OverflowError):
            value, fits = given, False
        if not fits or (bound is not None and not bound.holds(value)):
            expected = _expected(hint, bound) + nearest(given, hint)
            raise OptionError(f"option {option!r} of {part} is {given!r}; expected {expected}")
        found[option] = value
    return found


def _hints(cls: type) -> dict[str, Any]:
    """A class's annotations; none where they name what is imported for type checkers alone."""
    try:
        return type_hints(cls)
    except (NameError, AttributeError, TypeError, SyntaxError):
        return {}


def _usual_bound(default: Any, hint: Any) -> Bound | None:
    """That of a field of ours for which no other is named."""
    scalars = set(_scalars_of(hint))
    bound = ABOVE_0 if float in scalars else AT_LEAST_1 if int in scalars else None
    return bound if bound is not None and bound.holds(default) else None


def _scalars_of(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in (*typing.get_args(hint), *(_named(hint) or ())):
        yield from _scalars_of(inner)


def _named(hint: Any) -> tuple[Any, ...] | None:
    """The types of a named tuple's fields; None of another type."""
    fields = getattr(hint, "_fields", None)
    if not (isinstance(hint, type) and issubclass(hint, tuple)) or fields is None:
        return None
    return tuple(_hints(hint).get(field, Any) for field in fields)


def _fitted(value: Any, hint: Any) -> Any:
    """The value as a field of this type holds it.

    Raises:
      TypeError: it is not of the type.
    """
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in _UNIONS:
        return _fitted_to_one(value, args)
    if origin in _SEQUENCES:
        return _fitted_in_order(value, args, any_number=origin is not tuple or Ellipsis in args)
    if (named := _named(hint)) is not None:
        return hint(*_fitted_in_order(value, named, any_number=False))
    if origin is float and type(value) is int:
        value = float(value)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in args)
    elif origin in _SCALARS:
        fits = isinstance(value, origin) and (origin is bool or not isinstance(value, bool))
        fits = fits and not (isinstance(value, float) and not math.isfinite(value))
    else:
        fits = origin is not dict or isinstance(value, dict)
    if not fits:
        raise TypeError(value)
    return _as_tuple(value)


def _fitted_to_one(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _fitted(value, hint)
        except TypeError:
            pass
    raise TypeError(value)


def _fitted_in_order(value: Any, hints: tuple[Any, ...], any_number: bool) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(value)
    if not hints:
        return _as_tuple(value)
    each_hint = hints[:1] * len(value) if any_number else hints
    if len(each_hint) != len(value):
        raise TypeError(value)
    return tuple(map(_fitted, value, each_hint))


def _as_tuple(value: Any) -> Any:
    """Lists as tuples, also those within."""
    return tuple(map(_as_tuple, value)) if type(value) in (list, tuple) else value


def _expected(hint: Any, bound: Bound | None) -> str:
    if bound is not None and bound.alone:
        return bound.words
    return f"{_in_words(hint)}, {bound.words}" if bound is not None and bound.words else _in_words(hint)


def _in_words(hint: Any) -> str:
    """A type as a user writes it in JSON: a tuple is a list there."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(map(_in_words, args))
    if _named(hint) is not None:
        return f"[{', '.join(hint._fields)}]"
    if origin not in _SEQUENCES:
        return described(hint)
    if origin is tuple and args and Ellipsis not in args:
        return f"a list of {len(args)}: {', '.join(map(_in_words, args))}"
    return f"a list, each {_in_words(args[0])}" if args else "a list"
