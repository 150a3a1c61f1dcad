"""Names of classes and files are any text: shown as they are, whatever they look like to a reader of mark-up."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from bmjax.analysis.report import figures
from bmjax.analysis.report.report import figure_result, write_report
from bmjax.cli.output import print_confusion
from bmjax.config import Config, to_json
from bmjax.data.dataset import Dataset
from bmjax.data.splits import Splits, dataset_summary, read_split, write_split
from bmjax.files import printable
from bmjax.runs.folder import save_predictions
from bmjax.runs.metrics import classification_metrics
from bmjax.runs.records import read_predictions
from bmjax.runs.tracking import _shown

NAMES = (
    *(
        "$x^$",
        r"$\frac$",
        r"\$",
        "$",
        "<script>alert(1)</script>",
        "a & b",
        "two\nlines",
        "tab\there",
        "\udce9",
        "\x1b[31mred",
    ),
    *("細胞", "🩸", "nan", "path", "a,b;c", '"quoted"', " spaces ", "{}", "%s", "_^"),
)


@pytest.fixture
def run(tmp_path):
    """A run's folder with such classes and files, as train() leaves it, and its data."""
    k = len(NAMES)
    labels = np.tile(np.arange(k), 3).astype(np.int32)
    images = np.random.default_rng(0).integers(0, 256, (3 * k, 8, 8, 3), np.uint8)
    ids = tuple(f"{NAMES[label]}/{i}\udce4.png" for i, label in enumerate(labels))
    hashes = tuple(f"{i:064x}" for i in range(3 * k))
    dataset = Dataset("d", NAMES, images, labels, ids, hashes, "f" * 64, skipped=(("\udce9/bad.png", "empty"),))
    splits = Splits(*(np.arange(k * i, k * (i + 1)) for i in range(3)))
    (tmp_path / "config.json").write_text(to_json(Config(name="a $ \udce9")))
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_summary(dataset, splits)))
    write_split(tmp_path / "split.csv", dataset, splits)
    probs = np.random.default_rng(1).dirichlet(np.ones(k), k).astype(np.float32)
    save_predictions(tmp_path, "test", dataset, probs, splits.test)
    metrics = classification_metrics(labels[splits.test], probs) | {"step": 1, "checkpoint": "best"}
    (tmp_path / "results.json").write_text(json.dumps({"test": metrics}))
    return tmp_path, dataset, splits


def test_a_report_shows_them(run):
    folder, dataset, splits = run
    source = write_report(folder, np.asarray(dataset.images)).read_text(encoding="utf-8")
    assert source.count("<script>") == 1, "its own"
    assert "alert(1)</script>" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    for name in (r"\xe9", "$x^$", r"$\frac$", "細胞"):
        assert f'<th scope="row">{name}</th>' in source, name
    assert r"\x1b[31mred" in source
    write_report(folder)
    figure_result(folder, np.asarray(dataset.images), folder / "result.png")
    with Image.open(folder / "result.png") as picture:
        assert picture.size[0] > 100
    assert read_split(folder / "split.csv", dataset).equals(splits)
    found = read_predictions(folder, "test")
    assert found is not None
    assert tuple(found.classes) == NAMES
    assert [str(name) for name in found.ids] == [dataset.ids[i] for i in splits.test]
    assert tuple(json.loads((folder / "dataset.json").read_text())["classes"]) == NAMES


def test_maps_over_images_show_them():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    titles = [(f"{name}, taken for\n$y", figures.WRONG) for name in NAMES[:2]]
    figure = figures.explanations(images, titles, {"a": np.ones((2, 4, 4))}, ["$a_"])
    figures.save(figure, io.BytesIO(), 50)


def test_a_terminal_shows_them(capsys):
    k = len(NAMES)
    print_confusion(np.eye(k, dtype=int).tolist(), NAMES)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == k + 1
    assert r"\xe9" in out
    assert "\x1b" not in out


def test_wandb_is_sent_text_that_can_be_sent():
    json.dumps(_shown({"\udce9": ["\udce4", 1.5, ("a\nb", None)]}), ensure_ascii=False).encode()
    assert _shown({"a": ("x", 1)}) == {"a": ["x", 1]}


@given(st.text(st.characters() | st.sampled_from("$\\\n\udce9\udc80\ud800_^{}")))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_shown(text):
    shown = printable(text)
    assert shown.encode().decode() == shown
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    drawn, formula = Text()._preprocess_math(figures.literal(text))  # what matplotlib does before it draws
    assert (drawn, formula) == (shown, False)
    drawn, formula = Text()._preprocess_math(figures.literal(text, lines=True))
    assert (drawn, formula) == (printable(text, lines=True), False)


@given(st.binary())
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text_are_shown_by_number(data):
    name = data.decode("utf-8", "surrogateescape")
    assert all(f"\\x{ord(c) - 0xDC00:02x}" in printable(name) for c in name if 0xDC80 <= ord(c) <= 0xDCFF)
