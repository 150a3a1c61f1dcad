"""The configuration of a run: frozen dataclasses that round-trip to JSON.

An experiment file returns a `Config`; the command line overrides any field by its dotted name. Values are
checked by `from_json` and by `Config.__post_init__`, before any device work. Fields that hold "a part" name a
top-level group of parameters: ``backbone``, ``attention`` or ``head``.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import pydantic

from bmjax.config.checks import check, check_types
from bmjax.config.data import AugmentConfig, DataConfig
from bmjax.config.model import HeadConfig, ModelConfig
from bmjax.config.training import (
    BatchNormConfig,
    FeaturesConfig,
    OptimConfig,
    ScheduleConfig,
    StageConfig,
    TrackingConfig,
    TrainConfig,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    name: str = "run"
    seed: int = 0
    run_dir: str = ""
    """Folder of the run; empty: runs/<name>."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    stages: tuple[StageConfig, ...] = dataclasses.field(default_factory=lambda: (StageConfig(),))
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_types(self)
        check(len(self.stages) > 0, "stages", self.stages, "at least one stage")
        check(0 <= self.seed < 2**31, "seed", self.seed, "0..2**31-1")


def to_json(config: Config) -> str:
    """Writes every field; `from_json` gives an equal Config."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """Reads `to_json`'s text.

    Raises:
      ValueError: a field is unknown or its value has the wrong type; the message names field and value.
    """
    # pydantic.ValidationError is a ValueError and names the dotted field, the value and what was expected.
    return _reader().validate_json(_as_now(text))


def _as_now(text: str) -> str:
    """Text of before `train.recompute_statistics` with what it did then, so that such a run resumes as it began."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text  # the reader says what is wrong
    train = values.get("train") if isinstance(values, dict) else None
    # `to_json` writes every field; a text of a few is someone's own, and has today's defaults.
    if isinstance(train, dict) and train.keys() >= {"train_eval_epochs", "monitor", "workers"}:
        return json.dumps(values | {"train": {"recompute_statistics": "never"} | train})
    return text


@functools.cache
def _reader() -> pydantic.TypeAdapter[Config]:
    for cls in (DataConfig, AugmentConfig, HeadConfig, ModelConfig, ScheduleConfig, OptimConfig, BatchNormConfig):
        _forbid_extra(cls)
    for cls in (StageConfig, TrainConfig, FeaturesConfig, TrackingConfig, Config):
        _forbid_extra(cls)
    return pydantic.TypeAdapter(Config)


def _forbid_extra(cls: type) -> None:
    cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[attr-defined]
