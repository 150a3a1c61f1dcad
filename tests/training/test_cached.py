"""Training on cached feature maps gives what training end to end on a frozen backbone gives."""

import dataclasses
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bmjax
from bmjax.config import AugmentConfig, FeaturesConfig, ModelConfig, OptimConfig, ScheduleConfig, StageConfig
from bmjax.data.load import load_dataset
from bmjax.data.splits import split_dataset
from bmjax.model.classifier import pools_first
from bmjax.model.create import create
from bmjax.runs.folder import load_run, new_variables
from bmjax.runs.state import create_state
from bmjax.training.features import FeatureMaps, tree_digest
from bmjax.training.predict import evaluate
from bmjax.training.run import prepare, train, train_run

OFF = AugmentConfig(flip=False, right_angles=False)
FROZEN = (StageConfig(epochs=2, train=("attention", "head")), StageConfig(epochs=1, train=("head",), lr_scale=0.3))


@pytest.fixture
def frozen_config(quick_config):
    """A frozen backbone of two convolutions, attention and head, in micro-batches, end to end on one device."""
    train = dataclasses.replace(quick_config.train, accumulate=2, final_test=True)
    model = dataclasses.replace(quick_config.model, attention="cbam")
    return dataclasses.replace(quick_config, model=model, stages=FROZEN, train=train)


def cached(config, tmp_path, name="cached", **features):
    return dataclasses.replace(config, run_dir=str(tmp_path / name), features=FeaturesConfig(cached=True, **features))


def records(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.slow
def test_float64_runs_agree_with_end_to_end(frozen_config, tmp_path):
    config = dataclasses.replace(frozen_config, train=dataclasses.replace(frozen_config.train, dtype="float64"))
    with jax.enable_x64(True):
        ends = bmjax.train(config)
        ours = bmjax.train(cached(config, tmp_path))
        whole, tail = load_run(ends.run_dir), load_run(ours.run_dir)
    assert whole.step == tail.step
    assert tail.variables["params"]["head"]["logits"]["kernel"].dtype == np.float64
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), whole.variables, tail.variables)
    assert max(jax.tree.leaves(differences)) < 1e-9
    steps, ours_steps = records(ends.run_dir, "train"), records(ours.run_dir, "train")
    assert [r["step"] for r in ours_steps] == list(range(1, ends.steps + 1))
    for name in ("loss", "accuracy", "grad_norm", "lr"):
        np.testing.assert_allclose([r[name] for r in ours_steps], [r[name] for r in steps], rtol=1e-9, err_msg=name)
    for split in ("train", "val", "test"):
        assert ours.metrics[split]["confusion"] == ends.metrics[split]["confusion"]
        assert ours.metrics[split]["loss"] == pytest.approx(ends.metrics[split]["loss"], abs=1e-6)
    assert len((ours.run_dir / "openings.jsonl").read_text().splitlines()) == 1


def test_a_cached_run_is_a_run(frozen_config, tmp_path, monkeypatch):
    opened = []
    maps = FeatureMaps.maps
    monkeypatch.setattr(
        FeatureMaps, "maps", lambda self, rows, view=None: opened.append(rows) or maps(self, rows, view)
    )
    config = cached(dataclasses.replace(frozen_config, stages=FROZEN[:1]), tmp_path)
    result = bmjax.train(config)
    splits = result.data[1]
    assert {tuple(rows) for rows in opened[:-1]} == {tuple(splits.train), tuple(splits.val)}
    np.testing.assert_array_equal(opened[-1], splits.test, err_msg="the test split comes last, once")
    # The whole network, read from the folder, gives from the images what the maps gave.
    again = evaluate(result.run_dir, "val", data=result.data)
    assert again["accuracy"] == result.metrics["val"]["accuracy"]
    assert again["loss"] == pytest.approx(result.metrics["val"]["loss"], abs=1e-5)
    with pytest.raises(FileExistsError, match="holds a run already"):
        bmjax.train(config)
    # A finished run stays as it is; one that was cut off before its results were written ends the same.
    record = (result.run_dir / "metrics.jsonl").read_bytes()
    (result.run_dir / "lock").write_text("of a process that was killed as it ended")
    assert bmjax.train(config, resume=True).metrics == json.loads((result.run_dir / "results.json").read_text())
    assert not (result.run_dir / "lock").exists()
    assert (result.run_dir / "metrics.jsonl").read_bytes() == record
    probs = np.load(result.run_dir / "predictions_test.npz")["probs"]
    (result.run_dir / "results.json").unlink()
    bmjax.train(config, resume=True)
    np.testing.assert_array_equal(np.load(result.run_dir / "predictions_test.npz")["probs"], probs)
    assert len(records(result.run_dir, "epoch")) == 2


