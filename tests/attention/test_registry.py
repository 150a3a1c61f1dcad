"""Variants by name, by file and by path; chains of them; the gate that starts as the identity."""

import inspect
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from bmjax.attention import IdentityGate, create_attention
from bmjax.registry import modules
from tests.helpers import formulas
from tests.helpers.variants import C, features, forward


def shapes(module, x=None):
    variables = jax.eval_shape(module.init, jax.random.key(0), features() if x is None else x)
    return jax.tree.map(np.shape, dict(variables["params"]))


def test_options_are_fields_and_lists_become_tuples():
    module = create_attention("soft", widths=[8, 4])
    kernels = {k: v["kernel"] for k, v in shapes(module).items()}
    assert kernels == {"conv1": (1, 1, C, 8), "conv2": (1, 1, 8, 4), "mask": (1, 1, 4, 1)}
    hash(module)


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    source = "import flax.linen as nn\nclass Twice(nn.Module):\n    gain: float = 2.0\n"
    source += "    def __call__(self, x, *, train=False):\n        return self.gain * x\nother = 3\n"
    (tmp_path / "mylab_attn.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_class_of_another_package_is_found(mylab):
    module = create_attention("mylab_attn:Twice", gain=3.0)
    assert np.array_equal(module.apply({}, features()), 3 * features())
    with pytest.raises(ValueError, match="expected a subclass of flax"):
        create_attention("mylab_attn:other")
    with pytest.raises(ValueError, match="unknown name in module 'mylab_attn' 'Twise'; did you mean 'Twice'"):
        create_attention("mylab_attn:Twise")


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown attention 'sofd'; did you mean 'soft'"):
        create_attention("sofd")
    with pytest.raises(ValueError, match="unknown option of attention 'se' 'ration'; did you mean 'ratio'"):
        create_attention("se", ration=8)
    with pytest.raises(ValueError, match="cannot import 'no_such_module'"):
        create_attention("no_such_module:Foo")


def test_every_variants_file_begins_with_its_paper():
    """`bmjax list attention` prints the first line. `none` has no paper, `soft` is ours."""
    for name, module in modules("bmjax.attention").items():
        if hasattr(formulas, name) and name not in ("none", "soft"):
            assert re.search(r" \(.* \d{4}, .*https://\S+\)\.$", (module.__doc__ or "").splitlines()[0]), name


def test_a_chain_is_its_variants_one_after_the_other(mylab):
    options = json.loads('{"se": {"ratio": 8}, "se_2": {"ratio": 4}, "Twice": {"gain": 3.0}}')
    chain = create_attention("se+simam+mylab_attn:Twice+se", **options)
    assert {k: v["reduce"]["kernel"] for k, v in shapes(chain).items()} == {"se": (C, 4), "se_2": (C, 8)}
    hash(chain)
    variables = jax.jit(chain.init)(jax.random.key(0), features())
    y, new = chain.apply(variables, features(), mutable=["intermediates"])
    maps, x = new["intermediates"], features()
    for part, module in (
        ("se", create_attention("se", ratio=8)),
        ("simam", create_attention("simam")),
        (None, create_attention("mylab_attn:Twice", gain=3.0)),
        ("se_2", create_attention("se", ratio=4)),
    ):
        if part is None:
            x = module.apply({}, x)
            continue
        out = forward(module, {"params": variables["params"].get(part, {})}, x)
        np.testing.assert_allclose(maps[part]["map"][0], out["map"], rtol=1e-5, atol=1e-5)
        x = out["y"]
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_a_file_in_a_chain_goes_by_its_stem(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(pathlib.Path(inspect.getfile(type(create_attention("se")))).read_text())
    assert shapes(create_attention(f"se+{path}", mine={"ratio": 4}))["mine"]["reduce"]["kernel"] == (C, 8)


def test_a_chain_trains_its_norms():
    chain = create_attention("cbam+none")
    variables = jax.eval_shape(chain.init, jax.random.key(0), features())
    variables = jax.tree.map(lambda v: np.ones(v.shape, v.dtype), {k: variables[k] for k in ("params", "batch_stats")})
    _, new = chain.apply(variables, features(), train=True, mutable=["batch_stats"])
    assert not np.array_equal(
        new["batch_stats"]["cbam"]["spatial_bn"]["mean"], variables["batch_stats"]["cbam"]["spatial_bn"]["mean"]
    )


def test_errors_of_chains_name_the_part():
    with pytest.raises(ValueError, match="unknown attention 'simat'; did you mean 'simam'"):
        create_attention("se+simat")
    with pytest.raises(ValueError, match=r"unknown attention ''; known: bam"):
        create_attention("se+")
    with pytest.raises(
        ValueError, match=r"unknown part of attention 'se\+eca' in its options 'ecs'; did you mean 'eca'"
    ):
        create_attention("se+eca", ecs={})
    with pytest.raises(ValueError, match=r"unknown part .* 'ratio'; known: eca, se"):
        create_attention("se+eca", ratio=8)
    with pytest.raises(ValueError, match=r"option 'se' of attention 'se\+eca' is 8; expected a dict of its fields"):
        create_attention("se+eca", se=8)
    with pytest.raises(ValueError, match="unknown option of attention 'eca' 'gama'; did you mean 'gamma'"):
        create_attention("se+eca", eca={"gama": 1})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_starts_as_the_identity_and_gamma_gets_a_gradient(dtype):
    x, y = features(dtype=dtype), features(seed=1, dtype=dtype)
    gate = IdentityGate()
    variables = gate.init(jax.random.key(0), x, y)
    assert jax.tree.map(lambda v: (v.shape, v.dtype.name), variables) == {"params": {"gamma": ((C,), "float32")}}
    assert np.array_equal(gate.apply(variables, x, y), x)
    assert np.array_equal(gate.apply({"params": {"gamma": np.ones(C, np.float32)}}, x, np.zeros_like(x)), 0 * x)
    grads = jax.grad(lambda v: gate.apply(v, x, y).astype("float32").sum())(variables)
    difference = np.asarray(y, np.float64) - np.asarray(x, np.float64)
    np.testing.assert_allclose(grads["params"]["gamma"], difference.sum((0, 1, 2)), rtol=1e-5, atol=1e-4)
