"""Layers against Flax's, NumPy's and themselves on four devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.layers import (
    BATCH_AXIS,
    BatchNorm,
    Before,
    Conv,
    Dropout,
    all_sum,
    batch_statistics,
    global_average,
    largest_divisor,
    max_pool,
    maximum_over,
    mean_and_deviation,
    norm_before,
    over_channels,
    round_channels,
    unit_mean,
)
from bmjax.layers.collectives import batch_axis_bound
from bmjax.layers.dispatch import traced_for
from bmjax.layers.ops import shares_of

rng = np.random.default_rng


def devices_agree(fn, *args, rtol, atol):
    """fn(rows of args) -> (per-row output, tree equal everywhere), on 1 and on 4 devices; returns nothing, asserts."""
    rows, tree = fn(*args)
    split = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), args)
    rows4, tree4 = jax.pmap(fn, axis_name=BATCH_AXIS)(*split)
    np.testing.assert_allclose(np.asarray(rows4).reshape(rows.shape), rows, rtol=rtol, atol=atol)
    for one, four in zip(jax.tree.leaves(tree), jax.tree.leaves(tree4), strict=True):
        for device in range(4):
            np.testing.assert_allclose(four[device], one, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("options", "flax_padding"),
    [
        ({"kernel_size": 3, "padding": 1}, ((1, 1), (1, 1))),
        ({"kernel_size": 7, "strides": 2, "padding": 3}, ((3, 3), (3, 3))),
        ({"kernel_size": (3, 5), "strides": (2, 1), "padding": ((0, 1), (2, 0))}, ((0, 1), (2, 0))),
        ({"kernel_size": 3, "strides": 2, "padding": "SAME"}, "SAME"),
        ({"kernel_size": 3, "padding": "VALID"}, "VALID"),
        ({"kernel_size": 3, "padding": 1, "groups": 6, "use_bias": True}, ((1, 1), (1, 1))),
        ({"kernel_size": 1, "use_bias": True}, "SAME"),
        ({"kernel_size": 3, "dilation": 4, "use_bias": True}, "SAME"),
        ({"kernel_size": (7, 3), "dilation": 3, "groups": 6}, "SAME"),
        ({"kernel_size": (21, 19)}, "SAME"),
    ],
)
def test_conv_is_flax_conv(options, flax_padding):
    x = rng(0).standard_normal((2, 9, 10, 6)).astype(np.float32)
    ours = Conv(12, **options)
    params = ours.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + rng(1).standard_normal(p.shape).astype(np.float32), params)
    size, strides = options["kernel_size"], options.get("strides", 1)
    flax = nn.Conv(
        12,
        (size, size) if isinstance(size, int) else size,
        (strides, strides) if isinstance(strides, int) else strides,
        padding=flax_padding,
        use_bias=options.get("use_bias", False),
        feature_group_count=options.get("groups", 1),
        kernel_dilation=options.get("dilation", 1),
    )
    np.testing.assert_allclose(ours.apply(params, x), flax.apply(params, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"strides": 2}, {"padding": 1}])
def test_a_dilated_conv_refuses_stride_and_padding(options):
    with pytest.raises(ValueError, match=r"dilation 2 with strides .* expected stride 1, 'SAME'"):
        Conv(4, 3, dilation=2, **options).init(jax.random.key(0), jnp.zeros((1, 5, 5, 2)))


def test_a_conv_takes_what_comes_before_it():
    """As norm, activation, gate and convolution, one after another; running statistics move alike."""

    class Together(nn.Module):
        @nn.compact
        def __call__(self, x, gate, mode="train"):
            before = norm_before(x, nn.swish, name="norm", epsilon=1e-3, momentum=0.9, train=True, mode=mode)
            return Conv(4, 3, name="conv")(x, before._replace(gate=gate))

    class Apart(nn.Module):
        @nn.compact
        def __call__(self, x, gate, mode="train"):
            y = BatchNorm(0.9, 1e-3, name="norm")(x, train=True, mode=mode)
            return Conv(4, 3, name="conv")(nn.swish(y) * gate)

    x = 2 + jnp.asarray(rng(0).standard_normal((3, 5, 6, 8)), jnp.float32)
    gate = jnp.asarray(rng(1).uniform(size=(3, 1, 1, 8)), jnp.float32)
    variables = Apart().init(jax.random.key(0), x, gate)
    assert jax.tree.structure(variables) == jax.tree.structure(Together().init(jax.random.key(0), x, gate))

    def run(module, mode):
        def loss(params, x, gate):
            y, new = module.apply({**variables, "params": params}, x, gate, mode, mutable=["batch_stats"])
            return (y * jnp.cos(y)).sum(), new

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(variables["params"], x, gate)

    for mode in ("train", "stats_frozen", "frozen"):
        for a, b in zip(*(jax.tree.leaves(run(module, mode)) for module in (Together(), Apart())), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_dilated_conv_takes_nothing_before_it():
    x = jnp.ones((1, 5, 5, 2))
    before = Before(jnp.ones(2), jnp.zeros(2), nn.relu)
    with pytest.raises(ValueError, match="expected stride 1, 'SAME', and nothing before it"):
        Conv(4, 3, dilation=2).init(jax.random.key(0), x, before)


def test_conv_computes_in_its_dtype_and_keeps_float32_parameters():
    x = jnp.ones((1, 4, 4, 3), jnp.bfloat16)
    for module, expected in [(Conv(2, 3), jnp.bfloat16), (Conv(2, 3, dtype=jnp.float32), jnp.float32)]:
        y, variables = module.init_with_output(jax.random.key(0), x)
        assert y.dtype == expected
        assert variables["params"]["kernel"].dtype == jnp.float32
    with jax.enable_x64(True):
        double = Conv(2, 3, use_bias=True).init(jax.random.key(0), x.astype(jnp.float64))
        assert {leaf.dtype for leaf in jax.tree.leaves(double)} == {jnp.dtype("float32")}
    # The same draw whatever the compute type.
    np.testing.assert_array_equal(double["params"]["kernel"], variables["params"]["kernel"])


def numpy_batch_norm(x, scale, bias, mean, var, epsilon):
    x, scale, bias, mean, var = (np.asarray(v, np.float64) for v in (x, scale, bias, mean, var))
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def random_norm_variables(c, seed=0):
    r = rng(seed)
    draw = {
        "scale": r.uniform(0.5, 2, c),
        "bias": r.normal(size=c),
        "mean": r.normal(size=c),
        "var": r.uniform(0.3, 3, c),
    }
    draw = {k: v.astype(np.float32) for k, v in draw.items()}
    return {
        "params": {k: draw[k] for k in ("scale", "bias")},
        "batch_stats": {k: draw[k] for k in ("mean", "var")},
    }


@pytest.mark.parametrize("shape", [(6, 5, 3, 4), (8, 4), (1, 1, 1, 4)])
def test_batch_norm_is_numpys(shape):
    x = (3 + 2 * rng(3).standard_normal(shape)).astype(np.float32)
    variables, norm = random_norm_variables(4), BatchNorm(momentum=0.9, epsilon=1e-3)
    params, stats = variables["params"], variables["batch_stats"]

    y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)[: x.ndim - 1]), x.astype(np.float64).var((0, 1, 2)[: x.ndim - 1])
    np.testing.assert_allclose(y, numpy_batch_norm(x, **params, mean=mean, var=var, epsilon=1e-3), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.9 * stats["mean"] + 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 * stats["var"] + 0.1 * var, rtol=1e-5, atol=1e-6)

    expected = numpy_batch_norm(x, **params, **stats, epsilon=1e-3)
    for options in ({"train": False}, {"train": True, "mode": "stats_frozen"}, {"train": True, "mode": "frozen"}):
        y, new = norm.apply(variables, x, mutable=["batch_stats"], **options)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        for k in stats:
            assert np.array_equal(new["batch_stats"][k], stats[k]), f"{options} moved {k}"


def test_batch_norm_gradients_by_mode():
    x = rng(0).standard_normal((6, 4)).astype(np.float32)
    variables, norm = random_norm_variables(4), BatchNorm()
    target = rng(1).standard_normal(x.shape).astype(np.float32)

    def loss(params, mode):
        y, _ = norm.apply(variables | {"params": params}, x, train=True, mode=mode, mutable=["batch_stats"])
        return (y * target).sum()

    for mode, trains in [("train", True), ("stats_frozen", True), ("frozen", False)]:
        grads = jax.grad(loss)(variables["params"], mode)
        assert all(bool(np.any(np.asarray(g) != 0)) == trains for g in jax.tree.leaves(grads)), mode


def test_batch_norm_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="mode is 'freeze'; expected 'train'"):
        BatchNorm().init(jax.random.key(0), jnp.ones((2, 3)), mode="freeze")


def test_batch_statistics_survive_a_large_mean():
    # In one pass, E[x^2] - E[x]^2 has no digit left here.
    x = (1e4 + rng(0).standard_normal((64, 8, 8, 3))).astype(np.float32)
    mean, var = batch_statistics(jnp.asarray(x))
    np.testing.assert_allclose(mean, x.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, x.astype(np.float64).var((0, 1, 2)), rtol=1e-3)


def test_batch_norm_in_bfloat16_has_float32_statistics():
    x = jnp.asarray(5 + rng(0).standard_normal((64, 8, 8, 3)), jnp.bfloat16)
    norm = BatchNorm()
    y, variables = norm.init_with_output(jax.random.key(0), x, train=True)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-3)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-4)


def test_given_statistics_are_used_for_output_and_running_ones():
    x = rng(0).standard_normal((6, 4)).astype(np.float32)
    variables, norm = random_norm_variables(4), BatchNorm(momentum=0.5)
    given = (jnp.full(4, 2.0), jnp.full(4, 9.0))
    y, new = norm.apply(variables, x, train=True, statistics=given, mutable=["batch_stats"])
    expected = numpy_batch_norm(x, **variables["params"], mean=2.0, var=9.0, epsilon=1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.5 * variables["batch_stats"]["var"] + 4.5, rtol=1e-6)


def test_batch_norm_on_four_devices_is_that_on_one():
    """Output, gradients of input and parameters, and running statistics, in float64."""
    with jax.enable_x64(True):
        x = jnp.asarray(3 + rng(0).standard_normal((8, 3, 2, 5)), jnp.float64)
        target = jnp.asarray(rng(1).standard_normal(x.shape), jnp.float64)
        variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), random_norm_variables(5))

        def fn(x, target):
            def loss(params, x):
                y, new = BatchNorm().apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
                return (jnp.sin(y) * target).sum(), (y, new)

            (gp, gx), (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
            return jnp.stack([y, gx], axis=1), (all_sum(gp), new)

        devices_agree(fn, x, target, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("shared", [(), (1, 2)])
def test_dropout_on_four_devices_is_that_on_one(x64, shared):
    with jax.enable_x64(x64):
        x = jnp.asarray(rng(0).standard_normal((8, 3, 5)), jnp.float64 if x64 else jnp.float32)

        def fn(x):
            y = Dropout(0.4, shared).apply({}, x, train=True, rngs={"dropout": jax.random.key(7)})
            return y, jnp.zeros(())

        devices_agree(fn, x, rtol=0, atol=0)


def test_dropout_masks_are_equal_in_every_type():
    def dropped(dtype):
        y = Dropout(0.5).apply({}, jnp.ones((16, 32), dtype), train=True, rngs={"dropout": jax.random.key(3)})
        assert y.dtype == dtype
        return np.asarray(y == 0)

    single = dropped(jnp.float32)
    assert np.array_equal(single, dropped(jnp.bfloat16))
    with jax.enable_x64(True):
        assert np.array_equal(single, dropped(jnp.float64))


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = jnp.ones((64, 256))
    layer = Dropout(0.3)
    y = np.asarray(layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    assert abs((y == 0).mean() - 0.3) < 0.02  # five standard deviations
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    other = layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert not np.array_equal(y, other)
    assert layer.apply({}, x, train=False) is x
    assert Dropout(0.0).apply({}, x, train=True) is x


def test_dropout_keeps_or_zeroes_together_along_shared_axes():
    x = jnp.ones((500, 2, 3, 4))
    y = np.asarray(Dropout(0.3, shared=(1, 2, 3)).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1, :1], y.shape))
    assert abs((y[:, 0, 0, 0] == 0).mean() - 0.3) < 0.1  # five standard deviations
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    channels = Dropout(0.3, shared=(1, 2)).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert (np.asarray(channels)[:, 0, 0].std(axis=1) > 0).any()


def test_the_batch_axis_is_seen_only_where_it_is_bound():
    seen = []

    def fn(x):
        seen.append(batch_axis_bound())
        return all_sum({"x": x})["x"]

    x = jnp.arange(4.0)
    assert np.array_equal(fn(x), x)
    assert np.array_equal(jax.jit(fn)(x), x)
    assert np.array_equal(jax.pmap(fn, axis_name="other")(x), x)
    assert seen == [False] * 3
    assert np.array_equal(jax.pmap(fn, axis_name=BATCH_AXIS)(x), [6.0] * 4)
    assert seen[-1]


def test_small_helpers():
    x = jnp.asarray(rng(0).standard_normal((2, 3, 4, 5)), jnp.bfloat16)
    assert global_average(x).dtype == jnp.float32
    np.testing.assert_allclose(global_average(x), np.asarray(x, np.float64).mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert over_channels(jnp.ones(5), 4).shape == (1, 1, 1, 5)
    assert [largest_divisor(*pair) for pair in ((1664, 64), (40, 64), (24, 16), (7, 4))] == [64, 40, 12, 1]
    assert unit_mean(jnp.full((2, 3), 1.0000001), 0).max() == 1


def test_mean_and_deviation_have_a_gradient_where_all_is_equal():
    x = rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    x[..., 0] = 7
    mean, deviation = mean_and_deviation(jnp.asarray(x), (1, 2))
    np.testing.assert_allclose(mean, x.mean((1, 2), keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deviation, x.std((1, 2), keepdims=True), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: mean_and_deviation(x, (1, 2))[1].sum())(x)
    np.testing.assert_allclose(gradient[..., 1:], ((x - mean) / deviation / 12)[..., 1:], rtol=1e-4, atol=1e-6)
    assert not gradient[..., 0].any()


@pytest.mark.parametrize("spatial", [(8, 8), (9, 7), (5, 6)])
@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 2, "SAME"), (2, 2, "VALID"), (3, 2, ((0, 2), (1, 0)))],
)
def test_max_pool_and_its_gradient_are_xlas(spatial, window, stride, padding):
    # Few different values, so that many windows have several maxima.
    x = jnp.asarray(rng(0).integers(-3, 2, (2, *spatial, 3)).astype(np.float32))

    def both(x):
        y, vjp = jax.vjp(lambda x: max_pool(x, window, stride, padding), x)
        return y, vjp(jnp.asarray(rng(1).standard_normal(y.shape), jnp.float32))[0]

    # Jitted, as in training: there XLA's own needs a constant to pad with, or it has no derivative.
    y, gradient = jax.jit(both)(x)
    with traced_for("gpu"):
        expected, expected_gradient = jax.jit(lambda x: both(x))(x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    np.testing.assert_array_equal(y, nn.max_pool(x, (window, window), (stride, stride), pads))


def test_round_channels():
    assert [round_channels(n) for n in (3, 8, 11.9, 12, 19.2, 24.5, 60)] == [8, 8, 16, 16, 24, 24, 64]


def test_a_maximum_has_jnps_value_and_gradient():
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (2, 3, 4, 8)), jnp.float32)  # many are equal
    for axes in (-1, (1, 2)):
        weights = np.random.default_rng(1).standard_normal(x.max(axes).shape)

        def score(x, largest, axes=axes, weights=weights):
            return (weights * jnp.square(largest(x, axes))).sum()

        ours, theirs = (jax.value_and_grad(score)(x, largest) for largest in (maximum_over, jnp.max))
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6)


def test_a_maximum_passes_its_gradient_on_where_rounding_hid_it():
    """What XLA gave that computed x twice: the value of a maximum that no element has bit for bit."""
    x = jnp.asarray([[1.0, 3.0, 2.0]])
    rounded = np.nextafter(np.float32(3), np.float32(4))
    (tangent,) = jax.vjp(lambda x: maximum_over(x, -1), x)[1](jnp.ones(1))
    np.testing.assert_array_equal(tangent, [[0, 1, 0]])
    np.testing.assert_array_equal(shares_of(x, jnp.asarray([[rounded]]), -1), [[0, 1, 0]])
    assert np.isfinite(shares_of(x, jnp.asarray([[np.float32(np.inf)]]), -1)).all()


@pytest.mark.parametrize(
    ("train", "mode"), [(True, "train"), (True, "stats_frozen"), (True, "frozen"), (False, "train")]
)
def test_a_norms_shift_is_a_bias_before_it(train, mode):
    """A convolution's bias costs no pass over its result; a norm by the batch takes it off again."""

    def results(x, shift, apart):
        y, new = norm.apply(
            variables,
            x if apart else x + over_channels(shift, 4),
            train=train,
            mode=mode,
            shift=shift if apart else None,
            mutable=["batch_stats"],
        )
        return jnp.sin(y).sum(), (y, new)

    def graded(apart):
        return jax.value_and_grad(functools.partial(results, apart=apart), (0, 1), has_aux=True)(x, shift)

    with jax.enable_x64(True):
        norm = BatchNorm()
        x, shift = (jnp.asarray(rng(i).standard_normal(shape)) for i, shape in enumerate(((3, 4, 5, 6), (6,))))
        variables = norm.init(jax.random.key(0), x)
        variables["batch_stats"]["mean"] = 0.3 * shift
        found, expected = graded(True), graded(False)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # running statistics are float32
    assert (not np.any(found[1][1])) == (train and mode == "train")
