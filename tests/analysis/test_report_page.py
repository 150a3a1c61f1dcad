"""The report in a real browser: nothing goes wrong, entries open by mouse and by keys, and any text is only shown."""

import dataclasses

import numpy as np
import pytest

from bmjax.analysis.report.page import as_json
from bmjax.analysis.report.report import write_report, write_reports
from bmjax.config import Config, ModelConfig
from bmjax.runs.folder import save_arrays
from bmjax.runs.records import read_predictions
from tests.helpers.browser import chromium
from tests.helpers.run_folder import cells, write_run

EVIL = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=alert(1)>",
    "$a\"b'c&amp;",
    "\udce9\n{{7*7}}",
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run whose classes and files have such names, and its page."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder, EVIL)
    p = read_predictions(folder, "test")
    ids = np.array([f"{EVIL[i % 4]}/{i}\u2028.png" for i in range(len(p.ids))])
    save_arrays(folder, "test", **(vars(p) | {"ids": ids, "split": "test"}))
    return write_report(folder, cells())


def task_seconds(page):
    """What the page's main thread has worked so far, in seconds of a core."""
    return {m["name"]: m["value"] for m in page.call("Performance.getMetrics")["metrics"]}["TaskDuration"]


def test_it_opens_without_a_word_and_asks_for_nothing(browser, report):
    page = browser.open(report.as_uri())
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.title") == "a & b"
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.evaluate("document.querySelectorAll('canvas').length") == 7


def test_an_entry_shows_its_cells_by_mouse_and_by_keys(browser, report):
    page, predictions = browser.open(report.as_uri()), read_predictions(report.parent, "test")
    counts = [
        [int(((predictions.labels == t) & (predictions.predicted == p)).sum()) for p in range(4)] for t in range(4)
    ]
    page.click('#confusion-0 [data-t="0"][data-p="0"]')
    assert page.evaluate("document.querySelectorAll('#confusion-0 .cell').length") == counts[0][0]
    page.press("ArrowRight", "ArrowDown", "ArrowRight", "ArrowUp", "Enter")
    pressed = page.evaluate("(b => [b.dataset.t, b.dataset.p])(document.querySelector('[aria-pressed=true]'))")
    assert pressed == ["0", "2"]
    assert page.evaluate("document.querySelectorAll('#confusion-0 .cell').length") == counts[0][2]
    shown = page.evaluate("document.querySelector('#confusion-0 .behind').textContent")
    assert all(
        f"/{i}\\u2028.png" in shown for i in np.flatnonzero((predictions.labels == 0) & (predictions.predicted == 2))
    )
    page.press("Escape")
    assert page.evaluate("document.querySelector('#confusion-0 .behind').hidden")
    assert page.evaluate("document.activeElement.dataset.p") == "2"
    page.click('#classes-0 [data-t="1"][data-wrong]')
    assert page.evaluate("document.querySelectorAll('#classes-0 .cell').length") == sum(counts[1]) - counts[1][1]
    assert page.problems == []


def test_any_text_is_shown_and_never_run(browser, report):
    page = browser.open(report.as_uri())
    page.click('#confusion-0 [data-t="0"][data-p="0"]')
    assert page.evaluate("document.title") == "a & b"
    assert page.evaluate("document.querySelectorAll('img:not(.mistakes img), [onerror]').length") == 0
    heads = page.evaluate("[...document.querySelectorAll('#confusion-0 thead th')].map(e => e.textContent)")
    assert heads == [*EVIL[:3], "\\xe9\n{{7*7}}"]
    assert EVIL[0] in page.text("#confusion-0 .behind h3")


def test_it_fits_a_phone_and_prints(browser, report):
    page = browser.open(report.as_uri(), width=390, height=800, phone=True, dark=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.pdf().startswith(b"%PDF")
    assert page.problems == []


def test_4000_cells_stay_small_and_open_quickly(browser, tmp_path):
    write_run(tmp_path, tuple(f"class {i}" for i in range(7)), n=4000)
    page = write_report(tmp_path, np.kron(cells(4000, 12), np.ones((1, 2, 2, 1), np.uint8)))
    assert page.stat().st_size < 5e6
    opened = browser.open("about:blank")
    opened.call("Performance.enable", {"timeDomain": "threadTicks"})  # other processes may be busy
    before = task_seconds(opened)
    opened.go(page.as_uri())
    assert task_seconds(opened) - before < 2
    opened.click('#confusion-0 [data-t="0"][data-p="0"]')
    assert opened.evaluate("document.querySelectorAll('#confusion-0 .cell').length") == 48
    opened.click("#confusion-0 .behind > button")
    assert opened.evaluate("document.querySelectorAll('#confusion-0 .cell').length") > 48
    assert opened.problems == []


def test_several_runs_stand_side_by_side(browser, tmp_path):
    for name, seed, skill in (("plain", 0, 0.3), ("soft", 1, 0.6)):
        config = Config(name=name, model=ModelConfig(weights=None, attention="none" if name == "plain" else name))
        write_run(tmp_path / name, seed=seed, skill=skill, config=config)
    out = tmp_path / "both.html"
    write_reports([tmp_path / "plain", tmp_path / "soft"], out, [cells(), cells()])
    page = browser.open(out.as_uri())
    page.click('#confusion-1 [data-t="0"][data-p="0"]')
    assert page.evaluate("document.querySelector('#confusion-0 .behind').hidden")
    assert not page.evaluate("document.querySelector('#confusion-1 .behind').hidden")
    text = page.text("main")
    assert "No verdict with one run each" in text
    assert "model.attention" in page.evaluate("document.querySelector('main').textContent")
    assert page.problems == []


def test_json_can_not_end_its_element():
    text = as_json({"a": "</script><!--", "b": "\u2028&"})
    assert not set("<>&\u2028") & set(text)
    with pytest.raises(ValueError, match="Out of range"):
        as_json(float("nan"))


def test_a_report_writes_what_the_configuration_says(tmp_path):
    write_run(tmp_path, config=dataclasses.replace(Config(), name="\udce9 <x>"))
    assert r"\xe9 &lt;x&gt;" in write_report(tmp_path).read_text()
