"""Reads what Keras writes: the HDF5 of Keras 1 and 2 (the published files), `.weights.h5` and `.keras` of Keras 3.

Nothing is unpickled and Keras isn't needed. A layer is matched by its name. Names that Keras made up (`conv2d_3`)
depend on what else the session had built, and files of 2016 have no others. Which layer is which of the network's is
told by bmjax/weights/keras_match.py.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bmjax.files import RATIO, UNPACKED, reading
from bmjax.weights import hdf5_check

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
# Layers without weights that change values; the last two are operations of keras.applications' preprocess_input.
_CHANGING = ("Rescaling", "Lambda", "TFOpLambda", "Divide", "TrueDivide")
_CHANGING_PLACES = ("rescaling", "lambda", "normalization", "divide", "true_divide")
_AUTOMATIC = re.compile(
    r"(depthwise_|separable_?)?conv(olution)?(2d|2d_transpose)(_\d+)?|(batch_?)?normalization(_\d+)?|dense(_\d+)?"
)


@dataclasses.dataclass(frozen=True)
class KerasLayer:
    """A layer with weights. `stored` is its name in the file, `name` today's, or None where Keras made it up."""

    stored: str
    name: str | None
    arrays: dict[str, np.ndarray]
    model: str = ""
    """Of the model within the model that it belongs to, or empty."""

    @property
    def kind(self) -> str:
        """One of KINDS in bmjax/weights/keras_match.py, or what its weights are called."""
        if "depthwise_kernel" in self.arrays:
            return "separable"
        if "kernel" in self.arrays:
            shape = self.arrays["kernel"].shape
            return "dense" if len(shape) == 2 else "depthwise" if shape[-1:] == (1,) else "conv"
        return "norm" if "gamma" in self.arrays else ", ".join(self.arrays)


@dataclasses.dataclass(frozen=True)
class Change:
    """A layer without weights that changes values: the model within the model that it belongs to, its name and class,
    and, of a Rescaling, scale and offset."""

    model: str
    layer: str
    scale: Any = None
    offset: Any = None


def normalise(name: str) -> str:
    """A published layer name as today's Keras writes it: `conv1/conv` -> `conv1_conv`."""
    return name.replace("/", "_")


def is_automatic(name: str) -> bool:
    """Whether Keras made the name up, from the class and a counter of the session."""
    return _AUTOMATIC.fullmatch(name) is not None


def _layer(stored: str, name: str | None, arrays: dict[str, np.ndarray], model: str = "") -> KerasLayer:
    if "depthwise_kernel" in arrays and "pointwise_kernel" not in arrays:  # DepthwiseConv2D before Keras 3
        arrays = {"kernel" if kind == "depthwise_kernel" else kind: array for kind, array in arrays.items()}
    name = None if name is None or is_automatic(name) else normalise(name)
    return KerasLayer(stored, name, arrays, model)


def read(path: str | Path) -> list[KerasLayer]:
    """The layers with weights, in the order of `model.layers` (Keras 3's files: within each class of layers).

    Those of a model within the model carry its name.

    Raises:
      FileNotFoundError, ValueError: as `read_model`.
    """
    return read_model(path)[0]


def read_model(path: str | Path) -> tuple[list[KerasLayer], list[Change]]:
    """`read`'s layers, and those without weights that change values, where the file tells them (not Keras 2's weights).

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a whole file in one of the three layouts, one made to harm, or a weight of an unknown kind; names
        the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    with reading(path, "Keras weight file"), _opened(path) as (file, config):
        subclassed = any(isinstance(part, h5py.Group) and "layers" in part for part in file.values())
        layers = _keras_3(path, file, config) if "layers" in file or subclassed else _older(path, file)
        whole = file.attrs.get("model_config")  # of .h5
        config = config if whole is None else json.loads(_text(whole)).get("config")
        changes = _changes(config) if config else _changes_by_place(file)
    named = collections.Counter((layer.model, layer.name) for layer in layers if layer.name is not None)
    for (_, name), count in named.items():
        if count > 1:
            raise ValueError(f"{path}: two layers are named {name!r}")
    return layers, changes


def _changes_by_place(file: Any, model: str = "") -> list[Change]:
    """Of a `.weights.h5`, which lists layers without weights by their class."""
    found = []
    for place, group in file.get("layers", {}).items():
        if "layers" in group:
            found += _changes_by_place(group, f"{model}/{_named(group, place)}".removeprefix("/"))
        elif _place(place)[0] in _CHANGING_PLACES and not len(group.get("vars", ())):
            found.append(Change(model, repr(place)))
    return found


def _named(group: Any, place: str) -> str:
    return _text(group["vars"].attrs.get("name", place)) if "vars" in group else place


def _changes(config: Any, model: str = "") -> list[Change]:
    """Of a model's configuration, that of the models within included."""
    found = []
    for layer in (config.get("layers") or ()) if isinstance(config, dict) else ():
        own, kind = layer.get("config"), layer.get("class_name")
        if not isinstance(own, dict):
            continue
        name = own.get("name") or layer.get("name") or kind
        if "layers" in own:
            found += _changes(own, f"{model}/{name}" if model else name)
        elif kind in _CHANGING or (kind == "Normalization" and own.get("mean") is not None):
            found.append(Change(model, f"{name!r} ({kind})", own.get("scale"), own.get("offset")))
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[h5py.File, dict[str, Any]]]:
    """The HDF5 file, and a `.keras` file's configuration."""
    if not zipfile.is_zipfile(path):
        hdf5_check.check(path)
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
        config = json.loads(_member(archive, "config.json"))
        content = _member(archive, "model.weights.h5")
        hdf5_check.check(path, content)
        with h5py.File(io.BytesIO(content), "r") as file:
            yield file, config["config"]


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    limit = min(hdf5_check.MOST, max(UNPACKED, RATIO * info.compress_size))
    if info.file_size > limit:
        raise ValueError(f"{name} unpacks to {info.file_size} bytes; expected at most {limit}")
    return archive.read(info)


