"""Variants by name, by file and by path; chains of them; the gate that starts as the identity."""

import dataclasses
import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.attention import IdentityGate, create_attention, list_attention
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
    with pytest.raises(ValueError, match="expected a Flax module"):
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


FIELDS = [
    (name, field.name, getattr(create_attention(name), field.name))
    for name in list_attention()
    for field in dataclasses.fields(create_attention(name))
    if field.name not in ("parent", "name")
]
WRONG = {bool: ["no", "false", 1, None], int: ["8", 2.5, True, [1], -4], float: ["1", True, float("nan"), [1.0]]}
WRONG |= {str: [3, "", True, None], tuple: [16, "8", [0], [8, True], [2.5], {"a": 1}], type(None): ["3", 2.5, 0, 4]}
# Where nought is a value like others.
NOUGHT = {("gather_excite", "extent"), ("mhsa", "max_distance"), ("eca", "beta")}


@pytest.mark.parametrize(("name", "field", "default"), FIELDS)
def test_each_option_is_held_to_its_field(name, field, default):
    create_attention(name, **{field: default})
    refused = list(WRONG[type(default)])
    if type(default) in (int, float) and (name, field) not in NOUGHT:
        refused += [0, -1]
    if field == "kernel_size" and name != "large_kernel":
        refused += [0, 4]
    for value in refused:
        words = re.escape(f"option {field!r} of attention {name!r} is {value!r}; expected ")
        with pytest.raises(ValueError, match=f"^{words}"):
            create_attention(name, **{field: value})


@pytest.mark.parametrize(("name", "field", "default"), [f for f in FIELDS if type(f[2]) in (int, float)])
def test_the_least_that_is_taken_works(name, field, default):
    least = 0 if (name, field) in NOUGHT else 1
    jax.eval_shape(create_attention(name, **{field: least}).init, jax.random.key(0), features())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("se", {"ratio": 0}, "is 0; expected a whole number, at least 1"),
        ("cbam", {"kernel_size": 4}, "is 4; expected a whole number, odd and at least 1"),
        ("eca", {"kernel_size": "3"}, "is '3'; expected a whole number or None, odd and at least 1"),
        ("simam", {"e_lambda": -1}, "is -1; expected a number, above 0"),
        ("soft", {"widths": 16}, "is 16; expected a list, each a whole number, at least 1"),
        ("ese", {"gate": "hard_sigmod"}, "expected one of 'sigmoid', 'hard_sigmoid'; did you mean 'hard_sigmoid'?"),
        ("se+se", {"se_2": {"ratio": 0}}, "option 'ratio' of attention 'se' is 0"),
        ("se", {"name": "x"}, "unknown option of attention 'se' 'name'; known: ratio"),
    ],
)
def test_errors_of_values_say_what_is_expected(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_attention(name, **options)


def test_numbers_of_numpy_and_whole_ones_for_others_are_taken():
    assert create_attention("se", ratio=np.int64(4)) == create_attention("se", ratio=4)
    assert create_attention("simam", e_lambda=1).e_lambda == 1.0
    assert create_attention("soft", widths=np.array([8, 4])).widths == (8, 4)
    assert create_attention("soft", widths=[]).widths == (), "one convolution alone gives the mask"


@pytest.mark.parametrize("name", [None, 3, IdentityGate])
def test_a_name_is_text(name):
    with pytest.raises(TypeError, match=r"^name is .*; expected text: a variant's name"):
        create_attention(name)


OWN = """
from __future__ import annotations
import typing
import flax.linen as nn
if typing.TYPE_CHECKING:
    import nowhere
class Mine(nn.Module):
    {fields}
    def __call__(self, x, *, train=False):
        return x
"""


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ("n: int = 1", {"n": 0}, None),
        ("n: int = 1", {"n": -3}, None),
        ("n: int = 1", {"n": True}, "'n' of attention 'FILE' is True; expected a whole number"),
        ("n: int = 1", {"n": "8"}, "'n' of attention 'FILE' is '8'; expected a whole number"),
        ("x: float = 1.0", {"x": 2}, None),
        ("x: float = 1.0", {"x": "2"}, "is '2'; expected a number"),
        ("sides: tuple[int, str] = (1, 'a')", {"sides": [2, "b"]}, None),
        ("sides: tuple[int, str] = (1, 'a')", {"sides": [2]}, "is [2]; expected a list of 2: a whole number, text"),
        ("sides: list[int] = None", {"sides": [2, 3]}, None),
        ("pairs: tuple[tuple[int, int], ...] = ()", {"pairs": [[1, 2]]}, None),
        ("table: dict[str, int] = None", {"table": 3}, "is 3; expected a dict with names as keys"),
        ("made: typing.Callable = None", {"made": jnp.tanh}, None),
        ("made: int | nn.Module = 1", {"made": "a"}, None),
        ("dtype: str = 'float32'", {"dtype": jnp.bfloat16}, None),
        ("other: nowhere.Type = None", {"other": "a"}, None),
        ("n: int = 1", {"m": 1}, "unknown option of attention 'FILE' 'm'; known: n"),
    ],
)
def test_options_of_ones_own_are_held_to_their_types_alone(fields, options, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN.format(fields=fields))
    if message is None:
        module = create_attention(str(path), **options)
        for name, value in options.items():
            lists = json.dumps(value) if isinstance(value, list) else value
            found = getattr(module, name)
            assert (json.dumps(found) if isinstance(found, tuple) else found) == lists
            hash(found)
        return
    with pytest.raises(ValueError, match=re.escape(message.replace("FILE", str(path)))):
        create_attention(str(path), **options)


def test_a_field_of_ones_own_that_has_no_value_is_named(tmp_path):
    """As a TypeError, as where the class itself is called: `bmjax check` goes on to say what the file lacks."""
    path = tmp_path / "mine.py"
    path.write_text(OWN.format(fields="n: int"))
    with pytest.raises(TypeError, match=r"mine.py' has no default for 'n'; expected one, or a value in its options$"):
        create_attention(f"se+{path}")
    assert create_attention(str(path), n=2).n == 2


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
