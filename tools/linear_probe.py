"""A linear probe beside a run: logistic regression on its backbone's untrained-further features, the same split.

    python tools/linear_probe.py RUN

Features are those of the weights the run began with (pretrained or random), pooled, without attention. The
strength of regularisation is chosen on validation. It opens the test split once more, and records that.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import jax
import numpy as np

# isort: on
from bmjax.analysis.baseline import linear_probe
from bmjax.config import from_json
from bmjax.data.batches import eval_batches
from bmjax.model.create import create
from bmjax.runs.folder import load_data, new_variables, record_opening
from bmjax.runs.records import interval_text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    run_dir = parser.parse_args().run
    config = from_json((run_dir / "config.json").read_text())
    plain = dataclasses.replace(config.model, attention="none", attention_options={})
    config = dataclasses.replace(config, model=plain)
    dataset, splits = load_data(run_dir, config)
    model = create(config.model, len(dataset.classes))
    variables = new_variables(config, model)
    extract = jax.jit(lambda v, x: model.apply(v, x, method="features"))
    features, labels = {}, {}
    record_opening(run_dir, 0)
    for split in ("train", "val", "test"):
        parts = []
        for batch in eval_batches(dataset, getattr(splits, split), config.train.eval_batch_size):
            parts.append(np.asarray(extract(variables, batch["image"]))[batch["weight"] > 0])
        features[split], labels[split] = np.concatenate(parts), dataset.labels[getattr(splits, split)]
    for split, m in linear_probe(features, labels, seed=config.seed).items():
        print(
            f"linear probe, {split}: n {m['n']}, accuracy {interval_text(m, 'accuracy')}, "
            f"macro F1 {interval_text(m, 'macro_f1')} (C {m['C']:g})"
        )


if __name__ == "__main__":
    main()
