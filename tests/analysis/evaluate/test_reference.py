"""Strange images are told from known ones by features, and foreign ones by their looks."""

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from bmjax.analysis.evaluate.foreign import foreign_words
from bmjax.analysis.evaluate.looks import LOOKS, as_frequent, compare_looks, looks, weighted_median
from bmjax.analysis.evaluate.reader import Seen
from bmjax.analysis.evaluate.reference import FILE, Reference, make_reference, read_reference, write_reference
from bmjax.analysis.evaluate.strangers import auroc
from bmjax.data.sources.synthetic import CLASSES, render
from bmjax.data.splits import Splits
from bmjax.training.predict import unlabelled


def seen(rng, n, middle=0.0, k=3, c=8):
    labels = rng.integers(0, k, n)
    features = rng.normal(size=(n, c)) + 4 * np.eye(k, c)[labels] + middle * np.eye(1, c, c - 1)
    logits = features[:, :k]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    maps = (rng.normal(size=(n, 2, 5)) + middle).astype(np.float32)
    images = np.full((n, 16, 16, 3), 100) + rng.integers(-20, 20, (n, 1, 1, 1)) * rng.random((n, 16, 16, 3))
    energy = -np.log(np.exp(logits).sum(1))
    probs, features = probs.astype(np.float32), features.astype(np.float32)
    return labels, Seen(probs, energy, features, maps, images.astype(np.uint8), np.arange(n))


@pytest.fixture
def reference():
    rng = np.random.default_rng(0)
    labels, train = seen(rng, 400)
    plain = Reference.of_looks(train.looks)
    plain = dataclasses.replace(plain, features=train.features, maps=train.maps, labels=labels, step=3)
    return dataclasses.replace(plain, known=plain.parts(seen(rng, 300)[1]), rows=np.arange(300))


def test_scores_are_those_of_scikit_learn(reference):
    _, new = seen(np.random.default_rng(1), 50)
    found = reference.strangeness(new)
    np.testing.assert_allclose(found[:, 0], 1 - new.probs.max(1), atol=1e-6)
    np.testing.assert_allclose(found[:, 1], new.energy)
    means = np.stack([reference.features[reference.labels == c].mean(0) for c in range(3)])
    model = LedoitWolf(assume_centered=True).fit(reference.features - means[reference.labels])
    expected = np.min([model.mahalanobis(new.features - mean) for mean in means], axis=0)
    np.testing.assert_allclose(found[:, 2], expected, rtol=1e-3)
    unit = reference.features / np.linalg.norm(reference.features, axis=1, keepdims=True)
    at = new.features / np.linalg.norm(new.features, axis=1, keepdims=True)
    distance, _ = NearestNeighbors(n_neighbors=10).fit(unit).kneighbors(at)
    np.testing.assert_allclose(found[:, 3], distance[:, -1], atol=1e-3)
    stages = []
    for own, there in zip(np.moveaxis(reference.maps, 1, 0), np.moveaxis(new.maps, 1, 0), strict=True):
        distance, _ = NearestNeighbors(n_neighbors=10).fit(own).kneighbors(there)
        stages.append(np.log(distance[:, -1]))
    np.testing.assert_allclose(found[:, 5], np.mean(stages, axis=0), atol=1e-3)
    parts = np.stack([new.energy, found[:, 4], *stages], axis=1)
    known = reference.known[:, [1, 4, 5, 6]]
    np.testing.assert_allclose(found[:, 6], ((parts - known.mean(0)) / known.std(0)).mean(1), atol=1e-3)


def test_familiarity_is_a_p_value_and_low_for_strangers(reference):
    rng = np.random.default_rng(2)
    known, strange = (reference.strangeness(seen(rng, 2000, middle)[1]) for middle in (0.0, 8.0))
    for share in (0.05, 0.2, 0.5):
        assert (reference.familiarity(known) <= share).mean() == pytest.approx(share, abs=0.07)
    assert (reference.familiarity(strange) <= 0.05).mean() > 0.8
    assert reference.familiarity(reference.known_scores).min() == pytest.approx(2 / 301, abs=1e-6)
    value, low, high = auroc(known[:300, 3], strange[:300, 3])
    labels = np.repeat([0, 1], 300)
    expected = roc_auc_score(labels, np.concatenate([known[:300, 3], strange[:300, 3]]))
    assert value == pytest.approx(expected, abs=1e-6)
    assert low < value < high


def test_it_is_kept_with_the_run_and_believed_only_whole(reference, tmp_path):
    assert read_reference(tmp_path) is None
    write_reference(tmp_path, reference)
    found = read_reference(tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.features, reference.features)
    assert found.step == 3
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{FILE}.*bmjax eval RUN --reference"):
        read_reference(tmp_path)


