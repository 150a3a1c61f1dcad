"""Stain: colour spaces of stained cells, normalisation to a reference, and jitter. Pure functions of one image.

An image is floating [h, w, 3], RGB 0..255. Methods were made for haematoxylin and eosin; on the May-Grünwald-Giemsa
stain of marrow smears, too, one stain is blue and the other red, which is all that Macenko's supposes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Optical densities of haematoxylin, eosin and DAB in R, G, B, by rows (Ruifrok and Johnston 2001, as in scikit-image).
_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_TO_HED = np.linalg.inv(_FROM_HED)
_DARKEST = 1e-6  # of 0..1: what counts as no light at all

# sRGB to CIE XYZ under D65, and the white point (IEC 61966-2-1, as in scikit-image).
_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_FROM_XYZ = np.linalg.inv(_TO_XYZ)
_WHITE = np.array([0.95047, 1.0, 1.08883])

# Macenko's constants as in torchstain: light without a cell, least density of a stained pixel, percentiles.
_LIGHT, _STAINED, _EDGE, _TOP = 240.0, 0.15, 1.0, 99.0
_FEWEST = 0.01  # share of stained pixels below which stains can't be told
_BATCH = 64  # images at once


def _times(image: jax.Array, matrix: np.ndarray) -> jax.Array:
    """[..., 3] by rows times a matrix, as sums: exact on accelerators that round products to 10 bits."""
    m = matrix.astype(image.dtype)
    x, y, z = image[..., 0], image[..., 1], image[..., 2]
    return jnp.stack([x * m[0, i] + y * m[1, i] + z * m[2, i] for i in range(3)], axis=-1)


def rgb_to_hed(image: jax.Array) -> jax.Array:
    """RGB 0..255 -> amounts of haematoxylin, eosin and DAB, as scikit-image's but not cut off below zero."""
    density = jnp.log(jnp.maximum(image / 255, _DARKEST)) / np.log(_DARKEST)
    return _times(density, _TO_HED)


def hed_to_rgb(hed: jax.Array) -> jax.Array:
    """The inverse of `rgb_to_hed` for RGB above 0; 0..255."""
    return jnp.clip(jnp.exp(_times(hed, _FROM_HED) * np.log(_DARKEST).astype(hed.dtype)), 0, 1) * 255


