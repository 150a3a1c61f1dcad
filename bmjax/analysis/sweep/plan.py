"""What a sweep is to do, as sweep.json in its folder says it to its worker processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.analysis.sweep.cells import Cell, Range
from bmjax.config.base import Config, from_json, to_json
from bmjax.files import read_json, write_text
from bmjax.runs.folder import run_folder


@dataclasses.dataclass(frozen=True)
class Tune:
    """A search by Optuna: `trials` draws from a space, kept in the study of that name at `storage`."""

    storage: str
    trials: int
    space: dict[str, Sequence[Any] | Range]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cells, or what draws them, and how they are trained. `experiment`: the file whose `on_event` each calls."""

    config: Config
    cells: tuple[Cell, ...]
    at_once: int | None = None
    halving: int | None = None
    experiment: str = ""
    tune: Tune | None = None

    @property
    def folder(self) -> Path:
        """The folder of the sweep, in which each cell has its own."""
        return run_folder(self.config)

    @property
    def fields(self) -> list[str]:
        """The swept fields."""
        if self.tune is not None:
            return list(self.tune.space)
        return list(dict.fromkeys(field for cell in self.cells for field in cell.changes))


def save(plan: Plan) -> None:
    """Writes sweep.json."""
    tree = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    tree["config"] = json.loads(to_json(plan.config))
    tree["cells"] = [
        {"name": c.name, "changes": c.changes, "config": json.loads(to_json(c.config))} for c in plan.cells
    ]
    if plan.tune is not None:
        space = plan.tune.space.items()
        spelled = {k: dataclasses.asdict(v) if isinstance(v, Range) else v for k, v in space}
        tree["tune"] = dataclasses.asdict(plan.tune) | {"space": spelled}
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_text(plan.folder / "sweep.json", json.dumps(tree, indent=1))


def load(folder: Path) -> Plan:
    """Reads sweep.json.

    Raises:
      ValueError: it is damaged, or there is none; names it.
    """
    path = folder / "sweep.json"
    tree = read_json(path)
    try:
        config = from_json(json.dumps(tree.pop("config")))
        cells = [Cell(c["name"], c["changes"], from_json(json.dumps(c["config"]))) for c in tree.pop("cells")]
        tune = tree.pop("tune")
        if tune is not None:
            space = {k: Range(**v) if isinstance(v, dict) else v for k, v in tune["space"].items()}
            tune = Tune(tune["storage"], tune["trials"], space)
        return Plan(config, tuple(cells), tune=tune, **tree)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged: {e!r}; expected what `bmjax sweep` wrote") from e
