"""Small networks of each family, built by Keras with random weights, and saved by Keras in each of its layouts."""

import contextlib
import functools
import logging
import warnings

import h5py
import jax
import keras
from keras.src.applications import densenet as keras_densenet
from keras.src.applications import resnet as keras_resnet
from keras_parity import random_keras, to_flax

from bmjax.backbones import densenet, resnet


def keras_small_resnet(**options):
    def stacks(x):
        for number, (width, blocks) in enumerate(((64, 2), (128, 1)), start=2):
            x = keras_resnet.stack_residual_blocks_v1(
                x, width, blocks, stride1=1 if number == 2 else 2, name=f"conv{number}"
            )
        return x

    return keras_resnet.ResNet(stacks, preact=False, use_bias=True, name="resnet", **options)


# It calls HDF5 a legacy format, each time.
logging.getLogger("absl").setLevel(logging.ERROR)

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
    "mobilenet_v2": (
        "mobilenet_v2_035",
        None,
        None,
        functools.partial(keras.applications.MobileNetV2, alpha=0.35),
    ),
}


@functools.cache
def keras_model(family, top=False):
    """(Keras's model, its weights under our names)."""
    options = {"classes": 5, "classifier_activation": None} if top else {}
    model = random_keras(FAMILIES[family][3], include_top=top, input_shape=(64, 64, 3), **options)
    return model, to_flax(model)


def save(model, path, layout):
    """Saves as `layout` says: h5, weights.h5, keras, or keras-older (whose variables don't bear their layer's name)."""
    with warnings.catch_warnings(), contextlib.suppress(AttributeError), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        if layout in ("weights.h5", "nameless.weights.h5"):
            model.save_weights(path)
        else:
            model.save(path)
    if layout == "nameless.weights.h5":
        with h5py.File(path, "r+") as file:
            for place in file["layers"]:
                file["layers"][place]["vars"].attrs.pop("name", None)
    return path
