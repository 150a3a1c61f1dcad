"""A run's folder as train() leaves it, without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config import Config, ModelConfig, to_json
from bmjax.runs.metrics import classification_metrics


def write_run(
    folder: Path,
    classes: tuple[str, ...] = ("BLA", "EOS", "<b>NIF</b>"),
    *,
    n: int = 40,
    seed: int = 0,
    skill: float = 0.4,
    config: Config | None = None,
    prefix: str = "",
) -> None:
    """Writes configuration, data, results, predictions and two epochs of records; the test split was opened twice.

    `n` images in the test split, the same labels for every `seed`, of which about `skill` more than chance are right.
    """
    folder.mkdir(exist_ok=True)
    config = config or Config(name="a & b", model=ModelConfig(weights="/some/where/notop.h5"))
    (folder / "config.json").write_text(to_json(config))
    counts = {s: dict.fromkeys(classes, k) for s, k in (("train", 30), ("val", 5), ("test", 4))}
    summary = {"name": "cells", "classes": classes, "n": 39 * len(classes), "image_size": 8, "fingerprint": "f" * 64}
    skipped = {"counts": counts, "copies": 2, "groups": 0, "skipped": [["BLA/bad.png", "the file is empty"]]}
    (folder / "dataset.json").write_text(json.dumps(summary | skipped))
    results: dict[str, Any] = {}
    k = len(classes)
    for split, size in (("train", 25), ("val", 13), ("test", n)):
        labels = np.random.default_rng(1).permutation(np.arange(size) % k)
        probs = np.random.default_rng(seed).dirichlet(np.ones(k), size) * (1 - skill) + skill * np.eye(k)[labels]
        probs = probs.astype(np.float32)
        ids = np.array([f"{prefix}{split}/{i}.png" for i in range(size)])
        arrays = {"labels": labels, "index": np.arange(size), "ids": ids, "classes": np.array(classes)}
        np.savez(folder / f"predictions_{split}.npz", probs=probs, **arrays)
        results[split] = classification_metrics(labels, probs) | {"step": 20, "checkpoint": "best"}
    (folder / "results.json").write_text(json.dumps(results))
    with (folder / "metrics.jsonl").open("w") as f:
        for step in range(1, 21):
            figures = {"loss": 2.0 / step, "lr": 1e-3, "images_per_second": 50.0}
            f.write(json.dumps({"kind": "train", "step": step, "time": 1e9 + step} | figures) + "\n")
            if step % 10 == 0:
                record = {"epoch": step // 10, "train/loss": 0.5, "train/accuracy_running": 0.7}
                record |= {"val/loss": 0.6, "val/accuracy": 0.65, "input_wait": 0.031}
                f.write(json.dumps({"kind": "epoch", "step": step, "time": 1e9 + step} | record) + "\n")
        f.write('{"kind": "train", "st')  # a kill
    (folder / "openings.jsonl").write_text("{}\n{}\n")


def cells(n: int = 40, side: int = 8) -> np.ndarray:
    """Images uint8 [n, side, side, 3]."""
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
