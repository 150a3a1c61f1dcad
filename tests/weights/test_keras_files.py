"""Files that Keras saved itself, in each of its layouts, give its weights leaf by leaf; what doesn't fit is named."""

import collections
import json
import re
import shutil
import zipfile

import h5py
import jax
import numpy as np
import pytest

from bmjax import weights
from bmjax.weights import keras_files
from bmjax.weights.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB
from tests.helpers.keras_saved import FAMILIES, keras_model, save
from tests.helpers.slow import slow_but

LAYOUTS = ["h5", "weights.h5", "nameless.weights.h5", "keras"]


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(jax.tree.map(np.asarray, dict(theirs)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", slow_but({"densenet", "resnet"}, FAMILIES))
def test_every_layout_of_every_family(tmp_path, family, layout):
    model, expected = keras_model(family, top=True)
    path = save(model, tmp_path / f"w.{layout}", layout)
    record, variables = weights.read(path, FAMILIES[family][0])
    assert (record.source, record.top) == ("keras", True)
    assert weights.classes_of(variables) == 5
    assert record.parameters == sum(leaf.size for leaf in jax.tree.leaves(expected))
    assert_equal(variables, expected)


@pytest.mark.parametrize("family", slow_but({"densenet"}, FAMILIES))
def test_a_top_that_the_network_has_not_is_left_out(tmp_path, family):
    model, expected = keras_model(family, top=True)
    name, path = FAMILIES[family][0], save(model, tmp_path / "w.h5", "h5")
    without = {"params": dict(expected["params"]), "batch_stats": expected["batch_stats"]}
    del without["params"]["predictions"]
    empty = jax.tree.map(np.zeros_like, without)
    assert_equal(weights.load_into(empty, name, str(path)), without)


def test_a_keras_archive_of_before_the_layers_names_were_stored(tmp_path):
    """Early Keras 3 wrote no names beside the variables; the archive's configuration has them."""
    model, expected = keras_model("resnet")
    path = save(model, tmp_path / "w.keras", "keras")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "parts")
    with h5py.File(tmp_path / "parts/model.weights.h5", "r+") as file:
        for place in file["layers"]:
            del file["layers"][place]["vars"].attrs["name"]
    shutil.make_archive(str(tmp_path / "w"), "zip", tmp_path / "parts")
    (tmp_path / "w.zip").rename(path)
    assert {layer.name for layer in keras_files.read(path)} == set(expected["params"])
    assert_equal(weights.read(path, "resnet_test")[1], expected)


def test_published_names_with_slashes(tmp_path):
    model, expected = keras_model("densenet")
    path = save(model, tmp_path / "w.h5", "h5")
    with h5py.File(path, "r+") as file:
        root = file["model_weights"]
        root.move("conv1_conv", "old")
        root.create_group("conv1")
        root.move("old", "conv1/conv")
        names = root.attrs["layer_names"]
        root.attrs["layer_names"] = ["conv1/conv" if n in ("conv1_conv", b"conv1_conv") else n for n in names]
    assert_equal(weights.read(path, "densenet_test")[1], expected)


KERAS_WORDS = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}


def keras_layers(expected):
    """(layer, {Keras's word: array}) in order, separable convolutions as one layer and depthwise kernels as theirs."""
    layers = {}
    for name, leaves in expected["params"].items():
        stem, _, part = name.rpartition("_")
        is_separable = part in ("depthwise", "pointwise") and f"{stem}_pointwise" in expected["params"]
        arrays = layers.setdefault(stem if is_separable else name, {})
        for leaf, array in (leaves | expected["batch_stats"].get(name, {})).items():
            word = "beta" if leaf == "bias" and "scale" in leaves else KERAS_WORDS.get(leaf, leaf)
            if leaf == "kernel" and array.ndim == 4 and array.shape[2] == 1:
                word, array = "depthwise_kernel", array.transpose(0, 1, 3, 2)
            arrays["pointwise_kernel" if is_separable and part == "pointwise" else word] = array
    return layers


