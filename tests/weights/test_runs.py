"""A run needs its weights' file to begin with, and never again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from bmjax import model, weights
from bmjax.cli.main import main
from bmjax.config import ModelConfig, StageConfig
from bmjax.config.experiment import load_experiment
from bmjax.runs.folder import check_folder, load_run, write_config
from bmjax.training.run import train
from tests.helpers.keras_saved import keras_model, save


def test_a_run_goes_on_without_its_weights_file(tiny_config, tmp_path):
    path, ported = save(keras_model("resnet")[0], tmp_path / "w.keras", "keras"), tmp_path / "w.safetensors"
    weights.port(path, "resnet_test", ported)
    network = dataclasses.replace(tiny_config.model, backbone="resnet_test", weights=str(ported), attention="none")
    config = dataclasses.replace(tiny_config, model=network, stages=(StageConfig(epochs=1, train=("head",)),))
    result = train(config)
    stored = json.loads((result.run_dir / "config.json").read_text())["model"]
    assert stored["preprocess"] == "caffe"
    assert stored["backbone_options"] == {"epsilon": 1.001e-5, "stride_in_3x3": False, "use_bias": True}
    before = weights.read(ported, "resnet_test")[1]
    ported.unlink()

    run = load_run(result.run_dir, "last")
    assert run.model.preprocess == "caffe"
    assert not run.model.backbone.stride_in_3x3
    kernel = run.variables["params"]["backbone"]["conv1_conv"]["kernel"]
    np.testing.assert_array_equal(kernel, before["params"]["conv1_conv"]["kernel"])
    resumed, _ = load_experiment(str(result.run_dir))
    assert train(resumed, resume=True).steps == result.steps


def test_a_run_of_before_the_resolved_fields_is_the_same_run(tiny_config, tmp_path):
    resolved = dataclasses.replace(tiny_config, model=model.resolve(tiny_config.model))
    assert resolved.model.preprocess == "torch"
    write_config(tmp_path, resolved)
    stored = json.loads((tmp_path / "config.json").read_text())
    for field in ("preprocess", "backbone_options"):
        del stored["model"][field]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    check_folder(tmp_path, resolved, resume=True)


def test_a_file_fits_a_backbone_with_attention_at_several_stages(tmp_path):
    """Strictly, as without: every leaf from the file, none of attention asked for."""
    path, ported = save(keras_model("resnet")[0], tmp_path / "w.keras", "keras"), tmp_path / "w.safetensors"
    weights.port(path, "resnet_test", ported)
    config = ModelConfig(
        backbone="resnet_test",
        weights=str(ported),
        attention="se+cbam",
        attach=("conv2", "last"),
        attention_gate=True,
    )
    variables = model.init(model.create(config, 3), jax.random.key(0), 32, config)
    for name, tree in weights.read(ported, "resnet_test")[1].items():
        jax.tree.map(np.testing.assert_array_equal, variables[name]["backbone"], dict(tree))
    attention = {f"attention_{stage}{gate}" for stage in ("conv2", "conv3") for gate in ("", "_gate")}
    assert set(variables["params"]) == {"backbone", "head"} | attention


def test_the_verbs_on_weight_files(tmp_path, capsys):
    path = save(keras_model("densenet", top=True)[0], tmp_path / "w.h5", "h5")
    out = tmp_path / "ported.safetensors"
    assert main(["weights", "port", str(path), str(out), "--backbone", "densenet_test"]) == 0
    assert "values of densenet_test, preprocessing torch" in capsys.readouterr().out
    assert main(["weights", "verify", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("names and shapes: all", "checksum: leaves:", "not compared with Keras: keras.applications has no"):
        assert text in printed
    assert main(["weights", "list", "xception"]) == 0
    printed = capsys.readouterr().out
    assert "md5:0a58e3b7378bc2990ea3b43d5981f1f6" in printed
    assert "timm-legacy_xception.tf_in1k" in printed
    assert "resnet" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "xcepton"], "unknown backbone with published weights 'xcepton'; did you mean 'xception'"),
        (["fetch", "resnet50"], "unknown weight record 'resnet50'; did you mean 'resnet50-keras"),
        (["port", "nowhere.h5", "x.safetensors"], "nowhere.h5: no such weight file, nor a record's name"),
        (["port", "FILE", "x.h5"], "the file to write is 'x.h5'; expected a name ending in .safetensors"),
        (["port", "FILE", "x.safetensors"], "doesn't say which backbone it is of; give it as --backbone"),
        (["verify", "FILE", "--backbone", "densenet121"], "leaf 'params/conv2_block2_0_bn/bias' is missing; expected"),
        (["verify", "FILE", "--backbone", "resnet50", "--record", "resnet50-keras"], "md5 is "),
        (["verify", "FILE", "--backbone", "resnet50", "--record", "no"], "unknown weight record 'no'"),
    ],
)
def test_wrong_input_is_one_clear_line(tmp_path, capsys, arguments, message):
    path = save(keras_model("densenet")[0], tmp_path / "w.h5", "h5")
    assert main(["weights", *(str(path) if a == "FILE" else a for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
