"""Small networks of each family, built by Keras with random weights, and saved by Keras in each of its layouts."""

import functools
import logging
import types
import warnings
from unittest import mock

import h5py
import jax
import keras
from keras.src.applications import densenet as keras_densenet
from keras.src.applications import efficientnet as keras_efficientnet
from keras.src.applications import resnet as keras_resnet
from keras.src.applications import xception as keras_xception

from bmjax.backbones import densenet, efficientnet, resnet, xception
from tests.helpers.keras_parity import random_keras, to_flax


def keras_small_resnet(**options):
    def stacks(x):
        for number, (width, blocks) in enumerate(((64, 2), (128, 1)), start=2):
            x = keras_resnet.stack_residual_blocks_v1(
                x, width, blocks, stride1=1 if number == 2 else 2, name=f"conv{number}"
            )
        return x

    return keras_resnet.ResNet(stacks, preact=False, use_bias=True, name="resnet", **options)


def keras_small_efficientnet(**options):
    keys = ("kernel_size", "repeats", "filters_in", "filters_out", "expand_ratio", "id_skip", "strides", "se_ratio")
    rows = [(3, 1, 32, 16, 1, True, 1, 0.25), (5, 2, 16, 24, 6, True, 2, 0.25)]
    blocks = [dict(zip(keys, row, strict=True)) for row in rows]
    return keras_efficientnet.EfficientNet(1.0, 1.0, 64, blocks_args=blocks, name="efficientnet", **options)


def keras_small_xception(**options):
    """An eighth of the channels of every layer, for which Keras has no option."""
    layers = types.SimpleNamespace(**vars(keras_xception.layers))
    for name in ("Conv2D", "SeparableConv2D"):
        layer = getattr(layers, name)
        setattr(layers, name, lambda channels, *args, layer=layer, **kw: layer(channels // 8, *args, **kw))
    with mock.patch.object(keras_xception, "layers", layers):
        return keras_xception.Xception(**options)


# family -> (backbone, the module and maker of a member that is only there for the tests, what builds it in Keras)
FAMILIES = {
    "densenet": (
        "densenet_test",
        densenet,
        functools.partial(densenet.DenseNet, blocks=(1, 2, 1, 1)),
        functools.partial(keras_densenet.DenseNet, [1, 2, 1, 1]),
    ),
    "resnet": (
        "resnet_test",
        resnet,
        functools.partial(resnet.ResNet, blocks=(2, 1)),
        keras_small_resnet,
    ),
    "efficientnet": (
        "efficientnet_test",
        efficientnet,
        functools.partial(
            efficientnet.EfficientNet, rows=(efficientnet.Row(3, 1, 16, 1, 1), efficientnet.Row(5, 6, 24, 2, 2))
        ),
        keras_small_efficientnet,
    ),
    "xception": (
        "xception_test",
        xception,
        functools.partial(xception.Xception, stem=(4, 8), entry=(16, 32, 91), exit=(128, 192, 256)),
        keras_small_xception,
    ),
    "mobilenet_v2": (
        "mobilenet_v2_035",
        None,
        None,
        functools.partial(keras.applications.MobileNetV2, alpha=0.35),
    ),
}


SIZE = 71
"""Of the images; Keras's Xception takes none smaller."""


@functools.cache
def keras_model(family, top=False):
    """(Keras's model, its weights under our names)."""
    options = {"classes": 5, "classifier_activation": None} if top else {}
    model = random_keras(FAMILIES[family][3], include_top=top, input_shape=(SIZE, SIZE, 3), **options)
    return model, to_flax(model)


def save(model, path, layout):
    """Saves as `layout` says: h5, keras, weights.h5, or nameless.weights.h5, as early Keras 3 wrote it."""
    logging.disable(logging.WARNING)  # Keras calls HDF5 a legacy format, each time
    try:
        with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # Keras's variables
            model.save_weights(path) if layout.endswith("weights.h5") else model.save(path)
    finally:
        logging.disable(logging.NOTSET)
    if layout == "nameless.weights.h5":
        with h5py.File(path, "r+") as file:
            for place in file["layers"]:
                file["layers"][place]["vars"].attrs.pop("name", None)
    return path
