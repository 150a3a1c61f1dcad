"""Writes tests/golden/stain.npz: what scikit-image and torchstain make of two rendered cells.

    python -m pip install scikit-image torchstain
    python tools/stain_golden.py

Neither is a dependency of the project. torchstain's figures are those of its NumPy versions, which cut off to whole
grey levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import numpy as np
# isort: on

from bmjax.data.sources.synthetic import render

PATH = Path(__file__).resolve().parents[2] / "tests/golden/stain.npz"


def main() -> None:
    from skimage import color  # pyright: ignore[reportMissingImports]
    from torchstain.numpy.normalizers import (  # pyright: ignore[reportMissingImports]
        NumpyMacenkoNormalizer,
        NumpyReinhardNormalizer,
    )

    image, target = render("PMO", 48, 0, 0), render("EOS", 48, 0, 1)
    hed, lab = color.rgb2hed(image), color.rgb2lab(image)
    macenko: Any = NumpyMacenkoNormalizer()
    macenko.fit(target)
    reinhard: Any = NumpyReinhardNormalizer()
    reinhard.fit(target)
    figures = {
        "image": image,
        "target": target,
        "hed": hed,
        "lab": lab,
        "hed_to_rgb": color.hed2rgb(hed) * 255,
        "lab_to_rgb": color.lab2rgb(lab) * 255,
        "macenko": macenko.normalize(image)[0],
        "macenko_target": np.concatenate([macenko.HERef.T.ravel(), macenko.maxCRef]),
        "reinhard": reinhard.normalize(image),
    }
    types = {name: value.astype(np.float32) if value.dtype != np.uint8 else value for name, value in figures.items()}
    np.savez_compressed(PATH, **types)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, {', '.join(figures)}")


if __name__ == "__main__":
    main()
