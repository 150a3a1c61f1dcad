"""The statistics of comparisons under their old name, for scripts that import them from here."""

from bmjax.analysis.compare.statistics import compare, verdict

__all__ = ["compare", "verdict"]
