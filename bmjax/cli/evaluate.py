"""`bmjax eval`: every score of a run, or of several as one classifier, on its own splits or on labelled images."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmjax.analysis.evaluate.judge import Judge, Target
    from bmjax.analysis.evaluate.reader import Seen
    from bmjax.analysis.evaluate.scores import Scores
    from bmjax.data.dataset import Dataset
    from bmjax.runs.folder import Run
    from bmjax.runs.records import Predictions

from bmjax.cli.answers import read_as_each, say_colours
from bmjax.cli.configured import add_hosts
from bmjax.cli.output import check_out, metrics_line, print_confusion
from bmjax.cli.reading import adaptations, add_reading, check_reading


def add_parser(verbs: Any) -> None:
    """Adds `eval` to a parser's verbs."""
    p = verbs.add_parser(
        "eval",
        help="evaluate a run, or several as one classifier",
        description="Every score of a split with its 95 % interval. Several runs are one classifier, the mean of their "
        "probabilities. What is read otherwise than plainly goes into files of its own.",
    )
    p.add_argument("run_dirs", metavar="run", nargs="+", help="folder of a run")
    p.add_argument("--split", choices=("train", "val", "test"), default="val")
    p.add_argument("--data.root", dest="data_root", metavar="FOLDER", help="where the run's data are now")
    p.add_argument("--on", metavar="PATH", help="labelled images from elsewhere: a folder of classes, or a table")
    p.add_argument("--unseen", metavar="FOLDER", help="images of kinds that the run never saw: are they told apart?")
    p.add_argument("--out", metavar="FILE", help="also write the scores here, a .json: of several runs, or of --on")
    p.add_argument("--tolerate", nargs="+", default=(), metavar="A:B", help="pairs of classes that may be confused")
    p.add_argument("--calibrate", choices=("temperature", "vector"), help="fit on validation, and keep with the run")
    p.add_argument("--reference", action="store_true", help="keep the training cells' features, to tell strange ones")
    add_reading(p)
    add_hosts(p)
    p.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    check_reading(options)
    _check_out(options)
    pairs = _pairs(options.tolerate)
    from bmjax.analysis.evaluate.judge import at_pixel_size, setting, target_of_path, target_of_split
    from bmjax.runs.folder import load_run
    from bmjax.training import hosts

    runs = [load_run(run_dir, options.which, trust=options.trust) for run_dir in options.run_dirs]
    matched, adapt, prior = adaptations(options)
    name = setting(options.views, matched=matched, adapt=adapt, prior=prior, calibrated=options.calibrated)
    if options.pixel_size is not None and not (options.on or options.unseen):
        raise ValueError(f"--pixel-size is {options.pixel_size}; expected it with --on or --unseen, for other images")
    plain = len(runs) == 1 and not name and not options.on
    if hosts.several() and (
        not plain or options.calibrate or options.reference or options.error_rate or options.unseen
    ):
        raise ValueError("several processes evaluate one run on one of its splits, plainly; expected no other option")
    _check(runs, options, pairs)
    if options.calibrate:
        _calibrate(runs, options)
    own = options.split == "val" and not options.on and len(runs) == 1 and name == setting(options.views)
    _check_kept(runs, options, evaluates_val=own)
    if options.reference:
        for run in runs:
            _keep_reference(run, options)
    if plain:
        predictions, dataset = _plainly(runs[0], options)
        seen, judge, unseen = None, None, None
    else:
        judge, unseen = _judge(runs, options), None
        if options.on:
            source = "folder" if Path(options.on).is_dir() else "table"
            target, unseen = target_of_path(at_pixel_size(runs, options.pixel_size), options.on, source)
        else:
            target = target_of_split(runs, options.split, options.data_root)
        seen = _seen(judge, target, unseen, options)
        predictions = _as_predictions(options.split, target, seen, judge)
        dataset = target.parts[0][0]
        _keep(runs, f"{options.split}{name}", predictions, _groups(dataset, predictions), options)
    scores = _print_scores(runs, predictions, pairs, _groups(dataset, predictions))
    if options.split == "train" and not options.on:
        print("the runs were trained on these images: the figures say how well they are remembered")
    if options.calibrated and options.split == "val" and not options.on:
        print("the calibration was fitted on these images; `--calibrate` prints what it is worth on others")
    if hosts.leads():
        _write_scores(runs, scores, name, options)
        if plain:
            _write_report(runs[0], dataset)
    if options.error_rate is not None or options.unseen or (unseen is not None and len(unseen)):
        judge = judge or _judge(runs, options)
        if seen is None:
            seen = judge(target_of_rows(runs[0], predictions, options))
        _print_refusal(judge, predictions, seen, unseen, options)
    return 0


