"""Seeded percentile bootstrap (Efron & Tibshirani 1993, §13.3).

A sample draws as many units (prompts, items, shards) as there are, with replacement, and takes all rows of each: rows
of one prompt are not independent. Equal seeds give equal samples everywhere, whatever the block size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
#: How often each unit is in each sample, shape (draws, units). float32 is exact here (counts stay far under 2^24) and
#: halves the time of matrix products.
Counts = NDArray[np.float32]

# Cells of one block of resampling indices: 4 M int64 are 32 MB, whatever the number of prompts.
_CELLS_PER_BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, in the unit of the values.

    `mean` is None without rows, or where a model finds none. `low` and `high` are None with fewer than two groups, and
    where all groups have the same mean and the range of the values is not known: resampling returns that mean again,
    and an interval without width would claim certainty.
    """

    mean: float | None
    low: float | None
    high: float | None
    rows: int = 0
    groups: int = 0


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval; None where it is undefined (0/0), was not resampled, or does not vary."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Samples:
    """Bootstrap samples of rows that are drawn together with all others of their cluster (a question, a prompt).

    Attributes:
        counts: how often each row is in each sample, shape (draws, rows).
        cluster: number of each row's cluster, shape (rows,).
        confidence: level of the intervals from these samples.
    """

    counts: Counts
    cluster: NDArray[np.int64]
    confidence: float = 0.95

    def clusters(self, rows: NDArray[np.bool_]) -> int:
        """Number of clusters that have one of these rows; `rows` has shape (rows,)."""
        return len(np.unique(self.cluster[rows]))


def resample(clusters: ArrayLike, draws: int, seed: int, confidence: float = 0.95) -> Samples:
    """Samples of as many clusters as there are, with replacement; `clusters` names each row's, shape (rows,)."""
    _, first, inverse = np.unique(np.asarray(clusters), return_index=True, return_inverse=True)
    # Numbered in the order of the rows, so that clusters of one row each give the samples of the rows.
    cluster = np.argsort(np.argsort(first))[inverse]
    return Samples(sample_counts(len(first), draws, seed)[:, cluster], cluster, confidence)


