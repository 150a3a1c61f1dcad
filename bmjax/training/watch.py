"""What a run costs while it runs: where its time goes, memory, the share of the devices' peak, compilations, a profile.

Nothing here reads from a device what the loop would not read anyway.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)

# Dense peaks in TFLOP/s, by the vendors' data sheets: products in bfloat16, in float32 as GPUs do them by default
# (TF32), and in float32. The first name that a device's kind begins with counts.
_PEAKS: tuple[tuple[str, float, float | None, float | None], ...] = (
    ("NVIDIA H200", 989.4, 494.7, 66.9),
    ("NVIDIA H100 PCIe", 756.0, 378.0, 51.2),
    ("NVIDIA H100", 989.4, 494.7, 66.9),
    ("NVIDIA A100", 312.0, 156.0, 19.5),
    ("NVIDIA L40S", 362.0, 183.0, 91.6),
    ("NVIDIA L4", 121.0, 60.0, 30.3),
    ("NVIDIA A10", 125.0, 62.5, 31.2),
    ("TPU v6", 918.0, 918.0, None),
    ("TPU v5 lite", 197.0, 197.0, None),
    ("TPU v5e", 197.0, 197.0, None),
    ("TPU v5", 459.0, 459.0, None),
    ("TPU v4", 275.0, 275.0, None),
)


def peak_flops(kind: str, dtype: str, precision: str) -> float | None:
    """FLOP/s of a device of this kind at `train.dtype` and `train.precision`; None where they are not known."""
    for name, bfloat16, default, highest in _PEAKS:
        if kind.startswith(name):
            by_type = {"bfloat16": bfloat16, "float32": {"default": default, "highest": highest}.get(precision)}
            found = by_type.get(dtype)
            return None if found is None else 1e12 * found
    return None


class Clock:
    """Seconds of an epoch's steps by what they were spent on: waiting for batches, compute (which includes sending the
    batch and waiting for the result), and logging (trackers and callbacks)."""

    def __init__(self) -> None:
        self._seconds = {"waiting": 0.0, "compute": 0.0, "logging": 0.0}
        self._began: float | None = None

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts what is inside."""
        began = time.perf_counter()
        self._began = self._began or began
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - began

    def figures(self) -> dict[str, float]:
        """`seconds/<what>` since the last call, and `input_wait`, the share 0..1 of all the time since then that was
        spent waiting for batches; {} where nothing was counted. The device may have been busy meanwhile, so
        `input_wait` is the most that faster input could gain."""
        if self._began is None:
            return {}
        passed, seconds = time.perf_counter() - self._began, self._seconds
        self.__init__()
        waits = {"input_wait": seconds["waiting"] / passed} if seconds["waiting"] else {}
        return {f"seconds/{what}": spent for what, spent in seconds.items()} | waits


def memory() -> dict[str, float]:
    """The most memory so far, in GB: `memory/host_gb` of this process, `memory/device_gb` of the fullest of its devices
    where they tell."""
    found = {}
    with contextlib.suppress(ImportError):  # not a POSIX system
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["memory/host_gb"] = most * (1 if sys.platform == "darwin" else 1024) / 1e9
    told = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    return found | ({"memory/device_gb": max(told) / 1e9} if told else {})


class WatchedStep:
    """A stage's compiled step. Logs the seconds of its first call, and warns where it is compiled again, with the
    argument that changed. `flops` are those of one call by XLA's count of the program as it is written, all devices
    together; counted only where `counts`, for it takes a second."""

    def __init__(self, step: Callable[..., Any], stage: int, counts: bool = False):
        self._step, self._stage, self._counts = step, stage, counts
        self._programs, self._arguments = 0, dict[str, str]()
        self.flops: float | None = None
        self.again = 0
        """How often it was compiled after the first time."""

    def __call__(self, *args: Any) -> Any:
        began = time.perf_counter()
        if self._counts and not self._programs:
            self.flops = _flops(self._step, args)
        result = self._step(*args)
        programs = getattr(self._step, "_cache_size", lambda: 1)()
        if programs > self._programs:
            self._say(_described(args), time.perf_counter() - began)
            self._programs = programs
        return result

    def _say(self, arguments: dict[str, str], seconds: float) -> None:
        if not self._programs:
            log.info("stage %d: its step compiled, or was read from the cache, in %.1f s", self._stage, seconds)
        else:
            before = self._arguments
            changed = [path for path in {**before, **arguments} if before.get(path) != arguments.get(path)]
            if changed:
                self.again += 1
                first = changed[0]
                log.warning(
                    "stage %d: its step compiled again in %.1f s (%d times now), for %s is %s and was %s%s",
                    *(self._stage, seconds, self.again, first, arguments.get(first, "gone"), before.get(first, "none")),
                    f"; {len(changed) - 1} others changed too" if len(changed) > 1 else "",
                )
        self._arguments = arguments


def _flops(step: Any, args: tuple[Any, ...]) -> float | None:
    try:
        return float(step.lower(*args).cost_analysis()["flops"])
    except Exception as e:  # a backend that does not count
        log.info("the step's FLOPs can't be counted: %s", e)
        return None


def _described(args: tuple[Any, ...]) -> dict[str, str]:
    """Path -> type, shape and place of every array; what a program is compiled for. Those given away still tell."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(zip(("state", "batch"), args, strict=False))):
        weak = ", weakly typed" if getattr(leaf, "weak_type", False) else ""
        place = getattr(leaf, "sharding", "the host")
        found[jax.tree_util.keystr(path, simple=True, separator=".")] = (
            f"{leaf.dtype}{list(leaf.shape)}{weak} on {place}"
        )
    return found


class Profile:
    """Writes a trace of the steps START to END of `train.profile` into a folder, for XProf, TensorBoard or Perfetto.

    Raises:
      ValueError: the run, of so many steps in all, ends before.
    """

    def __init__(self, steps: str | None, folder: Path, in_all: int):
        self._start, self._end = map(int, steps.split(":")) if steps else (-1, -1)
        if self._start >= in_all:
            raise ValueError(
                f"config field 'train.profile' is {steps!r}; expected to start below {in_all}, the run's steps"
            )
        self._folder, self._runs = folder, False

    def before(self, start: int, end: int) -> None:
        """The steps [start, end) are about to run."""
        if start <= self._start < end and not self._runs:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def after(self, step: int, result: Any, *, last: bool = False) -> None:
        """So many steps are done, `result` the state; with `last` no more come."""
        if self._runs and (step >= self._end or last):
            jax.block_until_ready(result)
            self._runs = False
            try:
                jax.profiler.stop_trace()
            except Exception as e:  # a full disk, say; the run is worth more than its trace
                log.warning("%s: the trace can't be written: %s", self._folder, " ".join(str(e).split()))
                return
            log.info("steps %d to %d are traced in %s", self._start, step, self._folder)
