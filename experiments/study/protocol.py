"""How much of a test accuracy a protocol alone can make: one model under four protocols, on the same cells.

    python experiments/study/protocol.py --data FOLDER --weights FILE [--out OUT] [--seeds 5] [--smoke]

A head on a frozen network's features of each cell and of three fixed augmented copies of it, trained under

- `split first`: the honest one; copies of training cells only;
- `augmented first`: all copies are made, then split, so that a cell's copies stand on both sides;
- `blocks`: as the first, but neighbouring file numbers, which may be of one slide, stay on one side;
- `chosen on test`: as the first, but the epoch is the one that does best on the test split,

and the same four on cells whose labels are shuffled: what is learnt of those is worth nothing on new cells, and an
honest protocol says one in seven. docs/study.md has the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from common import DEFAULT, Settings, about, base, choices, finish, start, switched_on

from bmjax.analysis.study.records import Entry, Part
from bmjax.config import AugmentConfig, Config, FeaturesConfig, OptimConfig, StageConfig
from bmjax.data.dataset import Dataset
from bmjax.training.signals import Interrupted

log = logging.getLogger("bmjax.study")
PROTOCOLS = ("split first", "augmented first", "blocks", "chosen on test")
LABELS = ("as given", "shuffled")
COPIES = 3  # Ours, as all below: published work multiplies its cells by 2 to 20.
BLOCK = 20  # File numbers to a block: with 400 cells a class, 20 blocks to split.
COPIED_BY = AugmentConfig(flip=True, right_angles=True, brightness=0.05, contrast=0.1, hue=0.02)
SHUFFLED_FROM = 1000  # Seed k shuffles labels with this plus k; the split is one for all seeds.


def config(s: Settings = DEFAULT) -> Config:
    plain = base(s, "protocol")
    return dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, stratify=True, block_size=2 if s.smoke else BLOCK),
        optim=OptimConfig(name="adam", preset="keras"),
        # Long enough that a head can learn its training cells by heart, as a training accuracy of 99.97 % says.
        stages=(StageConfig(epochs=4 if s.smoke else 40, train=("attention", "head")),),
    )


@dataclasses.dataclass(frozen=True)
class Copies:
    """Cells and their copies: features [1 + copies, n, c] of a frozen network, of the images `dataset` and then of the
    copies; `backbone` its empty variables, so that a run keeps its head alone."""

    dataset: Dataset
    features: np.ndarray
    backbone: dict[str, dict] = dataclasses.field(default_factory=lambda: {"params": {}, "batch_stats": {}})


def copies(s: Settings, config: Config) -> Copies:
    """Reads the cells, and computes the features of each and of its copies, or finds them in the cache."""
    from bmjax.data import load_dataset
    from bmjax.model.create import resolve
    from bmjax.training.features import FeatureMaps, pooled_maps

    views = dataclasses.replace(config, augment=COPIED_BY, features=FeaturesConfig(cached=True, views=COPIES))
    views = dataclasses.replace(views, model=resolve(views.model))
    dataset = load_dataset(config.data)
    maps, rows = FeatureMaps(views, dataset), np.arange(len(dataset))
    found = [pooled_maps(maps.maps(rows, view)) for view in (None, *range(COPIES))]
    return Copies(dataset, np.stack(found).astype(np.float32))


class Side:
    """The features of a protocol's images, in the place of bmjax.training.features.FeatureMaps."""

    def __init__(self, copies: Copies, cell: np.ndarray, copy: np.ndarray):
        self.backbone, self.shape = copies.backbone, (1, 1, copies.features.shape[-1])
        self._features = copies.features[copy, cell][:, None, None]

    def on_device(self, rows: np.ndarray, pooled: bool = False) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(self._features[rows])

    views_on_device = on_device


