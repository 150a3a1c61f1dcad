"""In words: how many images are answered, and whether images of unseen kinds are refused."""

from __future__ import annotations

import numpy as np

from bmjax.analysis.evaluate.areas import auroc
from bmjax.analysis.evaluate.judge import Judge
from bmjax.analysis.evaluate.reader import Seen
from bmjax.analysis.evaluate.reference import SCORES
from bmjax.analysis.evaluate.refusal import FAILURE, Refusal, risk_coverage, sets_of
from bmjax.runs.intervals import wilson_interval
from bmjax.runs.records import Predictions


def familiarity_of(judge: Judge, seen: Seen) -> np.ndarray:
    """The share of validation cells at least as strange as each image, [n]."""
    reference = judge.featured_reference()
    return reference.familiarity(reference.strangeness(seen))


def answered(probs: np.ndarray, refusal: Refusal, familiar: np.ndarray | None, unfamiliar: float) -> np.ndarray:
    """Which images are answered, bool [n]."""
    sure = probs.max(1) >= refusal.threshold
    return sure if familiar is None else sure & (familiar > unfamiliar)


def refusal_text(refusal: Refusal, predictions: Predictions, familiar: np.ndarray | None, unfamiliar: float) -> str:
    """What the threshold does on these images."""
    right = predictions.predicted == predictions.labels
    answers = answered(predictions.probs, refusal, familiar, unfamiliar)
    n, k = int(answers.sum()), int((answers & ~right).sum())
    if not np.isfinite(refusal.threshold):
        return (
            f"no threshold is known to keep the error at {refusal.rate:g}, by {refusal.n} validation images: "
            "nothing is answered"
        )
    low, high = wilson_interval(k, n) if n else (0.0, 1.0)
    sets = sets_of(predictions.probs, refusal.set_bound)
    held = float(sets[np.arange(len(right)), predictions.labels].mean())
    area = risk_coverage(predictions.confidence, right)[2]
    return "\n".join(
        [
            f"answers from a probability of {refusal.threshold:.4f} on ({refusal.n} validation images; wrong in at "
            f"most {refusal.rate:g} with probability {1 - FAILURE:g})",
            f"here {n} of {len(right)} answered, wrong {k / max(n, 1):.3f} ({low:.3f} to {high:.3f}); area under the "
            f"curve of error over share answered {area:.4f}",
            f"sets of {sets.sum(1).mean():.2f} classes in the mean hold the true one in {held:.3f} "
            f"(expected {1 - refusal.rate:g} or more)",
        ]
    )


def strangers_text(
    judge: Judge, seen: Seen, others: Seen, name: str, refusal: Refusal | None, unfamiliar: float
) -> str:
    """AUROC of each score of strangeness, and the shares refused."""
    reference = judge.reference()
    if reference is not None and reference.has_features:
        both = (reference.strangeness(seen).T, reference.strangeness(others).T)
        scores = {score: (known, strange) for score, known, strange in zip(SCORES, *both, strict=True)}
    else:
        pairs = ((1 - seen.probs.max(1), 1 - others.probs.max(1)), (seen.energy, others.energy))
        scores = dict(zip(SCORES[:2], pairs, strict=True))
    lines = [f"{len(others.probs)} images of {name} against {len(seen.probs)} known: AUROC (95 % interval)"]
    for score, (known, strange) in scores.items():
        value, low, high = auroc(known, strange)
        lines.append(f"  by {score:12} {value:.3f} ({low:.3f} to {high:.3f})")
    if len(scores) == 2:
        lines.append("  by features: not known; `bmjax eval RUN --reference` keeps what they need")
    if refusal is not None:
        shares = []
        for one in (seen, others):
            familiar = familiarity_of(judge, one) if unfamiliar else None
            shares.append(100 * (1 - answered(one.probs, refusal, familiar, unfamiliar).mean()))
        lines.append(f"  refused: {shares[1]:.1f} % of these, {shares[0]:.1f} % of the known")
    return "\n".join(lines)
