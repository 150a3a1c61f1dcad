"""Records of metrics.jsonl, compared."""

from typing import Any


def without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what a clock or the machine decides."""
    measured = ("time", "images_per_second", "input_wait")
    return {k: v for k, v in record.items() if k not in measured and not k.startswith(("seconds/", "memory/"))}
