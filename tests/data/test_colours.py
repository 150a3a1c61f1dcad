"""Another laboratory's colours are brought to those of training by one map for all images."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmjax.config import DataConfig
from bmjax.data.images.colours import ColourMap, colour_shares, match_colours
from bmjax.data.images.laboratories import colours_of_all
from bmjax.data.load import load_dataset, load_elsewhere
from bmjax.data.sources.synthetic import CLASSES, render

LABELS = np.arange(70) % len(CLASSES)


@pytest.fixture(scope="module")
def rendered():
    return np.stack([render(CLASSES[label], 48, 0, i) for i, label in enumerate(LABELS)])


def shares_of(images):
    return colour_shares(images, np.zeros(len(images), int), 1)[0]


def test_shares_are_how_often_values_come(rendered):
    found = colour_shares(rendered, LABELS, len(CLASSES) + 1)
    values = rendered[LABELS == 2][..., 1].ravel()
    np.testing.assert_allclose(found[2, 1], np.bincount(values, minlength=256) / len(values), atol=1e-7)
    assert (found[-1] == 0).all()
    np.testing.assert_allclose(found[:-1].sum(-1), 1, rtol=1e-5)


def test_a_map_is_a_gain_and_a_power_of_each_channel(rendered):
    found = ColourMap((1.2, 1.0, 3.0), (1.0, 1.0, 0.8))(rendered[:3])
    wide = rendered[:3].astype(float)
    np.testing.assert_allclose(found[..., 0], np.clip(1.2 * (wide[..., 0] + 2) - 2, 0, 255), atol=0.51)
    np.testing.assert_array_equal(found[..., 1], rendered[:3, ..., 1])
    np.testing.assert_allclose(found[..., 2], np.clip(3 * (wide[..., 2] + 2) ** 0.8 - 2, 0, 255), atol=0.51)


@pytest.mark.parametrize("gains", [(0.8, 0.9, 0.7), (1.0, 0.85, 1.15), (0.6, 0.6, 0.6)])
@pytest.mark.parametrize("gamma", [1.0, 0.8, 1.25])
def test_another_lamp_and_camera_are_undone(rendered, gains, gamma):
    shifted = np.clip(255 * (rendered / 255 * np.array(gains)) ** gamma, 0, 255).round().astype(np.uint8)
    found = match_colours(shares_of(shifted), shares_of(rendered))(shifted)
    cut = (shifted > 250).any(-1)  # what was cut off is not there
    apart = np.abs(shifted.astype(float) - rendered)[~cut].mean()
    assert np.abs(found.astype(float) - rendered)[~cut].mean() < max(0.25 * apart, 2.5)


def test_the_same_colours_stay_and_classes_keep_their_own(rendered):
    found = match_colours(shares_of(rendered), shares_of(rendered))
    np.testing.assert_array_equal(found(rendered), rendered)
    one = CLASSES.index("EOS") == LABELS
    training = colour_shares(rendered, LABELS, len(CLASSES))
    own = match_colours(shares_of(rendered[one]), training[CLASSES.index("EOS")])
    np.testing.assert_array_equal(own(rendered[one]), rendered[one])
    mixed = match_colours(shares_of(rendered[one]), training.mean(0))
    assert (mixed(rendered[one]) != rendered[one]).mean() > 0.2, "held against all classes it would be another stain"


def test_empty_images_tell_no_power():
    plain = shares_of(np.full((4, 16, 16, 3), 120, np.uint8))
    bright = shares_of(np.full((4, 16, 16, 3), 180, np.uint8))
    found = match_colours(plain, bright)
    assert found.powers == (1, 1, 1)
    assert found.tables[:, 120].tolist() == [180, 180, 180]
    noise = shares_of(noise_of(256).astype(np.uint8))
    nearly = np.full((4, 16, 16, 3), 120, np.uint8)
    nearly[:, :8] = 121
    assert match_colours(shares_of(nearly), noise).powers == (1, 1, 1)
    for level in (0, 5, 255):
        flat = match_colours(shares_of(np.full((2, 16, 16, 3), level, np.uint8)), noise)
        assert flat.powers == (1, 1, 1)
        assert flat.gains == (1, 1, 1) or 2 < level < 253, "what was cut off is not there"
    steep = shares_of((100 + noise_of(20)).astype(np.uint8))
    assert match_colours(steep, noise).powers == (2, 2, 2)


@pytest.fixture
def table(tmp_path, rendered):
    """24 cells of each of two laboratories, the second one's under another lamp and gamma."""
    rows = ["path,label,laboratory"]
    for i, image in enumerate(rendered[:48]):
        laboratory = "ours" if i % 2 else "theirs"
        if i % 2 == 0:
            image = (255 * (image / 255 * [0.9, 0.8, 0.85]) ** 1.2).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i // 2 % 2]},{laboratory}")
    (tmp_path / "cells.csv").write_text("\n".join(rows))
    return DataConfig(
        source="table", root=str(tmp_path / "cells.csv"), image_size=rendered.shape[1], cache_dir=str(tmp_path / "c")
    )


