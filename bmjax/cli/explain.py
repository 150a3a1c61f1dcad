"""`bmjax explain`: where a run's classifier looked, as a picture, and whether the maps can be trusted, as scores."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmjax.cli.output import add_checkpoint, check_writable, run_at

if TYPE_CHECKING:
    import numpy as np

    from bmjax.analysis.explain.faithfulness import Score
    from bmjax.runs.folder import Run

log = logging.getLogger(__name__)


def add_parser(verbs: Any) -> None:
    """Adds `explain` to a parser's verbs."""
    p = verbs.add_parser("explain", help="draw attention maps and Grad-CAMs, and test whether they show what decided")
    p.add_argument("run_dir", metavar="run", help="folder of a run")
    p.set_defaults(run=run)
    p.add_argument("images", nargs="*", help="images, or folders of images; by default cells of a split")
    p.add_argument("--split", choices=("train", "val", "test"), default="val", help="default: %(default)s")
    p.add_argument("--cells", choices=("wrong", "confident"), default="wrong",
                   help="of the split's saved predictions: the most confident mistakes, or the most confident right "
                        "ones (default: %(default)s)")  # fmt: skip
    p.add_argument("--n", type=int, default=12, help="so many cells of the split (default: %(default)s)")
    p.add_argument("--target", choices=("predicted", "true"), default="predicted",
                   help="the class whose score is explained (default: %(default)s)")  # fmt: skip
    p.add_argument("--stage", default="last", help="the backbone's stage of the Grad-CAMs (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the random maps and networks (default: %(default)s)")
    p.add_argument("--no-scores", dest="scores", action="store_false", help="leave out the tests; quicker")
    add_checkpoint(p)
    p.add_argument("--data.root", dest="data_root", metavar="FOLDER", help="where the run's data are now")
    p.add_argument("--out", help="folder of the picture and the scores; by default the run's")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    if options.n < 1:
        raise ValueError(f"--n is {options.n}; expected at least 1")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}; expected at least 0")
    if options.images and options.target == "true":
        raise ValueError("--target true is for cells of a split; the classes of files are not known")
    folder = run_at(options.run_dir)
    out = Path(options.out) if options.out else folder
    if not out.is_dir():
        raise FileNotFoundError(f"--out is {options.out!r}; there is no such folder")
    check_writable(out, out)

    log.info("explain: reading the run %s", options.run_dir)
    from bmjax.data.progress import saying

    now = _Stage("reading the run")
    with saying(now):
        return _explain(options, folder, out, now)


class _Stage:
    """What is being done, for a line now and then."""

    def __init__(self, text: str):
        self._text, self._began = text, time.monotonic()

    def __call__(self) -> str:
        return f"explain: {self._text}, {time.monotonic() - self._began:.0f} s so far"

    def to(self, text: str) -> None:
        """Goes on to something else, and says so."""
        self._text, self._began = text, time.monotonic()
        log.info("explain: %s", text)


def _explain(options: argparse.Namespace, folder: Path, out: Path, now: _Stage) -> int:
    from bmjax.analysis.explain.faithfulness import GRID, RULE, STEPS, score_maps
    from bmjax.analysis.explain.maps import Explainer
    from bmjax.analysis.report.figures import RATE, RIGHT, WRONG, explanations, save
    from bmjax.files import printable, write_text
    from bmjax.runs.folder import load_run

    found = load_run(folder, options.which, trust=options.trust)
    explainer = Explainer(found.model, options.stage)
    images, labels, ids = _files(found, options.images) if options.images else _cells(found, options)
    now.to(f"maps of {len(images)} cells")
    probs = explainer.probabilities(found.variables, images)
    predicted = probs.argmax(-1)
    targets = labels if labels is not None and options.target == "true" else predicted
    maps = explainer.maps(found.variables, images, targets)
    scores = {}
    if options.scores:
        now.to(f"tests of {len(maps)} maps on {len(images)} cells (--no-scores leaves them out)")
        scores = score_maps(explainer, found.model, found.variables, images, targets, seed=options.seed)
        _print(scores)

    texts = []
    for i, top in enumerate(predicted):
        taken = f"{printable(found.classes[top])} {probs[i, top]:.2f}"
        if labels is None:
            texts.append((taken, RATE))
        else:
            right = top == labels[i]
            true = printable(found.classes[labels[i]])
            texts.append((taken if right else f"{true}, taken for\n{taken}", RIGHT if right else WRONG))
    titles = [name + (f"\n{_verdict(scores[name])}" if scores else "") for name in maps]
    name = f"explain_{'images' if options.images else f'{options.split}_{options.cells}'}"
    save(explanations(images, texts, maps, titles), out / f"{name}.png", dpi=120)
    record = {
        "run": str(found.run_dir),
        "step": found.step,
        "checkpoint": options.which,
        "stage": explainer.stage,
        "split": None if options.images else options.split,
        "target": options.target,
        "cells": [
            {"id": cell, "true": None if labels is None else found.classes[labels[i]],
             "predicted": found.classes[predicted[i]], "target": found.classes[targets[i]],
             "probability": float(probs[i, targets[i]])}
            for i, cell in enumerate(ids)
        ],
        "rule": RULE,
        "grid": GRID,
        "steps": STEPS,
        "maps": {name: _record(score) for name, score in scores.items()},
    }  # fmt: skip
    write_text(out / f"{name}.json", json.dumps(record, indent=2))
    if not any(map_name.startswith("attention") for map_name in maps):
        print("The attention sows no map over places, so only the Grad-CAMs are drawn.")
    print(f"picture: {out / name}.png\n{'cells and scores' if scores else 'cells'}: {out / name}.json")
    return 0


