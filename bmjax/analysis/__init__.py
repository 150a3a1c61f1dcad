"""What reads run folders: report, compare, sweep, explain, audit, contract checks. The names load when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmjax.analysis.sweep.cells import Cell, cells_of, grid
    from bmjax.analysis.sweep.run import Sweep, run_sweep

__all__ = ["Cell", "Sweep", "cells_of", "grid", "run_sweep"]
_HOMES = {"sweep.cells": ("Cell", "cells_of", "grid"), "sweep.run": ("Sweep", "run_sweep")}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bmjax.analysis.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bmjax.analysis' has no attribute {name!r}")
