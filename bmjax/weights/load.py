"""Finds, reads and merges weights by name or path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.backbones import create_backbone, family_of
from bmjax.files import checksum, reading
from bmjax.registry import unknown
from bmjax.weights import catalog, download, fine_tuned, keras_files, keras_match, safetensors_files, timm, torch_files
from bmjax.weights.fine_tuned import Head
from bmjax.weights.merge import merge
from bmjax.weights.network import Tree, classes_of, network, network_shapes, top_layers
from bmjax.weights.record import WeightRecord

_NAMES = {"imagenet": "keras", "imagenet-timm": "timm"}


def _named(backbone: str, weights: str, include_top: bool) -> WeightRecord | Path:
    """The catalog's record of that name, or the path of a file that is there."""
    by_name = {record.name: record for record in catalog.RECORDS}
    if weights in _NAMES:
        return catalog.find(backbone, include_top, _NAMES[weights])
    if weights in by_name:
        return _suitable(by_name[weights], backbone, weights)
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if weights == "none":
        raise ValueError("weights are 'none'; expected imagenet, imagenet-timm, a record's name or the path of a file")
    if path.suffix:
        raise FileNotFoundError(f"{path}: no such weight file")
    raise unknown("weights (a name, or the path of a file)", weights, [*_NAMES, "none", *by_name])


def _suitable(record: WeightRecord, backbone: str, origin: str) -> WeightRecord:
    if record.backbone != backbone:
        raise ValueError(f"{origin}: weights of {record.backbone}; expected those of {backbone}")
    return record


def find_record(backbone: str, weights: str) -> WeightRecord:
    """The record of the weights named. Fetches nothing.

    Raises:
      FileNotFoundError: no file at that path.
      ValueError: neither a known name nor a whole file of a known kind, or weights of another backbone.
    """
    found = _named(backbone, weights, include_top=False)
    return read(found, backbone)[0] if isinstance(found, Path) else found


def read(
    path: Path, backbone: str, record: WeightRecord | None = None, *, head: Head = "drop"
) -> tuple[WeightRecord, dict[str, Tree]]:
    """A file's record and the {"params", "batch_stats"} of the record's network, on the host, every leaf matched.

    Without `record` it is the file's own where it is a ported one, the catalog's where the bytes are those, or else
    what the rule of the family and the source says. Of a fine-tuned model the base is taken, and `head` says what
    becomes of the rest.

    Raises:
      ValueError: no known backbone, no weight file of a known kind, damaged, of another backbone, or not the network's
        leaf by leaf; names file and leaf.
    """
    family_of(backbone)  # an unknown one is no fault of the file
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\x03\x04") and torch_files.is_zip_format(path):
        return _read_timm(path, backbone, record, torch_files.read(path), head)
    if start.startswith((b"\x89HDF", b"PK\x03\x04")):
        with reading(path, "Keras weight file"):
            return _read_keras(path, backbone, record, head)
    if start.endswith(b"{") and len(start) == 9:  # eight bytes of length, then JSON
        with reading(path, "safetensors file"):
            return _read_safetensors(path, backbone, record, head)
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise ValueError(f"{path}: {torch_files.OLD_FORMAT}")
    raise ValueError(
        f"{path}: no weight file; expected HDF5 or a .keras archive of Keras, safetensors, or a state dict of torch"
    )


def _read_keras(
    path: Path, backbone: str, record: WeightRecord | None, head: Head
) -> tuple[WeightRecord, dict[str, Tree]]:
    layers, changes = keras_files.read_model(path)
    if record is None:
        found = f"md5:{checksum(path, 'md5')}"
        record = next((_suitable(r, backbone, str(path)) for r in catalog.RECORDS if r.checksum == found), None)
    rule = record or catalog.unpublished(backbone, "keras", path.name, top=True)
    ours = [layer for layer in layers if not keras_match.is_unused(layer, rule.unused)]
    shapes, order = network_shapes(network(dataclasses.replace(rule, top=True)))
    parts = fine_tuned.parts_of(path, ours, shapes, order, head)
    within = parts.base[0].model if parts.base else ""
    fine_tuned.warn_of_changes(path, changes, within, has_own=bool(rule.unused))
    classes = None if parts.top is None else parts.top.arrays["kernel"].shape[1]
    if record is None:
        record = dataclasses.replace(rule, top=classes is not None)
        of_base = [layer for layer in layers if not parts.base or layer.model == within]
        if (mode := keras_match.preprocess_within(path, of_base)) is not None:
            record = dataclasses.replace(record, preprocess=mode)
    shapes, order = network_shapes(network(record, classes or 1000))
    matched, _ = keras_match.match(parts.base, shapes, order)
    try:
        return _counted(record, shapes), merge(shapes, keras_match.to_variables(matched, parts.base, shapes), str(path))
    except ValueError as e:
        if (member := fine_tuned.member_of(parts.base)) not in (None, backbone):
            raise ValueError(
                f"{path}: this is {_title(member)}; the backbone is {backbone}. Expected a file of {backbone}, or the "
                f"backbone {member} ({e})"
            ) from e
        raise