def layout(protocol: str, cells: Dataset, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cell, copy, side) int [m] of every image of a protocol; copy 0 is the cell itself, side 0, 1, 2 train, val,
    test. The true labels decide the split, so that it is the same where labels are shuffled."""
    from bmjax.data import split_dataset

    n, by = len(cells), dataclasses.replace(config.data, split_by="image")
    if protocol == "augmented first":
        whole = dataset_of(cells, *np.divmod(np.arange(n * (1 + COPIES)), 1 + COPIES), cells.labels)
        splits = split_dataset(whole, by)
        parts = [(*np.divmod(rows, 1 + COPIES), k) for k, rows in enumerate((splits.train, splits.val, splits.test))]
    else:
        if protocol == "blocks":
            by = dataclasses.replace(by, split_by="block")
        splits = split_dataset(cells, by)
        chooses = splits.test if protocol == "chosen on test" else splits.val
        parts = [(splits.train, np.full(len(splits.train), copy), 0) for copy in range(1 + COPIES)]
        parts += [(rows, np.zeros(len(rows), int), side) for side, rows in ((1, chooses), (2, splits.test))]
    cell, copy = (np.concatenate([part[i] for part in parts]).astype(int) for i in (0, 1))
    return cell, copy, np.repeat([part[2] for part in parts], [len(part[0]) for part in parts])


def dataset_of(cells: Dataset, cell: np.ndarray, copy: np.ndarray, labels: np.ndarray) -> Dataset:
    """The images of a protocol as a dataset of their own. Their pixels are the cells', made small: what is trained
    on are features."""
    seen: dict[str, int] = {}
    ids, hashes = [], []
    for i, number in zip(cell.tolist(), copy.tolist(), strict=True):
        name = f"{cells.ids[i]}#{number}"
        seen[name] = seen.get(name, 0) + 1  # a cell may choose the epoch and be tested
        ids.append(name if seen[name] == 1 else f"{name} again")
        hashes.append(hashlib.sha256(f"{cells.hashes[i]}#{number}".encode()).hexdigest())
    of = labels[cell]
    digest = hashlib.sha256("\n".join([*ids, *hashes, of.tobytes().hex()]).encode()).hexdigest()
    step = max(1, cells.images.shape[1] // 32)
    images = np.asarray(cells.images[:, ::step, ::step])[cell]
    return Dataset(cells.name, cells.classes, images, of, tuple(ids), tuple(hashes), digest)


def runs(s: Settings, config: Config, copies: Copies) -> Iterator[tuple[Entry, Config, Any]]:
    """(entry, configuration, what the run is prepared with) of every run; the seeds of a protocol share programs."""
    from bmjax.data import Splits
    from bmjax.data.batches import steps_per_epoch
    from bmjax.training.cached import Programs
    from bmjax.training.run import Prepared, loss_of

    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source="arrays"),
        train=dataclasses.replace(config.train, final_test=True),
    )
    for protocol in PROTOCOLS:
        cell, copy, side = layout(protocol, copies.dataset, config)
        splits = Splits(*(np.flatnonzero(side == k) for k in range(3)))
        maps: Any = Side(copies, cell, copy)
        per_epoch = steps_per_epoch(len(splits.train), config.train.batch_size)
        loss = loss_of(config, dataset_of(copies.dataset, cell, copy, copies.dataset.labels), splits)
        programs = Programs(config, len(copies.dataset.classes), maps.shape, per_epoch, loss)
        for labels, seed in itertools.product(LABELS, range(s.seeds)):
            of = copies.dataset.labels
            if labels == "shuffled":
                of = np.random.default_rng(SHUFFLED_FROM + seed).permutation(of)
            where = f"protocol/{protocol}/{labels}/seed{seed}".replace(" ", "_")
            run = dataclasses.replace(config, name=where.replace("/", "-"), seed=seed, run_dir=str(s.out / where))
            prepared = Prepared(dataset_of(copies.dataset, cell, copy, of), splits, maps, programs)
            yield Entry(where, {"protocol": protocol, "labels": labels, "seed": seed}, ("protocol",)), run, prepared


def _train(config: Config, prepared: Any) -> bool:
    """Trains a run, unless that has been done; False where another process is at it."""
    from bmjax.training.run import train_run

    try:
        result = train_run(config, resume=True, prepared=prepared)
    except BlockingIOError:
        return False
    if result.interrupted:
        raise Interrupted(signal.Signals[result.interrupted])
    log.info("%s: %.3f on test", config.name, result.metrics["test"]["accuracy"])
    return True


def run(s: Settings, copied: Copies | None = None) -> Part:
    """Trains what is not trained yet, and writes the part; `copied` takes the place of what `copies` computes."""
    began, plan = time.monotonic(), config(s)
    copied = copied or copies(s, plan)
    while True:
        found = [(entry, _train(one, prepared)) for entry, one, prepared in runs(s, plan, copied)]
        entries = [entry for entry, _ in found]
        if all(trained for _, trained in found):
            break
        time.sleep(1)
    notes = (
        f"{COPIES} copies of each cell: {switched_on(COPIED_BY)}.",
        f"Blocks of {plan.data.block_size} file numbers of a class. Where they do worse than cells split one by one, "
        "neighbours help one another across the split.",
        "The test split of each run was opened once; nothing was chosen by it, but where the protocol says so.",
    )
    part = Part("protocol", about(plan), "", tuple(entries), choices(plan), notes)
    return finish(s, part, began)


if __name__ == "__main__":
    start(run, __doc__)
