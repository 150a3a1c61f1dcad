"""The report of a run's folder, whole or not, and what it reads there."""

import csv
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from bmjax.analysis.evaluate.scores import score
from bmjax.analysis.report import pictures
from bmjax.analysis.report.facts import read_facts
from bmjax.analysis.report.report import figure_result, interval_text, write_report
from bmjax.runs.metrics import classification_metrics
from bmjax.runs.records import class_rows, most_wrong, read_predictions, read_records, reliability, reported_split
from bmjax.runs.resampling import over_groups
from tests.helpers.run_folder import cells, write_run


@pytest.fixture
def run(tmp_path):
    """A run's folder, and the dataset's images [40, 8, 8, 3]."""
    write_run(tmp_path)
    return tmp_path, cells()


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
        assert dict(attrs).get("href", "#").startswith("#"), "the page refers to another file"
        if tag not in ("img", "meta", "br"):
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
    assert all(src.startswith("data:image/jpeg;base64,") for src in page.images), "the page refers to another file"
    wrong = read_predictions(folder, "test")
    assert len(page.images) == min(12, int((wrong.predicted != wrong.labels).sum()))
    for split in ("train", "val", "test"):
        assert interval_text(results[split], "accuracy") in page.text
    for text in (
        "a & b",
        "weights notop.h5",
        "117 images",
        "opened twice",
        "3.1 % of an epoch's time spent waiting",
        "the file is empty",
        "<b>NIF</b>",
        "50.0 images/s",
        "Not for diagnosis",
        "No patient or slide is recorded",
        f"Expected calibration error {results['test']['ece']:.3f}",
    ):
        assert text in page.text, text
    assert "<b>NIF" not in source, "a class's name is not escaped"
    assert not re.search(r"""(src|href|url\()=?["']?(https?:)?//""", source), "the page refers to a network"
    assert sorted(p.name for p in folder.glob("*report*")) == ["report.html"], "a temporary file stays"


def test_scores_are_those_of_eval(run):
    folder, _ = run
    predictions = read_predictions(folder, "test")
    computed = score(predictions.labels, predictions.probs, predictions.classes).to_json()
    text = Page(write_report(folder).read_text()).text
    assert f"{computed['scores']['kappa']['value']:.3f}" in text
    kept = json.loads(json.dumps(computed))
    kept["scores"]["kappa"]["value"] = 0.12345
    (folder / "evaluation_test.json").write_text(json.dumps(kept))
    assert "0.123" in Page(write_report(folder).read_text()).text, "what eval wrote is not read"
    kept["confusion"][0][0] += 1
    (folder / "evaluation_test.json").write_text(json.dumps(kept))
    assert "0.123" not in Page(write_report(folder).read_text()).text, "scores of other predictions are shown"


def test_intervals_are_over_groups_in_the_report_and_the_card(run):
    """Where the data name groups: in results.json, and what is computed for the page."""
    folder, images = run
    saved = read_predictions(folder, "test")
    assert saved is not None
    groups = [f"slide {i // 4}" for i in range(len(saved.labels))]
    with (folder / "split.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("path", "group"), *zip(saved.ids.tolist(), groups, strict=True)])
    results = json.loads((folder / "results.json").read_text())
    metrics = classification_metrics(saved.labels, saved.probs, intervals=True)
    results["test"] = over_groups(metrics, saved.labels, saved.predicted, groups)
    (folder / "results.json").write_text(json.dumps(results))
    facts = read_facts(folder)
    assert facts.by == "a bootstrap over 10 groups"
    accuracy = facts.scores["scores"]["accuracy"]
    assert accuracy["by"] == "bootstrap over 10 groups"
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(
        (results["test"]["accuracy_low"], results["test"]["accuracy_high"])
    )
    row, own = facts.classes[0], results["test"]["per_class"][0]
    assert (row["recall_low"], row["recall_high"]) == (own["recall_low"], own["recall_high"])
    write_report(folder, images)
    page, card = (folder / "report.html").read_text(), (folder / "model_card.md").read_text()
    for text in (page, card):
        assert "a bootstrap over 10 groups" in text
        assert "Wilson" not in text


def test_predictions_that_are_no_numbers_are_left_out_and_said(run, caplog):
    folder, _ = run
    found = read_predictions(folder, "test")
    probs = found.probs.copy()
    probs[3] = np.nan
    arrays = {name: getattr(found, name) for name in ("labels", "index", "ids")}
    np.savez(folder / "predictions_test.npz", probs=probs, classes=np.array(found.classes), **arrays)
    text = Page(write_report(folder).read_text()).text
    assert f"1 of {len(probs)} rows hold no numbers" in caplog.text
    assert "Confusion, test" not in text
    assert "balanced accuracy" in text


def test_without_images_mistakes_are_listed_by_name(run):
    folder, images = run
    page = Page(write_report(folder).read_text())
    assert page.images == []
    wrong = read_predictions(folder, "test")
    assert str(wrong.ids[most_wrong(wrong, 1)[0]]) in page.text
    assert Page(write_report(folder, images[:5]).read_text()).images == [], "images of other data are shown"


def test_results_and_predictions_that_do_not_fit_are_refused(run):
    folder, _ = run
    results = json.loads((folder / "results.json").read_text())
    results["test"]["n"] = 41
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"predictions_test.npz has 40 images, results.json 41; `bmjax eval"):
        write_report(folder)


