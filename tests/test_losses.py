import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from bmjax.losses import balanced_class_weights, cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_keras(smoothing):
    import keras

    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((9, 4))).astype(np.float32)
    labels = rng.integers(0, 4, 9)
    with jax.numpy_rank_promotion("allow"):
        expected = keras.losses.CategoricalCrossentropy(True, label_smoothing=smoothing, reduction=None)(
            np.eye(4, dtype=np.float32)[labels], logits
        )
    ours = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(ours, np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_class_weights_multiply_and_huge_logits_stay_finite():
    logits, labels = jnp.array([[1e4, -1e4], [-1e4, 1e4]]), jnp.array([1, 1])
    weights = jnp.array([1.0, 3.0])
    plain, weighted = cross_entropy(logits, labels), cross_entropy(logits, labels, 0.0, weights)
    assert np.isfinite(plain).all()
    np.testing.assert_allclose(weighted, 3 * plain)
    assert cross_entropy(logits.astype(jnp.bfloat16), labels).dtype == jnp.float32


def test_balanced_weights_are_scikit_learns():
    labels = np.array([0, 0, 0, 1, 2, 2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(balanced_class_weights(labels, 3), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="class 3 has no image"):
        balanced_class_weights(labels, 4)
