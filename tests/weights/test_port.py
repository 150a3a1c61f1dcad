"""Ported files carry their record: they round-trip, decide network and input, and are verified against both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bmjax import weights
from bmjax.config import HeadConfig, ModelConfig, from_json, to_json
from bmjax.model.create import create, init, resolve
from bmjax.weights import catalog, keras_oracle, safetensors_files
from bmjax.weights.verify import verify
from tests.helpers.keras_saved import FAMILIES, SIZE, keras_model, save
from tests.helpers.slow import slow_but


@pytest.fixture
def ported(tmp_path):
    """(path of a Keras file, path of what it was ported to, its record), of a small ResNet."""
    path, out = save(keras_model("resnet")[0], tmp_path / "w.h5", "h5"), tmp_path / "w.safetensors"
    return path, out, weights.port(path, "resnet_test", out)


@pytest.mark.parametrize("family", slow_but({"densenet", "resnet"}, FAMILIES))
def test_what_is_ported_is_what_was_read(tmp_path, family):
    name, (model, expected) = FAMILIES[family][0], keras_model(family, top=True)
    path, out = save(model, tmp_path / "w.weights.h5", "weights.h5"), tmp_path / "w.safetensors"
    record = weights.port(path, name, out)
    found, variables = weights.read(out, name)
    assert found == record
    assert weights.backbone_of(out) == name
    jax.tree.map(np.testing.assert_array_equal, variables, dict(expected))
    again = weights.port(out, name, tmp_path / "again.safetensors")
    assert again.checksum == record.checksum
    leaves = safetensors.numpy.load_file(out)
    assert {key.split("/")[0] for key in leaves} == {"params", "batch_stats"}
    assert all(len(key.split("/")) == 3 for key in leaves)


def test_the_record_of_the_source_goes_along(ported):
    path, _, record = ported
    assert (record.source, record.preprocess) == ("keras", "caffe")
    assert record.architecture == {"epsilon": 1.001e-5, "stride_in_3x3": False, "use_bias": True}
    assert record.origin.startswith(f"ported from {path.name}, sha256 ")


def test_preprocessing_can_be_told_when_porting(ported, tmp_path):
    path, _, _ = ported
    record = weights.port(path, "resnet_test", tmp_path / "tf.safetensors", preprocess="tf")
    assert record.preprocess == "tf"
    with pytest.raises(ValueError, match="unknown preprocessing mode 'pytorch'"):
        weights.port(path, "resnet_test", tmp_path / "no.safetensors", preprocess="pytorch")
    assert not (tmp_path / "no.safetensors").exists()


def tiny_timm(tmp_path):
    """A file in timm's naming of the tiny ResNet."""
    from bmjax.backbones import create_backbone, resnet

    model = create_backbone("resnet_tiny", **resnet.TIMM)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    leaf_names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    tensors = {
        f"{resnet.timm_name(model, layer)}.{leaf_names[leaf]}": np.ascontiguousarray(
            np.transpose(array, (3, 2, 0, 1)) if array.ndim == 4 else array
        )
        for tree in variables.values()
        for layer, leaves in tree.items()
        for leaf, array in leaves.items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "timm.safetensors")
    return tmp_path / "timm.safetensors", variables


@pytest.mark.parametrize("as_ported", [False, True])
def test_a_model_takes_network_and_input_from_its_weights(tmp_path, as_ported):
    path, expected = tiny_timm(tmp_path)
    if as_ported:
        weights.port(path, "resnet_tiny", tmp_path / "ported.safetensors")
        path = tmp_path / "ported.safetensors"
    config = ModelConfig(backbone="resnet_tiny", weights=str(path), head=HeadConfig(widths=(8,)))
    model = create(config, 3)
    assert (model.preprocess, model.backbone.epsilon) == ("torch", 1e-5)
    variables = init(model, jax.random.key(0), 64, config)
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["backbone"], expected["params"])

    # A run keeps what was resolved: its configuration is enough when the file is gone.
    resolved = resolve(config)
    path.unlink()
    assert create(resolved, 3) == model
    from bmjax.config import Config

    kept = from_json(to_json(Config(model=resolved))).model
    assert create(kept, 3) == model
    with pytest.raises(FileNotFoundError, match="no such weight file"):
        create(config, 3)


def test_what_contradicts_the_record_is_refused(ported):
    _, out, _ = ported
    config = ModelConfig(backbone="resnet_test", weights=str(out), preprocess="torch")
    with pytest.raises(ValueError, match="preprocessing is 'torch'; the weights need 'caffe'"):
        init(create(config, 3), jax.random.key(0), 64, config)
    config = dataclasses.replace(config, preprocess=None, backbone_options={"epsilon": 1e-3})
    with pytest.raises(ValueError, match=r"epsilon of resnet_test is 0.001; the weights need 1.001e-05"):
        init(create(config, 3), jax.random.key(0), 64, config)
    with pytest.raises(ValueError, match="weights of resnet_test; expected those of resnet50"):
        create(dataclasses.replace(config, backbone="resnet50"), 3)


def test_names_of_weights_are_known_without_a_file():
    config = resolve(ModelConfig(backbone="resnet50", weights="imagenet-timm"))
    assert (config.preprocess, config.backbone_options["use_bias"]) == ("torch", False)
    assert resolve(ModelConfig(backbone="resnet50", weights="imagenet")).preprocess == "caffe"
    record = catalog.RECORDS[-2]
    assert weights.find_record(record.backbone, record.name) == record
    assert resolve(ModelConfig(backbone="resnet50", weights=None)).preprocess == "caffe"
    with pytest.raises(ValueError, match=r"unknown weights .* 'imagnet'; did you mean 'imagenet'"):
        resolve(ModelConfig(weights="imagnet"))
    with pytest.raises(ValueError, match="weights of resnet50; expected those of densenet121"):
        resolve(ModelConfig(weights="resnet50-keras"))