def _check_out(options: argparse.Namespace) -> None:
    if options.out:
        if Path(options.out).suffix != ".json":
            raise ValueError(f"--out is {options.out!r}; expected a name ending in .json")
        check_out(Path(options.out))


def _write_scores(runs: Sequence[Run], scores: Scores, name: str, options: argparse.Namespace) -> None:
    """Keeps the scores of one run's split with it, and all scores where `--out` says."""
    if len(runs) == 1 and not options.on:
        path = runs[0].run_dir / f"evaluation_{options.split}{name}.json"
        path.write_text(json.dumps(scores.to_json(), indent=1))
    if options.out:
        of = {"runs": options.run_dirs, "steps": [run.step for run in runs], "on": options.on or options.split}
        Path(options.out).write_text(json.dumps(of | {"as": name} | scores.to_json(), indent=1))


def _write_report(run: Run, dataset: Dataset) -> None:
    from bmjax.analysis.report.report import write_report

    print(f"report: {write_report(run.run_dir, dataset.images)}")


def _check(runs: Sequence[Run], options: argparse.Namespace, pairs: Sequence[tuple[str, str]]) -> None:
    """What can be known to be wrong before any image is seen, and before an opening of the test split is recorded."""
    from bmjax.analysis.evaluate.judge import NO_VALIDATION, at_pixel_size, same_classes, say_unmatched
    from bmjax.analysis.evaluate.reader import check_adaptable
    from bmjax.analysis.evaluate.scores import tolerance
    from bmjax.data.sources.folder import image_files
    from bmjax.runs.folder import split_size

    tolerance(pairs, same_classes(runs))
    if options.on and not Path(options.on).exists():
        raise FileNotFoundError(
            f"--on is {options.on!r}, which is not there; expected a folder with one sub-folder of images a class, or "
            "a .csv or .parquet with columns path, label"
        )
    if options.on or options.unseen:
        say_unmatched(runs, options.match_colours)
    if options.pixel_size is not None:
        runs = at_pixel_size(runs, options.pixel_size)
    if options.unseen:
        image_files([options.unseen])
    for run in runs:
        if options.unseen:
            run.config.data.field_pixels()
        if options.adapt:
            check_adaptable(run)
        if options.reference and not split_size(run.run_dir, "val"):
            raise ValueError(f"--reference: {run.run_dir} {NO_VALIDATION}")


def _check_kept(runs: Sequence[Run], options: argparse.Namespace, *, evaluates_val: bool) -> None:
    """As `_check`, of what earlier commands, or this one so far, have kept with the runs. `evaluates_val`: what
    thresholds and frequencies need will have been written by then."""
    judge = _judge(runs, options)
    if options.match_colours and not options.reference:
        judge.training_colours()
    if options.unfamiliar and not options.reference:
        judge.featured_reference()
    if (options.error_rate is not None or options.adapt_prior) and not evaluates_val:
        judge.validation()


def _pairs(given: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(":")) for pair in given]
    for pair, text in zip(pairs, given, strict=True):
        if len(pair) != 2:
            raise ValueError(f"--tolerate is {text!r}; expected two classes with a colon, as in NGB:NGS")
    return pairs  # type: ignore[return-value]


def _groups(dataset: Dataset, predictions: Predictions) -> Sequence[str]:
    """The group of each image, where the data name groups."""
    return [dataset.groups[i] for i in predictions.index] if dataset.groups else ()


