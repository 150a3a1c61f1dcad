"""`bmjax predict`: what a trained classifier, or several as one, says of images."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from bmjax.analysis.evaluate.judge import Judge
    from bmjax.cli.prediction_table import Block
    from bmjax.runs.folder import Run

from bmjax.cli.answers import Answers, adapt, read_as_each
from bmjax.cli.output import check_out
from bmjax.cli.reading import adaptations, add_reading, check_reading
from bmjax.cli.weights import predict_imagenet

# As many decoded images at once: at 224 pixels 300 MB.
_PREDICT_AT_ONCE = 2048
_NAMED = 20
"""Files that can't be read and are named on the terminal; the table names all."""
_LISTS = (".csv", ".tsv", ".parquet", ".zip", ".tar")

log = logging.getLogger(__name__)


def add_parser(verbs: Any) -> None:
    """Adds `predict` to a parser's verbs."""
    p = verbs.add_parser(
        "predict",
        help="classify image files or folders",
        description="Classifies images into a table: a row for each, in the order given, with the columns path, "
        "predicted and one for each class. A file that can't be read has a row too, empty but for its path and the "
        "column error.",
        epilog="Exit status: 0 the table is written (some files may have an error); 1 it is written, and no file could "
        "be read, or with --strict some could not; 2 wrong input, and nothing is written.",
    )
    p.add_argument(
        "run_dir",
        metavar="run",
        nargs="?",
        help="folder of a run, or wandb:ENTITY/PROJECT/NAME; left out with --weights",
    )
    p.add_argument("paths", nargs="*", help="further runs, to be averaged; then images, or folders of images")
    p.add_argument("--weights", help="name ImageNet's classes by these weights: imagenet, imagenet-timm, or a path")
    p.add_argument("--backbone", default="densenet121", help="with --weights: the backbone (default: %(default)s)")
    p.add_argument("--top", type=int, default=5, help="with --weights: so many classes an image (default: %(default)s)")
    _add_of_runs(p)
    p.set_defaults(run=predict)


def _add_of_runs(p: argparse.ArgumentParser) -> None:
    """The options that --weights does not go with."""
    p.add_argument("--out", default="predictions.csv", help="a .csv or .parquet file (default: %(default)s)")
    p.add_argument("--batch-size", type=int, help="images at once; by default the run's train.eval_batch_size")
    p.add_argument("--errors", action="store_true", help="write the column error even where every file can be read")
    p.add_argument("--maps", metavar="FOLDER", help="also draw the attention's maps over each image into this folder")
    p.add_argument("--strict", action="store_true", help="exit with 1 if some file can't be read")
    add_reading(p)


