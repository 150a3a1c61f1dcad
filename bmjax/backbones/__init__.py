"""The backbones: one file a family, whose `VARIANTS` says what it offers.

A backbone is a Flax module, called `(x, *, train, mode, tap)`; it names its stages in `stages` and calls
`tap(stage, x) -> x` on each stage's output, so that attention can go after any of them.
"""

from bmjax.backbones._registry import (
    create_backbone,
    default_preprocess,
    family_of,
    is_module_class,
    list_backbones,
    stage_of_parameters,
)

__all__ = [
    "create_backbone",
    "default_preprocess",
    "family_of",
    "is_module_class",
    "list_backbones",
    "stage_of_parameters",
]
