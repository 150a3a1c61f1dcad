"""What keeps one bad variant from ending a comparison: networks traced before the first run, and failed runs named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bmjax.analysis.compare.design import Configs
from bmjax.analysis.several import Failure, reason_of, refuse
from bmjax.layers.dispatch import prepare
from bmjax.model.classifier import Classifier, at_last
from bmjax.model.create import create
from bmjax.training.signals import Interrupted

_CLASSES = 2  # of networks that are traced only


def check_networks(configs: Configs) -> None:
    """Traces the network of each row at the experiment's image size; where attention stands last, from the backbone's
    feature map on, so that the backbone is traced once for all.

    Raises:
      ValueError: names each row whose network can't be traced, and why; or the backbone can't be.
    """
    prepare()  # what is traced before it does without the kernels
    first = next(iter(configs.values()))[0]
    size, dtype = first.data.image_size, first.train.dtype
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    plain = dataclasses.replace(first.model, attention="none", attention_options={}, attach=("last",))
    maps = _output(create(plain, _CLASSES, dtype), images, output="feature_map")
    broken = []
    for row, runs in configs.items():
        try:
            network = create(runs[0].model, _CLASSES, dtype)
            if at_last(network):
                _output(network, maps, start="feature_map")
            else:
                _output(network, images)
        except (Interrupted, OSError):
            raise
        except Exception as e:
            broken.append(f"  {row}: {reason_of(e)}")
    if broken:
        word = f"{len(broken)} of {len(configs)} networks can't be made for images of {size} pixels"
        raise ValueError("\n".join([f"{word}; nothing was trained:", *broken]))


def _output(network: Classifier, x: jax.ShapeDtypeStruct, **options: Any) -> jax.ShapeDtypeStruct:
    """The shape of what a network gives for x when its variables are made."""
    found: Any = jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x, train=False, **options)[0], x)
    return found


def refuse_failed(failures: Sequence[Failure], configs: Configs, baseline: str) -> None:
    """Ends a comparison some of whose runs failed, before the test split is opened for them.

    Raises:
      ValueError: there are failures; names each and says what helps.
    """
    rows = _rows_of(configs)
    failed = dict.fromkeys(f.run.model.attention for f in failures if rows[f.run.run_dir][0] != baseline)
    mend = f"drop {', '.join(failed)} from --variants, or mend it and remove its folders above; or " if failed else ""
    helps = (
        f"{mend}change the settings of all, under another --name or --run_dir. Nothing was compared. Finished runs are "
        "kept: called again, they are not trained again."
    )
    refuse(failures, sum(map(len, configs.values())), "run", helps)


def hopeless(lost: Sequence[Failure], tried: Configs) -> list[Failure]:
    """The trials among those that failed without which no rate can be chosen: a rate by which training diverges is
    merely not chosen, as long as another of its row and fold is left.
    """
    failed, rows = {f.run.run_dir for f in lost}, _rows_of(tried)
    left = {place for run_dir, place in rows.items() if run_dir not in failed}
    return [f for f in lost if not f.diverged or rows[f.run.run_dir] not in left]


def _rows_of(configs: Configs) -> dict[str, tuple[str, int]]:
    """Run folder -> (its row, its fold)."""
    return {run.run_dir: (row, run.data.fold) for row, runs in configs.items() for run in runs}
