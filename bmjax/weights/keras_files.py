"""Reads what Keras writes: the HDF5 of Keras 1 and 2 (the published files), `.weights.h5` and `.keras` of Keras 3.

Nothing is unpickled and Keras isn't needed. A layer is matched by its name. Names that Keras made up (`conv2d_3`)
depend on what else the session had built, and files of 2016 have no others: such layers, and those of a file under
another naming altogether, are matched as Keras itself does it, in the order of `model.layers`, one kind of layer at a
time. Every leaf's shape is then held to the network's by `bmjax.weights.merge`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from flax import traverse_util

from bmjax.weights.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB

Tree = Any

# The variables of each class of layers in Keras 3's order; biases may be missing.
_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("kernel", "bias"),
    "separable_conv2d": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "normalization": ("mean", "variance", "count"),
}
_KNOWN = {name for names in _VARIABLES.values() for name in names}
# Keras 1's words. Its `running_std` holds the variance.
_OLDER_WORDS = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}
_AUTOMATIC = re.compile(
    r"(depthwise_|separable_?)?conv(olution)?(2d|2d_transpose)(_\d+)?|(batch_?)?normalization(_\d+)?|dense(_\d+)?"
)
_KINDS = ("conv", "depthwise", "separable", "dense", "norm")
_LEAVES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


@dataclasses.dataclass(frozen=True)
class KerasLayer:
    """A layer with weights. `stored` is its name in the file, `name` today's, or None where Keras made it up."""

    stored: str
    name: str | None
    arrays: dict[str, np.ndarray]

    @property
    def kind(self) -> str:
        """One of `_KINDS`, or what its weights are called."""
        if "depthwise_kernel" in self.arrays:
            return "separable"
        if "kernel" in self.arrays:
            shape = self.arrays["kernel"].shape
            return "dense" if len(shape) == 2 else "depthwise" if shape[-1] == 1 else "conv"
        return "norm" if "gamma" in self.arrays else ", ".join(self.arrays)


def normalise(name: str) -> str:
    """A published layer name as today's Keras writes it: `conv1/conv` -> `conv1_conv`."""
    return name.replace("/", "_")


def is_automatic(name: str) -> bool:
    """Whether Keras made the name up, from the class and a counter of the session."""
    return _AUTOMATIC.fullmatch(name) is not None


def is_unused(layer: KerasLayer, unused: Sequence[str]) -> bool:
    """Whether a record's `unused` names the layer, whatever Keras counted."""
    return re.sub(r"_\d+$", "", layer.stored.rsplit("/", 1)[-1]) in unused or (layer.name or "") in unused


def _layer(stored: str, name: str | None, arrays: dict[str, np.ndarray]) -> KerasLayer:
    if "depthwise_kernel" in arrays and "pointwise_kernel" not in arrays:  # DepthwiseConv2D before Keras 3
        arrays = {"kernel" if kind == "depthwise_kernel" else kind: array for kind, array in arrays.items()}
    name = None if name is None or is_automatic(name) else normalise(name)
    return KerasLayer(stored, name, arrays)


def read(path: str | Path) -> list[KerasLayer]:
    """The layers with weights, in the order of `model.layers` (Keras 3's files: within each class of layers).

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a whole file in one of the three layouts, or a weight of an unknown kind; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    try:
        with _opened(path) as (file, names):
            layers = _keras_3(path, file, names) if "layers" in file else _older(path, file)
    # Damaged archives raise zlib.error and EOFError too, damaged HDF5 nearly anything.
    except (OSError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: not a readable Keras weight file, or truncated: {e}") from e
    named = [layer.name for layer in layers if layer.name is not None]
    for name in named:
        if named.count(name) > 1:
            raise ValueError(f"{path}: two layers are named {name!r}")
    return layers


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[h5py.File, dict[str, str]]]:
    """The HDF5 file, and of a `.keras` the layers' names by their place in it."""
    if not zipfile.is_zipfile(path):
        with h5py.File(path, "r") as file:
            yield file, {}
        return
    with zipfile.ZipFile(path) as archive:
        members = set(archive.namelist())
        if not {"config.json", "model.weights.h5"} <= members:
            raise ValueError(
                f"{path}: an archive without config.json and model.weights.h5; expected a .keras file of Keras 3 "
                "(pickled files, as of torch.save, are never read)"
            )
        config = json.loads(archive.read("config.json"))
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
            yield file, _names_by_place(config["config"].get("layers", ()))


