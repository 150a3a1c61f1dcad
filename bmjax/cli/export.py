"""`bmjax export`: a run's classifier as one file that runs without bmjax."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.cli.output import add_checkpoint, check_out
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
    p.add_argument("run_dir", metavar="run", help="folder of a run")
    p.add_argument("--format", choices=tuple(_NAMES), default="stablehlo", help="default: %(default)s")
    p.add_argument("--out", metavar="FILE", help="by default model.zip or model.onnx in the run's folder")
    p.add_argument("--uncalibrated", action="store_true", help="leave the kept calibration out")
    add_threshold(p)
    add_checkpoint(p)
    p.set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    check_threshold(options)
    out = Path(options.out or Path(options.run_dir) / _NAMES[options.format])
    suffix = Path(_NAMES[options.format]).suffix
    if out.suffix != suffix:
        raise ValueError(f"--out is {str(out)!r}; expected a name ending in {suffix} for {options.format}")
    check_out(out)
    if options.format == "onnx":
        from bmjax.analysis.export.onnx import check_extra

        check_extra()
    from bmjax.analysis.evaluate.undecided import kept_calibration, undecided_below
    from bmjax.analysis.export import program
    from bmjax.runs.folder import load_run

    found = load_run(options.run_dir, options.which, trust=options.trust)
    calibration = None if options.uncalibrated else kept_calibration(found)
    threshold = undecided_below(found, calibration, options.error_rate, options.undecided)
    began = time.monotonic()
    largest = write(found, calibration, program.facts_of(found, calibration, threshold), out)
    kind = "uncalibrated" if calibration is None else f"calibrated ({calibration.method})"
    print(
        f'{out}: {out.stat().st_size / 1e6:.1f} MB, {len(found.classes)} classes, {kind}, "don\'t know" below '
        f"{threshold:.3f}; largest difference from the run's own probabilities {largest:.1e} "
        f"({time.monotonic() - began:.0f} s)"
    )
    if found.config.data.stain != "none":
        log.warning("the run reads files with data.stain %s, which the model expects done", found.config.data.stain)
    return 0


def write(found: Any, calibration: Any, facts: Any, out: Path) -> float:
    """Writes the file by its name's ending, runs it, and returns the largest difference from the run's own."""
    import numpy as np

    from bmjax.analysis.export import program
    from bmjax.training.predict import predict_probs

    images = program.sample_images(facts.image_size)
    expected = predict_probs(found, images)
    if calibration is not None:
        expected = calibration(expected)
    function = program.portable(program.make_function(found, calibration))
    if out.suffix == ".onnx":
        from bmjax.analysis.export import onnx

        onnx.write_onnx(out, onnx.export_onnx(function, facts))
        return program.check_equal(onnx.onnx_session(out)(images), expected, out)
    import jax

    from bmjax.analysis.export import stablehlo

    stablehlo.write_stablehlo(out, *stablehlo.export_stablehlo(function, facts))
    return program.check_equal(np.asarray(jax.jit(stablehlo.read_stablehlo(out).function)(images)), expected, out)
