"""What a run costs is told: seconds by kind, memory, the peak's share, compilations with their cause, a trace."""

import dataclasses
import logging
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bmjax
from bmjax.cli.main import make_parser
from bmjax.runs.records import read_records
from bmjax.training import watch
from bmjax.training.watch import Clock, WatchedStep, peak_flops


def test_the_first_call_of_a_step_says_how_long_it_took(caplog):
    step = WatchedStep(lambda state, batch: state + batch, stage=2)
    with caplog.at_level(logging.INFO, logger="bmjax.training.watch"):
        assert [int(step(jnp.int32(1), jnp.int32(2))), int(step(jnp.int32(3), jnp.int32(4)))] == [3, 7]
    assert len(caplog.messages) == 1
    assert re.fullmatch(r"stage 2: its step compiled, or was read from the cache, in \d+\.\d s", caplog.messages[0])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"image": np.zeros((2, 3), np.uint8)}, r"batch\.image is uint8\[2, 3\] on the host and was uint8\[4"),
        ({"image": np.zeros((4, 3), np.float32)}, r"batch\.image is float32\[4, 3\]"),
        (
            {"image": np.zeros((4, 3), np.uint8), "label": np.zeros(4, np.int32)},
            r"batch\.label is int32\[4\].*was none",
        ),
    ],
)
def test_a_second_compilation_names_the_argument_that_changed(caplog, other, said):
    caplog.set_level(logging.WARNING, logger="bmjax")
    step = WatchedStep(jax.jit(lambda state, batch: (state + 1, batch["image"].sum()), donate_argnums=0), stage=1)
    state, _ = step(jnp.zeros(3), {"image": np.zeros((4, 3), np.uint8)})
    state, _ = step(state, {"image": np.ones((4, 3), np.uint8)})
    assert step.again == 0
    assert caplog.messages == []
    step(state, other)
    assert step.again == 1
    (message,) = caplog.messages
    assert re.search(r"stage 1: its step compiled again in \d+\.\d s \(1 times now\), for " + said, message)


def test_flops_are_those_of_the_program_as_written():
    step = WatchedStep(jax.jit(lambda state, batch: (state, batch["x"] @ state)), 0, counts=True)
    step(jnp.zeros((32, 16)), {"x": jnp.zeros((8, 32))})
    assert step.flops == 2 * 8 * 32 * 16


def test_peaks_by_kind_and_type():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16", "default") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32", "default") == 494.7e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32", "highest") == pytest.approx(66.9e12)
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16", "default") == 756e12
    assert peak_flops("TPU v5 lite", "bfloat16", "default") == 197e12
    assert peak_flops("TPU v4", "float32", "highest") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float64", "default") is None
    assert peak_flops("cpu", "float32", "default") is None


def test_seconds_go_to_what_they_were_spent_on():
    clock = Clock()
    assert clock.figures() == {}
    for what, seconds in (("waiting", 0.05), ("compute", 0.02), ("compute", 0.02), ("logging", 0.01)):
        with clock.on(what):
            time.sleep(seconds)
    found = clock.figures()
    assert 0.05 <= found["seconds/waiting"] < 0.09
    assert 0.04 <= found["seconds/compute"] < 0.08
    assert 0.01 <= found["seconds/logging"] < 0.05
    assert 0.3 < found["input_wait"] < 0.6
    assert clock.figures() == {}


def test_a_run_tells_its_costs_and_writes_the_trace_asked_for(quick_config, monkeypatch):
    monkeypatch.setattr(watch, "_PEAKS", (("cpu", 1.0, 1.0, 1.0),))
    train = dataclasses.replace(quick_config.train, profile="2:4", devices=1)
    result = bmjax.train(dataclasses.replace(quick_config, stages=quick_config.stages[:1], train=train))
    for record in read_records(result.run_dir, "epoch"):
        parts = [record[f"seconds/{what}"] for what in ("waiting", "compute", "logging", "evaluation")]
        assert min(parts) >= 0
        assert record["seconds/compute"] > record["seconds/logging"]
        assert record["memory/host_gb"] > 0.1
        assert record["mfu"] > 0
        assert "compiled_again" not in record
    assert list((result.run_dir / "profile").rglob("*.xplane.pb"))


def test_profile_is_an_option_of_train_and_is_checked(quick_config):
    options, _ = make_parser().parse_known_args(["train", "x.py", "--profile", "10:15"])
    assert options.profile == "10:15"
    for wrong in ("15:10", "10", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match=r"'train\.profile' is .*expected START:END, as 10:15"):
            dataclasses.replace(quick_config.train, profile=wrong)


def test_a_profile_beyond_the_run_is_refused_before_it(quick_config):
    train = dataclasses.replace(quick_config.train, profile="1000:1005", devices=1)
    with pytest.raises(
        ValueError, match=r"'train\.profile' is '1000:1005'; expected to start below \d+, the run's steps"
    ):
        bmjax.train(dataclasses.replace(quick_config, train=train))
    assert not list(Path(quick_config.run_dir).glob("checkpoints/*"))
