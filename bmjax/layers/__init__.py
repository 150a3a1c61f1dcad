"""Layers, and the operations on arrays they are made of: equal on any number of devices, and on every platform."""

from bmjax.layers.collectives import BATCH_AXIS, all_reversed, all_sum
from bmjax.layers.dispatch import platform, prepare, traced_for
from bmjax.layers.modules import BatchNorm, Conv, Dropout, NormMode, Tap, conv_apart, conv_norm, norm_before
from bmjax.layers.norm import Before, batch_statistics
from bmjax.layers.ops import (
    at_least_float32,
    global_average,
    largest_divisor,
    max_pool,
    maximum_over,
    mean_and_deviation,
    over_channels,
    relu6,
    round_channels,
    unit_mean,
)  # fmt: skip
from bmjax.layers.remat import by_stage

__all__ = [
    "BATCH_AXIS", "BatchNorm", "Before", "Conv", "Dropout", "NormMode", "Tap", "all_reversed", "all_sum",
    "at_least_float32", "batch_statistics", "by_stage", "conv_apart", "conv_norm", "global_average", "largest_divisor",
    "max_pool", "maximum_over", "mean_and_deviation", "norm_before", "over_channels", "platform", "prepare", "relu6",
    "round_channels", "traced_for", "unit_mean",
]  # fmt: skip