@pytest.mark.parametrize("name", ["name", "n", "classes", "image_size", "fingerprint"])
def test_a_damaged_record_of_the_data_is_named(run, name):
    path = run[0] / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: None}))
    with pytest.raises(ValueError, match=rf"dataset.json is damaged: its '{name}' is 'None'; expected it as"):
        write_report(run[0])


def test_the_card_says_what_the_run_is_and_is_not(run):
    folder, _ = run
    write_report(folder)
    card, m = (folder / "model_card.md").read_text(), json.loads((folder / "results.json").read_text())["test"]
    titles = re.findall(r"^## (.*)", card, re.MULTILINE)
    assert titles == ["Intended use", "Not for", "Model", "Training data", "Metrics", "Limits", "Environment"]
    assert "Not for diagnosis" in card
    assert f"n = 40: accuracy {100 * m['accuracy']:.1f} %" in card
    assert r"\<b\>NIF\</b\>" in card, "a class's name is markup"
    assert "Classes with fewer than 30 images in test, whose own figures are uncertain: BLA (14)" in card
    (folder / "results.json").unlink()
    write_report(folder)
    assert "no results yet" in (folder / "model_card.md").read_text()


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
    assert "opened once" not in text
    assert "opened twice" not in text


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
    folder, images = run
    predictions = read_predictions(folder, "test")
    right = dataclasses.replace(predictions, labels=predictions.predicted)
    assert pictures.mistakes(right, images) == ([], [])
    assert len(pictures.chosen(right)) == 40


def test_cells_are_chosen_mistakes_first(run):
    predictions = read_predictions(run[0], "test")
    rows = pictures.chosen(predictions, most=20, each=3)
    wrong = most_wrong(predictions, 40)
    assert rows[: len(wrong)].tolist() == wrong[:20].tolist()
    assert len(rows) == len(set(rows.tolist())) == min(20, len(wrong) + 9)


def test_figures_leave_no_state_and_need_no_display(run):
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    write_report(run[0], run[1])
    assert matplotlib.get_backend(auto_select=False) == before


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", {"stages": 5}, "stages"),
        ("config.json", {"model": None}, "model"),
        ("dataset.json", {"counts": [1]}, "its 'counts' is '[1]'"),
        ("dataset.json", {"counts": {"val": 5}}, "its counts of 'val' is '5'"),
        ("dataset.json", {"classes": [1]}, "its 'classes' is '[1]'"),
        ("environment.json", {"sessions": 5}, "its 'sessions' is '5'"),
        ("environment.json", {"sessions": ["a"]}, "one of its sessions is 'a'"),
        ("environment.json", {"sessions": [{"command": 5}]}, "'command' of one of its sessions is '5'"),
        ("results.json", {"val": 5}, "its entry 'val' is '5'"),
        ("results.json", {"val": {"step": 3}}, "'n' of 'val' is 'None'"),
        ("results.json", {"val": {"step": 3, "n": 13, "accuracy": "high"}}, "'accuracy' of 'val' is 'high'"),
    ],
)
def test_a_record_damaged_in_content_is_named(run, name, change, words):
    path = run[0] / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    with pytest.raises(ValueError, match=re.escape(words)) as e:
        write_report(*run)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("field", "value"), [("confusion", [[1]]), ("per_class", 5)])
def test_figures_of_other_classes_are_named(run, field, value):
    path = run[0] / "results.json"
    results = json.loads(path.read_text())
    results["test"][field] = value
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"results.json is damaged: '{field}' of 'test'"):
        write_report(*run)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"kind": "train", "step": 1}, "'time' of the record 1 of the kind 'train' is 'None'"),
        ({"kind": "epoch", "step": 1, "time": 1.0, "epoch": "one"}, "'epoch' of the record 1 of the kind 'epoch'"),
    ],
)
def test_a_damaged_record_of_training_is_named(run, record, words):
    path = run[0] / "metrics.jsonl"
    path.write_text(json.dumps(record) + "\n" + path.read_text())
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: {words}")):
        write_report(*run)


def test_damaged_scores_of_eval_are_named(run):
    results = json.loads((run[0] / "results.json").read_text())
    classes = read_predictions(run[0], "test").classes
    path = run[0] / "evaluation_test.json"
    path.write_text(json.dumps({"confusion": results["test"]["confusion"], "classes": classes, "scores": 5}))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
        write_report(*run)
