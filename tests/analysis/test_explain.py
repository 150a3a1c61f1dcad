"""Maps are their formulas; the scores tell a map that shows what decided from those that do not."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import reduce

from bmjax.analysis.explain.faithfulness import (
    GRID,
    cell_means,
    cells_of,
    deletion_insertion,
    randomised,
    rank_correlation,
    score_maps,
    ssim,
    unit,
)
from bmjax.analysis.explain.maps import Explainer, grad_cam, grad_cam_plus_plus, in_batches
from bmjax.analysis.report.figures import explanations
from bmjax.attention import create_attention
from bmjax.backbones import create_backbone, list_backbones
from bmjax.config import HeadConfig, ModelConfig
from bmjax.layers import Conv
from bmjax.model.classifier import Classifier, Head
from bmjax.model.create import create, init

H, W, N = 48, 64, 12


class Colours(nn.Module):
    """A backbone of one stage: colours by a 1x1 convolution, ReLU, means of 4x4 pixels."""

    stages: ClassVar = ("colours",)

    @nn.compact
    def __call__(self, x, *, train=False, mode="train", tap=None):
        y = reduce(nn.relu(Conv(4, name="conv")(x / 255)), "b (h i) (w j) c -> b h w c", "mean", i=4, j=4)
        return tap("colours", y)


def planted(attention):
    """A classifier and its variables, by hand: red means class 0, blue class 1, brightness nothing.

    The attention `soft` looks for either colour.
    """
    head = Head(2, HeadConfig(order=(), widths=()))
    model = Classifier(backbone=Colours(), attention=(("colours", attention),), head=head, preprocess="raw")
    # Channels: red less green, blue less green, brightness twice.
    kernel = np.array([[1, 0, 1, 1], [-1, -1, 1, 1], [0, 1, 1, 1]], np.float32).reshape(1, 1, 3, 4)
    logits = np.array([[150, -150], [-150, 150], [0, 0], [0, 0]], np.float32)
    params = {
        "backbone": {"conv": {"kernel": jnp.asarray(kernel)}},
        "head": {"logits": {"kernel": jnp.asarray(logits), "bias": jnp.zeros(2)}},
    }
    if attention != create_attention("none"):
        mask = {"kernel": jnp.asarray([8.0, 8, 0, 0]).reshape(1, 1, 4, 1), "bias": jnp.full(1, -2.0)}
        params["attention"] = {"mask": mask}
    return model, {"params": params, "batch_stats": {}}


@pytest.fixture(scope="module")
def cells():
    """(images uint8 [N, H, W, 3], labels, where the patch is [N, 2]): grey stripes, and a soft patch in one colour."""
    r = np.random.default_rng(0)
    labels = np.arange(N) % 2
    places = np.stack([r.integers(8, side - 8, N) for side in (H, W)], axis=1)
    rows, columns = np.mgrid[:H, :W]
    images = np.empty((N, H, W, 3))
    for image, label, (row, column) in zip(images, labels, places, strict=True):
        stripes = 110 + 60 * np.sign(np.sin((rows * r.normal() + columns * r.normal()) / 2))
        patch = 80 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 40)
        image[:] = stripes[..., None]
        image[..., 2 * label] += patch
    return images.round().clip(0, 255).astype(np.uint8), labels, places


def test_a_planted_patch_passes_and_edges_and_a_constant_fail(cells):
    images, labels, places = cells
    model, variables = planted(create_attention("soft", widths=()))
    explainer = Explainer(model)
    probs = explainer.probabilities(variables, images)
    assert (probs.argmax(-1) == labels).all()
    maps = explainer.maps(variables, images, labels)
    assert list(maps) == ["attention", "Grad-CAM", "Grad-CAM++"]
    for name, values in maps.items():
        peaks = np.stack(np.unravel_index(values.reshape(N, -1).argmax(1), (H, W)), axis=1)
        assert np.abs(peaks - places).max() <= 6, name
    scores = score_maps(explainer, model, variables, images, labels)
    assert {name for name, score in scores.items() if score.passes} == set(maps)
    assert not scores["edges"].sane
    assert not scores["constant"].sane
    assert not scores["constant"].faithful
    assert not scores["centre"].faithful
    # What a map above the head shows does not depend on the head.
    assert scores["attention"].correlation["head"] == pytest.approx(1)
    assert scores["Grad-CAM"].correlation["head"] < 0.9


def test_a_map_of_the_wrong_place_is_not_faithful(cells):
    """Turned by half a turn the patch's own map says nothing, however sharp it is."""
    images, labels, _ = cells
    model, variables = planted(create_attention("none"))
    explainer = Explainer(model)
    true = explainer.maps(variables, images, labels)["Grad-CAM"]
    scores = score_maps(
        explainer, model, variables, images, labels, extra={"true": true, "turned": true[:, ::-1, ::-1]}, draws=1
    )
    assert scores["true"].faithful
    assert not scores["turned"].faithful
    assert not scores["true"].sane, "it does not come from the network that is randomised"


