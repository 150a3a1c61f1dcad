"""What must hold on whatever devices there are: a step of each family, jit as pmap, a resume, training's precision.

Marked `accelerator`: `python tools/check.py --accelerator` runs these on a GPU or TPU where there is one.
"""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from bmjax.backbones import family_of, list_backbones
from bmjax.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimConfig, StageConfig, TrainConfig
from bmjax.data.batches import TrainBatches
from bmjax.data.load import load_dataset
from bmjax.layers.dispatch import traced_for, with_forms
from bmjax.model.create import create
from bmjax.runs.checkpoint import Checkpoints
from bmjax.runs.folder import new_variables
from bmjax.runs.state import create_state
from bmjax.training.losses import cross_entropy
from bmjax.training.parallel import Parallel
from bmjax.training.progress import StepLog
from bmjax.training.run import train
from bmjax.training.stages import compile_stage, plan_stages, stage_step

pytestmark = pytest.mark.accelerator
FAMILIES = sorted({family_of(name).__name__.split(".")[-1] for name in list_backbones()})


def tiny(family, dtype, precision="default"):
    """A configuration of a family's tiny member; nothing drawn at random but the batches."""
    return Config(
        data=DataConfig(image_size=64, synthetic_per_class=4),
        augment=AugmentConfig(flip=False, right_angles=False),
        model=ModelConfig(backbone=f"{family}_tiny", weights=None, attention="none"),
        optim=OptimConfig(name="sgd", lr=0.05),
        stages=(StageConfig(),),
        train=TrainConfig(batch_size=8, dtype=dtype, precision=precision),
    )


def updates(config, kind="jit", count=None, steps=3):
    """Losses of a few updates on one batch, and the state after them."""
    model = create(config.model, 7, config.train.dtype)
    variables = new_variables(config, model)
    plan = plan_stages(config, 10, model, variables["batch_stats"])[0]
    parallel = Parallel.create(kind, count, config.train.batch_size)
    state = create_state(variables, plan.optimizer.tx, plan.is_trainable, seed=0, ema=False)
    placed = parallel.to_devices(state)
    step = compile_stage(config, model, plan, parallel, cross_entropy)
    dataset = load_dataset(config.data)
    batch = TrainBatches(dataset, np.arange(len(dataset)), config.train.batch_size, 0).batch(0)
    batch = parallel.put_batch({name: batch[name] for name in ("image", "label", "position")})
    losses = []
    for _ in range(steps):
        placed, metrics = step(placed, batch)
        losses.append(parallel.to_host(metrics)["loss"].item())
    return losses, parallel.to_host(placed)


@pytest.mark.slow  # on CPUs; parity and contracts train every family, too
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_each_family_in_both_types(family):
    """Losses are finite, fall on one batch, and bfloat16's are near float32's; parameters stay float32."""
    losses, states = {}, {}
    for dtype in ("float32", "bfloat16"):
        losses[dtype], states[dtype] = updates(tiny(family, dtype))
        assert np.isfinite(losses[dtype]).all()
        assert losses[dtype][-1] < losses[dtype][0]
        kept = jax.tree.leaves((states[dtype].params, states[dtype].batch_stats))
        assert {leaf.dtype for leaf in kept} == {np.dtype("float32")}
        assert all(np.isfinite(leaf).all() for leaf in kept)
    assert abs(losses["bfloat16"][0] - losses["float32"][0]) < 0.1


@pytest.mark.slow  # on CPUs, where test_parallel.py compares them in float64
def test_pmap_is_jit_on_the_devices_there_are():
    config = tiny("densenet", "float32")
    one, alone = updates(config, "jit", 1)
    for kind in ("jit", "pmap"):
        losses, state = updates(config, kind)
        np.testing.assert_allclose(losses, one, rtol=1e-4)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


def last_leaves(run_dir):
    checkpoints = Checkpoints(run_dir / "checkpoints/last")
    arrays = checkpoints.raw(checkpoints.latest())
    checkpoints.close()
    return arrays


@pytest.mark.slow  # on CPUs, where test_resume.py stops runs at more places
def test_a_resumed_run_ends_as_one_never_stopped(tiny_config, tmp_path, monkeypatch, caplog):
    """Bit for bit, which on GPUs needs deterministic sums: tools/check.py sets the flag."""
    train_config = dataclasses.replace(tiny_config.train, devices=1)
    whole = dataclasses.replace(tiny_config, train=train_config, run_dir=str(tmp_path / "whole"))
    result = train(whole)
    stopped = dataclasses.replace(whole, run_dir=str(tmp_path / "stopped"))
    middle, original = result.steps // 2 + 1, StepLog.__call__

    def stop_at(self, step, *arguments):
        original(self, step, *arguments)
        if step == middle:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "__call__", stop_at)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    with caplog.at_level(logging.INFO):
        train(stopped, resume=True)
    assert "resumed at step" in caplog.text
    left, right = last_leaves(tmp_path / "whole"), last_leaves(tmp_path / "stopped")
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)


def precisions(jaxpr):
    """Every precision that a program's products and convolutions ask for, at any depth."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            found.add(str(equation.params["precision"]))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found |= precisions(getattr(inner, "jaxpr", inner))
    return found


def step_and_shapes(config):
    """A stage's step, not compiled, and the shapes of its arguments."""
    model = create(config.model, 7, config.train.dtype)
    variables = jax.eval_shape(lambda: new_variables(config, model))
    plan = plan_stages(config, 10, model, variables["batch_stats"])[0]
    state = jax.eval_shape(
        lambda v: create_state(v, plan.optimizer.tx, plan.is_trainable, seed=0, ema=False), variables
    )
    shapes = {"image": ((4, 64, 64, 3), np.uint8), "label": ((4,), np.int32), "position": ((4,), np.int32)}
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    return stage_step(config, model, plan, cross_entropy), state, batch


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("densenet", ""),
        ("densenet", "dense_in_place"),
        ("densenet", "dense_remat"),
        ("mobilenet_v2", ""),
        ("mobilenet_v2", "plain_depthwise"),
    ],
)
def test_steps_lower_for_cuda_without_the_cpus_kernels(family, form):
    """On any machine: the program that a GPU would compile, in bfloat16."""
    step, state, batch = step_and_shapes(tiny(family, "bfloat16"))
    with traced_for("gpu"), with_forms(*filter(None, [form])):
        text = jax.jit(step).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert "bmjax_" not in text
    grouped = text.count("feature_group_count = 1 ") < text.count("feature_group_count")
    assert grouped == (form == "plain_depthwise")


def test_the_configured_precision_is_that_of_every_product_and_gradient():
    for name, expected in (("highest", "HIGHEST"), ("bfloat16_3x", "HIGH"), ("default", "DEFAULT")):
        step, state, batch = step_and_shapes(tiny("resnet", "float32", name))
        with jax.default_matmul_precision("default"):
            found = precisions(jax.make_jaxpr(step)(state, batch).jaxpr)
        assert found <= {f"(Precision.{expected}, Precision.{expected})"} | ({"None"} if name == "default" else set())
        assert found
