"""Files that Keras saved itself, in each of its layouts, give its weights leaf by leaf; what doesn't fit is named."""

import json
import shutil
import zipfile

import h5py
import jax
import numpy as np
import pytest
from keras_saved import FAMILIES, keras_model, save

from bmjax import weights
from bmjax.weights import keras_files

LAYOUTS = ["h5", "weights.h5", "nameless.weights.h5", "keras"]


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(jax.tree.map(np.asarray, dict(theirs)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_every_family(tmp_path, family, layout):
    model, expected = keras_model(family, top=True)
    path = save(model, tmp_path / f"w.{layout}", layout)
    record, variables = weights.read(path, FAMILIES[family][0])
    assert (record.source, record.top) == ("keras", True)
    assert weights.classes_of(variables) == 5
    assert record.parameters == sum(leaf.size for leaf in jax.tree.leaves(expected))
    assert_equal(variables, expected)


@pytest.mark.parametrize("family", FAMILIES)
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


def older_h5(path, expected, order, name_of, spelling):
    """A file as Keras 1 or early Keras 2 wrote it: `name_of(layer, kind)`, and words by `spelling`."""
    kinds = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance", "kernel": "kernel"}
    counts = {}
    with h5py.File(path, "w") as file:
        listed = []
        for layer in order:
            leaves = expected["params"][layer] | expected["batch_stats"].get(layer, {})
            is_norm = "scale" in leaves
            name = name_of(layer, is_norm, counts)
            group = file.create_group(name)
            words = []
            for leaf in ("kernel", "scale", "bias", "mean", "var"):
                if leaf not in leaves:
                    continue
                array = np.asarray(leaves[leaf])
                kind = "beta" if leaf == "bias" and is_norm else kinds.get(leaf, leaf)
                if leaf == "kernel" and array.ndim == 4 and array.shape[2] == 1:
                    array, kind = array.transpose(0, 1, 3, 2), "depthwise_kernel"
                words.append(spelling(name, kind))
                group[words[-1]] = array
            group.attrs["weight_names"] = [w.encode() for w in words]
            listed.append(name)
        file.attrs["layer_names"] = [n.encode() for n in ["input_1", *listed]]
        file.create_group("input_1").attrs["weight_names"] = []
    return path


def test_the_names_of_the_published_mobilenet_v2(tmp_path):
    """`mobl1_conv_1_expand` and `bn1_conv_1_bn_expand`, as the first version of Keras's MobileNetV2 named them."""
    _, expected = keras_model("mobilenet_v2", top=True)
    order = list(expected["params"])

    def name_of(layer, is_norm, counts):
        if layer == "predictions":
            return "Logits"
        if "conv" in layer.lower() and not layer.startswith("expanded"):
            return layer
        stem = layer.removesuffix("_BN")
        number = 0 if stem.startswith("expanded_conv") else int(stem.split("_")[1])
        part = stem.rsplit("_", 1)[1]
        return f"bn{number}_conv_{number}_bn_{part}" if is_norm else f"mobl{number}_conv_{number}_{part}"

    path = older_h5(tmp_path / "w.h5", expected, order, name_of, lambda name, kind: f"{name}/{kind}:0")
    assert_equal(weights.read(path, "mobilenet_v2_035")[1], expected)


def test_a_file_without_any_names_of_ours_as_keras_1_wrote_it(tmp_path):
    """`convolution2d_1/convolution2d_1_W:0` and `batchnormalization_1_running_std:0`, as in the published Xception."""
    _, expected = keras_model("resnet")
    order = list(expected["params"])

    def name_of(layer, is_norm, counts):
        word = "batchnormalization" if is_norm else "convolution2d"
        counts[word] = counts.get(word, 0) + 1
        return f"{word}_{counts[word]}"

    words = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    path = older_h5(tmp_path / "w.h5", expected, order, name_of, lambda name, kind: f"{name}_{words.get(kind, kind)}:0")
    assert_equal(weights.read(path, "resnet_test")[1], expected)


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
        (text, "no weight file; expected HDF5 or a .keras archive of Keras, or safetensors"),
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


def test_variables_of_keras_3_are_counted_and_nested_models_refused(tmp_path):
    path = save(keras_model("densenet")[0], tmp_path / "w.weights.h5", "weights.h5")
    with h5py.File(path, "r+") as file:
        file["layers/conv2d/vars"]["7"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="layer 'conv2d' has variables 0, 7; expected 2 at most"):
        weights.read(path, "densenet_test")
    with h5py.File(path, "r+") as file:
        file.create_group("layers/functional/layers")
        del file["layers/conv2d"]
    with pytest.raises(ValueError, match="layer 'functional' is itself a model; expected the backbone's layers"):
        weights.read(path, "densenet_test")


def test_archives_that_are_not_keras_files_are_not_opened_further(tmp_path):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x04")
    with pytest.raises(ValueError, match=r"expected a \.keras file of Keras 3 \(pickled files.* are never read"):
        weights.read(path, "densenet_test")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({}))
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(ValueError, match="not a readable Keras weight file"):
        weights.read(path, "densenet_test")
