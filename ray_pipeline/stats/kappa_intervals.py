"""Intervals of the judges' pairwise kappas: a bootstrap over prompts, since rows of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.stats.kappa import score_class

#: Cells of one block of resampling weights: 4 M float32 are 16 MB.
_CELLS_PER_BLOCK = 4_000_000


@dataclass(frozen=True)
class KappaInterval:
    """Percentile interval of one pair's kappa; None with fewer than two prompts, or where hardly a draw defines it."""

    judge_a: str
    judge_b: str
    low: float | None
    high: float | None
    prompts: int


def kappa_intervals(
    scores_by_judge: Mapping[str, NDArray[np.float64]],
    prompts: NDArray[np.str_],
    *,
    desirable_from: float = 7.0,
    undesirable_to: float = 4.0,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[KappaInterval]:
    """For every pair of judges, in the order of `agreement.pairwise_kappas`.

    Arrays have shape (rows,), NaN where unread; `prompts` names the prompt of each row. A draw takes as many prompts
    as there are, with replacement, with all rows of each (Efron & Tibshirani 1993, §13.3); all pairs share the draws.
    A draw in which kappa is 0/0 is left out; when more than half are, there is no interval.
    """
    pairs = list(combinations(sorted(scores_by_judge), 2))
    names, group = np.unique(prompts, return_inverse=True)
    if not pairs or len(names) < 2:
        return [KappaInterval(a, b, None, None, len(names)) for a, b in pairs]
    tables = np.concatenate(
        [
            _class_tables(scores_by_judge[a], scores_by_judge[b], group, len(names), desirable_from, undesirable_to)
            for a, b in pairs
        ],
        axis=1,
    )
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS_PER_BLOCK // len(names))
    drawn = []
    for start in range(0, draws, block):
        size = min(block, draws - start)
        picks = rng.integers(0, len(names), size=(size, len(names)))
        # One count over all draws of the block: draw d counts in the cells from d · prompts on.
        offset = picks + len(names) * np.arange(size)[:, None]
        weights = np.bincount(offset.ravel(), minlength=size * len(names)).reshape(size, len(names))
        drawn.append(weights.astype(np.float32) @ tables)
    kappas = _kappas(np.concatenate(drawn).reshape(draws, len(pairs), 3, 3))
    tail = (1 - confidence) / 2
    found = []
    for place, (a, b) in enumerate(pairs):
        known = kappas[:, place][~np.isnan(kappas[:, place])]
        low, high = np.quantile(known, [tail, 1 - tail]).tolist() if len(known) > draws / 2 else (None, None)
        found.append(KappaInterval(a, b, low, high, len(names)))
    return found


def _class_tables(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    group: NDArray[np.int64],
    groups: int,
    desirable_from: float,
    undesirable_to: float,
) -> NDArray[np.float32]:
    """How often each pair of classes occurs by prompt, shape (groups, 9), over the rows that both judges read."""
    both = ~np.isnan(a) & ~np.isnan(b)
    one, other = (
        score_class(x[both], desirable_from=desirable_from, undesirable_to=undesirable_to).astype(np.int64) + 1
        for x in (a, b)
    )
    cells = np.bincount(group[both] * 9 + one * 3 + other, minlength=groups * 9)
    return cells.reshape(groups, 9).astype(np.float32)


def _kappas(tables: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cohen's kappa (1960, eq. 1) of tables of shape (…, 3, 3); NaN where it is undefined."""
    counts = tables.astype(np.float64)
    total = counts.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = np.trace(counts, axis1=-2, axis2=-1) / total
        expected = (counts.sum(axis=-1) * counts.sum(axis=-2)).sum(axis=-1) / total**2
        found: NDArray[np.float64] = (observed - expected) / (1 - expected)
    found[~np.isfinite(found)] = np.nan
    return found
