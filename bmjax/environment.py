"""Settings that must stand before jax is imported; `bmjax/__init__.py` applies them first.

Nothing here overrides what the user has set.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

# Keeps XLA's CPU backend from handing single convolutions to the YNN library, which is slower for the small
# convolutions of these networks (tools/bench.py measures it). A flag unknown to a version of jaxlib aborts the
# process, so it is set only for the versions it was measured on. It concerns CPUs alone.
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
CPU_FLAG_JAXLIB = ("0.10.2",)


def cache_folder() -> Path:
    """The folder of everything that can be made again: weights, decoded images, compiled programs."""
    return Path(os.environ.get("BMJAX_CACHE", Path.home() / ".cache" / "bmjax"))


def apply() -> None:
    """Sets the CPU flag and the persistent compilation cache, if jax is not imported yet."""
    if "jax" in sys.modules:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if metadata.version("jaxlib") in CPU_FLAG_JAXLIB and "xla_cpu_experimental_ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {CPU_FLAG}".strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))