def test_views_are_augmented_images_and_shared_by_seeds(frozen_config, tmp_path):
    augment = AugmentConfig(brightness=0.1)
    config = cached(dataclasses.replace(frozen_config, augment=augment), tmp_path, views=3)
    dataset = load_dataset(config.data)
    rows = split_dataset(dataset, config.data).train[:5]
    maps = FeatureMaps(config, dataset)
    views = np.asarray(maps.views_on_device(rows)).reshape(3, 5, *maps.shape)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(views[a] - views[b]).max((1, 2, 3)).min() > 1e-3, "each view of each image differs"
    # An image's view depends on image, view and seed, not on what else is computed with it.
    np.testing.assert_allclose(maps.maps(rows[3:4], 1)[0], views[1, 3], atol=1e-5)
    prints = {maps.fingerprint(rows), *(maps.fingerprint(rows, v) for v in range(3)), maps.fingerprint(rows[:4])}
    for change in ({"features": FeaturesConfig(True, 3, seed=1)}, {"augment": AugmentConfig(hue=0.1)}):
        prints.add(FeatureMaps(dataclasses.replace(config, **change), dataset).fingerprint(rows, 0))
    # These have random weights, so another seed is another backbone.
    prints.add(FeatureMaps(dataclasses.replace(config, seed=1), dataset).fingerprint(rows))
    raw = dataclasses.replace(config.model, preprocess="raw")
    prints.add(FeatureMaps(dataclasses.replace(config, model=raw), dataset).fingerprint(rows))
    assert len(prints) == 9, "everything that decides a map is in its fingerprint"
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="se"), name="other")
    assert FeatureMaps(other, dataset).fingerprint(rows, 2) == maps.fingerprint(rows, 2)


def test_maps_survive_kills_and_damage(frozen_config, tmp_path, monkeypatch, caplog):
    config = cached(frozen_config, tmp_path)
    dataset = load_dataset(config.data)
    rows, maps = np.arange(20), FeatureMaps(config, dataset)
    fill = FeatureMaps._fill

    def killed(self, out, rows, view):
        fill(self, out, rows, view)
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureMaps, "_fill", killed)
    with pytest.raises(KeyboardInterrupt):
        maps.maps(rows)
    folder = tmp_path / "cache/features"
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(FeatureMaps, "_fill", fill)
    (folder / ".leftover.x").touch()
    os.utime(folder / ".leftover.x", (time.time() - 2 * 86400,) * 2)
    first = np.array(maps.maps(rows))
    assert first.shape == (20, *maps.shape)
    (path,) = folder.iterdir()
    monkeypatch.setattr(FeatureMaps, "_fill", killed)
    np.testing.assert_array_equal(maps.maps(rows), first)
    monkeypatch.setattr(FeatureMaps, "_fill", fill)
    for damage in (path.read_bytes()[:-8], b"", b"x" * 300):
        path.write_bytes(damage)
        np.testing.assert_array_equal(maps.maps(rows), first)
        assert "damaged" in caplog.text
    np.save(path, first[:3])
    np.testing.assert_array_equal(maps.maps(rows), first)


def test_digest_sees_every_number_name_and_shape():
    tree = {"a": {"b": np.zeros((2, 3), np.float32)}}
    others = [
        {"a": {"b": np.full((2, 3), 1e-30, np.float32)}},
        {"a": {"c": np.zeros((2, 3), np.float32)}},
        {"a": {"b": np.zeros((3, 2), np.float32)}},
        {"a": {"b": np.zeros((2, 3), np.int32)}},
    ]
    assert len({tree_digest(t) for t in [tree, *others]}) == 5
    assert tree_digest(tree) == tree_digest({"a": {"b": jnp.zeros((2, 3))}})


def test_attention_and_head_start_as_end_to_end(frozen_config, tmp_path):
    config = dataclasses.replace(cached(frozen_config, tmp_path), seed=5)
    prepared = prepare(config)
    tail, whole = prepared.programs.init(5), new_variables(config, prepared.programs.model)
    for name, tree in tail.items():
        for part, leaves in tree.items():
            jax.tree.map(np.testing.assert_array_equal, leaves, whole[name][part])
    assert tail["params"].keys() == {"attention", "head"}


