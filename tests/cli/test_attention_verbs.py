"""`bmjax new attention` writes what `bmjax check` passes; a variant is one file in the folder."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import bmjax.attention
from bmjax.attention import create_attention, list_attention
from bmjax.cli.attention import print_table
from bmjax.cli.main import main
from bmjax.model.create import create, init

SHAPE = ["--shape", "2", "5", "5", "32"]


@pytest.fixture
def written(tmp_path, capsys):
    assert main(["new", "attention", "my_gate", "--out", str(tmp_path)]) == 0
    assert f"bmjax check {tmp_path / 'my_gate.py'}" in capsys.readouterr().out
    return tmp_path / "my_gate.py"


def test_the_starting_file_passes_its_check_beside_se_and_cbam(written, capsys):
    assert main(["check", str(written), *SHAPE]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert "not run" not in out
    assert "On float32 features [2, 5, 5, 32]" in out
    assert "medians of n = 30 calls" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) == 6}
    # Of 32 channels: two layers through two channels, and a 1x1 convolution.
    assert rows[str(written)][0] == str(32 * 2 + 2 + 2 * 32 + 32 + 32 + 1)
    assert rows["se"][0] == str(32 * 2 + 2 + 2 * 32 + 32)
    assert all(float(v.replace(",", "")) > 0 for row in rows.values() for v in row)


def test_the_table_has_a_row_a_variant(monkeypatch, capsys):
    monkeypatch.setattr(bmjax.attention, "list_attention", lambda: ["none", "cbam"])
    print_table((2, 5, 5, 32))
    out = capsys.readouterr().out
    assert "On float32 features [2, 5, 5, 32]" in out
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in out.splitlines() if "|" in line}
    assert rows["none"][1:5] == ["No attention: the baseline that the variants are compared with", "", "places", "0"]
    assert rows["none"][5] == "0"
    _, text, options, maps, parameters, *costs = rows["cbam"]
    assert text.endswith("(Woo et al. 2018, [link](https://arxiv.org/abs/1807.06521))")
    assert options.startswith("`ratio=16`")
    # Of 32 channels: two layers through two channels, and a 7x7 convolution of two maps with its norm.
    assert (maps, parameters) == ("channels and places", str(32 * 2 + 2 + 2 * 32 + 32 + 7 * 7 * 2 + 2))
    assert all(float(c.replace(",", "")) > 0 for c in costs)
    assert main(["list", "backbones", "--cost"]) == 2
    assert "--cost is for `bmjax list attention`; the kind is 'backbones'" in capsys.readouterr().err


def test_a_broken_file_says_what_to_do_and_exits_with_1(written, capsys):
    text = written.read_text()
    written.write_text(text.replace('self.sow("intermediates", "map"', 'self.sow("intermediates", "mask"'))
    assert main(["check", str(written)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "FAIL sown_map evaluation: no map was sown; expected one. Add self.sow(" in out
    assert "1 of 16 checks failed: sown_map" in out
    written.write_text(text.replace("ratio: int = 16", "ratio: int"))
    assert main(["check", str(written)]) == 1
    assert re.search(r"FAIL made raised TypeError: .*'ratio'", " ".join(capsys.readouterr().out.split()))


def test_a_file_that_is_edited_is_read_anew_and_else_the_same(written):
    first = create_attention(str(written), ratio=4)
    assert first == create_attention(str(written), ratio=4)
    written.write_text(written.read_text().replace("ratio", "reduction"))
    assert {f.name for f in dataclasses.fields(create_attention(str(written)))} > {"reduction"}


def test_a_file_dropped_into_the_folder_is_a_variant(written, tmp_path, monkeypatch, tiny_config):
    """The folder is the registry: nothing but the file is needed to list, make, place and start it."""
    monkeypatch.setattr(bmjax.attention, "__path__", [*bmjax.attention.__path__, str(tmp_path)])
    try:
        assert "my_gate" in list_attention()
        model = create(dataclasses.replace(tiny_config.model, attention="my_gate", attention_options={"ratio": 4}), 3)
        assert "places" in jax.eval_shape(lambda: init(model, jax.random.key(0), 32))["params"]["attention"]
    finally:
        sys.modules.pop("bmjax.attention.my_gate", None)


@pytest.mark.parametrize("name", ["my-gate", "class", "_mine", "2d", "Mine"])
def test_a_name_that_no_module_can_have_is_refused(tmp_path, capsys, name):
    assert main(["new", "attention", name, "--out", str(tmp_path)]) == 2
    assert f"name is {name!r}; expected a Python module's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_folders_are_not_made(written, capsys):
    written.write_text("mine")
    assert main(["new", "attention", "my_gate", "--out", str(written.parent)]) == 2
    assert "my_gate.py" in capsys.readouterr().err
    assert written.read_text() == "mine"
    assert main(["new", "attention", "se"]) == 2
    assert main(["new", "attention", "my_gate", "--out", str(written.parent / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sofd"], "unknown attention 'sofd'; did you mean 'soft'"),
        (["nowhere.py"], "nowhere.py: no such file"),
        (["no_such_module:Foo"], "cannot import 'no_such_module'"),
        (["se", "--shape", "0", "1", "1", "1"], "expected four positive numbers"),
    ],
)
def test_wrong_input_is_one_clear_line(capsys, arguments, message):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_process_of_one_device_makes_itself_four():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    root = pathlib.Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "bmjax", "check", "none", *SHAPE]
    environment |= {"PYTHONPATH": str(root)}
    out = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^ok +devices", out, re.MULTILINE)
    assert np.all([w in out for w in ("none", "se", "cbam")])
