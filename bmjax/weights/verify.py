"""Proves a weight file against its record and, where Keras is installed, against Keras's own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.files import checksum
from bmjax.weights import keras_oracle
from bmjax.weights.load import read
from bmjax.weights.merge import check_leaves
from bmjax.weights.network import classes_of, network
from bmjax.weights.preprocess import preprocess
from bmjax.weights.record import WeightRecord

Tree = Any

TOLERANCE = 1e-4
"""Of the largest value of Keras's output."""


def verify(path: Path, backbone: str, record: WeightRecord | None = None, *, size: int | None = None) -> list[str]:
    """What was proven, a line each. `record`: the one to hold the file to; by default its own, or the catalog's.

    `size` of the test images in pixels; by default the record's.

    Raises:
      ValueError: the first thing that is wrong, by leaf and both shapes where it is one.
    """
    if record is not None and record.checksum.startswith(("md5:", "sha256:")):
        algorithm, _, expected = record.checksum.partition(":")
        if (found := checksum(path, algorithm)) != expected:
            raise ValueError(f"{path}: {algorithm} is {found}; expected {expected} ({record.name})")
    record, variables = read(path, backbone, record)
    leaves = jax.tree.leaves(variables)
    values = sum(leaf.size for leaf in leaves)
    if values != record.parameters:
        raise ValueError(f"{path}: {values:,} values; expected {record.parameters:,} ({record.name})")
    check_leaves(variables, str(path))
    lines = [f"record: {record.name}, {record.backbone}, {record.source}, preprocessing {record.preprocess}"]
    lines.append(f"checksum: {record.checksum or 'none known; sha256:' + checksum(path, 'sha256')}")
    lines.append(f"names and shapes: all {len(leaves)} leaves, {values:,} values")
    lines.append("values: finite, variances not negative, no kernel constant")
    return [*lines, f"output: {compare_with_keras(path, record, variables, size or record.input_size)}"]


def compare_with_keras(path: Path, record: WeightRecord, variables: dict[str, Tree], size: int) -> str:
    """Logits, or features without top, of two test images against Keras's own model holding these weights.

    Keras reads its own files itself; a ported file's arrays are given to it.

    Raises:
      ValueError: they differ by more than `TOLERANCE`.
    """
    if (reason := keras_oracle.why_not(record.backbone, record.source)) is not None:
        return f"not compared with Keras: {reason}"
    import keras

    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.float32)
    inputs = np.asarray(preprocess(jnp.asarray(images), record.preprocess))
    classes = classes_of(variables) if record.top else None
    ours = np.asarray(jax.jit(network(record, classes or 1000).apply)(variables, inputs))
    keras_model, is_ported = keras_oracle.build(record.backbone, size, classes), record.checksum.startswith("leaves:")
    theirs = keras_oracle.output(keras_model, inputs, variables if is_ported else path)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not error <= TOLERANCE:
        raise ValueError(
            f"{path}: the output is {error:.1e} of its largest value from Keras's; expected {TOLERANCE:.0e}"
        )
    kind = "features" if classes is None else "logits"
    how = "given to Keras" if is_ported else "as Keras reads it"
    return f"{kind} of 2 images of {size} pixels within {error:.1e} of Keras {keras.__version__}'s, the file {how}"
