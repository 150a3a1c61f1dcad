"""A backbone against its Keras model: the same random weights in both, outputs and one train step side by side.

The Keras models are built without weights and with `classifier_activation=None` where they have a top.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import keras
import numpy as np
from flax import traverse_util
from keras.src.backend.common import dtypes

# Keras's program runs once, so it is compiled quickly instead of well.
compiled_quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LEAVES = {
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
    "kernel": ("params", "kernel"),
    "bias": ("params", "bias"),
}


def images(size, b=2, seed=3):
    return np.random.default_rng(seed).standard_normal((b, *size, 3)).astype(np.float32)


def count(model):
    """The number of values of a module, statistics included."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 96, 96, 3))))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def random_keras(build, *args, **options):
    """What a Keras building function returns, with the layer names of a fresh session, random weights and statistics.

    A Normalization layer stays as it is: an identity.
    """
    keras.backend.clear_session()
    with jax.numpy_rank_promotion("allow"):
        model = build(*args, weights=None, **options)
    r = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            continue
        for variable in layer.weights:
            draw, kind = r.standard_normal(variable.shape).astype(np.float32), _kind(variable)
            if kind.endswith("kernel"):  # he-normal keeps the signal's size over a hundred layers
                inputs = variable.shape[:2] if _is_depthwise(layer, kind) else variable.shape[:-1]
                variable.assign(draw * np.sqrt(2 / np.prod(inputs)))
            else:
                variable.assign({"gamma": 1 + 0.2 * draw, "moving_variance": np.exp(0.3 * draw)}.get(kind, 0.2 * draw))
    return model


def _kind(variable):
    return variable.path.split("/")[-1]


def _is_depthwise(layer, kind):
    return kind == "depthwise_kernel" or (isinstance(layer, keras.layers.DepthwiseConv2D) and kind == "kernel")


def to_flax(keras_model, variables=None, values=None):
    """Keras variables (default: all) and their values (default: their own) -> {"params", "batch_stats"}.

    Layers come in Keras's order. A depthwise kernel [kh, kw, c, 1] becomes [kh, kw, 1, c]; a separable convolution `s`
    becomes `s_depthwise` and `s_pointwise`; Normalization layers, which are preprocessing, are left out.
    """
    variables = keras_model.weights if variables is None else variables
    values = [v.value for v in variables] if values is None else values
    value_of = {id(v): np.asarray(value) for v, value in zip(variables, values, strict=True)}
    flat = {}
    for layer in keras_model.layers:
        for variable in layer.weights:
            if id(variable) not in value_of:
                continue
            value, name, kind = value_of.pop(id(variable)), layer.name, _kind(variable)
            if isinstance(layer, keras.layers.Normalization):
                continue
            if _is_depthwise(layer, kind):
                value = value.transpose(0, 1, 3, 2)
            if isinstance(layer, keras.layers.SeparableConv2D):
                part = "depthwise" if kind == "depthwise_kernel" else "pointwise"
                name, kind = f"{name}_{part}", kind.removeprefix(f"{part}_")
            collection, leaf = LEAVES[kind]
            flat[(collection, name, leaf)] = value
    assert not value_of, "variables of no layer of the model"
    return traverse_util.unflatten_dict(flat)


def assert_close(ours, theirs, rtol, what=""):
    """Two arrays of one shape, within rtol of the largest value of Keras's."""
    a, b = np.asarray(ours), np.asarray(theirs)
    assert a.shape == b.shape, (what, a.shape, b.shape)
    assert np.abs(a - b).max() <= rtol * np.abs(b).max(), (what, np.abs(a - b).max(), np.abs(b).max())


def assert_trees_close(ours, theirs, rtol):
    """Each leaf within rtol of the largest value of Keras's leaf."""
    ours, theirs = (traverse_util.flatten_dict(t, sep="/") for t in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], rtol, name)


