"""The configuration of a run: frozen dataclasses that round-trip to JSON.

An experiment file returns a `Config`; the command line overrides any field by its dotted name. Values are
checked by `from_json` and by `Config.__post_init__`, before any device work. Fields that hold "a part" name a
top-level group of parameters: ``backbone``, ``attention`` or ``head``.
"""

from bmjax.config.base import Config, from_json, to_json
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
)  # fmt: skip

__all__ = [
    "AugmentConfig", "BatchNormConfig", "Config", "DataConfig", "FeaturesConfig", "HeadConfig", "ModelConfig",
    "OptimConfig", "ScheduleConfig", "StageConfig", "TrackingConfig", "TrainConfig", "from_json", "to_json",
]  # fmt: skip
