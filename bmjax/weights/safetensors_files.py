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

from bmjax.weights.record import WeightRecord, record_from_dict, record_to_dict

Tree = Any

_KEY = "bmjax"
_FORMAT = 1


def read(path: Path) -> tuple[dict[str, np.ndarray], WeightRecord | None]:
    """Every tensor by its name, and the record where the file is a ported one.

    Raises:
      ValueError: not a whole safetensors file, of a type that NumPy hasn't (bfloat16), or with an unreadable record;
        names the file.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not a readable safetensors file, or truncated: {e}") from e
    if _KEY not in metadata:
        return tensors, None
    try:
        content = json.loads(metadata[_KEY])
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}; this version reads {_FORMAT}")
        return tensors, record_from_dict(content["record"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: the record within can't be read: {e}") from e


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
    metadata = {_KEY: json.dumps({"format": _FORMAT, "record": record_to_dict(record)})}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.numpy.save_file(tensors, temporary, metadata)
    os.replace(temporary, path)
