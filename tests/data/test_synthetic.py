"""Rendered cells: reproducible, alike at every size, hard for a linear model and clear to the eye of a network."""

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bmjax.config import DataConfig
from bmjax.data.load import load_dataset
from bmjax.data.sources.cells import CLASSES, KINDS, Frame, canvas_of, draw_cell
from bmjax.data.sources.cells import Density as OpticalDensity
from bmjax.data.sources.synthetic import render, synthetic_cells
from bmjax.data.splits import split_dataset


def test_shapes_and_names():
    images, labels, ids = synthetic_cells(2, 32, 0)
    assert images.shape == (14, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert ids[:3] == ("BLA/00000", "BLA/00001", "EOS/00000")
    assert tuple(sorted(KINDS)) == CLASSES


def test_a_picture_depends_on_class_seed_and_number_alone():
    images, _, _ = synthetic_cells(3, 32, 0)
    more, _, _ = synthetic_cells(5, 32, 0)
    np.testing.assert_array_equal(images.reshape(7, 3, 32, 32, 3), more.reshape(7, 5, 32, 32, 3)[:, :3])
    np.testing.assert_array_equal(render("MON", 32, 0, 2), images[3 * 3 + 2])
    assert (render("MON", 32, 1, 2) != images[3 * 3 + 2]).any()
    assert len({image.tobytes() for image in more}) == 35


@pytest.mark.parametrize("name", CLASSES)
def test_a_cell_is_the_same_at_every_size(name):
    for i in range(4):
        large, small = render(name, 128, 0, i).astype(float), render(name, 64, 0, i).astype(float)
        halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.corrcoef(halved.ravel(), small.ravel())[0, 1] > 0.97


def test_pictures_vary_in_light_and_stain_and_are_neither_black_nor_white():
    images, _, _ = synthetic_cells(20, 32, 0)
    means = images.mean((1, 2))
    assert means.std(0).min() > 15
    assert means.min() > 50
    assert means.max() < 250
    assert images.std((1, 2, 3)).min() > 5


def bare(name, index, size=96):
    """A cell alone: (share of the picture it covers, share of it that is nucleus, its mean density r, g, b)."""
    canvas, rng = canvas_of(size), np.random.default_rng([index])
    frame = Frame.at(canvas, (0.0, 0.0), 0.0)
    cell = KINDS[name](rng, frame, 1.0)
    density = OpticalDensity(canvas)
    draw_cell(density, rng, frame, cell)
    body, nucleus = cell.body > 0, (cell.nucleus > 0) & (cell.body > 0)
    return body.mean(), nucleus.sum() / body.sum(), density.value[:, body & ~nucleus].mean(1)


def test_classes_differ_as_real_ones_do():
    area, ratio, plasma = {}, {}, {}
    for name in CLASSES:
        measured = [bare(name, i) for i in range(12)]
        area[name], ratio[name], plasma[name] = (np.mean([m[j] for m in measured], axis=0) for j in range(3))
    assert area["LYT"] < 0.6 * min(area[n] for n in ("BLA", "MON", "PMO"))
    assert area["PMO"] > area["BLA"] > area["NGS"]
    assert min(ratio["BLA"], ratio["LYT"]) > 0.6 > max(ratio[n] for n in ("EOS", "MON", "NGS", "PMO"))
    red, green, blue = range(3)
    for name in ("BLA", "LYT", "PMO"):  # blue cytoplasm takes red light away
        assert plasma[name][red] > 2 * plasma[name][blue]
    assert plasma["EOS"][blue] > plasma["EOS"][red]  # orange granules take blue light away
    assert plasma["NGS"][green] > plasma["NGS"][red]  # pink
    assert plasma["NGS"].sum() < 0.6 * min(plasma[n].sum() for n in ("BLA", "EOS", "PMO"))  # and pale


def test_a_linear_model_on_pixels_does_poorly():
    per_class = 160
    images, labels, _ = synthetic_cells(per_class, 32, 0)
    train = np.tile(np.arange(per_class), 7) < 100
    x = images.reshape(len(images), -1) / 255.0
    accuracy = {}
    for alpha in (1e3, 1e4, 1e5):
        model = make_pipeline(StandardScaler(), RidgeClassifier(alpha)).fit(x[train], labels[train])
        accuracy[alpha] = model.score(x[~train], labels[~train])
    print(f"linear model on pixels, 7 classes: test accuracy {accuracy}")
    assert max(accuracy.values()) < 0.65
    assert max(accuracy.values()) > 0.25  # better than chance, or the pictures would be noise


def test_as_a_dataset(tmp_path):
    config = DataConfig(image_size=32, synthetic_per_class=30, cache_dir=str(tmp_path))
    dataset = load_dataset(config, progress=False)
    again = load_dataset(config, progress=False)
    images, labels, ids = synthetic_cells(30, 32, 0)
    for d in (dataset, again):
        np.testing.assert_array_equal(d.images, images)
        np.testing.assert_array_equal(d.labels, labels)
        assert d.ids == ids
        assert isinstance(d.images, np.memmap)
    assert len(set(dataset.hashes)) == 210
    # More cells, or larger ones, leave every cell on its side of the split.
    sides = []
    for other in ({"synthetic_per_class": 40}, {"image_size": 16}, {}):
        changed = DataConfig(**{**vars(config), **other})
        d = load_dataset(changed, progress=False)
        sides.append({d.ids[i] for i in split_dataset(d, changed).test})
    assert {i for i in sides[0] if int(i[-5:]) < 30} == sides[1] == sides[2]
    assert load_dataset(changed, progress=False).fingerprint == dataset.fingerprint
    smaller = DataConfig(**{**vars(config), "image_size": 16})
    assert load_dataset(smaller, progress=False).fingerprint != dataset.fingerprint
