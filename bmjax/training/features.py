"""The feature maps of a frozen backbone, computed once and kept on disk: what attention and head train on.

A file holds the maps of some rows of a dataset in one view, under the fingerprint of all that decides them: data,
image size, rows, the backbone's every number, preprocessing, types and the view's augmentation. It is written under
another name and renamed when complete, so a kill never leaves half a file that is read; runs share the files. Each
block has a digest that is checked when the file is opened.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bmjax.config.base import Config
from bmjax.data.augment.augment import augment
from bmjax.data.batches import eval_batches
from bmjax.data.dataset import Dataset
from bmjax.data.progress import Meter
from bmjax.environment import cache_folder, check_own_cache, why_foreign
from bmjax.files import checksum, mapped, seal, temporary_folder
from bmjax.layers.ops import at_least_float32
from bmjax.model.create import create, resolve
from bmjax.model.parameters import Tree
from bmjax.registry import source_file
from bmjax.runs.folder import image_dtype, new_variables
from bmjax.training.steps import at_precision

log = logging.getLogger(__name__)
VERSION = 1  # of how maps are computed and stored; a change rebuilds every file


def tree_digest(tree: Tree) -> str:
    """sha256 over the path, type, shape and numbers of every leaf of a nested dict."""
    digest = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(tree).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(json.dumps([*path, str(array.dtype), array.shape]).encode())
        digest.update(array.data)
    return digest.hexdigest()


class FeatureMaps:
    """The last stage's output for rows of a dataset, by the backbone that a configuration describes.

    Maps are float32 (float64 in a float64 run), whatever the network computes in: storing them loses nothing.
    `backbone` is its variables {"params", "batch_stats"}, each under "backbone", `shape` that of one map (h, w, c).
    """

    def __init__(self, config: Config, dataset: Dataset):
        self.config, self.dataset = config, dataset
        # Without attention, so that every variant finds the same maps.
        plain = {"attention": "none", "attention_options": {}, "attention_gate": False, "attach": ("last",)}
        plain = dataclasses.replace(config.model, **plain)
        self._model = create(plain, len(dataset.classes), config.train.dtype)
        variables = new_variables(dataclasses.replace(config, model=plain), self._model)
        # A backbone without batch-norm has no statistics.
        self.backbone = {name: {k: v for k, v in tree.items() if k == "backbone"} for name, tree in variables.items()}
        self.dtype = np.dtype(at_least_float32(self._model.dtype))
        size = config.data.image_size
        images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        found = jax.eval_shape(lambda v, x: self._model.apply(v, x, method="feature_map"), self.backbone, images)
        self.shape: tuple[int, int, int] = found.shape[1:]
        self._folder = Path(config.data.cache_dir or cache_folder()) / "features"
        self._on_device: dict[tuple, jax.Array] = {}
        self._lock = threading.Lock()

    def fingerprint(self, rows: np.ndarray, view: int | None = None) -> str:
        """sha256 of everything that the maps of these rows depend on; `view` None is the image as it is."""
        config = self.config
        seen = None if view is None else [config.features.seed, view, dataclasses.asdict(config.augment)]
        rows_digest = hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()
        model = [config.model.backbone, config.model.backbone_options, self._model.preprocess, str(self._model.dtype)]
        model += [config.train.precision] if config.train.precision != "default" else []
        entries = [VERSION, self.dataset.fingerprint, rows_digest, model, self._weights_digest, str(self.dtype), seen]
        # Parts of one's own go by their code: a name says nothing of a file that was edited, or of another project's.
        own = [config.model.backbone, *(() if view is None else config.augment.extra)]
        entries += [checksum(file, "sha256") for name in own if (file := source_file(name)) is not None]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    @functools.cached_property
    def _weights_digest(self) -> str:
        return tree_digest(self.backbone)

    def maps(self, rows: np.ndarray, view: int | None = None) -> np.ndarray:
        """Maps [n, h, w, c] of rows [n], memory-mapped: from the disk, or computed and written there. In a
        cross-validation those of all images are, once for all folds.

        Raises:
          OSError: the disk is full.
          PermissionError: the cache is not this user's alone.
        """
        check_own_cache(self._folder)
        path = self._folder / f"{self.fingerprint(rows, view)[:32]}.npy"
        shape = (len(rows), *self.shape)
        found = _read(path, shape, self.dtype)
        if found is None and self.config.data.folds and len(rows) < len(self.dataset):
            return self.maps(np.arange(len(self.dataset)), view)[rows]
        return self._write(path, rows, view, shape) if found is None else found

    def forget(self) -> None:
        """Lets go of the maps on the device; a run that trains on them keeps its own until it ends."""
        with self._lock:
            self._on_device.clear()

    def on_device(self, rows: np.ndarray, pooled: bool = False) -> jax.Array:
        """The maps of rows [n] as they are, on the device: [n, h, w, c]; or their means over places, [n, 1, 1, c]."""
        return self._placed(rows, [None], pooled)

    def views_on_device(self, rows: np.ndarray, pooled: bool = False) -> jax.Array:
        """What training sees of rows [n], on the device: [v n, h, w, c], view by view; without views as they are."""
        return self._placed(rows, list(range(self.config.features.views)) or [None], pooled)

    def _placed(self, rows: np.ndarray, views: list[int | None], pooled: bool) -> jax.Array:
        prints = [self.fingerprint(rows, view) for view in views]
        key = (*prints, pooled, jax.config.jax_default_device)  # type: ignore[attr-defined]
        with self._lock:
            if key not in self._on_device:
                parts = [self.maps(rows, view) for view in views]
                parts = [pooled_maps(part)[:, None, None] for part in parts] if pooled else parts
                self._on_device[key] = jnp.concatenate([jnp.asarray(part) for part in parts])
            return self._on_device[key]

    def _write(self, path: Path, rows: np.ndarray, view: int | None, shape: tuple[int, ...]) -> np.ndarray:
        need = int(np.prod(shape)) * self.dtype.itemsize
        with temporary_folder(self._folder, path.stem, need, "the feature maps") as temporary:
            out = np.lib.format.open_memmap(temporary / path.name, mode="w+", dtype=self.dtype, shape=shape)
            self._fill(out, rows, view)
            out.flush()
            seal(temporary / path.name)
            os.replace(temporary / path.name, path)
        found = _read(path, shape, self.dtype)
        if found is None:
            raise OSError(f"{path} was removed while it was written; is another program emptying the cache?")
        return found

    def _fill(self, out: np.ndarray, rows: np.ndarray, view: int | None) -> None:
        config, dtype = self.config, image_dtype(self.config)
        key = None if view is None else jax.random.fold_in(jax.random.key(config.features.seed), view)

        def features(variables: Tree, images: jax.Array, index: jax.Array) -> Any:
            images = images.astype(dtype)
            if key is not None:
                images = augment(images, jax.vmap(jax.random.fold_in, (None, 0))(key, index), config.augment)
            return self._model.apply(variables, images, method="feature_map")

        extract = jax.jit(at_precision(features, config.train.precision))
        size = min(config.train.eval_batch_size, len(rows))
        done = 0
        with Meter("feature maps", len(rows), "image") as meter:
            for batch in eval_batches(self.dataset, rows, size):
                real = int(batch["weight"].sum())
                out[done : done + real] = np.asarray(extract(self.backbone, batch["image"], batch["index"]))[:real]
                done += real
                meter.to(done)


def pooled_features(config: Config, dataset: Dataset) -> np.ndarray:
    """The means over places of every image's feature maps, float32 [n, c], by the configuration's backbone."""
    config = dataclasses.replace(config, model=resolve(config.model))
    return pooled_maps(FeatureMaps(config, dataset).maps(np.arange(len(dataset)))).astype(np.float32)


def pooled_maps(maps: np.ndarray) -> np.ndarray:
    """Maps [n, h, w, c], memory-mapped or not, -> their means over places [n, c]."""
    return np.stack([one.mean((0, 1)) for one in maps])


def _read(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """The maps in a file; None where there is none or it is damaged."""
    try:
        if why := why_foreign(path):
            raise ValueError(f"it {why}")
        maps = mapped(path, sealed=True)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as e:
        log.warning("%s: damaged (%s); rebuilt", path, e)
        return None
    if maps.shape != shape or maps.dtype != dtype:
        log.warning("%s: damaged (%s %s); rebuilt", path, maps.dtype, maps.shape)
        return None
    return maps