@pytest.mark.parametrize("attention", [pytest.param("none", marks=pytest.mark.slow), "ese+eca"])
def test_maps_pooled_before_attention_train_the_same(frozen_config, tmp_path, monkeypatch, attention):
    """Where attention only weighs channels by their means: every step's loss, and every probability."""
    model = dataclasses.replace(frozen_config.model, attention=attention, attention_gate=True)
    config = dataclasses.replace(cached(frozen_config, tmp_path, "pooled"), model=model)
    prepared = prepare(config)
    assert prepared.programs.pooled
    assert prepared.features.on_device(prepared.splits.val, True).shape[1:3] == (1, 1)
    ours = train_run(config, prepared=prepared)
    monkeypatch.setattr("bmjax.training.cached.pools_first", lambda model: False)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "whole"))
    whole = train(config)
    for name in ("loss", "grad_norm"):
        one, other = ([r[name] for r in records(run.run_dir, "train")] for run in (ours, whole))
        np.testing.assert_allclose(one, other, rtol=1e-4)
    probs = [np.load(run.run_dir / "predictions_val.npz")["probs"] for run in (ours, whole)]
    np.testing.assert_allclose(*probs, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention": "eca"}, True),
        ({"attention": "gather_excite"}, True),
        ({"attention": "gather_excite", "attention_options": {"extent": 2}}, False),
        ({"attention": "se+simam"}, False),
        ({"attention": "cbam"}, False),
        ({"attention": "se", "attach": ("conv3", "last")}, False),
    ],
)
def test_which_models_pool_first(changes, expected):
    config = ModelConfig("densenet_tiny", None, **changes)
    assert pools_first(create(config, 3)) == expected
    assert not pools_first(create(config, 3, "bfloat16"))


class PlainConvolution(nn.Module):
    """An attention variant with Flax's own convolution."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return x * nn.sigmoid(nn.Conv(1, (1, 1))(x))


def test_an_epoch_step_by_step_is_the_same(frozen_config, tmp_path):
    """What a variant with a convolution that loops slow down gets on CPUs."""
    model = dataclasses.replace(frozen_config.model, attention=f"{__name__}:PlainConvolution")
    prepared = prepare(dataclasses.replace(cached(frozen_config, tmp_path), model=model))
    programs, plan = prepared.programs, prepared.programs.plans[0]
    maps = prepared.features.on_device(prepared.splits.train)
    labels = jnp.asarray(prepared.dataset.labels[prepared.splits.train])
    places = np.arange(32, dtype=np.int32).reshape(2, 16)
    state = create_state(programs.init(0), plan.optimizer.tx, plan.is_trainable, seed=0, ema=True)
    end, metrics = programs.epoch(0)(state, maps, labels, places)
    assert programs.scans == {0: False}
    assert metrics["loss"].shape == (2,)
    programs.scans[0] = True
    other, _ = programs.epoch(0)(state, maps, labels, places)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), end.params, other.params)
    assert int(end.step) == int(other.step) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (StageConfig(),)}, r"'stages\.0\.train' is \('backbone', 'attention', 'head'\)"),
        ({"augment": AugmentConfig()}, r"'features\.views' 0 training sees images as they are"),
        ({"features": FeaturesConfig(True, views=2)}, r"'features\.views' is 2; expected 0"),
        ({"model": ModelConfig("densenet_tiny", None, attach=("conv3",))}, r"'model\.attach' is \('conv3',\)"),
        ({"augment": AugmentConfig(mixup=0.2), "features": FeaturesConfig(True, views=2)}, r"'augment\.mixup' is 0\.2"),
    ],
)
def test_what_does_not_fit_cached_features_is_said(frozen_config, tmp_path, changes, message):
    config = dataclasses.replace(cached(frozen_config, tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        bmjax.train(config)
    assert not (tmp_path / "cached").exists()


def test_rates_of_many_steps_are_those_of_each():
    from bmjax.training.optim import make_optimizer

    for kind in ("constant", "cosine", "step"):
        config = OptimConfig(name="sgd", schedule=ScheduleConfig(kind=kind, warmup_epochs=0.5, step_epochs=1))
        optimizer = make_optimizer(config, total_steps=12, steps_per_epoch=4)
        state = optimizer.tx.init({"w": jnp.ones((2, 2))})
        steps = np.arange(12)
        one = [optimizer.peak_lr * float(optimizer.multiplier(k)) for k in range(12)]
        np.testing.assert_allclose(optimizer.rates_at(state)(steps), one, rtol=1e-6)