def _read_safetensors(
    path: Path, backbone: str, record: WeightRecord | None, head: Head
) -> tuple[WeightRecord, dict[str, Tree]]:
    tensors, own = safetensors_files.read(path)
    if own is not None:
        _suitable(own, backbone, str(path))
        source = safetensors_files.to_variables(path, tensors, own)
        shapes, _ = network_shapes(network(own, classes_of(source)))
        return own, merge(shapes, source, str(path))
    return _read_timm(path, backbone, record, tensors, head)


def _read_timm(
    path: Path, backbone: str, record: WeightRecord | None, tensors: dict[str, np.ndarray], head: Head
) -> tuple[WeightRecord, dict[str, Tree]]:
    unused = catalog.rule(backbone, "timm")["unused"]
    tensors = {key: array for key, array in tensors.items() if key.rsplit(".", 1)[-1] not in unused}
    whole = network(record or catalog.unpublished(backbone, "timm", path.name, top=True))
    tensors = timm.base_of(path, tensors, backbone, whole, network_shapes(whole)[1], head)
    classes = next((array.shape[0] for array in tensors.values() if array.ndim == 2), None)
    if record is None:
        record = catalog.unpublished(backbone, "timm", path.name, top=classes is not None)
    model = network(record, classes or 1000)
    shapes, _ = network_shapes(model)
    return _counted(record, shapes), merge(shapes, timm.to_variables(tensors, backbone, model, shapes), str(path))


def _title(backbone: str) -> str:
    """`densenet169` -> `DenseNet169`."""
    kind = type(create_backbone(backbone)).__name__
    return kind + backbone.replace("_", "").removeprefix(kind.lower()).upper()


def _counted(record: WeightRecord, shapes: dict[str, Tree]) -> WeightRecord:
    """The record with the exact number of values, where the catalog hasn't told it."""
    if record.parameters:
        return record
    return dataclasses.replace(record, parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)))


def load(backbone: str, weights: str, include_top: bool = False) -> tuple[WeightRecord, dict[str, Tree]]:
    """As `read`, of the weights named; fetched if need be.

    Raises:
      FileNotFoundError, ValueError: as `find_record` and `read`; ValueError too where there is no top to include.
      ConnectionError: the file can't be downloaded.
    """
    found = _named(backbone, weights, include_top)
    if isinstance(found, Path):
        record, variables = read(found, backbone)
    else:
        record, variables = read(download.fetch(found), backbone, found)
    if include_top and not record.top:
        raise ValueError(f"{weights}: the file has no layer of classes; expected one with top")
    return record, variables


def load_into(
    variables: dict[str, Tree],
    backbone: str,
    weights: str,
    *,
    include_top: bool = False,
    options: Mapping[str, Any] | None = None,
    preprocess: str | None = None,
) -> dict[str, Tree]:
    """A backbone's {"params", "batch_stats"} with every array replaced by the weights'; a top it hasn't is left out.

    `options` are the fields the backbone was made with and `preprocess` its input's mode; both are held to the record.

    Raises:
      FileNotFoundError, ValueError, ConnectionError: as `load`; ValueError too where a field of the backbone, or the
        preprocessing, isn't what the weights were made for.
    """
    record, loaded = load(backbone, weights, include_top)
    model, made_for = create_backbone(backbone, **(options or {})), network(record)
    for field in record.architecture:
        found, expected = getattr(model, field), getattr(made_for, field)
        if found != expected:
            raise ValueError(f"{weights}: {field} of {backbone} is {found!r}; the weights need {expected!r}")
    if preprocess is not None and preprocess != record.preprocess:
        raise ValueError(f"{weights}: preprocessing is {preprocess!r}; the weights need {record.preprocess!r}")
    if record.top and not include_top:
        params = {name: leaves for name, leaves in loaded["params"].items() if name not in top_layers(record)}
        loaded = loaded | {"params": params}
    return jax.tree.map(jnp.asarray, merge(variables, loaded, weights))
