"""Cells of a sweep: grids, draws, names, and the page and tables of rows. Nothing is trained."""

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from bmjax.analysis.sweep import halving, workers
from bmjax.analysis.sweep.cells import Range, cells_of, draws, experiment_cells, grid, parse_space
from bmjax.analysis.sweep.page import pairs, parallel, write_page
from bmjax.analysis.sweep.plan import Plan, Tune, load, save
from bmjax.analysis.sweep.run import Sweep
from bmjax.analysis.sweep.table import text_table, write_tables
from bmjax.config import Config
from bmjax.config.experiment import load_experiment
from bmjax.registry import import_file


def test_a_grid_is_every_combination():
    space = parse_space(
        ["optim.name=adagrad,sgd", "train.batch_size=16,32", "seed=0:5:2", "optim.lr=none,1e-2", "augment.flip=false"]
    )
    assert space == {
        "optim.name": ["adagrad", "sgd"],
        "train.batch_size": [16, 32],
        "seed": [0, 2, 4],
        "optim.lr": [None, 0.01],
        "augment.flip": [False],
    }
    found = grid(space)
    assert len(found) == 24
    assert len({repr(one) for one in found}) == 24
    configs = [cell.config for cell in cells_of(Config(), found)]
    assert {(c.optim.name, c.train.batch_size, c.seed, c.optim.lr) for c in configs} == {
        (name, size, seed, lr)
        for name in ("adagrad", "sgd")
        for size in (16, 32)
        for seed in (0, 2, 4)
        for lr in (None, 0.01)
    }


def test_values_are_lists_words_and_numbers_as_the_field_takes_them():
    space = parse_space(["model.head.widths=[256],[128]", "data.root=1,2..3", "stages.0.train=['head']"])
    assert space == {"model.head.widths": [[256], [128]], "data.root": ["1", "2..3"], "stages.0.train": [["head"]]}
    cell = cells_of(Config(), grid(space))[0]
    assert (cell.config.model.head.widths, cell.config.data.root, cell.config.stages[0].train) == (
        (256,),
        "1",
        ("head",),
    )


def test_draws_are_within_their_ranges_different_and_seeded():
    space = parse_space(["optim.lr=1e-4..1e-1", "model.head.dropout=0.1..0.5", "train.batch_size=16,32", "seed=0..9"])
    assert space["optim.lr"] == Range(1e-4, 1e-1, log=True)
    assert space["model.head.dropout"] == Range(0.1, 0.5)
    assert space["seed"] == Range(0, 9, whole=True)
    found = draws(space, 300, seed=1)
    assert found == draws(space, 300, seed=1) != draws(space, 300, seed=2)
    assert len({repr(one) for one in found}) == 300
    rates = [one["optim.lr"] for one in found]
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-1
    assert 60 < sum(rate < 1e-3 for rate in rates) < 140, "a third of the logarithm's length"
    assert {one["seed"] for one in found} == set(range(10))
    assert len(draws(parse_space(["seed=0:3"]), 10)) == 3, "no more than there are"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.name"], "expected FIELD=VALUE,VALUE"),
        (["optim.nam=sgd"], "unknown field 'optim.nam'; did you mean 'optim.name'"),
        (["seed=1", "seed=2"], "names seed twice"),
        (["seed=1,1"], "names a value twice"),
        (["seed=5:5"], "names no value"),
        (["optim.lr=1e-1..1e-4"], "the smaller bound first"),
        (["optim.lr=1e-4..1e-1"], "is a range; expected values"),
        (["optim.lr=-1"], r"optim\.lr"),
        (["optim.name=adamaxx"], "adamaxx"),
        (["optim.lr=1e-4..1e999"], r"'optim\.lr=1e-4\.\.1e999' has no end; expected finite bounds"),
        (["seed=0.." + "9" * 400], "has no end"),
        (["optim.lr=-1e308..1e308"], "has no end"),
        (["optim.lr=1e999"], r"'optim\.lr' is inf; expected text, a finite number"),
        (["optim.lr=1j"], r"'optim\.lr' is 1j; expected text, a finite number"),
        (["model.head.widths={64},{128}"], r"'model\.head\.widths' is \{64\}; expected"),
        (["model.head.widths=[b'x']"], r"'model\.head\.widths' is b'x'; expected"),
        (["model.head.widths={[]}"], r"'model\.head\.widths' is '\{\[\]\}'; expected"),
        (["optim.options={1: 2}"], r"'optim\.options' is \{1: 2\}; expected a dict with names as keys"),
        (["model.head.widths=" + "[" * 60 + "]" * 60], "'model.head.widths' has brackets within each other"),
        (["seed=0:5:0"], "'seed=0:5:0' has the step 0; expected START:STOP:STEP"),
        (["seed=0:99999999999999"], r"names 99999999999999 values; expected at most 100000, .* 0\.\.99999999999998"),
        (["seed=0:" + "9" * 5000], "of fewer digits"),
        (["seed=0:1000", "train.batch_size=1:1001"], r"1000000 combinations \(1000 of seed, 1000 of train\.batch"),
    ],
)
def test_wrong_grids_are_said(words, message):
    with pytest.raises(ValueError, match=message) as e:
        cells_of(Config(), grid(parse_space(words)))
    assert "\n" not in str(e.value)


