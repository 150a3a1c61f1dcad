"""An exported model against bmjax's own prediction on this CPU: the same probabilities, and how many images a second.

    python tools/bench/bench_export.py RUN [--batch 8] [--rounds 5]

Exports the run as StableHLO and, where the extra `export` is installed, as ONNX, then takes turns: ONNX Runtime, jax on
the StableHLO, and bmjax's own prediction. Prints the rows of docs/export.md: size, seconds to export, the largest
difference of a probability, and images a second, median and range over the rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.analysis.evaluate.undecided import UNDECIDED, kept_calibration
from bmjax.analysis.export import program
from bmjax.analysis.export.stablehlo import read_stablehlo
from bmjax.cli.export import write
from bmjax.runs.folder import Run, load_run
from bmjax.training.predict import Predictor, predict_probs

Ways = dict[str, tuple[str, Callable[[np.ndarray], Any]]]


def exported(run: Run, folder: Path) -> Ways:
    """By name: (what was exported, the function of images that runs it)."""
    calibration = kept_calibration(run)
    facts = program.facts_of(run, calibration, UNDECIDED)
    ways: Ways = {}
    names = ("model.zip", "model.onnx") if importlib.util.find_spec("jax2onnx") else ("model.zip",)
    for name in names:
        path, began = folder / name, time.monotonic()
        largest = write([run], [calibration], facts, path)
        what = f"{path.stat().st_size / 1e6:.1f} MB | {time.monotonic() - began:.0f} s | {largest:.1e}"
        if path.suffix == ".onnx":
            from bmjax.analysis.export.onnx import onnx_session

            ways["ONNX, ONNX Runtime"] = what, onnx_session(path)
        else:
            ways["StableHLO, jax"] = what, jax.jit(read_stablehlo(path).function)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    run = load_run(options.run)
    images = program.sample_images(run.config.data.image_size, options.batch)
    predictor = Predictor(run.config, run.model)
    with tempfile.TemporaryDirectory() as folder:
        ways = exported(run, Path(folder)) | {"bmjax's own": (" | | ", lambda x: predict_probs(run, x, predictor))}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, (_, function) in ways.items():
                began = time.monotonic()
                np.asarray(function(images))
                if turn:  # the first compiles
                    seconds[name].append(time.monotonic() - began)
    print(f"{run.config.model.backbone}, {images.shape[1]} px, batches of {options.batch}, {os.cpu_count()} CPUs\n")
    print("| | file | export | largest difference | images/s, median | range |\n|---|---|---|---|---|---|")
    for name, (what, _) in ways.items():
        rates = sorted(options.batch / s for s in seconds[name])
        print(f"| {name} | {what} | {statistics.median(rates):.1f} | {rates[0]:.1f} to {rates[-1]:.1f} |")


if __name__ == "__main__":
    main()
