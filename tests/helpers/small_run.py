"""A run's folder as training leaves it, but for the training: a tiny network, its predictions, and nothing else."""

import json
from pathlib import Path

import jax
import numpy as np

import bmjax
from bmjax.config import Config, DataConfig, HeadConfig, ModelConfig, TrainConfig
from bmjax.files import printable
from bmjax.runs.folder import Run, save_arrays, save_results

CLASSES = ("EOS", "<b>NGS</b>", "$x^\udce9")
SHOWN = tuple(map(printable, CLASSES))
SIZE = 32


def small_run(folder: Path, attention: str = "cbam", n: int = 90, seed: int = 0) -> Run:
    """Its network is random; its recorded predictions of validation are right in four of five cases."""
    model = ModelConfig(backbone="densenet_tiny", weights=None, attention=attention, head=HeadConfig(widths=(8,)))
    train = TrainConfig(devices=1, eval_batch_size=8)
    config = Config(name="small", run_dir=str(folder), data=DataConfig(image_size=SIZE), model=model, train=train)
    network = bmjax.create(config.model, len(CLASSES))
    variables = jax.tree.map(np.asarray, bmjax.init(network, jax.random.key(seed), SIZE))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(CLASSES), n)
    said = np.where(rng.random(n) < 0.8, labels, rng.integers(0, len(CLASSES), n))
    probs = (0.1 + 0.7 * np.eye(len(CLASSES)))[said].astype(np.float32)
    ids = np.array([f"{i}.png" for i in range(n)])
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "dataset.json").write_text(json.dumps({"counts": {"train": {"EOS": n}, "val": {"EOS": n}, "test": {}}}))
    save_arrays(folder, "val", probs=probs, labels=labels, index=np.arange(n), ids=ids, classes=CLASSES)
    save_results(folder, "val", {"step": 7})
    return Run(folder, config, network, variables, CLASSES, 7)


def keep_calibration(run: Run, scale: float = 0.5) -> None:
    """Keeps a temperature with a run."""
    k = len(run.classes)
    found = {"method": "temperature", "scale": [scale] * k, "shift": [0.0] * k, "n": 90, "step": run.step}
    (run.run_dir / "calibration.json").write_text(json.dumps(found))
