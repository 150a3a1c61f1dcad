"""`bmjax eval` and `bmjax predict` of one run and of two, with everything that may be asked of them."""

import csv
import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import bmjax
from bmjax.analysis.evaluate.calibration import FILE, cross_fitted, read_calibration
from bmjax.analysis.evaluate.judge import Judge
from bmjax.analysis.evaluate.refusal import UNSURE, fit_refusal
from bmjax.cli.main import main
from bmjax.config import Config, DataConfig, HeadConfig, ModelConfig, StageConfig, TrainConfig
from bmjax.data.load import load_dataset
from bmjax.data.sources.synthetic import render
from bmjax.runs.records import read_predictions


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one split, from two seeds."""
    folder = tmp_path_factory.mktemp("evaluate")
    found = []
    for seed in (0, 1):
        config = Config(
            name=f"run{seed}",
            run_dir=str(folder / f"run{seed}"),
            seed=seed,
            data=DataConfig(image_size=32, synthetic_per_class=24, stratify=True, split=(0.4, 0.4, 0.2),
                            cache_dir=str(folder / "cache")),
            model=ModelConfig(backbone="densenet_tiny", weights=None, head=HeadConfig(widths=(8,))),
            stages=(StageConfig(epochs=4),),
            train=TrainConfig(batch_size=16, devices=1, train_eval_epochs=0),
        )  # fmt: skip
        found.append(bmjax.train(config).run_dir)
    return found


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A folder of two of the classes and of one that no run knows."""
    folder = tmp_path_factory.mktemp("cells")
    for name in ("EOS", "LYT", "ART"):
        (folder / name).mkdir()
        for i in range(6):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
            image = noise if name == "ART" else render(name, 32, 5, i)
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


