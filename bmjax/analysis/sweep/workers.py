"""Worker processes of a sweep, each with its share of the cores or a GPU of its own.

    python -m bmjax.analysis.sweep.workers FOLDER CORE,CORE

is one of them. It ends when its parent does, whatever ended that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bmjax import environment
from bmjax.training.signals import GRACE_SECONDS, Interrupted, Signals

if TYPE_CHECKING:
    from bmjax.analysis.sweep.plan import Plan

log = logging.getLogger(__name__)


def gpus() -> list[str]:
    """The GPUs that jax would see, as CUDA_VISIBLE_DEVICES names them; without looking at a device."""
    if not environment.gpu_expected():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    found = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return sorted((name[1] for name in found if name), key=int)


def shares(count: int) -> list[dict[str, str]]:
    """What each of `count` workers has for itself: {"cores": "0,1"} or {"gpu": "0", "cores": ...}.

    Raises:
      ValueError: there are fewer cores, or fewer GPUs, than workers; or no worker.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    own = gpus()
    most, what = (len(own), "GPUs") if own else (len(cores), "cores")
    if not 1 <= count <= most:
        raise ValueError(f"--workers is {count}; expected 1 to {most}, the number of {what} here")
    each = [cores[len(cores) * i // count : len(cores) * (i + 1) // count] or cores for i in range(count)]
    found = [{"cores": ",".join(map(str, mine))} for mine in each]
    return [share | {"gpu": own[i]} for i, share in enumerate(found)] if own else found


def run_workers(plan: Plan, count: int) -> None:
    """Runs `count` workers on the plan's folder and returns when all have ended.

    Raises:
      Interrupted: a signal came; the workers have it too.
      ValueError: as `shares`.
    """
    processes: list[subprocess.Popen[bytes]] = []
    signals = Signals()
    with signals, contextlib.ExitStack() as stack:
        stack.callback(_end, processes)
        path = os.pathsep.join(filter(None, sys.path))  # parts of one's own are found as here
        for share in shares(count):
            env = os.environ | {"PYTHONPATH": path}
            env |= {"CUDA_VISIBLE_DEVICES": share["gpu"]} if "gpu" in share else {}
            command = [sys.executable, "-m", "bmjax.analysis.sweep.workers", str(plan.folder), share["cores"]]
            processes.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE))
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
            signals.check()
    for number, process in enumerate(processes):
        if process.returncode:
            log.warning("worker %d of %d ended with status %d", number + 1, count, process.returncode)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Has those that still run stop between two steps, as a signal does."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * GRACE_SECONDS)
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _follow_parent() -> None:
    """Stops this process when its parent, which holds the other end of its input, is gone."""

    def wait() -> None:
        os.read(0, 1)  # nothing is ever written; not sys.stdin, whose lock would outlive the interpreter
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(folder: str, cores: str) -> int:
    """One worker; returns its exit status."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])  # before jax makes its threads
    logging.basicConfig(level=logging.INFO, format=f"worker {os.getpid()}: %(message)s", stream=sys.stderr)
    environment.quiet_libraries("bmjax.training")
    _follow_parent()
    from bmjax.analysis.sweep.here import train_here
    from bmjax.analysis.sweep.plan import load

    try:
        train_here(load(Path(folder)))
    except Interrupted as e:
        return e.code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
