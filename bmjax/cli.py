"""The command line: thin verbs over the API. jax is imported only by the verbs that compute."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bmjax import cli_attention, cli_compare, cli_data, cli_explain, cli_weights
from bmjax.config import Config, from_json, to_json
from bmjax.experiment import load_experiment, override, sweep

# As many decoded images at once: at 224 pixels 300 MB.
_PREDICT_AT_ONCE = 2048


def train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config, module = load_experiment(options.experiment)
    config = override(config, rest, f"bmjax train {options.experiment}")
    configs = sweep(config, module, options.experiment) if options.sweep else [config]
    for i, one in enumerate(configs, 1):
        if len(configs) > 1:
            print(f"run {i} of {len(configs)}: {one.name}")
        code = _train_one(one, module, options.resume)
        if code:
            return code
    return 0


def _train_one(config: Config, module: ModuleType | None, resume: bool) -> int:
    from bmjax import heads
    from bmjax.analysis.report import write_report

    result = heads.train(config, resume=resume)
    if result.interrupted:
        return 143 if result.interrupted == "SIGTERM" else 130
    dataset, _ = result.data
    for split, m in result.metrics.items():
        print(_line(split, m))
    if "test" in result.metrics:
        print_confusion(result.metrics["test"]["confusion"], dataset.classes)
    if module is not None and hasattr(module, "report"):
        module.report(result)
    print(f"report: {write_report(result.run_dir, dataset.images)}")
    return 0


def _line(split: str, m: dict[str, Any]) -> str:
    from bmjax.analysis.evaluation import interval_text

    return f"{split}: n {m['n']}, accuracy {interval_text(m, 'accuracy')}, macro F1 {interval_text(m, 'macro_f1')}"


def print_confusion(confusion: list[list[int]], classes: Sequence[str]) -> None:
    """The confusion matrix as text, rows the true class."""
    width = max(5, *(len(c) + 1 for c in classes))
    print("".rjust(width) + "".join(c.rjust(width) for c in classes) + "   (rows: true, columns: predicted)")
    for name, row in zip(classes, confusion, strict=True):
        print(name.rjust(width) + "".join(str(v).rjust(width) for v in row))


def evaluate(options: argparse.Namespace) -> int:
    path = Path(options.run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected the folder of a run that `bmjax train` made")
    from bmjax import loop
    from bmjax.analysis.report import write_report
    from bmjax.run import load_data

    data = load_data(Path(options.run), from_json(path.read_text()))
    m = loop.evaluate(options.run, options.split, options.which, data=data)
    print(
        f"{_line(options.split, m)}, balanced accuracy {m['balanced_accuracy']:.3f}, loss {m['loss']:.3f}, "
        f"ECE {m['ece']:.3f} ({options.which} checkpoint, step {m['step']})"
    )
    print_confusion(m["confusion"], data[0].classes)
    print(f"report: {write_report(options.run, data[0].images)}")
    return 0


def predict(options: argparse.Namespace) -> int:
    from bmjax.data.sources import image_files

    if options.weights is not None:
        if not options.run:
            raise ValueError("predict: expected images")
        given = [options.run, *options.paths]
        return cli_weights.predict_imagenet(options.backbone, options.weights, image_files(given), options.top)
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

    from bmjax.data import read_files
    from bmjax.loop import Predictor, load_run, predict_probs

    run = load_run(options.run, options.which)
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


def _classes_of(config: Config) -> tuple[int, str]:
    """(number of classes, where the number is from), without reading an image."""
    if config.data.source == "synthetic":
        from bmjax.data.synthetic import CLASSES

        return len(CLASSES), "rendered cells"
    from bmjax.data import list_source

    try:
        return len(list_source(config.data).classes), config.data.root
    except FileNotFoundError:
        return 7, "assumed, for data.root is not there"


def show(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config, _ = load_experiment(options.experiment)
    config = override(config, rest, f"bmjax show {options.experiment}")
    print(to_json(config))

    import jax

    from bmjax import loop
    from bmjax.model import count_parameters, create, init, parameter_table
    from bmjax.state import split_params

    classes, origin = (options.classes, "given") if options.classes else _classes_of(config)
    model = create(config.model, classes, config.train.dtype)
    variables = jax.eval_shape(lambda: init(model, jax.random.key(0), config.data.image_size))
    plans = loop.plan_stages(config, 1, model, variables["batch_stats"])

    # A backbone's layers are gathered by their first word: conv2, pool2, ...
    groups: dict[str, list[int]] = {}
    for row in parameter_table(variables):
        layer = tuple(row.path.split("/"))
        name = f"{layer[0]}/{layer[1].split('_')[0]}" if row.part == "backbone" else "/".join(layer[:-1])
        sums = groups.setdefault(name, [0, 0, 0] + [0] * len(plans))
        sums[0 if row.collection == "params" else 1] += row.count
        sums[2] += row.is_norm and layer[-1] == "mean"
        for i, plan in enumerate(plans):
            sums[3 + i] += row.count if row.collection == "params" and plan.is_trainable(layer) else 0
    header = ["parameters", "statistics", "norms", *(f"stage {i} trains" for i in range(len(plans)))]
    print(f"\n{'layers':30}" + "".join(h.rjust(16) for h in header))
    for name, sums in [*groups.items(), ("all", [sum(column) for column in zip(*groups.values(), strict=True)])]:
        print(f"{name:30}" + "".join(f"{s:16,}" for s in sums))
    print(f"\n{classes} classes ({origin})")
    for i, (stage, plan) in enumerate(zip(config.stages, plans, strict=True)):
        trainable = count_parameters(split_params(variables["params"], plan.is_trainable)[0])
        modes = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(plan.batch_norm).items())
        print(f"stage {i}: {stage.epochs} epochs, {trainable:,} parameters train; batch-norm: {modes}")
    if options.compile:
        _print_cost(config, model, plans, variables)
    return 0


def _print_cost(config: Config, model: Any, plans: list[Any], variables: dict[str, Any]) -> None:
    """FLOPs and memory by XLA, of the compiled train step of each stage on one device; nothing runs."""
    import jax
    import numpy as np

    from bmjax import loop
    from bmjax.losses import cross_entropy
    from bmjax.parallel import Parallel
    from bmjax.run import image_dtype
    from bmjax.state import create_state
    from bmjax.steps import make_eval_step

    size, b = config.data.image_size, config.train.batch_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    forward = jax.jit(make_eval_step(model, image_dtype=image_dtype(config))).lower(variables, {"image": image})
    if cost := forward.cost_analysis():
        print(f"one image forward: {cost['flops'] / 1e9:.2f} GFLOP")
    shapes = {"image": ((b, size, size, 3), np.uint8), "label": ((b,), np.int32), "position": ((b,), np.int32)}
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    parallel = Parallel("jit", (jax.devices()[0],))
    ema = config.train.ema_decay is not None
    for i, plan in enumerate(plans):
        state = jax.eval_shape(
            lambda v, p=plan: create_state(v, p.optimizer.tx, p.is_trainable, seed=0, ema=ema), variables
        )
        compiled = loop.compile_stage(config, model, plan, parallel, cross_entropy).lower(state, batch).compile()
        text, cost, memory = f"stage {i}, one step of {b} images:", compiled.cost_analysis(), compiled.memory_analysis()
        if cost and "flops" in cost:
            text += f" {cost['flops'] / 1e9:.1f} GFLOP;"
        if memory is not None:
            # The new state takes the place of the old one, which is donated.
            text += f" {memory.argument_size_in_bytes / 1e6:.0f} MB of state and batch,"
            text += f" {memory.temp_size_in_bytes / 1e6:.0f} MB temporary"
        print(text)


def list_names(options: argparse.Namespace) -> int:
    if options.cost:
        if options.kind != "attention":
            raise ValueError(f"--cost is for `bmjax list attention`; the kind is {options.kind!r}")
        cli_attention.print_table()
        return 0

    def attention() -> list[str]:
        return [f"{name:20} {text}" for name, text in cli_attention.first_lines().items()]

    def backbones() -> list[str]:
        from bmjax.backbones import list_backbones
        from bmjax.weights.catalog import RECORDS

        known = {r.backbone for r in RECORDS}
        return [f"{name:20} {'imagenet weights' if name in known else ''}".rstrip() for name in list_backbones()]

    def optimizers() -> list[str]:
        from bmjax.optim import PRESETS

        def preset(numbers: dict[str, Any]) -> str:
            return ", ".join(f"{key} {value}" for key, value in numbers.items())

        return [f"{name:20} keras: {preset(p['keras'])}; tuned: {preset(p['tuned'])}" for name, p in PRESETS.items()]

    kinds: dict[str, Callable[[], list[str]]] = {
        "attention": attention,
        "backbones": backbones,
        "optimizers": optimizers,
        "weights": cli_weights.record_lines,
    }
    for kind in [options.kind] if options.kind else kinds:
        print(f"{kind}:")
        print(*(f"  {line}" for line in kinds[kind]()), sep="\n")
    return 0


def doctor(options: argparse.Namespace) -> int:
    from bmjax.doctor import examine

    findings = examine()
    for level, subject, text in findings:
        print(f"{level:5} {subject}: {text}")
    return int(any(level == "FAIL" for level, _, _ in findings))


def _parser() -> argparse.ArgumentParser:
    import bmjax

    parser = argparse.ArgumentParser(prog="bmjax", description="Classify bone-marrow cells with attention, in JAX.")
    parser.add_argument("--version", action="version", version=bmjax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    experiment = "a Python file with config(), a config.json, or a run's folder"
    overrides = "Any field of the configuration follows by its dotted name, as in --optim.lr 0.01; "
    overrides += "`bmjax %(prog)s EXPERIMENT --help` lists them."

    def configured(name: str, text: str) -> argparse.ArgumentParser:
        # Abbreviations are off, and --help is left, so that what follows the experiment reaches the configuration.
        p = verbs.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=overrides.replace("%(prog)s", name),
            usage=f"bmjax {name} EXPERIMENT [options] [--FIELD VALUE ...]",
            add_help=False,
            allow_abbrev=False,
        )
        p.add_argument("experiment", nargs="?", help=experiment)
        p.set_defaults(parser=p)
        return p

    p = configured("train", "train an experiment")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument("--sweep", action="store_true", help="run each of the experiment's sweep()")
    cli_compare.add_arguments(configured("compare", "train attention variants on equal terms and compare them"))
    p = configured("show", "print what an experiment is, without training")
    p.add_argument("--classes", type=int, help="number of classes; by default that of the data")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave out FLOPs and memory; quicker")
    p = verbs.add_parser("eval", help="evaluate a run on one split")
    p.add_argument("run", help="folder of a run")
    p.add_argument("--split", choices=("train", "val", "test"), default="val")
    p.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    p = verbs.add_parser("predict", help="classify image files or folders")
    p.add_argument("run", nargs="?", help="folder of a run; left out with --weights")
    p.add_argument("paths", nargs="*", help="images, or folders of images")
    p.add_argument("--weights", help="name ImageNet's classes by these weights: imagenet, imagenet-timm, or a path")
    p.add_argument("--backbone", default="densenet121", help="with --weights: the backbone (default: %(default)s)")
    p.add_argument("--top", type=int, default=5, help="with --weights: so many classes an image (default: %(default)s)")
    p.add_argument("--out", default="predictions.csv", help="a .csv or .parquet file (default: %(default)s)")
    p.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint")
    p.add_argument("--batch-size", type=int, help="images at once; by default the run's train.eval_batch_size")
    p.add_argument("--strict", action="store_true", help="exit with 1 if a file can't be read")
    p = verbs.add_parser("list", help="list what there is by name")
    p.add_argument("kind", nargs="?", choices=("attention", "backbones", "optimizers", "weights"))
    p.add_argument("--cost", action="store_true", help="attention: a table with options, maps, FLOPs, measured time")
    cli_weights.add_parser(verbs)
    cli_attention.add_parser(verbs)
    cli_explain.add_parser(verbs)
    cli_data.add_parser(verbs)
    verbs.add_parser("doctor", help="check the environment for known traps")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. A wrong input is one line on standard error, and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.verb in ("train", "show", "compare"):
        if options.experiment is None:
            if {"-h", "--help"} & set(rest):
                options.parser.print_help()
                return 0
            options.parser.error(f"expected an experiment, as in: bmjax {options.verb} experiments/quickstart.py")
    elif rest and (options.verb, getattr(options, "action", "")) != ("data", "audit"):
        parser.error(f"{options.verb}: unrecognized arguments: {' '.join(rest)}")
    try:
        if options.verb in ("train", "show", "compare"):
            return {"train": train, "show": show, "compare": cli_compare.run}[options.verb](options, rest)
        by_verb = {"eval": evaluate, "predict": predict, "list": list_names, "doctor": doctor}
        by_verb |= {
            "weights": cli_weights.run,
            "new": cli_attention.run,
            "check": cli_attention.run,
            "explain": cli_explain.run,
            "data": lambda options: cli_data.run(options, rest),
        }
        return by_verb[options.verb](options)
    except (ValueError, OSError, FloatingPointError) as e:
        if os.environ.get("BMJAX_DEBUG"):
            raise
        print(f"bmjax: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
