"""The confidence gate as a classifier of pairs: what share it keeps, and how often what it keeps is right.

The gate scores single answers; humans label pairs. Of both answers of a pair take mean m and sample variance v of the
judges' scores. A pair is kept when no answer's judges disagree (both v ≤ τ) and the gate's thresholds tell the answers
apart: the higher m ≥ desirable_at and the lower m ≤ undesirable_at. Its vote is the answer of the higher m, or a tie.
Without thresholds only the variance decides, which is the gate's part that τ rules. There is no critic here: labelled
pairs have none, and m is the gate's final score without it.

Coverage is the share of the labelled pairs that is kept; agreement the share of those whose vote is the human label,
and risk one minus that (Geifman & El-Yaniv 2017, "Selective Classification for Deep Neural Networks", §2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from ray_pipeline.stats.bootstrap import Floats, ratio, resample

#: (desirable_at, undesirable_at); None keeps whatever the variance keeps.
Thresholds = tuple[float, float] | None

_LABELS = {"A": 1.0, "tie": 0.0, "B": -1.0}
#: Means whose distance is under this are equal: a mean of thirds is not exact in binary.
_EQUAL = 1e-9

#: One row a setting of the gate. The bounds of the agreement are by bootstrap over questions.
CURVE = pa.schema(
    [
        pa.field("tau", pa.float64(), nullable=False),
        pa.field("desirable_at", pa.float64()),
        pa.field("undesirable_at", pa.float64()),
        pa.field("pairs", pa.int32(), nullable=False),
        pa.field("incomplete", pa.int32(), nullable=False),
        pa.field("kept", pa.int32(), nullable=False),
        pa.field("coverage", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("agreement_low", pa.float64()),
        pa.field("agreement_high", pa.float64()),
        pa.field("risk", pa.float64()),
        pa.field("kept_without_ties", pa.int32(), nullable=False),
        pa.field("agreement_without_ties", pa.float64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class RiskCoverage:
    """The curve (schema `CURVE`), and for each pair of thresholds the area under risk over coverage: the mean risk over
    the pairs ordered from the least to the greatest variance (None where no pair can be kept)."""

    table: pa.Table
    areas: dict[Thresholds, float | None]


def risk_coverage(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    labels: Sequence[str | None],
    taus: Sequence[float],
    thresholds: Sequence[Thresholds] = (None,),
    questions: Sequence[str] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> RiskCoverage:
    """The risk–coverage curve of the gate on labelled pairs.

    Args:
        scores_a, scores_b: of the judges on both answers, shape (judges, pairs), NaN where unread. A pair with an
            unread score is incomplete: never kept, and counted in the coverage's denominator.
        labels: of humans, "A", "B" or "tie"; pairs without a label (None) are left out.
        taus: largest variances at which the judges count as agreeing; `inf` keeps all that is complete.
        questions: question of each pair, whose pairs are resampled together; without it each pair has its own.

    Raises:
        ValueError: shapes differ, fewer than two judges, an unknown label, or thresholds in the wrong order.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or a.shape[1] != len(labels):
        raise ValueError(f"scores of shapes {a.shape} and {b.shape} do not go with {len(labels)} labels")
    if len(a) < 2:
        raise ValueError("one judge alone has no variance: the gate's confidence needs two or more")
    if unknown := sorted({str(label) for label in labels if label is not None and label not in _LABELS}):
        raise ValueError(f"a label is A, B or tie, not {', '.join(unknown)}")
    for pair in thresholds:
        if pair is not None and pair[1] >= pair[0]:
            raise ValueError(f"undesirable_at ({pair[1]:g}) must be below desirable_at ({pair[0]:g})")
    labelled = np.array([label is not None for label in labels], dtype=bool)
    truth = np.array([_LABELS[label] for label in labels if label is not None], dtype=np.float64)
    a, b = a[:, labelled], b[:, labelled]
    complete = ~np.isnan(a).any(axis=0) & ~np.isnan(b).any(axis=0)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    variance = np.maximum(a.var(axis=0, ddof=1), b.var(axis=0, ddof=1))
    vote = np.where(np.abs(mean_a - mean_b) < _EQUAL, 0.0, np.sign(mean_a - mean_b))
    right = (vote == truth) & complete
    decided = (vote != 0) & (truth != 0)
    clusters = np.arange(len(labels)) if questions is None else np.asarray(questions)
    samples = resample(clusters[labelled], draws, seed, confidence)

    rows: list[dict[str, Any]] = []
    areas: dict[Thresholds, float | None] = {}
    for pair in thresholds:
        told_apart = complete.copy()
        if pair is not None:
            with np.errstate(invalid="ignore"):
                told_apart &= (np.maximum(mean_a, mean_b) >= pair[0]) & (np.minimum(mean_a, mean_b) <= pair[1])
        areas[pair] = _area(variance[told_apart], right[told_apart])
        for tau in taus:
            with np.errstate(invalid="ignore"):
                # Sample variances of integer scores are not exact in binary, and v = τ is kept.
                kept = told_apart & (variance <= tau + _EQUAL)
            count, plain = int(kept.sum()), kept & decided
            interval = ratio((kept & right).astype(float), kept.astype(float), samples)
            agreement = float(right[kept].mean()) if count else None
            rows.append(
                {
                    "tau": float(tau),
                    "desirable_at": None if pair is None else float(pair[0]),
                    "undesirable_at": None if pair is None else float(pair[1]),
                    "pairs": len(truth),
                    "incomplete": int((~complete).sum()),
                    "kept": count,
                    "coverage": count / len(truth) if len(truth) else None,
                    "agreement": agreement,
                    "agreement_low": interval.low,
                    "agreement_high": interval.high,
                    "risk": None if agreement is None else 1 - agreement,
                    "kept_without_ties": int(plain.sum()),
                    "agreement_without_ties": float(right[plain].mean()) if plain.any() else None,
                }
            )
    return RiskCoverage(pa.Table.from_pylist(rows, schema=CURVE), areas)


def _area(variance: Floats, right: NDArray[Any]) -> float | None:
    """Mean over k of the risk among the k pairs of least variance; pairs of equal variance share their mean risk."""
    if len(variance) == 0:
        return None
    _, group = np.unique(variance.round(9), return_inverse=True)
    wrong_share = np.bincount(group, weights=1.0 - right) / np.bincount(group)
    in_order = wrong_share[np.sort(group)]
    return float((np.cumsum(in_order) / np.arange(1, len(in_order) + 1)).mean())
