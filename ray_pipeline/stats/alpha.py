"""Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability")."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def krippendorff_alpha(scores: ArrayLike) -> float | None:
    """Alpha of scores (interval level).

    `scores` has shape (judges, rows), NaN where unread; a row counts when at least two judges scored it. None where
    alpha is undefined: no such row, or all values of such rows equal (expected disagreement 0).
    Memory is rows × distinct values, so scores should be on a short scale such as 1 to 10.
    """
    ratings = np.asarray(scores, dtype=np.float64)
    if ratings.ndim != 2:
        raise ValueError(f"scores must have shape (judges, rows), got {ratings.shape}")
    pairable = ratings[:, (~np.isnan(ratings)).sum(axis=0) >= 2]
    if len(np.unique(pairable[~np.isnan(pairable)])) < 2:
        return None
    import krippendorff

    return float(krippendorff.alpha(reliability_data=pairable, level_of_measurement="interval"))


def nominal_alpha(agreeing: ArrayLike, values: ArrayLike) -> NDArray[np.float64]:
    """Alpha of nominal values, from sums over units; NaN where it is 0/0.

        alpha = 1 − (n − 1)·(n − agreeing) / (n² − Σ values²),  n = Σ values

    Args:
        agreeing: Σ over units of Σ_v c_v·(c_v − 1) / (m − 1), c_v of its m ≥ 2 ratings having value v; shape (…).
        values: ratings of such units by value, shape (values, …).
    """
    by_value = np.asarray(values, dtype=np.float64)
    n = by_value.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        alpha = 1 - (n - 1) * (n - agreeing) / (n**2 - (by_value**2).sum(axis=0))
    return np.where(np.isfinite(alpha), alpha, np.nan)
