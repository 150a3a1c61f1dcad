"""The folder of a run: what training writes into it and everything after reads."""

from bmjax.runs.folder import Run, load_data, load_run
from bmjax.runs.state import Progress, TrainState, create_state

__all__ = [
    "Progress",
    "Run",
    "TrainState",
    "create_state",
    "load_data",
    "load_run",
]
