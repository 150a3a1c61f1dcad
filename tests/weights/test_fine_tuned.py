"""Fine-tuned Keras models: the base is found in each layout, and what stands around it is dropped, kept or refused."""

import logging

import h5py
import jax
import keras
import numpy as np
import pytest

from bmjax import weights
from bmjax.backbones import create_backbone
from bmjax.cli.main import main
from bmjax.weights.network import network_shapes
from tests.helpers.keras_saved import SIZE, keras_model, save
from tests.helpers.slow import slow_but

LAYOUTS = ["h5", "weights.h5", "keras", "nameless.weights.h5"]


def tuned(family, nested, *, widths=(3,), norm=True, name=None):
    """A model of Keras's with the base of a family and a head of its own; the base is shared with `keras_model`."""
    layers = keras.layers
    base = keras_model(family)[0]
    with jax.numpy_rank_promotion("allow"):
        if nested:
            inputs = keras.Input((SIZE, SIZE, 3))
            x = layers.RandomFlip()(inputs)
            inner = keras.Model(base.input, base.output, name=name) if name else base
            x = inner(x)
        else:
            inputs, x = base.input, base.output
        x = layers.GlobalAveragePooling2D()(x)
        if norm:
            x = layers.BatchNormalization()(x)
        x = layers.Dropout(0.3)(x)
        for i, width in enumerate(widths):
            x = layers.Dense(width, name=f"fc_{i}" if i + 1 < len(widths) else None)(x)
        return keras.Model(inputs, x)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, dict(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("family", "member"),
    slow_but({("densenet", "densenet_test")}, [("densenet", "densenet_test"), ("xception", "xception_test")]),
)
def test_the_base_is_found_and_the_head_named(tmp_path, caplog, family, member, nested, layout):
    expected = keras_model(family)[1]
    path = save(tuned(family, nested), tmp_path / f"w.{layout}", layout)
    with caplog.at_level(logging.INFO, "bmjax"):
        record, variables = weights.read(path, member)
    assert_equal(variables, expected)
    assert not record.top
    assert "left out, as the head of a fine-tuned model: " in caplog.text
    assert "dense" in caplog.text


@pytest.mark.parametrize("name", ["functional", "densenet121", "my base"])
def test_the_base_may_have_any_name(tmp_path, name):
    path = save(tuned("densenet", True, widths=(8, 3), name=name), tmp_path / "w.h5", "h5")
    assert_equal(weights.read(path, "densenet_test")[1], keras_model("densenet")[1])


@pytest.mark.slow
def test_the_input_of_a_nested_efficientnet_is_its_own(tmp_path):
    path = save(tuned("efficientnet", True), tmp_path / "w.keras", "keras")
    record, variables = weights.read(path, "efficientnet_test")
    assert record.preprocess == "unit"
    assert_equal(variables, keras_model("efficientnet")[1])


@pytest.mark.parametrize(
    ("family", "before", "said"),
    [
        ("resnet", keras.layers.Rescaling(1 / 127.5, offset=-1), "'before' (Rescaling)"),
        ("resnet", keras.layers.Rescaling(1 / 255), "'before' (Rescaling)"),
        pytest.param("efficientnet", keras.layers.Rescaling(255.0), "'before' (Rescaling)", marks=pytest.mark.slow),
        ("resnet", keras.layers.RandomFlip(), None),
    ],
)
def test_layers_that_change_the_image_before_the_base_are_said(tmp_path, caplog, family, before, said):
    before = type(before).from_config(before.get_config() | {"name": "before"})
    base, expected = keras_model(family)
    with jax.numpy_rank_promotion("allow"):
        inputs = keras.Input((SIZE, SIZE, 3))
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(base(before(inputs))))
    for layout in ("keras", "h5", "weights.h5"):
        caplog.clear()
        _, variables = weights.read(save(model, tmp_path / f"w.{layout}", layout), f"{family}_test")
        assert_equal(variables, expected)
        if said is None:
            assert "--preprocess" not in caplog.text
            continue
        if layout == "weights.h5":
            assert "the model has 'rescaling', which are left out; if the image goes through them" in caplog.text
            continue
        assert f"the model has {said}, which are left out; if the image goes through them" in caplog.text
        saw = {1 / 127.5: "--preprocess tf", 1 / 255: "--preprocess unit"}.get(before.scale, "--preprocess")
        assert caplog.text.rstrip().endswith(saw)


class Own(keras.Model):
    def __init__(self, base):
        super().__init__()
        self.base, self.out = base, keras.layers.Dense(3)

    def call(self, x):
        return self.out(keras.ops.mean(self.base(x), (1, 2)))

    def get_config(self):
        return {}  # enough to be saved