def write_older(path, layers):
    """An HDF5 file as Keras 1 and 2 laid it out; `layers`: (name, {name of the weight in the file: array})."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in ("input_1", *layers)]
        file.create_group("input_1").attrs["weight_names"] = []
        for name, arrays in layers.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [weight.encode() for weight in arrays]
            for weight, array in arrays.items():
                group[weight] = array
    return path


@pytest.mark.slow
def test_the_names_of_the_published_mobilenet_v2(tmp_path):
    """`mobl1_conv_1_expand` and `bn1_conv_1_bn_expand`, as the first version of Keras's MobileNetV2 named them."""
    _, expected = keras_model("mobilenet_v2", top=True)

    def older_name(layer):
        if match := re.fullmatch(r"(?:block_(\d+)|expanded_conv)_(expand|depthwise|project)(_BN)?", layer):
            number, part = match[1] or "0", match[2]
            return f"bn{number}_conv_{number}_bn_{part}" if match[3] else f"mobl{number}_conv_{number}_{part}"
        return {"predictions": "Logits"}.get(layer, layer)

    layers = {
        older_name(layer): {f"{older_name(layer)}/{word}:0": array for word, array in arrays.items()}
        for layer, arrays in keras_layers(expected).items()
    }
    assert sum(name.startswith(("mobl", "bn")) for name in layers) > 90
    path = write_older(tmp_path / "w.h5", layers)
    assert_equal(weights.read(path, "mobilenet_v2_035")[1], expected)


@pytest.mark.parametrize("family", slow_but({"resnet"}, ["resnet", "xception"]))
def test_files_whose_names_keras_1_made_up(tmp_path, family):
    """`convolution2d_1/convolution2d_1_W:0` and the like, as in the published Xception."""
    _, expected = keras_model(family)
    words = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    counts, layers = collections.Counter(), {}
    for arrays in keras_layers(expected).values():
        kind = "batchnormalization" if "gamma" in arrays else "convolution2d"
        kind = "separableconvolution2d" if "pointwise_kernel" in arrays else kind
        counts[kind] += 1
        name = f"{kind}_{counts[kind]}"
        layers[name] = {f"{name}_{words.get(word, word)}:0": array for word, array in arrays.items()}
    path = write_older(tmp_path / "w.h5", layers)
    assert_equal(weights.read(path, FAMILIES[family][0])[1], expected)


@pytest.mark.parametrize("layout", [pytest.param("h5", marks=pytest.mark.slow), "weights.h5", "keras"])
def test_names_that_a_longer_session_made_up(tmp_path, layout):
    """Built second, Xception's shortcuts are `conv2d_4`, ... where the network's are `conv2d`, ..."""
    model, expected = keras_model("xception")
    with jax.numpy_rank_promotion("allow"):
        second = FAMILIES["xception"][3](include_top=False, weights=None, input_shape=(71, 71, 3))
        for variable, value in zip(second.weights, model.weights, strict=True):
            variable.assign(value.value)
    assert "conv2d" not in {layer.name for layer in second.layers}
    path = save(second, tmp_path / f"w.{layout}", layout)
    assert_equal(weights.read(path, "xception_test")[1], expected)


@pytest.mark.slow
def test_the_input_of_efficientnet_shows_in_its_normalization(tmp_path):
    path = save(keras_model("efficientnet")[0], tmp_path / "w.weights.h5", "weights.h5")
    assert weights.read(path, "efficientnet_test")[0].preprocess == "unit"
    std = np.asarray(IMAGENET_STD_RGB)

    def preprocess_with(mean, variance):
        with h5py.File(path, "r+") as file:
            variables = file["layers/normalization/vars"]
            for place, value in (("0", mean), ("1", variance)):
                variables[place][...] = np.reshape(value, variables[place].shape)
        return weights.read(path, "efficientnet_test")[0].preprocess

    assert preprocess_with(IMAGENET_MEAN_RGB, std) == "torch"
    assert preprocess_with(IMAGENET_MEAN_RGB, std**2) == "torch"
    with pytest.raises(ValueError, match=r"layer 'normalization' normalises by mean \[0.4 0.5 0.6\] and variance"):
        preprocess_with([0.4, 0.5, 0.6], std)


# Corruptions: each of a file saved by Keras, each with a message of its own.


def edit(path, layer, change):
    with h5py.File(path, "r+") as file:
        root = file["model_weights"]
        change(root, root[layer])


def set_names(root, names):
    root.attrs["layer_names"] = names


