"""The published weight files: one record each, and what the files of a family and source have in common."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from bmjax import backbones
from bmjax.registry import unknown
from bmjax.weights.record import Source, WeightRecord

_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_TIMM = "https://huggingface.co/timm/{}/resolve/main/model.safetensors"


@dataclasses.dataclass(frozen=True)
class Convention:
    """What files of one family and source need of their user, beside what is the family's own `TIMM` fields."""

    preprocess: str
    unused: tuple[str, ...] = ()
    """As in WeightRecord."""


_COUNTERS = ("num_batches_tracked",)

# (family, source). Keras: `preprocess_input` of keras/src/applications/<family>.py, Keras 3.15.1. timm: mean and std of
# `default_cfgs` in timm/models/<family>.py, timm 1.0.31, for the tags below; other tags may differ.
CONVENTIONS: dict[tuple[str, str], Convention] = {
    ("densenet", "keras"): Convention("torch"),
    ("densenet", "timm"): Convention("torch", _COUNTERS),
}

# Checksums: keras/src/applications/densenet.py of Keras 3.15.1. Member: (md5, values) with top, without.
_DENSENET = {
    "densenet121": (
        ("9d60b8095a5708f2dcce2bca79d332c7", 8_062_504),
        ("30ee3e1110167f948a6b9946edeeb738", 7_037_504),
    ),
    "densenet169": (
        ("d699b8f76981ab1b30698df4c175e90b", 14_307_880),
        ("b8c4d4c20dd625c148057b9ff1c1176b", 12_642_880),
    ),
    "densenet201": (
        ("1ceb130c1ea1b78c3bf6114dbdfd8807", 20_242_984),
        ("c13680b51ded0fb44dff2d8f86ac8bb1", 18_321_984),
    ),
}


def convention(backbone: str, source: str) -> Convention:
    """The rule for files of a backbone from a source.

    Raises:
      ValueError: the backbone isn't known, or there is no rule for its family and that source.
    """
    family = backbones.family(backbone).__name__.rsplit(".", 1)[-1]
    if (family, source) not in CONVENTIONS:
        raise unknown("pair of family and source", f"{family}, {source}", (", ".join(pair) for pair in CONVENTIONS))
    return CONVENTIONS[family, source]


def architecture(backbone: str, source: str) -> dict[str, Any]:
    """The fields of a backbone's module that the source decides, with their values."""
    timm = backbones.family(backbone).TIMM
    model = backbones.create_backbone(backbone, **timm)
    if source == "keras":  # the defaults of the module are Keras's structure
        model = type(model)()
    return {field: getattr(model, field) for field in dict.fromkeys(("epsilon", *timm))}


def _record(backbone: str, source: Source, **values: Any) -> WeightRecord:
    rule = convention(backbone, source)
    return WeightRecord(
        backbone=backbone,
        source=source,
        preprocess=rule.preprocess,
        unused=rule.unused,
        architecture=architecture(backbone, source),
        **values,
    )


def _keras(
    backbone: str, url: str, files: tuple[tuple[str, int], tuple[str, int]], size: int, suffix: str = "_notop"
) -> Iterator[WeightRecord]:
    """The two files of a member of keras.applications; `url` of the one with top, without `.h5`."""
    for top, (md5, parameters) in zip((True, False), files, strict=True):
        yield _record(
            backbone,
            "keras",
            name=f"{backbone}-keras{'-top' if top else ''}",
            top=top,
            parameters=parameters,
            input_size=size,
            checksum=md5 and f"md5:{md5}",
            url=f"{url}{'' if top else suffix}.h5",
            licence="BSD-3-Clause",
            origin="keras.applications; converted from the authors' Torch models (Huang et al. 2017)",
        )


RECORDS: tuple[WeightRecord, ...] = (
    *itertools.chain.from_iterable(
        _keras(name, f"{_KERAS}/densenet/{name}_weights_tf_dim_ordering_tf_kernels", files, 224)
        for name, files in _DENSENET.items()
    ),
)


def find(backbone: str, top: bool = False, source: str = "keras") -> WeightRecord:
    """The record of a backbone's ImageNet weights. timm's single file, with top, serves for both.

    Raises:
      ValueError: there is none.
    """
    of_source = [r for r in RECORDS if r.source == source]
    for record in of_source:
        if record.backbone == backbone and record.top >= top and (source == "timm" or record.top == top):
            return record
    raise unknown(f"backbone with published weights of {source}", backbone, {r.backbone for r in of_source})


def unpublished(backbone: str, source: Source, name: str, *, top: bool) -> WeightRecord:
    """The record of a file that isn't in the catalog, by the rule of its family and source; `parameters` is 0.

    Raises:
      ValueError: there is no such rule.
    """
    size = next((r.input_size for r in RECORDS if r.backbone == backbone), 224)
    return _record(backbone, source, name=name, top=top, parameters=0, input_size=size)
