"""`bmjax export`: a run's classifier as one file that runs without bmjax."""

from __future__ import annotations

import argparse
import logging
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.cli.output import add_checkpoint, check_out, run_at
from bmjax.cli.reading import add_threshold, check_threshold

_NAMES = {"stablehlo": "model.zip", "onnx": "model.onnx"}
log = logging.getLogger(__name__)


def add_parser(verbs: Any) -> None:
    """Adds `export` to a parser's verbs."""
    p = verbs.add_parser(
        "export",
        help="write a run's classifier as one file that runs without bmjax",
        description="Images uint8 [b, size, size, 3] in, probabilities [b, classes] out, preprocessing and the kept "
        "calibration inside. The file is run once and held to the run's own probabilities before it is reported.",
    )
    p.add_argument("run_dirs", metavar="run", nargs="+", help="folder of a run; several are one classifier, their mean")
    p.add_argument("--format", choices=tuple(_NAMES), default="stablehlo", help="default: %(default)s")
    p.add_argument("--out", metavar="FILE", help="by default model.zip or model.onnx in the run's folder")
    p.add_argument("--uncalibrated", action="store_true", help="leave the kept calibration out")
    add_threshold(p)
    add_checkpoint(p)
    p.set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    check_threshold(options)
    folders = [run_at(run_dir) for run_dir in options.run_dirs]
    out = Path(options.out or folders[0] / _NAMES[options.format])
    suffix = Path(_NAMES[options.format]).suffix
    if out.suffix != suffix:
        raise ValueError(f"--out is {str(out)!r}; expected a name ending in {suffix} for {options.format}")
    check_out(out)
    _check_replaced(out)
    if options.format == "onnx":
        from bmjax.analysis.export.onnx import check_extra

        check_extra()
    from bmjax.analysis.evaluate.judge import same_classes
    from bmjax.analysis.evaluate.undecided import kept_calibrations, undecided_below
    from bmjax.analysis.export import program
    from bmjax.runs.folder import load_run

    runs = [load_run(run_dir, options.which, trust=options.trust) for run_dir in folders]
    classes = same_classes(runs)
    calibrations = (None,) * len(runs) if options.uncalibrated else kept_calibrations(runs)
    threshold = undecided_below(runs, calibrations, options.error_rate, options.undecided)
    facts = program.facts_of(runs[0], calibrations[0], threshold, runs[1:])
    began = time.monotonic()
    largest = write(runs, calibrations, facts, out)
    kind = "uncalibrated" if calibrations[0] is None else f"calibrated ({calibrations[0].method})"
    print(
        f'{out}: {out.stat().st_size / 1e6:.1f} MB, {len(classes)} classes, {kind}, "don\'t know" below '
        f"{threshold:.3f}; largest difference from the run's own probabilities {largest:.1e} "
        f"({time.monotonic() - began:.0f} s)"
    )
    data = runs[0].config.data
    if data.stain != "none":
        log.warning("the run reads files with data.stain %s, which the model expects done", data.stain)
    if data.match_colours:
        log.warning("the run was trained on laboratories in the colours of all (data.match_colours), which the model "
                    "expects of others, too")  # fmt: skip
    if data.field_size and data.pixel_size:
        log.warning(
            "the model expects the middle %.0f pixels of files of %g micrometres to a pixel (data.field_size %g), "
            "resized to %d pixels: a whole image has another scale",
            data.field_size / data.pixel_size, data.pixel_size, data.field_size, data.image_size,
        )  # fmt: skip
    return 0


def _check_replaced(out: Path) -> None:
    """Refuses to replace a zip file that is no model of `bmjax export`, such as an archive of cells.

    Raises:
      FileExistsError: it is none.
    """
    if out.suffix != ".zip" or not out.exists():
        return
    from bmjax.analysis.export.stablehlo import FACTS, PROGRAM

    try:
        with zipfile.ZipFile(out) as archive:
            held = set(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        held = set[str]()
    if held != {FACTS, PROGRAM}:
        raise FileExistsError(
            f"--out is {str(out)!r}, a file that is no model of `bmjax export`; expected another name, or remove it"
        )


def write(runs: Sequence[Any], calibrations: Sequence[Any], facts: Any, out: Path) -> float:
    """Writes the file by its name's ending, runs it, and returns the largest difference from the run's own."""
    import numpy as np

    from bmjax.analysis.export import program
    from bmjax.training.predict import predict_probs

    images = program.sample_images(facts.image_size)
    pairs = list(zip(runs, calibrations, strict=True))
    each = [predict_probs(run, images) if one is None else one(predict_probs(run, images)) for run, one in pairs]
    expected = np.mean(each, axis=0)
    function = program.portable(program.mean_of([program.make_function(run, one) for run, one in pairs]))
    if out.suffix == ".onnx":
        from bmjax.analysis.export import onnx

        onnx.write_onnx(out, onnx.export_onnx(function, facts))
        return program.check_equal(onnx.onnx_session(out)(images), expected, out)
    import jax

    from bmjax.analysis.export import stablehlo

    stablehlo.write_stablehlo(out, *stablehlo.export_stablehlo(function, facts))
    return program.check_equal(np.asarray(jax.jit(stablehlo.read_stablehlo(out).function)(images)), expected, out)
