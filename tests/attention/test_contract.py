"""Every listed attention variant keeps the contract; soft, se and cbam are what their papers say."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.attention import create_attention, list_attention
from bmjax.layers import BATCH_AXIS

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


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 9), (8, 8)])
@pytest.mark.parametrize("name", ALL)
def test_shapes_types_and_the_map(name, size, dtype, train):
    x = images((2, *size, C), dtype=jnp.dtype(dtype))
    y, m, _ = apply(name, x, train=train)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert m.shape in ((2, *size), (2, C))
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert 0 <= float(m.min()) <= float(m.max()) <= 1


@pytest.mark.parametrize("name", ALL)
def test_float64_is_float64_throughout(name):
    with jax.enable_x64(True):
        double = {k: jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), t) for k, t in variables_of(name).items()}
        y, _, new = apply(name, images(dtype=jnp.float64), train=True, variables=double)
        assert {leaf.dtype for leaf in jax.tree.leaves((y, new))} == {jnp.dtype("float64")}
    single, _, _ = apply(name, images(), train=True)
    # A hidden cast to float32 would leave these equal in every digit.
    np.testing.assert_allclose(single, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_reaches_every_parameter_and_the_input(name):
    x, target = images(), images(seed=5)
    rest = {k: v for k, v in variables_of(name).items() if k != "params"}

    def loss(params, x):
        y, _, _ = apply(name, x, train=True, variables=rest | {"params": params})
        return (y * target).sum()

    params = variables_of(name).get("params", {})
    grads, grad_x = jax.grad(loss, argnums=(0, 1))(params, x)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), jax.tree_util.keystr(path)
        assert np.abs(g).max() > 1e-6, f"no gradient at {jax.tree_util.keystr(path)}"
    assert (np.abs(grad_x).max((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_eager_is_jit(name, train):
    eager = apply(name, images(), train=train)
    jitted = jax.jit(functools.partial(apply, name, train=train))(images())
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -300.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_constant_input_gives_no_nan(name, dtype, value):
    x = jnp.full((2, 5, 4, C), value, jnp.dtype(dtype))
    for train in (False, True):

        def loss(params, x, train=train):
            rest = {k: v for k, v in variables_of(name).items() if k != "params"}
            return apply(name, x, train=train, variables=rest | {"params": params})[0].astype(jnp.float32).sum()

        value_and_grad = jax.value_and_grad(loss, argnums=(0, 1))(variables_of(name).get("params", {}), x)
        assert all(np.isfinite(np.asarray(v, np.float32)).all() for v in jax.tree.leaves(value_and_grad))


@pytest.mark.parametrize("name", ALL)
def test_samples_do_not_leak_into_each_other_in_evaluation(name):
    x = images()
    y, m, _ = apply(name, x)
    y2, m2, _ = apply(name, x.at[0].set(17 * images(seed=9)[0]))
    assert np.array_equal(y[1:], y2[1:])
    assert np.array_equal(m[1:], m2[1:])
    # A sample's result does not depend on how many others there are.
    np.testing.assert_allclose(apply(name, x[1:2])[0], y[1:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_evaluation_moves_no_statistics(name):
    _, _, new = apply(name, images(), train=False)
    for a, b in zip(
        jax.tree.leaves(new.get("batch_stats", {})),
        jax.tree.leaves(variables_of(name).get("batch_stats", {})),
        strict=True,
    ):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ALL)
def test_variables_do_not_depend_on_train_or_size(name):
    def shapes(train, x):
        variables = create_attention(name).init(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, train=train
        )
        return jax.tree.map(jnp.shape, {k: v for k, v in variables.items() if k != "intermediates"})

    assert shapes(False, images()) == shapes(True, images()) == shapes(True, images((1, 3, 2, C)))


@pytest.mark.parametrize("name", ALL)
def test_four_devices_are_one(name):
    with jax.enable_x64(True):
        x = images((4, 5, 3, C), dtype=jnp.float64)
        double = {k: jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), t) for k, t in variables_of(name).items()}
        fn = functools.partial(apply, name, train=True, variables=double)
        y, _, new = fn(x)
        y4, _, new4 = jax.pmap(fn, axis_name=BATCH_AXIS)(x[:, None])
    np.testing.assert_allclose(y4[:, 0], y, rtol=1e-10, atol=1e-10)
    for one, four in zip(
        jax.tree.leaves(new.get("batch_stats", {})), jax.tree.leaves(new4.get("batch_stats", {})), strict=True
    ):
        np.testing.assert_allclose(four, np.broadcast_to(one, four.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_modules_are_hashable_and_made_from_json(name):
    module = create_attention(name)
    assert hash(module) == hash(create_attention(name))
    assert module == create_attention(name)


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
