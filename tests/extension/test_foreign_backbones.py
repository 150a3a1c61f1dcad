"""A transformer and a ConvNeXt in plain Flax keep the contract, train, take attention, freeze, resume and explain."""

import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util

from bmjax.analysis.contract.examine import examine
from bmjax.analysis.explain.maps import Explainer
from bmjax.backbones import stage_of_parameters
from bmjax.cli.main import main
from bmjax.config import StageConfig
from bmjax.model.create import create
from bmjax.runs.folder import load_data, load_run, new_variables
from bmjax.training.progress import StepLog
from bmjax.training.run import train
from tests.helpers.convnext import ConvNeXt
from tests.helpers.vit import ViT
from tests.training.test_resume import final_leaves

NETS = {"vit": (ViT, "early"), "convnext": (ConvNeXt, "stage0")}


@pytest.fixture(params=["vit", pytest.param("convnext", marks=pytest.mark.slow)])
def foreign(request, small):
    """(frozen, then all with rates by depth; attention after the first stage and the last; the first stage)."""
    net, stage = NETS[request.param]
    model = replace(small.model, backbone=net, attention="cbam", attach=(stage, "last"))
    stages = (StageConfig(epochs=1, train=("attention", "head")), StageConfig(epochs=1))
    return replace(small, model=model, stages=stages, optim=replace(small.optim, layer_decay=0.5)), stage


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_the_contract_is_kept(net):
    assert [v for v in examine("backbone", NETS[net][0]) if v.status != "ok"] == []


def test_it_trains_freezes_explains_and_resumes_bit_for_bit(foreign, tmp_path, monkeypatch):
    config, stage = foreign
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))

    frozen = train(replace(config, stages=config.stages[:1], run_dir=str(tmp_path / "frozen")))
    before = new_variables(config, create(config.model, 7))["params"]
    after = load_run(frozen.run_dir, "last").variables["params"]
    jax.tree.map(np.testing.assert_array_equal, before["backbone"], after["backbone"])
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))

    run = load_run(whole.run_dir)
    dataset, splits = load_data(whole.run_dir, run.config)
    images, targets = np.asarray(dataset.images[splits.val[:3]]), dataset.labels[splits.val[:3]]
    for at in (stage, "last"):
        maps = Explainer(run.model, at).maps(run.variables, images, targets)
        assert maps.keys() == {
            f"attention_{stage}",
            f"attention_{run.model.backbone.stages[-1]}",
            "Grad-CAM",
            "Grad-CAM++",
        }
        assert all(m.shape == (3, 32, 32) and np.isfinite(m).all() for m in maps.values())
    assert np.ptp(maps["Grad-CAM"]) > 0

    original, stops = StepLog.__call__, [2, whole.steps - 1]

    def stop_at(self, step, *arguments):
        original(self, step, *arguments)
        if stops and step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepLog, "__call__", stop_at)
    for _ in range(2):
        assert train(config, resume=True).interrupted == "SIGTERM"
    assert train(config, resume=True).steps == whole.steps
    ours, theirs = final_leaves(config.run_dir), final_leaves(whole.run_dir)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


def test_show_counts_it(foreign, tmp_path, capsys):
    from bmjax.config import to_json

    path = tmp_path / "config.json"
    path.write_text(to_json(foreign[0]))
    assert main(["show", str(path), "--no-compile"]) == 0
    out = capsys.readouterr().out
    parameters = jax.eval_shape(lambda: new_variables(foreign[0], create(foreign[0].model, 7)))["params"]
    assert f"stage 1: 1 epochs, {sum(v.size for v in jax.tree.leaves(parameters)):,} parameters train" in out


@pytest.mark.parametrize(
    ("net", "some"),
    [
        (
            ViT(),
            {"patches/kernel": "early", "where": "early", "encoder/early0/norm1/scale": "early",
             "encoder/late0/expand/kernel": "late", "encoder/norm/scale": "late"},
        ),
        (ConvNeXt(), {"halve_0/kernel": "stage0", "blocks_0/scale": "stage0", "blocks_1/norm/bias": "stage1"}),
    ],
)  # fmt: skip
def test_nested_parameters_have_their_stage(net, some):
    stages = {"/".join(path): stage for path, stage in stage_of_parameters(net, 32).items()}
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    assert stages.keys() == {"/".join(path) for path in traverse_util.flatten_dict(dict(shapes))}
    assert {path: stages[path] for path in some} == some
