"""`bmjax export` gives a file that says what the run says, without bmjax."""

import dataclasses
import json
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.analysis.export.program import TOLERANCE, check_equal, facts_of, sample_images
from bmjax.analysis.export.stablehlo import FACTS, PROGRAM, export_stablehlo, read_stablehlo, write_stablehlo
from bmjax.cli.main import main
from bmjax.training.predict import predict_probs
from tests.helpers import pages
from tests.helpers.processes import environment
from tests.helpers.small_run import SHOWN, SIZE, keep_calibration, small_run

BLOCKED = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("bmjax", "flax", "optax", "orbax"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    found = small_run(tmp_path_factory.mktemp("export") / "run")
    keep_calibration(found)
    return found


def export(run, monkeypatch, *more):
    monkeypatch.setattr("bmjax.runs.folder.load_run", lambda *arguments, **options: run)
    return main(["export", str(run.run_dir), *map(str, more)])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "model.zip"
    with pytest.MonkeyPatch.context() as patch:
        assert export(run, patch, "--out", out, "--error-rate", "0.4") == 0
    return out


def expected(run, images, scale=0.5):
    powers = predict_probs(run, images).astype(np.float64) ** scale
    return powers / powers.sum(1, keepdims=True)


def test_jax_alone_runs_it(run, exported, tmp_path):
    """The file that docs/export.md shows, where bmjax and flax can't be imported."""
    shown = next(b for b in pages.blocks(pages.DOCS / "export.md") if pages.file_name(b) == "classify_alone.py")
    images = sample_images(SIZE)
    np.save(tmp_path / "images.npy", images)
    words = [sys.executable, "-c", BLOCKED + shown.text, exported, tmp_path / "images.npy", tmp_path / "probs.npy"]
    done = subprocess.run(list(map(str, words)), env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "probs.npy") - expected(run, images)).max() < TOLERANCE
    assert len(done.stdout.splitlines()) == len(images)


def test_its_facts_say_what_it_is(exported):
    with zipfile.ZipFile(exported) as archive:
        facts = json.loads(archive.read(FACTS))
    assert facts["classes"] == list(SHOWN)
    assert facts["platforms"] == ["cpu", "cuda", "tpu"]
    assert facts["input"] == "uint8 [b, 32, 32, 3], RGB 0..255"
    assert facts["calibration"] == "temperature"
    calibrated = 0.8**0.5 / (0.8**0.5 + 2 * 0.1**0.5)
    assert facts["undecided_below"] == pytest.approx(calibrated, abs=1e-5)


def test_a_calibration_can_be_left_out(run, tmp_path, monkeypatch, capsys):
    assert export(run, monkeypatch, "--out", tmp_path / "m.zip", "--uncalibrated") == 0
    assert "3 classes, uncalibrated" in capsys.readouterr().out
    images = sample_images(SIZE, 2)
    found = np.asarray(read_stablehlo(tmp_path / "m.zip").function(images))
    assert np.abs(found - predict_probs(run, images)).max() < TOLERANCE


def test_several_runs_are_exported_as_their_mean(run, tmp_path, monkeypatch, capsys):
    """Each calibrated by its own, as `eval` and `predict` have it."""
    other = small_run(tmp_path / "other", seed=1)
    given = {str(one.run_dir): one for one in (run, other)}
    monkeypatch.setattr("bmjax.runs.folder.load_run", lambda path, *arguments, **options: given[str(path)])
    words = ["export", *given, "--out", str(tmp_path / "m.zip")]
    assert main(words) == 2
    assert f"{other.run_dir} keeps no calibration, and other runs do" in capsys.readouterr().err
    keep_calibration(other)
    assert main([*words, "--error-rate", "0.4"]) == 0
    images = sample_images(SIZE)
    found = read_stablehlo(tmp_path / "m.zip")
    mean = (expected(run, images) + expected(other, images)) / 2
    assert np.abs(np.asarray(found.function(images)) - mean).max() < TOLERANCE
    assert np.abs(expected(run, images) - mean).max() > TOLERANCE
    assert found.facts.run == "small, small"
    data = dataclasses.replace(other.config.data, stain="reinhard")
    given[str(other.run_dir)] = dataclasses.replace(other, config=dataclasses.replace(other.config, data=data))
    assert main(words) == 2
    assert "'data.stain' is 'reinhard'; expected 'none'" in capsys.readouterr().err


