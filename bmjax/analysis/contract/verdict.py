"""What every contract shares: checks in order, verdicts in words, and the comparison of trees."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

Tree = Any
Check = Callable[[Any], str | None]
"""check(subject) -> what is wrong, as `say` puts it, or None. Its docstring says what it demands."""


class NotRun(Exception):
    """A check can't be made here; says why."""


class Verdict(NamedTuple):
    """Of one check. `text` is what the check demands, or why it failed or was not run."""

    name: str
    status: Literal["ok", "FAIL", "not run"]
    text: str


@dataclasses.dataclass(frozen=True)
class Contract:
    """The checks of one kind of part, in order: those come first without which others make no sense."""

    kind: str
    subject: Callable[[Any], Any]
    """What is examined -> what the checks take."""
    checks: tuple[Check, ...]
    basis: tuple[str, ...]
    """The checks that all later ones need."""
    needs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """What a check needs beyond those."""

    @property
    def names(self) -> list[str]:
        return [_name(check) for check in self.checks]

    def verdicts(self, part: Any) -> Iterator[Verdict]:
        """A verdict on `part` by each check, as it is reached. A function stands for itself, a Flax module for what
        makes it."""
        subject, passed = self.subject(part), dict[str, bool]()
        for check in self.checks:
            name, demand = _name(check), " ".join((check.__doc__ or "").split())
            earlier = self.basis[: self.basis.index(name)] if name in self.basis else self.basis
            missing = [n for n in (*earlier, *self.needs.get(name, ())) if not passed.get(n, False)]
            if missing:
                verdict = Verdict(name, "not run", f"needs {missing[0]}")
            else:
                verdict = _verdict(check, name, demand, subject, part)
            passed[name] = verdict.status == "ok"
            yield verdict


def _name(check: Check) -> str:
    return getattr(check, "__name__", "check")


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Within it, programs for CPUs are compiled without most optimisations: a check runs its programs once or twice,
    so that compiling them is what takes the time. Their results differ by rounding at most."""
    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    jax.config.update(flag, before or jax.default_backend() == "cpu")
    try:
        yield
    finally:
        jax.config.update(flag, before)


def _verdict(check: Check, name: str, demand: str, subject: Any, part: Any) -> Verdict:
    try:
        with jax.default_matmul_precision("highest"), compiled_quickly():  # GPUs and TPUs would compare roundings
            message = check(subject)
        return Verdict(name, "FAIL" if message else "ok", message or demand)
    except NotRun as e:
        return Verdict(name, "not run", str(e))
    except Exception as e:  # a part may raise anything
        return Verdict(name, "FAIL", _raised(e, part, subject, demand))


def say(seen: str, expected: str, hint: str) -> str:
    """What a failed check says: what was seen, what was expected, and where to look."""
    return f"{seen}; expected {expected}. {hint}"


def first_line(e: BaseException) -> str:
    """An error in one line."""
    return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"


def _own_file(part: Any) -> str | None:
    """The file that a part is written in."""
    while isinstance(part, functools.partial):
        part = part.func
    try:
        return inspect.getsourcefile(part if inspect.isroutine(part) or inspect.isclass(part) else type(part))
    except (TypeError, OSError):
        return None


def _raised(e: BaseException, part: Any, subject: Any, demand: str) -> str:
    """The error, and the last line of the part's own file that led to it."""
    try:
        own = _own_file(subject.make() if hasattr(subject, "make") else part)
    except Exception:  # it can't even be made
        own = None
    lines = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == own]
    where = f" at {lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}" if lines else ""
    return say(f"raised {first_line(e)}{where}", "no error", f"Demanded: {demand}")


def leaves(tree: Tree) -> list[tuple[str, Any]]:
    """(path joined by slashes, leaf), in order."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(str(getattr(k, "key", k)) for k in path), leaf) for path, leaf in flat]


def unequal(a: Tree, b: Tree, tolerance: float = 0.0) -> str | None:
    """The first leaf in which two trees differ by more than tolerance * (1 + |b|), and by how much."""
    theirs = dict(leaves(b))
    for path, leaf in leaves(a):
        one, two = np.asarray(leaf, np.float64), np.asarray(theirs[path], np.float64)
        if not np.allclose(one, two, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"{path.split('/')[0]} by up to {np.nanmax(np.abs(one - two)):.3g}"
    return None


def not_finite(tree: Tree) -> str | None:
    """The path of the first leaf that holds NaN or infinity."""
    for path, leaf in leaves(tree):
        if not np.isfinite(np.asarray(leaf, np.float64)).all():
            return path.rstrip("/")
    return None
