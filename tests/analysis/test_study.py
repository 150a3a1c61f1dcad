"""The published study: its files build, its protocols tell leaks from honest splits, its report shows every part."""

import dataclasses
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bmjax.analysis.study import records, tables
from bmjax.analysis.study.page import write_study
from bmjax.analysis.study.records import Entry, Part
from bmjax.analysis.sweep.cells import cells_of
from bmjax.cli.main import main
from bmjax.config import from_json, to_json
from bmjax.config.experiment import load_experiment
from bmjax.data.dataset import Dataset
from bmjax.training import run as training

STUDY = Path(__file__).parents[2] / "experiments/study"
FILES = sorted(path for path in STUDY.glob("*.py") if path.stem not in ("common", "run"))
SWEEPS = {"attention": 25, "backbones": 5, "best": 2, "head": 15, "optimizers": 20}


@pytest.fixture(scope="module")
def study_modules():
    """The study's files as modules, by name; their folder leaves the path again."""
    names = [path.stem for path in STUDY.glob("*.py")]
    sys.path.insert(0, str(STUDY))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(STUDY))
        for name in names:
            del sys.modules[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_part_is_an_experiment(file, study_modules, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    config, module = load_experiment(str(file))
    assert from_json(to_json(config)) == config
    assert f"python experiments/study/{file.name}" in module.__doc__
    if file.stem in SWEEPS:
        cells = cells_of(config, module.sweep())
        assert len(cells) == SWEEPS[file.stem]
        assert not any(cell.config.train.final_test for cell in cells), "the test split stays shut"
    for field, value, why in study_modules.common.choices(config):
        assert field
        assert value
        assert why


def test_a_file_of_a_larger_densenet_stands_for_densenet121(study_modules):
    common = study_modules.common
    file = "somewhere/densenet169_weights_tf_dim_ordering_tf_kernels_notop.h5"
    found = common.networks(common.Settings(weights=file))
    assert found == [("densenet169", file), *((name, None) for name in common.NETWORKS[1:])]
    assert common.base(common.Settings(weights=file), "head").model.backbone == "densenet169"
    file = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert common.base(common.Settings(weights=file), "head").model.backbone == "resnet50"
    with pytest.raises(ValueError, match="of efficientnetb0; expected a file of densenet121"):
        common.networks(common.Settings(weights="efficientnetb0_notop.h5"))
    assert "somewhere" not in common.command("head", common.Settings(weights="somewhere/x.h5", data="/somewhere/bm7"))


def test_wrong_options_are_said_before_anything_runs(study_modules, capsys):
    for words, said in (([], "--data is ''"), (["--smoke", "--weights", "x.h5"], "--weights is 'x.h5'")):
        with pytest.raises(SystemExit):
            study_modules.common.settings("Doc.", words)
        assert said in capsys.readouterr().err


CELLS, CHANNELS, CLASSES = 210, 48, 7


@pytest.fixture(scope="module")
def protocol_run(study_modules, tmp_path_factory):
    """The protocol part on made-up features that say nothing of the labels but through a cell's own copies."""
    protocol, common = study_modules.protocol, study_modules.common
    s = common.Settings(out=tmp_path_factory.mktemp("study"), smoke=True)
    rng = np.random.default_rng(0)
    names = "ABCDEFG"
    labels = np.arange(CELLS, dtype=np.int32) % CLASSES
    ids = tuple(f"{names[k]}/{names[k]}_{i // CLASSES:05d}" for i, k in enumerate(labels))
    images = rng.integers(0, 256, (CELLS, 32, 32, 3), np.uint8)
    cells = Dataset("made up", tuple(names), images, labels, ids, ids, "made up")
    one = rng.standard_normal((CELLS, CHANNELS), np.float32)
    noise = rng.standard_normal((1 + protocol.COPIES, CELLS, CHANNELS), np.float32)
    copies = protocol.Copies(cells, one + 0.1 * noise)
    plain = protocol.config

    def longer(s):
        config = plain(s)
        optim = dataclasses.replace(config.optim, lr=0.01)
        return dataclasses.replace(config, optim=optim, stages=(dataclasses.replace(config.stages[0], epochs=8),))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(protocol, "config", longer)
        patched.setattr(protocol, "PROTOCOLS", ("split first", "augmented first", "chosen on test"))
        patched.setattr(protocol, "LABELS", ("shuffled",))
        part = protocol.run(s, copies)
        patched.setattr("bmjax.training.loop.end_epoch", None)
        train_run, held = training.train_run, []

        def train(config, **options):
            if not held:
                held.append(config.run_dir)
                raise BlockingIOError("another process is at it")
            return train_run(config, **options)

        patched.setattr(training, "train_run", train)
        again = protocol.run(s, copies)  # trains nothing, and comes back to the run that was held
    assert held
    assert again.entries == part.entries
    return s, part


def test_copies_on_both_sides_beat_chance_on_shuffled_labels_and_an_honest_split_does_not(protocol_run):
    s, part = protocol_run
    found = {row.protocol: row for row in tables.protocol_rows(s.out, part)}
    honest, leaking = found["split first"], found["augmented first"]
    assert honest.chance == pytest.approx(1 / 7)
    assert honest.test.low < 1 / 7 < honest.test.high
    assert honest.test.accuracy < 0.3
    assert leaking.test.low > 0.5
    assert leaking.test.n < 0.7 * CELLS, "cells of the test split, not their copies"
    assert all(row.evaluated > 0.8 for row in found.values()), "learnt by heart"
    assert found["chosen on test"].test.accuracy >= honest.test.accuracy


def test_the_layouts_are_what_they_say(study_modules, protocol_run):
    protocol = study_modules.protocol
    config = protocol.config(protocol_run[0])
    labels = np.arange(CELLS, dtype=np.int32) % CLASSES
    ids = tuple(f"c{k}_{i // CLASSES:05d}" for i, k in enumerate(labels))
    cells = Dataset("made up", tuple("ABCDEFG"), np.zeros((CELLS, 16, 16, 3), np.uint8), labels, ids, ids, "made up")
    sides = {}
    for name in ("split first", "augmented first", "blocks", "chosen on test"):
        cell, copy, side = protocol.layout(name, cells, config)
        sides[name] = [set(cell[side == k].tolist()) for k in range(3)]
        rows = set(zip(cell[side == 0].tolist(), copy[side == 0].tolist(), strict=True))
        assert len(rows) == (side == 0).sum()
        if name != "augmented first":
            assert (copy[side > 0] == 0).all()
            assert len(rows) == (1 + protocol.COPIES) * len(sides[name][0])
            assert not sides[name][0] & (sides[name][1] | sides[name][2])
    train, val, test = sides["augmented first"]
    assert len(test & (train | val)) > 0.9 * len(test)
    assert sides["chosen on test"][1] == sides["chosen on test"][2] == sides["split first"][2]
    block = {i: (labels[i], i // CLASSES // config.data.block_size) for i in range(CELLS)}
    by_block = [{block[i] for i in side} for side in sides["blocks"]]
    assert not by_block[0] & (by_block[1] | by_block[2])
    assert not by_block[1] & by_block[2]


def whole_study(out: Path, runs: list[str]) -> None:
    """Parts that point at finished runs; what a table shows is a run's own, whichever it is."""
    facts = {"parameters": 1234567, "step_bytes": 89_000_000, "best_epoch": 2}
    few = [Entry(run, {}, facts=facts) for run in runs]

    def part(name, entries, **more):
        choices = (("data.root", "<b>cells</b>", "the data set's name"),)
        records.write_part(out, Part(name, "made up", f"python {name}.py", tuple(entries), choices, **more))

    networks = (
        {"model.backbone": "densenet_tiny", "model.weights": None},
        {"model.backbone": "x|y", "model.weights": "a/b.h5"},
    )
    part(
        "backbones",
        [dataclasses.replace(e, fields=f, roles=("backbone",)) for e, f in zip(few, networks, strict=False)],
    )
    paired = [
        (variant, dataclasses.replace(entry, fields={"seed": seed}))
        for variant in ("a", "b")
        for seed, entry in enumerate(few[:3])
    ]
    for name, field, extra in (
        ("head", "head", {"model.head.order": [], "model.head.widths": []}),
        ("attention", "model.attention", {}),
    ):
        part(name, [dataclasses.replace(e, fields=e.fields | {field: v} | extra, roles=(name,)) for v, e in paired])
    grid = [
        dataclasses.replace(
            e, fields={"optim.name": o, "train.batch_size": b, "optim.lr": 0.01, "seed": k}, roles=(role,)
        )
        for o in ("adagrad", "sgd")
        for b in (16, 32)
        for role in ("default", "tuned")
        for k, e in enumerate(few[:2])
    ]
    failed = Entry("optimizers/trials/x", {}, ("trial",), error="step 3: loss nan")
    part("optimizers", [*grid, failed], notes=("a note",))
    part("best", [dataclasses.replace(few[0], fields={"stages.1.lr_scale": 0.3}, roles=("candidate", "best"))])


def test_the_report_shows_every_part(protocol_run, capsys):
    s, part = protocol_run
    whole_study(s.out, [entry.run for entry in part.entries[:3]])
    assert main(["study", "report", str(s.out)]) == 0
    html, text = (Path(line) for line in capsys.readouterr().out.splitlines())
    page, written = html.read_text(), text.read_text()
    for shown in (page, written):
        for title in ("Backbones on one protocol", "The added head against a plain one", "None against attention"):
            assert title in shown
        assert "1,234,567" in shown
        assert "0.9701" in shown
        assert "loss nan" in shown
        assert "no difference to a can be shown" in shown
    assert "x\\|y" in written
    assert page.count("<img") == 5
    assert "<b>cells" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    results = records.results_of(s.out / part.entries[0].run)["test"]
    assert f"{results['accuracy']:.3f}" in written
    for entry in results["per_class"]:
        assert f"{entry['f1']:.3f} ({entry['f1_low']:.3f} to {entry['f1_high']:.3f})" in written


def test_the_best_is_selected_by_the_parts(study_modules, protocol_run):
    best, (s, part) = study_modules.best, protocol_run
    runs = [entry.run for entry in part.entries]
    scores = {run: records.results_of(s.out / run)["val"]["accuracy"] for run in runs}
    worst, top = min(scores, key=lambda run: scores[run]), max(scores, key=lambda run: scores[run])
    entries = tuple(
        Entry(run, {"model.attention": name}, ("attention",)) for name, run in (("none", worst), ("se", top))
    )
    records.write_part(s.out, Part("attention", "", "", entries))
    for name in ("backbones", "head", "optimizers"):
        (s.out / name / "part.json").unlink(missing_ok=True)
    fields, said = best.selected(s)
    assert fields == {"model.attention": "se"}
    assert sum("has not run" in sentence for sentence in said) == 3
    config = best.with_selected(s, best.config(s), fields)
    assert config.model.attention == "se"
    assert not config.train.final_test


def test_a_folder_without_a_study_and_a_damaged_part_are_said(tmp_path, capsys):
    assert main(["study", "report", str(tmp_path)]) == 2
    assert "holds no part of a study" in capsys.readouterr().err
    (tmp_path / "head").mkdir()
    (tmp_path / "head/part.json").write_text('{"name": "head", "entries": 3}')
    with pytest.raises(ValueError, match=r"head/part.json is damaged"):
        write_study(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_study_killed_and_started_again(tmp_path):
    """`run.py --smoke`, killed at random moments, comes to its end and trains no finished run again."""
    out = tmp_path / "study"
    command = [sys.executable, str(STUDY / "run.py"), "--smoke", "--out", str(out)]
    environment = os.environ | {"BMJAX_CACHE": str(tmp_path / "cache")}
    wait = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait.uniform(15, 50))
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {
        path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl") if (path.parent / "row.json").is_file()
    }
    assert finished, "the last kill came after a run had ended"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert [part.name for part in records.read_study(out).values()] == list(records.PARTS)
    assert (out / "study.html").is_file()
    openings = sorted(str(path.relative_to(out)) for path in out.rglob("openings.jsonl"))
    assert [name for name in openings if not name.startswith("protocol/")] != []
    assert all(name.startswith(("best/", "protocol/")) for name in openings)
    assert all(len((out / name).read_text().splitlines()) == 1 for name in openings)
