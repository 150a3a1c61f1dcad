"""Rematerialisation by stage: a stage's feature maps are computed again on the way back instead of being kept.

Chen et al. 2016, https://arxiv.org/abs/1604.06174. Less memory for more work; the numbers are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import flax.linen as nn

ALL = "all"
_chosen: ContextVar[frozenset[str]] = ContextVar("_chosen", default=frozenset())
_met: ContextVar[set[str] | None] = ContextVar("_met", default=None)


@contextlib.contextmanager
def recomputing(stages: Sequence[str]) -> Iterator[None]:
    """Traces what is inside with these stages of the backbone ("all": each) computed again on the way back.

    Raises:
      ValueError: the backbone did not offer one of them by `by_stage`.
    """
    met: set[str] = set()
    tokens = _chosen.set(frozenset(stages)), _met.set(met)
    try:
        yield
    finally:
        _chosen.reset(tokens[0])
        _met.reset(tokens[1])
    missed = [stage for stage in stages if stage not in met and not (stage == ALL and met)]
    if missed:
        raise ValueError(
            f"config field 'train.remat' is {tuple(stages)!r}, but the backbone does not compute {', '.join(missed)} "
            f"by bmjax.layers.by_stage; it does so with {', '.join(sorted(met)) or 'no stage'}"
        )


def by_stage(module: nn.Module, stage: str, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), a part of that stage of the backbone `module`; recomputed on the way back where that is asked.

    Called in the backbone's compact method; submodules that the function makes are the backbone's own, by their names.
    """
    met, chosen = _met.get(), _chosen.get()
    if met is not None:
        met.add(stage)
    if stage not in chosen and ALL not in chosen:
        return function(*args)
    return nn.remat(lambda _, *inputs: function(*inputs))(module, *args)
