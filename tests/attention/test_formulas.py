"""Every variant is its paper's equations, written in NumPy and float64, and timm's where timm has it."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.attention import IdentityGate, create_attention, list_attention
from tests.helpers import formulas
from tests.helpers.variants import SHAPE, SMALL, C, features, forward, ordinary, random_variables, variables_of

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
# What an equation is told where the module finds it by the number of channels.
FOUND = {"sge": {"groups": C}, "shuffle": {"groups": C // 2}, "selective_kernel": {"groups": C}}
OPTIONS = [
    ("soft", {"widths": (8,), "gated": True}),
    ("soft", {"widths": (8, 6), "gated": True}),
    ("eca", {"kernel_size": 5}),
    ("scse", {"combine": "max"}),
    ("gather_excite", {"extent": 2}),
    ("gather_excite", {"kind": "theta", "extent": 2}),
    ("gather_excite", {"kind": "theta+", "extent": 4}),
    ("mhsa", {"heads": 2, "max_distance": 2}),
    ("sge", {"groups": 4}),
    ("shuffle", {"groups": 4}),
    ("selective_kernel", {"branches": 3, "groups": 4}),
    ("gaussian_context", {"learned": True}),
]


def expected(name, variables, x, **options):
    double = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)
    formula = getattr(formulas, name)
    return formula(double.get("params", {}), double.get("batch_stats", {}), np.asarray(x, np.float64), **options)


def assert_is(ours, theirs):
    np.testing.assert_allclose(ours["y"], theirs[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours["map"], theirs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in list_attention() if hasattr(formulas, name)])
def test_variants_are_their_formulas(name):
    for h, w in (SHAPE[1:3], *SMALL):
        assert_is(
            ordinary(name)[h, w], expected(name, variables_of(name), features()[:, :h, :w], **FOUND.get(name, {}))
        )


@pytest.mark.parametrize("name", list_attention())
def test_behind_the_gate_every_variant_starts_as_the_identity(name):
    x, y = features(), ordinary(name)[SHAPE[1:3]]["y"]
    gamma = {"params": {"gamma": jnp.zeros(C)}}
    assert np.array_equal(IdentityGate().apply(gamma, x, y), x)
    gradient = jax.grad(lambda v: (IdentityGate().apply(v, x, y) * features(seed=5)).sum())(gamma)
    assert np.array_equal(gradient["params"]["gamma"] != 0, np.any(y != x, (0, 1, 2)))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options_are_their_formulas(name, options):
    variables = random_variables(name, **options)
    ours = jax.jit(functools.partial(forward, create_attention(name, **options)))(variables, features())
    assert_is(ours, expected(name, variables, features(), **options))


def test_soft_makes_average_pooling_a_weighted_mean():
    out = ordinary("soft")[SHAPE[1:3]]
    weights = np.asarray(out["map"] / out["map"].sum((1, 2), keepdims=True))
    np.testing.assert_allclose(
        out["y"].mean((1, 2)), np.einsum("bhw,bhwc->bc", weights, features()), rtol=1e-4, atol=1e-5
    )
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


def test_ecas_kernel_grows_with_the_channels():
    """The authors' table: t = int(|(log2(c) + 1) / 2|), made odd."""
    for c, k in ((1, 1), (8, 3), (64, 3), (128, 5), (512, 5), (1024, 5), (2048, 7)):
        shapes = jax.eval_shape(create_attention("eca").init, jax.random.key(0), features((1, 2, 2, c)))
        assert shapes["params"]["conv"]["kernel"].shape == (k, 1, 1, 1), c


