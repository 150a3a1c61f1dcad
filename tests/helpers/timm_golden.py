"""timm's outputs of weights that are made from their names (tests/golden/backbone_timm.md), and ours of the same."""

import json
import pathlib
import zlib

import jax
import numpy as np

from bmjax import weights
from bmjax.weights import catalog, timm
from bmjax.weights.merge import merge

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# backbone -> name in timm
NAMES = {
    record.backbone: record.name.removeprefix("timm-").split(".")[0]
    for record in catalog.RECORDS
    if record.source == "timm"
}


def value_of(key, shape):
    """The weight of a timm key, in torch's layout: the rule by which the golden outputs were made."""
    r = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(r)
    if key.endswith(("running_mean", "bias")):
        return 0.1 * r
    if len(shape) == 1:
        return 1 + 0.1 * r
    return np.float32(1.4142135) * r / np.sqrt(np.float32(max(1, np.prod(shape[1:]))))


def state_dict(backbone):
    """All that a file of timm's holds, its counters included."""
    keys = json.loads((GOLDEN / f"backbone_{NAMES[backbone]}_timm_keys.json").read_text())
    return {
        key: np.zeros((), np.int64) if key.endswith("num_batches_tracked") else value_of(key, tuple(shape))
        for key, shape in keys.items()
    }


def outputs(backbone):
    """(ours, timm's): {"features_mean", "features_first", "features_shape", "logits"} of the same weights."""
    golden = np.load(GOLDEN / f"backbone_{NAMES[backbone]}_timm.npz")
    x = np.random.default_rng(int(golden["input_seed"])).standard_normal(golden["input_shape"]).astype(np.float32)
    record = catalog.find(backbone, top=True, source="timm")
    model = weights.network(record)
    shapes, _ = weights.network_shapes(model)
    tensors = {key: a for key, a in state_dict(backbone).items() if not key.endswith(record.unused)}
    variables = merge(shapes, timm.to_variables(tensors, backbone, model, shapes), origin=record.name)
    seen = {}

    @jax.jit
    def run(variables, x):
        logits = model.apply(variables, x, tap=lambda stage, x: seen.setdefault(stage, x))
        return seen[model.stages[-1]], logits

    features, logits = map(np.asarray, run(variables, x))
    ours = {"features_mean": features.mean((1, 2)), "features_first": features[0, 0, 0], "logits": logits}
    return ours | {"features_shape": features.shape}, {key: golden[key] for key in (*ours, "features_shape")}
