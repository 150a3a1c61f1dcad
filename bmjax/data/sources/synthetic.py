"""Rendered marrow-like cells in seven classes, named as in the collection of Matek et al. (Blood 2021): a stand-in for
real cells in tests and in a first run, never evidence about real ones.

A picture is light through stained matter: every layer adds optical density (Beer-Lambert), per colour, and the light
that is left is exp(-density). What tells the classes apart is what tells real ones apart: size and shape of the
nucleus, its chromatin, granules, colour of the cytoplasm. What varies within every class: place, turn, scale, stain,
light, focus, noise, red cells and neighbours; it is strong, so single pixels say little.

Places are in units of half the picture's side, -1..1, so a cell looks alike at every size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bmjax.data.dataset import Dataset
from bmjax.data.images.cache import cached
from bmjax.data.sources.cells import CLASSES, KINDS, Density, Frame, canvas_of, draw_cell, draw_surroundings

VERSION = 1  # of the renderer; a change redraws every picture


def blur(channels: np.ndarray, sigma: float, pixel: float) -> np.ndarray:
    """Gaussian blur of [c, h, w], the border repeated."""
    n = channels.shape[-1]
    if sigma < 0.3 * pixel:
        return channels
    reach = int(np.ceil(3 * sigma / pixel))
    place = np.arange(n)[:, None] + np.arange(-reach, reach + 1)[None, :]
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) * pixel / sigma) ** 2)
    matrix = np.zeros((n, n), np.float32)
    np.add.at(matrix, (np.arange(n)[:, None], np.clip(place, 0, n - 1)), (weights / weights.sum()).astype(np.float32))
    return matrix @ channels @ matrix.T


def render(name: str, size: int, seed: int, index: int) -> np.ndarray:
    """Picture number `index` of a class, uint8 RGB 0..255 [size, size, 3]; depends on nothing else."""
    canvas = canvas_of(size)
    rng = np.random.default_rng([VERSION, seed, CLASSES.index(name), index])
    density = Density(canvas)
    scale, place = rng.uniform(0.85, 1.2), rng.uniform(-0.2, 0.2, 2)
    softness, focus = 0.0, max(0.0, rng.normal(0.0, 0.014))
    kind = KINDS[name]
    if name == "NIF":
        # Not identifiable: a smudge, or any kind of cell out of focus, or mostly out of the picture.
        damage = rng.choice(3, p=(0.5, 0.3, 0.2))
        if damage:
            kind = KINDS[CLASSES[rng.choice([0, 1, 2, 3, 4, 6])]]
        if damage == 0:
            softness = rng.uniform(0.05, 0.2)
        elif damage == 1:
            focus = rng.uniform(0.075, 0.13)
        else:
            angle = rng.uniform(0, 2 * np.pi)
            place = rng.uniform(0.95, 1.15) * np.array([np.sin(angle), np.cos(angle)])
    draw_surroundings(density, rng, canvas, 0.5 * scale)
    frame = Frame.at(canvas, (place[0], place[1]), rng.uniform(0, 2 * np.pi))
    draw_cell(density, rng, frame, kind(rng, frame, scale), softness)

    # Stain: more or less of it, and redder or bluer; light: its strength, tint and fall-off to one side.
    stain = rng.lognormal(0.0, 0.22) * rng.lognormal(0.0, 0.12, 3)
    light = rng.uniform(0.62, 1.0) * np.array([rng.uniform(0.9, 1.0), rng.uniform(0.92, 1.0), rng.uniform(0.84, 1.02)])
    light = light / max(1.0, light.max())
    y, x = canvas.yx
    slope = rng.normal(0, 0.06, 2).astype(np.float32)
    picture = np.exp(-density.value * stain.astype(np.float32)[:, None, None])
    picture = blur(picture, float(np.hypot(focus, 0.4 * canvas.pixel)), canvas.pixel)
    picture *= (1 + slope[0] * y + slope[1] * x) * light.astype(np.float32)[:, None, None]
    picture += rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(0.003, 0.02))
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _recipe(name: str, seed: int, index: int) -> str:
    # The hash of what a picture is made from stands for the hash of its pixels: those may differ in the last bit from
    # one processor to another, and a split must not.
    return hashlib.sha256(json.dumps(["synthetic", VERSION, name, seed, index]).encode()).hexdigest()


def synthetic_cells(per_class: int, image_size: int, seed: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(images uint8 [n, h, w, 3], labels int32 [n], ids), n = 7 * per_class, class by class.

    The first pictures of each class stay the same when `per_class` grows.
    """
    images = np.stack([render(name, image_size, seed, i) for name in CLASSES for i in range(per_class)])
    labels = np.repeat(np.arange(len(CLASSES), dtype=np.int32), per_class)
    return images, labels, _ids(per_class)


def _ids(per_class: int) -> tuple[str, ...]:
    return tuple(f"{name}/{i:05d}" for name in CLASSES for i in range(per_class))


def synthetic_dataset(
    per_class: int, image_size: int, cache_dir: Path, *, seed: int = 0, progress: bool = True
) -> Dataset:
    """The rendered cells as any other dataset, cached too.

    `hashes` are those of each picture's recipe (class, seed, number), so a split is the same at every image size and
    on every machine.
    """
    hashes = tuple(_recipe(name, seed, i) for name in CLASSES for i in range(per_class))
    key = hashlib.sha256(json.dumps([image_size, hashes]).encode()).hexdigest()

    def pictures() -> Iterator[np.ndarray]:
        for name in CLASSES:
            for i in range(per_class):
                yield render(name, image_size, seed, i)

    images, _ = cached(cache_dir, key, len(hashes), image_size, pictures(), progress)
    return Dataset(
        name="synthetic",
        classes=CLASSES,
        images=images,
        labels=np.repeat(np.arange(len(CLASSES), dtype=np.int32), per_class),
        ids=_ids(per_class),
        hashes=hashes,
        fingerprint=key,
    )
