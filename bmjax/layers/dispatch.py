"""The seam between operations and code of one platform that computes them faster.

An operation marked `replaceable` is written down in jax.numpy, which is what runs on GPUs and TPUs, and what it means
everywhere. On CPUs it first asks `bmjax.cpu.REPLACEMENTS` for its name, if that folder is there. Models, layers and
training know no more of it than what a trace is for: the platform, the body of a loop, a program that XLA divides over
devices.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax

from bmjax import environment

P = ParamSpec("P")
R = TypeVar("R")

# Of this thread: another may trace beside it.
_platform: ContextVar[str | None] = ContextVar("_platform", default=None)
_in_loop: ContextVar[bool] = ContextVar("_in_loop", default=False)
_partitioned: ContextVar[bool] = ContextVar("_partitioned", default=False)
_forms: ContextVar[frozenset[str] | None] = ContextVar("_forms", default=None)

FORMS = {
    "dense_in_place": "dense blocks in one buffer with a derivative of their own, as on CPUs",
    "dense_remat": "dense blocks whose concatenations and norms are computed again on the way back",
    "depthwise_taps": "depthwise convolutions of every size as sums of shifted maps, on GPUs those above 3x3 too",
    "plain_depthwise": "depthwise convolutions as XLA has them, on GPUs too",
    "pointwise_dot": "1x1 convolutions as products of matrices",
    "plain_pool": "max pooling with XLA's own derivative",
}
"""Alternatives away from CPUs, off unless BMJAX_FORMS names them; tools/bench/accelerator.py measures them."""


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def platform() -> str:
    """The platform that code is being traced for: "cpu", "gpu", "tpu"."""
    return _platform.get() or jax.default_backend()


def traced_for(name: str) -> contextlib.AbstractContextManager[None]:
    """Traces what is inside for another platform: for tests, ahead-of-time lowering and comparisons.

    `traced_for("gpu")` on a CPU gives XLA's own operations throughout. What jit has traced before it is not traced
    again.
    """
    return _set(_platform, name)


def wants(form: str) -> bool:
    """Whether an alternative formulation of `FORMS` is asked for; never on CPUs, which have their own.

    Raises:
      ValueError: one is asked for that is not listed.
    """
    chosen = _forms.get()
    chosen = environment.forms() if chosen is None else chosen
    if unknown := chosen - set(FORMS):
        raise ValueError(f"BMJAX_FORMS holds {', '.join(sorted(unknown))}; expected some of {', '.join(FORMS)}")
    return form in chosen and platform() != "cpu"


def with_forms(*names: str) -> contextlib.AbstractContextManager[None]:
    """Traces what is inside with these alternative formulations and no others."""
    return _set(_forms, frozenset(names))


def in_loop() -> bool:
    """Whether code is being traced for the body of a loop."""
    return _in_loop.get()


def inside_loop() -> contextlib.AbstractContextManager[None]:
    """Traces what is inside for the body of a loop (`lax.scan`), where an operation may need another form."""
    return _set(_in_loop, True)


def partitioned() -> bool:
    """Whether code is being traced for a program that XLA divides over devices."""
    return _partitioned.get()


def for_partition(function: Callable[P, R]) -> Callable[P, R]:
    """A function traced as one that XLA divides over devices: XLA divides its own operations only."""

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with _set(_partitioned, True):
            return function(*args, **kwargs)

    return traced


@functools.cache
def _replacements() -> dict[str, Callable[..., Any]]:
    if not (Path(__file__).parents[1] / "cpu").is_dir():
        return {}
    return importlib.import_module("bmjax.cpu").REPLACEMENTS


def replaceable(function: Callable[P, R]) -> Callable[P, R]:
    """Marks an operation that `bmjax.cpu.REPLACEMENTS` may compute instead, by its name, on CPUs.

    A replacement takes the same arguments; where it does not serve (another type, say) it returns NotImplemented.
    """

    @functools.wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        asked = platform() == "cpu" or (function.__name__ == "dense_layers" and wants("dense_in_place"))
        if asked and (replacement := _replacements().get(function.__name__)) is not None:
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return function(*args, **kwargs)

    return chosen


@replaceable
def prepare() -> None:
    """Makes ready what replacements need, before anything is traced: on CPUs the kernels are compiled here, if they
    are not there yet. Tracing itself compiles nothing: without this call it does without the kernels."""


@replaceable
def fits_loop(jaxpr: Any) -> bool:
    """Whether a (closed) jaxpr runs as fast within a loop as outside."""
    del jaxpr
    return True


@replaceable
def described() -> str:
    """What computes in place of XLA's own operations, in words."""
    return "XLA's own operations"
