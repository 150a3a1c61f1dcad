"""No server of W&B's stops, slows or loses a run: one that hangs, refuses, dies in the middle, or comes back."""

import logging
import time

import pytest

from bmjax.config import TrackingConfig
from bmjax.runs import tracking
from bmjax.runs.tracking import make_tracker, new_run_id
from tests.helpers.wandb_server import Server
from tests.runs.test_tracking import lines, no_key  # noqa: F401  (a fixture)


@pytest.fixture
def server(no_key, monkeypatch):  # noqa: F811
    import wandb

    monkeypatch.setattr(tracking, "INIT_SECONDS", 3.0)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 5.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    server = Server().start()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    wandb.teardown()  # it reads the server's address once
    yield server
    server.stop()
    wandb.teardown()


def log_steps(tracker, *steps):
    for step in steps:
        tracker.log(step, {"loss": 1 / step}, kind="train")


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize(("mode", "asked"), [("500", "auto"), ("rst", "auto"), ("hangs", "auto"), ("hangs", "online")])
def test_a_server_that_does_not_take_the_run(server, tmp_path, caplog, mode, asked):
    """Training begins at once; in the end all is on disk, and it is said how to send it."""
    server.mode = mode
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        tracker = make_tracker(TrackingConfig(wandb=asked), tmp_path, new_run_id(), {"name": "r"})
        log_steps(tracker, 1, 2)
        assert time.monotonic() - began < 1
        tracker.close()
    assert time.monotonic() - began < 25
    assert server.requests > 0
    assert "so the run is logged offline" in caplog.text
    assert "send it with: wandb sync" in caplog.text
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_server_that_dies_and_comes_back_misses_nothing(server, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 30.0)
    tracker = make_tracker(TrackingConfig(wandb="online"), tmp_path, new_run_id(), {"name": "r"})
    log_steps(tracker, 1, 2)
    wait_for(lambda: server.has_run)
    server.stop()
    log_steps(tracker, 3, 4)
    server.start()
    log_steps(tracker, 5)
    tracker.close()
    assert sorted(set(server.steps)) == [1, 2, 3, 4, 5]
    assert "W&B" not in caplog.text


def test_a_server_that_dies_for_good_costs_seconds(server, tmp_path, caplog):
    tracker = make_tracker(TrackingConfig(wandb="online"), tmp_path, new_run_id(), {"name": "r"})
    log_steps(tracker, 1)
    wait_for(lambda: server.has_run)
    server.stop()
    began = time.monotonic()
    log_steps(tracker, 2, 3)
    tracker.close()
    assert time.monotonic() - began < 20
    assert "not everything is sent" in caplog.text
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert f"send the rest with: wandb sync {folder}" in caplog.text
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
