"""ImageNet's classes by name, and the usual view of an image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bmjax import weights
from bmjax.backbones import create_backbone
from bmjax.weights import catalog, imagenet, safetensors_files


def test_the_classes_are_in_the_order_of_the_synsets():
    names = imagenet.class_names()
    assert len(names) == 1000
    assert [synset for synset, _ in names] == sorted({synset for synset, _ in names})
    first = {i: names[i][1].split(", ")[0] for i in (0, 1, 281, 717, 817, 999)}
    assert first == {0: "tench", 1: "goldfish", 281: "tabby", 717: "pickup", 817: "sports car", 999: "toilet tissue"}
    assert names[0][0] == "n01440764"


def test_the_centre_is_cropped_from_the_shorter_side():
    pixels = np.zeros((350, 700, 3), np.uint8)
    pixels[:, 175:525, 0] = 200  # the square in the middle
    view = imagenet.centre_crop(Image.fromarray(pixels), 224)
    assert view.shape == (224, 224, 3)
    assert (view[:, :, 0] == 200).all()
    assert imagenet.centre_crop(Image.new("RGB", (10, 3)), 224).shape == (224, 224, 3)


@pytest.fixture
def tiny_weights(tmp_path):
    """A ported file of the tiny DenseNet with ImageNet's classes, which always says that it's a tabby."""
    model = create_backbone("densenet_tiny", include_top=True)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = jax.tree.map(np.array, {k: variables[k] for k in ("params", "batch_stats")})
    variables["params"]["predictions"]["bias"][281] = 50
    record = dataclasses.replace(
        catalog.unpublished("densenet_tiny", "keras", "tabby", top=True),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables)),
        input_size=64,
        checksum=safetensors_files.leaves_checksum(variables),
    )
    path = tmp_path / "tabby.safetensors"
    safetensors_files.write(path, variables, record)
    return path


def test_images_are_named_by_the_weights_own_input(tiny_weights, tmp_path, capsys):
    from bmjax.cli.main import main

    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(photo)
    arguments = ["predict", "--weights", str(tiny_weights), "--backbone", "densenet_tiny", "--top", "3", str(photo)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tabby: 64 pixels, preprocessing torch"
    assert lines[1] == f"{photo}:"
    assert lines[2].split(maxsplit=1) == ["1.0000", "tabby, tabby cat"]
    assert len(lines) == 5

    photo.write_text("no image")
    assert main(arguments) == 2
    assert f"{photo}: not an image of a known kind" in capsys.readouterr().err


def test_other_classes_are_not_named(tiny_weights):
    variables = weights.read(tiny_weights, "densenet_tiny")[1]
    record = safetensors_files.read(tiny_weights)[1]
    variables["params"]["predictions"] = {k: v[..., :7] for k, v in variables["params"]["predictions"].items()}
    safetensors_files.write(
        tiny_weights, variables, dataclasses.replace(record, checksum=safetensors_files.leaves_checksum(variables))
    )
    with pytest.raises(ValueError, match="7 classes; expected ImageNet's 1000"):
        imagenet.classify("densenet_tiny", str(tiny_weights), [])
