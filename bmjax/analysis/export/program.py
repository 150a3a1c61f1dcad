"""What is exported: from uint8 images to calibrated probabilities as one function, and the facts that go with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.analysis.evaluate.calibration import Calibration
from bmjax.analysis.evaluate.judge import READING
from bmjax.attention import sown_maps
from bmjax.config.data import DataConfig
from bmjax.environment import version
from bmjax.files import printable
from bmjax.layers.dispatch import traced_for, with_forms
from bmjax.runs.folder import Run, image_dtype
from bmjax.training.steps import at_precision, with_features

FORMAT = "bmjax export 1"
TOLERANCE = 1e-4
"""By how much a probability of an exported model may differ from the run's own."""
_TINY = float(np.log(np.finfo(np.float32).tiny))


class Said(NamedTuple):
    """Of images [b, s, s, 3]: probabilities float32 [b, k]; the attention's map float32 [b, s, s]; and what the
    scores of strangeness are computed from (bmjax.analysis.evaluate.reference): energy [b], features [b, c] and maps
    [b, stages, 128]. The last two are None where they are not asked for, or no map is over places."""

    probs: jax.Array
    map: jax.Array | None = None
    inside: dict[str, jax.Array] | None = None


Classify = Callable[[jax.Array], Said]


def make_function(
    run: Run, calibration: Calibration | None = None, *, maps: bool = False, features: bool = False
) -> Classify:
    """images uint8 [b, s, s, 3], RGB -> `Said`, with the attention's map where `maps`, and what is inside where
    `features`.

    Preprocessing and calibration are inside. Of several maps it is the last module's.
    """
    variables = jax.tree.map(jnp.asarray, run.variables)
    dtype = image_dtype(run.config)

    @functools.partial(at_precision, precision=run.config.train.precision)
    def function(images: jax.Array) -> Said:
        inside, sown = None, {}
        if features:
            inside, kept = with_features(run.model, variables, images.astype(dtype))
            logits = inside.pop("logits")
            inside["energy"] = -jax.nn.logsumexp(logits, axis=-1)
            sown = sown_maps(kept) if maps else {}
        else:
            mutable = ["intermediates"] if maps else False
            out: Any = run.model.apply(variables, images.astype(dtype), train=False, mutable=mutable)
            logits, sown = (out[0], sown_maps(dict(out[1]))) if maps else (out, {})
        logs = jax.nn.log_softmax(logits.astype(jnp.float32))
        if calibration is not None:
            scale, shift = (jnp.asarray([v], jnp.float32) for v in (calibration.scale, calibration.shift))
            logs = jax.nn.log_softmax(jnp.maximum(logs, _TINY) * scale + shift)
        over_places = [m for _, m in sorted(sown.items()) if m.ndim == 3]
        if not over_places:
            return Said(jnp.exp(logs), inside=inside)
        over = jax.image.resize(over_places[-1].astype(jnp.float32), images.shape[:3], "bilinear")
        return Said(jnp.exp(logs), over, inside)

    return function


def mean_of(functions: Sequence[Classify]) -> Classify:
    """One function of several of `make_function`: the mean of their probabilities, all else as the first one's."""

    def function(images: jax.Array) -> Said:
        found = [each(images) for each in functions]
        total = found[0].probs
        for one in found[1:]:
            total = total + one.probs
        return found[0]._replace(probs=total / len(found))

    return functions[0] if len(functions) == 1 else function


def portable(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], jax.Array]:
    """The probabilities of a function of `make_function`, traced as XLA's own operations: the kernels for CPUs are
    custom calls and can't travel."""

    def traced(images: jax.Array) -> jax.Array:
        with traced_for("portable"), with_forms():
            return function(images).probs

    return traced


@dataclasses.dataclass(frozen=True)
class Facts:
    """What goes with an exported model: as `model.json` in a StableHLO file, as the metadata of an ONNX file.

    `reading`: how bmjax reads files into the images that are expected (size, stain, scale). `undecided_below`: the
    highest probability below which to say "don't know". `sha256`: of the program's bytes.
    """

    format: str
    bmjax: str
    jax: str
    run: str
    step: int
    backbone: str
    classes: tuple[str, ...]
    image_size: int
    input: str
    output: str
    calibration: str | None
    undecided_below: float
    reading: dict[str, Any]
    platforms: tuple[str, ...] = ()
    sha256: str = ""

    def data_config(self) -> DataConfig:
        """How files are read into images.

        Raises:
          TypeError, ValueError: `reading` is of another kind, or of another size than the images.
        """
        reading: dict[str, Any] = self.reading | {"stain_reference": tuple(self.reading["stain_reference"])}
        found = DataConfig(**reading)
        if found.image_size != self.image_size:
            raise ValueError(f"image_size is {self.image_size}, and {found.image_size} in reading")
        return found


def facts_of(run: Run, calibration: Calibration | None, undecided: float, others: Sequence[Run] = ()) -> Facts:
    """The facts of a run's program, or of the mean of its and others'. Names are as `printable` gives them: JSON
    elsewhere takes nothing but UTF-8.

    Raises:
      ValueError: another run reads files otherwise.
    """
    size, config = run.config.data.image_size, run.config
    for name in READING:
        for other in others:
            mine, its = (getattr(one.config.data, name) for one in (run, other))
            if its != mine:
                raise ValueError(
                    f"{other.run_dir}: config field 'data.{name}' is {its!r}; expected {mine!r}, as of {run.run_dir}, "
                    "for one program takes images read in one way"
                )
    names = [one.config.name for one in (run, *others)]
    backbones = dict.fromkeys(one.config.model.backbone for one in (run, *others))
    return Facts(
        format=FORMAT,
        bmjax=version(),
        jax=jax.__version__,
        run=printable(", ".join(names)),
        step=run.step,
        backbone=printable(", ".join(backbones)),
        classes=tuple(map(printable, run.classes)),
        image_size=size,
        input=f"uint8 [b, {size}, {size}, 3], RGB 0..255",
        output=f"float32 [b, {len(run.classes)}], probabilities",
        calibration=None if calibration is None else calibration.method,
        undecided_below=undecided,
        reading={name: getattr(config.data, name) for name in READING},
    )


def sample_images(size: int, n: int = 3) -> np.ndarray:
    """Images uint8 [n, size, size, 3] to compare programs on: a rendered cell, noise, and one colour."""
    from bmjax.data.sources.synthetic import render

    rng = np.random.default_rng(0)
    noise, plain = rng.integers(0, 256, (2, size, size, 3), np.uint8)
    plain[:] = (200, 180, 210)
    kinds = [render("NGS", size, 0, 0), noise, plain]
    return np.stack([kinds[i % 3] for i in range(n)])


def check_equal(found: np.ndarray, expected: np.ndarray, path: Path) -> float:
    """The largest difference of two arrays of probabilities.

    Raises:
      FloatingPointError: it is above `TOLERANCE`.
    """
    largest = float(np.abs(np.asarray(found, np.float64) - expected).max())
    if not largest <= TOLERANCE:
        raise FloatingPointError(
            f"{path}: probabilities differ from the run's own by {largest:.2g}; expected at most {TOLERANCE:g}"
        )
    return largest
