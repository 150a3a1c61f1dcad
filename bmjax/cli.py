"""The command line: thin verbs over the API. jax is imported only by the verbs that compute."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bmjax.config import Config, from_json, to_json


def load_experiment(path: str) -> tuple[Config, ModuleType | None]:
    """The Config of an experiment file (its `config()`), or of a run's config.json; and the experiment's module.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file has no `config()` that returns a Config.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such experiment; expected a Python file with config(), or a config.json")
    if file.suffix == ".json":
        return from_json(file.read_text()), None
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: expected a file ending in .py or .json")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.config() if hasattr(module, "config") else None
    if not isinstance(config, Config):
        raise ValueError(f"{path}: config() gives {config!r}; expected a bmjax.Config")
    return config, module


def override(config: Config, arguments: Sequence[str], prog: str) -> Config:
    """The configuration with fields set by their dotted names, types checked; wrong ones exit with a suggestion."""
    import tyro

    # Every field is a plain flag: no sub-commands for optional values, no True/False pairs of flags.
    flags = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
    return tyro.cli(Config, default=config, args=list(arguments), prog=prog, config=flags)


def settings(overrides: dict[str, Any]) -> list[str]:
    """Overrides of a sweep, {"optim.lr": 0.1}, as command-line arguments."""
    return [word for name, value in overrides.items() for word in (f"--{name}", str(value))]


def train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config, module = load_experiment(options.experiment)
    config = override(config, rest, f"bmjax train {options.experiment}")
    configs = [config]
    if options.sweep:
        if module is None or not hasattr(module, "sweep"):
            raise ValueError(f"{options.experiment}: has no sweep(); expected one that yields overrides")
        configs = []
        for i, changes in enumerate(module.sweep()):
            changed = override(config, settings(changes), "sweep")
            name = changes.get("name", f"{config.name}_{i}")
            run_dir = f"{config.run_dir}/{name}" if config.run_dir else ""
            configs.append(dataclasses.replace(changed, name=name, run_dir=run_dir))
    for config in configs:
        code = _train_one(config, module, options.resume)
        if code:
            return code
    return 0


def _train_one(config: Config, module: ModuleType | None, resume: bool) -> int:
    from bmjax import loop
    from bmjax.analysis.report import interval_text, write_report
    from bmjax.run import load_data

    result = loop.train(config, resume=resume)
    if result.interrupted:
        return 143 if result.interrupted == "SIGTERM" else 130
    dataset, _ = load_data(result.run_dir, config)
    report = write_report(result.run_dir, dataset.images)
    for split, m in result.metrics.items():
        print(f"{split}: n {m['n']}, accuracy {interval_text(m, 'accuracy')}, macro F1 {interval_text(m, 'macro_f1')}")
    if "test" in result.metrics:
        print_confusion(result.metrics["test"]["confusion"], dataset.classes)
    if module is not None and hasattr(module, "report"):
        module.report(result)
    print(f"report: {report}")
    return 0


def print_confusion(confusion: list[list[int]], classes: Sequence[str]) -> None:
    """The confusion matrix as text, rows the true class."""
    width = max(5, *(len(c) + 1 for c in classes))
    print("".rjust(width) + "".join(c.rjust(width) for c in classes) + "   (rows: true, columns: predicted)")
    for name, row in zip(classes, confusion, strict=True):
        print(name.rjust(width) + "".join(str(v).rjust(width) for v in row))


def evaluate(options: argparse.Namespace) -> int:
    from bmjax import loop
    from bmjax.analysis.report import interval_text
    from bmjax.run import load_run

    m = loop.evaluate(options.run, options.split, options.which)
    print(
        f"{options.split}: n {m['n']}, accuracy {interval_text(m, 'accuracy')}, macro F1 "
        f"{interval_text(m, 'macro_f1')}, balanced accuracy {m['balanced_accuracy']:.3f}, loss {m['loss']:.3f}, "
        f"ECE {m['ece']:.3f} ({options.which} checkpoint, step {m['step']})"
    )
    print_confusion(m["confusion"], load_run(options.run, options.which).classes)
    return 0


