"""Probabilities of classes: how well they are calibrated, and how a logistic model makes them from few labels.

A probability is calibrated where items with probability p are right in a share p of cases. The expected calibration
error compares the two by bins of the probability (Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern
neural networks", §2); the Brier score is the squared distance to what was observed (Brier 1950), 0 at best and 2 at
worst, and also rewards probabilities that tell items apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.stats.bootstrap import Estimate, Floats, Samples, drawn_ratio, estimate

BINS = 10
#: Inverse strengths of the L2 penalty that are tried, the strongest first.
STRENGTHS = (0.01, 0.1, 1.0)
#: Probabilities are not taken for smaller than this in a logarithm.
_LEAST = 1e-6

Labels = NDArray[np.int8]


@dataclasses.dataclass(frozen=True)
class Bin:
    """Items whose highest probability is in one of `BINS` equal parts of 0 to 1."""

    items: int
    probability: float
    right: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibration of the highest probability of each item.

    Attributes:
        ece: expected calibration error. Chance alone makes it positive, so its interval is rather too high.
        brier: mean over items of the squared distances summed over classes.
        bins: those with items, for a reliability diagram.
    """

    items: int
    ece: Estimate
    brier: Estimate
    bins: list[Bin]


def calibration(probabilities: Floats, labels: Labels, samples: Samples) -> Calibration | None:
    """Calibration over the items that have a label and probabilities; None without such items.

    Args:
        probabilities: shape (items, classes), NaN where there are none.
        labels: shape (items,), a class or −1.
    """
    known = (labels >= 0) & ~np.isnan(probabilities).any(axis=1)
    if not known.any():
        return None
    p, truth = probabilities[known], labels[known]
    sure, right = p.max(axis=1), (p.argmax(axis=1) == truth).astype(float)
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    square = ((p - np.eye(p.shape[1])[truth]) ** 2).sum(axis=1)
    counts = samples.counts[:, known]
    gaps = np.zeros((len(sure), BINS))
    gaps[np.arange(len(sure)), place] = right - sure
    with np.errstate(invalid="ignore"):
        drawn = np.abs(counts @ gaps).sum(axis=1) / counts.sum(axis=1)
    return Calibration(
        len(sure),
        estimate(float(np.abs(gaps.sum(axis=0)).sum() / len(sure)), drawn, samples.confidence),
        estimate(float(square.mean()), drawn_ratio(square, np.ones(len(square)), counts), samples.confidence),
        [
            Bin(int(own.sum()), float(sure[own].mean()), float(right[own].mean()))
            for own in (place == number for number in range(BINS))
            if own.any()
        ],
    )


@dataclasses.dataclass(frozen=True)
class Features:
    """What a model is fitted on.

    Attributes:
        values: shape (items, features).
        odd: which features change their sign when the order of the classes is reversed; the others stay.
    """

    values: Floats
    odd: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A model that was chosen among several.

    Attributes:
        name: of its features.
        strength: inverse strength of its penalty.
        held_out: its probabilities for the items that it was chosen on, each from folds without that item; NaN for the
            other items; shape (items, classes).
        probabilities: of the model fitted to all items that it was chosen on, for every item, shape (items, classes).
    """

    name: str
    strength: float
    held_out: Floats
    probabilities: Floats


def fit_logistic(
    sets: Mapping[str, Features], labels: Labels, fold: NDArray[np.int64], on: NDArray[np.bool_], classes: int
) -> Fitted:
    """A multinomial logistic model with an L2 penalty; its features and penalty have the lowest held-out log loss.

    Each item is seen twice, the second time with its classes and its odd features reversed, so that the model treats
    both ends of the classes alike. Features are divided by their root mean square on the items that are fitted.

    Args:
        sets: features to choose from, by name; of equal losses the first set and the strongest penalty win.
        fold: number of each item's fold, shape (items,).
        on: items to fit to, all of them labelled, in two folds or more.
    """
    best: Fitted | None = None
    lowest = np.inf
    for name, features in sets.items():
        for strength in STRENGTHS:
            held_out = np.full((len(labels), classes), np.nan)
            for number in np.unique(fold[on]):
                test = on & (fold == number)
                held_out[test] = _predict(features, labels, on & ~test, strength, classes)[test]
            loss = -np.log(np.maximum(held_out[on, labels[on]], _LEAST)).mean()
            if loss < lowest - 1e-9:
                lowest, best = loss, Fitted(name, strength, held_out, held_out)
    assert best is not None
    whole = _predict(sets[best.name], labels, on, best.strength, classes)
    return dataclasses.replace(best, probabilities=whole)


def _predict(features: Features, labels: Labels, on: NDArray[np.bool_], strength: float, classes: int) -> Floats:
    """Probabilities of all items by the model fitted to some of them, shape (items, classes)."""
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt((features.values[on] ** 2).mean(axis=0))
    values = features.values / np.where(scale > 0, scale, 1.0)
    x = np.concatenate([values[on], values[on] * np.where(features.odd, -1.0, 1.0)])
    y = np.concatenate([labels[on], classes - 1 - labels[on]])
    found = np.zeros((len(values), classes))
    if len(seen := np.unique(y)) == 1:
        found[:, seen[0]] = 1.0
        return found
    model: Any = LogisticRegression(C=strength, solver="newton-cholesky").fit(x, y)
    found[:, model.classes_] = model.predict_proba(values)
    return found
