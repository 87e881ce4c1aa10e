"""Probabilities of classes: how well they are calibrated, and how a model makes them from few labels.

A probability is calibrated where items with probability p are right in a share p of cases. The expected calibration
error compares the two by bins of the probability (Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern
neural networks", §2); the Brier score is the squared distance to what was observed (Brier 1950), 0 at best and 2 at
worst, and also rewards probabilities that tell items apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.stats.bootstrap import Estimate, Floats, Samples, drawn_ratio, estimate

BINS = 10
#: Inverse strengths of the L2 penalty that are tried, the strongest first.
STRENGTHS = (0.01, 0.1, 1.0)
#: Labels from which isotonic regression is tried too. It follows any monotonous curve, and fits noise where there are
#: few (Niculescu-Mizil and Caruana 2005, "Predicting good probabilities with supervised learning", §5).
ISOTONIC_LEAST = 200
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
        name: of its features, or ISOTONIC.
        strength: inverse strength of its penalty; None for isotonic regression, which has none.
        held_out: its probabilities for the items that it was chosen on, each from folds without that item; NaN for the
            other items; shape (items, classes).
        probabilities: of the model fitted to all items that it was chosen on, for every item, shape (items, classes).
    """

    name: str
    strength: float | None
    held_out: Floats
    probabilities: Floats


ISOTONIC = "posterior, isotonic"

_On = NDArray[np.bool_]


def fit(
    sets: Mapping[str, Features],
    scores: Floats,
    labels: Labels,
    fold: NDArray[np.int64],
    on: _On,
    classes: int,
) -> Fitted:
    """The model of the lowest held-out log loss: logistic with an L2 penalty, or from ISOTONIC_LEAST labels isotonic.

    Each item is seen twice, the second time with its classes and its odd features reversed, so that the model treats
    both ends of the classes alike. Features are divided by their root mean square on the items that are fitted.

    Args:
        sets: features of logistic models to choose from, by name; of equal losses the first set, the strongest penalty
            and a logistic model win.
        scores: probabilities that isotonic regression maps to better ones, shape (items, classes).
        fold: number of each item's fold, shape (items,).
        on: items to fit to, all of them labelled, in two folds or more.
    """
    models: dict[tuple[str, float | None], Callable[[_On], Floats]] = {
        (name, strength): functools.partial(_logistic, features, labels, strength=strength, classes=classes)
        for name, features in sets.items()
        for strength in STRENGTHS
    }
    if on.sum() >= ISOTONIC_LEAST:
        models[ISOTONIC, None] = functools.partial(_isotonic, scores, labels)
    best: Fitted | None = None
    lowest = np.inf
    for (name, strength), model in models.items():
        held_out = np.full((len(labels), classes), np.nan)
        for number in np.unique(fold[on]):
            test = on & (fold == number)
            held_out[test] = model(on & ~test)[test]
        loss = -np.log(np.maximum(held_out[on, labels[on]], _LEAST)).mean()
        if loss < lowest - 1e-9:
            lowest, best = loss, Fitted(name, strength, held_out, held_out)
    assert best is not None
    return dataclasses.replace(best, probabilities=models[best.name, best.strength](on))


def _isotonic(scores: Floats, labels: Labels, on: _On) -> Floats:
    """Isotonic regression of each class against the others on its own score, scaled to a sum of 1 (Zadrozny and Elkan
    2002, "Transforming classifier scores into accurate multiclass probability estimates"), shape (items, classes).

    A class that no fitted item has beyond a score keeps a part of one item there, so that no probability is 0.
    """
    from sklearn.isotonic import IsotonicRegression

    classes = scores.shape[1]
    x = np.concatenate([scores[on], scores[on][:, ::-1]])
    y = np.concatenate([labels[on], classes - 1 - labels[on]])
    found = np.stack(
        [
            IsotonicRegression(out_of_bounds="clip").fit(x[:, c], (y == c).astype(float)).predict(scores[:, c])
            for c in range(classes)
        ],
        axis=1,
    )
    found = np.maximum(found, 1 / (on.sum() + classes))
    normal: Floats = found / found.sum(axis=1, keepdims=True)
    return normal


def _logistic(features: Features, labels: Labels, on: _On, *, strength: float, classes: int) -> Floats:
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
