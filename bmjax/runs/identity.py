"""What made a run, beyond its configuration: environment.json, and copies of the user's own files in code/.

environment.json holds versions, the commit, flags, devices and the command of each session, the run's id for W&B, and
the sha256 of every file of the user's that the run took part of its code from. Values of environment variables other
than the flags named here are never written, so that no key is.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from bmjax.config.base import Config
from bmjax.environment import cache_folder
from bmjax.files import checksum, read_json, write_text
from bmjax.layers.dispatch import described
from bmjax.registry import file_and_attribute, is_own, source_file

log = logging.getLogger(__name__)
_PACKAGES = ("bmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
_FLAGS = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_THREEFRY_PARTITIONABLE")
_FLAGS += ("LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_FLAGS += ("BMJAX_NATIVE", "BMJAX_FORMS")


def part_names(config: Config) -> list[str]:
    """Names of all parts of one's own that a configuration uses."""
    model = config.model
    names = [*model.attention.split("+"), model.backbone, model.head.name, config.data.source, config.train.loss]
    names += [config.optim.name, *config.train.metrics, *config.augment.extra]
    return [name for name in names if is_own(name)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> dict[str, Any] | None:
    """The commit of the checkout that bmjax is run from, and whether its files differ from it; None outside one."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        if found.returncode:
            return None
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"commit": found.stdout.strip(), "dirty": bool(changed.stdout.strip())}


def session(command: Iterable[str] | None = None) -> dict[str, Any]:
    """Where and how this process runs."""
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv if command is None else command),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "source": _commit(),
        "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ},
        "kernels": described(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in devices],
        "hosts": jax.process_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def own_files(config: Config, further: Iterable[Path] = ()) -> dict[str, Path]:
    """Name of the part, or path of a further file -> file, of all code of the user's own that a run uses."""
    found = {name: file for name in part_names(config) if (file := source_file(name)) is not None}
    return found | {str(path): path for path in further}


def read_environment(run_dir: Path) -> dict[str, Any]:
    """environment.json; {} of a run of a version that did not write it.

    Raises:
      ValueError: it is damaged; names the file.
    """
    path = run_dir / "environment.json"
    found = read_json(path)
    files, resolved = found.get("files", {}), found.get("resolved", {})
    try:
        texts = [entry[name] for entry in files.values() for name in ("file", "sha256", "copy")]
        texts += [text for written, now in resolved.values() for text in (written, now)]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged at 'files' or 'resolved'; put it back from a copy, or remove it") from e
    return found


def _paths(config: Config) -> dict[str, str]:
    """Field -> path, of the fields that hold the path of something that is there, relative to the current folder."""
    data = {f"data.{name}": getattr(config.data, name) for name in ("root", "duplicates", "manifest")}
    found = data | {"model.weights": config.model.weights or ""}
    return {name: path for name, path in found.items() if path and not Path(path).is_absolute() and Path(path).exists()}


def located(config: Config, run_dir: Path) -> Config:
    """The configuration with relative paths that lead nowhere from here as they led when the run was trained."""
    resolved = read_environment(run_dir).get("resolved", {})
    for field, (written, path) in resolved.items():
        section, name = field.split(".")
        part = getattr(config, section)
        if getattr(part, name) == written and not Path(written).exists() and Path(path).exists():
            config = dataclasses.replace(config, **{section: dataclasses.replace(part, **{name: path})})
    return config


def check_unchanged(config: Config, run_dir: Path) -> None:
    """Refuses to go on with a run whose parts of one's own have changed: half of it would be of either code.

    Raises:
      ValueError: names the file, and where the run's own copy is.
    """
    files = read_environment(run_dir).get("files", {})
    for name, path in own_files(config).items():
        entry = files.get(name)
        if entry is not None and path.is_file() and checksum(path, "sha256") != entry["sha256"]:
            raise ValueError(
                f"{path} has changed since the run in {run_dir} began; expected it as it was, of which "
                f"{run_dir / entry['copy']} is a copy, or another run_dir for a new run"
            )


def record(run_dir: Path, run_id: str, config: Config, further: Iterable[Path] = ()) -> str:
    """Writes environment.json, or adds this session to it, and copies the user's files into code/: those of the
    configuration's parts, and `further` ones. Returns the run's id."""
    old = read_environment(run_dir)
    known = old.get("files", {})
    for name, path in own_files(config, further).items():
        digest = checksum(path, "sha256")
        if name in known and known[name]["sha256"] == digest:
            continue
        # By its digest's folder, so that the file keeps its name: parameters may be called by it.
        copy = Path("code") / digest[:12] / path.name
        (run_dir / copy.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, run_dir / copy)
        known[name] = {"file": str(path.resolve()), "sha256": digest, "copy": copy.as_posix()}
    resolved = {field: [path, str(Path(path).resolve())] for field, path in _paths(config).items()}
    found = {
        "run_id": old.get("run_id", run_id),
        "files": known,
        "resolved": old.get("resolved", {}) | resolved,
        "sessions": [*old.get("sessions", []), session()],
    }
    write_text(run_dir / "environment.json", json.dumps(found, indent=2))
    _vouch(found)
    return found["run_id"]


def _vouchers() -> Path:
    return cache_folder() / "own_runs"


def _voucher(environment: dict[str, Any]) -> str:
    """What tells a run and the code it uses from any other."""
    parts = {name: entry["sha256"] for name, entry in environment.get("files", {}).items()}
    return hashlib.sha256(json.dumps([environment.get("run_id"), parts], sort_keys=True).encode()).hexdigest()


def _vouch(environment: dict[str, Any]) -> None:
    """Notes in this user's cache that the run is the user's own."""
    folder = _vouchers()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / _voucher(environment)).touch(mode=0o600)


