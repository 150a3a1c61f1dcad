"""The classifier: backbone, attention and head."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from bmjax.config.checks import check, check_part, check_types


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The classification head after pooling; the study names its layers, not their sizes or order: ours."""

    name: str = "study"
    """`study`: batch-norm, dropout and dense layers as below. One of yours, `module:Head` or `path.py`: a Flax module
    of (num_classes, **options) that takes features [b, c] and `train` and gives logits [b, k]. In Python and on the
    command line the head itself may be that name: `--model.head mylab:Head`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Fields of a head of yours."""
    order: tuple[Literal["batch_norm", "dropout", "dense"], ...] = ("batch_norm", "dropout", "dense")
    """Layers before the final dense layer, in order; each `dense` takes the next of `widths`, with ReLU."""
    widths: tuple[int, ...] = (256,)
    """Widths of the hidden dense layers."""
    dropout: float = 0.5
    """Dropout rate, 0..1."""

    def __post_init__(self) -> None:
        check_part(self, "name", "model.head.name", ("study",))
        check_types(self, "model.head.")
        check(not self.options or self.name != "study", "model.head.options", self.options, "{} for the study's head")
        n_dense = self.order.count("dense")
        check(n_dense == len(self.widths), "model.head.widths", self.widths, f"{n_dense} widths, one a dense in order")
        check(all(w > 0 for w in self.widths), "model.head.widths", self.widths, "widths > 0")
        check(0 <= self.dropout < 1, "model.head.dropout", self.dropout, "a rate in 0..1, 1 excluded")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Classifier = backbone -> attention -> global average pooling -> head."""

    backbone: str = "densenet121"
    """Name of a backbone (`bmjax list backbones`), or one of yours, `module:Net` or `path.py`: a Flax module with
    `stages` that calls `tap(stage, x)` after each. It has no weights file: `weights` is then none."""
    weights: str | None = "imagenet"
    """`imagenet`: Keras's published file; `imagenet-timm`: timm's; a record's name (`bmjax weights list`); a path: that
    file; none: random."""
    backbone_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the backbone's module. A run fills in those that its weights' record decides, and `preprocess`."""
    preprocess: str | None = None
    """Mode of bmjax.weights.preprocess; none: the weights' or, without weights, the family's."""
    attention: str = "soft"
    """Name of a variant in bmjax/attention, path of a `.py`, or `module:Class`; `se+simam`: in a row. The study's is
    unknown: `soft` is ours."""
    attention_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the attention module, by name; of several, by part: {"se": {"ratio": 8}}, the second se's as "se_2"."""
    attention_gate: bool = False
    """Attention f begins as the identity: x + gamma * (f(x) - x), gamma [c] learnt from zero."""
    attach: tuple[str, ...] = ("last",)
    """Stages of the backbone after which attention goes; `last` is the last stage."""
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        check_part(self, "backbone", "model.backbone", None)
        check_part(self, "attention", "model.attention", None)
        if isinstance(self.head, str) or (isinstance(self.head, type) and self.head is not HeadConfig):
            object.__setattr__(self, "head", HeadConfig(name=self.head))  # type: ignore[arg-type]
        if self.weights in ("none", "None"):  # as the command line has it
            object.__setattr__(self, "weights", None)
        check_types(self, "model.")
        ok = bool(self.attach) or self.attention == "none"
        check(ok, "model.attach", self.attach, "at least one stage, or model.attention 'none'")
