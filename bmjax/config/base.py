"""The configuration of a run: frozen dataclasses that round-trip to JSON.

An experiment file returns a `Config`; the command line overrides any field by its dotted name. Values are
checked by `from_json` and by `Config.__post_init__`, before any device work. Fields that hold "a part" name a
top-level group of parameters: ``backbone``, ``attention`` or ``head``.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from bmjax.config.checks import check, check_types, type_hints
from bmjax.config.data import AugmentConfig, DataConfig
from bmjax.config.model import ModelConfig
from bmjax.config.training import FeaturesConfig, OptimConfig, StageConfig, TrackingConfig, TrainConfig
from bmjax.registry import unknown


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
        apart = self.name.startswith(("/", "\\")) or ".." in self.name.replace("\\", "/").split("/")
        ok = bool(self.name.strip(" ./")) and "\0" not in self.name and not apart
        check(ok, "name", self.name, "a name, for the run's folder is runs/<name> (run_dir may be any other)")


def to_json(config: Config) -> str:
    """Writes every field; `from_json` gives an equal Config."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """Reads `to_json`'s text.

    Raises:
      ValueError: no JSON object, a name stands twice in one, or a field is unknown or its value of the wrong type; the
        message names field and value.
    """
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except RecursionError as e:
        raise ValueError("no JSON: too many brackets within each other") from e
    if not isinstance(values, dict):
        raise ValueError(f"a configuration is {str(values)[:40]!r}; expected a JSON object")
    return _made(Config, _as_now(values), "")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a ValueError where a name stands twice in it, for the readers of JSON differ in which counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r} stands twice in one JSON object; expected each name once")
    return values


def _as_now(values: dict[str, Any]) -> dict[str, Any]:
    """Values of before `train.recompute_statistics` with what it did then, so that such a run resumes as it began."""
    train = values.get("train")
    # `to_json` writes every field; a text of a few is someone's own, and has today's defaults.
    if isinstance(train, dict) and train.keys() >= {"train_eval_epochs", "monitor", "workers"}:
        return values | {"train": {"recompute_statistics": "never"} | train}
    return values


def _made(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """A dataclass of JSON's values; each constructor holds its fields to their types."""
    hints = type_hints(cls)
    given = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"config field {prefix + name!r}: {unknown('field', name, list(hints))}")
        types = (hints[name], *typing.get_args(hints[name]))
        inner = next((t for t in types if dataclasses.is_dataclass(t)), None)
        if isinstance(inner, type) and isinstance(value, dict):
            value = _made(inner, value, f"{prefix}{name}.")
        elif isinstance(inner, type) and isinstance(value, list):
            value = tuple(
                _made(inner, one, f"{prefix}{name}.{i}.") if isinstance(one, dict) else one
                for i, one in enumerate(value)
            )
        elif int in types and isinstance(value, float) and value.is_integer():  # 32.0, as some programs write 32
            value = int(value)
        given[name] = value
    return cls(**given)
