"""Heads and backbones broken on purpose: each fails the check that is about it, in its own words."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from bmjax.analysis.contract.examine import CONTRACTS, examine
from bmjax.layers import BatchNorm, Conv, Dropout

calls = []


def verdict(kind, part, check):
    """What a check said; those after it are not made."""
    for v in CONTRACTS[kind].verdicts(part):
        if v.name == check:
            assert v.status == "FAIL", v
            return v.text
    raise AssertionError(f"{kind} has no check {check}")


class GoodHead(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(Dropout(0.2)(x, train=train))

    def logits(self, x):
        return nn.Dense(self.num_classes, dtype=x.dtype)(x)


class ListHead(GoodHead):
    widths: Any = ((8,), [4])

    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(x)


class NoTrainHead(GoodHead):
    @nn.compact
    def __call__(self, x):
        return self.logits(x)


class ClassesHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(7, dtype=x.dtype)(x)


class CounterHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        self.variable("memory", "seen", jnp.zeros, ())
        return self.logits(x)


class HalfHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(x.astype(jnp.bfloat16))


class NormHead(GoodHead):
    """The derivative of a norm at zero."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(x / jnp.linalg.norm(x, axis=-1, keepdims=True))


class DeadHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(x) + 0 * nn.Dense(1, dtype=x.dtype, name="unused")(x)


class DropHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(Dropout(0.5)(x, train=True))


class MovingHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(BatchNorm()(x, train=True))


class LeakHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(x - x.mean(0, keepdims=True))


class TracedHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(x) * (1 + isinstance(x, jax.core.Tracer))


class RetracedHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:], jnp.float32)
        if train and not self.is_initializing():
            mean.value = mean.value.astype(jnp.bfloat16)
        return self.logits(x)


class OneDeviceHead(GoodHead):
    @nn.compact
    def __call__(self, x, *, train=False):
        return self.logits(nn.BatchNorm(use_running_average=not train, dtype=x.dtype)(x))


HEADS = {
    "made": (ListHead, "hash(module) raised TypeError"),
    "call": (NoTrainHead, "__call__ takes no train"),
    "shape": (ClassesHead, "evaluation: features [4, 8] became [4, 7] for 2 classes; expected logits [4, 2]"),
    "variables": (CounterHead, "it keeps variables in 'memory'"),
    "dtype": (HalfHead, "evaluation: float32 features became bfloat16; expected float32"),
    "finite": (NormHead, "evaluation, float32 features, all 0: gradients/Dense_0/kernel is not finite"),
    "gradients": (DeadHead, "no gradient at unused/bias, unused/kernel"),
    "deterministic": (DropHead, "evaluation: two calls with one input differ in y"),
    "statistics": (MovingHead, "evaluation moved batch_stats"),
    "leak": (LeakHead, "another first sample changed the others' result"),
    "eager_is_jit": (TracedHead, "evaluation: with jit differs from without in y"),
    "retrace": (RetracedHead, "the second training step was compiled again: mean float32[32] -> bfloat16[32]"),
    "devices": (OneDeviceHead, "four devices under pmap and one differ in"),
}


@pytest.mark.parametrize("check", HEADS)
def test_a_broken_head_fails_its_check(check):
    part, text = HEADS[check]
    assert verdict("head", part, check).startswith(text)


class GoodNet(nn.Module):
    """Two stages; the broken ones change one thing each."""

    stages: tuple[str, ...] = ("one", "two")

    @nn.compact
    def __call__(self, x, *, train=False, mode="train", tap=None):
        return self.run(x, train, mode, tap or (lambda stage, x: x))

    def run(self, x, train, mode, tap):
        x = tap("one", self.block(8, "a", x, train, mode))
        return tap("two", self.block(8, "b", x, train, mode))

    def block(self, width, name, x, train, mode):
        x = Conv(width, 3, strides=4, padding=1, name=name)(x)
        return nn.relu(BatchNorm(name=f"{name}_bn")(x, train=train, mode=mode))


class NoTap(GoodNet):
    @nn.compact
    def __call__(self, x, *, train=False, mode="train"):
        return self.run(x, train, mode, lambda stage, x: x)


class Unhashable(GoodNet):
    widths: Any = ([8], 4)


class Pooled(GoodNet):
    def run(self, x, train, mode, tap):
        return super().run(x, train, mode, tap).mean((1, 2))


class Backwards(GoodNet):
    def run(self, x, train, mode, tap):
        return super().run(x, train, mode, lambda stage, x: tap({"one": "two", "two": "one"}[stage], x))


