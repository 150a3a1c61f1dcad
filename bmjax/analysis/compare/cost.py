"""What each row of a comparison costs: parameters, FLOPs, images/s."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from bmjax.analysis.cost import flops_of
from bmjax.config.base import Config
from bmjax.model.classifier import at_last
from bmjax.model.create import create
from bmjax.model.parameters import count_parameters, part_of, split_params
from bmjax.runs.records import read_records


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a variant costs: its parameters, FLOPs of an image's forward pass beyond the backbone, and images/s in
    training, the median over steps."""

    parameters: int
    flops: float
    images_per_second: float


def costs(configs: dict[str, list[Config]], classes: int) -> dict[str, Cost]:
    """Of each row, by its first run's configuration; images/s of all its runs."""
    found = {}
    shape: Any = None
    for variant, runs in configs.items():
        config, size = runs[0], runs[0].data.image_size
        model = create(config.model, classes, config.train.dtype)
        image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        if at_last(model):
            shape = shape or _map_shape(model, image)
            parameters, flops = _forward(model, shape, start="feature_map")
        else:
            plain = create(dataclasses.replace(config.model, attention="none", attention_options={}), classes)
            parameters, flops = _forward(model, image)
            flops -= _forward(plain, image, output="feature_map")[1]
        speeds = [r["images_per_second"] for run in runs for r in read_records(run.run_dir, "train")]
        found[variant] = Cost(parameters, flops, float(np.median(speeds)))
    return found


def _map_shape(model: Any, image: jax.ShapeDtypeStruct) -> Any:
    def feature_map(x: jax.Array) -> Any:
        return model.init_with_output(jax.random.key(0), x, output="feature_map")[0]

    return jax.eval_shape(feature_map, image)


def _forward(model: Any, x: jax.ShapeDtypeStruct, **options: Any) -> tuple[int, float]:
    """(parameters of attention, FLOPs of the forward pass)."""
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **options), x)
    own, _ = split_params(variables["params"], lambda path: part_of(path) == "attention")
    return count_parameters(own), flops_of(lambda v, x: model.apply(v, x, **options), variables, x)
