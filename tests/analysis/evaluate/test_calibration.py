"""Calibration finds the temperature that was put in, and is kept with the run."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn import metrics as sk

from bmjax.analysis.evaluate.calibration import (
    FILE,
    Calibration,
    cross_fitted,
    figures,
    fit,
    read_calibration,
    write_calibration,
)


def log_loss(labels, probs):
    wide = probs.astype(np.float64)
    return sk.log_loss(labels, wide / wide.sum(1, keepdims=True))


def draw(n, k=4, temperature=1.0, shift=0.0, seed=0):
    """Labels drawn from their own probabilities, and probabilities that say so at another temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * 2
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = (rng.random((n, 1)) > probs.cumsum(-1)[:, :-1]).sum(1)
    said = np.exp(logits / temperature + shift * np.arange(k))
    return labels, (said / said.sum(-1, keepdims=True)).astype(np.float32), probs


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_is_found(temperature):
    labels, said, true = draw(8000, temperature=temperature)
    found = fit(labels, said, "temperature", step=7)
    assert 1 / found.temperature == pytest.approx(temperature, rel=0.05)
    np.testing.assert_allclose(found(said), true, atol=0.02)
    assert found(said).argmax(-1).tolist() == said.argmax(-1).tolist(), "a temperature changes no answer"


def test_a_vector_finds_shifts_too():
    labels, said, true = draw(20_000, temperature=0.5, shift=0.7)
    by_temperature, by_vector = (fit(labels, said, method)(said) for method in ("temperature", "vector"))
    np.testing.assert_allclose(by_vector, true, atol=0.04)
    assert log_loss(labels, by_vector) < log_loss(labels, by_temperature) - 0.02
    identity = fit(*draw(20_000)[:2], "vector")
    np.testing.assert_allclose(identity.scale, 1, atol=0.06)


def test_figures_fall_where_the_network_was_too_sure():
    labels, said, _ = draw(1000, temperature=0.3)
    before, after = figures(labels, said), figures(labels, cross_fitted(labels, said, "temperature"))
    assert all(after[name] < before[name] for name in before)
    assert before["nll"] == pytest.approx(log_loss(labels, said), abs=1e-5)


def test_probabilities_of_zero_do_no_harm():
    probs = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    for method in ("temperature", "vector"):
        found = fit(np.array([0, 1, 2, 0, 1, 1]), probs, method)(probs)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="expected at least 3"):
        fit(np.array([0]), probs[:1], "vector")


def test_a_split_without_errors_does_not_make_every_probability_1():
    labels = np.arange(90) % 3
    said = (0.2 + 0.4 * np.eye(3, dtype=np.float32))[labels]
    found = fit(labels, said, "temperature")
    assert 0.1 < found.temperature < 1
    with pytest.raises(ValueError, match="expected at least 7"):
        cross_fitted(np.arange(8) % 7, np.full((8, 7), 1 / 7), "temperature")


def test_it_is_kept_with_the_run_and_believed_only_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match="bmjax eval RUN --calibrate"):
        read_calibration(tmp_path, 2, 5)
    kept = Calibration("vector", (0.5, 0.6), (0.0, 0.1), 40, 5)
    write_calibration(tmp_path, kept)
    assert read_calibration(tmp_path, 2, 5) == kept
    with pytest.raises(ValueError, match="is of step 5; expected 6"):
        read_calibration(tmp_path, 2, 6)
    with pytest.raises(FileNotFoundError, match=r"calibration-views8.json is not there; .*--views 8"):
        read_calibration(tmp_path, 2, 5, views=8)
    in_views = dataclasses.replace(kept, views=8, n=41)
    write_calibration(tmp_path, in_views)
    assert read_calibration(tmp_path, 2, 5, views=8) == in_views
    assert read_calibration(tmp_path, 2, 5) == kept, "each number of views has its own"
    whole = json.loads((tmp_path / FILE).read_text())
    for name, value in (
        ("method", "x"), ("scale", [1]), ("scale", [-1, 1]), ("scale", [0, 1]), ("scale", [True, 1]),
        ("shift", [1, None]), ("n", "4"), ("n", True), ("step", None),
    ):  # fmt: skip
        (tmp_path / FILE).write_text(json.dumps(whole | {name: value}))
        with pytest.raises(ValueError, match=f"{FILE} is damaged: {name}"):
            read_calibration(tmp_path, 2, 5)
