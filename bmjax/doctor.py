"""Checks an environment for what has bitten users of such systems: `bmjax doctor`."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from importlib import metadata

from bmjax import environment

Finding = tuple[str, str, str]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "wandb", "numpy")


def examine() -> list[Finding]:
    """(OK | WARN | FAIL, subject, what was found and what to do about it), one a check."""
    found: list[Finding] = [("OK", "python", sys.version.split()[0])]
    for package in PACKAGES:
        try:
            found.append(("OK", package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append(("FAIL", package, "not installed; install bmjax again with pip"))
    if importlib.util.find_spec("importlib_resources") is None:
        found.append(
            (
                "FAIL",
                "importlib_resources",
                "missing, and tensorflow-datasets needs it: pip install importlib_resources",
            )
        )
    found += [_devices(), _cpu_flag(), _preallocation(), _x64(), _cache(), *_weights(), _wandb()]
    return found


def _devices() -> Finding:
    import jax

    devices = jax.devices()
    text = f"{len(devices)} {devices[0].platform}: {', '.join(sorted({d.device_kind for d in devices}))}"
    if devices[0].platform == "cpu" and os.path.exists("/dev/nvidia0"):
        return ("WARN", "devices", f"{text}, though there is an NVIDIA GPU; install jax[cuda12] or jax[cuda13]")
    return ("OK", "devices", text)


def _cpu_flag() -> Finding:
    flags, version = os.environ.get("XLA_FLAGS", ""), metadata.version("jaxlib")
    if environment.CPU_FLAG in flags:
        return ("OK", "XLA_FLAGS", flags)
    if version in environment.CPU_FLAG_JAXLIB:
        advice = f"{flags!r}; import bmjax before jax, or add {environment.CPU_FLAG}: convolutions on CPUs are faster"
        return ("WARN", "XLA_FLAGS", advice)
    return ("OK", "XLA_FLAGS", f"{flags!r}; the flag for CPUs isn't set: it isn't measured with jaxlib {version}")


def _preallocation() -> Finding:
    value = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    text = f"XLA_PYTHON_CLIENT_PREALLOCATE={value}" if value else "jax takes 75 % of a GPU's memory at its start"
    return ("OK", "GPU memory", text)


def _x64() -> Finding:
    import jax

    if jax.config.read("jax_enable_x64"):
        return (
            "WARN",
            "x64",
            "on: arrays are float64 unless marked, which is slow; unset JAX_ENABLE_X64",
        )
    return ("OK", "x64", "off")


def _cache() -> Finding:
    folder = environment.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        return ("FAIL", "cache", f"{folder} can't be written ({e}); set BMJAX_CACHE to a folder that can")
    return ("OK", "cache", f"{folder}; compiled programs in {os.environ.get('JAX_COMPILATION_CACHE_DIR', 'nowhere')}")


def _weights() -> list[Finding]:
    from bmjax.weights.catalog import RECORDS
    from bmjax.weights.download import checksum

    found = []
    for record in RECORDS:
        path = environment.cache_folder() / "weights" / record.file_name
        if path.is_file():
            algorithm, _, expected = record.checksum.partition(":")
            good = checksum(path, algorithm) == expected
            text = f"{path}" if good else f"{path}: {algorithm} differs from the record; delete it"
            found.append(("OK" if good else "FAIL", "weights", text))
    return found or [("OK", "weights", "none fetched yet")]


def _wandb() -> Finding:
    from bmjax.tracking import has_key

    mode = os.environ.get("WANDB_MODE")
    if mode:
        return ("OK", "W&B", f"WANDB_MODE={mode}")
    return ("OK", "W&B", "a key is set" if has_key() else "no key: with tracking.wandb auto, runs are logged offline")
