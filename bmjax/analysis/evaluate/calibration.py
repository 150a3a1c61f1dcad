"""Probabilities that mean what they say: temperature and vector scaling, fitted on validation, kept with the run.

Guo et al. 2017, "On calibration of modern neural networks", https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bmjax.files import read_json, write_text
from bmjax.runs.metrics import expected_calibration_error

Method = Literal["temperature", "vector"]
METHODS: tuple[Method, ...] = ("temperature", "vector")
FILE = "calibration.json"
_TINY = float(np.finfo(np.float32).tiny)
_MOST = 1e6
_PARTS = 5
"""Of the cross-fit that says what a calibration is worth on the images it was fitted on."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """softmax(scale * log p + shift), with scale and shift [k]; of a temperature all scales are alike, no shift.

    `n` images it was fitted on, `step` of the checkpoint whose probabilities these were, in so many `views`.
    """

    method: Method
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    n: int
    step: int = 0
    views: int = 1

    def __call__(self, probs: np.ndarray) -> np.ndarray:
        """Probabilities [n, k] -> the same calibrated, float32."""
        return _scaled(_logs(probs), np.array(self.scale), np.array(self.shift)).astype(np.float32)

    def is_fit_of(self, labels: np.ndarray, probs: np.ndarray) -> bool:
        """Whether it is what `fit` gives of these images, and not a calibration from elsewhere."""
        if len(labels) != self.n:
            return False
        again = fit(labels, probs, self.method)
        return np.allclose(again.scale, self.scale, rtol=0.01) and np.allclose(again.shift, self.shift, atol=0.01)

    @property
    def temperature(self) -> float | None:
        """Above 1 where the network is too sure; None of a vector."""
        return 1 / self.scale[0] if self.method == "temperature" else None


def _logs(probs: np.ndarray) -> np.ndarray:
    # Log-probabilities are logits but for a constant, which softmax takes out.
    return np.log(np.maximum(np.asarray(probs, np.float64), _TINY))


def _scaled(logs: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    z = logs * scale + shift
    z -= z.max(-1, keepdims=True)
    e = np.exp(z)
    return e / e.sum(-1, keepdims=True)


def fit(labels: np.ndarray, probs: np.ndarray, method: Method, step: int = 0, views: int = 1) -> Calibration:
    """The calibration of least negative log-likelihood on labels [n] and probabilities [n, k].

    Its numbers are drawn slightly toward those of no calibration, by the worth of one image, so that a few images that
    are all named rightly do not make every probability 1.

    Raises:
      ValueError: fewer images than classes.
    """
    from scipy.optimize import minimize

    n, k = probs.shape
    if n < k:
        raise ValueError(f"{n} images to calibrate {k} classes on; expected at least {k}")
    logs, one_hot = _logs(probs), np.eye(k)[labels]
    is_vector = method == "vector"

    def parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (np.exp(x[:k]), x[k:]) if is_vector else (np.full(k, np.exp(x[0])), np.zeros(k))

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        scale, shift = parts(x)
        p = _scaled(logs, scale, shift)
        value = -np.log(np.maximum((p * one_hot).sum(1), _TINY)).mean()
        gap = (p - one_hot) / n
        by_scale, by_shift = (gap * logs).sum(0) * scale, gap.sum(0)
        gradient = np.concatenate([by_scale, by_shift]) if is_vector else np.array([by_scale.sum()])
        return value + 0.5 * (x @ x) / n, gradient + x / n

    # The logarithm of a scale: it stays positive.
    found = minimize(loss, np.zeros(2 * k if is_vector else 1), jac=True, method="L-BFGS-B")
    scale, shift = parts(np.clip(found.x, -20, 20))
    return Calibration(method, tuple(scale.tolist()), tuple(shift.tolist()), n, step, views)


def cross_fitted(labels: np.ndarray, probs: np.ndarray, method: Method, seed: int = 0) -> np.ndarray:
    """Probabilities [n, k], each calibrated by a fit on the other four fifths of the images: an honest look at the fit.

    Raises:
      ValueError: too few images.
    """
    parts = np.random.default_rng(seed).permutation(len(labels)) % _PARTS
    out = np.empty(probs.shape, np.float32)
    for part in range(_PARTS):
        rest = parts != part
        out[~rest] = fit(labels[rest], probs[rest], method)(probs[~rest])
    return out


def figures(labels: np.ndarray, probs: np.ndarray) -> dict[str, float]:
    """ECE over 15 bins (which is above zero by chance, the more so the fewer images), Brier score and NLL."""
    own = np.asarray(probs, np.float64)[np.arange(len(labels)), labels]
    brier = ((np.asarray(probs, np.float64) - np.eye(probs.shape[1])[labels]) ** 2).sum(1).mean()
    nll = -np.log(np.maximum(own, _TINY)).mean()
    return {"ece": expected_calibration_error(labels, probs), "brier": float(brier), "nll": float(nll)}


def file_of(views: int) -> str:
    """The name of the file of a calibration in so many views."""
    return FILE if views == 1 else FILE.replace(".json", f"-views{views}.json")


def write_calibration(run_dir: Path, found: Calibration) -> Path:
    """Keeps a calibration with its run."""
    path = run_dir / file_of(found.views)
    write_text(path, json.dumps(dataclasses.asdict(found), indent=2))
    return path


def read_calibration(run_dir: Path, classes: int, step: int, views: int = 1) -> Calibration:
    """The run's calibration for so many views.

    Raises:
      FileNotFoundError: none is kept.
      ValueError: the file is damaged, or is of another checkpoint.
    """
    path = run_dir / file_of(views)
    remedy = f"`bmjax eval RUN --calibrate temperature{f' --views {views}' * (views > 1)}` writes it"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; {remedy}")
    found = read_json(path)
    if (problem := _problem(found, classes)) is not None:
        raise ValueError(f"{path} is damaged: {problem}; {remedy} again")
    found = Calibration(found["method"], tuple(found["scale"]), tuple(found["shift"]), found["n"], found["step"], views)
    if found.step != step:
        raise ValueError(f"{path} is of step {found.step}; expected {step}, the checkpoint's; {remedy} again")
    return found


def _problem(found: dict[str, Any], classes: int) -> str | None:
    """What is wrong with a file's fields, if anything is."""
    if found.get("method") not in METHODS:
        return f"method is {found.get('method')!r}"
    for name in ("scale", "shift"):
        values = found.get(name)
        numbers = [v for v in values if type(v) in (int, float) and abs(v) < _MOST] if isinstance(values, list) else []
        if len(numbers) != classes or values != numbers:
            return f"{name} is {str(values)[:60]}; expected {classes} numbers"
    if min(found["scale"]) <= 0:
        return f"scale is {str(found['scale'])[:60]}; expected numbers above 0"
    odd = [name for name in ("n", "step") if type(found.get(name)) is not int]
    return f"{odd[0]} is {found.get(odd[0])!r}; expected a whole number" if odd else None
