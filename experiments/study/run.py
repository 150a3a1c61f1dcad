"""The whole published study in one command: backbones, head, optimizers, attention, the selected model, the protocols.

    python experiments/study/run.py --data FOLDER --weights FILE [--out OUT] [--seeds 5] [--at-once K]
    python experiments/study/run.py --smoke

FOLDER has one sub-folder of images per class; FILE is Keras's of one network, or `imagenet` fetches them all. Stopped
at any moment, the same command goes on where it was: a finished run is never trained again. At the end the tables and
pictures stand in OUT/study.html and OUT/study.md, as `bmjax study report OUT` writes them. `--smoke` shows on rendered
cells and tiny networks that all of it works; its figures mean nothing. docs/study.md has the result on real cells.
"""

from __future__ import annotations

import logging
import time

import attention
import backbones
import best
import head
import optimizers
import protocol
from common import Settings, start

log = logging.getLogger("bmjax.study")
PARTS = (backbones, head, optimizers, attention, best, protocol)


def run(s: Settings) -> None:
    """Runs every part in order, and writes the report after each."""
    from bmjax.analysis.study.page import write_study

    for number, part in enumerate(PARTS, 1):
        log.info("part %d of %d: %s", number, len(PARTS), part.__name__)
        began = time.monotonic()
        part.run(s)
        log.info("%s: %.1f min", part.__name__, (time.monotonic() - began) / 60)
        page, _ = write_study(s.out)
    print(f"report: {page}")


if __name__ == "__main__":
    start(run, __doc__)
