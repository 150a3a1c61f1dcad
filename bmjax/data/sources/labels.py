"""Labels and groups as text: what is missing, and the classes in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence

# How tables spell a value that is missing, in any case.
_MISSING = frozenset(
    (
        *("", "?", ".", "na", "#na", "<na>", "n/a", "n.a.", "#n/a", "#n/a n/a", "nan", "-nan", "nat"),
        *("null", "<null>", "(null)", "\\n", "nil", "inf", "+inf", "-inf", "infinity", "-infinity"),
        *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
        *("#div/0!", "#name?", "#null!", "#num!", "#ref!", "#value!"),
    )
)


def known(value: str) -> str:
    """The value, or "" where it is one of the ways to write that it is missing."""
    return "" if value.lower() in _MISSING or value == "None" else value  # "none" may be a class


def classes_of(names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Each row's class, and the classes in order: as numbers where all are numbers (2.0 is the class 2), else as
    text."""
    if all(re.fullmatch(r"[+-]?\d+,\d+", name, re.ASCII) for name in names):
        if all(re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", name, re.ASCII) for name in names):  # 1,000 may be a thousand
            return list(names), tuple(sorted(set(names), key=lambda name: (int(name.replace(",", "")), name)))
        names = [name.replace(",", ".") for name in names]
    if all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d\d?)?", name.lower(), re.ASCII) for name in names):
        names = [f"{float(name):.0f}" if "e" in name.lower() and float(name) % 1 == 0 else name for name in names]
    if all(re.fullmatch(r"[+-]?\d{1,300}(\.0*)?", name, re.ASCII) for name in names):
        names = [name.split(".")[0] for name in names]
        return list(names), tuple(sorted(set(names), key=lambda name: (int(name), name)))
    if all(re.fullmatch(r"[+-]?\d*\.?\d+", name, re.ASCII) for name in names):
        return list(names), tuple(sorted(set(names), key=lambda name: (float(name), name)))
    if all(name.lower() in ("true", "false") for name in names):
        names = [name.capitalize() for name in names]
    return list(names), tuple(sorted(set(names)))