def predict(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    if options.weights is not None:
        from bmjax.data.sources.folder import image_files

        if not options.run_dir:
            raise ValueError("predict: expected images")
        _check_with_weights(options)
        given = [options.run_dir, *options.paths]
        return predict_imagenet(options.backbone, options.weights, image_files(given), options.top)
    _check(options)
    from bmjax.analysis.evaluate.refusal import without_guarantee
    from bmjax.cli.prediction_table import PredictionTable, shown

    run_dirs, paths = runs_first(options)
    if not paths:
        raise ValueError("predict: expected images, or folders of images, after the runs")
    inputs, listed = inputs_of(paths), []
    if options.match_colours or options.adapt or options.adapt_prior:
        inputs = iter(listed := list(inputs))
    blocks = blocks_of(inputs)
    judge = _judge(run_dirs, options)
    if options.match_colours:
        judge.training_colours()  # known to be there before any image is read
    pictures = _Pictures(Path(options.maps), judge.runs[0]) if options.maps else None
    first = next(blocks, None)
    if first is None:
        raise ValueError(f"{', '.join(map(shown, paths))}: no image; expected images, or folders of images")
    # No more padding than there are images, for the few that one looks at by hand.
    judge.batch_size = min(options.batch_size or judge.runs[0].config.train.eval_batch_size, len(first))
    answers = Answers(judge, options.error_rate, options.unfamiliar)
    own_colours = not options.match_colours and any(run.config.data.match_colours for run in judge.runs)
    if options.error_rate is not None and (words := without_guarantee(*adaptations(options), unmatched=own_colours)):
        log.warning("%s", words)
    if listed:
        adapt(judge, [path for path, error in listed if error is None], options)
    table = PredictionTable(Path(options.out), judge.classes, errors=options.errors, more=answers.columns)
    n = failed = 0
    whole = False
    try:
        for rows in predictions_of(judge, itertools.chain([first], blocks), answers, pictures):
            table.add(rows)
            for path, error in zip(rows.paths, rows.errors, strict=True):
                if error is not None and (failed := failed + 1) <= _NAMED:
                    print(f"  {shown(path)}: {shown(error)}", file=sys.stderr)
            n += len(rows.paths)
        whole = True
    finally:
        table.close(whole=whole)
        if not whole:
            print(f"not finished; the first {n} rows are in {shown(str(table.part))}", file=sys.stderr)
    if failed:
        rest_of = f" (the first {_NAMED} are named above)" if failed > _NAMED else ""
        print(f"{failed} of {n} images can't be read{rest_of}; see the column error", file=sys.stderr)
    print(f"{n - failed} images classified into {shown(options.out)}")
    return 1 if failed == n or (failed and options.strict) else 0


def _check_with_weights(options: argparse.Namespace) -> None:
    """Refuses what only runs have."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_of_runs(parser)
    for name, default in vars(parser.parse_args([])).items():
        if (given := getattr(options, name)) != default:
            value = "given" if given is True else repr(given)
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected it with a run, not with --weights")


def runs_first(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(runs, images): of the paths after the first run, those that hold a run are further ones until one doesn't."""
    others = list(itertools.takewhile(_is_run, options.paths))
    return [options.run_dir, *others], options.paths[len(others) :]


def _is_run(path: str) -> bool:
    from bmjax.runs.tracking import REMOTE

    return path.startswith(REMOTE) or (Path(path) / "config.json").is_file()


def _check(options: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read."""
    out = Path(options.out)
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"--out is {options.out!r}; expected a name ending in .csv or .parquet")
    check_out(out, options.paths)
    check_reading(options)
    if not options.paths:
        raise ValueError("predict: expected the folder of a run and images, or --weights and images")
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; expected at least 1")


class Input(NamedTuple):
    """A file to classify, or why it is none."""

    path: str
    error: str | None = None


def inputs_of(paths: Sequence[str]) -> Iterator[Input]:
    """The files given, and the images of the folders given, in order. A folder is listed when its turn comes."""
    from bmjax.data.sources.folder import images_below

    for given in paths:
        path = Path(given)
        if given and path.is_dir():
            try:
                names = images_below(path)
            except OSError as e:
                yield Input(given, f"the folder can't be listed: {e.strerror}")
                continue
            if not names:
                log.warning("%s holds no image", given)
            yield from (Input(os.path.join(path, name)) for name in names)
        elif not os.path.lexists(given):
            yield Input(given, "no such file or folder")
        elif not path.exists():
            yield Input(given, "a link to what is not there")
        elif path.suffix.lower() in _LISTS and path.is_file():
            yield Input(str(path), "a table or an archive; expected an image, or a folder of images")
        else:  # reading from a pipe or a device may never end
            yield Input(str(path), None if path.is_file() else "not a file")


def blocks_of(inputs: Iterator[Input]) -> Iterator[list[Input]]:
    while block := list(itertools.islice(inputs, _PREDICT_AT_ONCE)):
        yield block


def _judge(run_dirs: Sequence[str], options: argparse.Namespace) -> Judge:
    from bmjax.analysis.evaluate.judge import Judge, at_pixel_size, say_unmatched
    from bmjax.runs.folder import load_run

    runs = [load_run(path, options.which, trust=options.trust) for path in run_dirs]
    say_unmatched(runs, options.match_colours)
    return Judge(at_pixel_size(runs, options.pixel_size), views=options.views, calibrated=options.calibrated)


def predictions_of(
    judge: Judge, blocks: Iterable[list[Input]], answers: Answers, pictures: _Pictures | None
) -> Iterator[Block]:
    """The rows of each block, one for each input."""
    import numpy as np

    from bmjax.analysis.evaluate.reader import NO_NUMBER
    from bmjax.cli.prediction_table import Block

    start = 0
    for block in blocks:
        read = read_as_each(judge.runs, [path for path, error in block if error is None])
        found = iter(read[0])
        first = [next(found) if error is None else error for _, error in block]
        errors = [image if isinstance(image, str) else None for image in first]
        rows = [i for i, error in enumerate(errors) if error is None]
        probs, seen = np.full((len(block), len(judge.classes)), np.nan, np.float32), None
        names: list[str | None] = [None] * len(block)
        if rows:
            images = [np.stack([image for image in part if not isinstance(image, str)]) for part in read]
            seen = judge.images(images)
            probs[rows] = seen.probs
            for i in rows:
                if np.isfinite(probs[i]).all():
                    names[i] = judge.classes[int(probs[i].argmax())]
                else:
                    probs[i], errors[i] = np.nan, NO_NUMBER
            answers.warn_of_foreign(seen, start)
            if pictures is not None:
                pictures.draw(seen.shown(seen.rows), [(start + i, block[i].path) for i in rows])
        yield Block([path for path, _ in block], names, probs, errors, answers.of(probs, seen, rows))
        start += len(block)


class _Pictures:
    """Draws where the attention looked, a file for each image: its row's number and its name."""

    def __init__(self, folder: Path, run: Run):
        from bmjax.analysis.explain.maps import Explainer

        if not folder.parent.is_dir():
            raise FileNotFoundError(f"--maps is {str(folder)!r}, but there is no folder {folder.parent}")
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"--maps is {str(folder)!r}, which is a file; expected a folder")
        self._folder, self._variables, self._explainer = folder, run.variables, Explainer(run.model)
        self._draws = self._explainer.sows_maps(run.variables, run.config.data.image_size)
        if not self._draws:
            log.warning("--maps: the run's attention sows no map over places; no picture is drawn")
        folder.mkdir(exist_ok=True)

    def draw(self, images: np.ndarray, rows: Sequence[tuple[int, str]]) -> None:
        """Pictures of images uint8 [n, h, w, 3], of (row of the table, path)."""
        if not self._draws:
            return
        from PIL import Image

        from bmjax.analysis.report.figures import beside_maps
        from bmjax.cli.prediction_table import is_utf8

        maps = self._explainer.attention(self._variables, images)
        for i, (row, path) in enumerate(rows):
            stem = "".join(c if is_utf8(c) else "_" for c in Path(path).stem[:50])
            picture = beside_maps(images[i], [values[i] for values in maps.values()])
            Image.fromarray(picture).save(self._folder / f"{row:07d}_{stem}.png")