def test_numbers_of_a_grid_are_whole_or_not_as_they_are_written():
    space = parse_space(["seed=01..09", "optim.lr=+1e-1..0.5", "train.batch_size=1:100001", "stages.0.epochs=5:4:1,3"])
    assert space["seed"] == Range(1, 9, whole=True)
    assert space["optim.lr"] == Range(0.1, 0.5)
    assert len(space["train.batch_size"]) == 100_000  # type: ignore[arg-type]
    assert [len(parse_space([f"seed=0:{stop}:3"])["seed"]) for stop in (1, 3, 4, 6, 7)] == [1, 1, 2, 2, 3]  # type: ignore[arg-type]


def test_draws_end_where_there_are_no_others():
    with pytest.raises(ValueError, match=r"--random is 5, but --grid optim\.lr=0\.1\.\.0\.1001 gave only 2 different"):
        draws(parse_space(["optim.lr=0.1..0.1001"]), 5)
    found = draws(parse_space(["optim.lr=0.1..0.1001"]), 2)
    assert sorted(one["optim.lr"] for one in found) == [0.1, 0.1001]
    narrow = draws(parse_space(["optim.lr=0.10004..0.10006"]), 2)
    assert {one["optim.lr"] for one in narrow} == {0.10004, 0.10006}, "four digits alone would be outside of the range"
    assert len(draws(parse_space(["seed=0..999"]), 999)) == 999, "nearly all there are"
    for n in (0, 10**9):
        with pytest.raises(ValueError, match=f"--random is {n}; expected at least 1"):
            draws({"optim.lr": Range(0.1, 1.0)}, n)


def test_each_cell_has_a_name_and_a_folder(tmp_path):
    path = tmp_path / "e.py"
    path.write_text(
        "from bmjax.config import Config\ndef config(): return Config(name='e')\ndef sweep():\n"
        "    for lr in (0.1, 0.01): yield {'optim.lr': lr, 'data.root': 'a/b'}\n    yield {'name': 'last'}\n"
    )
    config, module = load_experiment(str(path))
    found = experiment_cells(config, module, str(path))
    assert [c.name for c in found] == ["lr=0.1,root=a_b", "lr=0.01,root=a_b", "last"]
    assert [c.config.run_dir for c in found] == [f"runs/e/{c.name}" for c in found]
    assert [c.config.optim.lr for c in found] == [0.1, 0.01, None]
    assert {c.config.tracking.group for c in found} == {"e"}
    assert found[2].changes == {}
    below = cells_of(Config(name="e", run_dir="runs/s"), [{"optim.name": "sgd", "model.head.name": "study"}])
    assert below[0].config.run_dir == "runs/s/optim.name=sgd,head.name=study", "as much of a name as tells fields apart"
    long = cells_of(Config(), [{"data.root": "x" * 300 + str(i)} for i in range(2)])
    assert len({c.name for c in long}) == 2
    assert max(len(c.name) for c in long) < 140


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "a sweep of no cell"),
        ([{"name": "a"}, {"name": "a"}], "the same name: a"),
        ([{"data.root": "a b"}, {"data.root": "ab"}], "the same name"),
        ([{"optim.lrr": 1}], "did you mean 'lr'"),
        ([{"data.root": Path("a")}], r"'data\.root' is PosixPath\('a'\); expected text, as str\(\) of it is 'a'"),
        ([{1: 2}], r"\{1: 2\} for a cell; expected a dict of fields"),
        ([("optim.lr", 0.1)], r"\('optim\.lr', 0\.1\) for a cell; expected a dict of fields"),
        ({"optim.lr": 0.1}, r"\{'optim\.lr': 0\.1\}; expected a list of dicts"),
        (None, "None; expected a list of dicts"),
        (({"seed": i} for i in range(10**6)), "more than 100000 cells"),
    ],
)
def test_wrong_changes_are_said(changes, message):
    with pytest.raises(ValueError, match=message):
        cells_of(Config(), changes)