def hed_jitter(image: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Each stain's amount times `scale` [3] plus `shift` [3], in natural optical density (after Tellez et al. 2018)."""
    shift = shift / -np.log(_DARKEST)  # amounts are densities over that of no light
    return hed_to_rgb(rgb_to_hed(image) * scale[None, None] + shift[None, None])


def rgb_to_lab(image: jax.Array) -> jax.Array:
    """sRGB 0..255 -> CIE L*a*b* under D65: L 0..100."""
    share = image / 255
    bright = share > 0.04045
    linear = jnp.where(bright, ((jnp.where(bright, share, 1.0) + 0.055) / 1.055) ** 2.4, share / 12.92)
    xyz = _times(linear, _TO_XYZ.T) / _WHITE.astype(image.dtype)[None, None]
    f = jnp.where(xyz > 0.008856, jnp.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def lab_to_rgb(lab: jax.Array) -> jax.Array:
    """The inverse of `rgb_to_lab`; colours that sRGB lacks are cut off at 0 and 255."""
    y = (lab[..., 0] + 16) / 116
    f = jnp.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = jnp.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * _WHITE.astype(lab.dtype)[None, None]
    linear = _times(xyz, _FROM_XYZ.T)
    bright = linear > 0.0031308
    share = jnp.where(bright, 1.055 * jnp.where(bright, linear, 1.0) ** (1 / 2.4) - 0.055, linear * 12.92)
    return jnp.clip(share, 0, 1) * 255


def reinhard_statistics(image: jax.Array) -> jax.Array:
    """Means and standard deviations of L*, a*, b*: [6]."""
    lab = rgb_to_lab(image)
    return jnp.concatenate([lab.mean((0, 1)), lab.std((0, 1))])


def reinhard(image: jax.Array, reference: jax.Array) -> jax.Array:
    """The image with L*, a* and b* each shifted and scaled to the reference, which is as of `reinhard_statistics`.

    Reinhard et al. 2001, in CIE L*a*b* as torchstain has it. A channel without contrast is only shifted.
    """
    lab = rgb_to_lab(image)
    mean, deviation = lab.mean((0, 1)), lab.std((0, 1))
    scale = jnp.where(deviation > 1e-4, reference[3:] / jnp.maximum(deviation, 1e-4), 1.0)
    return lab_to_rgb((lab - mean[None, None]) * scale[None, None] + reference[:3][None, None])


def _percentile(values: jax.Array, kept: jax.Array, percent: float) -> jax.Array:
    """NumPy's percentile of the values [n] that a mask keeps, at least one."""
    ordered = jnp.sort(jnp.where(kept, values, jnp.inf))
    place = (kept.sum() - 1) * (percent / 100)
    low = jnp.floor(place).astype(jnp.int32)
    a, b = ordered[low], ordered[jnp.minimum(low + 1, kept.sum() - 1)]
    return a + (b - a) * (place - low)


def _unmix(image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(stains [2, 3], the pixels' amounts of them [2, n], the 99th percentiles of those [2], whether that worked)."""
    density = -jnp.log((image.reshape(-1, 3) + 1) / _LIGHT)
    kept = (density >= _STAINED).all(-1)
    n = jnp.maximum(kept.sum(), 2)
    centred = jnp.where(kept[:, None], density - (density * kept[:, None]).sum(0)[None] / n, 0.0)
    _, vectors = jnp.linalg.eigh(jnp.einsum("ni,nj->ij", centred, centred, precision="highest") / (n - 1))
    plane = vectors[:, 1:]
    along = jnp.einsum("ni,ij->nj", density, plane, precision="highest")
    angle = jnp.arctan2(along[:, 1], along[:, 0])

    def direction(percent: float) -> jax.Array:
        edge = _percentile(angle, kept, percent)
        return plane[:, 0] * jnp.cos(edge) + plane[:, 1] * jnp.sin(edge)

    low, high = direction(_EDGE), direction(100 - _EDGE)
    stains = jnp.where(low[0] > high[0], jnp.stack([low, high]), jnp.stack([high, low]))  # the blue stain first
    gram = jnp.einsum("ic,jc->ij", stains, stains, precision="highest")
    determinant = gram[0, 0] * gram[1, 1] - gram[0, 1] * gram[1, 0]
    inverse = jnp.array([[gram[1, 1], -gram[0, 1]], [-gram[1, 0], gram[0, 0]]]) / jnp.maximum(determinant, 1e-12)
    amounts = jnp.einsum("ij,jc,nc->in", inverse, stains, density, precision="highest")
    most = jnp.stack([_percentile(row, jnp.ones(len(row), bool), _TOP) for row in amounts])
    worked = (kept.mean() >= _FEWEST) & (determinant > 1e-4) & (most > 1e-3).all() & jnp.isfinite(stains).all()
    return stains, amounts, most, worked


def macenko_statistics(image: jax.Array) -> jax.Array:
    """The densities of the two stains in R, G, B and the 99th percentiles of their amounts: [8]; NaN where they can't
    be told, because hardly a pixel is stained or all are of one stain."""
    stains, _, most, worked = _unmix(image)
    return jnp.where(worked, jnp.concatenate([stains.ravel(), most]), jnp.nan)


def macenko(image: jax.Array, reference: jax.Array) -> jax.Array:
    """The image in the reference's stains and amounts, `macenko_statistics`; as it is where its own can't be told.

    Macenko et al. 2009, as torchstain has it.
    """
    _, amounts, most, worked = _unmix(image)
    amounts = amounts * (reference[6:] / jnp.where(worked, most, 1.0))[:, None]
    density = amounts[0][:, None] * reference[:3][None] + amounts[1][:, None] * reference[3:6][None]
    normal = jnp.clip(_LIGHT * jnp.exp(-density), 0, 255).reshape(image.shape)
    return jnp.where(worked, normal, image)


@dataclasses.dataclass(frozen=True)
class Method:
    """A normalisation, and the statistics of an image that its reference consists of."""

    apply: Callable[[jax.Array, jax.Array], jax.Array]
    statistics: Callable[[jax.Array], jax.Array]
    reference: tuple[float, ...]
    """Medians over the images of 2,800 of the marrow collection's cells, 400 in each of 7 classes: what
    `bmjax data stain FOLDER` printed."""


METHODS = {
    "reinhard": Method(reinhard, reinhard_statistics, (57.6847, 21.5762, -29.0305, 20.952, 17.5261, 21.3357)),
    "macenko": Method(macenko, macenko_statistics, (0.6709, 0.6926, 0.2649, 0.4498, 0.8842, 0.1257, 1.5291, 2.877)),
}


def statistics(images: Iterable[np.ndarray], name: str) -> tuple[float, ...]:
    """The reference of a method that images uint8 [h, w, 3] amount to: the medians of their statistics.

    Raises:
      ValueError: no image, or none whose stains can be told.
    """
    measure = jax.jit(METHODS[name].statistics)
    found = [np.asarray(measure(image.astype(np.float32))) for image in images]
    known = np.array([one for one in found if np.isfinite(one).all()])
    if not len(known):
        raise ValueError(f"{len(found)} images, and the stain of none can be told; expected at least one")
    middle = np.median(known, axis=0)
    if name == "macenko":
        stains = middle[:6].reshape(2, 3)  # the median of directions is no direction
        middle[:6] = (stains / np.linalg.norm(stains, axis=1, keepdims=True)).ravel()
    return tuple(round(float(value), 4) for value in middle)


@functools.cache
def _compiled(name: str) -> Callable:
    return jax.jit(jax.vmap(METHODS[name].apply, in_axes=(0, None)))


def normalise(images: np.ndarray, name: str, reference: Sequence[float] = ()) -> np.ndarray:
    """Images uint8 [n, h, w, 3] -> the same, normalised by a method of `METHODS` to a reference, by default its own."""
    target = jnp.asarray(reference or METHODS[name].reference, jnp.float32)
    n = len(images)
    padded = np.concatenate([images, np.repeat(images[-1:], -n % _BATCH, axis=0)])  # one shape, one program
    done = [_compiled(name)(padded[i : i + _BATCH].astype(np.float32), target) for i in range(0, n, _BATCH)]
    return np.concatenate([np.asarray(jnp.round(part)) for part in done])[:n].astype(np.uint8)


def normalised(
    source: Iterable[np.ndarray | str], name: str, reference: Sequence[float] = ()
) -> Iterator[np.ndarray | str]:
    """What `source` gives, images uint8 [h, w, 3] or reasons why there is none, with the images normalised."""
    items = iter(source)
    while part := list(itertools.islice(items, _BATCH)):
        images = [item for item in part if not isinstance(item, str)]
        ready = iter(normalise(np.stack(images), name, reference) if images else ())
        yield from (item if isinstance(item, str) else next(ready) for item in part)
