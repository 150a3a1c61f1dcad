"""The catalog: exact counts, one name and address each, checksums as in Keras's own source, and rules that hold."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from bmjax import weights
from bmjax.backbones import create_backbone
from bmjax.weights import catalog
from bmjax.weights.preprocess import MODES
from bmjax.weights.published import FAMILIES
from bmjax.weights.record import WeightRecord, record_from_dict, record_to_dict

# What files of sizes have in common needs no second count.
COUNTED = {(r.backbone, r.source, r.top): r for r in catalog.RECORDS}


@pytest.mark.parametrize("record", COUNTED.values(), ids=lambda r: r.name)
def test_records_have_the_exact_number_of_values(record):
    shapes, _ = weights.network_shapes(weights.network(record))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == record.parameters


def test_records_are_told_apart():
    for field in ("name", "url", "file_name"):
        values = [getattr(r, field) for r in catalog.RECORDS]
        assert len(set(values)) == len(values), field
    checksums = [r.checksum for r in catalog.RECORDS if r.checksum]
    assert len(set(checksums)) == len(checksums)
    assert all(len(c) == len("md5:") + 32 for c in checksums)
    assert {r.preprocess for r in catalog.RECORDS} <= set(MODES)


@pytest.mark.parametrize("family", FAMILIES)
def test_checksums_and_addresses_are_those_of_keras(family):
    """Every checksum of ours stands in Keras's source, and Keras's of this family are all here."""
    import importlib

    source = inspect.getsource(importlib.import_module(f"keras.src.applications.{family}"))
    for member in FAMILIES[family].members:
        for md5 in (member.top[0], member.no_top[0]):
            assert md5 in source
        assert member.place.rsplit("/", 1)[0] in source.replace('"\n    "', "")
    has_checksums = "hash" in source.lower()
    assert has_checksums == all(member.top[0] and member.no_top[0] for member in FAMILIES[family].members)


def test_all_of_a_record_survives_json():
    for record in catalog.RECORDS:
        assert record_from_dict(record_to_dict(record)) == record
    broken = record_to_dict(catalog.RECORDS[0])
    del broken["preprocess"]
    with pytest.raises(ValueError, match="preprocess"):
        record_from_dict(broken)


def test_imagenet_is_the_largest_published_size():
    assert catalog.find("mobilenet_v2_035").name == "mobilenet_v2_035-keras"
    assert catalog.find("mobilenet_v2_035").input_size == 224


def test_the_rule_is_of_family_and_source():
    keras, timm = (catalog.find("resnet50", source=source) for source in ("keras", "timm"))
    assert keras.architecture == {"epsilon": 1.001e-5, "stride_in_3x3": False, "use_bias": True}
    assert timm.architecture == {"epsilon": 1e-5, "stride_in_3x3": True, "use_bias": False}
    assert (keras.preprocess, timm.preprocess) == ("caffe", "torch")
    # Members with a structure of their own still take Keras's where a file is Keras's.
    assert catalog.rule("resnet_tiny", "keras")["architecture"]["use_bias"] is True


def test_pairs_without_a_rule_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="unknown kind of weights 'densenet of torchvision'; did you mean 'densenet of"
    ):
        catalog.rule("densenet121", "torchvision")
    monkeypatch.delitem(FAMILIES, "densenet")
    with pytest.raises(ValueError, match="unknown kind of weights 'densenet of keras'"):
        catalog.rule("densenet121", "keras")
    with pytest.raises(ValueError, match="unknown backbone with published weights of timm 'densenet_tiny'"):
        catalog.find("densenet_tiny", source="timm")


@pytest.mark.parametrize("record", [r for r in COUNTED.values() if r.top and r.source == "timm"], ids=lambda r: r.name)
def test_without_its_top_a_network_has_all_but_one_layer(record):
    assert weights.top_layers(record) == {"predictions"}
    assert isinstance(record, WeightRecord)
    x = jnp.zeros((1, 128, 128, 3))
    plain = create_backbone(record.backbone, **record.architecture)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), x)
    assert "predictions" not in shapes["params"]
