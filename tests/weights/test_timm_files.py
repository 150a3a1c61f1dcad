"""safetensors in timm's naming: whole, without what torch alone needs, and strictly."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from bmjax import weights
from bmjax.weights import catalog, safetensors_files
from tests.helpers.timm_golden import state_dict

TAGS = {r.name: r for r in catalog.RECORDS if r.source == "timm"}


@pytest.mark.parametrize("name", TAGS)
def test_a_bare_file_is_recognised_by_its_keys(tmp_path, name):
    record, path = TAGS[name], tmp_path / "model.bin"
    tensors = state_dict(record.backbone)
    safetensors.numpy.save_file(tensors, path)
    found, variables = weights.read(path, record.backbone)
    same = ("source", "top", "parameters", "architecture", "preprocess", "input_size")
    assert [getattr(found, field) for field in same] == [getattr(record, field) for field in same]
    counted = sum(array.size for key, array in tensors.items() if not key.endswith("num_batches_tracked"))
    assert counted == record.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.fixture
def densenet(tmp_path):
    """(path, tensors) of the smallest of them, without its counters."""
    tensors = {k: v for k, v in state_dict("densenet121").items() if not k.endswith("num_batches_tracked")}
    return tmp_path / "model.safetensors", tensors


def test_kernels_are_turned(densenet):
    path, tensors = densenet
    safetensors.numpy.save_file(tensors, path)
    _, variables = weights.read(path, "densenet121")
    kernel = variables["params"]["conv1_conv"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["features.conv0.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(variables["params"]["predictions"]["kernel"], tensors["classifier.weight"].T)
    np.testing.assert_array_equal(variables["batch_stats"]["bn"]["var"], tensors["features.norm5.running_var"])


def missing(tensors):
    del tensors["features.norm0.running_mean"]


def renamed(tensors):
    tensors["features.norm9.bias"] = tensors.pop("features.norm0.bias")


def extra(tensors):
    tensors["aux.weight"] = np.zeros(3, np.float32)


def reshaped(tensors):
    tensors["features.conv0.weight"] = np.zeros((64, 3, 3, 3), np.float32)


def foreign(tensors):
    tensors.clear()
    tensors["encoder.layer.0.weight"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"leaf 'batch_stats/conv1_bn/mean' is missing; expected shape \(64,\)"),
        (renamed, r"'params/conv1_bn/bias' is missing; expected .*'timm/features.norm9.bias' of shape \(64,\)"),
        (extra, r"leaf 'timm/aux.weight' of shape \(3,\) is left over"),
        (reshaped, r"leaf 'params/conv1_conv/kernel' has shape \(3, 3, 3, 64\); expected \(7, 7, 3, 64\)"),
        (foreign, "neither ported by bmjax nor in timm's naming .*'features.conv0.weight'.*'encoder.layer.0.weight'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(densenet, change, message):
    path, tensors = densenet
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as error:
        weights.read(path, "densenet121")
    assert str(path) in str(error.value)


def test_a_truncated_file_says_so(densenet):
    path, tensors = densenet
    safetensors.numpy.save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file, or truncated"):
        weights.read(path, "densenet121")


def test_bfloat16_is_read_as_the_values_it_is(tmp_path):
    pytest.importorskip("safetensors", minversion="0.8", reason="older ones may not read it")
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.array([0x3FC0, 0xC010], "<u2").tobytes())
    np.testing.assert_array_equal(safetensors_files.read(path)[0]["x"].astype(np.float32), [1.5, -2.25])
