"""Settings that must stand before jax is imported; `bmjax/__init__.py` applies them first.

Nothing here overrides what the user has set.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import stat
import sys
from collections.abc import Sequence
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
# Where they were measured and change no more than memory, by a tenth and for the worse (docs/speed.md).
CPU_FLAGS_NEEDLESS = ("0.12.0.1",)
# With several virtual devices the second is needed there, too: independent collectives, which begin at a time, wait for
# each other where the cores are fewer than the devices, until XLA ends the process.
VIRTUAL_DEVICES = "--xla_force_host_platform_device_count"
# Of GPUs, for programs on several: gradients are exchanged while others are still computed. On one GPU it changes
# nothing. Set only for versions of jaxlib that are known to know it.
GPU_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)
GPU_FLAGS_JAXLIB = ("0.10.2", "0.11.2")
# The same input gives the same bits on a GPU too: sums in a fixed order, at some cost.
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"
# Numbers of glibc's malloc.h, and values: hand back nothing, map nothing apart. Not fewer arenas, too: compiling is
# slower then, and leaves them so fragmented that each later step is.
_MALLOC = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0)}
_malloc_set: list[bool] = []


def is_utf8(text: str) -> bool:
    """Whether a name is text, and not bytes that Python keeps as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def check_utf8(name: str, path: Path) -> None:
    """Refuses a path that is not UTF-8, before it is given to a library that takes text alone.

    Raises:
      ValueError: it is not; says `name`, the option or field that gives it, and the path.
    """
    if not is_utf8(str(path)):
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ValueError(f"{name} is '{shown}', which is not UTF-8; expected a path that is: give another one")


def _cache_folder() -> Path:
    return Path(os.environ.get("BMJAX_CACHE", Path.home() / ".cache" / "bmjax"))


def cache_folder() -> Path:
    """The folder of everything that can be rebuilt: weights, decoded images, compiled programs.

    Raises:
      ValueError: its path is not UTF-8, which XLA needs for compiled programs.
    """
    folder = _cache_folder()
    check_utf8("the cache (BMJAX_CACHE)", folder.absolute())
    return folder


def why_foreign(path: Path) -> str | None:
    """Why what lies at a path is not this user's alone: it belongs to another user, or others may write to it; None if
    it is, where there is nothing, and on systems without such owners. The user's own group counts as the user."""
    if not hasattr(os, "getuid"):
        return None
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if found.st_uid != os.getuid():
        return f"belongs to another user (uid {found.st_uid})"
    group = found.st_mode & stat.S_IWGRP and found.st_gid != os.getgid()
    return "can be written by others" if group or found.st_mode & stat.S_IWOTH else None


def check_own_cache(folder: Path) -> None:
    """Refuses a folder of caches that others may have filled.

    Raises:
      PermissionError: it belongs to another user, or others may write to it.
    """
    if why := why_foreign(folder):
        raise PermissionError(
            f"the cache {folder} {why}, so its contents are not to be trusted; expected a folder of your own: set "
            "BMJAX_CACHE or data.cache_dir, or take the right away (chmod go-w)"
        )


def quiet_libraries(*further: str) -> None:
    """Of the libraries that say much, and of further loggers, warnings alone are said."""
    for name in ("absl", "jax", "orbax", "grain", *further):
        logging.getLogger(name).setLevel(logging.WARNING)


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


def gpu_expected() -> bool:
    """Whether jax has a plugin for GPUs that it is not told to leave alone; looks at no device."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked and not {"cuda", "rocm", "gpu"} & set(asked.split(",")):
        return False
    return any("cuda" in point.name or "rocm" in point.name for point in metadata.entry_points(group="jax_plugins"))


def forms() -> frozenset[str]:
    """The alternative formulations that BMJAX_FORMS asks for, a comma between two; see bmjax/layers/dispatch.py."""
    return frozenset(filter(None, os.environ.get("BMJAX_FORMS", "").split(",")))


def keeps_freed_memory() -> bool:
    """Whether `apply` told malloc to keep what is freed."""
    return any(_malloc_set)


def _keep_freed_memory() -> bool:
    """Tells malloc to keep what is freed; False where that is not ours to say, or not known to help.

    XLA's CPU backend allocates a step's temporaries at its start and frees them at its end. By default glibc hands such
    large pieces back at once, and the kernel zeroes each of their pages again in the next step.
    """
    given = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if given or platform.libc_ver()[0] != "glibc" or not cpu_only():
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(number, value) for number, value in _MALLOC.values())


def _add_flags(flags: Sequence[str]) -> None:
    """Adds those to XLA_FLAGS that the user has not set."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in flags if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()


def make_deterministic() -> None:
    """Has GPUs give the same bits for the same input; `--deterministic` of the command line.

    Raises:
      ValueError: jax is imported already, or XLA_FLAGS says otherwise.
    """
    if "jax" in sys.modules:
        raise ValueError("--deterministic comes too late: jax is imported; expected BMJAX_DETERMINISTIC=1 before that")
    _add_flags((DETERMINISTIC_FLAG,))
    if DETERMINISTIC_FLAG not in os.environ["XLA_FLAGS"]:
        raise ValueError(f"--deterministic, but XLA_FLAGS is {os.environ['XLA_FLAGS']!r}; expected it without a no")


def cpu_flags() -> tuple[str, ...]:
    """The flags for CPUs that this jaxlib is to have; none where they are not measured, or of no use."""
    version = metadata.version("jaxlib")
    if version in CPU_FLAGS_JAXLIB:
        return CPU_FLAGS
    virtual = VIRTUAL_DEVICES in os.environ.get("XLA_FLAGS", "")
    return CPU_FLAGS[1:] if version in CPU_FLAGS_NEEDLESS and virtual else ()


def apply() -> None:
    """Sets the flags for CPUs and GPUs, malloc and the persistent compilation cache, if jax is not imported yet."""
    if "jax" in sys.modules:
        return
    _malloc_set.append(_keep_freed_memory())
    _add_flags(cpu_flags())
    if metadata.version("jaxlib") in GPU_FLAGS_JAXLIB and gpu_expected():
        _add_flags(GPU_FLAGS)
    if os.environ.get("BMJAX_DETERMINISTIC", "0") not in ("", "0"):
        _add_flags((DETERMINISTIC_FLAG,))
    compiled = _cache_folder() / "jax"
    # Programs of others would run as they like; a path that is not UTF-8 is refused by `cache_folder`, in one line.
    if is_utf8(str(compiled.absolute())) and why_foreign(compiled) is None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
