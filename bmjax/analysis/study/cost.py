"""What a network of the study costs, beside its time: parameters, and the memory of a train step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.analysis.cost import step_program
from bmjax.data.batches import steps_per_epoch
from bmjax.files import read_json, write_text
from bmjax.model.create import create, init
from bmjax.model.parameters import count_parameters
from bmjax.runs.folder import read_config
from bmjax.runs.records import read_records
from bmjax.training.losses import make_loss
from bmjax.training.stages import plan_stages


def network_facts(run: Path) -> dict[str, Any]:
    """Of a run's network: parameters (statistics included, as Keras counts), the best epoch, and the bytes of state,
    batch and temporaries of a step of the last stage, as XLA plans them; None where it does not say.

    Compiles the step once more, or finds it in the compilation cache; what was found is kept in cost.json.
    """
    path = run / "cost.json"
    if known := read_json(path):
        return known
    config, data, results = read_config(run), read_json(run / "dataset.json"), read_json(run / "results.json")
    model = create(config.model, len(data["classes"]), config.train.dtype)
    variables = jax.eval_shape(lambda: init(model, jax.random.key(0), config.data.image_size))
    counts = np.array([data["counts"]["train"][name] for name in data["classes"]])
    per_epoch = steps_per_epoch(int(counts.sum()), config.train.batch_size)
    plan = plan_stages(config, per_epoch, model, variables["batch_stats"])[-1]
    memory = step_program(config, model, plan, variables, make_loss(config.train, counts)).memory_analysis()
    epochs = read_records(run, "epoch")
    found = {
        "parameters": count_parameters(variables),
        "step_bytes": None if memory is None else memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "best_epoch": next(r["epoch"] for r in epochs if r["step"] == results["val"]["step"]),
    }
    write_text(path, json.dumps(found))
    return found
