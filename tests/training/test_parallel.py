"""The same numbers on one device, on four under jit and on four under pmap; batches of any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.data.batches import TrainBatches
from bmjax.data.load import load_dataset
from bmjax.data.splits import split_dataset
from bmjax.layers.ops import largest_divisor
from bmjax.model.create import create
from bmjax.runs.folder import new_variables
from bmjax.runs.state import create_state
from bmjax.training.losses import make_loss
from bmjax.training.parallel import Parallel
from bmjax.training.predict import Predictor
from bmjax.training.stages import compile_stage, plan_stages

STEPS = 5


def run_steps(config, kind, devices):
    """Parameters, statistics and losses after STEPS updates, dropout and augmentation on."""
    dataset = load_dataset(config.data)
    splits = split_dataset(dataset, config.data)
    model = create(config.model, len(dataset.classes), config.train.dtype)
    variables = new_variables(config, model)
    plan = plan_stages(config, 4, model, variables["batch_stats"])[-1]
    state = create_state(variables, plan.optimizer.tx, plan.is_trainable, seed=3, ema=True)
    train = dataclasses.replace(config.train, parallel=kind, devices=devices)
    parallel = Parallel.of(train, config.train.batch_size // config.train.accumulate)
    assert devices in (parallel.size, None)
    loss = make_loss(config.train, np.bincount(dataset.labels[splits.train]))
    step = compile_stage(config, model, plan, parallel, loss)
    on_devices, losses = parallel.to_devices(state), []
    batches = TrainBatches(dataset, splits.train, config.train.batch_size, config.seed)
    for k in range(STEPS):
        batch = batches.batch(k)
        batch = {name: batch[name] for name in ("image", "label", "position")}
        on_devices, metrics = step(on_devices, parallel.put_batch(batch))
        losses.append(parallel.to_host(metrics)["loss"].item())
    state = parallel.to_host(on_devices)
    return {"params": state.params, "batch_stats": state.batch_stats, "ema": state.ema}, losses


def largest_difference(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("backbone", "accumulate"),
    [
        pytest.param("tests.helpers.net:Net", 2, marks=pytest.mark.slow),
        pytest.param("densenet_tiny", 1, marks=pytest.mark.slow),
        pytest.param("densenet_tiny", 2, marks=pytest.mark.slow),
    ],
)
def test_float64_steps_agree_on_any_devices(tiny_config, backbone, accumulate):
    """With all that is drawn at random."""
    train = dataclasses.replace(tiny_config.train, dtype="float64", accumulate=accumulate)
    augment = dataclasses.replace(tiny_config.augment, mixup=0.4, cutmix=1.0, hed=0.05, erase=0.5)
    model = dataclasses.replace(tiny_config.model, backbone=backbone, preprocess="tf")
    config = dataclasses.replace(tiny_config, model=model, train=train, augment=augment)
    with jax.enable_x64(True):
        one, losses = run_steps(config, "jit", 1)
        assert jax.tree.leaves(one)[0].dtype == np.float64
        assert len(set(losses)) == STEPS, "the steps changed nothing"
        for kind in ("jit", "pmap"):
            four, four_losses = run_steps(config, kind, 4)
            assert largest_difference(one, four) < 1e-9, kind
            np.testing.assert_allclose(losses, four_losses, rtol=0, atol=1e-9)


def test_float64_layouts_of_the_state_and_rematerialisation_agree(quick_config):
    """Parameters and optimizer state divided over devices, kernels by channels, feature maps computed again."""
    layouts = (
        ("jit", {}),
        ("pmap", {}),
        ("jit", {"shard_params": True, "remat": ("all",)}),
        ("jit", {"mesh": "data=2,model=2", "shard_params": True, "remat": ("fine",)}),
    )

    def on(devices, kind="jit", **fields):
        train = dataclasses.replace(quick_config.train, dtype="float64", **fields)
        return run_steps(dataclasses.replace(quick_config, train=train), kind, devices)[0]

    with jax.enable_x64(True):
        one = on(1)
        for kind, layout in layouts:
            assert largest_difference(one, on(4, kind, **layout)) < 1e-9, (kind, layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone", ["densenet_tiny", "efficientnet_tiny", "mobilenet_v2_tiny", "resnet_tiny", "xception_tiny"]
)
def test_every_family_recomputes_its_stages(quick_config, backbone):
    config = dataclasses.replace(quick_config, data=dataclasses.replace(quick_config.data, image_size=32))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    train = dataclasses.replace(config.train, dtype="float64")
    with jax.enable_x64(True):
        kept, again = (
            run_steps(dataclasses.replace(config, train=dataclasses.replace(train, remat=remat)), "jit", 1)[0]
            for remat in ((), ("all",))
        )
    assert largest_difference(kept, again) < 1e-9


@pytest.mark.parametrize(("mesh", "share"), [("data=4", 4), ("data=2,model=2", 4), ("data=-1,model=4", 4)])
def test_a_divided_state_is_in_parts_and_comes_back_whole(mesh, share):
    parallel = Parallel.create("jit", mesh=mesh, shard_params=True)
    tree = {"kernel": np.arange(3 * 16 * 64, dtype=np.float32).reshape(3, 16, 64), "bias": np.ones(7, np.float32)}
    placed = parallel.to_devices(tree)
    parts = {name: x.addressable_shards[0].data.size for name, x in placed.items()}
    assert parts == {"kernel": tree["kernel"].size // share, "bias": 7}
    jax.tree.map(np.testing.assert_array_equal, parallel.to_host(placed), tree)
    step = parallel.compile_step(lambda s, b: (jax.tree.map(lambda x: x + b["y"].sum(), s), {}))
    after, _ = step(placed, parallel.put_batch({"y": np.ones(8, np.float32)}))
    assert {name: x.addressable_shards[0].data.size for name, x in after.items()} == parts
    np.testing.assert_array_equal(parallel.to_host(after)["kernel"], tree["kernel"] + 8)


def test_logical_shards_give_the_same_bits_on_any_devices(quick_config):
    train = dataclasses.replace(quick_config.train, logical_shards=8)
    config = dataclasses.replace(quick_config, train=train)
    model = create(config.model, 7)
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    states, logits = [], []
    for devices in (1, 2, 4):
        state, _ = run_steps(config, "jit", devices)
        parallel = Parallel.of(dataclasses.replace(train, devices=devices), 16)
        predictor = Predictor(config, model, parallel=parallel)
        variables = parallel.to_devices({name: state[name] for name in ("params", "batch_stats")})
        outputs = predictor._step(variables, parallel.put_batch({"image": images}))
        states.append(state)
        logits.append(parallel.batch_to_host(outputs)["logits"])
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, states[0])
    np.testing.assert_array_equal(logits[1], logits[0])
    np.testing.assert_array_equal(logits[2], logits[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh": "data"}, r"'train\.mesh' is 'data'; expected data=N"),
        ({"mesh": "data=0"}, r"'train\.mesh' is 'data=0'"),
        ({"shard_params": True, "parallel": "pmap"}, r"'train\.parallel' is 'pmap'; expected 'jit'"),
        ({"logical_shards": 3}, r"'train\.logical_shards' is 3; expected a divisor of batch_size"),
        ({"logical_shards": 4, "accumulate": 2}, r"'train\.logical_shards' is 4; expected none with accumulate"),
        ({"mesh": "data=4,model=2"}, r"'train\.mesh' is 'data=4,model=2'; expected one that 4 devices hold"),
        ({"mesh": "model=3"}, r"'train\.mesh' is 'model=3'; expected one that 4 devices hold"),
        ({"mesh": "data=3"}, r"batches \(or micro-batches\) of 16 images; expected a multiple of 3"),
        ({"remat": ("conv9",)}, r"'train\.remat' is \('conv9',\).*does not compute conv9"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(quick_config, fields, message):
    def begin():
        train = dataclasses.replace(quick_config.train, **fields)
        run_steps(dataclasses.replace(quick_config, train=train), train.parallel, None)

    with pytest.raises(ValueError, match=message):
        begin()


@pytest.mark.slow
def test_float32_drift_is_small_and_printed(tiny_config, capsys):
    one, _ = run_steps(tiny_config, "jit", 1)
    with capsys.disabled():
        for kind in ("jit", "pmap"):
            drift = largest_difference(one, run_steps(tiny_config, kind, 4)[0])
            print(f"\nfloat32 drift after {STEPS} steps, 1 device to 4 under {kind}: {drift:.2e}")
            # Adam divides by the root of tiny second moments, so summation order shows up to the rate itself.
            assert drift < 5e-3


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_state_and_batches_survive_the_way_to_devices_and_back(kind):
    parallel = Parallel.create(kind, 4)
    tree = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.int32(4)}
    back = parallel.to_host(parallel.to_devices(tree))
    jax.tree.map(np.testing.assert_array_equal, tree, back)
    batch = {"image": np.arange(8 * 3, dtype=np.float32).reshape(8, 3)}
    double = parallel.compile_step(lambda _, b: {"y": b["image"] * 2}, donate=False)
    out = parallel.batch_to_host(double(parallel.to_devices(tree), parallel.put_batch(batch)))
    np.testing.assert_array_equal(out["y"], batch["image"] * 2)


def test_to_devices_keeps_the_host_copy_when_the_step_donates():
    parallel = Parallel.create("jit", 4)
    host = {"x": jnp.ones(5)}
    step = parallel.compile_step(lambda s, b: ({"x": s["x"] + b["y"].sum()}, {}))
    step(parallel.to_devices(host), parallel.put_batch({"y": np.ones(4, np.float32)}))
    np.testing.assert_array_equal(host["x"], np.ones(5))


def test_devices_that_do_not_divide_the_batch_are_left_out():
    assert [largest_divisor(b, 4) for b in (16, 18, 7, 9)] == [4, 3, 1, 3]
    assert Parallel.create("jit", None, 18).size == 3
    with pytest.raises(ValueError, match=r"train\.devices is 99; expected at most 4"):
        Parallel.create("jit", 99)


@pytest.mark.parametrize(("batch_size", "n"), [(16, 1), (16, 17), (5, 7)])
def test_every_image_is_evaluated_once_whatever_the_sizes(quick_config, batch_size, n):
    dataset = load_dataset(quick_config.data)
    train = dataclasses.replace(quick_config.train, eval_batch_size=batch_size, devices=None)
    config = dataclasses.replace(quick_config, train=train)
    model = create(config.model, len(dataset.classes))
    variables = new_variables(config, model)
    rows = np.arange(3, 3 + n)
    probs, done = Predictor(config, model)(variables, dataset, rows)
    np.testing.assert_array_equal(done, rows)
    logits = model.apply(variables, dataset.images[rows].astype(np.float32), train=False)
    np.testing.assert_allclose(probs, jax.nn.softmax(logits), atol=1e-5)


def test_few_images_are_not_padded_to_a_whole_batch(tiny_config):
    config = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, eval_batch_size=64))
    on_four = Predictor(config, create(config.model, 2))
    assert [on_four.bucket(n) for n in (1, 4, 5, 9, 16, 17, 64, 1000)] == [4, 4, 8, 16, 16, 64, 64, 64]
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, devices=1))
    on_one = Predictor(config, create(config.model, 2))
    assert [on_one.bucket(n) for n in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 64]
