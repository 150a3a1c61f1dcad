"""What `bmjax predict` adds to probabilities: answers and sets at a wanted error rate, and a word on foreign images."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from bmjax.analysis.evaluate.judge import Judge
    from bmjax.analysis.evaluate.reader import Seen
    from bmjax.data.images.colours import ColourMap
    from bmjax.runs.folder import Run

log = logging.getLogger(__name__)


def read_as_each(runs: Sequence[Run], paths: Sequence[str | Path]) -> list[list[Any]]:
    """The files as each run reads them: images uint8 [s, s, 3], or the reason why one can't be read by all runs: runs
    of other sizes or scales may refuse what others read."""
    from bmjax.analysis.evaluate.judge import elsewhere
    from bmjax.data.load import read_files

    read: dict[Any, list[Any]] = {}
    for run in runs:
        key = elsewhere(run.config.data)
        if key not in read:
            read[key] = list(read_files(paths, run.config.data))
    for i in range(len(paths)):
        reasons = [part[i] for part in read.values() if isinstance(part[i], str)]
        if reasons:
            for part in read.values():
                part[i] = reasons[0]
    return [read[elsewhere(run.config.data)] for run in runs]


def adapt(judge: Judge, paths: Sequence[str], options: argparse.Namespace) -> None:
    """Adapts colours, the runs' norms and the classes' frequencies, as asked for, to the files, or to 2,048 of them.

    Raises:
      ValueError: too few of them can be read.
    """
    import numpy as np

    from bmjax.analysis.evaluate.judge import TO_ADAPT
    from bmjax.data.batches import evenly

    chosen = [str(paths[int(i)]) for i in evenly(len(paths), TO_ADAPT)]
    read = read_as_each(judge.runs, chosen)
    good = [i for i in range(len(chosen)) if not isinstance(read[0][i], str)]
    least = 2 if options.adapt or options.adapt_prior else 1
    if len(good) < least:
        raise ValueError(f"{len(good)} images can be read; expected at least {least} to adapt to")
    images = [np.stack([part[i] for i in good]) for part in read]
    if options.match_colours:
        say_colours(judge, judge.match_colours(images))
    if options.adapt:
        judge.adapt(images)
    if options.adapt_prior:
        found = judge.adapt_priors(judge.images(images).probs)
        shares = ", ".join(f"{name} {100 * p:.1f} %" for name, p in zip(judge.classes, found, strict=True))
        print(f"frequencies estimated by {len(good)} images: {shares}")


def say_colours(judge: Judge, found: Sequence[ColourMap]) -> None:
    """Prints how the images' colours are changed for each run."""
    for run, one in zip(judge.runs, found, strict=True):
        print(f"{run.run_dir}: colours of all images are changed: {one}")


class Answers:
    """The further columns of the table, where an error rate is asked for: `answer`, a class or "don't know"; `set`, the
    classes that hold the true one in 1 - rate of cases, likeliest first; and with features `familiarity`, the share of
    validation cells at least as strange."""

    def __init__(self, judge: Judge, rate: float | None, unfamiliar: float):
        import numpy as np

        self._judge, self._unfamiliar = judge, unfamiliar
        self._refusal = None if rate is None else judge.refusal(rate, unfamiliar)
        if self._refusal is not None and not np.isfinite(self._refusal.threshold):
            log.warning(
                "--error-rate is %g, and %d validation images show no threshold that keeps it: every answer is \"don't "
                'know"; expected a higher rate',
                rate,
                self._refusal.n,
            )
        self._reference, self._warned = judge.reference(), False
        self._known: tuple[Seen, np.ndarray] | None = None
        self._features = self._reference is not None and self._reference.has_features
        self.columns: dict[str, type] = {} if rate is None else {"answer": str, "set": str}
        if rate is not None and self._features:
            self.columns["familiarity"] = float

    def of(self, probs: np.ndarray, seen: Seen | None, rows: Sequence[int]) -> list[Sequence[Any]]:
        """The columns' values of probs [n, k], NaN where there is an error; `seen` is of the others, `rows`."""
        if self._refusal is None:
            self._known = None  # the images are not held for longer than they are looked at
            return []
        from bmjax.analysis.evaluate.refusal import UNSURE, answers

        named, sets = answers(probs, self._judge.classes, self._refusal)
        if not self._features:
            return [named, sets]
        familiar: list[float | None] = [None] * len(probs)
        if seen is not None:
            for row, value in zip(rows, self._familiarity(seen).tolist(), strict=True):
                familiar[row] = value
                if value <= self._unfamiliar:
                    named[row] = UNSURE
        self._known = None
        return [named, sets, familiar]

    def _familiarity(self, seen: Seen) -> np.ndarray:
        """Of each image [n], computed once for the images that are looked at now."""
        if self._known is None or self._known[0] is not seen:
            assert self._reference is not None
            self._known = seen, self._reference.familiarity(self._reference.strangeness(seen))
        return self._known[1]

    def warn_of_foreign(self, seen: Seen, start: int) -> None:
        """Says in what images, the first of them number `start`, are unlike those of training; once."""
        if self._reference is None or self._warned:
            return
        from bmjax.analysis.evaluate.foreign import REMEDY, foreign_words

        if words := foreign_words(self._reference, seen, self._familiarity(seen) if self._features else None):
            self._warned = True
            which = "these images" if start == 0 else f"the images from number {start + 1} on"
            log.warning("%s look unlike those of training:\n  %s\n%s", which, "\n  ".join(words), REMEDY)
