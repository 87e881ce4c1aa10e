"""Histograms of final scores and answer lengths by label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.stats.columns import chunk, numbers, response_chars
from ray_pipeline.store.schemas import LABELS

#: The last bin of a length histogram ends here; longer answers are counted in it.
_LONGEST_SHOWN = 0.99
_BINS = 24


@dataclass(frozen=True)
class Histogram:
    """`edges` has one more number than every list of `counts` (by label; labels without rows are left out)."""

    edges: list[float]
    counts: dict[str, list[int]]


def score_histogram(decisions: pa.Table) -> Histogram | None:
    """Final scores in steps of half a point; None when no row has one."""
    scores = numbers(decisions.column("final_score"))
    known = scores[~np.isnan(scores)]
    if not len(known):
        return None
    low, high = np.floor(known.min() * 2) / 2, np.floor(known.max() * 2) / 2 + 0.5
    edges = np.linspace(low, high, min(200, round((high - low) * 2)) + 1)
    return _count(scores, _labels(decisions), edges)


def length_histogram(decisions: pa.Table, candidates: pa.Table, measure: str) -> Histogram | None:
    """Lengths of the answers, in tokens or characters (`measure`). Joined by candidate_id; None when none is known."""
    lengths = response_chars(candidates) if measure == "characters" else numbers(candidates.column("completion_tokens"))
    place = pc.index_in(chunk(decisions.column("candidate_id")), value_set=chunk(candidates.column("candidate_id")))
    found = np.asarray(numbers(pa.array(lengths).take(place)))
    known = found[~np.isnan(found)]
    if not len(known):
        return None
    top = max(float(np.quantile(known, _LONGEST_SHOWN)), 1.0)
    step = max(1.0, float(np.ceil(top / _BINS)))
    edges = np.arange(0.0, top + step, step)
    edges = np.append(edges, edges[-1] + step) if edges[-1] <= top else edges
    return _count(np.minimum(found, edges[-1] - 1e-9), _labels(decisions), edges)


def _labels(decisions: pa.Table) -> NDArray[Any]:
    return np.asarray(decisions.column("label").to_pylist(), dtype=object)


def _count(values: NDArray[np.float64], labels: NDArray[Any], edges: NDArray[Any]) -> Histogram:
    counts = {}
    for label in LABELS:
        own = values[labels == label]
        own = own[~np.isnan(own)]
        if len(own):
            counts[label] = np.histogram(own, edges)[0].tolist()
    return Histogram(edges.tolist(), counts)
