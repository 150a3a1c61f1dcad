"""One record a published weight file: where it is, how it is checked, and what it needs of its user."""

from __future__ import annotations

import dataclasses

from bmjax.backbones import family_of
from bmjax.registry import unknown

_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_DENSENET_SOURCE = "keras.applications.densenet; converted from the authors' Torch models (Huang et al. 2017)"


@dataclasses.dataclass(frozen=True)
class WeightRecord:
    """`checksum` is "md5:<hex>" of the published file; `preprocess` a mode of bmjax.data.preprocess; `epsilon` that
    of every batch-norm; `parameters` the exact number of values, statistics included."""

    name: str
    backbone: str
    top: bool
    url: str
    checksum: str
    parameters: int
    input_size: int
    preprocess: str
    epsilon: float
    licence: str
    source: str

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def _densenet(depth: int, top: bool, md5: str, parameters: int) -> WeightRecord:
    ending = "" if top else "_notop"
    return WeightRecord(
        name=f"densenet{depth}-keras{'-top' if top else ''}",
        backbone=f"densenet{depth}",
        top=top,
        url=f"{_KERAS}/densenet/densenet{depth}_weights_tf_dim_ordering_tf_kernels{ending}.h5",
        checksum=f"md5:{md5}",
        parameters=parameters,
        input_size=224,
        preprocess="torch",
        epsilon=1.001e-5,
        licence="BSD-3-Clause",
        source=_DENSENET_SOURCE,
    )


# Checksums: keras/src/applications/densenet.py of Keras 3.15.1.
RECORDS: tuple[WeightRecord, ...] = (
    _densenet(121, False, "30ee3e1110167f948a6b9946edeeb738", 7_037_504),
    _densenet(121, True, "9d60b8095a5708f2dcce2bca79d332c7", 8_062_504),
    _densenet(169, False, "b8c4d4c20dd625c148057b9ff1c1176b", 12_642_880),
    _densenet(169, True, "d699b8f76981ab1b30698df4c175e90b", 14_307_880),
    _densenet(201, False, "c13680b51ded0fb44dff2d8f86ac8bb1", 18_321_984),
    _densenet(201, True, "1ceb130c1ea1b78c3bf6114dbdfd8807", 20_242_984),
)


def find(backbone: str, top: bool = False) -> WeightRecord:
    """The record of a backbone's ImageNet weights.

    Raises:
      ValueError: there is none.
    """
    for record in RECORDS:
        if record.backbone == backbone and record.top == top:
            return record
    raise unknown("backbone with published weights", backbone, {r.backbone for r in RECORDS})


def preprocess_of(backbone: str) -> str:
    """The preprocessing mode of a backbone: its record's, or its family's where it has no record.

    Raises:
      ValueError: the backbone is not known.
    """
    for record in RECORDS:
        if record.backbone == backbone:
            return record.preprocess
    return family_of(backbone).PREPROCESS
