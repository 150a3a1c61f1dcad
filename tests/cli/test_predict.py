"""`bmjax predict` writes a row for each input, whatever the files and their names are."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import bmjax
import bmjax.training.predict  # binds load_run before a test replaces it
from bmjax.cli import predict
from bmjax.cli.main import main
from bmjax.cli.prediction_table import Block, PredictionTable
from bmjax.config import Config, DataConfig, ModelConfig
from bmjax.runs.folder import Run

CLASSES = ("path", "$x^$", "error")
COLUMNS = ["p(path)", "$x^$", "p(error)"]


@pytest.fixture(scope="module")
def run():
    model = ModelConfig(backbone="densenet_tiny", weights=None, attention="cbam")
    config = Config(data=DataConfig(image_size=32), model=model)
    network = bmjax.create(config.model, 3)
    return Run("nowhere", config, network, bmjax.init(network, jax.random.key(0), 32), CLASSES, 0)


@pytest.fixture
def bmjax_predict(run, monkeypatch, tmp_path):
    """Runs the verb: (exit status, rows as lists, the table's columns)."""
    monkeypatch.setattr("bmjax.runs.folder.load_run", lambda *arguments, **options: run)

    def call(*arguments, ending="csv"):
        out = tmp_path / f"table.{ending}"
        status = main(["predict", "RUN", *map(str, arguments), "--out", str(out)])
        return status, *table_of(out)

    return call


def table_of(path):
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as f:
            columns, *rows = csv.reader(f)
        return rows, columns
    table = pyarrow.parquet.read_table(path)
    return [list(row) for row in zip(*(c.to_pylist() for c in table.columns), strict=True)], table.column_names


def draw(path, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), np.uint8)).save(path, "PNG")


def test_files_may_stand_on_both_sides_of_the_options(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bmjax.runs.folder.load_run", lambda *arguments, **options: run)
    for i, name in enumerate("abc"):
        draw(tmp_path / f"{name}.png", i)
    first, second, third = (str(tmp_path / f"{name}.png") for name in "abc")
    out = str(tmp_path / "table.csv")
    assert main(["predict", "RUN", first, "--out", out, second, "--batch-size", "2", third]) == 0
    assert [row[0] for row in table_of(tmp_path / "table.csv")[0]] == [first, second, third]
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "RUN", "--out", out, first, "--unknown", second])
    assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("at_once", [2, 3, 100])
def test_a_row_for_each_input_in_its_order(bmjax_predict, run, tmp_path, monkeypatch, ending, at_once):
    monkeypatch.setattr(predict, "_PREDICT_AT_ONCE", at_once)
    folder = tmp_path / "cells"
    folder.mkdir()
    (tmp_path / "empty").mkdir()
    names = [os.fsdecode(name) for name in (b"a.png", b"b\xe4.png", b'c, "d"\n.png', "ö.png".encode())]
    for seed, name in enumerate(names):
        draw(folder / name, seed)
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    draw(tmp_path / "z.png", 9)
    given = [tmp_path / "z.png", tmp_path / "missing.png", tmp_path / "empty", folder, tmp_path / "link.png"]
    given += [tmp_path / "pipe.png", tmp_path / "z.png"]
    status, rows, columns = bmjax_predict(*given, ending=ending)
    assert status == 0
    assert columns[:6] == ["path", "predicted", *COLUMNS, "error"]
    inside = [str(folder / name) for name in sorted([*names, "bad.png"])]
    expected = [str(given[0]), str(given[1]), *inside, *map(str, given[4:])]
    where = columns.index("path_bytes") if ending == "parquet" else 0
    found = [os.fsdecode(row[where]) if ending == "parquet" else row[where] for row in rows]
    assert found == expected
    failed = [i for i, row in enumerate(rows) if row[5]]
    assert [expected[i].rsplit("/", 1)[1] for i in failed] == ["missing.png", "bad.png", "link.png", "pipe.png"]
    for i in failed:
        assert all(value in ("", None) for value in rows[i][1:5])
    good = [i for i in range(len(rows)) if i not in failed]
    images = np.stack([np.asarray(Image.open(expected[i])) for i in good])
    probs = np.array([rows[i][2:5] for i in good], np.float32)
    np.testing.assert_allclose(probs, bmjax.predict_probs(run, images), atol=1e-6)
    assert [rows[i][1] for i in good] == [CLASSES[k] for k in probs.argmax(-1)]
    assert not list(tmp_path.glob("*.part*"))


