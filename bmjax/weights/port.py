"""Turns a weight file into safetensors that carry their record."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bmjax.files import checksum
from bmjax.registry import unknown
from bmjax.weights import safetensors_files
from bmjax.weights.fine_tuned import Head
from bmjax.weights.load import read
from bmjax.weights.merge import check_leaves
from bmjax.weights.preprocess import MODES
from bmjax.weights.record import WeightRecord


def backbone_of(path: Path) -> str | None:
    """The backbone of a ported file, by its record; None of other files, which don't tell."""
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return None
    record = safetensors_files.read(path)[1]
    return None if record is None else record.backbone


def port(
    path: Path,
    backbone: str,
    out: Path,
    record: WeightRecord | None = None,
    *,
    preprocess: str | None = None,
    head: Head = "drop",
) -> WeightRecord:
    """Writes a file's weights as safetensors that carry their record, which is returned.

    `preprocess` takes the place of the record's mode. `head` of a fine-tuned model: "drop" leaves it out, "keep" makes
    a single dense layer the network's top.

    Raises:
      ValueError: as `read` and `check_leaves`, or the mode isn't known.
    """
    record, variables = read(path, backbone, record, head=head)
    if preprocess is not None and preprocess not in MODES:
        raise unknown("preprocessing mode", preprocess, MODES)
    check_leaves(variables, str(path))
    origin = f"ported from {path.name}, sha256 {checksum(path, 'sha256')}"
    ported = dataclasses.replace(
        record,
        preprocess=preprocess or record.preprocess,
        checksum=safetensors_files.leaves_checksum(variables),
        url="",
        unused=(),
        origin=f"{record.origin}; {origin}" if record.origin else origin,
    )
    safetensors_files.write(out, variables, ported)
    return ported
