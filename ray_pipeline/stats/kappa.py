"""Cohen's kappa (Cohen 1960, weighted: Cohen 1968) of tables, of two raters, and of judges over score classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ray_pipeline.stats.bootstrap import Floats, count_blocks, number, percentiles

UNDESIRABLE, BETWEEN, DESIRABLE = -1, 0, 1
SCORE_CLASSES = (UNDESIRABLE, BETWEEN, DESIRABLE)


Weighting = Literal["nominal", "linear", "quadratic"]


@dataclass(frozen=True)
class Kappa:
    """One kappa. `value` is None exactly when it is undefined; `reason` then explains why."""

    value: float | None
    rows: int
    reason: str | None = None


@dataclass(frozen=True)
class JudgePair:
    """Two judges, by name."""

    judge_a: str
    judge_b: str


@dataclass(frozen=True)
class PairKappa(Kappa, JudgePair):
    """The kappa of two judges over the rows that both judged."""


@dataclass(frozen=True)
class KappaInterval(JudgePair):
    """Percentile interval of one pair's kappa; None if it never varies, or if most samples leave it 0/0."""

    low: float | None
    high: float | None
    prompts: int


def kappa_of_tables(counts: Floats, weighting: Weighting = "nominal") -> Floats:
    """Kappa of tables of counts, shape (…, k, k), rows one rater's classes and columns the other's; NaN where 0/0.

        kappa = 1 − Σ w·observed / Σ w·expected

    with w = 1 for unequal classes (Cohen 1960, eq. 1), or |i − j| or (i − j)² (Cohen 1968).
    """
    places = np.arange(counts.shape[-1])
    distance = np.abs(np.subtract.outer(places, places)).astype(np.float64)
    weight = {"nominal": (distance > 0).astype(np.float64), "linear": distance, "quadratic": distance**2}[weighting]
    total = counts.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (counts * weight).sum(axis=(-2, -1)) / total
        chance = np.einsum("...i,ij,...j->...", counts.sum(axis=-1), weight, counts.sum(axis=-2)) / total**2
        kappa = 1 - observed / chance
    return np.where(np.isfinite(kappa), kappa, np.nan)


def score_class(scores: ArrayLike, *, desirable_from: float = 7.0, undesirable_to: float = 4.0) -> NDArray[np.int8]:
    """Class of each score: DESIRABLE (score ≥ desirable_from), UNDESIRABLE (score ≤ undesirable_to), else BETWEEN.

    `scores` has any shape and the result has the same. Raises ValueError on NaN: an unread score has no class
    ("between" would be a guess), so the caller drops those rows first.
    """
    if undesirable_to >= desirable_from:
        raise ValueError(f"undesirable_to ({undesirable_to}) must be less than desirable_from ({desirable_from})")
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("scores contains NaN, and an unread score has no class; drop those rows first")
    classes = np.full(values.shape, BETWEEN, dtype=np.int8)
    classes[values >= desirable_from] = DESIRABLE
    classes[values <= undesirable_to] = UNDESIRABLE
    return classes


def cohen_kappa(a: Sequence[Any] | NDArray[Any], b: Sequence[Any] | NDArray[Any], labels: Sequence[Any]) -> Kappa:
    """Unweighted kappa of two raters over nominal `labels`.

    `a` and `b` hold one label per row, both of shape (rows,). Undefined (0/0, value None) without rows, and when both
    raters gave the same one label to every row: chance agreement is then 1. Raises ValueError
    when the lengths differ or a label is not in `labels`.
    """
    first, second = np.asarray(a), np.asarray(b)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"both raters must have the same shape (rows,), got {first.shape} and {second.shape}")
    rows = len(first)
    if rows == 0:
        return Kappa(None, 0, "no row was judged by both")
    used = set(first.tolist()) | set(second.tolist())
    if strangers := used - set(labels):
        raise ValueError(f"unknown labels {sorted(map(str, strangers))}; choose from {list(labels)}")
    if len(used) == 1:
        return Kappa(None, rows, f"both gave the one class {used.pop()} to every row")
    codes = np.unique(np.concatenate([first, second]), return_inverse=True)[1]
    table = np.bincount(codes[:rows] * len(used) + codes[rows:], minlength=len(used) ** 2)
    return Kappa(float(kappa_of_tables(table.reshape(len(used), -1).astype(np.float64))), rows)


def pairwise_kappas(
    scores_by_judge: Mapping[str, NDArray[np.float64]], *, desirable_from: float = 7.0, undesirable_to: float = 4.0
) -> list[PairKappa]:
    """Kappa over the three score classes for every pair of judges, each over the rows both of them judged.

    Every array has shape (rows,), row i of all judges being the same candidate, NaN where unread.
    Pairs come in the order of sorted judge names.
    """
    kappas = []
    for judge_a, judge_b in combinations(sorted(scores_by_judge), 2):
        a, b = (np.asarray(scores_by_judge[judge], dtype=np.float64) for judge in (judge_a, judge_b))
        if a.shape != b.shape:
            raise ValueError(f"{judge_a} has {len(a)} rows but {judge_b} has {len(b)}; both need the same candidates")
        both = ~np.isnan(a) & ~np.isnan(b)
        classes_a, classes_b = (
            score_class(x[both], desirable_from=desirable_from, undesirable_to=undesirable_to) for x in (a, b)
        )
        kappa = cohen_kappa(classes_a, classes_b, SCORE_CLASSES)
        kappas.append(PairKappa(judge_a, judge_b, **vars(kappa)))
    return kappas


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
    """The interval of every pair of judges, in the order of `pairwise_kappas`.

    Arrays have shape (rows,), NaN where unread; `prompts` has the prompt of each row. All pairs share the samples.
    Samples in which kappa is 0/0 are left out; if half or more are, there is no interval.
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
    drawn = np.concatenate([counts @ tables for counts in count_blocks(len(names), draws, seed)])
    kappas, estimates = (
        kappa_of_tables(counts.astype(np.float64).reshape(-1, len(pairs), 3, 3))
        for counts in (drawn, tables.sum(axis=0))
    )
    bounds = percentiles(kappas.T, estimates[0], confidence, least=draws // 2 + 1).T
    return [
        KappaInterval(a, b, number(low), number(high), len(names))
        for (a, b), (low, high) in zip(pairs, bounds, strict=True)
    ]


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
