"""A real ImageNet file on real cells against Keras."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import weights
from bmjax.data.images.decode import decode_files
from bmjax.weights.preprocess import preprocess


@pytest.mark.shared
def test_real_weights_give_keras_features_on_real_cells(shared, tmp_path):
    import keras

    from tests.helpers.keras_parity import compiled_quickly

    path = shared / "weights/densenet169_weights_tf_dim_ordering_tf_kernels_notop.h5"
    classes = sorted(folder for folder in (shared / "data/bm7").iterdir() if folder.is_dir())
    cells = [sorted(folder.glob("*.jpg"))[n] for n in range(3) for folder in classes][:16]
    images = np.stack(list(decode_files(cells, 96))).astype(np.float32)
    out = tmp_path / "densenet169.safetensors"
    weights.port(path, "densenet169", out)
    read, ported = weights.read(path, "densenet169"), weights.read(out, "densenet169")
    jax.tree.map(np.testing.assert_array_equal, read[1], ported[1])
    record, variables = ported
    x = preprocess(jnp.asarray(images), record.preprocess)
    ours = np.asarray(jax.jit(weights.network(record).apply)(variables, x))
    with jax.numpy_rank_promotion("allow"):
        reference = keras.applications.DenseNet169(include_top=False, weights=str(path), input_shape=(96, 96, 3))
        inputs = keras.applications.densenet.preprocess_input(images.copy())
        theirs = np.asarray(compiled_quickly(functools.partial(reference, training=False))(inputs))
    assert len(images) == 16
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