def test_colours_are_kept_for_rare_classes_too_and_believed_only_as_shares(reference, tmp_path):
    labels = np.array([0] * 2500 + [1] * 3, np.int32)
    images = np.full((len(labels), 16, 16, 3), 40, np.uint8)
    images[labels == 1] = 200
    dataset = dataclasses.replace(unlabelled(images, ("a", "b", "c")), labels=labels)
    none = np.zeros(0, np.int64)
    made = make_reference(dataset, Splits(np.arange(len(labels)), none, none))
    assert made.colours[0, 0, 40] == made.colours[1, 2, 200] == 1
    assert made.colours[2].sum() == 0
    np.testing.assert_allclose(made.colours_at(np.array([0.5, 0.5, 0.0]))[0, [40, 200]], 0.5)
    np.testing.assert_allclose(made.colours_at(np.array([0.0, 0.0, 1.0]))[0, [40, 200]], 0.5)
    write_reference(tmp_path, made)
    kept = read_reference(tmp_path)
    assert kept is not None
    np.testing.assert_array_equal(kept.colours, made.colours)
    for wrong in (made.colours[:, :2], 2 * made.colours, -made.colours, made.colours[2:]):
        write_reference(tmp_path, dataclasses.replace(made, colours=wrong))
        with pytest.raises(ValueError, match="array 'colours' is not as expected; `bmjax eval RUN --reference`"):
            read_reference(tmp_path)
    # A file of before has none.
    write_reference(tmp_path, reference)
    arrays = dict(np.load(tmp_path / FILE))
    del arrays["colours"]
    np.savez_compressed(tmp_path / FILE, **arrays)
    kept = read_reference(tmp_path)
    assert kept is not None
    assert kept.has_features
    assert len(kept.colours) == 0


@pytest.fixture(scope="module")
def rendered():
    return np.stack([render(CLASSES[i % len(CLASSES)], 64, 0, i) for i in range(96)])


def test_looks_see_colour_focus_and_scale(rendered):
    def foreign(images):
        return {s.look for s in compare_looks(looks(images), looks(rendered[:48])) if s.is_foreign}

    own = rendered[48:]
    assert foreign(own) == set()
    assert "focus" in foreign(gaussian_filter(own, (0, 1.5, 1.5, 0)))
    assert "lightness" in foreign((own * 0.6).astype(np.uint8))
    assert {"green to red", "blue to yellow"} & foreign(np.stack([own[..., 0], own[..., 2], own[..., 1]], -1))
    wide = np.pad(own, ((0, 0), (32, 32), (32, 32), (0, 0)), mode="symmetric")[:, ::2, ::2]
    assert "scale" in foreign(wide)
    assert looks(own).shape == (48, len(LOOKS))
    assert np.isfinite(looks(np.full((1, 16, 16, 3), 90, np.uint8))).all(), "an empty image has looks too"
    one = looks(own[:1])
    np.testing.assert_allclose(looks(own)[0], one[0], atol=1e-4)


def test_a_folder_of_one_class_is_not_another_laboratorys(rendered):
    """Looks are held against training cells of the classes that are predicted; by all, lymphocytes alone are small."""
    labels = np.arange(280) % len(CLASSES)
    more = np.stack([render(CLASSES[labels[i]], 64, 0, i) for i in range(96, 280)])
    own, probs = looks(np.concatenate([rendered, more])), np.eye(len(CLASSES), dtype=np.float32)
    new = np.stack([render("LYT", 64, 1, i) for i in range(60)])

    def foreign(images, weights):
        return {s.look for s in compare_looks(looks(images), own, weights) if s.is_foreign}

    weights = as_frequent(labels, probs[np.full(60, CLASSES.index("LYT"))])
    assert foreign(new, None) == {"scale"}
    assert foreign(new, weights) == set()
    assert "lightness" in foreign((new * 0.6).astype(np.uint8), weights)
    assert as_frequent(np.zeros(0, int), probs) is None
    rare = np.where(np.arange(140) < 10, 0, 1 + np.arange(140) % 6)
    assert as_frequent(rare, probs[np.zeros(60, int)]) is None, "ten cells of the class predicted are too few"
    assert as_frequent(rare[10:], np.tile(np.float32([0.9, 0.1, 0, 0, 0, 0, 0]), (60, 1))) is None
    even = as_frequent(labels, np.full((1, len(CLASSES)), 1 / len(CLASSES)))
    assert even.sum() == pytest.approx(1)


def test_weighted_medians_are_those_of_repeated_rows():
    values, weights = np.random.default_rng(0).normal(size=(9, 4)), np.array([3, 0, 1, 2, 0, 4, 1, 2, 1])
    np.testing.assert_allclose(weighted_median(values, weights), np.median(np.repeat(values, weights, axis=0), axis=0))
    np.testing.assert_allclose(weighted_median(values, np.ones(9)), np.median(values, axis=0))


def test_words_on_foreign_images_have_figures(rendered, reference):
    alone, rng = Reference.of_looks(looks(rendered[:48])), np.random.default_rng(3)

    def of(images, middle=0.0):
        return dataclasses.replace(seen(rng, len(images), middle)[1], images=images)

    assert foreign_words(alone, of(rendered[48:])) == []
    words = foreign_words(alone, of((rendered[48:] * 0.6).astype(np.uint8)))
    assert any(word.startswith("lightness is") and "deviations lower" in word for word in words)
    assert foreign_words(alone, of(np.zeros((3, 64, 64, 3), np.uint8))) == [], "three may be odd by chance"
    assert not any("stranger" in word for word in foreign_words(reference, seen(rng, 48)[1]))
    assert "of 48 images are stranger to the network" in foreign_words(reference, seen(rng, 48, 8.0)[1])[-1]