def test_values_of_numpy_are_those_of_the_record():
    """And the name is as before, so that a sweep goes on in its folders."""
    changes = {"seed": np.int64(3), "optim.lr": np.float64(0.1), "model.head.widths": (np.int32(8),)}
    (cell,) = cells_of(Config(), [changes])
    assert repr(cell.changes) == "{'seed': 3, 'optim.lr': 0.1, 'model.head.widths': [8]}"
    assert (cell.config.seed, cell.config.optim.lr, cell.config.model.head.widths) == (3, 0.1, (8,))
    assert cells_of(Config(), [{"model.head.widths": (8,)}])[0].name == "widths=_8,"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sweep = [{'seed': 1}]", r"e\.py: sweep is \[\{'seed': 1\}\]; expected a function"),
        ("def sweep(): pass", r"e\.py: sweep\(\) gives None; expected a list of dicts"),
        ("def sweep(): return {'seed': 1}", r"e\.py: sweep\(\) gives \{'seed': 1\}; expected a list of dicts"),
        ("def sweep(): return ('seed', 1)", r"e\.py: sweep\(\) gives 'seed' for a cell; expected a dict of fields"),
        ("def sweep():\n    return lrs", r"e\.py, line 2: NameError: name 'lrs' is not defined"),
        ("def sweep():\n    yield {}\n    yield 1 / 0", r"e\.py, line 3: ZeroDivisionError"),
        ("def sweep():\n    while True: yield {}", r"e\.py: sweep\(\) gives more than 100000 cells"),
        ("def sweep(): yield {'name': 'a', 'seed': 1j}", "'seed' is 1j; expected"),
    ],
)
def test_what_an_experiments_sweep_gives_is_held_to_its_form(tmp_path, body, message):
    path = tmp_path / "e.py"
    path.write_text(body)
    with pytest.raises(ValueError, match=message) as e:
        experiment_cells(Config(), import_file(path), str(path))
    assert "\n" not in str(e.value)


def test_an_experiments_sweep_may_give_a_tuple_or_a_map(tmp_path):
    for i, given in enumerate(("({'seed': 1}, {'seed': 2})", "map(lambda i: {'seed': i}, (1, 2))")):
        path = tmp_path / f"e{i}.py"
        path.write_text(f"def sweep(): return {given}")
        assert [c.name for c in experiment_cells(Config(), import_file(path), str(path))] == ["seed=1", "seed=2"]


def test_an_experiment_without_a_sweep_needs_a_grid():
    with pytest.raises(ValueError, match=r"e\.json: has no sweep\(\); expected one .*--grid"):
        experiment_cells(Config(), None, "e.json")


@pytest.mark.parametrize(
    ("cells", "epochs", "eta", "expected"),
    [(27, 27, 3, [1, 3, 9]), (20, 15, 3, [1, 5]), (4, 15, 2, [3, 7]), (1, 10, 3, []), (9, 2, 3, []), (8, 4, 2, [1, 2])],
)
def test_rungs(cells, epochs, eta, expected):
    assert halving.rungs(cells, epochs, eta) == expected


