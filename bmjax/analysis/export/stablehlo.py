"""A program as StableHLO in a zip file, `model.stablehlo` and `model.json`, which jax alone can run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.export
import numpy as np

from bmjax.analysis.evaluate.judge import READING
from bmjax.analysis.export.program import FORMAT, Facts
from bmjax.files import printable, reading, write_bytes

PROGRAM, FACTS = "model.stablehlo", "model.json"
PLATFORMS = ("cpu", "cuda", "tpu")
_MOST = 1 << 31
"""Bytes that a program may have."""


def export_stablehlo(function: Callable[[jax.Array], jax.Array], facts: Facts) -> tuple[bytes, Facts]:
    """(the serialized program for any number of images and every platform, its facts with the checksum)."""
    size = facts.image_size
    shape = jax.export.symbolic_shape(f"b, {size}, {size}, 3")
    images = jax.ShapeDtypeStruct(shape, np.uint8)
    program = bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(images).serialize())
    return program, dataclasses.replace(facts, platforms=PLATFORMS, sha256=hashlib.sha256(program).hexdigest())


def write_stablehlo(path: Path, program: bytes, facts: Facts) -> None:
    """Writes the zip file whole or not at all."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(FACTS, json.dumps(dataclasses.asdict(facts), indent=2))
        archive.writestr(PROGRAM, program)
    write_bytes(path, buffer.getvalue())


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model read from its file: `images uint8 [b, s, s, 3] -> probabilities float32 [b, k]`."""

    facts: Facts
    function: Callable[[jax.Array], jax.Array]


def read_stablehlo(path: Path) -> Exported:
    """An exported model.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is damaged, or is no export of bmjax; names it.
    """
    with reading(path, f"export of bmjax (a zip file of {FACTS} and {PROGRAM})"), zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if set(infos) != {FACTS, PROGRAM}:
            raise ValueError(f"it holds {', '.join(sorted(infos))[:200] or 'nothing'}")
        if infos[FACTS].file_size > 1 << 24 or infos[PROGRAM].file_size > _MOST:
            raise ValueError("it unpacks to far too much")
        raw = json.loads(archive.read(FACTS))
        program = archive.read(PROGRAM)
        facts = _facts(raw)
        if hashlib.sha256(program).hexdigest() != facts.sha256:
            raise ValueError(f"{PROGRAM} is not what {FACTS} says: its checksum differs")
        exported = jax.export.deserialize(bytearray(program))
        shapes = [(str(a.dtype), a.shape[1:]) for a in (*exported.in_avals, *exported.out_avals)]
        size = facts.image_size
        # Other calls leave the program for code of the process, with arguments that the file chooses.
        if calls := re.findall(r"custom_call(?! @shape_assertion\()[^\n]{,60}", exported.mlir_module()):
            raise ValueError(f"its program calls other code: {calls[0].strip()}")
        if shapes != [("uint8", (size, size, 3)), ("float32", (len(facts.classes),))]:
            raise ValueError(f"its program is from and to {shapes}; expected images and probabilities")
    return Exported(facts, exported.call)


def _facts(raw: object) -> Facts:
    """Facts of JSON's object.

    Raises:
      ValueError: one is missing or of another kind.
    """
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"its format is {str(raw.get('format') if isinstance(raw, dict) else raw)[:60]!r}")
    fields = {f.name: raw.get(f.name) for f in dataclasses.fields(Facts)}
    fields |= {name: printable(value) for name, value in fields.items() if isinstance(value, str)}
    classes, below, size = fields["classes"], fields["undecided_below"], fields["image_size"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"its classes are {str(classes)[:60]}; expected names")
    read = fields["reading"]
    if not isinstance(below, (int, float)) or not isinstance(size, int) or set(read or ()) != set(READING):
        raise ValueError("undecided_below, image_size or reading is not as expected")
    found = Facts(**fields | {"classes": tuple(map(printable, classes)), "platforms": tuple(fields["platforms"] or ())})  # type: ignore[arg-type]
    found.data_config()
    return found