def _files(found: Run, paths: list[str]) -> tuple[np.ndarray, None, list[str]]:
    """(images, no labels, their paths)."""
    import numpy as np

    from bmjax.analysis.evaluate.judge import say_unmatched
    from bmjax.data.load import read_files
    from bmjax.data.sources.folder import image_files

    files = image_files(paths)
    say_unmatched([found])
    images = list(read_files(files, found.config.data))
    for path, image in zip(files, images, strict=True):
        if isinstance(image, str):
            raise ValueError(f"{path}: {image}")
    return np.stack(images), None, [str(path) for path in files]


def _cells(found: Run, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(images, labels, ids) of cells of a split, by its saved predictions; an opening of the test split is recorded."""
    import numpy as np

    from bmjax.runs.folder import record_opening, saved_results
    from bmjax.runs.records import most_confident, most_wrong, read_predictions
    from bmjax.training.predict import data_of

    split, saved = options.split, read_predictions(found.run_dir, options.split)
    command = f"`bmjax eval {options.run_dir} --split {split} --which {options.which}`"
    if saved is None:
        raise FileNotFoundError(f"{found.run_dir} holds no predictions of {split}; {command} makes them")
    if (step := saved_results(found.run_dir).get(split, {}).get("step")) != found.step:
        raise ValueError(
            f"the predictions of {split} are those of step {step}; expected step {found.step}, as {command} makes them"
        )
    places = {"wrong": most_wrong, "confident": most_confident}[options.cells](saved, options.n)
    if not len(places):
        raise ValueError(f"{split} has no such cell: --cells {options.cells} of {len(saved.labels)} predictions")
    dataset, _ = data_of(found, options.data_root)  # before the opening: without its data nothing is opened
    if split == "test" and (openings := record_opening(found.run_dir, found.step)) > 1:
        log.warning("%s: the test split is opened for time %d", found.run_dir, openings)
    rows = saved.index[places]
    return np.asarray(dataset.images[rows]), saved.labels[places], [dataset.ids[i] for i in rows]


def _verdict(score: Score) -> str:
    if score.passes:
        return "passes"
    return "fails: " + " and ".join(
        why
        for fails, why in (
            (not score.above_random, "not above\na random map"),
            (not score.above_centre, "not above\nthe centre map"),
            (not score.sane, "same map with a\nrandom network"),
        )
        if fails
    )


def _print(scores: dict[str, Score]) -> None:
    from bmjax.analysis.explain.faithfulness import RULE

    n = len(next(iter(scores.values())).scores)
    print(f"{RULE}\nn = {n} cells; means over them.")
    if n < 5:
        print(f"With n = {n} no such test can reach that level, whatever the maps: take 5 cells or more.")
    heads = ("deletion", "insertion", "score", "p random", "p centre", "head", "whole", "SSIM head", "SSIM whole")
    width = max(map(len, scores)) + 2
    print(f"\n{'':{width}}" + "".join(h.rjust(11) for h in heads))
    for name, s in scores.items():
        figures = (s.deletion.mean(), s.insertion.mean(), s.scores.mean(), s.p_random, s.p_centre)
        figures += tuple(by_what[what] for by_what in (s.correlation, s.similarity) for what in ("head", "whole"))
        verdict = "passes" if s.passes else "fails"
        print(name.ljust(width) + "".join(f"{v:11.3f}" for v in figures) + f"  {verdict}")
    print("head, whole: rank correlation, and SSIM, with the map after randomising the head or the whole network.")
    print("edges, constant and centre know no network and must fail.\n")


def _record(score: Score) -> dict[str, Any]:
    return {
        "deletion": score.deletion.tolist(),
        "insertion": score.insertion.tolist(),
        "score": float(score.scores.mean()),
        "p_random": score.p_random,
        "p_centre": score.p_centre,
        "rank_correlation": score.correlation,
        "ssim": score.similarity,
        "faithful": score.faithful,
        "sane": score.sane,
        "passes": score.passes,
    }
