"""What answers: a run, with its attention's map, or an exported model, without one; one image at a time or a batch."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from bmjax.analysis.evaluate.calibration import Calibration
from bmjax.analysis.evaluate.judge import Judge
from bmjax.analysis.export.program import Facts, Said, facts_of, make_function, mean_of
from bmjax.analysis.export.stablehlo import read_stablehlo
from bmjax.analysis.serve.watch import Watch
from bmjax.data.images.cache import stained
from bmjax.data.images.decode import FORMATS, decode_image
from bmjax.layers.dispatch import prepare
from bmjax.runs.folder import Run

MAX_PIXELS = 25_000_000
"""Of an uploaded image, told by its header before anything is decoded."""


class Answer(NamedTuple):
    """`Said` of bmjax.analysis.export.program, of n images or of one, as NumPy's arrays."""

    probs: np.ndarray
    map: np.ndarray | None = None
    inside: dict[str, np.ndarray] | None = None

    def row(self, i: int) -> Answer:
        """Of one of the images."""
        return Answer(*jax.tree.map(lambda x: x[i], tuple(self)))


class Engine:
    """images uint8 [n, s, s, 3] -> `Answer`.

    Compiled for one image and for `batch` of them, when it is made. `watch`: tells images unlike those of training,
    where the run keeps what they look like.
    """

    def __init__(self, facts: Facts, function: Callable[[jax.Array], Any], batch: int, watch: Watch | None = None):
        self.watch = watch
        self.facts, self.batch, self._function = facts, batch, jax.jit(function)
        size = facts.image_size
        for n in {1, batch}:
            said = self._function(np.zeros((n, size, size, 3), np.uint8))
        self.has_maps = said.map is not None
        if watch is not None and said.inside is not None:
            one = Answer(*jax.tree.map(np.asarray, tuple(said))).row(0)
            watch.begin(one.probs, one.inside or {})

    def __call__(self, images: np.ndarray) -> Answer:
        n = len(images)
        # A few one by one: in a padded batch the padding would cost more.
        sizes = [1] * n if n <= self.batch // 4 else [self.batch] * -(-n // self.batch)
        parts, start = [], 0
        for size in sizes:
            rows = np.minimum(np.arange(start, start + size), n - 1)
            parts.append(tuple(self._function(images[rows])))
            start += size
        return Answer(*jax.tree.map(lambda *each: np.concatenate([np.asarray(x) for x in each])[:n], *parts))


def engine_of_runs(
    runs: Sequence[Run], calibrations: Sequence[Calibration | None], undecided: float, batch: int
) -> Engine:
    """Of a run, or of several as one, with bmjax's own operations for this platform and the map of the first one's
    attention, where it sows one.

    Raises:
      ValueError: the runs read files in different ways.
    """
    prepare()
    facts, reference = facts_of(runs[0], calibrations[0], undecided, runs[1:]), Judge(runs).reference()
    looks_inside = reference is not None and reference.has_features
    functions = [
        make_function(run, one, maps=run is runs[0], features=run is runs[0] and looks_inside)
        for run, one in zip(runs, calibrations, strict=True)
    ]
    return Engine(facts, mean_of(functions), batch, None if reference is None else Watch(reference, facts.image_size))


def engine_of_export(path: Path, batch: int) -> Engine:
    """Of a file of `bmjax export`; what its run was trained on is not in it, so nothing is held against that.

    Raises:
      ValueError: it is damaged, or none.
    """
    exported = read_stablehlo(path)
    return Engine(exported.facts, lambda images: Said(exported.function(images)), batch)


def read_upload(data: bytes, facts: Facts) -> np.ndarray:
    """An uploaded file as the model reads it: uint8 RGB [s, s, 3].

    Raises:
      ValueError: not an image of a known kind, damaged, or of too many pixels; says which.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header alone
            pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"far too many pixels; expected at most {MAX_PIXELS}") from e
    except Exception as e:  # over damaged bytes Pillow raises nearly anything
        raise ValueError("not an image of a known kind, or damaged") from e
    if pixels > MAX_PIXELS:
        raise ValueError(f"{pixels} pixels; expected at most {MAX_PIXELS}")
    config = facts.data_config()
    found = next(iter(stained([decode_image(data, config.image_size, config.field_pixels())], config)))
    if isinstance(found, str):
        raise ValueError(found)
    return found
