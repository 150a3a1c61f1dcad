"""`bmjax report`: the page of a run, or of several side by side, with the cells behind each figure."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmjax.cli.output import add_trust, check_out, run_at

if TYPE_CHECKING:
    import numpy as np

    from bmjax.runs.folder import Run

log = logging.getLogger(__name__)


def add_parser(verbs: Any) -> None:
    """Adds `report` to a parser's verbs."""
    p = verbs.add_parser(
        "report",
        help="write the page of a run, or of several side by side",
        description="Writes one HTML file that needs no network, and each run's model_card.md. It shows what was "
        "evaluated before and opens no split by itself.",
    )
    p.add_argument("run_dirs", metavar="run", nargs="+", help="folder of a run, or wandb:ENTITY/PROJECT/NAME")
    p.add_argument("--out", metavar="FILE", help="default: report.html in the run's folder, of several runs here")
    p.add_argument("--no-maps", dest="maps", action="store_false", help="without attention and Grad-CAM; quicker")
    p.add_argument("--no-images", dest="images", action="store_false", help="without cells and maps; runs no code")
    p.add_argument("--data.root", dest="data_root", metavar="FOLDER", help="where the runs' data are now")
    add_trust(p)
    p.set_defaults(run=report)


def report(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    folders = [run_at(path) for path in options.run_dirs]
    out = Path(options.out) if options.out else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if out.suffix.lower() != ".html":
        raise ValueError(f"--out is {str(out)!r}; expected a name ending in .html")
    check_out(out)
    from bmjax.analysis.report.facts import read_facts
    from bmjax.analysis.report.report import write_reports

    for folder in folders:  # what is damaged is said before any work
        read_facts(folder)
    found = [_cells(folder, options) if options.images else (None, None) for folder in folders]
    write_reports(folders, out, [images for images, _ in found], [run for _, run in found])
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _cells(folder: Path, options: argparse.Namespace) -> tuple[np.ndarray | None, Run | None]:
    """(the images of the run's data, the run for its maps); None, and said, where they are not to be had."""
    from bmjax.runs.folder import load_run
    from bmjax.training.predict import data_of

    log.info("report: reading the run %s and its data", folder)
    try:
        run = load_run(folder, trust=options.trust)
    except FileNotFoundError as e:
        log.warning("%s: no cells are shown (%s)", folder, e)
        return None, None
    try:
        images = data_of(run, options.data_root)[0].images
    except (FileNotFoundError, NotADirectoryError, ValueError) as e:  # gone, changed since, or given from Python
        log.warning("%s: no cells are shown (%s); --data.root says where its data are now", folder, e)
        return None, None
    return images, run if options.maps else None