@pytest.mark.parametrize(
    ("name", "options", "channels", "message"),
    [
        ("ese", {"gate": "relu"}, C, "'gate' of attention 'ese' is 'relu'; expected one of 'sigmoid', 'hard_sigmoid'"),
        ("scse", {"combine": "sum"}, C, "'combine' of attention 'scse' is 'sum'; expected one of 'add', 'max'"),
        (
            "gather_excite",
            {"kind": "beta"},
            C,
            "'kind' of attention 'gather_excite' is 'beta'; expected one of 'theta-', ",
        ),
        (
            "gather_excite",
            {"kind": "theta"},
            C,
            "'extent' of theta in attention 'gather_excite' is 0; expected a power",
        ),
        ("gather_excite", {"kind": "theta+", "extent": 6}, C, "is 6; expected a power of two"),
        ("gather_excite", {"extent": -1}, C, "is -1; expected a whole number, at least 0"),
        (
            "global_context",
            {"fuse": "mul"},
            C,
            "'fuse' of attention 'global_context' is 'mul'; expected one of 'add', 'scale'",
        ),
        ("large_kernel", {"kernel_size": 23, "dilation": 3}, C, "'kernel_size' of attention 'large_kernel' is 23"),
        ("shuffle", {}, 7, "attention 'shuffle' got 7 channels; expected an even number"),
        ("soft", {"gated": True, "widths": ()}, C, "'widths' of the gated attention 'soft'"),
    ],
)
def test_bad_options_are_named(name, options, channels, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        jax.eval_shape(create_attention(name, **options).init, jax.random.key(0), features((1, 4, 4, channels)))


# timm's: tests/golden/attention_timm.md says where the numbers come from.


def layer(z, name):
    """A 1x1 convolution or dense layer, OIHW -> kernel [c, n] and, where there is one, bias."""
    found = {"kernel": z[f"w/{name}.weight"][:, :, 0, 0].T}
    return found | ({"bias": z[f"w/{name}.bias"]} if f"w/{name}.bias" in z else {})


def conv(z, name):
    found = layer(z, name)
    return found | {"kernel": found["kernel"][None, None]}


def scale(z, name):
    return {"scale": z[f"w/{name}.weight"], "bias": z[f"w/{name}.bias"]}


def statistics(z, name, mean=0.0):
    return {"mean": z[f"w/{name}.running_mean"] - mean, "var": z[f"w/{name}.running_var"]}


def timm_se(z):
    # timm rounds 32 / 16 up to its least width, 8.
    return "se", {"ratio": 4}, {"reduce": layer(z, "fc1"), "expand": layer(z, "fc2")}, {}


def timm_ese(z):
    return "ese", {"gate": "hard_sigmoid"}, {"dense": layer(z, "fc")}, {}


def timm_eca(z):
    return "eca", {}, {"conv": {"kernel": z["w/conv.weight"].reshape(-1, 1, 1, 1)}}, {}


def timm_cbam(z):
    # timm stacks [mean, max], the authors' code [max, mean].
    kernel = z["w/spatial.conv.conv.weight"].transpose(2, 3, 1, 0)[:, :, ::-1]
    params = {
        "reduce": layer(z, "channel.fc1"),
        "expand": layer(z, "channel.fc2"),
        "spatial_conv": {"kernel": kernel},
        "spatial_bn": scale(z, "spatial.conv.bn"),
    }
    return "cbam", {"use_bias": False}, params, {"spatial_bn": statistics(z, "spatial.conv.bn")}


def timm_gc(z):
    params = {
        # Its bias cancels in the softmax.
        "scores": {"kernel": conv(z, "conv_attn")["kernel"]},
        "reduce": layer(z, "mlp_scale.fc1"),
        "norm": scale(z, "mlp_scale.norm"),
        "expand": layer(z, "mlp_scale.fc2"),
    }
    return "global_context", {"ratio": 8, "fuse": "scale"}, params, {}


def timm_nl(z):
    theta, phi, g, expand = (conv(z, name) for name in "tpgz")
    params = {
        "theta": theta,
        # Its bias cancels in the softmax; those of g and z are a constant, which the norm's mean takes up.
        "phi": {"kernel": phi["kernel"]},
        "g": {"kernel": g["kernel"]},
        "expand": {"kernel": expand["kernel"]},
        "bn": scale(z, "norm"),
    }
    constant = g["bias"] @ expand["kernel"][0, 0] + expand["bias"]
    options = {"ratio": 4, "scaled": True, "use_bias": True}
    return "non_local", options, params, {"bn": statistics(z, "norm", constant)}


def timm_coord(z):
    params = {
        "reduce": layer(z, "conv1"),
        "bn": scale(z, "bn1"),
        "rows": layer(z, "conv_h"),
        "columns": layer(z, "conv_w"),
    }
    return "coordinate", {"use_bias": False}, params, {"bn": statistics(z, "bn1")}


@pytest.mark.parametrize("weights", [timm_se, timm_ese, timm_eca, timm_cbam, timm_gc, timm_nl, timm_coord])
def test_timms_weights_give_timms_output(weights):
    with np.load(GOLDEN / f"attention_{weights.__name__.removeprefix('timm_')}_timm.npz") as z:
        name, options, params, stats = weights(z)
        x, y = z["x"], z["y"]
    module = create_attention(name, **options)
    variables = {"params": params, "batch_stats": stats}
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, dict(shapes["params"]))
    ours = jax.jit(lambda variables, x: module.apply(variables, x))(variables, x)
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-5)