def test_grad_cam_of_a_linear_head_on_means_is_the_class_activation_map(cells):
    """Zhou et al. 2016: the features weighted by the class's weights; here over h * w, for the mean's derivative."""
    images, labels, _ = cells
    model, variables = planted(create_attention("none"))
    maps = Explainer(model).maps(variables, images, labels)
    x = images / 255
    features = np.einsum("nhwi,ic->nhwc", x, np.asarray(variables["params"]["backbone"]["conv"]["kernel"])[0, 0])
    features = np.maximum(features, 0).reshape(N, H // 4, 4, W // 4, 4, 4).mean((2, 4))
    weights = np.asarray(variables["params"]["head"]["logits"]["kernel"]).T[labels]
    expected = np.maximum(np.einsum("nhwc,nc->nhw", features, weights), 0) / (H * W / 16)
    expected = jax.image.resize(expected, (N, H, W), "bilinear")
    np.testing.assert_allclose(maps["Grad-CAM"], expected, rtol=1e-4, atol=1e-5)


def test_grad_cam_plus_plus_is_equation_19():
    r = np.random.default_rng(0)
    a, g = np.abs(r.standard_normal((2, 3, 5, 4))), r.standard_normal((2, 3, 5, 4))
    g[0, 0, 0, 0] = 0
    expected = np.zeros((2, 3, 5))
    for n in range(2):
        for c in range(4):
            total, weight = a[n, ..., c].sum(), 0.0
            for value in g[n, ..., c].ravel():
                if value > 0:
                    weight += value**2 / (2 * value**2 + total * value**3) * value
            expected[n] += weight * a[n, ..., c]
    got = grad_cam_plus_plus(jnp.asarray(a, jnp.float32), jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(got, np.maximum(expected, 0), rtol=1e-5)
    np.testing.assert_allclose(
        grad_cam(jnp.asarray(a, jnp.float32), jnp.asarray(g, jnp.float32)),
        np.maximum((a * g.mean((1, 2), keepdims=True)).sum(-1), 0),
        rtol=1e-4,
        atol=1e-6,
    )


class WhiteCell:
    """Stands for an explainer: the probability is the brightness of the lower left quarter."""

    def probabilities(self, variables, images):
        bright = images[:, 8:, :8].mean((1, 2, 3)) / 255
        return np.stack([bright, 1 - bright], axis=1)


def test_deletion_and_insertion_are_areas_by_hand():
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[:, 8:, :8] = 255
    left = 64 / 255  # the mean colour, 63.75, rounded
    first = np.array([[0.0, 0, 1, 0]])
    deleted, inserted = deletion_insertion(WhiteCell(), {}, image, np.array([0]), first)
    assert deleted[0] == pytest.approx(0.25 * (1 + left) / 2 + 0.75 * left)
    last = np.array([[3.0, 2, 0, 1]])
    deleted_last, inserted_last = deletion_insertion(WhiteCell(), {}, image, np.array([0]), last)
    assert deleted_last[0] == pytest.approx(0.75 + 0.25 * (1 + left) / 2)
    # Blurring spares this quarter's brightness as `start`; then it is white at once, or at the very end.
    start = 2 * (inserted[0] - 0.75) / 0.25 - 1
    assert 0.5 < start < 1
    assert inserted_last[0] == pytest.approx(0.75 * start + 0.25 * (start + 1) / 2)
    other, _ = deletion_insertion(WhiteCell(), {}, image, np.array([1]), first)
    assert other[0] == pytest.approx(1 - deleted[0])


def test_equal_values_go_in_a_random_order_by_the_seed():
    image = np.zeros((8, 16, 16, 3), np.uint8)
    image[:, 8:, :8] = 255
    targets, equal = np.zeros(8, int), np.zeros((8, 4))
    first, again, other = (deletion_insertion(WhiteCell(), {}, image, targets, equal, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first.round(6))) > 1


def test_cells_cover_any_size_and_their_means_are_means():
    cells = cells_of((9, 13), GRID)
    assert np.array_equal(np.unique(cells), np.arange(GRID * GRID))
    maps = np.random.default_rng(0).random((2, 9, 13))
    expected = [[m[cells == c].mean() for c in range(GRID * GRID)] for m in maps]
    np.testing.assert_allclose(cell_means(maps), expected)


def test_ssim_of_known_pairs():
    r = np.random.default_rng(0)
    a = r.random((20, 30))
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, 1 - a) < -0.5
    flat = (2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4)
    assert ssim(np.full((9, 9), 0.2), np.full((9, 9), 0.4)) == pytest.approx(flat)


def test_rank_correlation_of_maps_that_have_no_order():
    up, flat = np.arange(6.0), np.zeros(6)
    got = rank_correlation(np.stack([up, up, flat, flat, up]), np.stack([np.exp(up), -up, up, flat, flat]))
    np.testing.assert_allclose(got, [1, -1, 1, 1, 0])
    assert np.array_equal(unit(np.zeros((1, 2, 2))), np.zeros((1, 2, 2)))
    np.testing.assert_allclose(unit(np.array([[[-2.0, 0], [2, 0]]])), [[[0, 0.5], [1, 0.5]]])


def test_randomising_the_head_leaves_the_rest():
    model, variables = planted(create_attention("soft", widths=()))
    head, whole = (randomised(model, variables, 0, H, what) for what in ("head", "whole"))
    same = {
        name: jax.tree.map(np.array_equal, variables["params"][name], head["params"][name]) for name in head["params"]
    }
    assert {name for name, found in same.items() if not all(jax.tree.leaves(found))} == {"head"}
    assert not np.array_equal(
        whole["params"]["backbone"]["conv"]["kernel"], variables["params"]["backbone"]["conv"]["kernel"]
    )
    assert jax.tree.structure(whole["params"]) == jax.tree.structure(variables["params"])


def test_the_picture_has_each_cell_with_its_maps_and_its_text():
    images = np.random.default_rng(0).integers(0, 255, (7, 16, 16, 3)).astype(np.uint8)
    maps = {"a": np.zeros((7, 16, 16)), "b": np.arange(7 * 256.0).reshape(7, 16, 16)}
    figure = explanations(images, [(f"cell {i}", "black") for i in range(7)], maps, ["first", "second\npasses"])
    axes = [axis for axis in figure.get_axes() if axis.axison]
    assert len(axes) == 7 * 3, "two columns of four rows, the last place empty"
    titles = [axis.get_title() for axis in axes]
    assert [t for t in titles if t.startswith("cell")] == [f"cell {i}" for i in range(7)]
    assert titles.count("first") == titles.count("second\npasses") == 2
    assert [axis.get_xlabel() for axis in axes][4:6] == ["0 to 0", "2.6e+02 to 5.1e+02"]


def test_batches_of_any_size_give_every_row_once():
    x = np.arange(10.0).reshape(5, 2)
    shapes = []

    def double(v):
        shapes.append(v.shape)
        return {"y": 2 * v}

    assert np.array_equal(in_batches(double, x, size=2)["y"], 2 * x)
    assert set(shapes) == {(2, 2)}
    shapes.clear()
    in_batches(double, x, size=4)
    assert set(shapes) == {(3, 2)}, "two of three, not of four"
    assert np.array_equal(in_batches(double, x, size=99)["y"], 2 * x)


@pytest.mark.parametrize("name", [n for n in list_backbones() if n.endswith("_tiny")])
def test_every_family_has_maps_at_every_stage(name):
    """Shapes alone: the maps' own numbers are those of the tests above."""
    backbone = create_backbone(name)
    attach = (backbone.stages[0], "last")
    model = create(ModelConfig(backbone=name, weights=None, attention="cbam", attach=attach), 3)
    images, targets = np.zeros((2, 64, 64, 3), np.uint8), np.zeros(2, int)
    variables = jax.eval_shape(lambda: init(model, jax.random.key(0), 64))
    names = {f"attention_{backbone.stages[0]}", f"attention_{backbone.stages[-1]}", "Grad-CAM", "Grad-CAM++"}
    for stage in backbone.stages:
        maps = jax.eval_shape(Explainer(model, stage).compute, variables, images, targets)
        assert {name: m.shape for name, m in maps.items()} == dict.fromkeys(names, (2, 64, 64))


def test_a_stage_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="unknown stage of the backbone 'conv9'; known: colours, last"):
        Explainer(planted(create_attention("none"))[0], "conv9")
