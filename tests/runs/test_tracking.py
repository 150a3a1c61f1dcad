"""The JSONL record under kills and rewinds, and W&B without a network."""

import contextlib
import io
import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bmjax.config import TrackingConfig
from bmjax.runs import tracking
from bmjax.runs.metrics import classification_metrics
from bmjax.runs.records import Predictions
from bmjax.runs.tables import Finished
from bmjax.runs.tracking import JsonlTracker, MultiTracker, NoTracker, agents_run, make_tracker, new_run_id, why_offline
from tests.helpers.wandb_files import inspect


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, steps, kind="train"):
    tracker = JsonlTracker(path)
    for step in steps:
        tracker.log(step, {"loss": 1.0 / step}, kind=kind)
    tracker.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_each_step_stands_once_per_kind(path):
    write(path, [1, 2, 3])
    write(path, [3], "epoch")
    write(path, [2, 3, 4, 5])  # a resume from the checkpoint of step 1
    write(path, [3, 6], "epoch")
    found = lines(path)
    assert [r["step"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in found if r["kind"] == "epoch"] == [3, 6]
    assert all(r["loss"] == 1.0 / r["step"] and r["time"] > 1.7e9 for r in found)


@pytest.mark.parametrize("torn", ['{"kind": "train", "step": 4, "lo', "{", '{"kind": "train", "step": 4, "time": 1.0}'])
def test_a_torn_last_line_is_cut_off(path, torn):
    write(path, [1, 2, 3])
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    write(path, [])
    assert path.read_bytes() == whole
    path.write_bytes(whole + torn.encode())
    write(path, [3, 4, 5])
    assert [r["step"] for r in lines(path)] == [1, 2, 3, 4, 5]


def test_a_file_of_nothing_but_a_torn_line(path):
    path.write_text('{"kind": "tr')
    write(path, [1])
    assert [r["step"] for r in lines(path)] == [1]


def test_a_finished_line_that_is_no_record_is_named(path):
    write(path, [1])
    path.write_text(path.read_text() + "garbage\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: b'garbage'"):
        JsonlTracker(path)


def test_a_line_is_on_disk_as_soon_as_it_is_logged(path):
    program = (
        "import os, pathlib, sys; from bmjax.runs.tracking import JsonlTracker\n"
        "JsonlTracker(pathlib.Path(sys.argv[1])).log(7, {'loss': 0.5}, kind='train'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 9
    assert lines(path)[0]["step"] == 7


def test_only_process_0_writes(tmp_path):
    assert isinstance(make_tracker(TrackingConfig(), tmp_path, "id", {}, process_index=1), NoTracker)
    assert list(tmp_path.iterdir()) == []
    make_tracker(TrackingConfig(), tmp_path, "id", {}).close()
    assert (tmp_path / "metrics.jsonl").exists()


def test_every_tracker_takes_every_call(tmp_path):
    calls = []

    class Recorder(NoTracker):
        def log(self, step, metrics, *, kind):
            calls.append((step, kind))

        def finished(self, finished):
            calls.append("finished")

        def close(self):
            calls.append("close")

    both = MultiTracker([Recorder(), NoTracker(), Recorder()])
    both.log(1, {}, kind="train")
    both.finished(finished_run(tmp_path))
    both.close()
    assert calls[::2] == calls[1::2] == [(1, "train"), "finished", "close"]


def finished_run(run_dir):
    """Of three cells two mistakes; the surer one is b.png."""
    probs = np.array([[0.3, 0.7], [0.9, 0.1], [0.8, 0.2]], np.float32)
    labels, ids = np.array([0, 1, 0]), np.array(["a.png", "b.png", "\udce9.png"])
    metrics = classification_metrics(labels, probs) | {"step": 4}
    images = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    page = run_dir / "report.html"
    page.write_text("<b>page</b>")
    return Finished(
        run_dir, {"val": metrics}, Predictions("val", probs, labels, np.arange(3), ids, ("BLA", "EOS")), images, (page,)
    )


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("DATA", "CACHE", "CONFIG"):  # else W&B writes into the user's home
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    # A server that refuses at once, so that nothing leaves this machine.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    return tmp_path / "netrc"


def test_why_offline(no_key, monkeypatch):
    assert why_offline() == "there is no key"
    no_key.write_text("machine 127.0.0.1 login user password 0\n")
    assert why_offline() == "127.0.0.1 can't be reached"
    no_key.write_text("machine example.org login user password 0\n")
    assert why_offline() == "there is no key"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert why_offline() == "127.0.0.1 can't be reached"
    monkeypatch.setattr(tracking, "reachable", lambda: True)
    assert why_offline() is None


@pytest.mark.parametrize("address", ["http://localhost:99999", "http://[::1", "localhost:8080", "http://a..b:80"])
def test_an_address_that_is_none_is_a_reason_to_be_offline(no_key, monkeypatch, address):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    assert not tracking.reachable()
    why = why_offline()
    assert why is not None
    if address != "http://a..b:80":
        assert why.startswith(f"WANDB_BASE_URL is {address!r}, which is no address (")
        with pytest.raises(ValueError, match="WANDB_BASE_URL is "):
            tracking.local_run("wandb:a/b/c")
        monkeypatch.delenv("WANDB_API_KEY")
        assert not tracking.has_key()


def check_media(folder):
    """What W&B shows of `finished_run`."""

    def rows(name):
        (table,) = folder.glob(f"files/media/table/{name}_[0-9]*.json")
        return json.loads(table.read_text())["data"]

    assert [(row[0], row[2], row[4]) for row in rows("mispredicted")] == [
        ("b.png", "EOS", pytest.approx(0.9)),
        ("a.png", "BLA", pytest.approx(0.7)),
    ]
    assert [(row[0], row[3], row[5]) for row in rows("predictions")] == [
        ("a.png", False, 0.3),
        ("b.png", False, 0.9),
        (r"\xe9.png", True, 0.8),
    ]
    assert [(row[0], row[1], row[2]) for row in rows("classes")] == [("BLA", 2, 0.5), ("EOS", 1, 0.0)]
    assert all(rows(f"{name}_table")[0][0] == "BLA" for name in ("roc", "pr"))
    (page,) = folder.glob("files/media/html/report*.html")
    assert page.read_text() == "<b>page</b>"


def test_wandb_goes_offline_by_itself_and_logs_each_step_once(no_key, tmp_path, caplog):
    run_dir, run_id = tmp_path / "run", new_run_id()
    config = TrackingConfig(wandb="auto", notes="a note \udce9", job_type="study", entity="lab")
    for name in (
        "checkpoints/best/4/model/d",
        "checkpoints/best/2/model/d",
        "checkpoints/last/4/model/d",
        "config.json",
    ):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(name)
    with caplog.at_level(logging.WARNING):
        tracker = make_tracker(config, run_dir, run_id, {"name": "r", "optim": {"lr": 0.25}})
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 1 / step}, kind="train")
        tracker.log(3, {"epoch": 1, "val/accuracy": 0.5}, kind="epoch")
        tracker.close()
        first = set((run_dir / "wandb").glob("offline-run-*"))
        time.sleep(1)  # W&B names folders by the second
        tracker = make_tracker(config, run_dir, run_id, {"name": "r"})
        for step in (2, 3, 4):
            tracker.log(step, {"loss": 1 / step}, kind="train")
        finished = finished_run(run_dir)
        tracker.finished(finished)
        tracker.close()
    assert "there is no key, so the run is logged offline" in caplog.text
    folders = [*first, *(set((run_dir / "wandb").glob("offline-run-*")) - first)]
    assert len(folders) == 2
    assert all(f"wandb sync {folder}" in caplog.text for folder in folders)

    starts = [inspect(folder, "run")[0] for folder in folders]
    assert [(s["run_id"], s["resume"]) for s in starts] == [(run_id, True)] * 2, "a resume is another run to W&B"
    assert starts[0]["config"]["update"]["optim"] == {"lr": 0.25}
    assert [starts[0][name] for name in ("notes", "job_type", "entity")] == [r"a note \xe9", "study", "lab"]
    history = [[r["item"] for r in inspect(folder, "history")] for folder in folders]
    steps = [
        (row["global_step"], name)
        for run in history
        for row in run
        for name in ("train/loss", "epoch/epoch")
        if name in row
    ]
    assert steps == [(1, "train/loss"), (2, "train/loss"), (3, "train/loss"), (3, "epoch/epoch"), (4, "train/loss")]
    assert [row["train/loss"] for row in history[1] if "train/loss" in row] == [0.25]

    names = {name for row in history[0] for name in row}
    assert "val/accuracy" in names
    assert not [name for name in names if name.startswith("epoch/val/")], "the prefix is double"
    check_media(folders[1])
    files = {p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file()}
    pictures = [np.asarray(Image.open(io.BytesIO(f))).tolist() for f in files if f.startswith(b"\x89PNG")]
    assert sorted(pictures) == sorted(finished.images.tolist())
    assert {b"checkpoints/best/4/model/d", b"config.json"} <= files, "the artifact is not a whole run"
    assert not {b"checkpoints/best/2/model/d", b"checkpoints/last/4/model/d"} & files
    (artifact,) = [a for a in inspect(folders[1], "artifact") if a["name"] == f"best-{run_id}"]
    assert artifact["type"] == "model"
    summary = {k: v for r in inspect(folders[1], "summary") for k, v in r.get("update", {}).items()}
    assert summary["val/accuracy"] == pytest.approx(1 / 3), "the best checkpoint's, not the last epoch's"
    assert summary["best/step"] == 4