# Verification.


@pytest.fixture
def keras_twin(monkeypatch):
    """Makes Keras's twin of the test's members known to the judge."""
    builders = {FAMILIES[family][0]: FAMILIES[family][3] for family in FAMILIES}
    monkeypatch.setattr(keras_oracle, "builder", lambda backbone: builders.get(backbone))


@pytest.mark.parametrize(
    ("family", "top"),
    slow_but({("densenet", True), ("resnet", False)}, [(family, i % 2 == 0) for i, family in enumerate(FAMILIES)]),
)
def test_a_good_file_is_proven_against_keras_itself(tmp_path, keras_twin, family, top):
    name, path = FAMILIES[family][0], save(keras_model(family, top=top)[0], tmp_path / "w.weights.h5", "weights.h5")
    lines = verify(path, name, size=SIZE)
    assert "the file as Keras reads it" in lines[-1]
    assert ("logits" if top else "features") in lines[-1]
    weights.port(path, name, tmp_path / "w.safetensors")
    assert "the file given to Keras" in verify(tmp_path / "w.safetensors", name, size=SIZE)[-1]


def rewrite(out, change):
    """Changes the leaves of a ported file and keeps its record true, but for what the change makes wrong."""
    tensors, record = safetensors_files.read(out)
    change(tensors)
    from flax import traverse_util

    variables = traverse_util.unflatten_dict(tensors, sep="/")
    record = dataclasses.replace(record, checksum=safetensors_files.leaves_checksum(variables))
    safetensors_files.write(out, variables, record)


def put(leaf, value):
    def change(tensors):
        tensors[leaf] = np.full_like(tensors[leaf], value)

    return change


def one_nan(tensors):
    tensors["params/conv1_conv/kernel"] = tensors["params/conv1_conv/kernel"].copy()
    tensors["params/conv1_conv/kernel"][0, 0, 0, 0] = np.nan


def drop(tensors):
    del tensors["batch_stats/conv1_bn/mean"]


def rename(tensors):
    tensors["params/conv9_conv/kernel"] = tensors.pop("params/conv1_conv/kernel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_nan, "leaf 'params/conv1_conv/kernel' has 1 values that aren't finite"),
        (put("batch_stats/conv1_bn/var", -1.0), r"leaf 'batch_stats/conv1_bn/var' holds -1.0; expected variances of 0"),
        (put("params/conv1_conv/kernel", 0.0), "leaf 'params/conv1_conv/kernel' is 0.0 throughout"),
        (put("params/conv1_bn/scale", 0.0), "leaf 'params/conv1_bn/scale' is zero throughout"),
        (drop, r"leaf 'batch_stats/conv1_bn/mean' is missing; expected shape \(64,\)"),
        (rename, r"leaf 'params/conv1_conv/kernel' is missing; .*'params/conv9_conv/kernel' of shape \(7, 7, 3, 64\)"),
    ],
)
def test_a_bad_file_names_its_first_bad_leaf(ported, change, message):
    _, out, _ = ported
    rewrite(out, change)
    with pytest.raises(ValueError, match=message):
        verify(out, "resnet_test")


def test_changed_arrays_truncation_and_lost_records_are_told_apart(ported):
    _, out, _ = ported
    whole = out.read_bytes()
    out.write_bytes(whole[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(ValueError, match=r"the arrays' checksum is leaves:.*; its record says leaves:"):
        verify(out, "resnet_test")
    out.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="not a readable safetensors file, or truncated"):
        verify(out, "resnet_test")
    tensors = {key: np.ascontiguousarray(array) for key, array in safetensors.numpy.load(whole).items()}
    safetensors.numpy.save_file(tensors, out, {"bmjax": '{"format": 9}'})
    with pytest.raises(ValueError, match="the record within can't be read: format 9; this version reads 1"):
        verify(out, "resnet_test")
    safetensors.numpy.save_file(tensors, out, {"bmjax": '{"format": 1, "record": {"name": "x"}}'})
    with pytest.raises(ValueError, match=r"the record within can't be read: .*backbone"):
        verify(out, "resnet_test")


def test_a_file_is_held_to_the_record_it_is_said_to_be(ported):
    path, _, _ = ported
    with pytest.raises(ValueError, match=r"md5 is \w+; expected 4d473c1dd8becc155b73f8504c6f6626 \(resnet50-keras\)"):
        verify(path, "resnet50", catalog.find("resnet50"))


def test_another_output_than_keras_is_an_error(ported, keras_twin, monkeypatch):
    path, _, _ = ported
    monkeypatch.setattr("bmjax.weights.verify.network", lambda record, classes: create_wrong(record))

    def create_wrong(record):
        from bmjax.backbones import create_backbone

        return create_backbone("resnet_test", **record.architecture | {"epsilon": 1e-2})

    with pytest.raises(ValueError, match=r"the output is .* of its largest value from Keras's; expected 1e-04"):
        verify(path, "resnet_test", size=SIZE)


def test_what_keras_cannot_judge_is_said(tmp_path):
    path, _ = tiny_timm(tmp_path)
    assert "not compared with Keras: the weights are for timm's structure" in verify(path, "resnet_tiny")[-1]
    assert keras_oracle.why_not("resnet_tiny", "keras") == "keras.applications has no resnet_tiny"
    assert keras_oracle.why_not("mobilenet_v2_035", "keras") is None
    # It has the alpha of a published member, and other rows.
    assert keras_oracle.why_not("mobilenet_v2_tiny", "keras") is not None
