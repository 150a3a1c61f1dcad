"""Views, adapted norms and priors against what they should be."""

import dataclasses

import jax
import numpy as np
import pytest

import bmjax
from bmjax.analysis.evaluate.looks import looks
from bmjax.analysis.evaluate.reader import Reader, adapted, adapted_priors, at_priors, laid
from bmjax.config import Config, DataConfig, ModelConfig, TrainConfig
from bmjax.data.images.colours import ColourMap
from bmjax.runs.folder import Run


@pytest.fixture(scope="module")
def run():
    model = ModelConfig(backbone="densenet_tiny", weights=None, attention="se")
    config = Config(data=DataConfig(image_size=32), model=model, train=TrainConfig(eval_batch_size=8, devices=1))
    network = bmjax.create(config.model, 3)
    return Run("nowhere", config, network, bmjax.init(network, jax.random.key(0), 32), ("a", "b", "c"), 0)


def cells(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def test_eight_views_are_all_that_lay_a_square_on_itself():
    image = cells(1)
    every = {laid(image, view).tobytes() for view in range(8)}
    assert every == {np.rot90(side, turn, (1, 2)).tobytes() for turn in range(4) for side in (image, image[:, :, ::-1])}
    assert laid(image, 0) is image


def test_views_are_averaged_and_one_view_is_the_run_itself(run):
    images = cells(4)
    one = Reader(run)
    plain = one.images(images)
    np.testing.assert_allclose(plain.probs, bmjax.predict_probs(run, images), atol=1e-6)
    features = jax.jit(lambda v, x: run.model.apply(v, x, method="features"))(run.variables, images.astype(np.float32))
    np.testing.assert_allclose(plain.features, features, atol=1e-4)
    np.testing.assert_array_equal(plain.images[plain.rows], images)
    np.testing.assert_allclose(plain.looks, looks(images))
    eight = Reader(run, views=8)
    found = eight.images(images)
    each = [one.images(laid(images, view)).probs for view in range(8)]
    np.testing.assert_allclose(found.probs, np.mean(each, axis=0), atol=1e-6)
    np.testing.assert_allclose(found.energy, plain.energy, atol=1e-5)
    turned = eight.images(np.ascontiguousarray(laid(images, 5)))
    np.testing.assert_allclose(turned.probs, found.probs, atol=1e-5)
    assert np.abs(found.probs - plain.probs).max() > 1e-4
    with pytest.raises(ValueError, match="views is 3; expected one of 1, 2, 4, 8"):
        Reader(run, views=3)


def test_colours_are_mapped_batch_by_batch_and_nothing_is_copied(run):
    sizes = []

    class Spy(ColourMap):
        def __call__(self, images):
            sizes.append(len(images))
            return super().__call__(images)

    images, colours, reader = cells(20), Spy((1.3, 0.9, 1.1), (0.9, 1.05, 1.0)), Reader(run)
    expected = Reader(run).images(colours(images), views=2)
    reader.colours = colours
    sizes.clear()
    seen = reader.images(images, views=2)
    assert sizes == [8, 8, 8] * 2
    np.testing.assert_allclose(seen.probs, expected.probs, atol=1e-6)
    np.testing.assert_array_equal(seen.shown(seen.rows), colours(images))
    np.testing.assert_allclose(seen.looks, expected.looks, atol=1e-5)
    assert np.shares_memory(seen.images, images)


def test_stages_are_sketched_by_means_and_deviations_over_places(run):
    images = cells(12)
    found = Reader(run).images(images).maps
    names = [f"stage_{stage}" for stage in run.model.backbone.stages[-3:]]
    _, kept = jax.jit(lambda v, x: run.model.apply(v, x, mutable=["intermediates"]))(run.variables, images)
    assert found.shape == (12, len(names), 128)
    for seed, name in enumerate(names):
        maps = np.asarray(kept["intermediates"][name][0], np.float64)
        moments = np.concatenate([maps.mean((1, 2)), maps.std((1, 2))], axis=1)
        matrix = np.random.RandomState(seed).standard_normal((moments.shape[1], 128)) / np.sqrt(128)
        np.testing.assert_allclose(found[:, seed], moments @ matrix, atol=1e-3 * np.abs(moments).max())
        # Distances of sketches are those of the moments, but for what chance takes from 128 numbers.
        near = (np.linalg.norm(x[1:] - x[:1], axis=1) for x in (found[:, seed].astype(np.float64), moments))
        np.testing.assert_allclose(*near, rtol=0.3)


def test_norms_are_adapted_to_the_moments_of_the_images(run):
    """The first norm's statistics are the convolution's own moments over the images; the head's stay."""
    images = cells(24, seed=1)
    found = adapted(run, images, batch=8, own=0)["batch_stats"]

    @jax.jit
    def convolved(variables, x):
        _, kept = run.model.apply(  # in training, where convolution and norm are apart
            variables,
            x,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=lambda module, _: module.name == "conv1_conv",
            mutable=["intermediates", "batch_stats"],
        )
        return kept["intermediates"]["backbone"]["conv1_conv"]["__call__"][0]

    x = np.asarray(convolved(run.variables, images.astype(np.float32)))
    first, old = found["backbone"]["conv1_bn"], run.variables["batch_stats"]["backbone"]["conv1_bn"]
    np.testing.assert_allclose(first["mean"], x.mean((0, 1, 2)), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(first["var"], x.var((0, 1, 2)), rtol=1e-3, atol=1e-2)
    for name, value in run.variables["batch_stats"]["head"]["batch_norm"].items():
        np.testing.assert_array_equal(found["head"]["batch_norm"][name], value)
    half = adapted(run, images, batch=8, own=24)["batch_stats"]["backbone"]["conv1_bn"]["mean"]
    np.testing.assert_allclose(half, (old["mean"] + first["mean"]) / 2, atol=1e-4)
    with pytest.raises(ValueError, match="1 images to adapt to"):
        adapted(run, images[:1])


def test_adapting_needs_no_order_and_drops_nothing(run):
    """Files in the order of their classes give the same statistics, and stochastic depth is off."""
    images = np.concatenate([cells(32, seed=1) // 2, 255 - cells(32, seed=2) // 2])
    mixed = np.random.default_rng(5).permutation(images)
    each = [adapted(run, x, batch=8, own=0)["batch_stats"]["backbone"] for x in (images, mixed)]
    for a, b in zip(*map(jax.tree.leaves, each), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.1, atol=0.1 * np.abs(b).max())
    model = ModelConfig(backbone="efficientnet_tiny", weights=None, attention="none")
    networks = [bmjax.create(model, 3)]
    networks.append(networks[0].clone(backbone=networks[0].backbone.clone(drop_connect=0.0)))
    variables = bmjax.init(networks[0], jax.random.key(0), 32)
    config = Config(data=DataConfig(image_size=32), model=model, train=TrainConfig(eval_batch_size=8, devices=1))
    found = [
        adapted(Run("nowhere", config, one, variables, ("a", "b", "c"), 0), images[:16], batch=8) for one in networks
    ]
    for a, b in zip(*(jax.tree.leaves(one["batch_stats"]) for one in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_network_without_batch_norms_is_not_adapted(run):
    bare = jax.tree.map(lambda x: x, run.variables)
    bare["batch_stats"] = {"head": bare["batch_stats"]["head"]}
    with pytest.raises(ValueError, match="densenet_tiny has no batch-norm before the head"):
        adapted(dataclasses.replace(run, variables=bare), cells(4), update=lambda params, stats, images: stats)


def test_priors_are_found_without_labels():
    """Of calibrated probabilities learned at even frequencies, the frequencies 70, 20 and 10 % are found."""
    rng = np.random.default_rng(0)
    target, even = np.array([0.7, 0.2, 0.1]), np.full(3, 1 / 3)
    labels = rng.choice(3, 4000, p=target)
    x = rng.normal(size=(4000, 3)) + 1.5 * np.eye(3)[labels]
    likelihood = np.exp(1.5 * x)  # of N(1.5 e_c, 1), but for what is common to all classes
    probs = likelihood / likelihood.sum(1, keepdims=True)
    found = adapted_priors(probs, even)
    np.testing.assert_allclose(found, target, atol=0.03)
    better = at_priors(probs, even, found)
    np.testing.assert_allclose(better.sum(1), 1, atol=1e-6)
    assert (better.argmax(1) == labels).mean() > (probs.argmax(1) == labels).mean() + 0.02
