"""The cells of a sweep: one configuration each, from a list of changes, a grid, or draws from choices and ranges."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from bmjax.config.base import Config
from bmjax.config.checks import as_json
from bmjax.config.override import changed, field_types
from bmjax.registry import explain_error, unknown
from bmjax.runs.folder import run_folder

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_COUNT = re.compile(r"(-?\d+):(-?\d+)(?::(\d+))?")
_WORDS = {"none": None, "null": None, "true": True, "false": False}
_MOST = 100_000  # cells of a sweep, and values of a field
_REPEATS = 100  # for each of the draws asked for, until there seem to be no others
_LONGEST = 120  # letters of a cell's name, which is the name of a folder
_OWN = {"name", "run_dir"}  # of each cell in any case, and so no columns
_OPEN, _CLOSED = "([{", ")]}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One configuration of a sweep: its name, the fields that are its own, by dotted name, and the whole."""

    name: str
    changes: dict[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included. Draws are even, or even in the logarithm where `log`."""

    low: float
    high: float
    whole: bool = False
    log: bool = False

    def draw(self, r: random.Random) -> float:
        """A number of the range; real ones have four digits or are a bound, so that a cell's name is its value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.whole and not self.log:
            return r.randint(int(low), int(high))
        value = r.uniform(low, high)
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return round(value) if self.whole else min(max(float(f"{value:.4g}"), self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


Space = Mapping[str, "Sequence[Any] | Range"]
"""Dotted field -> the values it may take, or the range they are drawn from."""


def cells_of(config: Config, changes: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """A cell for each set of changes, {"optim.lr": 0.1, "seed": 3}.

    Its name is what was changed, unless the changes name it; its folder stands in that of `config`; all are of one
    group for W&B.

    Raises:
      ValueError: there is no change, or one that is no dict, a field is unknown or its value wrong, or two cells have
        the same name.
    """
    sets = _sets(changes, "the changes of a sweep:")
    if not sets:
        raise ValueError("a sweep of no cell; expected at least one set of changes, such as {'optim.lr': 0.1}")
    base = run_folder(config)
    shorts = _short_names({field for one in sets for field in one} - _OWN)
    group = config.tracking.group or config.name
    cells = []
    for one in sets:
        fields = {field: value for field, value in one.items() if field not in _OWN}
        name = str(one.get("name", "")) or _name(fields, shorts)
        own = {"run_dir": str(base / name), "tracking.group": group} | one | {"name": f"{config.name}-{name}"}
        # As workers read them; the name is of what was given, so that a sweep of before keeps its folders.
        kept = {field: as_json(field, value) for field, value in fields.items()}
        cells.append(Cell(name, kept, changed(config, own)))
    for what, found in (("name", [c.name for c in cells]), ("folder", [c.config.run_dir for c in cells])):
        twice = [name for name, n in Counter(found).items() if n > 1]
        if twice:
            raise ValueError(f"two cells of the sweep have the same {what}: {', '.join(twice)}")
    return cells


def _sets(changes: Any, what: str) -> list[dict[str, Any]]:
    """The sets of changes; a ValueError that begins with `what` where they are none."""
    if isinstance(changes, (Mapping, str)) or not isinstance(changes, Iterable):
        raise ValueError(f"{what} {_shown(changes)}; expected a list of dicts, such as [{{'optim.lr': 0.1}}]")
    sets = list(itertools.islice(changes, _MOST + 1))
    if len(sets) > _MOST:
        raise ValueError(f"{what} more than {_MOST} cells; expected at most so many")
    for one in sets:
        if not isinstance(one, Mapping) or not all(isinstance(field, str) for field in one):
            raise ValueError(f"{what} {_shown(one)} for a cell; expected a dict of fields, such as {{'optim.lr': 0.1}}")
    return [dict(one) for one in sets]


def _shown(value: object) -> str:
    return " ".join(repr(value).split())[:100]


def _short_names(fields: Iterable[str]) -> dict[str, str]:
    """Dotted field -> as many of its last parts as tell it from the others."""
    fields = sorted(fields)
    found = {}
    for field in fields:
        parts = field.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        found[field] = next(t for t in tails if sum(f == t or f.endswith("." + t) for f in fields) == 1 or t == field)
    return found


def _name(changes: Mapping[str, Any], shorts: Mapping[str, str]) -> str:
    """The name of a folder, the same for the same changes in any process."""
    whole = ",".join(f"{shorts[field]}={value}" for field, value in changes.items()) or "as-it-is"
    name = re.sub(r"[^\w.,=+-]+", "_", whole.replace(" ", "")).strip("._") or "cell"
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return name


def experiment_cells(config: Config, module: Any, path: str) -> list[Cell]:
    """The cells that an experiment's `sweep()` yields.

    Raises:
      ValueError: there is no sweep(), it has an error, named with its line, or as `cells_of`.
    """
    if module is None or not hasattr(module, "sweep"):
        raise ValueError(
            f"{path}: has no sweep(); expected one that yields overrides, such as {{'optim.lr': 0.1}}, or --grid"
        )
    if not callable(module.sweep):
        raise ValueError(f"{path}: sweep is {_shown(module.sweep)}; expected a function, `def sweep():`, that gives it")
    try:
        found = module.sweep()
        if isinstance(found, Iterable) and not isinstance(found, Sized):
            found = list(itertools.islice(found, _MOST + 1))  # here, as a generator's errors come when it is read
    except Exception as e:
        raise ValueError(explain_error(e, path)) from e
    return cells_of(config, _sets(found, f"{path}: sweep() gives"))


def parse_space(words: Sequence[str]) -> dict[str, Sequence[Any] | Range]:
    """`optim.name=adagrad,sgd`, `seed=0:5` (0 to 4), `optim.lr=1e-4..1e-1` -> the space.

    A range is drawn from evenly in the logarithm where its bounds are positive and ten times apart or more.

    Raises:
      ValueError: a word is of another form, a range has no end, a field is unknown or stands twice or has a value
        that JSON can't hold; names it.
    """
    space: dict[str, Sequence[Any] | Range] = {}
    hints = field_types(Config)
    for word in words:
        field, equals, text = word.partition("=")
        if not equals or not text:
            raise ValueError(f"--grid {word!r}; expected FIELD=VALUE,VALUE as in optim.name=adagrad,sgd or seed=0:5")
        plain = ".".join(part for part in field.split(".") if not part.isdigit())
        if plain not in hints and plain != "model.head":
            raise unknown("field", field, hints)
        if field in space:
            raise ValueError(f"--grid names {field} twice; expected each field once")
        space[field] = _values(word, field, text, hints.get(plain) is str)
    return space


def _values(word: str, field: str, text: str, is_text: bool) -> Sequence[Any] | Range:
    if not is_text and (found := _RANGE.fullmatch(text)):
        first, last = map(float, found.groups())
        if not math.isfinite(last - first):
            raise ValueError(f"--grid {word!r} has no end; expected finite bounds, as in 1e-4..1e-1")
        whole = all(bound.lstrip("+-").isdigit() for bound in found.groups())
        low, high = map(int if whole else float, found.groups())
        if low >= high:
            raise ValueError(f"--grid {word!r}; expected the smaller bound first, as in 1e-4..1e-1")
        return Range(low, high, whole, low > 0 and high / low >= 10)
    if not is_text and (found := _COUNT.fullmatch(text)):
        return _counted(word, *found.groups())
    values = [part if is_text else as_json(field, _value(part)) for part in _split(text)]
    if len({repr(value) for value in values}) < len(values):
        raise ValueError(f"--grid {word!r} names a value twice; expected each once")
    return values


def _counted(word: str, *parts: str | None) -> list[int]:
    """START:STOP:STEP as its numbers."""
    if any(len(part or "") > 30 for part in parts):
        raise ValueError(f"--grid {word[:60]!r}; expected START:STOP of fewer digits, as in 0:5")
    start, stop, step = (int(part or 1) for part in parts)
    if step < 1:
        raise ValueError(f"--grid {word!r} has the step {step}; expected START:STOP:STEP with a step of at least 1")
    if (count := -((start - stop) // step)) > _MOST:
        raise ValueError(
            f"--grid {word!r} names {count} values; expected at most {_MOST}, or a range to draw from by --random, "
            f"as {start}..{stop - 1}"
        )
    if count < 1:
        raise ValueError(f"--grid {word!r} names no value; expected START:STOP as in 0:5, which is 0, 1, 2, 3, 4")
    return list(range(start, stop, step))


def _split(text: str) -> list[str]:
    """Parts between commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPEN) - (letter in _CLOSED)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    """A value as Python or JSON writes it; anything else is text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of a space's values; the last field changes fastest.

    Raises:
      ValueError: a field has a range, which has no number of values, or there are too many combinations.
    """
    for field, values in space.items():
        if isinstance(values, Range):
            raise ValueError(
                f"--grid {field}={values} is a range; expected values with commas between, or "
                "--random N or --optuna to draw from it"
            )
    sizes = {field: len(values) for field, values in space.items() if isinstance(values, Sized)}
    if (count := math.prod(sizes.values())) > _MOST:
        spelled = ", ".join(f"{n} of {field}" for field, n in sizes.items())
        raise ValueError(
            f"--grid has {count} combinations ({spelled}); expected at most {_MOST}, or --random N of them"
        )
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]  # type: ignore[arg-type]


def draws(space: Space, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n different draws from a space, the same for the same seed; all combinations where there are no more than n.

    Raises:
      ValueError: n is not positive, or more than can be drawn; names the fields.
    """
    if not 1 <= n <= _MOST:
        raise ValueError(f"--random is {n}; expected at least 1" + (f", at most {_MOST}" if n > _MOST else ""))
    r = random.Random(seed)
    sizes = [1 + values.high - values.low if isinstance(values, Range) else len(values) for values in space.values()]
    endless = any(isinstance(values, Range) and not values.whole for values in space.values())
    if not endless and math.prod(sizes) <= n:
        every = {k: range(int(v.low), int(v.high) + 1) if isinstance(v, Range) else v for k, v in space.items()}
        return grid(every)
    found: dict[str, dict[str, Any]] = {}
    drawn = 0
    while len(found) < n:
        drawn += 1
        if drawn - len(found) > _REPEATS * n:
            spelled = " ".join(f"{k}={v}" if isinstance(v, Range) else k for k, v in space.items())
            raise ValueError(
                f"--random is {n}, but --grid {spelled} gave only {len(found)} different draws of {drawn} (of four "
                "digits); expected a smaller --random or a wider range"
            )
        one = {k: v.draw(r) if isinstance(v, Range) else r.choice(v) for k, v in space.items()}
        found.setdefault(repr(one), one)
    return list(found.values())
