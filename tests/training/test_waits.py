"""The loop never makes the device wait: a step reads nothing of its own, and evaluation keeps batches in flight."""

import dataclasses

import jax
import numpy as np
import pytest

from bmjax.config import ScheduleConfig
from bmjax.data.batches import eval_batches, read_ahead, steps_per_epoch
from bmjax.data.load import load_dataset
from bmjax.data.splits import split_dataset
from bmjax.model.create import create
from bmjax.runs.folder import new_variables
from bmjax.runs.state import Progress
from bmjax.runs.tracking import NoTracker
from bmjax.training.loop import ImageEngine, learning_rates
from bmjax.training.losses import cross_entropy
from bmjax.training.parallel import Parallel
from bmjax.training.predict import IN_FLIGHT, Predictor
from bmjax.training.progress import Recorder
from bmjax.training.signals import Signals
from bmjax.training.stages import Stretch, plan_stages


class OnDevice:
    """A value that is still being computed: reading it is written down."""

    def __init__(self, name, events, value):
        self._name, self._events, self._value = name, events, value

    def __array__(self, dtype=None, copy=None):
        self._events.append(("read", self._name))
        return np.asarray(self._value, dtype)


class Untouched:
    """A state that only the step may look into."""

    def __getattr__(self, name):
        raise AssertionError(f"the loop looked at the state's {name}")


SCHEDULES = [
    ScheduleConfig(kind="cosine", warmup_epochs=0.5),
    ScheduleConfig(kind="step", step_epochs=0.5),
    ScheduleConfig(kind="constant"),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_a_step_waits_for_nothing_and_moves_nothing_but_its_batch(tiny_config, monkeypatch, schedule):
    """By a clock of steps sent and values read: those of step k are read once, when step k + 1 is under way."""
    optim = dataclasses.replace(tiny_config.optim, schedule=schedule)
    config = dataclasses.replace(tiny_config, optim=optim)
    dataset = load_dataset(config.data)
    splits = split_dataset(dataset, config.data)
    model = create(config.model, len(dataset.classes), config.train.dtype)
    per_epoch = steps_per_epoch(len(splits.train), config.train.batch_size)
    statistics = jax.eval_shape(lambda: new_variables(config, model))["batch_stats"]
    plans = plan_stages(config, per_epoch, model, statistics)
    parallel, events, state = Parallel.create("jit", 1), [], Untouched()
    with Signals() as signals:
        shared = {"loss": cross_entropy, "per_epoch": per_epoch, "parallel": parallel, "signals": signals}
        engine = ImageEngine(config, model, plans, (dataset, splits), **shared)

        def step(given, batch):
            assert given is state
            assert all(isinstance(array, jax.Array) for array in batch.values())
            k = sum(kind == "sent" for kind, _ in events)
            events.append(("sent", k))
            values = {"loss": 1.0, "correct": 1, "count": 16.0, "grad_norm": 1.0}
            return state, {name: OnDevice((k, name), events, value) for name, value in values.items()}

        monkeypatch.setattr(engine, "_step_of", lambda stage: step)
        recorder = Recorder(Progress("id"), NoTracker(), dataset, quiet=True)
        stretch = Stretch(0, 0, per_epoch, True)
        rates = learning_rates(plans[0], engine, state, stretch)  # once a stretch
        with jax.transfer_guard("disallow"):  # what is put there in so many words is allowed
            _, reached = engine.run(state, stretch, rates, recorder)
    assert reached == per_epoch > 3
    for k in range(per_epoch):
        reads = [i for i, (kind, of) in enumerate(events) if kind == "read" and of[0] == k]
        assert len(reads) == 4
        if k + 1 < per_epoch:
            assert min(reads) > events.index(("sent", k + 1))
    assert len(events) == 5 * per_epoch


def test_evaluation_keeps_batches_in_flight(tiny_config, monkeypatch):
    """The logits of a batch are read when two more are under way; all come, once, in order."""
    train = dataclasses.replace(tiny_config.train, eval_batch_size=8)
    config = dataclasses.replace(tiny_config, train=train)
    dataset = load_dataset(config.data)
    model, events = create(config.model, len(dataset.classes)), []
    predictor = Predictor(config, model, parallel=Parallel.create("jit", 1))

    def step(variables, batch):
        k = sum(kind == "sent" for kind, _ in events)
        events.append(("sent", k))
        return {"logits": OnDevice(k, events, np.full((8, 7), float(k)))}

    monkeypatch.setattr(predictor, "_step", step)
    rows = np.arange(45)
    probs, done = predictor.on_devices(None, dataset, rows)
    np.testing.assert_array_equal(done, rows)
    assert probs.shape == (45, 7)
    for k in range(6 - IN_FLIGHT):
        assert events.index(("read", k)) > events.index(("sent", k + IN_FLIGHT))
    assert [of for kind, of in events if kind == "read"] == list(range(6))


def test_reading_ahead_changes_nothing_and_passes_errors_on(tiny_config):
    dataset = load_dataset(tiny_config.data)
    plain = list(eval_batches(dataset, np.arange(21), 8))
    ahead = list(read_ahead(eval_batches(dataset, np.arange(21), 8)))
    assert len(ahead) == len(plain) == 3
    for a, b in zip(ahead, plain, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)

    def broken():
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(read_ahead(broken()))
    first = next(read_ahead(iter(range(1, 100))))  # what is left is not waited for
    assert first == 1