def evaluate(capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def said(capsys, *arguments):
    """What `bmjax eval` warns of."""
    assert main(["eval", *map(str, arguments)]) == 0
    return capsys.readouterr().err


def predict(tmp_path, *arguments):
    out = tmp_path / "out.csv"
    assert main(["predict", *map(str, arguments), "--out", str(out)]) == 0
    with out.open(newline="") as f:
        return list(csv.DictReader(f))


def test_eval_prints_and_keeps_every_score(runs, capsys):
    out = evaluate(capsys, runs[0], "--tolerate", "BLA:PMO")
    for name in ("mcc", "roc_auc", "weighted_f1", "tolerant_accuracy", "Wilson", "shares of the true class"):
        assert name in out
    kept = json.loads((runs[0] / "evaluation_val.json").read_text())
    results = json.loads((runs[0] / "results.json").read_text())["val"]
    assert kept["scores"]["accuracy"]["value"] == pytest.approx(results["accuracy"])
    assert kept["confusion"] == results["confusion"]


def test_a_calibration_is_kept_and_used(runs, capsys, tmp_path, cells):
    val = read_predictions(runs[0], "val")
    assert "temperature" in evaluate(capsys, runs[0], "--calibrate", "temperature")
    found = read_calibration(runs[0], 7, json.loads((runs[0] / FILE).read_text())["step"])
    out = evaluate(capsys, runs[0], "--calibrated")
    assert "val-calibrated" in out
    np.testing.assert_allclose(read_predictions(runs[0], "val-calibrated").probs, found(val.probs), atol=1e-5)
    np.testing.assert_array_equal(read_predictions(runs[0], "val").probs, val.probs)
    plain = predict(tmp_path, runs[0], cells / "EOS")
    rows = predict(tmp_path, runs[0], cells / "EOS", "--calibrated")
    probs = np.array([[float(row[name]) for name in val.classes] for row in plain])
    expected = found(probs.astype(np.float32))
    np.testing.assert_allclose([[float(r[name]) for name in val.classes] for r in rows], expected, atol=1e-5)


def test_two_runs_are_one_classifier(runs, capsys, tmp_path, cells):
    file = tmp_path / "both.json"
    out = evaluate(capsys, *runs, "--out", file)
    kept = json.loads(file.read_text())
    assert (kept["runs"], kept["on"], kept["n"]) == (
        list(map(str, runs)),
        "val",
        len(read_predictions(runs[0], "val").ids),
    )
    assert f"accuracy {kept['scores']['accuracy']['value']:.3f}" in out
    probs = np.mean([read_predictions(run, "val").probs for run in runs], axis=0)
    labels = read_predictions(runs[0], "val").labels
    assert f"accuracy {(probs.argmax(1) == labels).mean():.3f}" in out
    assert "2 runs" in out
    each = [predict(tmp_path, run, cells / "LYT") for run in runs]
    both = predict(tmp_path, *runs, cells / "LYT")
    for i, row in enumerate(both):
        assert float(row["EOS"]) == pytest.approx(np.mean([float(rows[i]["EOS"]) for rows in each]), abs=1e-5)


def test_runs_that_refuse_other_files_are_averaged_over_the_same_images(runs, capsys, tmp_path, cells):
    """A run with a scale can't read what is smaller than its field; the other run could."""
    scaled = shutil.copytree(runs[1], tmp_path / "scaled")
    config = json.loads((scaled / "config.json").read_text())
    config["data"] |= {"pixel_size": 1.0, "field_size": 30.0}
    (scaled / "config.json").write_text(json.dumps(config))
    mixed = shutil.copytree(cells, tmp_path / "mixed")
    Image.fromarray(render("EOS", 32, 0, 0)).resize((2, 2)).save(mixed / "EOS" / "0.png")
    for order in ([runs[0], scaled], [scaled, runs[0]]):
        capsys.readouterr()
        assert main(["eval", *map(str, order), "--on", str(mixed)]) == 0
        said = capsys.readouterr()
        assert "n 11, accuracy" in said.out
        assert "1 images can't be read by every run and are left out: EOS/0.png" in said.err
        rows = predict(tmp_path, *order, mixed / "EOS")
        assert [bool(row["error"]) for row in rows] == [True, False, False, False, False, False]
        for row, i in zip(rows[1:], range(1, 6), strict=True):
            each = [predict(tmp_path, run, mixed / "EOS" / f"{i}.png")[0] for run in order]
            assert float(row["EOS"]) == pytest.approx(np.mean([float(one["EOS"]) for one in each]), abs=1e-5)
    for i in range(1, 6):  # what is left of known classes is too small for one of them
        shutil.copy(mixed / "EOS" / "0.png", mixed / "EOS" / f"{i}.png")
        shutil.copy(mixed / "EOS" / "0.png", mixed / "LYT" / f"{i}.png")
    shutil.copy(mixed / "EOS" / "0.png", mixed / "LYT" / "0.png")
    assert main(["eval", str(runs[0]), str(scaled), "--on", str(mixed)]) == 2
    assert "can be read" in capsys.readouterr().err


def test_thresholds_of_calibrated_runs_are_by_fits_on_other_images(runs):
    evaluate_args = [str(runs[0]), "--calibrate", "vector"]
    assert main(["eval", *evaluate_args]) == 0
    judge = Judge([bmjax.load_run(runs[0])], calibrated=True)
    val = read_predictions(runs[0], "val")
    expected = fit_refusal(val.labels, cross_fitted(val.labels, val.probs, "vector"), 0.3)
    assert judge.refusal(0.3) == expected
    assert judge.refusal(0.3) != fit_refusal(val.labels, judge.validation().probs, 0.3)
    # One that was fitted elsewhere is as good on these images as on new ones.
    judge.calibrations = (dataclasses.replace(judge.calibrations[0], scale=(0.5,) * 7),)
    assert judge.refusal(0.3) == fit_refusal(val.labels, judge.calibrations[0](val.probs), 0.3)


def test_views_have_files_of_their_own_and_thresholds_by_them(runs, capsys, tmp_path, cells):
    assert main(["predict", str(runs[0]), str(cells), "--views", "8", "--error-rate", "0.3"]) == 2
    assert f"`bmjax eval {runs[0]} --split val --views 8` makes them" in capsys.readouterr().err
    evaluate(capsys, runs[0], "--views", "8")
    assert not np.array_equal(read_predictions(runs[0], "val-views8").probs, read_predictions(runs[0], "val").probs)
    rows = predict(tmp_path, runs[0], cells, "--views", "8", "--error-rate", "0.3")
    assert len(rows) == 18


def test_answers_are_refused_and_strangers_told(runs, capsys, tmp_path, cells):
    assert main(["eval", str(runs[1]), "--error-rate", "0.4", "--unfamiliar", "0.05"]) == 2
    assert "bmjax eval" in capsys.readouterr().err
    out = evaluate(capsys, runs[1], "--reference", "--unseen", cells / "ART", "--error-rate", "0.4")
    assert "AUROC" in out
    assert "by neighbours" in out
    assert "refused" in out
    rows = predict(tmp_path, runs[1], cells, "--error-rate", "0.4", "--unfamiliar", "0.05")
    for row in rows:
        assert row["answer"] in (row["predicted"], UNSURE)
        assert row["set"].split("|")[0] == row["predicted"]
        if float(row["familiarity"]) <= 0.05:
            assert row["answer"] == UNSURE
    strange = [float(row["familiarity"]) for row in rows if "/ART/" in row["path"]]
    known = [float(row["familiarity"]) for row in rows if "/ART/" not in row["path"]]
    assert np.median(strange) < np.median(known)


def test_labelled_images_from_elsewhere(runs, capsys, tmp_path, cells):
    out = evaluate(capsys, runs[0], "--on", cells, "--adapt", "--adapt-prior")
    assert "n 12, accuracy" in out
    assert "frequencies estimated here" in out
    assert "6 images of classes of" in out
    assert "AUROC" in out
    rows = predict(tmp_path, runs[0], cells, "--adapt", "--adapt-prior")
    plain = predict(tmp_path, runs[0], cells)
    assert [row["EOS"] for row in rows] != [row["EOS"] for row in plain]


def test_colours_are_matched_for_all_images_alike(runs, capsys, tmp_path, cells):
    """A darkened folder is seen as it was before, nearly; a run without colours is told."""
    dark = tmp_path / "dark"
    for path in sorted(cells.glob("*/*.png")):
        (dark / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(Image.open(path)) * 0.6).astype(np.uint8)).save(dark / path.parent.name / path.name)
    run = runs[1]
    (run / "reference.npz").unlink(missing_ok=True)
    openings = (run / "openings.jsonl").read_text() if (run / "openings.jsonl").exists() else ""
    wanted = f"`bmjax eval {run} --reference` writes them"
    assert main(["predict", str(run), str(dark), "--match-colours"]) == 2
    assert wanted in capsys.readouterr().err
    assert main(["eval", *map(str, runs), "--split", "test", "--match-colours"]) == 2
    assert "keeps no colours of its training cells" in capsys.readouterr().err
    after = (run / "openings.jsonl").read_text() if (run / "openings.jsonl").exists() else ""
    assert after == openings, "refused before the split is opened"
    evaluate(capsys, run, "--reference")
    plain_results = json.loads((run / "results.json").read_text())["val"]
    evaluate(capsys, run, "--match-colours", "--adapt", "--views", "2")
    results = json.loads((run / "results.json").read_text())
    assert results["val"] == plain_results
    assert "val-views2-matched-adapted" in results
    assert "the colours and the norms were adapted" in evaluate(
        capsys, run, "--on", dark, "--match-colours", "--adapt", "--error-rate", "0.4"
    )
    out = evaluate(capsys, run, "--on", dark, "--match-colours")
    assert "colours of all images are changed: 128 becomes red" in out

    def probs(*more):
        return np.array([[float(row[name]) for name in ("EOS", "LYT")] for row in predict(tmp_path, run, *more)])

    own, plain = probs(cells), probs(dark)
    assert "lightness is" in capsys.readouterr().err
    matched = probs(dark, "--match-colours")
    assert "lightness is" not in capsys.readouterr().err
    assert np.abs(matched - own).mean() < 0.75 * np.abs(plain - own).mean()


