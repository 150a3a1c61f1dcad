"""How far our backbones are from Keras's and timm's, as one Markdown table:

python -m tools.parity [MEMBER ...]

Weights are random; statistics are those of a batch of random images: with statistics of no network EfficientNetB5 is
so ill-conditioned that Keras in float32 is a tenth off Keras in float64. Both are the same in both. An error is the
largest difference over the largest value of the other's. Keras saves its model, `port` turns the file into ours, and
what is read from that is compared: arrays exactly; features and logits in eval mode at two sizes, in float32; one train
step in float64, where float32's rounding doesn't hide what differs: its loss, the worst layer of the gradients, the
worst leaf of the running statistics' moves (random statistics there). timm: features and logits against timm's own
outputs of made-up weights (tests/golden). Full size, with top, 2 images.
"""

import argparse
import functools
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import jax

# isort: on
import keras
import numpy as np
from flax import traverse_util

from bmjax import weights
from bmjax.backbones import create_backbone, list_backbones
from bmjax.weights import keras_oracle
from tests.helpers import keras_parity, timm_golden

FIVE = ("densenet121", "efficientnetb5", "resnet50", "xception", "mobilenet_v2")
SIZES = ((96, 96), (83, 75))
STEP_SIZE = (72, 72)


def error(ours: object, theirs: object) -> float:
    """The largest difference over the largest value of theirs."""
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} are compared")
    return float(np.abs(a - b).max() / np.abs(b).max())


def layer_error(ours: dict, theirs: dict) -> float:
    """As `error`, over all leaves of a layer: a bias that a norm cancels has no gradient of its own to compare with."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"leaves {sorted(ours)} and {sorted(theirs)} are compared")
    join = [np.concatenate([np.ravel(tree[leaf]) for leaf in sorted(theirs)]) for tree in (ours, theirs)]
    return error(*join)


def build(member: str, size: tuple[int, int]) -> keras.Model:
    """Keras's model with top and random weights, which draws nothing in training."""
    options = {"include_top": True, "classifier_activation": None, "input_shape": (*size, 3)}
    model = keras_parity.random_keras(keras_oracle.builder(member), **options)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return model


def take_statistics(model: keras.Model, size: tuple[int, int]) -> None:
    """Sets the running statistics to those of a batch of four."""
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momentum = {id(v): norm.momentum for norm in norms for v in (norm.moving_mean, norm.moving_variance)}
    rest = model.non_trainable_variables
    empty = [v.value * 0 if id(v) in momentum else v.value for v in rest]
    _, x = images(model, size, "float32", b=4)
    with jax.numpy_rank_promotion("allow"):
        step = jax.jit(functools.partial(model.stateless_call, training=True))
        _, new = step([v.value for v in model.trainable_variables], empty, x)
    for variable, value in zip(rest, new, strict=True):
        if id(variable) in momentum:
            variable.assign(value / (1 - momentum[id(variable)]))


def images(model: keras.Model, size: tuple[int, int], dtype: str, b: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Preprocessed images, and what Keras's model takes for them: EfficientNet begins with a division by 255."""
    x = keras_parity.images(size, b).astype(dtype)
    return x, 255 * x if any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers) else x


def port(member: str, model: keras.Model) -> tuple[dict, str]:
    """What is read from the ported file of what Keras saved, and whether it is exactly Keras's."""
    with tempfile.TemporaryDirectory() as folder:
        saved, ported = Path(folder) / "saved.weights.h5", Path(folder) / "ported.safetensors"
        model.save_weights(saved)
        weights.port(saved, member, ported)
        variables = weights.read(ported, member)[1]
    ours, theirs = (dict(traverse_util.flatten_dict(t)) for t in (variables, keras_parity.to_flax(model)))
    equal = ours.keys() == theirs.keys() and all(
        np.array_equal(np.asarray(ours[path]), np.asarray(theirs[path])) for path in theirs
    )
    return variables, "exact" if equal else "DIFFERS"


def outputs(module: Any, variables: dict, model: keras.Model, size: tuple[int, int]) -> str:
    """Errors of features and logits in eval mode."""
    pool = [layer for layer in model.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D)][-1]
    x, keras_x = images(model, size, "float32")
    both = keras.Model(model.input, [pool.input, model.output])
    with jax.numpy_rank_promotion("allow"):
        expected = jax.jit(functools.partial(both, training=False))(keras_x)

    def run(variables: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = {}
        logits = module.apply(variables, x, tap=lambda stage, x: seen.setdefault(stage, x))
        return seen[module.stages[-1]], logits

    return ", ".join(f"{error(a, b):.1e}" for a, b in zip(jax.jit(run)(variables, x), expected, strict=True))


def train_step(member: str, options: dict) -> str:
    """Errors of loss, gradients and statistics of one step in float64."""
    with keras_parity.float64():
        model = build(member, STEP_SIZE)
        module = create_backbone(member, include_top=True, **options)
        x, keras_x = images(model, STEP_SIZE, "float64")
        ours, theirs = keras_parity.train_step(module, model, x, keras_x)
    gradients = max(layer_error(ours["gradients"][name], leaves) for name, leaves in theirs["gradients"].items())
    moves, keras_moves = (traverse_util.flatten_dict(tree["statistics"]) for tree in (ours, theirs))
    statistics = max(error(moves[path], leaf) for path, leaf in keras_moves.items())
    return f"{error(ours['loss'], theirs['loss']):.1e}, {gradients:.1e}, {statistics:.1e}"


def timm(member: str) -> str:
    """Errors of features and logits against timm's."""
    if member not in timm_golden.NAMES:
        return "-"
    ours, theirs = timm_golden.outputs(member)
    return ", ".join(f"{error(ours[what], theirs[what]):.1e}" for what in ("features_mean", "logits"))


def row(member: str) -> tuple[str, ...]:
    module = create_backbone(member, include_top=True)
    options = {field: 0.0 for field in ("drop_connect", "dropout") if hasattr(module, field)}
    model = build(member, SIZES[0])
    take_statistics(model, SIZES[0])
    variables, ported = port(member, model)
    cells = [outputs(module, variables, model, SIZES[0])]
    other = build(member, SIZES[1])
    for variable, value in zip(other.weights, model.weights, strict=True):
        variable.assign(value.value)
    cells.append(outputs(module, variables, other, SIZES[1]))
    counts = keras_parity.count(module), sum(leaf.size for leaf in jax.tree.leaves(keras_parity.to_flax(model)))
    values = f"{counts[0]:,}" if counts[0] == counts[1] else f"{counts[0]:,} NOT {counts[1]:,}"
    return member, values, ported, *cells, train_step(member, options), timm(member)


def main() -> None:
    known = [name for name in list_backbones() if keras_oracle.builder(name) is not None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", metavar="MEMBER", help=f"any of {', '.join(known)}; by default five")
    members = parser.parse_args().members or FIVE
    for member in members:
        if member not in known:
            parser.error(f"keras.applications has no {member!r}; expected any of {', '.join(known)}")
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
    sizes = (f"features, logits at {h}x{w}" for h, w in SIZES)
    header = ("member", "values", "ported file", *sizes, "loss, gradients, statistics", "timm: features, logits")
    print(*(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header))), sep="\n")
    for member in members:
        print(f"| {' | '.join(row(member))} |", flush=True)


if __name__ == "__main__":
    main()
