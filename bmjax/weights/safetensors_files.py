"""safetensors files, and what is ours in them: leaves by path, with the weights' record as metadata."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from bmjax.files import reading
from bmjax.weights.record import WeightRecord, record_from_dict, record_to_dict

Tree = Any

_KEY = "bmjax"
_FORMAT = 1
_HEADER = 50_000_000
"""Bytes; names, types and places of 10,000 tensors take 1,000,000."""


def read(path: Path) -> tuple[dict[str, np.ndarray], WeightRecord | None]:
    """Every tensor by its name, and the record where the file is a ported one.

    Raises:
      ValueError: not a whole safetensors file, of a type that the library doesn't read, or with an unreadable record;
        names the file.
    """
    with reading(path, "safetensors file"):
        _check_length(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    if _KEY not in metadata:
        return tensors, None
    try:
        content = json.loads(metadata[_KEY])
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}; this version reads {_FORMAT}")
        found = _digest(content["record"])
        if content.get("sha256", found) != found:  # files of before 0.3 have none
            raise ValueError(f"sha256 of the record is {found}; the file says {content['sha256']}")
        return tensors, record_from_dict(content["record"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: the record within can't be read: {e}") from e


def _check_length(path: Path) -> None:
    with path.open("rb") as file:
        length, there = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if length > min(_HEADER, there - 8):
        raise ValueError(
            f"{path}: a header of {length} bytes in a file of {there}; expected at most {_HEADER}, within the file. "
            "It is truncated or damaged"
        )


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def leaves_checksum(variables: dict[str, Tree]) -> str:
    """`leaves:<hex>`: sha256 over the names, types, shapes and bytes of all leaves, in the order of the names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(traverse_util.flatten_dict(variables, sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return f"leaves:{digest.hexdigest()}"


def to_variables(path: Path, tensors: dict[str, np.ndarray], record: WeightRecord) -> dict[str, Tree]:
    """{"params", "batch_stats"} of a ported file.

    Raises:
      ValueError: the arrays aren't those that were written; names the file.
    """
    variables = {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(tensors, sep="/")
    found = leaves_checksum(variables)
    if found != record.checksum:
        raise ValueError(f"{path}: the arrays' checksum is {found}; its record says {record.checksum}")
    return variables


def write(path: Path, variables: dict[str, Tree], record: WeightRecord) -> None:
    """Writes a ported file, whole or not at all: leaves `params/<layer>/<leaf>`, `batch_stats/<layer>/<leaf>`."""
    flat = traverse_util.flatten_dict(variables, sep="/")
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    content = json.loads(json.dumps(record_to_dict(record)))
    metadata = {_KEY: json.dumps({"format": _FORMAT, "record": content, "sha256": _digest(content)})}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.numpy.save_file(tensors, temporary, metadata)
    os.replace(temporary, path)