def test_a_run_of_matched_laboratories_says_so_of_other_images(runs, capsys, tmp_path, cells):
    other = shutil.copytree(runs[1], tmp_path / "matched")
    config = json.loads((other / "config.json").read_text())
    config["data"] |= {"match_colours": True, "source": "table", "root": "cells.csv"}
    (other / "config.json").write_text(json.dumps(config))
    said = "was trained on laboratories in the colours of all"
    for arguments in (["eval", other, "--on", cells], ["predict", other, cells, "--out", tmp_path / "a.csv"]):
        capsys.readouterr()
        assert main([*map(str, arguments)]) == 0
        assert said in capsys.readouterr().err
        assert main([*map(str, arguments), "--match-colours"]) == 0
        assert said not in capsys.readouterr().err


def test_one_class_from_elsewhere_is_enough(runs, capsys, tmp_path):
    (tmp_path / "EOS").mkdir()
    for i in range(3):
        Image.fromarray(render("EOS", 32, 5, i)).save(tmp_path / "EOS" / f"{i}.png")
    assert "n 3, accuracy" in evaluate(capsys, runs[0], "--on", tmp_path)


def test_intervals_are_over_groups_where_the_data_have_them(runs, capsys, tmp_path, cells):
    rows = [(str(path), path.parent.name, f"slide {i % 4}") for i, path in enumerate(sorted(cells.glob("[EL]*/*.png")))]
    table = tmp_path / "cells.csv"
    with table.open("w", newline="") as f:
        csv.writer(f).writerows([("path", "label", "group"), *rows])
    out = evaluate(capsys, runs[0], "--on", table)
    assert "bootstrap over 4 groups" in out
    assert "the intervals are about images of new groups, by a bootstrap over" in out
    line, row = re.findall(r"^(?:.*, )?accuracy +([\d.]+) +\(([\d.]+ to [\d.]+)", out, re.M)[:2]
    assert line == row
    assert "groups" not in evaluate(capsys, runs[0], "--on", cells)


