"""A mean over many items from labels for some of them and predictions for all (PPI++).

With labels y and predictions f on n labelled items, and f on N unlabelled ones, the estimate is

    λ · mean of f over the unlabelled + mean of (y − λ·f) over the labelled

for any predictions, however wrong (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic 2023, "Prediction-powered
inference"); λ makes its variance smallest (Angelopoulos, Duchi and Zrnic 2023, "PPI++", arXiv:2311.01453, Example 6.1):
0 is the mean of the labels, and useless predictions come near it. The labelled items must be a random sample.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from ray_pipeline.stats.bootstrap import Estimate, Floats

#: With fewer labelled groups there is no interval: its quantiles hold for means of many.
LEAST = 20


@dataclasses.dataclass(frozen=True)
class Powered:
    """A mean with and without predictions.

    Attributes:
        labels, unlabelled: number of items.
        alone: mean of the labels, with its interval by the t distribution.
        powered: the PPI++ estimate.
        weight: λ.
        worth: labels that would give an interval as narrow without predictions; None without an interval.
    """

    labels: int
    unlabelled: int
    alone: Estimate
    powered: Estimate
    weight: float
    worth: float | None


def powered_mean(
    labels: ArrayLike,
    predictions: ArrayLike,
    unlabelled: ArrayLike,
    groups: ArrayLike | None = None,
    unlabelled_groups: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Powered | None:
    """The mean label over all items; None without labels.

    Args:
        labels, predictions: of the labelled items, shape (n,).
        unlabelled: predictions for the other items, shape (N,).
        groups, unlabelled_groups: of each item (a prompt, a question); items of one are not independent. Default: each
            item by itself.
    """
    y, f, rest = (np.asarray(values, dtype=np.float64) for values in (labels, predictions, unlabelled))
    if not len(y):
        return None
    own, others = (
        np.arange(len(values)) if names is None else np.unique(np.asarray(names), return_inverse=True)[1]
        for values, names in ((y, groups), (rest, unlabelled_groups))
    )
    alone = _interval(float(y.mean()), _variance(y, own), own, confidence)
    weight = 0.0
    if len(rest) > 1 and len(y) > 1 and (spread := np.concatenate([f, rest]).var(ddof=1)) > 0:
        shared = float(((y - y.mean()) * (f - f.mean())).sum() / (len(y) - 1))
        weight = float(np.clip(shared / ((1 + len(y) / len(rest)) * spread), 0, 1))
    value = float((y - weight * f).mean() + (weight * rest.mean() if len(rest) else 0.0))
    variance = _variance(y - weight * f, own) + (_variance(weight * rest, others) if weight else 0.0)
    powered = _interval(value, variance, own, confidence)
    worth = None
    if powered.low is not None and variance > 0:
        worth = len(y) * _variance(y, own) / variance
    return Powered(len(y), len(rest), alone, powered, weight, worth)


def _variance(values: Floats, group: np.ndarray) -> float:
    """Of a mean, from the sums of the deviations of each group; NaN with fewer than two groups."""
    sums = np.bincount(group, weights=values - values.mean())
    count = len(sums)
    return float((sums**2).sum() * count / (count - 1) / len(values) ** 2) if count > 1 else float("nan")


def _interval(value: float, variance: float, group: np.ndarray, confidence: float) -> Estimate:
    from scipy.stats import t

    count = len(np.unique(group))
    if count < LEAST or not variance > 0:
        return Estimate(value)
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * variance**0.5
    return Estimate(value, value - half, value + half)
