"""What training on many devices moves and holds.

    python tools/scaling.py gradients [--classes 7] [--backbone NAME]
    python tools/scaling.py memory [--backbone NAME] [--size 64 --batch 32 --devices 8]

`gradients`: the bytes of gradient that a step adds up over the devices where the whole network trains, by backbone.
`memory`: of each layout of the state, the bytes of it that one device holds, counted from the arrays on it, and the
scratch memory of the compiled train step by XLA's own account; on virtual CPU devices where there are not so many.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole on each device": {},
    "shard_params": {"shard_params": True},
    "shard_params, remat all": {"shard_params": True, "remat": ("all",)},
}


def gradients(classes: int, names: Sequence[str]) -> str:
    """A table: parameters and megabytes of gradient in float32."""
    import jax

    from bmjax.config import ModelConfig
    from bmjax.model import count_parameters, create, init

    lines = ["| backbone | parameters | MB a step | MB sent by each of 8 devices, in a ring |", "|---|---|---|---|"]
    for name in names:
        model = create(ModelConfig(backbone=name, weights=None), classes)
        shapes = jax.eval_shape(lambda model=model: init(model, jax.random.key(0), 96))["params"]
        n = count_parameters(shapes)
        lines.append(f"| {name} | {n:,} | {4 * n / 1e6:.1f} | {4 * n / 1e6 * 2 * 7 / 8:.1f} |")
    return "\n".join(lines)


def held(name: str, fields: dict[str, Any], options: argparse.Namespace) -> str:
    """A row of the table of memory."""
    import jax
    import numpy as np

    from bmjax.config import Config, DataConfig, ModelConfig, TrainConfig
    from bmjax.model import create
    from bmjax.runs.folder import new_variables
    from bmjax.runs.state import create_state
    from bmjax.training.losses import make_loss
    from bmjax.training.parallel import Parallel
    from bmjax.training.stages import compile_stage, plan_stages

    size, batch = options.size, options.batch
    train = TrainConfig(batch_size=batch, devices=options.devices, **fields)
    model = ModelConfig(backbone=options.backbone, weights=None, preprocess="tf", attention="se")
    config = Config(data=DataConfig(image_size=size), model=model, train=train)
    classifier = create(config.model, options.classes)
    variables = new_variables(config, classifier)
    plan = plan_stages(config, 4, classifier, variables["batch_stats"])[-1]
    state = create_state(variables, plan.optimizer.tx, plan.is_trainable, seed=0, ema=False)
    parallel = Parallel.of(train, batch)
    step = compile_stage(config, classifier, plan, parallel, make_loss(train, np.ones(options.classes)))
    placed = parallel.to_devices(state)
    first = parallel.devices[0]
    parts = [s.data.nbytes for x in jax.tree.leaves(placed) for s in x.addressable_shards if s.device == first]
    images = {"image": np.zeros((batch, size, size, 3), np.uint8), "label": np.zeros(batch, np.int32)}
    moved = parallel.put_batch(images | {"position": np.arange(batch, dtype=np.int32)})
    account = step.lower(placed, moved).compile().memory_analysis()
    return f"| {name} | {sum(parts) / 1e6:.2f} | {account.temp_size_in_bytes / 1e6:.1f} |"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gradients", "memory"))
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--backbone", help="default: all that have published weights; of memory, resnet50")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--devices", type=int, default=8)
    options = parser.parse_args(words)
    if options.what == "gradients":
        from bmjax.backbones import list_backbones

        published = [name for name in list_backbones() if not name.endswith(("_tiny", "_small"))]
        print(gradients(options.classes, [options.backbone] if options.backbone else published))
        return
    options.backbone = options.backbone or "resnet50"
    if "jax" not in sys.modules and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    import bmjax  # noqa: F401  (sets its flags before jax is imported)

    print(f"{options.backbone}, batch of {options.batch} at {options.size} pixels, {options.devices} devices, adamax\n")
    print("| state | MB of state on a device | MB of scratch on a device |\n|---|---|---|")
    for name, fields in LAYOUTS.items():
        print(held(name, fields, options), flush=True)


if __name__ == "__main__":
    main()