def assert_output_is_keras(model, keras_model, x, rtol=1e-4, keras_input=None):
    """Features or logits in eval mode. `keras_input`: where Keras's model takes another scale of the same images."""
    with jax.numpy_rank_promotion("allow"):
        expected = compiled_quickly(functools.partial(keras_model, training=False))(
            x if keras_input is None else keras_input
        )
    assert_close(jax.jit(model.apply)(to_flax(keras_model), x), expected, rtol)


def train_step(model, keras_model, x, keras_input=None):
    """One step with a top, in the type of the images: ours and Keras's {"loss", "gradients", "statistics"}.

    The statistics are how far they moved: a hundredth of a batch's, or less, would drown in the whole's tolerance.
    """
    keras_input = x if keras_input is None else keras_input
    trainable, rest = keras_model.trainable_variables, keras_model.non_trainable_variables

    def loss_of(logits):
        labels = np.arange(len(x)) % logits.shape[-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    # In float32 it would round at other places.
    @(compiled_quickly if x.dtype == np.float64 else jax.jit)
    def keras_step(trainable, rest):
        def loss_fn(trainable):
            logits, new = keras_model.stateless_call(trainable, rest, keras_input, training=True)
            return loss_of(logits), new

        return jax.value_and_grad(loss_fn, has_aux=True)(trainable)

    with jax.numpy_rank_promotion("allow"):
        (keras_loss, new), grads = keras_step([v.value for v in trainable], [v.value for v in rest])
    keras_grads = to_flax(keras_model, trainable, grads)["params"]
    known = {id(variable) for variable in keras_model.weights}  # without the seeds of its dropouts
    of_layers = [(variable, value) for variable, value in zip(rest, new, strict=True) if id(variable) in known]
    keras_stats = to_flax(keras_model, *zip(*of_layers, strict=True))["batch_stats"]
    variables = to_flax(keras_model)

    @jax.jit
    def step(params, batch_stats):
        def loss_fn(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
            )
            return loss_of(logits), new["batch_stats"]

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    (loss, stats), grads = step(variables["params"], variables["batch_stats"])
    moved, keras_moved = (jax.tree.map(np.subtract, new, variables["batch_stats"]) for new in (stats, keras_stats))
    return (
        {"loss": loss, "gradients": grads, "statistics": moved},
        {"loss": keras_loss, "gradients": keras_grads, "statistics": keras_moved},
    )


def assert_train_step_is_keras(model, keras_model, x, rtol, keras_input=None, cancelled=()):
    """Loss, gradients and new running statistics of one step with a top, in the type of the images.

    `cancelled`: how the names of those layers end whose bias a later norm takes away again, so that it has no gradient
    in exact arithmetic; in both it must be nothing beside the layer's other one.
    """
    ours, theirs = train_step(model, keras_model, x, keras_input)
    assert {leaf.dtype for leaf in jax.tree.leaves((theirs["gradients"], theirs["statistics"]))} == {x.dtype}
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=rtol)
    grads, keras_grads = ours["gradients"], theirs["gradients"]
    for layer in [layer for layer in keras_grads if layer.endswith(tuple(cancelled))]:
        for tree in (grads, keras_grads):
            bias, (other,) = np.abs(tree[layer].pop("bias")).max(), tree[layer].values()
            assert bias <= rtol * np.abs(other).max(), layer
    assert_trees_close(grads, keras_grads, rtol)
    assert all(leaf.any() for leaf in jax.tree.leaves(theirs["statistics"]))
    assert_trees_close(ours["statistics"], theirs["statistics"], rtol)


@contextlib.contextmanager
def float64():
    """Keras and JAX in float64: over a hundred layers float32's rounding grows to 1e-2 of some gradients."""
    # On JAX Keras computes norms and means in at most float32, by this function.
    original = dtypes.result_type

    def result_type(*args):
        return "float64" if "float64" in map(str, args) else original(*args)

    with (
        mock.patch.object(dtypes, "result_type", result_type),
        mock.patch.object(keras.src.backend, "result_type", result_type),
        jax.enable_x64(True),
    ):
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        try:
            yield
        finally:
            keras.config.set_floatx("float32")
            keras.config.set_dtype_policy("float32")