def _plainly(run: Run, options: argparse.Namespace) -> tuple[Predictions, Dataset]:
    """Evaluates a split as ever: predictions and results; gives the predictions and the data."""
    from bmjax.runs.records import read_predictions
    from bmjax.training import hosts
    from bmjax.training.predict import Predictor, data_of, evaluate_run

    dataset, splits = hosts.first_alone(lambda: data_of(run, options.data_root))
    m = evaluate_run(run, options.split, options.which, Predictor(run.config, run.model), dataset, splits)
    print(
        f"{metrics_line(options.split, m)}, balanced accuracy {m['balanced_accuracy']:.3f}, loss {m['loss']:.3f}, "
        f"ECE {m['ece']:.3f} ({options.which} checkpoint, step {m['step']})"
    )
    print_confusion(m["confusion"], dataset.classes)
    found = read_predictions(run.run_dir, options.split)
    assert found is not None, "just written"
    return found, dataset


def target_of_rows(run: Run, predictions: Predictions, options: argparse.Namespace) -> Target:
    """The images of predictions, without another opening of their split."""
    from bmjax.analysis.evaluate.judge import Target
    from bmjax.training.predict import data_of

    dataset, _ = data_of(run, options.data_root)
    return Target(((dataset, predictions.index),), predictions.labels, tuple(predictions.ids.tolist()))


def _judge(runs: Sequence[Run], options: argparse.Namespace) -> Judge:
    from bmjax.analysis.evaluate.judge import Judge

    return Judge(runs, views=options.views, calibrated=options.calibrated)


def _seen(judge: Judge, target: Target, unseen: Target | None, options: argparse.Namespace) -> Seen:
    """What the runs say of the target. They are adapted as asked for, to its images of unknown classes too: leaving
    those out would need labels."""
    import numpy as np

    from bmjax.analysis.evaluate.judge import TO_ADAPT
    from bmjax.data.batches import evenly

    both = [one for one in (target, unseen) if one is not None and len(one)]
    if options.adapt or options.match_colours:
        each = zip(*(one.parts for one in both), strict=True)
        images = []
        for parts in each:
            rows = np.concatenate([rows for _, rows in parts])
            images.append(parts[0][0].images[rows[evenly(len(rows), TO_ADAPT)]])
        if options.match_colours:
            say_colours(judge, judge.match_colours(images))
        if options.adapt:
            judge.adapt(images)
    seen = judge(target)
    if options.adapt_prior:
        others = [judge(one).probs for one in both[1:]]
        found = judge.adapt_priors(np.concatenate([seen.probs, *others]))
        shares = ", ".join(f"{name} {100 * p:.1f} %" for name, p in zip(judge.classes, found, strict=True))
        print(f"frequencies estimated here: {shares}")
        seen = judge(target)
    return seen


def _as_predictions(split: str, target: Target, seen: Seen, judge: Judge) -> Predictions:
    import numpy as np

    from bmjax.runs.records import Predictions

    rows = target.parts[0][1]
    return Predictions(split, seen.probs, target.labels, rows, np.array(target.ids), judge.classes)


def _keep(
    runs: Sequence[Run], name: str, predictions: Predictions, groups: Sequence[str], options: argparse.Namespace
) -> None:
    """Writes the figures of one run's split, read otherwise than plainly, beside the plain ones."""
    from bmjax.runs.folder import save_results
    from bmjax.runs.metrics import classification_metrics
    from bmjax.runs.resampling import over_groups

    m = classification_metrics(predictions.labels, predictions.probs, intervals=True)
    m = over_groups(m, predictions.labels, predictions.probs.argmax(1), groups)
    where = options.on or options.split
    print(f"{metrics_line(where, m)}, ECE {m['ece']:.3f} ({len(runs)} run{'s' * (len(runs) > 1)}; {name})")
    print_confusion(m["confusion"], predictions.classes)
    if len(runs) == 1 and not options.on:
        from bmjax.runs.folder import save_arrays

        arrays = {f.name: getattr(predictions, f.name) for f in dataclasses.fields(predictions) if f.name != "split"}
        save_arrays(runs[0].run_dir, name, **arrays)
        save_results(runs[0].run_dir, name, m | {"step": runs[0].step, "checkpoint": options.which})


