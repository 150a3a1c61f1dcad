"""Settings that must stand before jax is imported; `bmjax/__init__.py` applies them first.

Nothing here overrides what the user has set.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

# Of the CPU backend alone. The first keeps single convolutions from the YNN library, which is slower at those of these
# networks; the second runs what frees memory first, so that a dense block's backward pass needs fewer temporaries. A
# flag unknown to a version of jaxlib aborts the process, so they are set only for versions they were measured on.
CPU_FLAGS = (
    "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
    "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
)
CPU_FLAGS_JAXLIB = ("0.10.2",)


def cache_folder() -> Path:
    """The folder of everything that can be made again: weights, decoded images, compiled programs."""
    return Path(os.environ.get("BMJAX_CACHE", Path.home() / ".cache" / "bmjax"))


def apply() -> None:
    """Sets the CPU flags and the persistent compilation cache, if jax is not imported yet."""
    if "jax" in sys.modules:
        return
    if metadata.version("jaxlib") in CPU_FLAGS_JAXLIB:
        given = os.environ.get("XLA_FLAGS", "")
        missing = [flag for flag in CPU_FLAGS if flag.split("=")[0] not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))