def test_endings_in_capitals_and_tables_as_input(bmjax_predict, tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "cells.csv").write_text("path,label\na.png,x\n")
    (tmp_path / "cells.zip").write_bytes(b"PK")
    status, rows, _ = bmjax_predict(*(tmp_path / name for name in ("cells.csv", "a.png", "cells.zip")), ending="CSV")
    said = "a table or an archive; expected an image, or a folder of images"
    assert (status, [row[-1] for row in rows]) == (0, [said, "", said])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_and_exit_codes(bmjax_predict, tmp_path, capsys, ending):
    draw(tmp_path / "a.png")
    (tmp_path / "bad.png").touch()
    plain = ["path", "predicted", *COLUMNS]
    for arguments, status, columns in (
        (["a.png"], 0, plain),
        (["a.png", "--errors"], 0, [*plain, "error"]),
        (["a.png", "--strict"], 0, plain),
        (["a.png", "bad.png"], 0, [*plain, "error"]),
        (["a.png", "bad.png", "--strict"], 1, [*plain, "error"]),
        (["bad.png"], 1, [*plain, "error"]),
    ):
        given = [a if a.startswith("--") else tmp_path / a for a in arguments]
        found, rows, names = bmjax_predict(*given, ending=ending)
        assert (found, names, len(rows)) == (status, columns, sum(a.endswith("png") for a in arguments)), arguments
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "expected images, or folders of images"),
        ([tmp_path / "a.png", "--batch-size", "0"], "--batch-size is 0; expected at least 1"),
        ([tmp_path / "a.png", "--maps", "/nowhere/maps"], "there is no folder /nowhere"),
        ([tmp_path / "a.png", "--maps", tmp_path / "a.png"], "which is a file; expected a folder"),
    ):
        assert main(["predict", "RUN", *map(str, arguments), "--out", str(tmp_path / "no.csv")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no.csv").exists()
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "Exit status: 0 the table is written" in " ".join(capsys.readouterr().out.split())


def test_what_was_done_before_an_interruption_is_kept(bmjax_predict, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "_PREDICT_AT_ONCE", 1)
    draw(tmp_path / "a.png")
    real = predict.inputs_of

    def stops(paths):
        yield from real(paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "inputs_of", stops)
    out = tmp_path / "o.csv"
    assert main(["predict", "RUN", str(tmp_path / "a.png"), "--out", str(out)]) == 130
    assert not out.exists()
    (part,) = tmp_path.glob("o.csv.*.part")
    with part.open(newline="") as f:
        assert [row[0] for row in csv.reader(f)] == ["path", str(tmp_path / "a.png")]
    assert f"the first 1 rows are in {part}" in capsys.readouterr().err


def test_maps_are_drawn_for_each_readable_image(bmjax_predict, tmp_path):
    names = [b"a.png", b"b\xe4.png"]
    for name in names:
        draw(tmp_path / os.fsdecode(name))
    (tmp_path / "bad.png").touch()
    given = [tmp_path / "bad.png", *(tmp_path / os.fsdecode(name) for name in names)]
    bmjax_predict(*given, "--maps", tmp_path / "maps")
    assert sorted(os.listdir(tmp_path / "maps")) == ["0000001_a.png", "0000002_b_.png"]
    with Image.open(tmp_path / "maps/0000001_a.png") as picture:
        assert picture.height == 224
        assert picture.width % 224 == 0
        assert picture.width > 224
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_blocks_are_written_at_constant_memory(tmp_path, ending):
    """100,000 rows, the last of which needs another column, take little more than a block of them."""
    import tracemalloc

    table = PredictionTable(tmp_path / f"x.{ending}", CLASSES)
    n = 2000
    probs = np.full((n, 3), 1 / 3, np.float32)
    tracemalloc.start()
    for block in range(50):
        errors = [None] * (n - 1) + ["bad" if block == 49 else None]
        paths = [f"{block}/{i}.png" for i in range(n)]
        table.add(Block(paths, ["path"] * n, probs, errors))
    table.close(whole=True)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    rows, columns = table_of(table.path)
    assert columns == ["path", "predicted", *COLUMNS, "error"]
    assert len(rows) == 50 * n
    assert rows[-1][-1] == "bad"
    assert float(np.float32(rows[0][2])) == np.float32(1 / 3)


def block(name, n=3, error=None):
    paths = [f"{name}{i}" for i in range(n)]
    return Block(paths, ["b"] * n, np.full((n, 1), 0.5, np.float32), [error] * n)


WRITES = """
import sys
import numpy as np
from pathlib import Path
from bmjax.cli.prediction_table import Block, PredictionTable
table = PredictionTable(Path(sys.argv[1]), ["b"])
for i in range(2):
    table.add(Block(["other"] * 2, ["b"] * 2, np.ones((2, 1), np.float32), ["bad" if i else None] * 2))
    print("wrote", flush=True)
    sys.stdin.readline()
table.close(whole=True)
"""


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_of_two_tables_of_one_name_at_a_time_the_last_stays_whole(tmp_path, ending):
    out = tmp_path / f"x[1].{ending}"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WRITES, str(out)], env=env, **pipes) as other:
        assert other.stdout.readline() == "wrote\n"
        table = PredictionTable(out, ["b"])
        table.add(block("mine"))
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "wrote\n"  # with one more column by now
        table.add(block("mine", error="bad"))
        table.close(whole=True)
        assert [row[0] for row in table_of(out)[0]] == [f"mine{i % 3}" for i in range(6)]
        other.communicate("\n")
    assert other.returncode == 0
    rows, columns = table_of(out)
    assert columns == ["path", "predicted", "b", "error"]
    assert [row[0] for row in rows] == ["other"] * 4
    assert os.listdir(tmp_path) == [out.name]


