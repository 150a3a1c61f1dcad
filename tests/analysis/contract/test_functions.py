"""Losses, metrics, optimizers, augmentations, callbacks and sources broken on purpose: each fails the check that is
about it, in its own words."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax import Listing
from bmjax.analysis.contract.examine import CONTRACTS, examine, make_cells
from bmjax.training.losses import cross_entropy

calls = []


def failed(kind, part):
    """Check -> what it said, of those that failed."""
    verdicts = examine(kind, part)
    assert [v.name for v in verdicts] == CONTRACTS[kind].names
    return {v.name: v.text for v in verdicts if v.status == "FAIL"}


def good_loss(counts):
    return cross_entropy


def of(loss):
    return lambda counts: loss


def own(logits, labels):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


def growing(logits, labels):
    calls.append(1)
    return cross_entropy(logits, labels) * (1 + len(calls) / 100)


LOSSES = {
    "made": (lambda counts: 3.0, "make(counts) gave 3.0; expected a function of (logits, labels)"),
    "call": (of(lambda x, y: cross_entropy(x, y).mean()), "logits [6, 5] gave []; expected [6], one value an image"),
    "dtype": (
        of(lambda x, y: cross_entropy(x, y).astype(jnp.float16)),
        "float32 logits gave float16; expected float32",
    ),
    "finite": (
        of(lambda x, y: -jnp.log(jnp.take_along_axis(jax.nn.softmax(x), y[:, None], axis=-1)[:, 0])),
        "huge logits: the loss is not finite",
    ),
    "gradients": (
        of(lambda x, y: (x.argmax(-1) != y).astype(x.dtype)),
        "no gradient at the logits of images [0, 1, 2, 3, 4, 5] of 6",
    ),
    "per_image": (
        of(lambda x, y: cross_entropy(x - x.mean(0, keepdims=True), y)),
        "another first image changed the others' loss by up to",
    ),
    "deterministic": (of(growing), "two calls differ in loss by up to"),
    "falls": (of(own), "image 0: the loss went from "),
}


@pytest.mark.parametrize("check", LOSSES)
def test_a_broken_loss_fails_its_check(check):
    part, text = LOSSES[check]
    assert failed("loss", part)[check].startswith(text)


def accuracy(labels, probs):
    return float((probs.argmax(-1) == labels).mean())


def sorts(labels, probs):
    labels.sort()
    return accuracy(labels, probs)


def noisy(labels, probs):
    calls.append(1)
    return accuracy(labels, probs) + len(calls)


def recall(labels, probs):
    hits = [np.mean(probs[labels == k].argmax(-1) == k) if (labels == k).any() else np.nan for k in range(4)]
    return np.mean(hits)


METRICS = {
    "call": (lambda labels, probs: probs.max(-1), "it gave array("),
    "single": (lambda labels, probs: accuracy(labels, probs) if len(labels) > 1 else np.inf, "one image: it gave inf"),
    "absent": (recall, "a class without an image: it gave nan"),
    "order": (lambda labels, probs: accuracy(labels[:7], probs[:7]), "in another order it went from "),
    "deterministic": (noisy, "two calls gave "),
    "keeps_input": (sorts, "it changed labels; expected arrays left as they are"),
    "tells": (lambda labels, probs: float(len(labels)), "all right and all wrong both gave 60"),
}


@pytest.mark.parametrize("check", METRICS)
def test_a_broken_metric_fails_its_check(check):
    part, text = METRICS[check]
    assert failed("metric", part)[check].startswith(text)


def transformation(update, state=None):
    """An optimizer by its update(gradient, rate) -> update."""

    def make(learning_rate):
        init = state or (lambda params: optax.EmptyState())
        return optax.GradientTransformation(
            init, lambda u, s, p=None: (jax.tree.map(lambda g: update(g, learning_rate), u), s)
        )

    return make


def outside(learning_rate):
    def update(updates, state, params=None):
        calls.append(1)
        return jax.tree.map(lambda g: -learning_rate * g * (1 + isinstance(g, jax.core.Tracer)), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def with_count(learning_rate):
    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -learning_rate * g, updates), state + 1

    return optax.GradientTransformation(lambda params: 0, update)


OPTIMIZERS = {
    "made": (lambda learning_rate: learning_rate, "f(0.001) gave 0.001; expected an optax.GradientTransformation"),
    "call": (transformation(lambda g, lr: -lr * g.sum()), "the update of backbone/block/conv/kernel is float32[]"),
    "state": (with_count, " of the state is 0; expected an array"),
    "zero_gradient": (transformation(lambda g, lr: -lr * g / jnp.abs(g).sum()), "update/backbone/block/conv/kernel is"),
    "descends": (transformation(lambda g, lr: lr * g), "50 steps took it from "),
    "rate": (transformation(lambda g, lr: -1e-3 * g), "10 times the rate took an update from "),
    "eager_is_jit": (outside, "with jit differs from without in update by up to"),
    "float64": (
        transformation(lambda g, lr: (-lr * g).astype(jnp.float32)),
        "the update of backbone/block/conv/kernel is float32; expected float64",
    ),
}


@pytest.mark.parametrize("check", OPTIMIZERS)
def test_a_broken_optimizer_fails_its_check(check):
    part, text = OPTIMIZERS[check]
    assert failed("optimizer", part)[check].startswith(text)


def test_an_optimizer_with_a_state_outside_does_not_resume(monkeypatch):
    """Its steps are not compiled here, so that a variable outside can change at each."""
    scale = [1.0]

    def make(learning_rate):
        def update(updates, state, params=None):
            scale[0] *= 0.9
            return jax.tree.map(lambda g: -learning_rate * scale[0] * g, updates), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    monkeypatch.setattr(jax, "jit", lambda f, **_: f)
    text = failed("optimizer", make)["resumes"]
    assert text.startswith("resumed after 3 of 6 steps it differs in params by up to")


def brighter(image, key):
    return jnp.clip(image + jax.random.uniform(key, (), jnp.float32, -50, 50).astype(image.dtype), 0, 255)


def outer_draw(image, key):
    return jnp.clip(image + np.random.default_rng().uniform(-50, 50), 0, 255) + 0 * brighter(image, key)


AUGMENTATIONS = {
    "call": (lambda image, key: brighter(image, key)[4:], "an image [32, 32, 3] became [28, 32, 3]"),
    "dtype": (lambda image, key: brighter(image, key).astype(jnp.bfloat16), "a float32 image became bfloat16"),
    "in_range": (lambda image, key: image + 80 * jax.random.normal(key, (), jnp.float32).astype(image.dtype), "random"),
    "pure": (outer_draw, "two calls with one key differ in image by up to"),
    "by_key": (lambda image, key: image[::-1], "16 keys gave the same image"),
    "changes": (
        lambda image, key: brighter(jnp.zeros_like(image), key),
        "another image gave the same result",
    ),
    "float64": (
        lambda image, key: jnp.clip(image + jax.random.uniform(key, (), image.dtype, -50, 50), 0, 255),
        "% of values differ from those in float32",
    ),
}


@pytest.mark.parametrize("check", AUGMENTATIONS)
def test_a_broken_augmentation_fails_its_check(check):
    part, text = AUGMENTATIONS[check]
    assert text in failed("augmentation", part)[check]


def changes_figures(event):
    event.figures["loss"] = 0.0


def slow(event):
    if event.kind == "step":
        time.sleep(0.15)


CALLBACKS = {
    "call": (lambda event: event.variables() and None, "raised RuntimeError: an event of kind 'step' has no variables"),
    "answer": (lambda event: np.float32(1) > 0, "at 'start' it returned np.True_; expected True, False or None"),
    "read_only": (changes_figures, "at 'start' it changed the figures"),
    "quick": (slow, "a step's event took 0.15 s; expected less than 0.1 s"),
}


@pytest.mark.parametrize("check", CALLBACKS)
def test_a_broken_callback_fails_its_check(check):
    part, text = CALLBACKS[check]
    assert failed("callback", part)[check].startswith(text)


def test_a_callback_that_changes_the_variables_is_caught():
    def scale(event):
        if event.kind == "epoch":
            event.variables()["params"]["head"]["kernel"] *= 2

    assert failed("callback", scale)["read_only"].startswith("at 'epoch' it changed params/head/kernel")


@pytest.fixture
def listing(tmp_path):
    make_cells(tmp_path)
    paths = sorted(tmp_path.glob("*/*.png"))
    names = tuple(p.relative_to(tmp_path).as_posix() for p in paths)
    labels = np.array([0 if n.startswith("a") else 1 for n in names], np.int32)
    return Listing(str(tmp_path), ("a", "b"), names, labels, lambda i: paths[i].read_bytes())


class Moving:
    """An archive whose position threads share."""

    def __init__(self, read):
        self.read, self.at = read, 0

    def __call__(self, i):
        self.at = i
        time.sleep(0.002)
        return self.read(self.at)


SOURCES = {
    "call": (lambda one: [one.ids], "it gave list; expected a bmjax.Listing"),
    "lengths": (lambda one: dataclasses.replace(one, groups=("x",)), "1 groups for 8 ids; expected 8, one an image"),
    "ids": (lambda one: dataclasses.replace(one, ids=(one.ids[0], *one.ids[:-1])), "'a/a0.png' comes twice"),
    "labels": (
        lambda one: dataclasses.replace(one, labels=one.labels + 1),
        "labels range from 1 to 2; expected 0 to 1",
    ),
    "groups_and_sides": (lambda one: dataclasses.replace(one, sides=("dev",) * 8), "a side is 'dev'; expected 'train'"),
    "reads": (lambda one: dataclasses.replace(one, read=lambda i: b"no image"), "image 'a/a0.png' raised "),
    "threads": (lambda one: dataclasses.replace(one, read=Moving(one.read)), "read by 8 threads at once an image had"),
}


@pytest.mark.parametrize("check", SOURCES)
def test_a_broken_source_fails_its_check(check, listing):
    change, text = SOURCES[check]
    assert failed("source", lambda: change(listing))[check].startswith(text)


def test_scales_and_laboratories_of_a_source_are_looked_at_too(listing):
    def broken(**fields):
        return failed("source", lambda: dataclasses.replace(listing, **fields))

    assert broken(pixel_sizes=(0.1,))["lengths"].startswith("1 pixel_sizes for 8 ids")
    assert broken(laboratories=("x",) * 7)["lengths"].startswith("7 laboratories for 8 ids")
    assert broken(laboratories=(1,) * 8)["groups_and_sides"].startswith("laboratory 0 is 1; expected text")

    def drawn():
        calls.append(1)
        return dataclasses.replace(listing, laboratories=(f"{len(calls)}",) * 8)

    assert failed("source", drawn)["deterministic"].startswith("a second call gave other laboratories")


def test_a_source_without_order_is_caught(listing):
    def shuffled():
        calls.append(1)
        return dataclasses.replace(listing, ids=listing.ids[len(calls) % 8 :] + listing.ids[: len(calls) % 8])

    assert failed("source", shuffled)["deterministic"].startswith("a second call gave other ids, or in another order")


def test_good_parts_pass(listing):
    from functools import partial

    assert failed("loss", good_loss) == {}
    assert failed("metric", accuracy) == {}
    assert failed("optimizer", optax.lion) == {}
    assert failed("augmentation", brighter) == {}
    assert failed("callback", lambda event: event.figures.get("val/accuracy") == 1.0) == {}
    assert failed("source", partial(lambda one: one, listing)) == {}


def test_every_check_is_shown_to_fail():
    shown = {"loss": LOSSES, "metric": METRICS, "augmentation": AUGMENTATIONS, "callback": CALLBACKS}
    shown |= {"optimizer": [*OPTIMIZERS, "resumes"], "source": [*SOURCES, "deterministic"]}
    for kind, checks in shown.items():
        assert set(checks) == set(CONTRACTS[kind].names), kind


def test_an_error_names_its_line():
    def make(counts):
        return lambda logits, labels: logits @ labels

    text = failed("loss", make)["call"]
    assert "test_functions.py" in text
    assert "logits @ labels" in text


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="unknown kind of part 'los'; did you mean 'loss'"):
        examine("los", good_loss)
