"""Augmentation on the device: small pure functions of one image, keyed by the image's own key.

An image is floating [h, w, 3], RGB 0..255, and stays in that range. A batch is a vmap over images and keys, so what
happens to an image depends neither on the rest of its batch nor on the number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bmjax.config.data import AugmentConfig
from bmjax.data.augment.colour import balance, brightness, contrast, gamma, hue, saturation
from bmjax.data.augment.geometry import centred_grid, sample
from bmjax.data.augment.optics import blur, jpeg
from bmjax.data.augment.policies import randaugment, trivialaugment
from bmjax.data.images.stain import hed_jitter
from bmjax.layers.collectives import all_reversed
from bmjax.registry import load_own


def draw_turn(key: jax.Array, config: AugmentConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three booleans: mirror up-down, mirror left-right, then a quarter turn. The eight together are every way to lay
    a square on itself."""
    up, left, half, quarter = jax.random.bernoulli(key, jnp.float32(0.5), (4,))  # float32: the same in a float64 run
    if not config.right_angles:
        half = quarter = jnp.zeros_like(up)
    if not config.flip:
        up = left = jnp.zeros_like(up)
    return up ^ half, left ^ half, quarter


def turn(image: jax.Array, up: jax.Array, left: jax.Array, quarter: jax.Array) -> jax.Array:
    """The square image mirrored and turned as the booleans say; exact."""
    image = jnp.where(up, image[::-1], image)
    image = jnp.where(left, image[:, ::-1], image)
    return jnp.where(quarter, image.swapaxes(0, 1)[::-1], image)


def warp(
    image: jax.Array,
    angle: jax.Array,
    shift: jax.Array,
    zoom: jax.Array,
    turned: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """`turn(image, *turned)`, turned by `angle` (radians, clockwise), magnified by `zoom` about the centre and shifted
    by `shift` [2] (pixels down, right); bilinear, the border mirrored."""
    y, x = centred_grid(image)
    y, x = y - shift[0], x - shift[1]
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    y, x = cos * y - sin * x, sin * y + cos * x
    # The turn by its coordinates: turned first, pixels would be turned again for each of the four neighbours.
    up, left, quarter = turned
    y, x = jnp.where(quarter, x, y), jnp.where(quarter, -y, x)
    return sample(image, jnp.where(up, -y, y), jnp.where(left, -x, x))


def erase(image: jax.Array, key: jax.Array, probability: float) -> jax.Array:
    """With a probability, random levels in a rectangle of 2 to 40 % of the image, 0.3 to 3.3 times as high as wide.

    Zhong et al. 2020, "Random erasing data augmentation". A side that would be longer than the image's is cut to it,
    where theirs is drawn again.
    """
    keys = jax.random.split(key, 5)
    h, w, _ = image.shape
    area = jax.random.uniform(keys[0], (), jnp.float32, 0.02, 0.4) * (h * w)
    ratio = jnp.exp(jax.random.uniform(keys[1], (), jnp.float32, math.log(0.3), math.log(1 / 0.3)))
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)]), jnp.array([h, w], jnp.float32))
    place = jax.random.uniform(keys[2], (2,), jnp.float32) * (jnp.array([h, w], jnp.float32) - sides)
    inside = in_box(h, w, place, place + sides) & jax.random.bernoulli(keys[3], jnp.float32(probability))
    noise = jax.random.uniform(keys[4], image.shape, jnp.float32, 0, 255).astype(image.dtype)
    return jnp.where(inside[..., None], noise, image)


def in_box(h: int, w: int, first: jax.Array, last: jax.Array) -> jax.Array:
    """Which pixels lie between two corners [2], y and x, in pixels: bool [h, w]."""
    y, x = jnp.arange(h)[:, None] + 0.5, jnp.arange(w)[None] + 0.5
    return (y >= first[0]) & (y < last[0]) & (x >= first[1]) & (x < last[1])


