"""Every listed attention variant keeps the contract; soft, se and cbam are what their papers say."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.analysis.contract import CHECKS, examine
from bmjax.attention import create_attention, list_attention

ALL = list_attention()
GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
C = 64


def images(shape=(3, 7, 9, C), seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@functools.cache
def variables_of(name):
    """Random variables, biases and statistics too, so that nothing hides behind a zero."""
    variables = create_attention(name).init(jax.random.key(0), images())
    r = np.random.default_rng(1)
    return {
        # A var must stay positive; all else moves by a tenth.
        collection: jax.tree.map(lambda v: v + jnp.asarray(0.1 * np.abs(r.standard_normal(v.shape)), v.dtype), tree)
        for collection, tree in variables.items()
        if collection in ("params", "batch_stats")
    }


def apply(name, x, *, train=False, variables=None):
    """(y, map, everything else mutable)."""
    variables = variables_of(name) if variables is None else variables
    y, new = create_attention(name).apply(
        variables, x, train=train, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats", "intermediates"]
    )
    return y, new["intermediates"]["map"][0], new


def test_the_four_variants_are_listed():
    assert {"none", "soft", "se", "cbam"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_the_contract_is_kept(name):
    verdicts = examine(functools.partial(create_attention, name))
    assert [v.name for v in verdicts] == list(CHECKS)
    assert [v for v in verdicts if v.status != "ok"] == []


@pytest.mark.parametrize("name", ALL)
def test_float64_is_float64_throughout(name):
    with jax.enable_x64(True):
        double = {k: jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), t) for k, t in variables_of(name).items()}
        x = jax.ShapeDtypeStruct((3, 7, 9, C), jnp.float64)
        found = jax.eval_shape(functools.partial(apply, name, train=True, variables=double), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float64")}


# What each is, in NumPy and float64.


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def relu(z):
    return np.maximum(z, 0)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def numpy_soft(variables, x):
    p = variables["params"]
    z = x
    for i in range(1, len(p)):
        z = relu(z @ p[f"conv{i}"]["kernel"][0, 0] + p[f"conv{i}"]["bias"])
    m = sigmoid(z @ p["mask"]["kernel"][0, 0] + p["mask"]["bias"])[..., 0]
    return x * (m / m.mean((1, 2), keepdims=True))[..., None], m


def numpy_se(variables, x):
    p = variables["params"]
    gate = sigmoid(dense(p["expand"], relu(dense(p["reduce"], x.mean((1, 2))))))
    return x * gate[:, None, None], gate


def numpy_cbam(variables, x):
    p, stats = variables["params"], variables["batch_stats"]["spatial_bn"]

    def shared(v):
        return dense(p["expand"], relu(dense(p["reduce"], v)))

    x = x * sigmoid(shared(x.mean((1, 2))) + shared(x.max((1, 2))))[:, None, None]
    kernel = p["spatial_conv"]["kernel"][..., 0]
    pad = kernel.shape[0] // 2
    places = np.pad(np.stack([x.max(-1), x.mean(-1)], -1), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    z = np.empty(x.shape[:3])
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            patch = places[:, i : i + kernel.shape[0], j : j + kernel.shape[1]]
            z[:, i, j] = (patch * kernel).sum((1, 2, 3))
    norm = p["spatial_bn"]
    z = (z - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    return x * sigmoid(z)[..., None], sigmoid(z)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (4, 12)])
@pytest.mark.parametrize(("name", "formula"), [("soft", numpy_soft), ("se", numpy_se), ("cbam", numpy_cbam)])
def test_variants_are_their_formulas(name, formula, size):
    x = images((2, *size, C), seed=3)
    double = jax.tree.map(lambda v: np.asarray(v, np.float64), variables_of(name))
    y, m = formula(double, np.asarray(x, np.float64))
    ours_y, ours_m, _ = apply(name, x)
    np.testing.assert_allclose(ours_y, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours_m, m, rtol=1e-5, atol=1e-5)


def test_soft_makes_average_pooling_a_weighted_mean():
    x = images()
    y, m, _ = apply("soft", x)
    weights = np.asarray(m / m.sum((1, 2), keepdims=True))
    np.testing.assert_allclose(y.mean((1, 2)), np.einsum("bhw,bhwc->bc", weights, x), rtol=1e-4, atol=1e-5)
    assert np.ptp(weights) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_soft_survives_a_mask_that_is_zero_everywhere(dtype):
    module = create_attention("soft", widths=())
    x = jnp.asarray([[-2.0, -1.0], [-1.5, -1.0]], jnp.dtype(dtype)).reshape(1, 2, 2, 1)
    variables = {"params": {"mask": {"kernel": jnp.full((1, 1, 1, 1), 1000.0), "bias": jnp.zeros(1)}}}
    y, new = module.apply(variables, x, mutable=["intermediates"])
    assert not np.asarray(new["intermediates"]["map"][0], np.float32).any()
    # The two least negative places share all the weight: -1 * 2 each.
    np.testing.assert_allclose(np.asarray(y, np.float32).reshape(2, 2), [[0, -2], [0, -2]], atol=1e-6)
    grads = jax.grad(lambda v: module.apply(v, x).astype(jnp.float32).sum())(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def torch_conv(w):
    """OIHW of a 1x1 convolution -> kernel of a dense layer."""
    return w[:, :, 0, 0].T


def test_se_is_timms():
    z = np.load(GOLDEN / "attention_se_timm.npz")
    params = {
        ours: {"kernel": torch_conv(z[f"w/{timm}.weight"]), "bias": z[f"w/{timm}.bias"]}
        for ours, timm in (("reduce", "fc1"), ("expand", "fc2"))
    }
    # timm rounds 32 / 16 up to its least width, 8.
    y = create_attention("se", ratio=4).apply({"params": params}, z["x"])
    np.testing.assert_allclose(y, z["y"], rtol=1e-5, atol=1e-6)


def test_cbam_is_timms():
    z = np.load(GOLDEN / "attention_cbam_timm.npz")
    bn = "w/spatial.conv.bn"
    # timm stacks [mean, max], the authors' code [max, mean].
    kernel = z["w/spatial.conv.conv.weight"].transpose(2, 3, 1, 0)[:, :, ::-1]
    variables = {
        "params": {
            "reduce": {"kernel": torch_conv(z["w/channel.fc1.weight"])},
            "expand": {"kernel": torch_conv(z["w/channel.fc2.weight"])},
            "spatial_conv": {"kernel": kernel},
            "spatial_bn": {"scale": z[f"{bn}.weight"], "bias": z[f"{bn}.bias"]},
        },
        "batch_stats": {"spatial_bn": {"mean": z[f"{bn}.running_mean"], "var": z[f"{bn}.running_var"]}},
    }
    y = create_attention("cbam", use_bias=False).apply(variables, z["x"])
    np.testing.assert_allclose(y, z["y"], rtol=1e-5, atol=1e-6)


# The registry.


def test_options_are_fields_and_lists_become_tuples():
    module = create_attention("soft", widths=[8, 4])
    params = module.init(jax.random.key(0), images())["params"]
    assert {k: v["kernel"].shape for k, v in params.items()} == {
        "conv1": (1, 1, C, 8),
        "conv2": (1, 1, 8, 4),
        "mask": (1, 1, 4, 1),
    }
    hash(module)


def test_a_class_of_another_package_is_found(tmp_path, monkeypatch):
    source = "import flax.linen as nn\nclass Twice(nn.Module):\n    gain: float = 2.0\n"
    source += "    def __call__(self, x, *, train=False):\n        return self.gain * x\nother = 3\n"
    (tmp_path / "mylab_attn.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = create_attention("mylab_attn:Twice", gain=3.0)
    assert np.array_equal(module.apply({}, images()), 3 * images())
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
