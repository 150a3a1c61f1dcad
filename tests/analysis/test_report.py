"""The report of a run's folder, whole or not, and what it reads there."""

import dataclasses
import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from bmjax.analysis.report import figures
from bmjax.analysis.report.report import figure_result, interval_text, write_report
from bmjax.config import Config, ModelConfig, to_json
from bmjax.runs.metrics import classification_metrics
from bmjax.runs.records import class_rows, most_wrong, read_predictions, read_records, reliability, reported_split

CLASSES = ("BLA", "EOS", "<b>NIF</b>")


@pytest.fixture
def run(tmp_path):
    """A run's folder as train() leaves it, and the dataset's images [40, 8, 8, 3]."""
    rng = np.random.default_rng(0)
    config = Config(name="a & b", model=ModelConfig(weights="/some/where/notop.h5"))
    (tmp_path / "config.json").write_text(to_json(config))
    counts = {s: dict.fromkeys(CLASSES, n) for s, n in (("train", 30), ("val", 5), ("test", 4))}
    summary = {"name": "cells", "classes": CLASSES, "n": 117, "image_size": 8, "fingerprint": "f" * 64}
    skipped = {"counts": counts, "copies": 2, "skipped": [["BLA/bad.png", "the file is empty"]]}
    (tmp_path / "dataset.json").write_text(json.dumps(summary | skipped))
    results = {}
    for split, n in (("train", 25), ("val", 13), ("test", 40)):
        labels = rng.integers(0, 3, n)
        probs = rng.dirichlet(np.ones(3), n) * 0.6 + 0.4 * np.eye(3)[labels]
        ids = np.array([f"{split}/{i}.png" for i in range(n)])
        arrays = {"labels": labels, "index": np.arange(n), "ids": ids, "classes": np.array(CLASSES)}
        np.savez(tmp_path / f"predictions_{split}.npz", probs=probs.astype(np.float32), **arrays)
        results[split] = classification_metrics(labels, probs) | {"step": 20, "checkpoint": "best"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with (tmp_path / "metrics.jsonl").open("w") as f:
        for step in range(1, 21):
            figures = {"loss": 2.0 / step, "lr": 1e-3, "images_per_second": 50.0}
            f.write(json.dumps({"kind": "train", "step": step, "time": 1e9 + step} | figures) + "\n")
            if step % 10 == 0:
                record = {"epoch": step // 10, "train/loss": 0.5, "train/accuracy_running": 0.7}
                record |= {"val/loss": 0.6, "val/accuracy": 0.65, "input_wait": 0.031}
                f.write(json.dumps({"kind": "epoch", "step": step, "time": 1e9 + step} | record) + "\n")
        f.write('{"kind": "train", "st')  # a kill
    (tmp_path / "openings.jsonl").write_text("{}\n{}\n")
    return tmp_path, rng.integers(0, 256, (40, 8, 8, 3), np.uint8)


class Page(html.parser.HTMLParser):
    """Text, tags and what is referred to; checks that every tag is closed."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.images, self.tags = [], "", [], set()
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
            assert dict(attrs)["alt"]
        assert "href" not in dict(attrs)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def test_report_holds_the_run(run):
    folder, images = run
    path = write_report(folder, images)
    assert path == folder / "report.html"
    source = path.read_text()
    page, results = Page(source), json.loads((folder / "results.json").read_text())
    assert all(src.startswith("data:image/png;base64,") for src in page.images), "the page refers to another file"
    assert len(page.images) == 5
    for split in ("train", "val", "test"):
        assert interval_text(results[split], "accuracy") in page.text
    for text in (
        "a & b",
        "weights notop.h5",
        "117 images",
        "opened 2 times",
        "3.1 % of an epoch's time spent waiting",
        "the file is empty",
        "<b>NIF</b>",
        "50.0 images/s",
    ):
        assert text in page.text, text
    assert "b" in page.tags, "the cards' figures are bold"
    assert "<td><b>" not in source, "a class's name is not escaped"
    assert sorted(p.name for p in folder.glob("*report*")) == ["report.html"], "a temporary file stays"


def test_without_images_mistakes_are_listed_by_name(run):
    folder, images = run
    page = Page(write_report(folder).read_text())
    assert len(page.images) == 4
    wrong = read_predictions(folder, "test")
    assert str(wrong.ids[most_wrong(wrong, 1)[0]]) in page.text
    assert len(Page(write_report(folder, images[:5]).read_text()).images) == 4, "images of other data are shown"


@pytest.mark.parametrize(
    "missing",
    [
        ("results.json",),
        ("dataset.json",),
        ("metrics.jsonl",),
        ("openings.jsonl",),
        ("predictions_test.npz",),
        ("results.json", "dataset.json", "metrics.jsonl", "openings.jsonl", "predictions_test.npz"),
    ],
)
def test_report_of_an_incomplete_run(run, missing):
    folder, images = run
    for name in missing:
        (folder / name).unlink()
    page = Page(write_report(folder, images).read_text())
    assert "a & b" in page.text
    assert ("no results yet" in page.text) == ("results.json" in missing)


def test_report_of_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is not there; expected the folder of a run"):
        write_report(tmp_path)


def test_report_dwells_on_validation_until_the_test_split_is_opened(run):
    folder, _ = run
    path = folder / "results.json"
    results = json.loads(path.read_text())
    assert reported_split(results) == "test"
    path.write_text(json.dumps({"val": results["val"]}))
    (folder / "openings.jsonl").unlink()
    text = Page(write_report(folder).read_text()).text
    assert "Confusion, validation" in text
    assert "opened" not in text


def test_picture_of_the_result(run, tmp_path):
    folder, images = run
    figure_result(folder, images, tmp_path / "result.png")
    with Image.open(tmp_path / "result.png") as picture:
        assert picture.width > picture.height > 200
    (folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no predictions"):
        figure_result(folder, images, tmp_path / "result.png")


def test_records_pass_over_a_torn_line(run):
    assert [r["step"] for r in read_records(run[0], "train")] == list(range(1, 21))
    assert [r["epoch"] for r in read_records(run[0], "epoch")] == [1, 2]
    assert read_records(run[0] / "nowhere", "train") == []


def test_most_wrong_are_wrong_and_sorted(run):
    predictions = read_predictions(run[0], "test")
    places = most_wrong(predictions, 5)
    assert 0 < len(places) <= 5
    assert (predictions.predicted[places] != predictions.labels[places]).all()
    assert (np.diff(predictions.confidence[places]) <= 0).all()
    wrong = predictions.predicted != predictions.labels
    assert predictions.confidence[places[0]] == predictions.confidence[wrong].max()


def test_reliability_bins_hold_every_prediction(run):
    predictions = read_predictions(run[0], "test")
    bins = reliability(predictions)
    hits = (predictions.predicted == predictions.labels).sum()
    assert sum(b.n for b in bins) == 40
    assert sum(b.n * b.accuracy for b in bins) == pytest.approx(hits)
    assert sum(b.n * b.confidence for b in bins) == pytest.approx(predictions.confidence.sum(), rel=1e-5)
    assert all(b.low - 1e-9 <= b.accuracy <= b.high + 1e-9 for b in bins)


def test_class_rows_name_what_a_class_is_taken_for():
    metrics = classification_metrics(np.array([0, 0, 0, 1]), np.eye(3)[[0, 2, 2, 1]])
    rows = class_rows(metrics, ("a", "b", "c"))
    assert [r["confused"] for r in rows] == [("c", 2), None, None]
    assert rows[0]["recall_low"] < 1 / 3 < rows[0]["recall_high"]
    assert (rows[2]["recall_low"], rows[2]["recall_high"]) == (0.0, 1.0), "no image tells nothing"


def test_no_mistakes_no_picture(run):
    predictions = read_predictions(run[0], "test")
    right = dataclasses.replace(predictions, labels=predictions.predicted)
    assert figures.mistakes(right, run[1]) is None


def test_figures_leave_no_state_and_need_no_display(run):
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    write_report(run[0], run[1])
    assert matplotlib.get_backend(auto_select=False) == before