def augment_one(image: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """One image, floating [h, w, 3], 0..255 -> the same; what the config switches off isn't computed."""
    config = config.resolved()
    keys = jax.random.split(key, 7)
    more = jax.random.split(jax.random.fold_in(key, 7), 4)

    def uniform(i: int, half_width: float, shape: tuple[int, ...] = ()) -> jax.Array:
        # Drawn in float32, so that the draw is the same in a float64 run.
        draw = jax.random.uniform(keys[i], shape, jnp.float32, -1.0, 1.0)
        return draw.astype(image.dtype) * half_width

    # Policies are of whole grey levels, so they come before all that makes others.
    if config.policy == "randaugment":
        image = randaugment(image, more[0], config.policy_operations, config.policy_magnitude)
    elif config.policy == "trivialaugment":
        image = trivialaugment(image, more[0])
    # Colour comes before the warp: it is of single pixels, so nearly the same after it, and is cheaper to compute here.
    if config.hed:
        scale, shift = jax.random.uniform(more[1], (2, 3), jnp.float32, -1.0, 1.0).astype(image.dtype) * config.hed
        image = hed_jitter(image, 1 + scale, shift)
    if config.balance or config.gamma or config.saturation:
        image = _camera(image, jax.random.fold_in(key, 10), config)
    if config.brightness:
        image = brightness(image, uniform(4, config.brightness))
    if config.contrast:
        image = contrast(image, 1 + uniform(5, config.contrast))
    if config.hue:
        image = hue(image, uniform(6, config.hue))
    turned = draw_turn(keys[0], config)
    if config.rotate or config.shift or config.zoom:
        angle = uniform(1, math.radians(config.rotate))
        shift = uniform(2, config.shift * image.shape[0], (2,))
        image = warp(image, angle, shift, 1 + uniform(3, config.zoom), turned)
    elif config.flip or config.right_angles:
        image = turn(image, *turned)
    image = jnp.clip(image, 0, 255)
    if config.blur or config.jpeg:
        image = _optics(image, jax.random.fold_in(key, 9), config)
    return erase(image, more[2], config.erase) if config.erase else image


def _camera(image: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """The lamp's balance, then the camera's gamma and saturation."""
    draw = jax.random.uniform(key, (5,), jnp.float32, -1.0, 1.0).astype(image.dtype)
    if config.balance:
        image = balance(image, 1 + config.balance * draw[:3])
    if config.gamma:
        image = gamma(image, jnp.exp(config.gamma * draw[3]))
    return saturation(image, 1 + config.saturation * draw[4]) if config.saturation else image


def _optics(image: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """Defocus, then JPEG's loss, each with probability one half."""
    blurs, sigma, loses, quality = jax.random.uniform(key, (4,), jnp.float32).astype(image.dtype)
    if config.blur:
        most = config.blur * image.shape[0]
        image = jnp.where(blurs < 0.5, blur(image, sigma * most, most), image)
    if config.jpeg:
        image = jnp.where(loses < 0.5, jpeg(image, config.jpeg + quality * (100 - config.jpeg)), image)
    return image


def augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    """Images floating [b, h, w, 3], 0..255, and keys [b] -> images augmented, each by its own key."""
    extra = load_extra(config)

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        changed = augment_one(image, key, config)
        for number, function in enumerate(extra):
            # Far from the numbers that the built-in ones fold in.
            after = function(changed, jax.random.fold_in(key, 1000 + number))
            if getattr(after, "shape", None) != image.shape:
                raise ValueError(
                    f"augmentation {config.extra[number]!r} gives {getattr(after, 'shape', after)!r} of an image "
                    f"{image.shape}; expected the same shape"
                )
            changed = jnp.clip(after.astype(image.dtype), 0, 255)
        return changed

    return jax.vmap(one)(images, keys)


def load_extra(config: AugmentConfig) -> list[Callable[[jax.Array, jax.Array], jax.Array]]:
    """The augmentations of one's own, in their order.

    Raises:
      ValueError, FileNotFoundError: there is none of that name.
    """
    return [load_own("augmentation", name, callable, "a function of (image, key)") for name in config.extra]


def mix(
    images: jax.Array, labels: jax.Array, keys: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(images mixed with others of the global batch, the others' labels, each image's own share): a loss is then
    share * loss(own label) + (1 - share) * loss(other label).

    mixup (Zhang et al. 2018) adds the images up, cutmix (Yun et al. 2019) puts a rectangle of the other one into each.
    An image's partner stands as far from the end of the global batch as it from the beginning. Shares are drawn for
    each image from Beta(alpha, alpha); where both are configured, so is which of them.
    """
    others, other_labels = all_reversed(images), all_reversed(labels)
    _, h, w, _ = images.shape

    def one(image: jax.Array, other: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        up_key, cut_key, place_key, which_key = jax.random.split(jax.random.fold_in(key, 8), 4)
        # There is no Beta(0, 0); what is drawn in its place is not used.
        up = jax.random.beta(up_key, config.mixup or 1.0, config.mixup or 1.0, (), jnp.float32)
        cut = jax.random.beta(cut_key, config.cutmix or 1.0, config.cutmix or 1.0, (), jnp.float32)
        sides = jnp.sqrt(1 - cut) * jnp.array([h, w], jnp.float32)
        centre = jax.random.uniform(place_key, (2,), jnp.float32) * jnp.array([h, w], jnp.float32)
        inside = in_box(h, w, centre - sides / 2, centre + sides / 2)
        both = bool(config.mixup and config.cutmix)
        cuts = jax.random.bernoulli(which_key, jnp.float32(0.5)) if both else bool(config.cutmix)
        own = jnp.where(cuts, 1 - inside[..., None].astype(jnp.float32), up)  # of each pixel
        share = jnp.where(cuts, 1 - inside.mean(dtype=jnp.float32), up)
        own = own.astype(image.dtype)
        return image * own + other * (1 - own), share.astype(image.dtype)

    mixed, share = jax.vmap(one)(images, others, keys)
    return mixed, other_labels, share