def _print_scores(
    runs: Sequence[Run], predictions: Predictions, pairs: Sequence[tuple[str, str]], groups: Sequence[str]
) -> Scores:
    from bmjax.analysis.evaluate.scores import score, text

    try:
        scores = score(predictions.labels, predictions.probs, predictions.classes, tolerated=pairs, groups=groups)
    except ValueError as e:
        raise ValueError(f"{', '.join(str(run.run_dir) for run in runs)}: {e}") from e
    print(f"\n{text(scores)}")
    return scores


def _calibrate(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Fits each run's calibration on its validation split, and says what it is worth there."""
    from bmjax.analysis.evaluate import calibration
    from bmjax.analysis.evaluate.judge import Judge

    for run in runs:
        val = Judge([run], views=options.views).validation()
        found = calibration.fit(val.labels, val.probs, options.calibrate, run.step, options.views)
        before = calibration.figures(val.labels, val.probs)
        after = calibration.figures(val.labels, calibration.cross_fitted(val.labels, val.probs, options.calibrate))
        path = calibration.write_calibration(run.run_dir, found)
        what = f"temperature {found.temperature:.3f}" if found.temperature else "vector"
        changes = ", ".join(f"{n.upper()} {before[n]:.3f} to {after[n]:.3f}" for n in before)
        print(f"{path}: {what}, by {found.n} validation images; there, by a fit on the others: {changes}")


def _keep_reference(run: Run, options: argparse.Namespace) -> None:
    from bmjax.analysis.evaluate.reader import Reader
    from bmjax.analysis.evaluate.reference import FILE, make_reference, write_reference
    from bmjax.training.predict import data_of

    dataset, splits = data_of(run, options.data_root)
    reference = make_reference(dataset, splits, Reader(run))
    write_reference(run.run_dir, reference)
    print(f"{run.run_dir / FILE}: looks and features of {len(reference.looks)} training cells")


def _print_refusal(
    judge: Judge, predictions: Predictions, seen: Seen, unseen: Target | None, options: argparse.Namespace
) -> None:
    """How many images are answered and how well, and how well images of unseen kinds are told from known ones."""
    from bmjax.analysis.evaluate.refusal import without_guarantee
    from bmjax.analysis.evaluate.strangers import familiarity_of, refusal_text, strangers_text

    refusal = None if options.error_rate is None else judge.refusal(options.error_rate, options.unfamiliar)
    strange = []
    if unseen is not None and len(unseen):
        strange.append((f"classes of {options.on} that the run does not know", judge(unseen)))
    if options.unseen:
        strange.append((options.unseen, judge.images(_images(judge, options))))
    print()
    if refusal is not None:
        familiar = familiarity_of(judge, seen) if options.unfamiliar else None
        print(refusal_text(refusal, predictions, familiar, options.unfamiliar))
        if options.split == "val" and not options.on:
            print("the threshold was chosen on these images, so the share wrong is too low")
        if no_guarantee := without_guarantee(*adaptations(options), elsewhere=bool(options.on)):
            print(no_guarantee)
    for name, others in strange:
        print(strangers_text(judge, seen, others, name, refusal, options.unfamiliar))


def _images(judge: Judge, options: argparse.Namespace) -> list[Any]:
    """The readable images of a folder, as each run reads them."""
    import numpy as np

    from bmjax.analysis.evaluate.judge import at_pixel_size
    from bmjax.data.sources.folder import image_files

    read = read_as_each(at_pixel_size(judge.runs, options.pixel_size), image_files([options.unseen]))
    each = [[x for x in part if not isinstance(x, str)] for part in read]
    if not each[0]:
        raise ValueError(f"--unseen is {options.unseen!r}, where no image can be read; expected a folder of images")
    return [np.stack(images) for images in each]
