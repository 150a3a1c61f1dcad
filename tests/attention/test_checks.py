"""Modules that break the contract on purpose: each fails the check that is about it, in its own words, and no other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange, reduce

from bmjax.analysis.contract.attention import CHECKS, examine
from bmjax.layers import Conv, Dropout

calls = []


class Good(nn.Module):
    """A gate over places, whole; the broken ones change one thing each."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x)))

    def finish(self, x, gate):
        self.sow("intermediates", "map", reduce(gate, "b h w 1 -> b h w", "sum"))
        return x * gate


class DeadBranch(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        unused = Conv(1, name="unused")(x)
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x) + 0 * unused))


class StoppedGradient(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = jax.lax.stop_gradient(x)
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x)))


class WrongAxis(Good):
    """Height and width change places: nothing that a square image shows."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return rearrange(self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x))), "b h w c -> b w h c")


class BatchLeak(Good):
    """A softmax over the batch instead of the places."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return self.finish(x, nn.softmax(Conv(1, use_bias=True)(x), axis=0))


class BatchSize(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x))) / x.shape[0]


class BFloat16NaN(Good):
    """An epsilon that float32 resolves beside one, and bfloat16 does not: 0 / 0 there on constant input."""

    @nn.compact
    def __call__(self, x, *, train=False):
        one = jnp.ones((), x.dtype)
        epsilon = (one + jnp.asarray(1e-3, x.dtype)) - one
        z = Conv(1, use_bias=True)(x)
        size = jnp.abs(z - z[:, :1, :1])
        return self.finish(x, size / (size + epsilon))


class RootAtZero(Good):
    """The derivative of a root at zero: the result is finite, the gradient is not."""

    @nn.compact
    def __call__(self, x, *, train=False):
        z = Conv(1)(x)  # a bias would cancel
        return self.finish(x, nn.sigmoid(jnp.sqrt(jnp.square(z - z.mean((1, 2), keepdims=True)))))


class HiddenState(Good):
    """A counter outside the module."""

    @nn.compact
    def __call__(self, x, *, train=False):
        calls.append(1)
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x))) * (1 + len(calls) / 100)


class UnknownCollection(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        seen = self.variable("memory", "seen", jnp.zeros, ())
        if train:
            seen.value = seen.value + 1
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x)))


