"""Near duplicates: found whatever was done to the copy, and nothing else found."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from bmjax.data.images.duplicates import CERTAIN, SIZE, Pairs, correlate, describe, find_pairs, groups_of, thumbnails
from bmjax.data.sources.cells import CLASSES
from bmjax.data.sources.synthetic import render


@pytest.fixture(scope="module")
def cells():
    return [Image.fromarray(render(CLASSES[i % len(CLASSES)], 96, 0, i)) for i in range(40)]


def grey_of(images):
    return thumbnails(np.stack([np.asarray(image.resize((96, 96))) for image in images]))


def as_jpeg(image, quality):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


CHANGES = {
    "same": lambda image: image,
    **{f"symmetry {t}": lambda image, t=t: image.transpose(Image.Transpose(t)) for t in range(7)},
    "jpeg": lambda image: as_jpeg(image, 40),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.75),
    "smaller": lambda image: image.resize((60, 60)),
    "all": lambda image: as_jpeg(ImageEnhance.Brightness(image.transpose(Image.Transpose(3))).enhance(1.1), 60),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_copy_is_certain_and_nothing_else_is(cells, change):
    copies = [CHANGES[change](cell) for cell in cells[:10]]
    pairs = find_pairs(grey_of([*cells, *copies]))
    certain = pairs.where(pairs.certain)
    assert sorted(zip(certain.first.tolist(), certain.second.tolist(), strict=True)) == [(i, 40 + i) for i in range(10)]


def test_a_description_is_the_same_under_all_symmetries(cells):
    grey = grey_of(cells[:3])
    wanted = describe(grey)
    assert np.linalg.norm(wanted, axis=1) == pytest.approx(1, abs=1e-5)
    for mirrored in (grey, grey[:, ::-1]):
        for turns in range(4):
            np.testing.assert_allclose(describe(np.rot90(mirrored, turns, axes=(1, 2))), wanted, atol=1e-5)


def test_many_copies_of_one_image_are_one_group(cells):
    """More than an image has neighbours looked at: an augmented folder."""
    rng = np.random.default_rng(0)
    copies = []
    for _ in range(35):
        turned = cells[0].transpose(Image.Transpose(int(rng.integers(0, 7))))
        copies.append(ImageEnhance.Brightness(turned).enhance(rng.uniform(0.7, 1.0)))
    grey = grey_of([*copies, *cells])
    pairs = find_pairs(grey)
    groups = groups_of(len(grey), pairs.where(pairs.certain))
    assert len(set(groups[:36])) == 1
    assert len(set(groups[35:])) == 40


def test_identical_and_blank_images(cells):
    blank = np.full((14, SIZE, SIZE), 200, np.uint8)
    blank[13] = 90  # another blank image is no copy: there is no detail to tell by
    grey = np.concatenate([blank, grey_of(cells[:2])])
    pairs = find_pairs(grey)
    assert set(pairs.correlation) == {1.0}
    assert len(set(groups_of(len(grey), pairs)[:13])) == 1
    assert len(set(groups_of(len(grey), pairs))) == 4
    assert correlate(blank[:1], blank[13:]) == pytest.approx(0)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_images(cells, n):
    assert len(find_pairs(grey_of(cells[:n]) if n else np.zeros((0, SIZE, SIZE), np.uint8))) == 0


def test_groups_join_through_others():
    pairs = Pairs(np.array([0, 1, 4]), np.array([1, 3, 5]), np.full(3, CERTAIN))
    groups = groups_of(6, pairs)
    assert groups[0] == groups[1] == groups[3]
    assert groups[4] == groups[5]
    assert len(set(groups)) == 3


@pytest.mark.shared
def test_real_cells(shared):
    """At least 95 % of planted copies, and fewer than 0.1 % of unrelated pairs."""
    files = sorted((shared / "data/bm7").rglob("*.jpg"))[::20]
    rng = np.random.default_rng(0)
    cells = [Image.open(path).convert("RGB") for path in files]
    copies = []
    for cell in cells:
        turned = cell.transpose(Image.Transpose(int(rng.integers(0, 7))))
        copies.append(as_jpeg(ImageEnhance.Brightness(turned).enhance(rng.uniform(0.8, 1.2)), 60))
    n = len(cells)
    pairs = find_pairs(grey_of([*cells, *copies]))
    certain = pairs.where(pairs.certain)
    planted = certain.second == certain.first + n
    assert planted.sum() >= 0.95 * n
    assert (~planted).sum() < 0.001 * n * (2 * n - 1)
