"""torch's state dicts without torch: the right values, the namings people have, and anything executable refused."""

import logging
import zipfile

import jax
import numpy as np
import pytest

from bmjax import weights
from bmjax.weights import torch_files
from tests.helpers import torch_saved
from tests.helpers.timm_golden import GOLDEN, state_dict
from tests.helpers.torch_saved import dictionary, named, number, numbers, tensor, text, write

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_what_torch_itself_wrote():
    """By torch 2.14.1: base = torch.arange(24.).reshape(4, 6); a = base[1:3, ::2], t = base.T, e = torch.zeros(0, 3),
    s = torch.tensor(7), b = bfloat16 [1.5, -2.25], i = torch.tensor([True, False]), p = nn.Parameter(torch.ones(2))."""
    found = torch_files.read(GOLDEN / "torch_state_dict.pth")
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    right = {"a": base[1:3, ::2], "t": base.T, "e": np.zeros((0, 3), np.float32), "s": np.int64(7)}
    right |= {"b": np.float32([1.5, -2.25]), "i": np.array([True, False]), "p": np.ones(2, np.float32)}
    assert list(found) == ["a", "t", "e", "s", "b", "i", "p"]
    for name, array in right.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "i4", "u1", "b1"])
def test_each_type(tmp_path, dtype):
    array = np.array([[0, 1, 3], [1, 0, 2]]).astype(dtype)
    torch_saved.save(tmp_path / "w.pth", {"x": array})
    np.testing.assert_array_equal(torch_files.read(tmp_path / "w.pth")["x"], array, strict=True)


@pytest.fixture(scope="module")
def densenet():
    return state_dict("densenet121")


