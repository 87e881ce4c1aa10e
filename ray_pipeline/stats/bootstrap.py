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
    """A mean with its bootstrap interval, in the unit of the values.

    `mean` is None without rows; `low` and `high` are None with fewer than two groups, because resampling a single
    group always returns that group, and the interval would have no width.
    """

    mean: float | None
    low: float | None
    high: float | None
    rows: int = 0
    groups: int = 0


@dataclass(frozen=True)
class Estimate:
    """A statistic with its percentile interval; None where it is undefined (0/0) or was not resampled."""

    value: float | None
    low: float | None = None
    high: float | None = None


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


def multinomial_counts(units: int, draws: int, seed: int) -> Floats:
    """Samples of the same distribution from another stream of random numbers, shape (draws, units).

    Statistics first published with this stream keep it, so that their intervals do not change.
    """
    if units == 0:
        return np.zeros((draws, 0))
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=draws).astype(np.float64)


def percentiles(values: Floats, confidence: float = 0.95, least: int = 2) -> Floats:
    """Lower and upper bound over the last axis, shape (2, …), ignoring NaN (samples where a statistic is 0/0).

    NaN where fewer than `least` values remain.
    """
    tail = (1 - confidence) / 2
    missing = np.isnan(values)
    bounds = np.full((2, *values.shape[:-1]), np.nan)
    enough = (~missing).sum(axis=-1) >= least
    if not missing.any() and enough.all():
        return np.asarray(np.quantile(values, [tail, 1 - tail], axis=-1))
    if enough.any():
        bounds[:, enough] = np.nanquantile(values[enough], [tail, 1 - tail], axis=-1)
    return bounds


def estimate(value: float, drawn: Floats, confidence: float = 0.95, least: int = 2) -> Estimate:
    """A value with the percentiles of its draws, shape (draws,); NaN becomes None."""
    low, high = percentiles(drawn, confidence, least)
    return Estimate(number(value), number(low), number(high))


def ratio(numerator: Floats, denominator: Floats, counts: Counts | Floats, confidence: float = 0.95) -> Estimate:
    """Sum of one number per unit over the sum of another (shapes (units,)), with its interval; None for 0/0.

    `counts` has shape (draws, units).
    """
    total = denominator.sum()
    if not total:
        return Estimate(None)
    return estimate(float(numerator.sum() / total), drawn_ratio(numerator, denominator, counts), confidence)


def drawn_ratio(numerator: Floats, denominator: Floats, counts: Counts | Floats) -> Floats:
    """The ratio of sums in each sample, shape (draws,); NaN for 0/0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (counts @ numerator) / (counts @ denominator)
    return np.where(np.isfinite(drawn), drawn, np.nan)


def number(value: float) -> float | None:
    """A float, or None for NaN."""
    return None if np.isnan(value) else float(value)


def bootstrap_mean(
    values: ArrayLike, groups: ArrayLike, draws: int = 2000, seed: int = 0, *, confidence: float = 0.95
) -> Interval:
    """Mean of `values` with the percentile interval of the cluster bootstrap.

    `values` and `groups` have shape (rows,); a draw takes as many groups as there are, with replacement, and the
    mean of all their rows. Groups are put in sorted order first: the order of the rows does not matter.
    Raises ValueError on NaN (drop or count unread rows first) and on unequal lengths.
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
    if len(sizes) < 2:
        return Interval(mean, None, None, len(numbers), len(sizes))
    means = [sums[block].sum(axis=1) / sizes[block].sum(axis=1) for block in picks(len(sizes), draws, seed)]
    low, high = percentiles(np.concatenate(means), confidence, least=1)
    return Interval(mean, float(low), float(high), len(numbers), len(sizes))


def bootstrap_gain(
    base_values: ArrayLike,
    base_prompts: ArrayLike,
    policy_values: ArrayLike,
    policy_prompts: ArrayLike,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over prompts of (policy's mean − base's mean on that prompt), over the prompts that both answered.

    Pairing by prompt removes the difficulty of the prompts from the interval.
    """
    base, policy = _mean_by_group(base_values, base_prompts), _mean_by_group(policy_values, policy_prompts)
    shared = sorted(base.keys() & policy.keys())
    return bootstrap_mean([policy[p] - base[p] for p in shared], shared, draws, seed)


def _mean_by_group(values: ArrayLike, groups: ArrayLike) -> dict[str, float]:
    names, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(group_of_row, weights=np.asarray(values, dtype=np.float64), minlength=len(names))
    sizes = np.bincount(group_of_row, minlength=len(names))
    return dict(zip(names.tolist(), (sums / sizes).tolist(), strict=True))