def test_wandb_with_a_key_the_server_refuses_goes_offline(no_key, tmp_path, monkeypatch, caplog):
    import wandb

    starts = []
    original = wandb.init

    def init(*, mode, **options):
        starts.append(mode)
        if mode == "online":
            raise wandb.Error("401 Unauthorized")
        return original(mode=mode, **options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "why_offline", lambda: None)
    with caplog.at_level(logging.WARNING):
        make_tracker(TrackingConfig(wandb="auto"), tmp_path, new_run_id(), {}).close()
    assert starts == ["online", "offline"]
    assert "401 Unauthorized, so the run is logged offline" in caplog.text


def test_importing_the_module_does_not_import_wandb():
    code = "import sys, bmjax.runs.tracking; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0


@pytest.fixture
def server(monkeypatch):
    """A server that takes connections and never answers; counts them."""
    connections = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connections.append(listening.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield connections
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    for connection in connections:
        connection.close()


def test_the_users_environment_decides_and_nothing_goes_out(no_key, server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = make_tracker(TrackingConfig(wandb="auto"), tmp_path, new_run_id(), {"name": "r"})
    tracker.log(1, {"loss": 1.0}, kind="train")
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert server == []


@pytest.mark.parametrize(("mode", "said"), [("Offline", ""), ("dryrun", ""), ("ofline", "WANDB_MODE is 'ofline'")])
def test_the_environment_names_the_mode_and_the_project(no_key, tmp_path, monkeypatch, caplog, mode, said):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_PROJECT", "of the environment")
    asked = {}
    monkeypatch.setattr("wandb.init", lambda **options: asked.update(options) or SimpleNamespace(
        dir=str(tmp_path), define_metric=lambda *a, **k: None, finish=lambda: None
    ))  # fmt: skip
    make_tracker(TrackingConfig(wandb="auto"), tmp_path, new_run_id(), {"name": "r"}).close()
    assert (asked["mode"], asked["project"]) == ("offline", "of the environment")
    assert said in caplog.text
    make_tracker(TrackingConfig(wandb="auto", project="of the field"), tmp_path, new_run_id(), {"name": "r"}).close()
    assert asked["project"] == "of the field"


def test_what_the_record_lacks_is_said(path, caplog):
    write(path, [1, 2, 5])
    JsonlTracker(path, resumed_at=6).close()
    assert f"{path} lacks 3 of the 6 steps trained so far, the first of them step 3" in caplog.text
    path.unlink()
    JsonlTracker(path, resumed_at=2).close()
    assert "lacks 2 of the 2 steps trained so far, the first of them step 1" in caplog.text
    caplog.clear()
    write(path, [1, 2])
    JsonlTracker(path, resumed_at=2).close()
    assert caplog.text == ""
    path.write_text(path.read_text() + '{"kind": "tr')
    JsonlTracker(path, resumed_at=2).close()
    assert "the last line is not whole, and is cut off" in caplog.text


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_names_the_record(path):
    tracker = JsonlTracker(path)
    tracker._file.close()
    tracker._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device; free some space and go on with --resume: '.*jsonl'"):
        tracker.log(1, {}, kind="train")
    tracker.close()


def test_a_run_of_an_agent_has_the_agents_id(monkeypatch):
    assert agents_run() is None
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert agents_run() is None, "an id alone would be shared by all runs of this process"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    assert agents_run() == new_run_id() == "abc123"


def test_a_sweep_is_registered_where_there_is_a_server(no_key, monkeypatch, caplog):
    import wandb

    assert tracking.register_sweep({"method": "grid"}, "lab") is None
    assert "there is no key, so the sweep is not registered" in caplog.text
    calls = []
    monkeypatch.setattr(tracking, "why_offline", lambda: None)
    monkeypatch.setattr(wandb, "sweep", lambda tree, entity, project: calls.append((tree, entity, project)) or "id7")
    assert tracking.register_sweep({"method": "grid"}, "lab", "team") == "id7"
    assert calls == [({"method": "grid"}, "team", "lab")]
