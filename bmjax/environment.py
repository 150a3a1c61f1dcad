"""Settings that must stand before jax is imported; `bmjax/__init__.py` applies them first.

Nothing here overrides what the user has set.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib import metadata, util
from pathlib import Path

# Of the CPU backend alone. The first keeps single convolutions from the YNN library, which is slower at those of these
# networks; the second runs what frees memory first, so that a dense block's backward pass needs fewer temporaries. A
# flag unknown to a version of jaxlib aborts the process, so they are set only for versions they were measured on.
CPU_FLAGS = (
    "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
    "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
)
CPU_FLAGS_JAXLIB = ("0.10.2",)
# Numbers of glibc's malloc.h, and values: hand back nothing, map nothing apart. Not fewer arenas, too: compiling is
# slower then, and leaves them so fragmented that each later step is.
_MALLOC = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0)}
_malloc_set: list[bool] = []


def cache_folder() -> Path:
    """The folder of everything that can be made again: weights, decoded images, compiled programs."""
    return Path(os.environ.get("BMJAX_CACHE", Path.home() / ".cache" / "bmjax"))


def version() -> str:
    """bmjax's version, by its package's record, or "unknown" where it is not installed."""
    try:
        return metadata.version("bmjax")
    except metadata.PackageNotFoundError:
        return "unknown"


def cpu_only() -> bool:
    """Whether jax will compute on CPUs: they are asked for, or it has no plugin for anything else."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        return asked.split(",")[0] == "cpu"
    return not metadata.entry_points(group="jax_plugins") and util.find_spec("libtpu") is None


def keeps_freed_memory() -> bool:
    """Whether `apply` told malloc to keep what is freed."""
    return any(_malloc_set)


def _keep_freed_memory() -> bool:
    """Tells malloc to keep what is freed; False where that is not ours to say, or not known to help.

    XLA's CPU backend allocates a step's temporaries at its start and frees them at its end. By default glibc hands such
    large pieces back at once, and the kernel zeroes each page of them anew in the next step.
    """
    given = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if given or platform.libc_ver()[0] != "glibc" or not cpu_only():
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(number, value) for number, value in _MALLOC.values())


def apply() -> None:
    """Sets the CPU flags, malloc and the persistent compilation cache, if jax is not imported yet."""
    if "jax" in sys.modules:
        return
    _malloc_set.append(_keep_freed_memory())
    if metadata.version("jaxlib") in CPU_FLAGS_JAXLIB:
        given = os.environ.get("XLA_FLAGS", "")
        missing = [flag for flag in CPU_FLAGS if flag.split("=")[0] not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))
