"""The classifier: its module, its making, and its parameters."""

from bmjax.model.classifier import Classifier, Head
from bmjax.model.create import create, init, resolve
from bmjax.model.parameters import count_parameters, merge_params, parameter_table, part_of, split_params

__all__ = [
    "Classifier",
    "Head",
    "count_parameters",
    "create",
    "init",
    "merge_params",
    "parameter_table",
    "part_of",
    "resolve",
    "split_params",
]
