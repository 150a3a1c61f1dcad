"""Batch-norm's statistics recomputed by one pass: the right values, by each engine, on any number of devices."""

import dataclasses

import jax
import numpy as np
import pytest

import bmjax
from bmjax.config import DataConfig, FeaturesConfig, HeadConfig, OptimConfig, StageConfig
from bmjax.config.data import AugmentConfig
from bmjax.config.training import BatchNormConfig
from bmjax.training.run import _plan, complete, prepare
from bmjax.training.signals import Signals
from bmjax.training.stages import StagePlan
from bmjax.training.statistics import ENOUGH, recomputed, recomputes, with_statistics


def changed(config, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def plan(start, end, *modes):
    return StagePlan(start, end, BatchNormConfig(*modes), lambda path: True, None)


STATS = {"backbone": {"bn": {}}, "head": {"bn": {}}}


@pytest.mark.parametrize(
    ("plans", "due"),
    [
        ([plan(0, ENOUGH - 1, "train", "train", "train")], True),
        ([plan(0, ENOUGH, "train", "train", "train")], False),
        ([plan(0, 500, "frozen", "train", "train"), plan(500, 600, "train", "train", "train")], True),
        ([plan(0, 500, "frozen", "train", "train"), plan(500, 600, "stats_frozen", "train", "train")], False),
        ([plan(0, 5, "frozen", "train", "frozen")], False),  # attention has no norm here
        ([plan(0, 5, "frozen", "frozen", "stats_frozen")], False),
    ],
)
def test_auto_is_by_the_steps_of_each_part(tiny_config, plans, due):
    assert recomputes(changed(tiny_config, recompute_statistics="auto").train, plans, STATS) is due
    assert recomputes(changed(tiny_config, recompute_statistics="always").train, plans, STATS)
    assert not recomputes(changed(tiny_config, recompute_statistics="never").train, plans, STATS)


def test_moments_of_all_images_are_those_of_their_batches():
    x = np.random.default_rng(0).normal(3, 2, (4, 2, 8, 5)).astype(np.float32)  # batches, micro-batches, images, c
    each = [{"head": {"bn": {"mean": b.mean(1), "var": b.var(1), "other": b.max(1)}}} for b in x]
    old = {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32), "other": np.ones(5, np.float32)}
    stats = {"backbone": {"bn": dict(old)}, "head": {"bn": dict(old)}}
    found = recomputed(stats, each, BatchNormConfig("frozen", "frozen", "train"))
    np.testing.assert_allclose(found["head"]["bn"]["mean"], x.reshape(-1, 5).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["head"]["bn"]["var"], x.reshape(-1, 5).var(0), rtol=1e-5)
    assert found["head"]["bn"]["other"] is old["other"]
    assert all(found["backbone"]["bn"][name] is old[name] for name in old)


def engine_of(config, tmp_path):
    config = complete(config)
    with Signals() as signals:
        prepared = prepare(config) if config.features.cached else None
        made = _plan(config, tmp_path / "run", None, prepared, signals)
    return made.engine, jax.tree.map(np.asarray, made.start(False))


@pytest.fixture
def small(tiny_config, tmp_path):
    """No augmentation, one stage that trains attention and head, so that both engines see the same."""
    data = DataConfig(image_size=32, synthetic_per_class=8, stratify=True, cache_dir=str(tmp_path / "cache"))
    augment = AugmentConfig(flip=False, right_angles=False)
    stages = (StageConfig(epochs=2, train=("attention", "head")),)
    return dataclasses.replace(tiny_config, data=data, augment=augment, stages=stages)


def measured(config, tmp_path, modes=None):
    engine, state = engine_of(config, tmp_path)
    modes = modes or engine.plans[0].batch_norm
    return with_statistics(state, modes, lambda v: engine.statistics(v, 0)), state, engine


def test_each_engine_and_any_number_of_devices_agree(small, tmp_path):
    whole = changed(dataclasses.replace(small, stages=(StageConfig(epochs=2),)), accumulate=2)
    settings = [{"devices": 1}, {"devices": 4}, {"devices": 2, "parallel": "pmap"}]
    first, *others = (measured(changed(whole, **setting), tmp_path)[0].batch_stats for setting in settings)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), first, other)
    image = measured(changed(small, accumulate=2, devices=1), tmp_path)[0].batch_stats
    cached = dataclasses.replace(small, features=FeaturesConfig(cached=True))
    maps = measured(changed(cached, accumulate=2), tmp_path)[0].batch_stats
    for part in ("attention", "head"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), image[part], maps[part])


def test_the_heads_norm_gets_the_moments_of_the_features(small, tmp_path):
    """By NumPy: the head's first norm stands on the pooled features, without dropout, of every training image."""
    small = changed(dataclasses.replace(small, model=dataclasses.replace(small.model, attention="none")), devices=1)
    state, before, engine = measured(small, tmp_path)
    rows = np.concatenate([engine._batches.batch(k)["index"] for k in range(engine.per_epoch)])
    variables = {"params": before.params, "batch_stats": before.batch_stats}
    features = engine._model.apply(variables, engine._dataset.images[rows], method="features")
    (name,) = (name for name in state.batch_stats["head"])
    np.testing.assert_allclose(state.batch_stats["head"][name]["mean"], np.mean(features, 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.batch_stats["head"][name]["var"], np.var(features, 0), rtol=1e-4, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats["backbone"], before.batch_stats["backbone"])


def test_the_moving_average_gets_statistics_of_its_own_parameters(small, tmp_path):
    state, before, engine = measured(dataclasses.replace(small, stages=(StageConfig(epochs=2),)), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state.ema["batch_stats"], state.batch_stats)
    jax.tree.map(np.testing.assert_array_equal, state.ema["params"], before.ema["params"])
    moved = before.replace(ema={**before.ema, "params": jax.tree.map(lambda x: 2 * x, before.ema["params"])})
    other = with_statistics(moved, engine.plans[0].batch_norm, lambda v: engine.statistics(v, 0))
    jax.tree.map(np.testing.assert_array_equal, other.batch_stats, state.batch_stats)
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), other.ema["batch_stats"], state.ema["batch_stats"])
    assert any(jax.tree.leaves(differ))


@pytest.mark.slow
def test_few_steps_evaluate_as_well_as_they_train(small):
    """28 steps: by the lagging statistics nearly every cell is of one class; by the recomputed ones it is not."""
    small = dataclasses.replace(
        changed(small, ema_decay=None, accumulate=1, devices=1),
        data=dataclasses.replace(small.data, synthetic_per_class=20, stratify=False),
        model=dataclasses.replace(small.model, attention="none", head=HeadConfig(widths=(16,), dropout=0.0)),
        optim=OptimConfig(name="adam", lr=0.01),
        stages=(StageConfig(epochs=4),),
    )
    accuracy = {}
    for setting in ("auto", "never"):
        config = changed(dataclasses.replace(small, run_dir=f"{small.run_dir}-{setting}"), recompute_statistics=setting)
        accuracy[setting] = bmjax.train(config).metrics["train"]["accuracy"]
    assert accuracy["auto"] > accuracy["never"] + 0.1, accuracy
