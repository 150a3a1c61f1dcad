"""Below which probability a single answer is "don't know": what `differential`, `export` and `serve` share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bmjax.analysis.evaluate.calibration import FILE, Calibration, read_calibration
from bmjax.analysis.evaluate.judge import Judge
from bmjax.runs.folder import Run

UNDECIDED = 0.5
"""The highest probability below which a cell is undecided, where no error rate is asked for."""


def kept_calibration(run: Run) -> Calibration | None:
    """The calibration that the run keeps; None where it keeps none.

    Raises:
      ValueError: it is damaged, or of another checkpoint.
    """
    return read_calibration(run.run_dir, len(run.classes), run.step) if (run.run_dir / FILE).is_file() else None


def kept_calibrations(runs: Sequence[Run]) -> tuple[Calibration | None, ...]:
    """The calibration that each run keeps; None where it keeps none.

    Raises:
      ValueError: as `kept_calibration`, or some runs keep one and others don't.
    """
    found = tuple(map(kept_calibration, runs))
    without = [run for run, one in zip(runs, found, strict=True) if one is None]
    if 0 < len(without) < len(runs):
        raise ValueError(
            f"{without[0].run_dir} keeps no calibration, and other runs do; expected one of each: "
            f"`{without[0].command('--calibrate temperature')}` writes it"
        )
    return found


def undecided_below(
    runs: Sequence[Run], calibrations: Sequence[Calibration | None], rate: float | None, undecided: float | None
) -> float:
    """The highest probability below which the answer is "don't know": for a wanted error rate by the validation
    predictions (`refusal`), else as given, else `UNDECIDED`.

    Raises:
      ValueError: no threshold is known to keep that rate, or validation was not evaluated by these checkpoints.
    """
    if rate is None:
        return UNDECIDED if undecided is None else undecided
    found = Judge(runs, calibrated=calibrations[0] is not None).refusal(rate)
    if not np.isfinite(found.threshold):
        raise ValueError(
            f"--error-rate is {rate}, and {found.n} validation images show no threshold that keeps it; expected a "
            "higher rate, or --undecided P"
        )
    return found.threshold