def downloads() -> Path:
    """Where runs that others have made are kept, once downloaded."""
    return cache_folder() / "downloaded_runs"


def check_trust(config: Config, run_dir: Path) -> None:
    """Refuses a run that names code, unless this user made it: a folder from elsewhere must not run what it likes.

    A downloaded run is refused whoever made it: its id is known to all who may read it, so that it vouches for nothing.
    For the same reason a file that the configuration names has to be among those recorded, whose checksums are vouched.

    Raises:
      PermissionError: it names parts of one's own, and this user did not train it here.
    """
    names = [name for name in part_names(config) if not name.startswith("optax:")]
    environment = read_environment(run_dir)
    voucher, recorded = _vouchers() / _voucher(environment), environment.get("files", {})
    here = not run_dir.resolve().is_relative_to(downloads().resolve()) and voucher.is_file()
    here = here and all(name in recorded for name in names if file_and_attribute(name))
    if names and not (here and (not hasattr(os, "getuid") or voucher.stat().st_uid == os.getuid())):
        raise PermissionError(
            f"{run_dir} runs code of its own ({', '.join(names)}), and you did not train it here; expected --trust "
            "(from Python: trust=True), once you have read that code"
        )


def as_recorded(config: Config, run_dir: Path) -> Config:
    """The configuration with each part of one's own as the run had it: its own copy, where the file has changed since
    or is not there any more; says so."""
    files = read_environment(run_dir).get("files", {})
    copies: dict[str, str] = {}
    for name in part_names(config):
        entry = files.get(name)
        if entry is None:
            continue
        now = source_file(name)
        if now is not None and now.is_file() and checksum(now, "sha256") == entry["sha256"]:
            continue
        if now is None or not now.is_file():  # seen from another folder, perhaps
            now = Path(entry["file"])
        found = file_and_attribute(name)
        attribute = found[1] if found is not None else name.partition(":")[2]
        if now.is_file() and checksum(now, "sha256") == entry["sha256"]:
            copies[name] = f"{now}:{attribute}" if attribute else str(now)
            continue
        copy = run_dir / entry["copy"]
        if not copy.resolve().is_relative_to((run_dir / "code").resolve()):
            raise ValueError(
                f"{run_dir / 'environment.json'}: the copy of {name} is {entry['copy']!r}; expected in code/"
            )
        if not copy.is_file() or checksum(copy, "sha256") != entry["sha256"]:
            raise ValueError(f"{copy} is not as the run recorded it, and {entry['file']} has changed; expected either")
        why = "is not there any more" if not now.is_file() else "has changed since the run was trained"
        log.warning("%s %s; the run's own copy is used: %s", entry["file"], why, copy)
        copies[name] = f"{copy}:{attribute}" if attribute else str(copy)
    return _renamed(config, copies) if copies else config


def _renamed(config: Config, names: dict[str, str]) -> Config:
    def new(name: str) -> str:
        return names.get(name, name)

    model, replace = config.model, dataclasses.replace
    attention = "+".join(new(part) for part in model.attention.split("+"))
    head = replace(model.head, name=new(model.head.name))
    return replace(
        config,
        model=replace(model, attention=attention, backbone=new(model.backbone), head=head),
        data=replace(config.data, source=new(config.data.source)),
        optim=replace(config.optim, name=new(config.optim.name)),
        augment=replace(config.augment, extra=tuple(map(new, config.augment.extra))),
        train=replace(config.train, loss=new(config.train.loss), metrics=tuple(map(new, config.train.metrics))),
    )
