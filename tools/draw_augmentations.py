"""Draws what each augmentation makes of real cells, and prints what it costs.

    python tools/draw_augmentations.py --root FOLDER --out docs/augmentation.jpg

FOLDER holds one sub-folder a class. Each row is one setting with everything else off, each column a cell with draws of
its own; the stain's rows are normalisations, which draw nothing. Times are of batches of 32 images of 224 pixels, the
median of five, compiled before.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# isort: on
from bmjax.config import AugmentConfig, DataConfig
from bmjax.data.augment.augment import augment, mix
from bmjax.data.images.decode import decode_image
from bmjax.data.images.stain import METHODS, normalise
from bmjax.data.load import list_source

OFF: dict[str, Any] = {"flip": False, "right_angles": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "flip, right_angles": {"flip": True, "right_angles": True},
    "rotate 45": {"rotate": 45.0},
    "shift 0.15": {"shift": 0.15},
    "zoom 0.3": {"zoom": 0.3},
    "brightness 0.2": {"brightness": 0.2},
    "contrast 0.4": {"contrast": 0.4},
    "hue 0.05": {"hue": 0.05},
    "balance 0.25": {"balance": 0.25},
    "gamma 0.4": {"gamma": 0.4},
    "saturation 0.5": {"saturation": 0.5},
    "hed 0.15": {"hed": 0.15},
    "randaugment": {"policy": "randaugment"},
    "trivialaugment": {"policy": "trivialaugment"},
    "erase 1": {"erase": 1.0},
    "mixup 1": {"mixup": 1.0},
    "cutmix 1": {"cutmix": 1.0},
}
SIZE, TILE, LEFT, GAP = 224, 96, 140, 3


def change(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    """What a train step would see of images [b, h, w, 3]."""
    images = augment(images, keys, config)
    if config.mixes:
        images, _, _ = mix(images, jnp.zeros(len(images), jnp.int32), keys, config)
    return images


def draw(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """A grid of images uint8 [n, h, w, 3] by row, each row with its name."""
    n = len(rows[0][1])
    page = Image.new("RGB", (LEFT + n * (TILE + GAP), len(rows) * (TILE + GAP) + GAP), "white")
    write, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for r, (name, images) in enumerate(rows):
        top = GAP + r * (TILE + GAP)
        write.text((LEFT - 8, top + TILE // 2), name, "black", font, anchor="rm")
        for c, image in enumerate(images):
            page.paste(Image.fromarray(image).resize((TILE, TILE)), (LEFT + c * (TILE + GAP), top))
    return page


def seconds(images: np.ndarray, config: AugmentConfig, rounds: int = 5) -> float:
    """Median seconds of a batch."""
    step, batch = jax.jit(change, static_argnums=2), jnp.asarray(images, jnp.float32)
    took = []
    for i in range(rounds + 1):
        keys = jax.random.split(jax.random.key(i), len(images))
        start = time.perf_counter()
        step(batch, keys, config).block_until_ready()
        took.append(time.perf_counter() - start)
    return float(np.median(took[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", required=True, help="folder of real images, one sub-folder a class")
    parser.add_argument("--out", type=Path, required=True, help="a .jpg or .png")
    parser.add_argument("--seed", type=int, default=0, help="of cells and draws (default: %(default)s)")
    options = parser.parse_args()
    listing = list_source(DataConfig(source="folder", root=options.root))
    rng = np.random.default_rng(options.seed)
    chosen = [int(rng.choice(np.flatnonzero(listing.labels == label))) for label in range(len(listing.classes))]
    print(f"cells: {', '.join(listing.ids[i] for i in chosen)}")
    images = np.stack([decode_image(listing.read(i), SIZE) for i in chosen])
    keys = jax.random.split(jax.random.key(options.seed), len(images))
    rows = [("as it is", images)]
    for name, fields in SETTINGS.items():
        done = jax.jit(change, static_argnums=2)(
            jnp.asarray(images, jnp.float32), keys, AugmentConfig(**(OFF | fields))
        )
        rows.append((name, np.asarray(jnp.round(done)).astype(np.uint8)))
    rows += [(f"stain {method}", normalise(images, method)) for method in METHODS]
    draw(rows).save(options.out, quality=78)

    print(f"{platform.machine()}, {os.cpu_count()} CPUs\n\n| setting | ms a batch of 32 |\n|---|---|")
    many = images[np.arange(32) % len(images)]
    for name, fields in SETTINGS.items():
        print(f"| {name} | {1000 * seconds(many, AugmentConfig(**(OFF | fields))):.0f} |", flush=True)


if __name__ == "__main__":
    main()
