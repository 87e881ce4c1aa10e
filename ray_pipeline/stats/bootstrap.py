"""Seeded percentile bootstrap that resamples whole prompts, since rows of one prompt are not independent."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Cells of one block of resampling indices: 4 M int64 are 32 MB, whatever the number of prompts.
_CELLS_PER_BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval, in the unit of the values.

    `mean` is None without rows; `low` and `high` are None with fewer than two groups, since resampling
    one prompt always gives that prompt back and the interval would claim certainty.
    """

    mean: float | None
    low: float | None
    high: float | None
    rows: int = 0
    groups: int = 0


def bootstrap_mean(
    values: ArrayLike, groups: ArrayLike, draws: int = 2000, seed: int = 0, *, confidence: float = 0.95
) -> Interval:
    """Mean of `values` with the percentile interval of the cluster bootstrap (Efron & Tibshirani 1993, §13.3).

    `values` and `groups` have shape (rows,); a draw takes as many groups as there are, with replacement, and the
    mean of all their rows. Groups are put in sorted order first: the order of the rows does not matter.
    Raises ValueError on NaN (drop or count unread rows first) and on unequal lengths.
    """
    numbers, names = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if numbers.ndim != 1 or numbers.shape != names.shape:
        raise ValueError(f"one group per value is needed, got shapes {numbers.shape} and {names.shape}")
    if np.isnan(numbers).any():
        raise ValueError("values holds NaN: drop unread rows first and count them")
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
    means = _resampled_means(sums, sizes, draws, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
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

    Pairing by prompt takes the difficulty of the prompts out of the interval.
    """
    base, policy = _mean_by_group(base_values, base_prompts), _mean_by_group(policy_values, policy_prompts)
    shared = sorted(base.keys() & policy.keys())
    return bootstrap_mean([policy[p] - base[p] for p in shared], shared, draws, seed)


def _mean_by_group(values: ArrayLike, groups: ArrayLike) -> dict[str, float]:
    names, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(group_of_row, weights=np.asarray(values, dtype=np.float64), minlength=len(names))
    sizes = np.bincount(group_of_row, minlength=len(names))
    return dict(zip(names.tolist(), (sums / sizes).tolist(), strict=True))


def _resampled_means(sums: NDArray[np.float64], sizes: NDArray[np.int64], draws: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS_PER_BLOCK // len(sizes))
    means = []
    for start in range(0, draws, block):
        picks = rng.integers(0, len(sizes), size=(min(block, draws - start), len(sizes)))
        means.append(sums[picks].sum(axis=1) / sizes[picks].sum(axis=1))
    return np.concatenate(means)