def _names_by_place(layers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """`conv2d_1` -> the name of the second Conv2D, by a `.keras` file's configuration."""
    counts: dict[str, int] = {}
    names = {}
    for layer in layers:
        word = re.sub(r"\W+", "", layer["class_name"])
        word = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", word)
        word = re.sub("([a-z])([A-Z])", r"\1_\2", word).lower()
        count = counts[word] = counts.get(word, -1) + 1
        names[f"{word}_{count}" if count else word] = layer["config"]["name"]
    return names


def _place(name: str) -> tuple[str, int]:
    """`conv2d_3` -> ("conv2d", 3)."""
    word, number = re.fullmatch(r"(.*?)(?:_(\d+))?", name).groups()  # type: ignore[union-attr]
    return word, int(number or 0)


def _keras_3(path: Path, file: h5py.File, names: dict[str, str]) -> list[KerasLayer]:
    root: Any = file["layers"]
    layers = []
    for place in sorted(root, key=_place):
        group = root[place]
        if "layers" in group:
            raise ValueError(
                f"{path}: layer {place!r} is itself a model; expected the backbone's layers: save it alone"
            )
        variables = group.get("vars", {})
        if not len(variables):
            continue
        known = _VARIABLES.get(_place(place)[0], ())
        if len(variables) > len(known) or list(variables) != [str(i) for i in range(len(variables))]:
            raise ValueError(
                f"{path}: layer {place!r} has variables {', '.join(variables)}; "
                f"expected {len(known)} at most in a layer of this class"
            )
        arrays = {kind: np.asarray(variables[str(i)]) for i, kind in zip(range(len(variables)), known, strict=False)}
        name = variables.attrs.get("name", names.get(place))
        layers.append(_layer(place, None if name is None else _text(name), arrays))
    return layers


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _older(path: Path, file: h5py.File) -> list[KerasLayer]:
    root: Any = file.get("model_weights", file)
    if "layer_names" not in root.attrs:
        raise ValueError(f"{path}: neither 'layers' nor an attribute 'layer_names'; expected a weight file of Keras")
    layers = []
    for layer in map(_text, root.attrs["layer_names"]):
        if layer not in root or "weight_names" not in root[layer].attrs:
            raise ValueError(f"{path}: layer {layer!r} is listed but not stored; the file is damaged")
        arrays = {}
        for weight in map(_text, root[layer].attrs["weight_names"]):
            kind = _kind_of(weight, layer)
            if kind not in _KNOWN:
                known = ", ".join(sorted(_KNOWN))
                raise ValueError(f"{path}: weight {weight!r} is of kind {kind!r}; expected one of {known}")
            if weight not in root[layer]:
                raise ValueError(f"{path}: weight {weight!r} of layer {layer!r} is listed but not stored")
            arrays[kind] = np.asarray(root[layer][weight])
        if arrays:
            layers.append(_layer(layer, layer, arrays))
    return layers


def _kind_of(weight: str, layer: str) -> str:
    """`conv1/conv/kernel:0` and Keras 1's `conv1_W:0` -> `kernel`."""
    word = weight.rsplit("/", 1)[-1].split(":")[0].removeprefix(f"{layer}_")
    word = re.sub(r"_\d+$", "", word)  # TensorFlow's counter of equal names
    return _OLDER_WORDS.get(word, word)


def preprocess_within(path: Path, layers: Sequence[KerasLayer]) -> str | None:
    """The mode of bmjax.weights.preprocess that stands in for keras.applications.efficientnet's Normalization layer.

    The published files keep ImageNet's standard deviation in place of the variance; keras.applications makes up for it
    behind the layer. A network built without weights has an identity there and so sees 0..1.

    Raises:
      ValueError: the layer does neither.
    """
    for layer in layers:
        if "variance" not in layer.arrays:
            continue
        mean, variance = layer.arrays["mean"].ravel(), layer.arrays["variance"].ravel()
        if np.allclose(mean, 0) and np.allclose(variance, 1):
            return "unit"
        std = np.asarray(IMAGENET_STD_RGB)
        if np.allclose(mean, IMAGENET_MEAN_RGB) and (np.allclose(variance, std) or np.allclose(variance, std**2)):
            return "torch"
        raise ValueError(
            f"{path}: layer {layer.stored!r} normalises by mean {mean} and variance {variance}; "
            "expected ImageNet's, or 0 and 1"
        )
    return None


def to_variables(
    layers: Sequence[KerasLayer],
    shapes: dict[str, Tree],
    order: Sequence[str],
) -> dict[str, Tree]:
    """{"params", "batch_stats"} under the network's names, as far as the layers match it; the rest under their own.

    `shapes` is the network's tree; `order` lists its layers in the order of Keras's `model.layers`.
    """
    separable = {name.removesuffix("_pointwise") for name in order if name.endswith("_pointwise")}
    separable &= {name.removesuffix("_depthwise") for name in order if name.endswith("_depthwise")}

    def keras_name(name: str) -> str:
        stem = name.removesuffix("_depthwise").removesuffix("_pointwise")
        return stem if stem in separable else name

    def kind_of(name: str) -> str:
        if name in separable:
            return "separable"
        if "kernel" not in shapes["params"][name]:
            return "norm"
        shape = shapes["params"][name]["kernel"].shape
        return "dense" if len(shape) == 2 else "depthwise" if shape[2] == 1 else "conv"

    named = {layer.name: layer for layer in layers if layer.name is not None}
    expected = list(dict.fromkeys(keras_name(name) for name in order))
    matched: dict[str, KerasLayer] = {}
    for name in expected:
        if name in named and not is_automatic(name):
            matched[name] = named[name]
    taken = {layer.stored for layer in matched.values()}
    rest = [layer for layer in layers if layer.stored not in taken]
    # A single renamed layer is a fault and stays unmatched; a file that names most layers otherwise, or none, is of
    # another naming.
    renamed = [layer for layer in rest if layer.name is not None]
    by_order = not matched or len(renamed) > len(layers) / 2
    for kind in _KINDS:
        missing = [name for name in expected if name not in matched and kind_of(name) == kind]
        candidates = [layer for layer in rest if layer.kind == kind]
        if not by_order:
            missing = [name for name in missing if is_automatic(name)]
            candidates = [layer for layer in candidates if layer.name is None]
        matched |= dict(zip(missing, candidates, strict=False))
    taken = {layer.stored for layer in matched.values()}

    flat: dict[tuple[str, str, str], np.ndarray] = {}
    targets = {**matched, **{layer.name or layer.stored: layer for layer in layers if layer.stored not in taken}}
    for name, layer in targets.items():
        for kind, array in layer.arrays.items():
            path = _leaf(name, kind, layer)
            wanted = shapes[path[0]].get(path[1], {}).get(path[2])
            # Keras's depthwise kernels are [h, w, c, 1]; ours are those of a grouped convolution, [h, w, 1, c].
            if kind == "depthwise_kernel" or (kind == "kernel" and wanted is not None and _is_depthwise(array, wanted)):
                array = array.transpose(0, 1, 3, 2)
            flat[path] = array
    tree = traverse_util.unflatten_dict(flat)
    return {"params": tree.get("params", {}), "batch_stats": tree.get("batch_stats", {})}


def _is_depthwise(array: np.ndarray, wanted: Any) -> bool:
    return array.ndim == len(wanted.shape) == 4 and array.shape[3] == 1 and wanted.shape[2] == 1


def _leaf(name: str, kind: str, layer: KerasLayer) -> tuple[str, str, str]:
    """(collection, layer, leaf) of a weight of a Keras layer that the network calls `name`."""
    if layer.kind == "separable":
        part, _, leaf = kind.rpartition("_")
        return "params", f"{name}_{part or 'pointwise'}", leaf
    collection = "batch_stats" if kind.startswith("moving_") else "params"
    return collection, name, _LEAVES.get(kind, kind)
