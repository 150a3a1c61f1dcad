"""Each kind of part is one file outside the package: dropped into a folder, trained with by name and by object."""

import dataclasses
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from bmjax.cli.main import main
from bmjax.config import ModelConfig
from bmjax.model.create import create, init
from bmjax.registry import import_file
from bmjax.runs.folder import load_run
from bmjax.training.run import train

# Kind -> (words of the command line, the same in Python).
PARTS = {
    "attention": (["--model.attention", "FILE"], lambda c, part: replace(c, model=replace(c.model, attention=part))),
    "backbone": (["--model.backbone", "FILE"], lambda c, part: replace(c, model=replace(c.model, backbone=part))),
    "head": (["--model.head", "FILE"], lambda c, part: replace(c, model=replace(c.model, head=part))),
    "loss": (["--train.loss", "FILE"], lambda c, part: replace(c, train=replace(c.train, loss=part))),
    "metric": (
        ["--train.metrics", "FILE", "--train.monitor", "my_part"],
        lambda c, part: replace(c, train=replace(c.train, metrics=(part,), monitor="my_part")),
    ),
    "optimizer": (
        ["--optim.name", "FILE", "--optim.lr", "1e-3"],
        lambda c, part: replace(c, optim=replace(c.optim, name=part, lr=1e-3)),
    ),
    "augmentation": (
        ["--augment.extra", "FILE"],
        lambda c, part: replace(c, augment=replace(c.augment, extra=(part,))),
    ),
}


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Writes the starting file of a kind into the current folder, which is a temporary one."""
    monkeypatch.chdir(tmp_path)

    def new(kind):
        assert main(["new", kind, "my_part", "--out", str(tmp_path)]) == 0
        return tmp_path / "my_part.py"

    return new


def object_of(path):
    """What a file of one's own holds."""
    module = import_file(path)
    (found,) = (v for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__)
    return found


def is_recorded(run_dir, path):
    """Whether a run keeps a copy of the file."""
    files = json.loads((run_dir / "environment.json").read_text())["files"]
    return any((run_dir / entry["copy"]).read_text() == path.read_text() for entry in files.values())


@pytest.mark.parametrize("kind", PARTS)
def test_a_file_trains_by_name_and_an_object_from_python(kind, part, experiment, small, tmp_path):
    words, with_part = PARTS[kind]
    path = part(kind)
    by_name = tmp_path / "by_name"
    run = ["--run_dir", str(by_name)]
    assert main(["train", experiment(), *[str(path) if word == "FILE" else word for word in words], *run]) == 0
    assert is_recorded(by_name, path)

    config = replace(with_part(small, object_of(path)), run_dir=str(tmp_path / "by_object"))
    result = train(config)
    assert is_recorded(result.run_dir, path)
    named = json.loads((by_name / "results.json").read_text())
    assert named["val"]["loss"] == result.metrics["val"]["loss"], "by name and by object are one run"
    if kind == "metric":
        assert named["val"]["my_part"] == result.metrics["val"]["my_part"]
    assert load_run(by_name).step == result.steps


