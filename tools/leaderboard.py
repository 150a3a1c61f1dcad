"""The leaderboard of attention variants: trains all of them on equal terms and writes docs/leaderboard.md.

    python tools/leaderboard.py --data FOLDER --weights FILE [--hours 3] [--seeds 2] [--out FOLDER] [--write docs]

All variants of `bmjax list attention`, on the frozen features of experiments/leaderboard.py: five folds, two seeds in
each (ten runs a variant) unless told otherwise, and in each fold three learning rates of which validation chooses.
First the step of every variant is timed, and the number of epochs is the largest, from 2 to 15, with which all fits the
hours; it stands in OUT/budget.json from then on. Killed and called again it goes on where it was. `--estimate` prints
the budget and ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import bmjax  # noqa: F401  (sets the CPU flags before jax is imported)

ROOT = Path(__file__).resolve().parents[1]
FOLDS, TRIALS, VIEWS_A_SECOND, PER_RUN_SECONDS = 5, 3, 17.0, 4.0
"""The last two were measured on 2 cores: features at 224 pixels, and what a run of a cheap variant takes."""
EPOCHS = range(2, 16)
log = logging.getLogger("bmjax.leaderboard")


def configuration(args: argparse.Namespace):
    """The experiment on the given data."""
    from bmjax.config.experiment import load_experiment

    config, _ = load_experiment(str(ROOT / "experiments/leaderboard.py"))
    data = dataclasses.replace(config.data, root=args.data, source=args.source)
    if args.image_size:
        data = dataclasses.replace(data, image_size=args.image_size)
    model = dataclasses.replace(
        config.model, backbone=args.backbone, weights=None if args.weights == "none" else args.weights
    )
    return dataclasses.replace(config, data=data, model=model, run_dir=args.out)


def step_seconds(config, variants: Sequence[str]) -> dict[str, float]:
    """Seconds of a training step of each variant's attention, at the shape that the classifier gives it."""
    import jax
    import numpy as np

    from bmjax.analysis.cost import measure
    from bmjax.attention import commutes_with_pooling, create_attention
    from bmjax.model.create import create, resolve

    size, batch = config.data.image_size, config.train.batch_size
    model = create(resolve(dataclasses.replace(config.model, attention="none")), 2, config.train.dtype)
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)

    def feature_map(x: jax.Array):
        return model.init_with_output(jax.random.key(0), x, output="feature_map")[0]

    h, w, c = jax.eval_shape(feature_map, image).shape[1:]
    found = {}
    for variant in variants:
        module = create_attention(variant)
        shape = (batch, 1, 1, c) if commutes_with_pooling(module) else (batch, h, w, c)
        found[variant] = measure({variant: module}, shape, n=3)[variant].step_ms / 1e3
        log.info("%s: %.1f ms a step", variant, 1e3 * found[variant])
    return found


def hours_of(config, seconds: dict[str, float], images: int, epochs: int, seeds: int) -> float:
    """Hours of all trials and runs and of the features, as if one ran at a time."""
    share = config.data.split[0] / (config.data.split[0] + config.data.split[1]) * (FOLDS - 1) / FOLDS
    steps = epochs * int(share * images / config.train.batch_size)
    rounds = FOLDS * (seeds + TRIALS)
    views = images * (config.features.views + 1) * (config.data.image_size / 224) ** 2
    per_round = sum(steps * s + PER_RUN_SECONDS for s in seconds.values())
    return (rounds * per_round + views / VIEWS_A_SECOND) / 3600


def budget(args: argparse.Namespace, config, variants: Sequence[str], images: int) -> dict:
    """Epochs and what they rest on: as chosen before for this folder, or by timing each variant."""
    path = Path(args.out) / "budget.json"
    if path.is_file():
        return json.loads(path.read_text())
    seconds = step_seconds(config, variants)
    by_epochs = {epochs: hours_of(config, seconds, images, epochs, args.seeds) for epochs in EPOCHS}
    fits = [epochs for epochs, hours in by_epochs.items() if hours <= args.hours]
    if not fits:
        raise ValueError(
            f"{EPOCHS[0]} epochs take {by_epochs[EPOCHS[0]]:.1f} hours; expected at most --hours {args.hours:g}"
        )
    found = {"epochs": fits[-1], "hours": by_epochs[fits[-1]], "step_seconds": seconds, "cores": os.cpu_count()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2))
    return found


def groups(c) -> list[str]:
    """What can't be told apart, in words."""
    from bmjax.analysis.compare.picture import cliques

    order = [row.variant for row in sorted(c.rows, key=lambda row: -row.accuracy)]
    return [f"- {', '.join(order[first : last + 1])}" for first, last in cliques(order, c.apart or ())]


def document(args: argparse.Namespace, c, plan: dict) -> str:
    """docs/leaderboard.md."""
    from bmjax.analysis.compare.table import markdown

    command = f"python tools/leaderboard.py --data FOLDER --weights FILE --hours {args.hours:g} --seeds {args.seeds}"
    machine = f"{plan['cores']} cores of a {platform.machine()} CPU"
    return "\n".join([
        "# Leaderboard of attention variants",
        "",
        f"`{command}`, on {machine}. The number of epochs ({plan['epochs']}) is what fits {args.hours:g} hours for all",
        "variants alike, the costliest included; with more, costly variants may gain more than cheap ones.",
        "",
        markdown(c),
        "## What can't be told apart",
        "",
        "In each line no two can be told apart, all pairs held to 5 % together. That corrects for all pairs, and the",
        "table for the differences to the baseline alone; so a difference may be shown there and not here.",
        "",
        *groups(c),
        "",
        "![Variants by accuracy; bars join those that can't be told apart](leaderboard_apart.png)",
        "",
        "![Accuracy against parameters, FLOPs and speed](leaderboard_cost.png)",
        "",
        "![Differences to the baseline with simultaneous intervals](leaderboard_differences.png)",
        "",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="a folder of images per class")
    parser.add_argument("--source", default="folder", help="as data.source (default: folder)")
    parser.add_argument("--backbone", default="densenet169")
    parser.add_argument("--weights", default="imagenet", help="a file, or a name of `bmjax weights list`")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument("--image-size", type=int, help="pixels; by default the experiment's")
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=2, help="in each fold (default: 2)")
    parser.add_argument("--out", default="runs/leaderboard", metavar="FOLDER")
    parser.add_argument("--write", metavar="FOLDER", help="also write leaderboard.md and its pictures there")
    parser.add_argument("--estimate", action="store_true", help="print the budget and end")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from bmjax.analysis.compare.compare import compare
    from bmjax.analysis.compare.design import Design
    from bmjax.attention import list_attention
    from bmjax.data.load import load_dataset

    config = configuration(args)
    variants = args.variants or list_attention()
    plan = budget(args, config, variants, len(load_dataset(config.data)))
    print(f"{plan['epochs']} epochs, about {plan['hours']:.1f} hours for {len(variants)} variants")
    if args.estimate:
        return 0
    logging.getLogger("bmjax.training").setLevel(logging.WARNING)
    stages = (dataclasses.replace(config.stages[0], epochs=plan["epochs"]),)
    config = dataclasses.replace(config, stages=stages)
    found = compare(config, variants, args.seeds, design=Design(folds=FOLDS, tune=TRIALS))
    text = document(args, found, plan)
    print(text)
    if args.write:
        folder = Path(args.write)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "leaderboard.md").write_text(text)
        for name in ("apart", "cost", "differences"):
            shutil.copy(Path(args.out) / f"comparison_{name}.png", folder / f"leaderboard_{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