def test_figures_say_what_they_rest_on(runs, capsys, cells, caplog):
    assert "trained on these images" in evaluate(capsys, runs[0], "--split", "train")
    evaluate(capsys, runs[0], "--calibrate", "temperature")
    assert "the calibration was fitted on these images" in evaluate(capsys, runs[0], "--calibrated")
    assert "the threshold was chosen on these images" in evaluate(capsys, runs[0], "--error-rate", "0.4")
    out = evaluate(capsys, runs[0], "--on", cells, "--error-rate", "0.4", "--adapt")
    assert (
        "promise nothing here: the norms were adapted after the thresholds were set on validation; these images did not"
        in out
    )


def test_images_that_the_run_has_seen_are_told(runs, capsys, cells, tmp_path):
    """By their bytes, whatever their names."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    assert "remembered" not in said(capsys, run, "--on", cells)
    with (run / "split.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    for side, name in (("train", "EOS/0.png"), ("val", "LYT/1.png"), ("val", "ART/2.png"), ("test", "EOS/3.png")):
        row = next(row for row in rows if row["split"] == side and len(row["sha256"]) == 64)
        row["sha256"] = hashlib.sha256((cells / name).read_bytes()).hexdigest() + " "
    with (run / "split.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: value.strip() for name, value in row.items()} for row in rows)
    assert f"{run} was trained on 1 of these 18 images and chosen by 2" in said(capsys, run, "--on", cells)


def test_a_cache_of_another_machine_is_passed_over(runs, capsys, cells, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["cache_dir"] = str(run / "config.json" / "cache")
    (run / "config.json").write_text(json.dumps(config))
    assert "cache' can't be made here; this user's cache is used" in said(capsys, run, "--on", cells)
    with pytest.raises(OSError, match=r"'data\.cache_dir' is .*can't be made .*; expected a folder"):
        load_dataset(DataConfig(synthetic_per_class=2, image_size=16, cache_dir=config["data"]["cache_dir"]))


def test_a_share_that_refuses_nothing_is_told(runs, capsys):
    evaluate(capsys, runs[0], "--reference")
    options = ("--error-rate", "0.4", "--unfamiliar")
    assert "refuses nothing" not in said(capsys, runs[0], *options, "0.02")
    words = "--unfamiliar 0.001 refuses nothing: beside the 63 validation images"
    assert words in said(capsys, runs[0], *options, "0.001")


def test_a_run_without_validation_says_what_it_lacks(runs, capsys, cells, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    (run / "predictions_val.npz").unlink()
    record = json.loads((run / "dataset.json").read_text())
    record["counts"]["val"] = dict.fromkeys(record["counts"]["val"], 0)
    (run / "dataset.json").write_text(json.dumps(record))
    for words in (
        ["predict", run, cells, "--error-rate", "0.1"],
        ["predict", run, cells, "--adapt-prior"],
        ["eval", run, "--split", "test", "--reference"],
        ["eval", run, "--split", "test", "--error-rate", "0.1"],
    ):
        assert main([*map(str, words)]) == 2
        told = capsys.readouterr().err
        assert "train with --data.split 0.85 0.15 0" in told
        assert "bmjax eval" not in told, "no command that can't do it"
    assert main(["differential", str(run), str(cells)]) == 2
    assert f"`bmjax eval {run} --split test` makes them" in capsys.readouterr().err, "which would do"
    record["counts"]["val"] = [3]
    (run / "dataset.json").write_text(json.dumps(record))
    assert main(["predict", str(run), str(cells), "--error-rate", "0.1"]) == 2
    assert "dataset.json is damaged: its counts of 'val' are '[3]'" in capsys.readouterr().err


def test_wrong_input_is_told_before_the_test_split_is_opened(runs, capsys, cells, tmp_path):
    for more, message in (
        (["--tolerate", "BLA:MYB"], "unknown class 'MYB'"),
        (["--unseen", tmp_path / "none"], "no such file or folder"),
        (["--unseen", cells, "--pixel-size", "0.1"], "was trained without data.field_size"),
        (["--adapt-prior", "--views", "4"], "--views 4` makes them"),
        (["--error-rate", "0.1", "--views", "4"], "--views 4` makes them"),
    ):
        assert main(["eval", str(runs[0]), "--split", "test", *map(str, more)]) == 2
        assert message in capsys.readouterr().err
    for words in (["eval", runs[0], f"{runs[0]}/", "--split", "test"], ["predict", runs[0], runs[0], cells],
                  ["export", runs[0], runs[0]], ["differential", runs[0], runs[0], cells]):  # fmt: skip
        assert main([*map(str, words)]) == 2
        assert "is given twice" in capsys.readouterr().err
    assert not (runs[0] / "openings.jsonl").exists()


def test_wrong_input_is_one_line(runs, capsys, cells, tmp_path):
    for arguments, message in (
        (["eval", runs[0], "--error-rate", "5"], "--error-rate is 5.0; expected a share"),
        (["eval", runs[0], "--out", tmp_path / "x.txt"], "expected a name ending in .json"),
        (["eval", runs[0], "--unfamiliar", "0.1"], "expected --error-rate beside it"),
        (["eval", runs[0], "--tolerate", "BLA"], "--tolerate is 'BLA'; expected two classes"),
        (["eval", runs[0], "--tolerate", "BLA:MYB"], "unknown class 'MYB'"),
        (["predict", runs[0], runs[1]], "expected images, or folders of images, after the runs"),
        (["eval", runs[0], "--on", tmp_path / "none"], "none', which is not there; expected a folder with one"),
        (["eval", runs[1], "--calibrated"], f"{FILE} is not there"),
    ):
        assert main(list(map(str, arguments))) == 2, arguments
        assert message in capsys.readouterr().err