def test_a_plan_is_read_as_it_was_written(tmp_path):
    config = Config(name="e", run_dir=str(tmp_path))
    for plan in (
        Plan(config, tuple(cells_of(config, [{"seed": 1}, {"seed": 2}])), 2, 3, "e.py"),
        Plan(config, (), tune=Tune("sqlite:///x", 3, {"optim.lr": Range(0.1, 1.0), "seed": [1, 2]})),
    ):
        save(plan)
        assert load(tmp_path) == plan
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
        load(tmp_path)


@pytest.fixture
def rows():
    """Rows as finished, paused and failed cells leave them; one name that a page must not run."""
    found = []
    for i, name in enumerate(("adam", "sgd", "<script>alert(1)</script>")):
        for size in (16, 32):
            accuracy = 0.5 + 0.05 * i + size / 1000
            row = {"cell": f"{name},{size}", "optim.name": name, "train.batch_size": size, "status": "finished"}
            row |= {"error": "", "run_dir": f"runs/{i}", "epochs": 3, "score": accuracy, "best_epoch": 2}
            row |= {"val/accuracy": accuracy, "val/accuracy_low": 0.4, "val/accuracy_high": 0.9, "val/n": 40}
            found.append(row | {"seconds": 1.0, "images_per_second": 10.0})
    missing = ("score", "best_epoch", "val/accuracy", "val/accuracy_low", "val/accuracy_high", "val/n")
    failed = {k: v for k, v in found[0].items() if k not in missing} | {"status": "failed", "error": "E: <b>\u00e9"}
    return [failed, *found[1:]]


def test_tables_hold_every_row(rows, tmp_path):
    write_tables(tmp_path, rows)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    assert [row["val/accuracy"] for row in read] == [str(row.get("val/accuracy", "")) for row in rows]
    assert list(read[0])[-2:] == ["seconds", "images_per_second"]
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["val/accuracy"] for row in table] == [row.get("val/accuracy") for row in rows]
    assert [row["optim.name"] for row in table] == [row["optim.name"] for row in rows]
    lines = text_table(rows, ["optim.name"], "accuracy", falls=False).splitlines()
    assert "0.632 (0.400 to 0.900)" in lines[2], "the best first"
    assert "failed after 3 epochs: E: <b>" in lines[-1]


def test_the_page_is_whole_and_runs_nothing(rows, tmp_path):
    sweep = Sweep(tmp_path, ("optim.name", "train.batch_size"), "accuracy", False, rows)
    assert sweep.best == rows[-1]
    write_page(sweep)
    page = (tmp_path / "sweep.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"https?://|src=|href=", page)
    assert page.count("<svg") == 2
    assert page.count("<polyline") == 5, "a line for each cell that has the figure"
    assert page.count("<rect") == 6
    assert f"{0.5 + 0.032:.3f}" in page


def test_the_best_is_the_smallest_where_the_figure_falls(rows):
    assert Sweep(Path(), ("optim.name",), "loss", True, rows).best == rows[1]


def test_pictures_leave_out_what_they_cannot_show(rows):
    assert pairs(rows, ["optim.name"]) == []
    assert pairs(rows, ["optim.name", "train.batch_size", "run_dir"]) != []
    assert pairs([row | {"seed": i} for i, row in enumerate(rows)], ["optim.name", "seed"]) == [("optim.name", "seed")]
    assert parallel(rows[:2], ["optim.name"], "val/accuracy", False) == "", "one row alone has the figure"


def test_workers_share_cores_or_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 1, 2, 0, 5}, raising=False)
    assert workers.shares(2) == [{"cores": "0,1"}, {"cores": "2,3,5"}]
    with pytest.raises(ValueError, match="--workers is 6; expected 1 to 5, the number of cores here"):
        workers.shares(6)
    monkeypatch.setattr("bmjax.environment.gpu_expected", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7")
    assert workers.shares(2) == [{"cores": "0,1", "gpu": "2"}, {"cores": "2,3,5", "gpu": "GPU-7"}]
    with pytest.raises(ValueError, match="expected 1 to 2, the number of GPUs here"):
        workers.shares(3)
