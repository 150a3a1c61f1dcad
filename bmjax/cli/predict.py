"""`bmjax eval` and `bmjax predict`: what a trained classifier says, of its own splits and of other images."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.cli.output import add_trust, metrics_line, print_confusion
from bmjax.cli.weights import predict_imagenet

# As many decoded images at once: at 224 pixels 300 MB.
_PREDICT_AT_ONCE = 2048


def add_parser(verbs: Any) -> None:
    """Adds `eval` and `predict` to a parser's verbs."""
    p = verbs.add_parser("eval", help="evaluate a run on one split")
    p.add_argument("run_dir", metavar="run", help="folder of a run")
    p.add_argument("--split", choices=("train", "val", "test"), default="val")
    p.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    p.add_argument("--data.root", dest="data_root", metavar="FOLDER", help="where the run's data are now")
    add_trust(p)
    p.set_defaults(run=evaluate)
    p = verbs.add_parser("predict", help="classify image files or folders")
    p.add_argument("run_dir", metavar="run", nargs="?", help="folder of a run; left out with --weights")
    p.add_argument("paths", nargs="*", help="images, or folders of images")
    p.add_argument("--weights", help="name ImageNet's classes by these weights: imagenet, imagenet-timm, or a path")
    p.add_argument("--backbone", default="densenet121", help="with --weights: the backbone (default: %(default)s)")
    p.add_argument("--top", type=int, default=5, help="with --weights: so many classes an image (default: %(default)s)")
    p.add_argument("--out", default="predictions.csv", help="a .csv or .parquet file (default: %(default)s)")
    p.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    p.add_argument("--batch-size", type=int, help="images at once; by default the run's train.eval_batch_size")
    p.add_argument("--strict", action="store_true", help="exit with 1 if a file can't be read")
    add_trust(p)
    p.set_defaults(run=predict)


def evaluate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    from bmjax.analysis.report.report import write_report
    from bmjax.runs.folder import load_run
    from bmjax.training.predict import Predictor, data_of, evaluate_run

    run = load_run(options.run_dir, options.which, trust=options.trust)
    dataset, splits = data_of(run, options.data_root)
    m = evaluate_run(run, options.split, options.which, Predictor(run.config, run.model), dataset, splits)
    print(
        f"{metrics_line(options.split, m)}, balanced accuracy {m['balanced_accuracy']:.3f}, loss {m['loss']:.3f}, "
        f"ECE {m['ece']:.3f} ({options.which} checkpoint, step {m['step']})"
    )
    print_confusion(m["confusion"], dataset.classes)
    print(f"report: {write_report(options.run_dir, dataset.images)}")
    return 0


def predict(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    from bmjax.data.sources.folder import image_files

    if options.weights is not None:
        if not options.run_dir:
            raise ValueError("predict: expected images")
        given = [options.run_dir, *options.paths]
        return predict_imagenet(options.backbone, options.weights, image_files(given), options.top)
    out = Path(options.out)
    if out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out is {options.out!r}; expected a name ending in .csv or .parquet")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out is {options.out!r}, but there is no folder {out.parent}")
    if not options.paths:
        raise ValueError("predict: expected the folder of a run and images, or --weights and images")
    paths = image_files(options.paths)

    import numpy as np
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from bmjax.data.load import read_files
    from bmjax.runs.folder import load_run
    from bmjax.training.predict import Predictor, predict_probs

    run = load_run(options.run_dir, options.which, trust=options.trust)
    # No more padding than there are images, for the few that one looks at by hand.
    batch = min(options.batch_size or run.config.train.eval_batch_size, len(paths))
    setting = dataclasses.replace(run.config.train, eval_batch_size=batch)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=setting))
    predictor = Predictor(run.config, run.model)
    kept: list[str] = []
    errors: list[str] = []
    probs: list[np.ndarray] = []
    for start in range(0, len(paths), _PREDICT_AT_ONCE):
        part = paths[start : start + _PREDICT_AT_ONCE]
        images = []
        for path, image in zip(part, read_files(part, run.config.data), strict=True):
            if isinstance(image, str):
                errors.append(f"{path}: {image}")
            else:
                images.append(image)
                kept.append(str(path))
        if images:
            probs.append(predict_probs(run, np.stack(images), predictor))
    if errors:
        print(f"{len(errors)} of {len(paths)} images can't be read:", *errors, sep="\n  ", file=sys.stderr)
    if not kept:
        raise ValueError(f"none of the {len(paths)} files given is a readable image")
    table = np.concatenate(probs)
    columns = [kept, [run.classes[i] for i in table.argmax(-1)], *table.T]
    # Names as a list: a class may be called "path".
    arrow = pa.table([pa.array(column) for column in columns], names=["path", "predicted", *run.classes])
    write = pyarrow.csv.write_csv if out.suffix == ".csv" else pyarrow.parquet.write_table
    write(arrow, str(out))
    print(f"{len(kept)} images classified into {out}")
    return 1 if errors and options.strict else 0