def _by_place(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`conv2d_1` -> the configuration of the second Conv2D, by a `.keras` file's configuration of a model."""
    counts: dict[str, int] = {}
    found = {}
    for layer in config.get("layers", ()):
        word = re.sub(r"\W+", "", layer["class_name"])
        word = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", word)
        word = re.sub("([a-z])([A-Z])", r"\1_\2", word).lower()
        count = counts[word] = counts.get(word, -1) + 1
        found[f"{word}_{count}" if count else word] = layer["config"]
    return found


def _place(name: str) -> tuple[str, int]:
    """`conv2d_3` -> ("conv2d", 3)."""
    word, number = re.fullmatch(r"(.*?)(?:_(\d{1,9}))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    return word, int(number or 0)


def _keras_3(path: Path, file: Any, config: dict[str, Any], model: str = "") -> list[KerasLayer]:
    # Of a subclassed model, its attributes stand beside the layers.
    own = {
        name: part
        for name, part in file.items()
        if name[0] != "_" and name not in ("layers", "optimizer", "vars") and isinstance(part, h5py.Group)
        if "layers" in part or "vars" in part
    }
    root: Any = own | dict(file.get("layers", {}))
    configs = _by_place(config)
    layers = []
    for place in sorted(root, key=_place):
        group, options = root[place], configs.get(place, {})
        variables = group.get("vars", {})
        name = variables.attrs.get("name", options.get("name")) if "vars" in group else options.get("name")
        if "layers" in group:
            within = _text(name or place)
            layers += _keras_3(path, group, options, f"{model}/{within}" if model else within)
            continue
        if not len(variables):
            continue
        # A class that no backbone has may stand in the head, so its variables are kept by their numbers.
        known = _VARIABLES.get(_place(place)[0]) or tuple(str(i) for i in range(len(variables)))
        if len(variables) > len(known) or list(variables) != [str(i) for i in range(len(variables))]:
            raise ValueError(
                f"{path}: layer {place!r} has variables {', '.join(variables)}; "
                f"expected {len(known)} at most in a layer of this class"
            )
        arrays = {kind: np.asarray(variables[str(i)]) for i, kind in zip(range(len(variables)), known, strict=False)}
        layers.append(_layer(place, None if name is None else _text(name), arrays, model))
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
        owners: dict[str, dict[str, np.ndarray]] = {}
        for weight in map(_text, root[layer].attrs["weight_names"]):
            kind = _kind_of(weight, layer)
            if kind not in _KNOWN:
                known = ", ".join(sorted(_KNOWN))
                raise ValueError(f"{path}: weight {weight!r} is of kind {kind!r}; expected one of {known}")
            if weight not in root[layer]:
                raise ValueError(f"{path}: weight {weight!r} of layer {layer!r} is listed but not stored")
            arrays = owners.setdefault(weight.rpartition("/")[0], {})
            if kind in arrays:
                raise ValueError(f"{path}: weight {weight!r} of layer {layer!r} is a second {kind}; expected one")
            arrays[kind] = np.asarray(root[layer][weight])
        if len(owners) == 1:
            layers.append(_layer(layer, layer, next(iter(owners.values()))))
        else:
            layers += _within(layer, owners)
    return layers


def _within(model: str, owners: dict[str, dict[str, np.ndarray]]) -> list[KerasLayer]:
    """The layers of a model within the model, whose weights are one list: those to be trained, then the frozen ones.

    Names that Keras made up count upwards, which gives the order back.
    """
    names = {owner: owner.removeprefix(f"{model}/") for owner in owners}
    order = sorted(owners, key=lambda owner: _place(names[owner])[1] if is_automatic(names[owner]) else 0)
    return [_layer(names[owner], names[owner], owners[owner], model) for owner in order]


def _kind_of(weight: str, layer: str) -> str:
    """`conv1/conv/kernel:0` and Keras 1's `conv1_W:0` -> `kernel`."""
    word = weight.rsplit("/", 1)[-1].split(":")[0].removeprefix(f"{layer}_")
    word = re.sub(r"_\d+$", "", word)  # TensorFlow's counter of equal names
    return _OLDER_WORDS.get(word, word)