def test_a_source_is_a_file_too(part, experiment, small, tmp_path):
    path, root, r = part("source"), tmp_path / "cells", np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 180)):
        (root / name).mkdir(parents=True)
        for i in range(30):
            pixels = np.clip(level + r.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    by_name = tmp_path / "by_name"
    words = ["--data.source", str(path), "--data.root", str(root), "--run_dir", str(by_name)]
    assert main(["train", experiment(), *words]) == 0
    assert is_recorded(by_name, path)
    data = dataclasses.replace(small.data, source=object_of(path), root=str(root))
    result = train(replace(small, data=data, run_dir=str(tmp_path / "by_object")))
    assert json.loads((by_name / "results.json").read_text())["val"]["loss"] == result.metrics["val"]["loss"]


def test_a_callback_of_an_experiment_and_one_from_python(part, experiment, small, tmp_path):
    path = part("callback")
    seen = "SEEN = []\ndef on_event(event):\n    SEEN.append(event.kind)\n    return my_part(event)"
    assert main(["train", experiment(f"from my_part import my_part\n{seen}"), "--run_dir", str(tmp_path / "r")]) == 0
    kinds = []

    def watch(event):
        kinds.append(event.kind)
        if event.kind == "epoch":
            assert set(event.variables()) == {"params", "batch_stats"}
        return event.kind == "epoch"

    stages = (replace(small.stages[0], epochs=5),)
    result = train(replace(small, stages=stages, run_dir=str(tmp_path / "p")), callbacks=[object_of(path), watch])
    assert kinds == ["start", *["step"] * result.steps, "epoch", "end"], "it ended after the first of five epochs"


def test_optax_by_name(small, tmp_path):
    optim = replace(small.optim, name="optax:lion", lr=1e-3, options={"b1": 0.8})
    assert np.isfinite(train(replace(small, optim=optim)).metrics["val"]["loss"])
    assert main(["check", "--kind", "optimizer", "optax:lion"]) == 0


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        ("def bad(counts):\n    return lambda x, y: x.mean()\n", "train.loss", r"gives \[\] of logits \[2, 7\]"),
        ("def bad(labels, probs):\n    return probs\n", "train.metrics", "expected a number"),
        ("def bad(image, key):\n    return image[1:]\n", "augment.extra", "expected the same shape"),
        (
            "def bad(learning_rate):\n    return learning_rate\n",
            "optim.name",
            "expected an optax.GradientTransformation",
        ),
    ],
)
def test_a_broken_part_is_said_before_anything_is_written(source, field, message, experiment, tmp_path, capsys):
    import re

    path = tmp_path / "bad.py"
    path.write_text(source)
    words = ["--optim.lr", "1e-3", "--run_dir", str(tmp_path / "run")]
    assert main(["train", experiment(), f"--{field}", str(path), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mylab_own.attn:Mine", r"cannot import 'mylab_own\.attn' of .*attn\.py, line 2: NameError: .*undefined"),
        ("mylab_own.typo:Mine", r"cannot import 'mylab_own\.typo' of .*typo\.py, line 1: .*syntax"),
        ("mylab_own.nulls:Mine", r"cannot import 'mylab_own\.nulls' of .*null bytes"),
        ("mylab_own.lacks:Mine", r"cannot import 'mylab_own\.lacks' of .*lacks\.py, line 3: .*no_such_library"),
        ("mylab_bad.attn:Mine", r"cannot import 'mylab_bad\.attn' of .*mylab_bad/__init__\.py, line 1: ZeroDivision"),
        ("mylab_own:Mine", "unknown name in module 'mylab_own' 'Mine'"),
        (
            "./attn:Mine",
            r"attention '\./attn:Mine' names no object of a module; expected 'package\.module:name', 'path\.py:name'",
        ),
        (":x", "':x' names no object of a module"),
        ("mylab_own:", "'mylab_own:' names no object of a module"),
        ("attn.py:my-net", r"'attn\.py:my-net' names no object of a module"),
    ],
)
def test_a_module_that_does_not_import_is_named_in_one_line(name, message, experiment, tmp_path, monkeypatch, capsys):
    import re

    monkeypatch.syspath_prepend(tmp_path)
    for path, source in {
        "mylab_own/__init__.py": "",
        "mylab_own/attn.py": "import math\nMine = undefined\n",
        "mylab_own/typo.py": "def Mine(:\n",
        "mylab_own/nulls.py": "Mine = 1\0\n",
        "mylab_own/lacks.py": "import math\n\nimport no_such_library\n",
        "mylab_bad/__init__.py": "1 / 0\n",
        "mylab_bad/attn.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    run_dir = str(tmp_path / "run")
    assert main(["train", experiment(), "--model.attention", name, "--run_dir", run_dir]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


NET = """
import flax.linen as nn
class Net(nn.Module):
    stages: tuple = ("one",)
    @nn.compact
    def __call__(self, x, *, train=False, {keywords}):
        x = nn.Conv(4, (3, 3), strides=4)(x / 255)
        return {result}
"""


@pytest.mark.parametrize(
    ("keywords", "result", "message"),
    [
        ("tap=None", "tap('one', x)", "takes no mode in __call__; expected __call__(self, x, *, train=False"),
        ("mode='train'", "x", "takes no tap in __call__"),
        ("mode='train', tap=None", "x", "backbone Net calls tap for no stage; expected once for each of its stages"),
        ("mode='train', tap=None", "tap('one', x).mean((1, 2))", "gives [1, 4]; expected a feature map"),
    ],
)
def test_a_backbone_that_lacks_something_is_refused_before_training(
    keywords, result, message, experiment, tmp_path, capsys
):
    path = tmp_path / "net.py"
    path.write_text(NET.format(keywords=keywords, result=result))
    words = ["--model.backbone", str(path), "--run_dir", str(tmp_path / "run")]
    assert main(["train", experiment(), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


ATTENTION = """
import flax.linen as nn
class Boom(nn.Module):
    {field}
    def __call__({arguments}):
        return {result}
"""


@pytest.mark.parametrize(
    ("field", "arguments", "result", "message"),
    [
        ("gain: float = 1.0", "self, x", "x", "'FILE' takes no train in __call__; expected __call__(self, x, *, train"),
        (
            "gain: float = 1.0",
            "self, x, y, *, train=False",
            "x",
            "'FILE' can't be called with x and train: missing a required argument: 'y'; expected __call__(self, x, *",
        ),
        ("ratio: int", "self, x, *, train=False", "x", "'FILE' has no default for 'ratio'; expected one, or a value"),
        (
            "gain: float = 1.0",
            "self, x, *, train=False",
            "(x, x)",
            "'FILE:Boom' gives a tuple; expected an array of x's shape, [1, ",
        ),
        ("gain: float = 1.0", "self, x, *, train=False", "None", "'FILE:Boom' gives a NoneType; expected an array of"),
        (
            "gain: float = 1.0",
            "self, x, *, train=False",
            "x.mean((1, 2))",
            "'FILE:Boom' gives [1, 32]; expected an array of x's shape, [1, 8, 8, 32]",
        ),
        (
            "gain: float = 1.0",
            "self, x, *, train=False",
            "x[:, ::2]",
            "'FILE:Boom' gives [1, 4, 8, 32]; expected an array of x's shape, [1, 8, 8, 32]",
        ),
    ],
)
@pytest.mark.parametrize("chained", ["", "+se"])
def test_attention_that_lacks_something_is_refused_before_training(
    field, arguments, result, message, chained, experiment, tmp_path, capsys
):
    path = tmp_path / "boom.py"
    path.write_text(ATTENTION.format(field=field, arguments=arguments, result=result))
    words = ["--model.attention", f"{path}{chained}", "--run_dir", str(tmp_path / "run")]
    assert main(["train", experiment(), *words]) == 2
    error = capsys.readouterr().err
    assert f"attention {message.replace('FILE', str(path))}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_attention_without_a_call_is_refused(tmp_path):
    path = tmp_path / "boom.py"
    path.write_text("import flax.linen as nn\nclass Boom(nn.Module):\n    pass\n")
    with pytest.raises(
        ValueError, match=r"^attention .*boom.py' has no __call__; expected __call__\(self, x, \*, train"
    ):
        create(ModelConfig(backbone="densenet_tiny", weights=None, attention=f"se+{path}"), 3)


def test_attention_of_another_shape_behind_a_gate_is_not_broadcast(tmp_path):
    path = tmp_path / "boom.py"
    path.write_text(
        ATTENTION.format(
            field="n: int = 1", arguments="self, x, *, train=False", result="x.mean((1, 2), keepdims=True)"
        )
    )
    config = ModelConfig(backbone="densenet_tiny", weights=None, attention=str(path), attention_gate=True)
    with pytest.raises(ValueError, match=r"gives \[1, 1, 1, \d+\]; expected an array of x's shape, \[1, 4, 4, "):
        init(create(config, 3), jax.random.key(0), 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.attention", "se", "--model.attention_options", '{"ratio":0}'],
            "config field 'model.attention_options': option 'ratio' of attention 'se' is 0; expected a whole number",
        ),
        (
            ["--model.backbone", "densenet_tiny", "--model.backbone_options", '{"grow":3}'],
            "config field 'model.backbone_options': unknown option of backbone 'densenet_tiny' 'grow'; did you mean",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["show", "train"])
def test_an_option_that_is_not_one_of_its_field_is_one_line(verb, words, message, experiment, tmp_path, capsys):
    run = ["--run_dir", str(tmp_path / "run")] if verb == "train" else []
    assert main([verb, experiment(), *words, *run]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_head_without_train_is_refused(experiment, tmp_path, capsys):
    path = tmp_path / "head.py"
    path.write_text(
        "import flax.linen as nn\nclass H(nn.Module):\n    num_classes: int\n"
        "    def __call__(self, x):\n        return x\n"
    )
    assert main(["train", experiment(), "--model.head", str(path), "--run_dir", str(tmp_path / "run")]) == 2
    assert "takes no train in __call__" in capsys.readouterr().err
