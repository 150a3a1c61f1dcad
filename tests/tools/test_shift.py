"""Shifts do what they say, and a row is what scikit-learn makes of the predictions."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

import bmjax
from bmjax.analysis.evaluate.judge import Judge, Target, target_of_path
from bmjax.analysis.evaluate.reference import make_reference, write_reference
from bmjax.config import Config, DataConfig, ModelConfig, TrainConfig
from bmjax.data.sources.synthetic import CLASSES, render
from bmjax.data.splits import Splits
from bmjax.runs.folder import Run
from bmjax.training.predict import unlabelled
from tools import shift


@pytest.fixture(scope="module")
def images():
    return np.stack([render(CLASSES[i % 7], 32, 0, i) for i in range(14)])


def test_each_shift_by_its_own_means(images):
    np.testing.assert_array_equal(shift.shifted(images, "scale", 1.0), images)
    crop = np.asarray(Image.fromarray(images[0][8:24, 8:24]).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(shift.shifted(images, "scale", 2.0)[0].astype(int)[4:-4, 4:-4] - crop[4:-4, 4:-4]).mean() < 1
    blurred = gaussian_filter(images[3].astype(float), (0.64, 0.64, 0), mode="mirror")
    np.testing.assert_allclose(shift.shifted(images, "defocus", 0.02)[3], blurred, atol=1)
    np.testing.assert_allclose(shift.shifted(images, "brightness", 0.7)[5], images[5] * 0.7, atol=0.51)
    np.testing.assert_allclose(shift.shifted(images, "stain", 0.0), images, atol=1)
    for kind, strengths in shift.SHIFTS.items():
        # The farther from nothing the stronger.
        if kind == "laboratory":
            continue
        nothing = {"scale": 1, "brightness": 1, "gamma": 1, "saturation": 1, "jpeg": 100}.get(kind, 0)
        order = sorted(strengths, key=lambda s: abs(s - nothing))
        near, far = (
            np.abs(shift.shifted(images, kind, s) - images.astype(float)).mean() for s in (order[0], order[-1])
        )
        assert near < far, kind
        assert set(shift.middle(kind)) < set(strengths)
    lit = np.clip(images[2] * [1.1, 1, 0.9], 0, 255)
    np.testing.assert_allclose(shift.shifted(images, "balance", 0.1)[2], lit, atol=0.51)
    np.testing.assert_allclose(shift.shifted(images, "gamma", 1.4)[2], 255 * (images[2] / 255) ** 1.4, atol=0.51)
    grey = shift.shifted(images, "saturation", 0.0)
    assert np.ptp(grey.astype(int), axis=-1).max() == 0
    with pytest.raises(ValueError, match="expected one of stain, scale"):
        shift.shifted(images, "noise", 1)


def test_laboratories_are_all_kinds_at_once_to_either_side(images):
    assert shift.middle("laboratory") == ()
    one, other = shift.Laboratory.drawn(3), shift.Laboratory.drawn(4)
    assert one == shift.Laboratory.drawn(3)
    assert one.scale * other.scale == pytest.approx(1)
    assert one.gamma * other.gamma == pytest.approx(1)
    assert one.stain == -other.stain
    assert one.saturation * other.saturation == pytest.approx(1)
    assert np.multiply(one.gains, other.gains).tolist() == pytest.approx([1, 1, 1])
    assert one.jpeg + other.jpeg == pytest.approx(135, abs=1)
    assert one.defocus + other.defocus == pytest.approx(0.012)
    found = shift.shifted(images, "laboratory", 3)
    assert found.shape == images.shape
    assert found.dtype == np.uint8
    # Nothing by nothing: what is left is a JPEG of the best quality.
    none = shift.Laboratory(0, 1, (1.0, 1.0, 1.0), 0, 1, 1, 100)
    assert np.abs(none.images(images).astype(int) - images).mean() < 3
    drawn = [shift.Laboratory.drawn(number) for number in range(1, 401)]
    assert 0.66 < min(d.scale for d in drawn) < 0.7
    assert all(0.6 < gain < 1.45 for d in drawn for gain in d.gains)
    assert {d.jpeg for d in drawn} <= set(range(40, 96))


def test_rows_by_kind_and_strength(images, monkeypatch, tmp_path):
    monkeypatch.setattr(shift, "SHIFTS", {"brightness": (0.5, 0.85, 1.3)})
    model = ModelConfig(backbone="densenet_tiny", weights=None)
    config = Config(data=DataConfig(image_size=32), model=model, train=TrainConfig(devices=1))
    network = bmjax.create(config.model, 7)
    run = Run(tmp_path, config, network, bmjax.init(network, jax.random.key(0), 32), CLASSES, 0)
    labels = np.arange(14) % 7
    target = Target(((unlabelled(images, CLASSES), np.arange(14)),), labels, tuple(map(str, range(14))))
    rows = list(shift.measure(Judge([run]), target, adapt=True, out=tmp_path / "copies"))
    assert [(row.kind, row.strength) for row in rows] == [("none", 0), *(("brightness", s) for s in (0.5, 0.85, 1.3))]
    assert rows[0].kept in (0, 1)
    assert "**0.85**" in shift.line(rows[2])
    assert len(list((tmp_path / "copies/brightness 0.5").rglob("*.png"))) == 14
    dark = np.asarray(Image.open(tmp_path / f"copies/brightness 0.5/{CLASSES[0]}/000000.png"))
    np.testing.assert_array_equal(dark, shift.shifted(images[:1], "brightness", 0.5)[0])
    write_reference(tmp_path, make_reference(target.parts[0][0], Splits(np.arange(14), *[np.zeros(0, int)] * 2)))
    judge = Judge([run])
    matched = list(shift.measure(judge, target, match=True))
    assert matched[2].nll == pytest.approx(matched[0].nll, rel=0.05), "another brightness is undone"
    last = judge.readers[0].colours
    assert last is not None
    assert last.tables[0, 128] < 115, "of this shift, not of the first"
    plain = list(shift.measure(Judge([run]), target))
    assert abs(plain[2].nll - plain[0].nll) > abs(matched[2].nll - plain[0].nll)
    assert plain[0].accuracy == pytest.approx((bmjax.predict_probs(run, images).argmax(1) == labels).mean())
    assert plain[1].nll != rows[1].nll, "adapted norms say otherwise"


@pytest.mark.parametrize("field", [0.0, 40.0])
def test_copies_are_read_back_as_they_are(images, field, monkeypatch, tmp_path):
    """By the table beside them, whatever scale the run knows."""
    monkeypatch.setattr(shift, "SHIFTS", {"brightness": (0.5, 0.85, 1.3)})
    model = ModelConfig(backbone="densenet_tiny", weights=None)
    data = DataConfig(image_size=32, field_size=field, pixel_size=0.1 if field else 0.0, cache_dir=str(tmp_path / "c"))
    config = Config(data=data, model=model, train=TrainConfig(devices=1))
    network = bmjax.create(config.model, 7)
    run = Run(tmp_path, config, network, bmjax.init(network, jax.random.key(0), 32), CLASSES, 0)
    target = Target(((unlabelled(images, CLASSES), np.arange(14)),), np.arange(14) % 7, tuple(map(str, range(14))))
    list(shift.measure(Judge([run]), target, out=tmp_path / "copies"))
    back, _ = target_of_path([run], str(tmp_path / "copies/brightness 0.5/cells.csv"), "table")
    assert len(back) == 14
    read = back.parts[0][0].images[back.parts[0][1]]
    order = np.argsort([int(Path(name).stem) for name in back.ids])
    np.testing.assert_array_equal(read[order], shift.shifted(images, "brightness", 0.5))


def test_unequal_classes_and_their_frequencies_found(monkeypatch, tmp_path):
    """Of a run that knows its classes but for doubt between two, frequencies found again help where these differ."""
    labels = np.repeat(np.arange(3), 100)
    rng = np.random.default_rng(0)
    probs = np.eye(3, dtype=np.float32)[labels] * 0.9 + 0.1 / 3
    doubtful = rng.random(300) < 0.5
    probs[doubtful] = np.where(labels[doubtful, None] == 2, [[0.05, 0.05, 0.9]], [[0.475, 0.475, 0.05]])
    probs[doubtful, :2] += rng.normal(0, 0.02, (doubtful.sum(), 1)) * [1, -1]
    # The images hold their own rows' numbers, so that the stand-in below knows what to say of them.
    images = np.zeros((300, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(300), 256)
    target = Target(((unlabelled(images, CLASSES[:3]), np.arange(300)),), labels, tuple(map(str, range(300))))
    thin = shift.unequal(target, 10.0, CLASSES[:3])
    assert np.bincount(thin.labels).tolist() == [100, 31, 10]
    assert [int(i) for i in thin.ids] == thin.parts[0][1].tolist()
    assert shift.unequal(target, 1.0, CLASSES[:3]).ids == target.ids
    with pytest.raises(ValueError, match="--unequal is 0; expected a number > 0"):
        shift.unequal(target, 0, CLASSES[:3])
    with pytest.raises(ValueError, match=f"no image of {CLASSES[3]} in the split"):
        shift.unequal(target, 10.0, CLASSES[:4])

    class Known:
        readers, classes = (), CLASSES[:3]

        def images(self, parts):
            rows = parts[0][:, 0, 0, 0].astype(int) * 256 + parts[0][:, 0, 0, 1]
            return SimpleNamespace(probs=probs[rows])

        def validation(self):
            return SimpleNamespace(probs=probs)

    (plain,) = shift.measure(Known(), thin, ())
    (found,) = shift.measure(Known(), thin, (), adapt_prior=True)
    assert found.accuracy > plain.accuracy + 0.05
    assert found.nll < plain.nll