def test_laboratories_are_brought_to_the_colours_of_all(table, caplog):
    plain = load_dataset(table)
    with caplog.at_level("INFO"):
        found = load_dataset(dataclasses.replace(table, match_colours=True))
    assert "laboratory theirs: colours are changed: 128 becomes red" in caplog.text
    assert found.ids == plain.ids
    assert found.fingerprint != plain.fingerprint
    theirs = np.array([int(Path(name).stem) % 2 == 0 for name in plain.ids])
    medians = [
        [np.median(data.images[which], axis=(0, 1, 2)) for which in (theirs, ~theirs)] for data in (plain, found)
    ]
    before, after = (np.abs(a - b) for a, b in medians)
    assert (before > 15).all()
    assert (after < before / 2).all(), "they hold other cells"
    between = np.sort([medians[0][0], medians[0][1]], axis=0)
    assert (medians[1][0] > between[0]).all()
    assert (medians[1][0] < between[1]).all(), "between the two, which count alike"
    values = {}
    for a, b in zip(plain.images[theirs].reshape(-1, 3), found.images[theirs].reshape(-1, 3), strict=True):
        assert values.setdefault(int(a[0]), int(b[0])) == b[0], "one map for all of a laboratory's images"
    again = load_dataset(dataclasses.replace(table, match_colours=True))
    np.testing.assert_array_equal(again.images, found.images)
    elsewhere = load_elsewhere(dataclasses.replace(table, match_colours=True), ("a", "b"))
    np.testing.assert_array_equal(elsewhere.images, plain.images)


def test_without_laboratories_nothing_can_be_matched(table):
    text = Path(table.root).read_text()
    matched = dataclasses.replace(table, match_colours=True)
    Path(table.root).write_text(text.replace("theirs", ""))
    with pytest.raises(ValueError, match=r"24 of 48 images have no laboratory, the first '0\.png'"):
        load_dataset(matched)
    Path(table.root).write_text(text.replace("theirs", "ours"))
    with pytest.raises(
        ValueError, match="all images that can be read are of the laboratory 'ours'; expected two or mo"
    ):
        load_dataset(matched)
    Path(table.root).write_text(text)
    for i in range(0, 48, 2):
        (Path(table.root).parent / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="all images that can be read are of the laboratory 'ours'"):
        load_dataset(matched)
    with pytest.raises(ValueError, match=r"data\.match_colours.*expected False for rendered cells"):
        DataConfig(match_colours=True)


def test_laboratories_stay_with_their_images_where_some_cannot_be_read(table):
    whole = load_dataset(dataclasses.replace(table, match_colours=True))
    (Path(table.root).parent / "5.png").write_bytes(b"no image")
    found = load_dataset(dataclasses.replace(table, match_colours=True))
    assert len(found) == 47
    left = [i for i, name in enumerate(whole.ids) if name != "5.png"]
    difference = np.abs(found.images.astype(int) - whole.images[left])
    assert difference.max() < 12, "nearly the same maps, each on its own laboratory"


def test_laboratories_that_differ_by_a_gain_get_gains(rendered, caplog):
    """However many they are: the colours of all have no more contrast than those of each."""
    names = [f"lab{i % 4}" for i in range(280)]
    images = np.concatenate([rendered] * 4)
    gains = np.array([1, 0.9, 0.8, 0.7])[np.arange(280) % 4]
    images = (images * gains[:, None, None, None]).round().astype(np.uint8)
    labels = np.concatenate([LABELS] * 4)
    maps = colours_of_all(images, labels, names)
    powers = np.array([maps[f"lab{i}"].powers for i in range(4)])
    np.testing.assert_allclose(powers, 1, atol=0.06)
    gained = [one.tables[1, 128] for one in maps.values()]
    assert gained == sorted(gained)
    assert "would need another class" not in caplog.text
    colours_of_all(images, np.arange(280) % 2, ["a" if i % 2 and i % 4 else "b" for i in range(280)])
    assert "% of its images would need another class" in caplog.text
    colours_of_all(images[:40], labels[:40], ["a"] * 10 + ["b"] * 30)
    assert "laboratory a has 10 images; fewer than 30" in caplog.text


def noise_of(levels):
    return np.random.default_rng(0).integers(0, levels, (4, 16, 16, 3))
