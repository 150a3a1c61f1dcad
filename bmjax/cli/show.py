"""`bmjax show`: what an experiment is, without training."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from bmjax.cli.configured import add_configured, configuration
from bmjax.config.base import Config, to_json


def add_parser(verbs: Any) -> None:
    """Adds `show` to a parser's verbs."""
    p = add_configured(verbs, "show", "print what an experiment is, without training", run)
    p.add_argument("--classes", type=int, help="number of classes; by default that of the data")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="leave out FLOPs and memory; quicker")


def _classes_of(config: Config) -> tuple[int, str]:
    """(number of classes, where the number is from), without reading an image."""
    if config.data.source == "synthetic":
        from bmjax.data.sources.cells import CLASSES

        return len(CLASSES), "rendered cells"
    from bmjax.data import list_source

    try:
        return len(list_source(config.data).classes), config.data.root
    except FileNotFoundError:
        return 7, "assumed, for data.root is not there"


def _precision(config: Config) -> str:
    """What `train.precision` comes to on the devices there are."""
    import jax

    platform = jax.default_backend()
    if config.train.dtype != "float32":
        return f"of no account: the network computes in {config.train.dtype}"
    if platform == "cpu" or config.train.precision == "highest":
        return f"float32 on this {platform}"
    by_platform = {"gpu": "TF32", "tpu": "bfloat16" if config.train.precision == "default" else "three of bfloat16"}
    return f"{by_platform.get(platform, 'less than float32')} on this {platform}"


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config, _ = configuration(options, rest)
    print(to_json(config))

    import jax

    from bmjax.model import count_parameters, create, init, parameter_table, split_params
    from bmjax.training.stages import plan_stages

    classes, origin = (options.classes, "given") if options.classes else _classes_of(config)
    model = create(config.model, classes, config.train.dtype)
    variables = jax.eval_shape(lambda: init(model, jax.random.key(0), config.data.image_size))
    plans = plan_stages(config, 1, model, variables["batch_stats"])

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
    print(f"float32 products: train.precision {config.train.precision}, {_precision(config)}")
    if options.compile:
        _print_cost(config, model, plans, variables)
    return 0


def _print_cost(config: Config, model: Any, plans: list[Any], variables: dict[str, Any]) -> None:
    """FLOPs and memory by XLA, of the compiled train step of each stage on one device; nothing runs."""
    import jax
    import numpy as np

    from bmjax.analysis.cost import flops_of, step_flops, step_program
    from bmjax.runs.folder import image_dtype
    from bmjax.training.steps import make_eval_step

    size, b = config.data.image_size, config.train.batch_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    forward = flops_of(make_eval_step(model, image_dtype=image_dtype(config)), variables, {"image": image})
    print(f"one image forward: {forward / 1e9:.2f} GFLOP")
    for i, plan in enumerate(plans):
        memory = step_program(config, model, plan, variables).memory_analysis()
        text = f"stage {i}, one step of {b} images: {step_flops(config, model, plan, variables) / 1e9:.1f} GFLOP;"
        if memory is not None:
            # The new state takes the place of the old one, which is donated.
            text += f" {memory.argument_size_in_bytes / 1e6:.0f} MB of state and batch,"
            text += f" {memory.temp_size_in_bytes / 1e6:.0f} MB temporary"
        print(text)
