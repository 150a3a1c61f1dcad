import json
import logging

import numpy as np

from bmjax.config import TrackingConfig
from bmjax.tracking import JsonlTracker, NoTracker, make_tracker, new_run_id


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_once_after_a_rewind_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(1, 6):
        tracker.log(step, {"loss": 1.0 / step}, kind="train")
    tracker.log(5, {"val/loss": 0.3}, kind="epoch")
    tracker.close()
    with path.open("a") as f:
        f.write('{"kind": "train", "step": 6, "lo')  # a kill in the middle of a line
    tracker = JsonlTracker(path)
    for step in range(3, 9):  # resumed from step 2
        tracker.log(step, {"loss": 1.0 / step}, kind="train")
    tracker.close()
    records = read(path)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))
    assert [r["step"] for r in records if r["kind"] == "epoch"] == [5]
    assert records[0]["loss"] == 1.0


def test_other_processes_write_nothing(tmp_path):
    assert isinstance(make_tracker(TrackingConfig(), tmp_path, "x", {}, process_index=1), NoTracker)
    assert list(tmp_path.iterdir()) == []


def test_wandb_goes_offline_by_itself_and_takes_everything(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    run_id = new_run_id()
    with caplog.at_level(logging.WARNING):
        tracker = make_tracker(TrackingConfig(wandb="auto"), tmp_path, run_id, {"name": "t", "seed": 1})
        for step in (1, 2):
            tracker.log(step, {"loss": 1.0}, kind="train")
        tracker.log(2, {"val/loss": 0.5}, kind="epoch")
        labels, probs = np.array([0, 1]), np.array([[0.2, 0.8], [0.9, 0.1]], np.float32)
        tracker.summary({"val/accuracy": 0.0})
        tracker.confusion(labels, probs.argmax(-1), ("A", "B"))
        tracker.mispredicted(np.zeros((2, 8, 8, 3), np.uint8), labels, probs, ("a.png", "b.png"), ("A", "B"))
        folder = tmp_path / "best"
        folder.mkdir()
        (folder / "weights").write_text("x")
        tracker.checkpoint_artifact(folder, {"accuracy": 0.0})
        tracker.close()
    assert "there is no key, so the run is logged offline" in caplog.text
    assert "wandb sync" in caplog.text
    runs = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}"))
    assert len(runs) == 1
    assert (runs[0] / f"run-{run_id}.wandb").stat().st_size > 1000
    assert len(read(tmp_path / "metrics.jsonl")) == 3
    (table,) = runs[0].glob("files/media/table/mispredicted*.json")
    rows = json.loads(table.read_text())["data"]
    assert [row[0] for row in rows] == ["a.png", "b.png"]
    assert all(row[1] == "Image" for row in rows), "the pictures are not pictures"
    assert [row[2:4] for row in rows] == [["A", "B"], ["B", "A"]]
    # A resume with the same id logs nothing twice.
    again = make_tracker(TrackingConfig(wandb="offline"), tmp_path, run_id, {"name": "t"})
    again.log(2, {"loss": 1.0}, kind="train")
    again.close()
    assert len(read(tmp_path / "metrics.jsonl")) == 3
