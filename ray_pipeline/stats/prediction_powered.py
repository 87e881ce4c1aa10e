"""A mean over many items from labels for some of them and predictions for all (PPI++).

With labels y and predictions f on labelled items, which were drawn with known probabilities, and w the inverse
probabilities, scaled to a sum of 1, the estimate is

    κ · mean of f over all items + sum of w · (y − κ·f) over the labelled ones

for any predictions, however wrong (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic 2023, "Prediction-powered
inference"; with unequal probabilities Zrnic and Candès 2024, "Active statistical inference", arXiv:2403.03208, with
the weights scaled as in Hájek's estimator). κ makes its variance smallest: 0 is the mean of the labels, and useless
predictions come near it. With equal probabilities this is PPI++ (Angelopoulos, Duchi and Zrnic 2023, arXiv:2311.01453,
Example 6.1) with λ = κ · share of the unlabelled items, which writes it with the mean of f over those.

The variance is that of the influences of independent groups of items (a prompt with its candidates, for instance):
w·(y − mean) + κ·(1/items − w)·(f − mean of f), with w = 0 for an unlabelled item.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from ray_pipeline.stats.bootstrap import Estimate

#: With fewer labelled groups there is no interval: its quantiles hold for means of many.
LEAST = 20


@dataclasses.dataclass(frozen=True)
class Powered:
    """A mean with and without predictions.

    Attributes:
        labels, unlabelled: number of items.
        alone: weighted mean of the labels, with its interval by the t distribution.
        powered: the PPI++ estimate.
        weight: λ.
        worth: labels that would give an interval as narrow without predictions, drawn with equal probabilities, each
            of a group of its own; None without an interval.
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
    probabilities: ArrayLike | None = None,
) -> Powered | None:
    """The mean label over all items; None without labels.

    Args:
        labels, predictions: of the labelled items, shape (n,).
        unlabelled: predictions for the other items, shape (N,).
        groups, unlabelled_groups: name of each item's group, both or neither; items of one are not independent.
            Default: each item by itself.
        probabilities: with which each labelled item was drawn, up to a common factor, shape (n,). Default: equal ones.
    """
    y, f, rest = (np.asarray(values, dtype=np.float64) for values in (labels, predictions, unlabelled))
    n, items = len(y), len(y) + len(rest)
    if not n:
        return None
    names = np.arange(items) if groups is None else np.concatenate([np.asarray(groups), np.asarray(unlabelled_groups)])
    group = np.unique(names, return_inverse=True)[1]
    labelled_groups = len(np.unique(group[:n]))
    inverse = np.ones(n) if probabilities is None else 1 / np.asarray(probabilities, dtype=np.float64)
    everything = np.concatenate([f, rest])
    mean, centre = float(np.average(y, weights=inverse)), float(everything.mean())
    own = inverse / inverse.sum()
    w = np.concatenate([own, np.zeros(len(rest))])
    labelled = np.bincount(group[:n], weights=own * (y - mean), minlength=int(group.max()) + 1)
    predicted = np.bincount(group, weights=(1 / items - w) * (everything - centre))
    weight, most = 0.0, items / len(rest) if len(rest) > 1 and np.ptp(everything) > 0 else 0.0
    if most and (spread := float(predicted @ predicted)) > 0:
        weight = float(np.clip(-(labelled @ predicted) / spread, 0, most))
    value = mean + weight * (centre - float(own @ f)) if weight else mean
    correction = labelled_groups / (labelled_groups - 1) if labelled_groups > 1 else np.nan
    alone, variance = (float(sums @ sums) * correction for sums in (labelled, labelled + weight * predicted))
    powered = _interval(value, variance, labelled_groups, confidence)
    worth = None
    if powered.low is not None:
        worth = float(own @ (y - mean) ** 2) * n / (n - 1) / variance
    return Powered(
        n,
        len(rest),
        _interval(mean, alone, labelled_groups, confidence),
        powered,
        weight / most if most else 0.0,
        worth,
    )


def _interval(value: float, variance: float, groups: int, confidence: float) -> Estimate:
    from scipy.stats import t

    if groups < LEAST or not variance > 0:
        return Estimate(value)
    half = float(t.ppf((1 + confidence) / 2, groups - 1)) * variance**0.5
    return Estimate(value, value - half, value + half)
