"""Several processes that train one run together: how they join, agree, and stop at the same step.

All compute, process 0 writes. With one process every function here does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from typing import Any, TypeVar

import jax
import numpy as np

from bmjax.training.parallel import largest_everywhere
from bmjax.training.signals import Interrupted, Signals

T = TypeVar("T")
AGREE_EVERY = 8
"""Steps, or batches of an evaluation, between two times that processes tell each other of signals."""
HEARTBEAT_SECONDS = 30
"""After so long a process that is gone is missed, and the others end."""
_FAILED = 1 << 10


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process joins others; None: jax asks the cluster. `local` is its place on its own machine."""

    kind: str
    hosts: int | None = None
    host: int | None = None
    coordinator: str | None = None
    local: int | None = None


def _number(name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"environment variable {name} is {text!r}; expected a whole number")
    return int(text)


def detected(environ: Mapping[str, str]) -> Cluster | None:
    """The cluster that started this process, by its environment; None where it runs alone.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (or a Kubernetes job's JOB_COMPLETION_INDEX);
    srun of SLURM; mpirun of Open MPI; the workers of a TPU slice.

    Raises:
      ValueError: a variable is not a number, or one is missing.
    """
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    given = _number("JAX_NUM_PROCESSES", environ)
    if given is not None:
        index = _number("JAX_PROCESS_ID", environ)
        index = _number("JOB_COMPLETION_INDEX", environ) if index is None else index
        return _checked(Cluster("environment", given, index, address)) if given > 1 else None
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        return Cluster("slurm", coordinator=address) if (_number("SLURM_NTASKS", environ) or 1) > 1 else None
    size = _number("OMPI_COMM_WORLD_SIZE", environ)
    if size is not None:
        if size == 1:
            return None
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return Cluster("ompi", coordinator=address)
        # Open MPI 5 no longer tells where its launcher is.
        rank, local = _number("OMPI_COMM_WORLD_RANK", environ), _number("OMPI_COMM_WORLD_LOCAL_RANK", environ)
        return _checked(Cluster("ompi", size, rank, address, local))
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    slices = _number("MEGASCALE_NUM_SLICES", environ) or 1
    if "," in workers or slices > 1:
        return Cluster("tpu")
    return None


def _checked(cluster: Cluster) -> Cluster:
    c = cluster
    if c.hosts is None or c.host is None or not 0 <= c.host < c.hosts:
        raise ValueError(f"host {c.host} of {c.hosts} hosts; expected one of 0 to hosts - 1 (--hosts, --host)")
    if c.coordinator is None or not c.coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"the coordinator's address is {c.coordinator!r}; expected host 0's, as in --coordinator node0:8476 or "
            "JAX_COORDINATOR_ADDRESS"
        )
    return cluster


def chosen(hosts: int | None, host: int | None, coordinator: str | None) -> Cluster | None:
    """The cluster that the command line names, or else the environment; None where this process runs alone.

    Raises:
      ValueError: one is missing or out of range.
    """
    if hosts is None:
        if host is not None or coordinator is not None:
            raise ValueError("--host or --coordinator without --hosts; expected the number of hosts too")
        return detected(os.environ)
    if hosts < 1:
        raise ValueError(f"--hosts is {hosts}; expected at least 1")
    return None if hosts == 1 else _checked(Cluster("command line", hosts, host, coordinator))


def join(hosts: int | None = None, host: int | None = None, coordinator: str | None = None) -> None:
    """Joins the processes of one run, before jax has looked at its devices; alone it does nothing.

    Raises:
      ValueError: as `chosen`.
      ConnectionError: the others were not there in five minutes, or the address is taken.
    """
    cluster = chosen(hosts, host, coordinator)
    on_tpu = util.find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    if (cluster is None and (hosts == 1 or not on_tpu)) or jax.distributed.is_initialized():
        return
    # It would take SIGTERM for itself; signals are agreed on in `SharedSignals`.
    jax.config.update("jax_enable_preemption_service", False)
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    settings["shutdown_timeout_seconds"] = HEARTBEAT_SECONDS
    if cluster is not None and cluster.coordinator is not None:
        settings["coordinator_address"] = cluster.coordinator
    if cluster is not None and cluster.hosts is not None:
        settings |= {"num_processes": cluster.hosts, "process_id": cluster.host}
        settings |= {"local_device_ids": None if cluster.local is None else [cluster.local]}
        settings["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(**settings)
    except ValueError:
        if cluster is not None:
            raise
        # A machine with TPUs that is no part of a slice of several.
    except RuntimeError as e:
        where = cluster.coordinator if cluster is not None else None
        raise ConnectionError(f"could not join the other hosts at {where or 'their coordinator'}: {e}") from e


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this process writes and speaks: process 0."""
    return jax.process_index() == 0


def told(value: T) -> T:
    """Process 0's value, of what JSON can hold, on every process."""
    if not several():
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(text))))
    text = text if leads() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(text)).tobytes())


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """All processes leave it together: where one raises, the others raise too, and none is left waiting.

    Raises:
      Interrupted: another process got a signal within.
      ChildProcessError: another process failed; it has said why.
    """
    if not several():
        yield
        return
    mine = 0
    try:
        yield
    except Interrupted as e:
        mine = int(e.args[0])
        raise
    except BaseException:
        mine = _FAILED
        raise
    finally:
        worst = int(np.asarray(largest_everywhere(mine)))
        if not mine and worst == _FAILED:
            raise ChildProcessError(f"another process failed while {what}; its own output says why")
        if not mine and worst:
            raise Interrupted(signal.Signals(worst))


@contextlib.contextmanager
def closing(thing: Any) -> Iterator[Any]:
    """Closes on the way out; not on an error of one of several processes, for whose others it would wait."""
    try:
        yield thing
    except BaseException:
        if not several():
            thing.close()
        raise
    thing.close()


def leave() -> None:
    """Waits for the other processes, so that none misses this one at its end."""
    if several():
        np.asarray(largest_everywhere(0))


def first_alone(make: Callable[[], T]) -> T:
    """Calls a function on process 0, then on the others, which find in the cache what it made."""
    if not several():
        return make()
    made = None
    with together("reading the data"):
        made = make() if leads() else None
    with together("reading the data"):
        return made if leads() and made is not None else make()


class SharedSignals(Signals):
    """The signals of all processes: one that comes to any of them stops all at the same step.

    Every process must ask at the same places; each eighth time they tell each other, which is read when next asked,
    so that no step waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0
        self._agreed: signal.Signals | None = None
        self._telling: jax.Array | None = None

    @property
    def stop(self) -> signal.Signals | None:
        own = super().stop
        if self._agreed is not None:
            return self._agreed
        if self._telling is not None:
            number, self._telling = int(np.asarray(self._telling)), None
            if number:
                self._agreed = signal.Signals(number)
        elif self._asked % AGREE_EVERY == 0:
            self._telling = largest_everywhere(own if isinstance(own, signal.Signals) else 0)
        self._asked += 1
        return self._agreed

    def check(self) -> None:
        if (stop := self.stop) is not None:
            raise Interrupted(stop)


def signals() -> Signals:
    """Signals of this process alone, or of all."""
    return SharedSignals() if several() else Signals()