def renamed(path):
    def change(root, group):
        names = list(root.attrs["layer_names"])
        root.move("conv2_block1_0_bn", "conv2_block1_9_bn")
        set_names(root, [str(n).replace("conv2_block1_0_bn", "conv2_block1_9_bn") for n in names])

    edit(path, "conv2_block1_0_bn", change)


def reshaped(path):
    def change(root, group):
        weight = group.attrs["weight_names"][0]
        kernel = np.asarray(group[weight])
        del group[weight]
        group[weight] = kernel[..., :-1]

    edit(path, "conv1_conv", change)


def missing(path):
    edit(path, "bn", lambda root, _: set_names(root, [n for n in root.attrs["layer_names"] if n != "bn"]))


def extra(path):
    def change(root, group):
        root.copy(group, "conv9_conv")
        set_names(root, [*root.attrs["layer_names"], "conv9_conv"])

    edit(path, "conv1_conv", change)


def unknown_kind(path):
    def change(root, group):
        group.attrs["weight_names"] = ["conv1_conv/filters"]

    edit(path, "conv1_conv", change)


def not_stored(path):
    def change(root, group):
        del group[group.attrs["weight_names"][0]]

    edit(path, "conv1_conv", change)


def layer_gone(path):
    edit(path, "conv1_conv", lambda root, _: root.pop("conv1_conv"))


def no_list(path):
    edit(path, "conv1_conv", lambda root, _: root.attrs.pop("layer_names"))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2000])


def text(path):
    path.write_text("version https://example.org/a-pointer, and no weights")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (renamed, r"leaf 'params/conv2_block1_0_bn/bias' is missing; expected shape \(64,\)\. .*conv2_block1_9_bn"),
        (reshaped, r"leaf 'params/conv1_conv/kernel' has shape \(7, 7, 3, 63\); expected \(7, 7, 3, 64\)"),
        (missing, r"leaf 'params/bn/bias' is missing; expected shape \(76,\)$"),
        (extra, r"leaf 'params/conv9_conv/kernel' of shape \(7, 7, 3, 64\) is left over"),
        (unknown_kind, "weight 'conv1_conv/filters' is of kind 'filters'; expected one of"),
        (not_stored, "weight 'conv1_conv/kernel' of layer 'conv1_conv' is listed but not stored"),
        (layer_gone, "layer 'conv1_conv' is listed but not stored"),
        (no_list, "neither 'layers' nor an attribute 'layer_names'"),
        (truncated, "not a readable Keras weight file, or truncated"),
        (text, "no weight file; expected HDF5 or a .keras archive of Keras, safetensors, or a state dict of torch"),
        (empty, "no weight file; expected HDF5"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, corrupt, message):
    path = save(keras_model("densenet")[0], tmp_path / "w.h5", "h5")
    corrupt(path)
    with pytest.raises(ValueError, match=message) as error:
        weights.read(path, "densenet_test")
    assert str(path) in str(error.value)


def test_a_file_of_another_member_names_the_first_leaf_that_differs(tmp_path):
    path = save(keras_model("densenet")[0], tmp_path / "w.weights.h5", "weights.h5")
    with pytest.raises(ValueError, match=r"leaf 'params/conv2_block2_0_bn/bias' is missing; expected shape \(96,\)"):
        weights.read(path, "densenet121")


@pytest.mark.parametrize("layout", ["weights.h5", "keras"])
def test_damage_to_keras_3_files(tmp_path, layout):
    path = save(keras_model("densenet")[0], tmp_path / f"w.{layout}", layout)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable Keras weight file, or truncated"):
        weights.read(path, "densenet_test")


def test_variables_of_keras_3_are_counted(tmp_path):
    path = save(keras_model("densenet")[0], tmp_path / "w.weights.h5", "weights.h5")
    with h5py.File(path, "r+") as file:
        file["layers/conv2d/vars"]["7"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="layer 'conv2d' has variables 0, 7; expected 2 at most"):
        weights.read(path, "densenet_test")


def test_archives_that_are_not_keras_files_are_not_opened_further(tmp_path):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\n.")
    with pytest.raises(ValueError, match=r"it asks for os\.system; expected a state dict alone"):
        weights.read(path, "densenet_test")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({}))
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(ValueError, match="not a readable Keras weight file"):
        weights.read(path, "densenet_test")