@pytest.fixture(scope="module")
def right(densenet, tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "w.pth"
    torch_saved.save(path, densenet)
    record, variables = weights.read(path, "densenet121")
    assert record.top
    assert record.source == "timm"
    return variables


def old_names(key):
    return key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.")


@pytest.mark.parametrize("within", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_the_namings_people_have(tmp_path, caplog, densenet, right, within, prefix):
    own = {old_names(key): array for key, array in densenet.items() if not key.startswith("classifier")}
    own |= {"classifier.1.weight": np.ones((3, 1024), np.float32), "classifier.1.bias": np.ones(3, np.float32)}
    torch_saved.save(tmp_path / "w.pth", own, within=within, prefix=prefix)
    with caplog.at_level(logging.INFO, "bmjax"):
        record, variables = weights.read(tmp_path / "w.pth", "densenet121")
    assert not record.top
    expected = {name: {k: v for k, v in tree.items() if k != "predictions"} for name, tree in right.items()}
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert "left out, as the head of a fine-tuned model: classifier.1.weight, classifier.1.bias" in caplog.text
    assert ("taken is 'state_dict' of a checkpoint; left out: epoch" in caplog.text) == (within == "state_dict")


def test_torchvisions_mobilenet_is_timms(tmp_path):
    from bmjax.backbones import create_backbone, mobilenet_v2

    model = create_backbone("mobilenet_v2", include_top=True)
    _, order = weights.network_shapes(model)
    ours = {mobilenet_v2.timm_name(model, layer): mobilenet_v2.torchvision_name(model, layer) for layer in order}
    assert ours["conv_stem"] == "features.0.0"
    assert ours["blocks.0.0.conv_pw"] == "features.1.conv.1"
    assert ours["blocks.1.0.conv_dw"] == "features.2.conv.1.0"
    assert ours["blocks.6.0.bn3"] == "features.17.conv.3"
    assert ours["conv_head"] == "features.18.0"
    timm = {k: v for k, v in state_dict("mobilenet_v2").items() if not k.endswith("num_batches_tracked")}
    renamed = {f"{ours[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": array for key, array in timm.items()}
    torch_saved.save(tmp_path / "timm.pth", timm)
    torch_saved.save(tmp_path / "torchvision.pth", renamed)
    both = [weights.read(tmp_path / f"{name}.pth", "mobilenet_v2")[1] for name in ("timm", "torchvision")]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_a_single_dense_layer_is_kept_as_the_top(tmp_path, densenet):
    own = {key: array for key, array in densenet.items() if not key.startswith("classifier")}
    kernel = np.arange(3 * 1024, dtype=np.float32).reshape(3, 1024)
    one = own | {"classifier.1.weight": kernel, "classifier.1.bias": np.ones(3, np.float32)}
    torch_saved.save(tmp_path / "w.pth", one)
    record, variables = weights.read(tmp_path / "w.pth", "densenet121", head="keep")
    assert record.top
    np.testing.assert_array_equal(variables["params"]["predictions"]["kernel"], kernel.T)
    torch_saved.save(tmp_path / "w.pth", one | {"classifier.4.weight": np.ones((3, 3), np.float32)})
    with pytest.raises(ValueError, match=r"the head is classifier\.1\.weight, .*; --head keep takes one dense layer"):
        weights.read(tmp_path / "w.pth", "densenet121", head="keep")


def test_two_networks_in_one_file_are_refused(tmp_path, densenet):
    torch_saved.save(tmp_path / "w.pth", {f"{k}.{name}": a for name, a in densenet.items() for k in ("student", "ema")})
    with pytest.raises(ValueError, match=r"holds densenet121 2 times, under 'student\.', 'ema\.'; expected once"):
        weights.read(tmp_path / "w.pth", "densenet121")


CALL = named("posix", "system") + text("touch pwned") + b"\x85R"
REFUSED = {
    "a function": (CALL, "asks for posix.system"),
    "a function by its parts": (text("posix") + text("system") + b"\x93" + text("ls") + b"\x85R", "posix.system"),
    "an object": (named("torchvision.models", "DenseNet") + b")\x81", "an object of torchvision.models.DenseNet"),
    "a class alone": (dictionary([("x", named("os", "system"))]), "'x' is a _Global"),
    "a dict of arguments": (named("collections", "OrderedDict") + b"((" + text("a") + number(1) + b"ttR", "arguments"),
    "another storage": (tensor("0", VALUES, storage="UntypedStorage"), "torch.UntypedStorage; expected one of"),
    "a storage of another module": (
        b"(" + text("storage") + named("evil", "FloatStorage") + text("0") + text("cpu") + number(1) + b"tQ",
        "a storage of evil.FloatStorage",
    ),
    "an extension": (b"\x82\x01", "opcode EXT1"),
    "an instance": (b"(" + b"ios\nsystem\n", "opcode INST"),
    "a persistent name": (b"Pabc\n", "opcode PERSID"),
    "attributes of another": (named("os", "system") + b"}b", "asks for os.system"),
    "no dict": (numbers([1]), "a tuple where the format has a dict"),
    "a plain value": (dictionary([("x", number(3))]), "'x' is a int; expected tensors by name"),
    "beyond the storage": (dictionary([("x", tensor("0", VALUES, offset=1))]), "in a storage of 6 values"),
    "before the storage": (dictionary([("x", tensor("0", VALUES, offset=-1))]), "in a storage of 6 values"),
    "spread": (dictionary([("x", tensor("0", VALUES, shape=(1 << 40,), strides=(0,)))]), "in a storage of 6 values"),
    "longer than its part": (dictionary([("x", tensor("0", VALUES, count=7))]), "has 24 bytes; expected 28"),
    "another part": (dictionary([("x", tensor("9", VALUES))]), "no part archive/data/9"),
    "a key that is a tuple": (named("collections", "OrderedDict") + b")R)" + number(1) + b"s", "key is a tuple"),
    "values left over": (b"}}", "left over"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[name]
    write(tmp_path / "w.pth", content, {"0": VALUES.tobytes()})
    with pytest.raises(ValueError, match=message) as error:
        weights.read(tmp_path / "w.pth", "densenet121")
    assert str(error.value).startswith(f"{tmp_path / 'w.pth'}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_sizes_are_looked_at_before_reading(tmp_path):
    path = tmp_path / "w.pth"
    write(path, dictionary([("x", tensor("0", VALUES))]), {"0": VALUES.tobytes()}, packing=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"data\.pkl is compressed or encrypted"):
        torch_files.read(path)
    write(path, bytes(torch_files.PICKLE), {})
    with pytest.raises(ValueError, match="has 8000003 bytes; expected at most 8000000"):
        torch_files.read(path)


def test_the_format_of_before_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    with pytest.raises(ValueError, match=r"never unpickled\. Rewrite it with torch: torch\.save\(torch\.load\(OLD, "):
        weights.read(path, "densenet121")