def test_parts_that_killed_processes_left_go_after_a_day(tmp_path):
    out = tmp_path / "x[1].csv"
    old, new, user = (tmp_path / f"x[1].csv.{name}" for name in ("5.7.part2", "5.8.part", "mine.part"))
    for path in (old, new, user):
        path.touch()
    for path in (old, user):
        os.utime(path, (1, 1))
    table = PredictionTable(out, ["b"])
    table.add(block("a"))
    table.close(whole=True)
    assert set(os.listdir(tmp_path)) == {out.name, new.name, user.name}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_no_two_columns_have_one_name(tmp_path, caplog, ending):
    import pandas as pd

    classes = ("path", "predicted", "answer", "set", "familiarity", "error", "path_bytes", "p(path)", "mine", "b")
    k = len(classes)
    for more in ({}, {"answer": str, "set": str, "familiarity": float, "mine": str}):
        caplog.clear()
        out = tmp_path / f"x.{ending}"
        table = PredictionTable(out, classes, more=more)
        values = [[0.5] if kind is float else ["x"] for kind in more.values()]
        probs = np.arange(k, dtype=np.float32)[None]
        table.add(Block(["\udce9"], ["set"], probs, ["bad"], values))
        table.add(Block(["a"], ["set"], probs, [None], values))
        table.close(whole=True)
        if ending == "csv":
            found = pd.read_csv(out, encoding_errors="replace")
        else:
            found = pd.read_parquet(out)
        named = {name: f"p({name})" for name in classes[:7]} | {"path": "p(p(path))"}
        named |= {"mine": "p(mine)"} if more else {}
        columns = [named.get(name, name) for name in classes]
        assert columns == list(found.columns[2 : 2 + k])
        assert list(found.columns[2 + k :][: len(more) + 1]) == [*more, "error"]
        assert found[columns].iloc[1].tolist() == list(range(k))
        assert found["predicted"].tolist() == ["set", "set"]
        (said,) = caplog.messages
        other = ", ".join(column for column in columns if column not in classes)
        assert said == f"probabilities of classes called like a column of the table are in {other}"


def test_a_table_whose_classes_are_called_like_no_column_says_nothing(tmp_path, caplog):
    PredictionTable(tmp_path / "x.csv", ("EOS", "p(path)")).close(whole=True)
    assert caplog.messages == []
    assert table_of(tmp_path / "x.csv")[1] == ["path", "predicted", "EOS", "p(path)"]


def test_a_name_that_is_not_utf8_is_refused_for_parquet_and_kept_for_csv(bmjax_predict, tmp_path, capsys):
    draw(tmp_path / "a.png")
    for ending, status in (("csv", 0), ("parquet", 2)):
        out = str(tmp_path / os.fsdecode(b"u\xe9")) + f".{ending}"
        assert main(["predict", "RUN", str(tmp_path / "a.png"), "--out", out]) == status
        assert Path(out).exists() == (status == 0)
    assert "bmjax: --out is '" in (said := capsys.readouterr().err)
    assert "/u\\xe9.parquet', which is not UTF-8; expected" in said