class UnseededDropout(Good):
    """Dropout that ignores `train`."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return Dropout(0.5)(self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x))), train=True)


class Float32Result(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.finish(x.astype(jnp.float32), nn.sigmoid(Conv(1, use_bias=True)(x.astype(jnp.float32))))


class MovesInEvaluation(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:], jnp.float32)
        if not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x)))


class Retraced(Good):
    """Statistics that come back in the compute type."""

    @nn.compact
    def __call__(self, x, *, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:], jnp.float32)
        if train and not self.is_initializing():
            mean.value = mean.value.astype(jnp.bfloat16)
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x)))


class OneDevice(Good):
    """Flax's own batch-norm, which does not see the other devices' samples under pmap."""

    @nn.compact
    def __call__(self, x, *, train=False):
        norm = nn.BatchNorm(use_running_average=not train, dtype=x.dtype)
        return self.finish(x, nn.sigmoid(norm(Conv(1)(x))))


class OnlyUnderJit(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        y = self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x)))
        return 2 * y if isinstance(x, jax.core.Tracer) else y


class FixedSize(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        position = self.param("position", nn.initializers.normal(), (1, *x.shape[1:3], 1))
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True)(x) + position.astype(x.dtype)))


class NoMap(Good):
    def finish(self, x, gate):
        return x * gate


class MapOfLogits(Good):
    def finish(self, x, gate):
        self.sow("intermediates", "map", 4 * reduce(gate, "b h w 1 -> b h w", "sum") - 2)
        return x * gate


class MapTransposed(Good):
    def finish(self, x, gate):
        self.sow("intermediates", "map", rearrange(gate, "b h w 1 -> b w h"))
        return x * gate


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


class Unhashable(Good):
    widths: tuple[int, ...] = tuple([[8], [4]])  # noqa: C409  (lists in a tuple)


class OtherInTraining(Good):
    @nn.compact
    def __call__(self, x, *, train=False):
        z = Conv(1, use_bias=True)(x)
        return self.finish(x, nn.sigmoid(Conv(1, use_bias=True, name="more")(z) if train else z))


class SaysThatItPools(Good):
    commutes_with_pooling = True


EXPECTED = {
    DeadBranch: {"gradients": "no gradient at unused/kernel; expected one at every parameter"},
    StoppedGradient: {"gradients": "no gradient at the input"},
    WrongAxis: {"shape": "evaluation: features [4, 1, 5, 64] became [4, 5, 1, 64]; expected the same shape"},
    BatchLeak: {"leak": "another first sample changed the others' "},
    BatchSize: {"leak": "a sample alone and the same in a batch of 4 differ in result by up to"},
    BFloat16NaN: {"finite": "evaluation, bfloat16 features of 5x7 places, all 0: "},
    RootAtZero: {"finite": "evaluation, float32 features of 5x7 places, all 0: gradients/Conv_0/kernel is not finite"},
    HiddenState: {"deterministic": "evaluation: two calls with one input differ in y by up to"},
    UnknownCollection: {"variables": "it keeps variables in 'memory'; expected none but params and batch_stats"},
    UnseededDropout: {"deterministic": "evaluation: two calls with one input differ in y"},
    Float32Result: {"dtype": "evaluation: bfloat16 features became float32; expected bfloat16"},
    MovesInEvaluation: {"statistics": "evaluation moved batch_stats by up to"},
    Retraced: {"retrace": "the second training step was compiled again: mean float32[64] -> bfloat16[64]"},
    OneDevice: {"devices": "four devices under pmap and one differ in "},
    OnlyUnderJit: {"eager_is_jit": "evaluation: with jit differs from without in y by up to"},
    FixedSize: {"sizes": "features of 1x1 places raised ScopeParamShapeError: "},
    NoMap: {"sown_map": "evaluation: no map was sown"},
    MapOfLogits: {"sown_map": "evaluation, random features: the map is -"},
    MapTransposed: {"sown_map": "evaluation: the map is [4, 7, 5]; expected [4, 5, 7] or [4, 64]"},
    NoTrain: {"call": "raised TypeError: "},
    Unhashable: {"made": "hash(module) raised TypeError: Failed to hash Flax Module."},
    OtherInTraining: {"call": "raised ScopeParamNotFoundError: "},
    SaysThatItPools: {"pooling": "evaluation: pooled before and after it differ in result by up to"},
}
# They fail so early, or so differently at each call, that others can't be made.
STOPS = {"made", "call", "deterministic", "leak", "dtype"}


def test_the_module_that_the_others_break_is_whole():
    assert [v for v in examine(Good) if v.status != "ok"] == []


@pytest.mark.parametrize("broken", EXPECTED, ids=lambda c: c.__name__)
def test_a_broken_module_fails_its_check_alone(broken):
    verdicts = examine(broken)
    failed = {v.name: v.text for v in verdicts if v.status == "FAIL"}
    assert failed.keys() == EXPECTED[broken].keys(), failed
    for name, text in EXPECTED[broken].items():
        assert failed[name].startswith(text), failed[name]
        assert "; expected " in failed[name]
    not_run = {v.name for v in verdicts if v.status == "not run"}
    assert not not_run or failed.keys() & STOPS


def test_every_check_can_fail():
    assert {name for expected in EXPECTED.values() for name in expected} == set(CHECKS)


def test_an_error_names_the_line_of_the_module_that_led_to_it():
    (failed,) = (v.text for v in examine(OtherInTraining) if v.status == "FAIL")
    assert "test_checks.py" in failed
    assert 'Conv(1, use_bias=True, name="more")' in failed


def test_without_four_devices_the_comparison_is_not_made_and_says_so(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: np.zeros(1))
    (verdict,) = (v for v in examine(Good) if v.name == "devices")
    assert verdict.status == "not run"
    assert "needs 4 CPU devices, 1 here" in verdict.text