def picks(units: int, draws: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices of the units in each sample, in blocks of shape (some draws, units)."""
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS_PER_BLOCK // units)
    for start in range(0, draws, block):
        yield rng.integers(0, units, size=(min(block, draws - start), units))


def count_blocks(units: int, draws: int, seed: int) -> Iterator[Counts]:
    """The samples of `picks` as counts, in blocks of shape (some draws, units)."""
    for block in picks(units, draws, seed):
        # One count over all draws of the block: draw d counts in the cells from d · units on.
        cells = block + units * np.arange(len(block))[:, None]
        yield np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape).astype(np.float32)


def sample_counts(units: int, draws: int, seed: int) -> Counts:
    """All samples of `count_blocks`, shape (draws, units)."""
    if units == 0:
        return np.zeros((draws, 0), dtype=np.float32)
    return np.concatenate(list(count_blocks(units, draws, seed)))


def percentiles(values: Floats, estimates: ArrayLike, confidence: float = 0.95, least: int = 2) -> Floats:
    """Lower and upper bound over the last axis, shape (2, …), ignoring NaN (samples where a statistic is 0/0).

    Bounds are widened to hold the estimate, which the percentiles of a biased statistic may leave out. NaN where fewer
    than `least` values remain, where all are equal (an interval without width would claim certainty), and where
    the estimate is NaN.

    Args:
        estimates: the statistic of the rows themselves, shape (…).
    """
    tail = (1 - confidence) / 2
    missing = np.isnan(values)
    bounds = np.full((2, *values.shape[:-1]), np.nan)
    enough = (~missing).sum(axis=-1) >= least
    if not missing.any() and enough.all():
        bounds = np.asarray(np.quantile(values, [tail, 1 - tail], axis=-1))
    elif enough.any():
        bounds[:, enough] = np.nanquantile(values[enough], [tail, 1 - tail], axis=-1)
    varies = ~np.isclose(bounds[0], bounds[1], rtol=1e-9, atol=1e-12)
    held = np.stack([np.minimum(bounds[0], estimates), np.maximum(bounds[1], estimates)])
    return np.where(varies, held, np.nan)


def estimate(value: float, drawn: Floats, confidence: float = 0.95, least: int = 2) -> Estimate:
    """A value with the percentiles of its draws, shape (draws,); NaN becomes None."""
    low, high = percentiles(drawn, value, confidence, least)
    return Estimate(number(value), number(low), number(high))


def ratio(numerator: Floats, denominator: Floats, samples: Samples) -> Estimate:
    """A share: the sum of one number per row over the sum of another, with its interval; None for 0/0.

    Where all clusters have the same share, the interval is exact (`equal_shares`).

    Args:
        numerator, denominator: shape (rows,), with 0 ≤ numerator ≤ denominator.
    """
    total = denominator.sum()
    if not total:
        return Estimate(None)
    value = float(numerator.sum() / total)
    by_cluster, rows = (np.bincount(samples.cluster, weights=x) for x in (numerator, denominator))
    shares = by_cluster[rows > 0] / rows[rows > 0]
    if np.allclose(shares, shares[0]):
        return Estimate(value, *equal_shares(value, len(shares), samples.confidence))
    return estimate(value, drawn_ratio(numerator, denominator, samples.counts), samples.confidence)


def equal_shares(share: float, clusters: int, confidence: float = 0.95) -> tuple[float | None, float | None]:
    """Interval of a mean between 0 and 1 whose clusters all have the same value, where resampling has no width.

    With L the exact lower bound of the probability of that value (Clopper & Pearson 1934), the mean is at least
    share·L, and at most 1 − (1 − share)·L. None with fewer than two clusters.
    """
    if clusters < 2:
        return None, None
    from scipy.stats import binomtest

    least = float(binomtest(clusters, clusters).proportion_ci(confidence, method="exact").low)
    return share * least, 1 - (1 - share) * least


def drawn_ratio(numerator: Floats, denominator: Floats, counts: Counts) -> Floats:
    """The ratio of sums in each sample, shape (draws,); NaN for 0/0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (counts @ numerator) / (counts @ denominator)
    return np.where(np.isfinite(drawn), drawn, np.nan)


def number(value: float) -> float | None:
    """A float, or None for NaN."""
    return None if np.isnan(value) else float(value)


def bootstrap_mean(
    values: ArrayLike,
    groups: ArrayLike,
    draws: int = 2000,
    seed: int = 0,
    *,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Mean of `values` with the percentile interval of the cluster bootstrap.

    A draw takes as many groups as there are, with replacement, and the mean of all their rows. Groups are put in sorted
    order first: the order of the rows does not matter.

    Args:
        values, groups: shape (rows,).
        bounds: smallest and largest possible value. With them, groups that all have the same mean have an exact
            interval (`equal_shares`); without them, none.

    Raises:
        ValueError: NaN (drop or count unread rows first), or unequal lengths.
    """
    numbers, names = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if numbers.ndim != 1 or numbers.shape != names.shape:
        raise ValueError(f"values and groups must have the same shape (rows,), got {numbers.shape} and {names.shape}")
    if np.isnan(numbers).any():
        raise ValueError("values contains NaN; drop and count unread rows first")
    if draws < 1:
        raise ValueError(f"draws must be positive, got {draws}")
    if len(numbers) == 0:
        return Interval(None, None, None)
    _, group_of_row = np.unique(names, return_inverse=True)
    sizes = np.bincount(group_of_row)
    sums = np.bincount(group_of_row, weights=numbers).astype(np.float64)
    mean = float(sums.sum() / sizes.sum())
    low: float | None = None
    high: float | None = None
    if np.allclose(sums / sizes, mean, rtol=1e-9, atol=1e-12):
        if bounds is not None:
            least, width = bounds[0], bounds[1] - bounds[0]
            ends = equal_shares((mean - least) / width, len(sizes), confidence)
            low, high = (None if end is None else least + width * end for end in ends)
        return Interval(mean, low, high, len(numbers), len(sizes))
    means = [sums[block].sum(axis=1) / sizes[block].sum(axis=1) for block in picks(len(sizes), draws, seed)]
    low, high = (number(end) for end in percentiles(np.concatenate(means), mean, confidence))
    return Interval(mean, low, high, len(numbers), len(sizes))


def bootstrap_gain(
    base_values: ArrayLike,
    base_prompts: ArrayLike,
    policy_values: ArrayLike,
    policy_prompts: ArrayLike,
    draws: int = 2000,
    seed: int = 0,
    *,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Mean over prompts of (policy's mean − base's mean on that prompt), over the prompts that both answered.

    Pairing by prompt removes the difficulty of the prompts from the interval. `bounds` are those of the difference, as
    in `bootstrap_mean`.
    """
    base, policy = _mean_by_group(base_values, base_prompts), _mean_by_group(policy_values, policy_prompts)
    shared = sorted(base.keys() & policy.keys())
    return bootstrap_mean([policy[p] - base[p] for p in shared], shared, draws, seed, bounds=bounds)


def _mean_by_group(values: ArrayLike, groups: ArrayLike) -> dict[str, float]:
    names, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(group_of_row, weights=np.asarray(values, dtype=np.float64), minlength=len(names))
    sizes = np.bincount(group_of_row, minlength=len(names))
    return dict(zip(names.tolist(), (sums / sizes).tolist(), strict=True))