def test_a_run_that_sees_the_middle_of_files_says_so(run, tmp_path, monkeypatch, capsys):
    data = dataclasses.replace(run.config.data, pixel_size=0.1, field_size=4.8)
    scaled = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    assert export(scaled, monkeypatch, "--out", tmp_path / "m.zip") == 0
    assert "the middle 48 pixels of files of 0.1 micrometres to a pixel" in capsys.readouterr().err


def test_damaged_files_are_named(exported, tmp_path):
    with zipfile.ZipFile(exported) as archive:
        facts, program = archive.read(FACTS), archive.read(PROGRAM)

    def written(facts, program, name=PROGRAM):
        with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
            archive.writestr(FACTS, facts)
            archive.writestr(name, program)
        return tmp_path / "m.zip"

    other, large = (
        json.dumps(json.loads(facts) | {"classes": ["one"]}),
        json.loads(facts)["reading"] | {"image_size": 64},
    )
    for given, message in (
        ((facts, program[:-1]), "its checksum differs"),
        ((facts, program, "../x"), "not a readable export of bmjax"),
        ((other, program), "its program is from and to"),
        (("[]", program), "its format is"),
        ((json.dumps(json.loads(facts) | {"reading": {}}), program), "reading is not as expected"),
        ((json.dumps(json.loads(facts) | {"reading": large}), program), "image_size is 32, and 64 in reading"),
    ):
        with pytest.raises(ValueError, match=message):
            read_stablehlo(written(*given))
    (tmp_path / "m.zip").write_bytes(exported.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a readable export of bmjax"):
        read_stablehlo(tmp_path / "m.zip")


def test_a_program_that_calls_other_code_is_refused(run, tmp_path):
    def calls(images):
        means = images.astype(np.float32).mean((1, 2))
        return means + jnp.linalg.eigh(jnp.eye(3))[0][None]

    write_stablehlo(tmp_path / "m.zip", *export_stablehlo(calls, facts_of(run, None, 0.5)))
    with pytest.raises(ValueError, match="its program calls other code: custom_call @"):
        read_stablehlo(tmp_path / "m.zip")


def test_a_difference_is_an_error(tmp_path):
    probs = np.full((2, 2), 0.5)
    assert check_equal(probs + 1e-5, probs, tmp_path) == pytest.approx(1e-5)
    for other in (probs + 1e-3, probs * np.nan):
        with pytest.raises(FloatingPointError, match=r"expected at most 0\.0001"):
            check_equal(other, probs, tmp_path)


def test_wrong_input_is_one_line(run, tmp_path, monkeypatch, capsys):
    for more, message in (
        (("--out", tmp_path / "m.onnx"), "expected a name ending in .zip for stablehlo"),
        (("--out", tmp_path / "no" / "m.zip"), "there is no folder"),
        (("--error-rate", "3"), "--error-rate is 3.0"),
    ):
        assert export(run, monkeypatch, *more) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["cbam", "soft"])
@pytest.mark.filterwarnings("default")  # the converter's own
def test_onnx_says_the_same(attention, tmp_path, monkeypatch, capsys):
    for module in ("jax2onnx", "onnxruntime"):
        pytest.importorskip(module, reason='ONNX needs pip install -e ".[export]"')
    run = small_run(tmp_path / "run", attention)
    keep_calibration(run)
    assert export(run, monkeypatch, "--format", "onnx") == 0
    assert "calibrated (temperature)" in capsys.readouterr().out
    import onnxruntime

    session = onnxruntime.InferenceSession(str(run.run_dir / "model.onnx"), providers=["CPUExecutionProvider"])
    images = sample_images(SIZE, 5)
    for n in (1, 5):
        found = session.run(None, {"images": images[:n]})[0]
        assert np.abs(found - expected(run, images[:n])).max() < TOLERANCE
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(SHOWN)


def test_what_the_converter_can_not_do_is_named(monkeypatch):
    from bmjax.analysis.export import onnx

    class Converter:
        @staticmethod
        def to_onnx(*_, **__):
            raise NotImplementedError("No plugins registered for primitive 'cumsum'\nmore")

    monkeypatch.setitem(sys.modules, "jax2onnx", Converter)
    facts = type("Facts", (), {"image_size": SIZE, "backbone": "mine"})
    with pytest.raises(ValueError, match="can't convert mine: No plugins registered for primitive 'cumsum'; expected"):
        onnx.export_onnx(lambda x: x, facts)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r"needs jax2onnx; install it: pip install 'bmjax\[export\]'"):
        onnx.check_extra()
