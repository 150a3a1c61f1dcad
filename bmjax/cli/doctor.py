"""Checks an environment for what has bitten users of such systems: `bmjax doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bmjax import environment

Finding = tuple[str, str, str]
# What bmjax requires, should its own record of it be missing (a checkout that was not installed).
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "wandb", "numpy", "tyro")

# What the package does without until it is used, and what uses it.
OPTIONAL = {"wandb": "tracking.wandb", "tensorflow-datasets": "data.source tfds and `bmjax data build`"}


def add_parser(verbs: Any) -> None:
    """Adds `doctor` to a parser's verbs."""
    verbs.add_parser("doctor", help="check the environment for known traps").set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del options, rest
    findings = examine()
    for level, subject, text in findings:
        print(f"{level:5} {subject}: {text}")
    return int(any(level == "FAIL" for level, _, _ in findings))


def examine() -> list[Finding]:
    """(OK | WARN | FAIL, subject, what was found and what to do about it), one a check."""
    python = (sys.version_info >= (3, 11), f"{sys.version.split()[0]} at {sys.executable}")
    found: list[Finding] = [
        ("OK" if python[0] else "FAIL", "python", python[1] + ("" if python[0] else "; 3.11 needed"))
    ]
    found += [*_packages(), _importlib_resources(), _tensorflow(), *_jax(), _kernels(), _cpu_flags(), _malloc()]
    found += [_cache(), _compilation_cache(), *_weights(), _wandb()]
    return found


def _packages() -> list[Finding]:
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(line) for line in metadata.requires("bmjax") or ()]
        needed = [r for r in listed if r.marker is None or r.marker.evaluate({"extra": ""})]
        found: list[Finding] = [("OK", "bmjax", metadata.version("bmjax"))]
    except metadata.PackageNotFoundError:
        needed = [Requirement(name) for name in PACKAGES]
        found = [("WARN", "bmjax", "not installed, only on the path; `python -m pip install -e .` in its folder")]
    for requirement in [*needed, Requirement("jaxlib")]:
        advice = f'needs {requirement}; python -m pip install "{requirement}"'
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            without = OPTIONAL.get(requirement.name)
            level, why = ("WARN", f"needed only for {without}; ") if without else ("FAIL", "")
            found.append((level, requirement.name, f"not installed; {why}{advice}"))
            continue
        good = requirement.specifier.contains(version, prereleases=True)
        found.append(("OK", requirement.name, version) if good else ("FAIL", requirement.name, f"{version}; {advice}"))
    return found


def _importlib_resources() -> Finding:
    # tensorflow-datasets 4.9.10 imports it and forgets to say so.
    if importlib.util.find_spec("importlib_resources") is None:
        advice = "missing, and tensorflow-datasets imports it; python -m pip install importlib_resources"
        return ("FAIL", "importlib_resources for tfds", advice)
    return ("OK", "importlib_resources for tfds", "there, as tensorflow-datasets wants it")


def _tensorflow() -> Finding:
    if importlib.util.find_spec("tensorflow") is None:
        return ("OK", "tensorflow", "not installed, and not needed")
    return ("OK", "tensorflow", "installed; bmjax never imports it (imported elsewhere it takes all of a GPU's memory)")


def _jax() -> list[Finding]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as e:
        return [("FAIL", "devices", f"jax finds none (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}): {e}")]
    platform = devices[0].platform
    text = f"{len(devices)} {platform}: {', '.join(sorted({d.device_kind for d in devices}))}"
    text += f"; {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"
    found: list[Finding] = [("OK", "devices", text)]
    if platform == "cpu" and Path("/dev/nvidia0").exists():
        advice = 'there is an NVIDIA GPU that jax does not see; python -m pip install "jax[cuda13]" (or cuda12)'
        found = [("WARN", "devices", f"{text}; {advice}")]
    found.append(_precision(jax, platform))
    if forms := environment.forms():
        found.append(("WARN", "BMJAX_FORMS", f"{', '.join(sorted(forms))}: for measurements only; unset it otherwise"))
    if platform == "gpu":
        found += _gpu()
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        advice = "on: unmarked arrays are float64, which is slow; unset JAX_ENABLE_X64 unless for a proof"
        found.append(("WARN", "x64", advice))
    else:
        found.append(("OK", "x64", "off"))
    if jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        found.append(("OK", "random numbers", "equal on any number of devices"))
    else:
        advice = "depend on the number of devices; unset JAX_THREEFRY_PARTITIONABLE"
        found.append(("WARN", "random numbers", advice))
    return found


def _precision(jax, platform: str) -> Finding:
    value = jax.config.jax_default_matmul_precision
    if platform == "cpu" or value in ("highest", "float32"):
        return ("OK", "float32 products", "exact to float32")
    how = {"gpu": "TF32, 10 bits of mantissa", "tpu": "bfloat16, 7 bits of mantissa"}.get(platform, "less than float32")
    advice = f"{how}, where train.precision is default; --train.precision highest where parity matters (slower)"
    return ("OK", "float32 products", f"{advice}; bmjax's own checks use highest")


