"""Which items to label, so that few labels make the interval of a mean short (active inference).

With predictions for all items and labels for some (`prediction_powered`), a label tells most where its prediction is
most likely to be wrong. The variance of the estimate is least where items are drawn with probabilities in proportion to
the standard deviation of label − prediction (Zrnic and Candès 2024, "Active statistical inference", arXiv:2403.03208,
§3). Weighing each label by the inverse of its probability keeps the estimate unbiased, however wrong that deviation is;
the part of the items that is drawn evenly bounds the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ray_pipeline.stats.bootstrap import Floats

#: Share of equal probabilities that is mixed into a predicted distribution: panels that are sure of a label are wrong
#: more often than they say, as judges share their errors.
TEMPER = 0.1


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Items to label.

    Attributes:
        items: their numbers, those drawn evenly first, shape (rows,).
        even: how many are drawn evenly.
        probability: with which each item of the whole was to be drawn, shape (items,).
    """

    items: NDArray[np.int64]
    even: int
    probability: Floats


def deviation(probabilities: Floats, values: ArrayLike) -> Floats:
    """Standard deviation of a value under its predicted distribution, mixed with the even one by `TEMPER`.

    Args:
        probabilities: of each class by item, shape (items, classes).
        values: of each class, shape (classes,), or of each class by item, shape (items, classes).

    Returns:
        Shape (items,).
    """
    p = (1 - TEMPER) * probabilities + TEMPER / probabilities.shape[1]
    of = np.broadcast_to(np.asarray(values, dtype=np.float64), p.shape)
    mean = (p * of).sum(axis=1, keepdims=True)
    found: Floats = np.sqrt((p * (of - mean) ** 2).sum(axis=1))
    return found


def worth(deviations: Sequence[Floats]) -> Floats:
    """Sizes to draw by for several means at once: the sum of their variances, each relative to that of labels drawn
    evenly, is least.

    Args:
        deviations: by mean, shape (items,), 0 for items that it leaves out.
    """
    parts = [each**2 / max(float((each**2).mean()), 1e-300) for each in deviations if len(each)]
    return np.sqrt(np.sum(parts, axis=0)) if parts else np.zeros(0)


def draw(sizes: Floats, rows: int, even: float, first: Floats, second: Floats) -> Drawn:
    """Draw a share `even` of the rows with equal probabilities and the others with probabilities that go with `sizes`.

    Both are sequential Poisson samples (Ohlsson 1998, "Sequential Poisson sampling"): the items of the smallest ratio
    of a random number to the size. So the number of rows is exact, the probabilities hold nearly, and with the same
    random numbers a larger draw contains every smaller one.

    Args:
        sizes: positive, shape (items,).
        rows: number of items to draw; all of them where there are fewer.
        even: between 0 and 1.
        first, second: independent random numbers between 0 and 1, shape (items,).
    """
    count = len(sizes)
    rows = min(rows, count)
    part = min(round(rows * even), rows)
    order = np.argsort(first, kind="stable")
    evenly, left = order[:part], order[part:]
    share = part / count if count else 0.0
    own = _inclusion(sizes, (rows - part) / (1 - share)) if rows > part else np.zeros(count)
    with np.errstate(divide="ignore"):
        rank = np.where(own < 1, second / own, 0.0)[left]
    by_size = left[np.argsort(rank, kind="stable")[: rows - part]]
    return Drawn(np.concatenate([evenly, by_size]).astype(np.int64), part, 1 - (1 - share) * (1 - own))


def _inclusion(sizes: Floats, expected: float) -> Floats:
    """Probabilities that go with sizes and sum to the expected number, none of them above 1."""
    sure = np.zeros(len(sizes), dtype=bool)
    while True:
        left = expected - sure.sum()
        found = np.where(sure, 1.0, sizes * (left / max(float(sizes[~sure].sum()), 1e-300)))
        if not (more := (found > 1) & ~sure).any():
            return found
        sure |= more
