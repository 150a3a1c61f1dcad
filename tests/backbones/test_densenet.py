"""DenseNet against keras.applications: counts, features, logits, and one train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bmjax.backbones import create_backbone
from bmjax.backbones.densenet import DenseNet

KERAS_NAMES = {
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
    "kernel": ("params", "kernel"),
    "bias": ("params", "bias"),
}


@pytest.mark.parametrize(
    ("name", "top", "count"),
    [
        ("densenet121", False, 7_037_504),
        ("densenet121", True, 8_062_504),
        ("densenet169", False, 12_642_880),
        ("densenet169", True, 14_307_880),
        ("densenet201", False, 18_321_984),
        ("densenet201", True, 20_242_984),
    ],
)
def test_parameter_counts_are_keras(name, top, count):
    model = create_backbone(name, include_top=top)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def keras_densenet(blocks, size, **options):
    """A Keras model with random weights and random statistics."""
    from keras.src.applications.densenet import DenseNet as KerasDenseNet

    model = KerasDenseNet(blocks=list(blocks), weights=None, input_shape=(*size, 3), **options)
    r = np.random.default_rng(0)
    for variable in model.weights:
        draw = r.standard_normal(variable.shape).astype(np.float32)
        kind = variable.path.split("/")[-1]
        if kind == "kernel":  # he-normal keeps the signal's size over 121 layers
            variable.assign(draw * np.sqrt(2 / np.prod(variable.shape[:-1])))
        else:
            variable.assign({"gamma": 1 + 0.2 * draw, "moving_variance": np.exp(0.3 * draw)}.get(kind, 0.2 * draw))
    return model


def to_flax(variables, values=None):
    """Keras variables (and their values, if not their own) -> {"params", "batch_stats"}; the names are the same."""
    flat = {}
    for variable, value in zip(variables, variables if values is None else values, strict=True):
        layer, kind = variable.path.split("/")[-2:]
        collection, leaf = KERAS_NAMES[kind]
        flat[(collection, layer, leaf)] = np.asarray(value)
    return traverse_util.unflatten_dict(flat)


def assert_trees_close(ours, theirs, rtol, atol=0.0):
    """Each leaf within rtol of the largest value of Keras's leaf."""
    ours, theirs = (traverse_util.flatten_dict(t, sep="/") for t in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= rtol * np.abs(b).max() + atol, (name, np.abs(a - b).max(), np.abs(b).max())


def images(size, b=2, seed=3):
    return np.random.default_rng(seed).standard_normal((b, *size, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(64, 64), (61, 47)])
def test_features_and_logits_are_keras(size):
    blocks, x = (1, 2, 3, 1), images(size)
    with jax.numpy_rank_promotion("allow"):
        keras_model = keras_densenet(blocks, size, include_top=False)
        expected = np.asarray(jax.jit(functools.partial(keras_model, training=False))(x))
    variables = to_flax(keras_model.weights)
    features = jax.jit(DenseNet(blocks).apply)(variables, x)
    assert features.shape == expected.shape
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    with jax.numpy_rank_promotion("allow"):
        keras_model = keras_densenet(blocks, size, include_top=True, classes=11, classifier_activation=None)
        expected = np.asarray(jax.jit(functools.partial(keras_model, training=False))(x))
    model = DenseNet(blocks, include_top=True, classes=11)
    logits = jax.jit(model.apply)(to_flax(keras_model.weights), x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def train_step_parity(blocks, size, b, rtol, dtype="float32"):
    """Loss, gradients and new running statistics of one step, ours against Keras's."""
    x, labels = images(size, b).astype(dtype), np.arange(b) % 11
    with jax.numpy_rank_promotion("allow"):
        keras_model = keras_densenet(blocks, size, include_top=True, classes=11, classifier_activation=None)
        trainable = [v.value for v in keras_model.trainable_variables]
        rest = [v.value for v in keras_model.non_trainable_variables]

        @jax.jit
        def keras_step(trainable, rest):
            def loss_fn(trainable):
                logits, new = keras_model.stateless_call(trainable, rest, x, training=True)
                return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), new

            return jax.value_and_grad(loss_fn, has_aux=True)(trainable)

        (keras_loss, new), grads = keras_step(trainable, rest)
    keras_grads = to_flax(keras_model.trainable_variables, grads)["params"]
    keras_stats = to_flax(keras_model.non_trainable_variables, new)["batch_stats"]
    assert {leaf.dtype for leaf in jax.tree.leaves((keras_grads, keras_stats))} == {np.dtype(dtype)}
    variables = to_flax(keras_model.weights)
    model = DenseNet(blocks, include_top=True, classes=11)

    @jax.jit
    def step(params, batch_stats):
        def loss_fn(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
            )
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), new["batch_stats"]

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    (loss, stats), grads = step(variables["params"], variables["batch_stats"])
    np.testing.assert_allclose(loss, keras_loss, rtol=rtol)
    assert_trees_close(stats, keras_stats, rtol)
    assert_trees_close(grads, keras_grads, rtol)
    # The step moved every statistic, so that the comparison above says something.
    old = traverse_util.flatten_dict(variables["batch_stats"])
    assert all(np.abs(v - old[k]).max() > 1e-4 for k, v in traverse_util.flatten_dict(stats).items())


@pytest.mark.parametrize("size", [(64, 64), (61, 47)])
def test_a_train_step_is_keras(size):
    train_step_parity((1, 2, 3, 1), size, b=4, rtol=1e-3)


@pytest.fixture
def float64(monkeypatch):
    """Keras and JAX in float64: over 121 layers float32's rounding grows to 1e-2 of some gradients."""
    import keras
    from keras.src.backend.common import dtypes

    # On JAX Keras computes norms and means in at most float32, by this function.
    original = dtypes.result_type

    def result_type(*args):
        return "float64" if "float64" in map(str, args) else original(*args)

    monkeypatch.setattr(dtypes, "result_type", result_type)
    monkeypatch.setattr(keras.src.backend, "result_type", result_type)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    with jax.enable_x64(True):
        yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def test_a_train_step_of_densenet121_is_keras(float64):
    train_step_parity((6, 12, 24, 16), (64, 64), b=2, rtol=1e-10, dtype="float64")


def test_densenet121_forward_is_keras():
    x = images((64, 64))
    with jax.numpy_rank_promotion("allow"):
        keras_model = keras_densenet((6, 12, 24, 16), (64, 64), include_top=False, pooling="avg")
        expected = np.asarray(jax.jit(functools.partial(keras_model, training=False))(x))
    features = jax.jit(create_backbone("densenet121").apply)(to_flax(keras_model.weights), x)
    pooled = np.asarray(features).mean((1, 2))
    np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_small_images_are_refused_in_words():
    with pytest.raises(ValueError, match="images are 16x40 pixels; expected more for 4 blocks"):
        jax.eval_shape(lambda: create_backbone("densenet121").init(jax.random.key(0), jnp.zeros((1, 16, 40, 3))))


def test_batch_statistics_are_taken_anew_after_a_tap():
    """A tap that changes a stage's output changes the statistics of the norm behind it."""
    model = create_backbone("densenet_tiny")
    x = images((32, 32))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def stats(factor):
        tap = lambda stage, x: factor * x if stage == "conv2" else x  # noqa: E731
        _, new = model.apply(variables, x, train=True, tap=tap, mutable=["batch_stats"])
        return new["batch_stats"]["pool2_bn"]

    one, three = stats(1.0), stats(3.0)
    np.testing.assert_allclose(three["mean"], 3 * one["mean"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(three["var"] - 0.99, 9 * (one["var"] - 0.99), rtol=1e-3, atol=1e-5)
