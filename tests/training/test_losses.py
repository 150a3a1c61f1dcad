import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.utils.class_weight import compute_class_weight

from bmjax.config import TrainConfig
from bmjax.training.losses import balanced_class_weights, cross_entropy, effective_class_weights, make_loss

LOGITS = (3 * np.random.default_rng(1).standard_normal((9, 4))).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, 4, 9)
COUNTS = np.array([100, 10, 1, 1000])


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
    np.testing.assert_allclose(balanced_class_weights(np.bincount(labels)), expected, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_its_formula(gamma):
    p = softmax(LOGITS.astype(np.float64), axis=1)[np.arange(9), LABELS]
    np.testing.assert_allclose(
        cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), focal_gamma=gamma),
        -((1 - p) ** gamma) * np.log(p),
        rtol=1e-5,
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("margin", [0.0, 30.0, 1e4, -1e4])
def test_focal_loss_has_a_finite_gradient_where_the_network_is_sure(gamma, margin):
    logits = jnp.array([[margin, 0.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, jnp.array([0]), focal_gamma=gamma)[0])(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_effective_weights_are_their_formula_and_have_its_limits():
    expected = np.array([(1 - 0.99) / (1 - 0.99**n) for n in COUNTS.tolist()])
    np.testing.assert_allclose(effective_class_weights(COUNTS, 0.99), 4 * expected / expected.sum(), rtol=1e-9)
    np.testing.assert_array_equal(effective_class_weights(COUNTS, 0.0), np.ones(4))
    inverse = 1 / COUNTS
    np.testing.assert_allclose(effective_class_weights(COUNTS, 1 - 1e-9), 4 * inverse / inverse.sum(), rtol=1e-4)


def test_the_configured_loss():
    logits, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    plain = np.asarray(cross_entropy(logits, labels))
    np.testing.assert_array_equal(make_loss(TrainConfig(), COUNTS)(logits, labels), plain)
    weighted = make_loss(TrainConfig(class_weights="balanced"), COUNTS)(logits, labels)
    np.testing.assert_allclose(weighted, plain * balanced_class_weights(COUNTS)[LABELS], rtol=1e-6)
    weighted = make_loss(TrainConfig(class_weights="effective", effective_beta=0.9), COUNTS)(logits, labels)
    np.testing.assert_allclose(weighted, plain * effective_class_weights(COUNTS, 0.9)[LABELS], rtol=1e-6)
    adjusted = make_loss(TrainConfig(logit_adjustment=1.5), COUNTS)(logits, labels)
    p = softmax(LOGITS + 1.5 * np.log(COUNTS / COUNTS.sum()), axis=1)[np.arange(9), LABELS]
    np.testing.assert_allclose(adjusted, -np.log(p), rtol=1e-5, atol=1e-6)


def test_a_class_without_images_is_named_where_frequencies_count():
    counts = np.array([3, 0, 2])
    assert make_loss(TrainConfig(focal_gamma=1.0), counts)
    for config in (TrainConfig(class_weights="balanced"), TrainConfig(logit_adjustment=1.0)):
        with pytest.raises(ValueError, match="class 1 has no image"):
            make_loss(config, counts)


@pytest.mark.parametrize(
    "two",
    [
        {"sampling": "balanced", "class_weights": "balanced"},
        {"class_weights": "effective", "logit_adjustment": 1.0},
        {"sampling": "balanced", "logit_adjustment": 0.5},
    ],
)
def test_two_corrections_of_frequencies_are_refused(two):
    with pytest.raises(ValueError, match=" and ".join(two)):
        TrainConfig(**two)
