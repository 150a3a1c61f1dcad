"""Every optimizer equals Keras's, goes downhill, and obeys schedule, decay, clipping and depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import OptimConfig, ScheduleConfig
from bmjax.training import optim

NAMES = sorted(optim.PRESETS)


def build(config, *, total_steps=50, steps_per_epoch=10, **arguments):
    return optim.make_optimizer(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch, **arguments)


def run(optimizer, params, gradients):
    state = optimizer.tx.init(params)
    for g in gradients:
        updates, state = optimizer.tx.update(g, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def keras_optimizer(name, numbers):
    import keras

    classes = {"adagrad": "Adagrad", "adadelta": "Adadelta", "adamax": "Adamax", "rmsprop": "RMSprop", "sgd": "SGD"}
    arguments = {"learning_rate": numbers["lr"]}
    if name in ("sgd", "rmsprop"):
        arguments["momentum"] = numbers.get("momentum", 0.0)
    if name == "sgd":
        arguments["nesterov"] = numbers.get("nesterov", False)
    return getattr(keras.optimizers, classes.get(name, "Adam"))(**arguments)


@pytest.mark.parametrize("preset", ["keras", "tuned"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_keras_over_fifty_steps(name, preset):
    import keras

    rng = np.random.default_rng(0)
    start = rng.standard_normal((5, 3)).astype(np.float32)
    gradients = [rng.standard_normal((5, 3)).astype(np.float32) for _ in range(50)]
    ours, _ = run(
        build(OptimConfig(name=name, preset=preset)), {"w": jnp.asarray(start)}, [{"w": g} for g in gradients]
    )
    with jax.numpy_rank_promotion("allow"):
        theirs = keras_optimizer(name, optim.PRESETS[name][preset])
        variable = keras.Variable(start)
        theirs.build([variable])
        for g in gradients:
            theirs.apply([jnp.asarray(g)], [variable])
    assert np.abs(np.asarray(variable) - start).max() > 1e-5, "Keras did not move"
    np.testing.assert_allclose(ours["w"], np.asarray(variable), rtol=1e-5, atol=2e-6)


def test_rmsprop_and_sgd_with_momentum_equal_keras():
    import keras

    rng = np.random.default_rng(1)
    start = rng.standard_normal(7).astype(np.float32)
    gradients = [rng.standard_normal(7).astype(np.float32) for _ in range(50)]
    for name, nesterov in (("rmsprop", None), ("sgd", False), ("sgd", True)):
        config = OptimConfig(name=name, preset="keras", momentum=0.8, nesterov=nesterov)
        ours, _ = run(build(config), {"w": jnp.asarray(start)}, [{"w": g} for g in gradients])
        numbers = {"lr": optim.PRESETS[name]["keras"]["lr"], "momentum": 0.8, "nesterov": bool(nesterov)}
        with jax.numpy_rank_promotion("allow"):
            theirs = keras_optimizer(name, numbers)
            variable = keras.Variable(start)
            theirs.build([variable])
            for g in gradients:
                theirs.apply([jnp.asarray(g)], [variable])
        np.testing.assert_allclose(ours["w"], np.asarray(variable), rtol=1e-5, atol=2e-6, err_msg=f"{name} {nesterov}")


SCHEDULES = {
    "cosine": ScheduleConfig(kind="cosine", final=0.1),
    "step": ScheduleConfig(kind="step", step_epochs=5, factor=0.3),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("name", "nesterov"), [("sgd", False), ("sgd", True), ("rmsprop", None)])
def test_momentum_under_a_schedule_equals_keras(name, nesterov, kind):
    import keras

    rng = np.random.default_rng(2)
    gradients = [rng.standard_normal((5, 3)).astype(np.float32) for _ in range(200)]
    config = OptimConfig(name=name, preset="keras", momentum=0.9, nesterov=nesterov, schedule=SCHEDULES[kind])
    ours, _ = run(build(config, total_steps=200), {"w": jnp.zeros((5, 3))}, [{"w": g} for g in gradients])
    lr = optim.PRESETS[name]["keras"]["lr"]
    with jax.numpy_rank_promotion("allow"):
        schedules = keras.optimizers.schedules
        theirs_rate = (
            schedules.CosineDecay(lr, 200, alpha=0.1)
            if kind == "cosine"
            # Keras drops after a boundary, we at it.
            else schedules.PiecewiseConstantDecay([49, 99, 149], [lr, lr * 0.3, lr * 0.09, lr * 0.027])
        )
        numbers = {"lr": theirs_rate, "momentum": 0.9, "nesterov": bool(nesterov)}
        theirs, variable = keras_optimizer(name, numbers), keras.Variable(np.zeros((5, 3), np.float32))
        theirs.build([variable])
        for g in gradients:
            theirs.apply([jnp.asarray(g)], [variable])
    move = np.abs(np.asarray(variable)).max()
    assert move > 1e-2
    assert np.abs(np.asarray(ours["w"]) - np.asarray(variable)).max() < 1e-5 * move
    other, _ = run(
        build(dataclasses.replace(config, preset="tuned", lr=lr), total_steps=200),
        {"w": jnp.zeros((5, 3))},
        [{"w": g} for g in gradients],
    )
    assert np.abs(np.asarray(other["w"]) - np.asarray(variable)).max() > 1e-3 * move, "the order makes no difference"


def test_keras_momentum_composes_with_decay_depth_plateau_and_keeps_other_states():
    schedule = ScheduleConfig(kind="plateau", patience=1, factor=0.5)
    config = OptimConfig(
        name="sgd", preset="keras", lr=0.5, momentum=0.9, weight_decay=0.1, layer_decay=0.5, schedule=schedule
    )
    optimizer = build(config, stages=("a", "b"), stage_of=lambda path: "a" if path[0] == "low" else None)
    params = {"low": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    state, ones = optimizer.tx.init(params), jax.tree.map(jnp.ones_like, params)
    first, state = optimizer.tx.update(ones, state, params)
    np.testing.assert_allclose(first["head"]["kernel"], -0.5 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_allclose(first["head"]["bias"], -0.5, rtol=1e-6)
    np.testing.assert_allclose(first["low"]["kernel"], 0.5 * (-0.5 - 0.5 * 0.1), rtol=1e-6)
    for loss in (1.0, 2.0):
        state = optim.update_plateau(optimizer, state, loss)
    assert optimizer.rates_at(state)(np.array([1]))[0] == pytest.approx(0.25)
    second, state = optimizer.tx.update(ones, state, params)  # the buffer keeps the rate of old, the decay does not
    np.testing.assert_allclose(second["head"]["kernel"], -0.9 * 0.5 - 0.25 - 0.25 * 0.1, rtol=1e-6)

    def structure(**fields):
        return jax.tree.structure(build(OptimConfig(name="sgd", momentum=0.9, **fields)).tx.init(params))

    # A checkpoint of before can be gone on with, where its numbers are the same; else it is refused by its structure.
    assert structure(preset="keras") == structure(preset="tuned", schedule=schedule)
    assert structure(preset="keras") != structure(preset="keras", schedule=schedule)


@pytest.mark.parametrize("preset", ["keras", "tuned"])
@pytest.mark.parametrize("name", NAMES)
def test_lowers_a_quadratic(name, preset):
    optimizer = build(OptimConfig(name=name, preset=preset), total_steps=200)
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.tx.init(params)
    losses = []
    for _ in range(200):
        losses.append(float(jnp.square(params["w"]).sum()))
        updates, state = optimizer.tx.update({"w": 2 * params["w"]}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert losses[-1] < losses[0] - 1e-5


def test_schedules():
    def values(steps, total=40, **fields):
        multiplier = optim.schedule(ScheduleConfig(**fields), total, 10)
        return [float(multiplier(s)) for s in steps]

    assert values([0, 39], kind="constant") == [1, 1]
    np.testing.assert_allclose(values([0, 20, 40], kind="cosine", final=0.2), [1, 0.6, 0.2], atol=1e-6)
    got = values([0, 9, 10, 20], kind="step", step_epochs=1, factor=0.5)
    np.testing.assert_allclose(got, [1, 1, 0.5, 0.25], atol=1e-6)
    np.testing.assert_allclose(values([0, 4, 9, 10], warmup_epochs=1.0), [0.1, 0.5, 1, 1], atol=1e-6)


def test_the_logged_rate_is_the_one_used():
    schedule = ScheduleConfig(kind="cosine", warmup_epochs=0.5)
    config = OptimConfig(name="sgd", preset="keras", lr=0.5, schedule=schedule)
    optimizer = build(config, total_steps=30, lr_scale=0.1)
    params = {"w": jnp.zeros(1)}
    state = optimizer.tx.init(params)
    for step in range(30):
        lr = optimizer.rates_at(state)(np.array([step]))[0]
        updates, state = optimizer.tx.update({"w": jnp.ones(1)}, state, params)
        np.testing.assert_allclose(-updates["w"][0], lr, rtol=1e-5, atol=1e-8)


def test_plateau_drops_after_patience_and_survives_flattening():
    config = OptimConfig(name="sgd", lr=1.0, schedule=ScheduleConfig(kind="plateau", patience=2, factor=0.1))
    optimizer = build(config)
    state = optimizer.tx.init({"w": jnp.zeros(2)})
    rates = []
    for loss in (1.0, 0.5, 0.6, 0.7, 0.8, 0.4, 0.4, 0.4):
        state = optim.update_plateau(optimizer, state, loss)
        leaves, tree = jax.tree.flatten(state)
        state = jax.tree.unflatten(tree, leaves)
        rates.append(optimizer.rates_at(state)(np.array([0]))[0])
    np.testing.assert_allclose(rates, [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01], rtol=1e-5)
    constant = build(OptimConfig())
    state = constant.tx.init({"w": jnp.zeros(2)})
    assert optim.update_plateau(constant, state, 1.0) is state


def test_decay_skips_biases_and_norms_clipping_bounds_the_step_and_depth_scales_it():
    stages = ("conv1", "conv2", "conv3")
    names = {"conv1_conv": "conv1", "conv2_block1_1_conv": "conv2", "bn": "conv3"}
    params = {
        "backbone": {name: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for name in names},
        "head": {"logits": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    }
    config = OptimConfig(name="sgd", preset="keras", lr=0.5, weight_decay=0.1, layer_decay=0.5)
    optimizer = build(config, stages=stages, stage_of=lambda path: names.get(path[1]))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.tx.update(zero, optimizer.tx.init(params), params)
    depth = {"conv1": 0.25, "conv2": 0.5, "conv3": 1.0}
    for name, stage in names.items():
        np.testing.assert_allclose(updates["backbone"][name]["kernel"], -0.5 * 0.1 * depth[stage], rtol=1e-6)
        np.testing.assert_array_equal(updates["backbone"][name]["bias"], 0)
    np.testing.assert_allclose(updates["head"]["logits"]["kernel"], -0.05, rtol=1e-6)

    clipped = build(OptimConfig(name="sgd", preset="keras", lr=1.0, clip_norm=0.5))
    updates, _ = clipped.tx.update({"w": jnp.full(4, 10.0)}, clipped.tx.init({"w": jnp.zeros(4)}), {"w": jnp.zeros(4)})
    np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), 0.5, rtol=1e-5)


def test_wrong_fields_are_named():
    with pytest.raises(ValueError, match=r"optim\.momentum.*'adam' has none"):
        build(OptimConfig(name="adam", momentum=0.9))
    with pytest.raises(ValueError, match=r"optim\.nesterov.*'rmsprop'"):
        build(OptimConfig(name="rmsprop", nesterov=True))