def predict(options: argparse.Namespace) -> int:
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from bmjax.data.sources import SUFFIXES, decode_images
    from bmjax.loop import load_run, predict_probs

    out = Path(options.out)
    if out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out is {options.out!r}; expected a name ending in .csv or .parquet")
    paths: list[Path] = []
    for path in map(Path, options.paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        paths += found
    run = load_run(options.run, options.which)
    # Decoded and classified a thousand at a time, so that a folder larger than memory works.
    kept: list[str] = []
    errors: list[str] = []
    probs: list[np.ndarray] = []
    for start in range(0, len(paths), 1024):
        part = paths[start : start + 1024]
        decoded = list(decode_images(part, run.config.data.image_size))
        errors += [f"{p}: {d}" for p, d in zip(part, decoded, strict=True) if isinstance(d, str)]
        images = [d for d in decoded if not isinstance(d, str)]
        kept += [str(p) for p, d in zip(part, decoded, strict=True) if not isinstance(d, str)]
        if images:
            probs.append(predict_probs(run, np.stack(images)))
    if errors:
        print(f"{len(errors)} of {len(paths)} images can't be read:", *errors, sep="\n  ", file=sys.stderr)
    if not kept:
        raise ValueError(f"none of the {len(paths)} files given is a readable image")
    table = np.concatenate(probs)
    columns: dict[str, Any] = {"path": kept, "predicted": [run.classes[i] for i in table.argmax(-1)]}
    columns |= {name: table[:, i] for i, name in enumerate(run.classes)}
    arrow = pa.table(columns)
    write = pyarrow.csv.write_csv if out.suffix == ".csv" else pyarrow.parquet.write_table
    write(arrow, str(out))
    print(f"{len(kept)} images classified into {out}")
    return 1 if errors and options.strict else 0


def show(options: argparse.Namespace, rest: Sequence[str]) -> int:
    import jax
    import numpy as np

    from bmjax import loop
    from bmjax.model import count_parameters, create, init, parameter_table
    from bmjax.parallel import Parallel
    from bmjax.state import create_state, split_params

    config, _ = load_experiment(options.experiment)
    config = override(config, rest, f"bmjax show {options.experiment}")
    print(to_json(config))
    model = create(config.model, options.classes, config.train.dtype)
    variables = jax.eval_shape(lambda: init(model, jax.random.key(0), config.data.image_size))
    groups: dict[tuple[str, str], list[int]] = {}
    for row in parameter_table(variables):
        layer = row.path.split("/")
        # A backbone's layers are gathered by their first word: conv2, pool2, ...
        name = "/".join([layer[0], layer[1].split("_")[0]]) if len(layer) > 2 else layer[0]
        sums = groups.setdefault((row.part, name), [0, 0, 0])
        sums[0 if row.collection == "params" else 1] += row.count
        sums[2] += row.is_norm and layer[-1] == "mean"
    print(f"\n{'layers':32}{'parameters':>12}{'statistics':>12}{'norms':>7}")
    for (_, name), (parameters, statistics, norms) in groups.items():
        print(f"{name:32}{parameters:>12,}{statistics:>12,}{norms:>7}")
    print(f"{'all':32}{count_parameters(variables['params']):>12,}{count_parameters(variables['batch_stats']):>12,}")
    plans = loop.plan_stages(config, 1, model, variables["batch_stats"])
    for i, (stage, plan) in enumerate(zip(config.stages, plans, strict=True)):
        trainable = count_parameters(split_params(variables["params"], plan.is_trainable)[0])
        modes = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(plan.batch_norm).items())
        print(f"stage {i}: {stage.epochs} epochs, {trainable:,} parameters train; batch-norm: {modes}")
    size, b = config.data.image_size, config.train.batch_size
    shapes = jax.eval_shape(
        lambda v: create_state(
            v, plans[-1].optimizer.tx, plans[-1].is_trainable, seed=0, ema=config.train.ema_decay is not None
        ),
        variables,
    )
    batch = {
        "image": jax.ShapeDtypeStruct((b, size, size, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((b,), np.int32),
        "position": jax.ShapeDtypeStruct((b,), np.int32),
    }
    parallel = Parallel("jit", (jax.devices()[0],))
    compiled = loop.compile_stage(config, model, plans[-1], parallel, None).lower(shapes, batch).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if cost and "flops" in cost:
        print(f"one train step of {b} images: {cost['flops'] / 1e9:.1f} GFLOP (by XLA, last stage, one device)")
    if memory is not None:
        arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        print(f"memory: {arguments / 1e6:.0f} MB of state and batch, {temporary / 1e6:.0f} MB temporary")
    return 0


def list_names(options: argparse.Namespace) -> int:
    def attention() -> list[str]:
        from bmjax.attention import list_attention

        return list_attention()

    def backbones() -> list[str]:
        from bmjax.backbones import list_backbones

        return list_backbones()

    def optimizers() -> list[str]:
        from bmjax.optim import PRESETS

        return [f"{name}  keras lr {p['keras']['lr']:g}, tuned {p['tuned']}" for name, p in PRESETS.items()]

    def weights() -> list[str]:
        from bmjax.weights.catalog import RECORDS

        return [f"{r.name}  {r.parameters:,} values, {r.preprocess}, {r.checksum}\n    {r.url}" for r in RECORDS]

    kinds: dict[str, Callable[[], list[str]]] = {
        "attention": attention,
        "backbones": backbones,
        "optimizers": optimizers,
        "weights": weights,
    }
    for kind in [options.kind] if options.kind else kinds:
        print(f"{kind}:")
        print(*(f"  {line}" for line in kinds[kind]()), sep="\n")
    return 0


def doctor() -> int:
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
    p = verbs.add_parser("train", help="train an experiment", add_help=False)
    p.add_argument("experiment", nargs="?", help="a Python file with config(), or a config.json")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument("--sweep", action="store_true", help="run all of the experiment's sweep()")
    p = verbs.add_parser("show", help="print what an experiment is, without training", add_help=False)
    p.add_argument("experiment", nargs="?")
    p.add_argument("--classes", type=int, default=7, help="number of classes")
    p = verbs.add_parser("eval", help="evaluate a run on one split")
    p.add_argument("run", help="folder of a run")
    p.add_argument("--split", choices=("train", "val", "test"), default="val")
    p.add_argument("--which", choices=("best", "last"), default="best")
    p = verbs.add_parser("predict", help="classify image files or folders")
    p.add_argument("run", help="folder of a run")
    p.add_argument("paths", nargs="+", help="images, or folders of images")
    p.add_argument("--out", default="predictions.csv", help="a .csv or .parquet file")
    p.add_argument("--which", choices=("best", "last"), default="best")
    p.add_argument("--strict", action="store_true", help="exit with 1 if a file can't be read")
    p = verbs.add_parser("list", help="list what there is by name")
    p.add_argument("kind", nargs="?", choices=("attention", "backbones", "optimizers", "weights"))
    verbs.add_parser("doctor", help="check the environment for known traps")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. A wrong input is one line on standard error, and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.verb in ("train", "show"):
        if options.experiment is None:
            parser.error(
                f"{options.verb}: expected an experiment, as in: bmjax {options.verb} experiments/quickstart.py"
            )
    elif rest:
        parser.error(f"{options.verb}: unrecognized arguments: {' '.join(rest)}")
    try:
        if options.verb in ("train", "show"):
            return {"train": train, "show": show}[options.verb](options, rest)
        if options.verb == "doctor":
            return doctor()
        return {"eval": evaluate, "predict": predict, "list": list_names}[options.verb](options)
    except (ValueError, OSError, FloatingPointError) as e:
        if os.environ.get("BMJAX_DEBUG"):
            raise
        print(f"bmjax: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
