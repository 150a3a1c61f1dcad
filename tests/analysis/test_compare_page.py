"""The page of a comparison: who is beaten by none, who can't be told apart, and that everything stands in one file."""

import json

import numpy as np
import pytest

from bmjax.analysis.compare import statistics
from bmjax.analysis.compare.cost import Cost
from bmjax.analysis.compare.page import track, write_page
from bmjax.analysis.compare.picture import cliques, pareto
from bmjax.analysis.compare.table import Comparison, verdicts
from bmjax.config.training import TrackingConfig
from tests.helpers.verdicts import draw


def test_the_front_holds_who_is_beaten_by_none():
    accuracies, costs = [60.0, 70.0, 65.0, 70.0, 80.0], [0.0, 10.0, 20.0, 10.0, 30.0]
    assert pareto(accuracies, costs) == [0, 1, 4]
    assert pareto([5.0], [1.0]) == [0]


def test_bars_join_longest_stretches_of_which_no_two_differ():
    assert cliques("abcd", [("a", "d")]) == [(0, 2), (1, 3)]
    assert cliques("abc", []) == [(0, 2)]
    assert cliques("abc", [("b", "a"), ("a", "c"), ("b", "c")]) == []


@pytest.fixture(scope="module")
def comparison():
    hits = draw(np.random.default_rng(0), 4, 5, 800, 0.5, worse=30.0)
    hits = dict(zip(("none", "<b>$x^$", "se", "eca"), hits.values(), strict=True))
    rows = tuple(statistics.compare(hits, "none"))
    costs = {name: Cost(100 * i, 1e6 * (i + 1), 1e3 / (i + 1)) for i, name in enumerate(hits)}
    accuracies = {name: tuple(h.mean(1).tolist()) for name, h in hits.items()}
    apart = statistics.told_apart(hits)
    return Comparison("lab", "none", tuple(range(5)), 800, "drawn", rows, costs, accuracies, apart=apart)


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_page(folder, comparison)
    return folder


def test_one_page_without_links(comparison, folder):
    source = (folder / "comparison.html").read_text()
    assert source.count("data:image/png;base64,") == 3
    assert "http" not in source.replace("https://www.w3.org", "")
    assert "<b>$x^$" not in source
    assert "&lt;b&gt;$x^$" in source
    for text in verdicts(comparison):
        assert text.split(": ", 1)[1] in source
    assert ("none", "<b>$x^$") in comparison.apart
    assert all((folder / f"comparison_{name}.png").stat().st_size > 5000 for name in ("cost", "apart", "differences"))


def test_the_table_goes_to_the_group_of_the_runs(comparison, folder):
    pytest.importorskip("wandb")
    track(folder, comparison, TrackingConfig(wandb="offline"))
    run = next((folder / "wandb").glob("offline-run-*"))
    table = json.loads(next(run.rglob("*.table.json")).read_text())
    assert table["columns"][0] == "variant"
    assert [row[0] for row in table["data"]] == [row.variant for row in comparison.rows]
    assert len(list(run.rglob("*.png"))) == 3
