"""How far judges agree with each other: Cohen's kappa over score classes, Krippendorff's alpha over scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import krippendorff
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import cohen_kappa_score

UNDESIRABLE, BETWEEN, DESIRABLE = -1, 0, 1
SCORE_CLASSES = (UNDESIRABLE, BETWEEN, DESIRABLE)


@dataclass(frozen=True)
class Kappa:
    """One kappa. `value` is None exactly when it is undefined; `reason` then says why in words."""

    value: float | None
    rows: int
    reason: str | None = None


@dataclass(frozen=True)
class PairKappa:
    """The kappa of two judges over the rows that both judged."""

    judge_a: str
    judge_b: str
    value: float | None
    rows: int
    reason: str | None = None


def score_class(scores: ArrayLike, *, desirable_from: float = 7.0, undesirable_to: float = 4.0) -> NDArray[np.int8]:
    """Class of each score: DESIRABLE (score ≥ desirable_from), UNDESIRABLE (score ≤ undesirable_to), else BETWEEN.

    `scores` has any shape and the result has the same. Raises ValueError on NaN: an unread score has no class
    (calling it "between" would be a guess), so the caller drops those rows first.
    """
    if undesirable_to >= desirable_from:
        raise ValueError(f"undesirable_to ({undesirable_to}) must lie below desirable_from ({desirable_from})")
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("scores holds NaN: an unread score has no class; drop those rows first")
    classes = np.full(values.shape, BETWEEN, dtype=np.int8)
    classes[values >= desirable_from] = DESIRABLE
    classes[values <= undesirable_to] = UNDESIRABLE
    return classes


def cohen_kappa(a: Sequence[Any] | NDArray[Any], b: Sequence[Any] | NDArray[Any], labels: Sequence[Any]) -> Kappa:
    """Unweighted Cohen's kappa of two raters over nominal `labels` (Cohen 1960, eq. 1).

    `a` and `b` hold one label per row, both of shape (rows,). Undefined (0/0, value None) when there is no row, and
    when both raters gave one and the same label to every row: chance agreement is then 1. Raises ValueError
    when the lengths differ or a label is not in `labels` (scikit-learn would drop such rows in silence).
    """
    first, second = np.asarray(a), np.asarray(b)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"two raters of the same rows are needed, got shapes {first.shape} and {second.shape}")
    rows = len(first)
    if rows == 0:
        return Kappa(None, 0, "no row was judged by both")
    used = set(first.tolist()) | set(second.tolist())
    if strangers := used - set(labels):
        raise ValueError(f"labels outside {list(labels)}: {sorted(map(str, strangers))}")
    if len(used) == 1:
        return Kappa(None, rows, f"both gave the one class {used.pop()} to every row")
    return Kappa(float(cohen_kappa_score(first, second, labels=list(labels))), rows)


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
            raise ValueError(f"{judge_a} has {len(a)} rows, {judge_b} has {len(b)}: both need the same candidates")
        both = ~np.isnan(a) & ~np.isnan(b)
        classes_a, classes_b = (
            score_class(x[both], desirable_from=desirable_from, undesirable_to=undesirable_to) for x in (a, b)
        )
        kappa = cohen_kappa(classes_a, classes_b, SCORE_CLASSES)
        kappas.append(PairKappa(judge_a, judge_b, kappa.value, kappa.rows, kappa.reason))
    return kappas


def krippendorff_alpha(scores: ArrayLike) -> float | None:
    """Krippendorff's alpha, interval level (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    `scores` has shape (judges, rows), NaN where unread; a row counts when at least two judges read it. None where
    alpha is undefined: no such row, or all values of such rows equal (expected disagreement 0).
    Memory is rows × distinct values, so scores should be on a short scale such as 1 to 10.
    """
    ratings = np.asarray(scores, dtype=np.float64)
    if ratings.ndim != 2:
        raise ValueError(f"scores must have shape (judges, rows), got {ratings.shape}")
    pairable = ratings[:, (~np.isnan(ratings)).sum(axis=0) >= 2]
    if len(np.unique(pairable[~np.isnan(pairable)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=pairable, level_of_measurement="interval"))