@pytest.mark.slow
def test_heads_of_other_layers_and_subclassed_models(tmp_path):
    layers, (base, expected) = keras.layers, keras_model("densenet")
    with jax.numpy_rank_promotion("allow"):
        x = layers.LayerNormalization()(layers.Conv2D(8, 1)(base.output))
        flat = keras.Model(base.input, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
        own = Own(base)
        own(np.zeros((1, SIZE, SIZE, 3), np.float32))
    for model, layout in ((flat, "h5"), (flat, "keras"), (flat, "weights.h5"), (own, "weights.h5"), (own, "keras")):
        record, variables = weights.read(save(model, tmp_path / f"w.{layout}", layout), "densenet_test")
        assert_equal(variables, expected)
        assert not record.top


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_a_single_dense_is_kept_as_the_top(tmp_path, nested):
    model = tuned("resnet", nested, norm=False)
    path, out = save(model, tmp_path / "w.weights.h5", "weights.h5"), tmp_path / "out.safetensors"
    record = weights.port(path, "resnet_test", out, head="keep")
    assert record.top
    kernel, bias = (np.asarray(w) for w in model.layers[-1].weights)
    params = weights.read(out, "resnet_test")[1]["params"]
    np.testing.assert_array_equal(params["predictions"]["kernel"], kernel)
    np.testing.assert_array_equal(params["predictions"]["bias"], bias)


def test_a_head_of_several_layers_is_not_kept(tmp_path):
    path = save(tuned("resnet", True, widths=(8, 3)), tmp_path / "w.keras", "keras")
    with pytest.raises(ValueError, match=r"the head is norm .*; --head keep takes one Dense of 512 inputs"):
        weights.read(path, "resnet_test", head="keep")


def test_two_bases_alike_are_refused(tmp_path):
    layers, base = keras.layers, keras_model("resnet")[0]
    with jax.numpy_rank_promotion("allow"):
        inputs = keras.Input((SIZE, SIZE, 3))
        twin = keras.models.clone_model(base)
        one, two = (keras.Model(b.input, b.output, name=n)(inputs) for b, n in ((base, "left"), (twin, "right")))
        model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(layers.add([one, two]))))
    path = save(model, tmp_path / "w.weights.h5", "weights.h5")
    with pytest.raises(ValueError, match="models 'left' and 'right' within it fit the backbone alike"):
        weights.read(path, "resnet_test")


def test_a_convolution_before_the_base_is_refused(tmp_path):
    with jax.numpy_rank_promotion("allow"):
        inputs = keras.Input((SIZE, SIZE, 1))
        base = keras_model("resnet")[0]
        model = keras.Model(inputs, base(keras.layers.Conv2D(3, 1)(inputs)))
    path = save(model, tmp_path / "w.keras", "keras")
    with pytest.raises(ValueError, match="is a convolution of the image, before the base or beside"):
        weights.read(path, "resnet_test")


def test_a_file_of_another_member_is_recognised(tmp_path):
    """A flat DenseNet169 with an own head, as zeros; told by its number of values."""
    shapes, order = network_shapes(create_backbone("densenet169"))
    path = tmp_path / "w.h5"
    words = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [*order, "out"]
        for name in order:
            norm = "scale" in shapes["params"][name]
            leaves = shapes["params"][name] | shapes["batch_stats"].get(name, {})
            arrays = {
                f"{name}/{'beta' if norm and leaf == 'bias' else words.get(leaf, leaf)}": np.zeros(s.shape, np.float32)
                for leaf, s in leaves.items()
            }
            group = file.create_group(name)
            group.attrs["weight_names"] = list(arrays)
            for weight, array in arrays.items():
                group[weight] = array
        group = file.create_group("out")
        group.attrs["weight_names"] = ["out/kernel", "out/bias"]
        group["out/kernel"], group["out/bias"] = np.zeros((1664, 5)), np.zeros(5)
    with pytest.raises(ValueError, match="this is DenseNet169; the backbone is densenet121"):
        weights.read(path, "densenet121")


def test_the_command_line_ports_a_fine_tuned_model(tmp_path, capsys):
    path, out = save(tuned("resnet", True), tmp_path / "w.keras", "keras"), tmp_path / "out.safetensors"
    assert main(["weights", "port", str(path), str(out), "--backbone", "resnet_test"]) == 0
    assert_equal(weights.read(out, "resnet_test")[1], keras_model("resnet")[1])
