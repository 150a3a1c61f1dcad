"""Settings against unequal classes, on the collection's 21 frequencies: do they do what they are for?"""

import numpy as np
import pytest

from tools import simulate_imbalance as tool


@pytest.mark.slow
def test_each_correction_helps_the_rare_classes():
    """Plain cross-entropy learns the frequencies, and the best classifier for balanced accuracy ignores them (Menon et
    al. 2021): on the same data each correction gains recall of rare classes and loses some of common ones."""
    counts = tool.counts_of(4000)
    assert len(counts) == 21
    figures = {
        name: np.mean([tool.simulate(config, counts, seed, 150) for seed in (0, 1)], axis=0)
        for name, config in tool.SETTINGS.items()
        if "0.9999" not in name
    }
    plain = figures.pop("plain")
    figures.pop("focal_gamma 2")  # it is about hard images, and not about frequencies
    assert len(figures) == 4
    for name, (balanced, rare, common, _) in figures.items():
        assert balanced > plain[0] + 0.02, name
        assert rare > plain[1] + 0.05, name
        assert common < plain[2], name