class Deaf(GoodNet):
    """What the first tap returns is not used."""

    def run(self, x, train, mode, tap):
        x = self.block(8, "a", x, train, mode)
        tap("one", x)
        return tap("two", self.block(8, "b", x, train, mode))


class Fixed(GoodNet):
    def run(self, x, train, mode, tap):
        x = super().run(x, train, mode, lambda stage, x: x)
        x = tap("one", x).reshape(len(x), 16, -1).reshape(len(x), 4, 4, 8)
        return tap("two", x)


class Counter(GoodNet):
    def run(self, x, train, mode, tap):
        self.variable("memory", "seen", jnp.zeros, ())
        return super().run(x, train, mode, tap)


class Wide(GoodNet):
    def run(self, x, train, mode, tap):
        return super().run(x.astype(jnp.float32), train, mode, tap)


class Drops(GoodNet):
    def run(self, x, train, mode, tap):
        return super().run(Dropout(0.5)(x, train=True), train, mode, tap)

    def block(self, width, name, x, train, mode):
        return super().block(width, name, x, train, mode)


class Leaks(GoodNet):
    def run(self, x, train, mode, tap):
        return super().run(x - x.mean(0, keepdims=True), train, mode, tap)


class Moves(GoodNet):
    def run(self, x, train, mode, tap):
        return super().run(x, True, mode, tap)


class Dead(GoodNet):
    def run(self, x, train, mode, tap):
        return super().run(x + 0 * Conv(3, 1, name="unused")(x), train, mode, tap)


class Thaws(GoodNet):
    """`mode` is left out."""

    def block(self, width, name, x, train, mode):
        return super().block(width, name, x, train, "train")


class RootAtZero(GoodNet):
    def run(self, x, train, mode, tap):
        return super().run(jnp.sqrt(jnp.square(x) - 0.0) / jnp.sqrt(jnp.square(x)), train, mode, tap)


class Coarse(GoodNet):
    """A difference of large numbers, which bfloat16 loses."""

    def run(self, x, train, mode, tap):
        return super().run((x + 1000) - 1000, train, mode, tap)


class Retraced(GoodNet):
    def run(self, x, train, mode, tap):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:], jnp.float32)
        if train and not self.is_initializing():
            mean.value = mean.value.astype(jnp.bfloat16)
        return super().run(x, train, mode, tap)


class OneDevice(GoodNet):
    def block(self, width, name, x, train, mode):
        x = Conv(width, 3, strides=4, padding=1, name=name)(x)
        norm = nn.BatchNorm(use_running_average=not train or mode != "train", dtype=x.dtype, name=f"{name}_bn")
        return nn.relu(norm(x))


NETS = {
    "made": (Unhashable, "hash(module) raised TypeError"),
    "stages": (NoTap, "it takes no tap in __call__; expected __call__(self, x, *, train=False, mode='train'"),
    "call": (Pooled, "images [4, 64, 64, 3] became [4, 8]; expected a map [4, h, w, c]"),
    "taps": (Backwards, "tap was called for two, one; expected one, two"),
    "variables": (Counter, "it keeps variables in 'memory'"),
    "sizes": (Fixed, "images of 96x96 pixels raised "),
    "dtype": (Wide, "evaluation: bfloat16 images became float32; expected bfloat16"),
    "goes_on": (Deaf, "a change at 'one' does not reach the output"),
    "deterministic": (Drops, "two calls with one input differ in map"),
    "leak": (Leaks, "another first sample changed the others' result"),
    "statistics": (Moves, "evaluation moved batch_stats"),
    "gradients": (Dead, "no gradient at unused/kernel"),
    "frozen": (Thaws, "mode 'stats_frozen' moved batch_stats"),
    "finite": (RootAtZero, "evaluation, float32 images of 64x64 pixels, all 0: y is not finite"),
    "bfloat16": (Coarse, "bfloat16 differs by "),
    "retrace": (Retraced, "the second training step was compiled again: mean float32[3] -> bfloat16[3]"),
    "devices": (OneDevice, "four devices under pmap and one differ in"),
}


@pytest.mark.parametrize("check", NETS)
def test_a_broken_backbone_fails_its_check(check):
    part, text = NETS[check]
    assert verdict("backbone", part, check).startswith(text)


def test_the_modules_that_the_others_break_are_whole():
    assert [v for v in examine("head", GoodHead) if v.status != "ok"] == []
    assert [v for v in examine("backbone", GoodNet) if v.status != "ok"] == []


def test_every_check_is_shown_to_fail():
    assert set(HEADS) == set(CONTRACTS["head"].names)
    assert set(NETS) == set(CONTRACTS["backbone"].names)