def _gpu() -> list[Finding]:
    preallocate = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0")
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    advice = f"jax takes {share} of it at its start; if another program needs it: XLA_PYTHON_CLIENT_PREALLOCATE=false; "
    advice += "if a step does not fit: XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"
    found: list[Finding] = [("OK", "GPU memory", advice if preallocate else "taken as needed")]
    if "xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", ""):
        found.append(("OK", "GPU determinism", "on"))
    else:
        advice = "off: a resumed run is not the same bit for bit; --deterministic, or BMJAX_DETERMINISTIC=1 (slower)"
        found.append(("WARN", "GPU determinism", advice))
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in environment.GPU_FLAGS if flag.split("=")[0] not in flags]
    if not missing:
        found.append(("OK", "GPU flags", "latency hiding is set: several GPUs exchange gradients while they compute"))
    elif metadata.version("jaxlib") in environment.GPU_FLAGS_JAXLIB:
        found.append(("WARN", "GPU flags", f"import bmjax before jax, or add to XLA_FLAGS: {' '.join(missing)}"))
    else:
        known = ", ".join(environment.GPU_FLAGS_JAXLIB)
        found.append(("OK", "GPU flags", f"not set: {' '.join(missing)} is known to work with jaxlib {known} alone"))
    return found


def _kernels() -> Finding:
    if not environment.cpu_only():
        return ("OK", "kernels for CPUs", "not needed: jax is to use an accelerator")
    from bmjax.layers.dispatch import described, prepare

    prepare()
    said = described()
    if "not used" not in said and "XLA" not in said:
        return ("OK", "kernels for CPUs", said)
    return ("WARN", "kernels for CPUs", f"{said}; training on this CPU takes nearly twice as long")


def _cpu_flags() -> Finding:
    flags, version = os.environ.get("XLA_FLAGS", ""), metadata.version("jaxlib")
    wanted = environment.cpu_flags()
    if missing := [flag for flag in wanted if flag not in flags]:
        virtual = "steps on virtual devices may wait for each other until XLA ends the process"
        why = "faster on CPUs, less memory" if version in environment.CPU_FLAGS_JAXLIB else virtual
        return ("WARN", "XLA_FLAGS", f"{flags!r}; import bmjax before jax, or add {' '.join(missing)}: {why}")
    if wanted or all(flag in flags for flag in environment.CPU_FLAGS):
        return ("OK", "XLA_FLAGS", flags)
    if version in environment.CPU_FLAGS_NEEDLESS:
        return ("OK", "XLA_FLAGS", f"{flags!r}; jaxlib {version} needs no flags for CPUs")
    unknown = f"they aren't measured with jaxlib {version}; tools/bench/bench_versions.py says what that costs"
    return ("OK", "XLA_FLAGS", f"{flags!r}; the flags for CPUs aren't set: {unknown}")


def _malloc() -> Finding:
    if environment.keeps_freed_memory():
        return ("OK", "malloc", "keeps what is freed, which saves time on CPUs")
    if environment.cpu_only() and sys.platform == "linux":
        return ("WARN", "malloc", "hands freed memory back, which costs time on CPUs; import bmjax before jax")
    return ("OK", "malloc", "as it comes")


def _writable(folder: Path) -> str | None:
    """Why a folder can't be written; None where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as e:
        return str(e)


def _cache() -> Finding:
    folder = environment.cache_folder()
    if why := _writable(folder):
        return ("FAIL", "cache", f"{folder} can't be written ({why}); set BMJAX_CACHE to a folder that can")
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{folder}, {free:.0f} GB free"
    # 171,374 cells at 224 x 224 x 3 bytes.
    return ("WARN", "cache", f"{text}; the whole marrow collection needs 26 GB") if free < 2 else ("OK", "cache", text)


def _compilation_cache() -> Finding:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        advice = (
            "off: each start compiles again, for minutes; import bmjax before jax, or set JAX_COMPILATION_CACHE_DIR"
        )
        return ("WARN", "compiled programs", advice)
    if "://" not in folder and (why := _writable(Path(folder))):
        return ("WARN", "compiled programs", f"{folder} can't be written ({why}): each start compiles again")
    return ("OK", "compiled programs", f"kept in {folder}")


def _weights() -> list[Finding]:
    from bmjax.download import is_whole
    from bmjax.weights.catalog import RECORDS

    found: list[Finding] = []
    for record in RECORDS:
        path = environment.cache_folder() / "weights" / record.file_name
        if path.is_file():
            good = is_whole(record, path)
            text = f"{path}" if good else f"{path}: its checksum is not the published file's; delete it"
            found.append(("OK" if good else "FAIL", "weights", text))
    return found or [("OK", "weights", f"none fetched yet into {environment.cache_folder() / 'weights'}")]


def _wandb() -> Finding:
    from bmjax.runs.tracking import why_offline

    if mode := os.environ.get("WANDB_MODE"):
        return ("OK", "W&B", f"WANDB_MODE={mode} decides where the field tracking.wandb is auto")
    why = why_offline()
    if why is None:
        return ("OK", "W&B", "there is a key, and the server answers")
    return ("OK", "W&B", f"{why}: with tracking.wandb auto, runs are logged offline and synced later")
