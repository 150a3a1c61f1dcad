"""The step alone, in a loop of one's own."""

import jax
import numpy as np
import optax

import bmjax
from bmjax.config import AugmentConfig, BatchNormConfig, ModelConfig


def test_ten_lines_of_ones_own():
    images = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), np.uint8)
    batch = {"image": images, "label": np.arange(16, dtype=np.int32) % 2, "position": np.arange(16, dtype=np.int32)}

    model = bmjax.create(ModelConfig(backbone="resnet_tiny", weights=None, attention="se"), 2)
    variables = bmjax.init(model, jax.random.key(0), 32)
    tx = optax.adam(3e-3)
    state = bmjax.create_state(variables, tx, lambda path: True, seed=0, ema=False)
    step = jax.jit(
        bmjax.make_train_step(model, tx, lambda path: True, batch_norm=BatchNormConfig(), augmentation=AugmentConfig())
    )
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))

    assert isinstance(state, bmjax.TrainState)
    assert int(state.step) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
