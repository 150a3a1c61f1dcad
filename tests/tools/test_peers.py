"""The networks that tools/bench/bench.py gives to ONNX Runtime are those that bmjax stands beside."""

from collections import Counter

import jax
import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest

from bmjax.config import ModelConfig
from bmjax.model.create import create, init
from tools.bench import peers


@pytest.mark.parametrize(("backbone", "convolutions"), [("densenet121", 120), ("resnet50", 53)])
def test_the_onnx_network_has_the_parameters_of_ours(backbone, convolutions):
    model = onnx.load_model_from_string(peers.onnx_network(backbone, 64))
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] == convolutions
    config = ModelConfig(backbone=backbone, weights=None, attention="none")
    ours = jax.eval_shape(lambda key: init(create(config, 7), key, 64), jax.random.key(0))["params"]
    # Theirs have no bias before a batch-norm, and three values each besides, to centre and to scale colours.
    layers = [layer for layer in ours["backbone"].values() if layer.keys() == {"kernel", "bias"}]
    expected = sum(leaf.size for leaf in jax.tree.leaves(ours)) - sum(layer["bias"].size for layer in layers)
    assert sum(onnx.numpy_helper.to_array(weight).size for weight in model.graph.initializer) - 6 == expected


def test_the_onnx_network_computes():
    model = peers.onnx_network("densenet_tiny", 32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    (logits,) = session.run(None, {"images": images})
    assert logits.shape == (2, 7)
    assert np.isfinite(logits).all()
    assert not np.allclose(logits[0], logits[1])
