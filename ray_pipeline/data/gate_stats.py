"""What the gate did with the candidates."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.stats.columns import Spread, chunk, numbers, refuse_repeats, response_chars, spread
from ray_pipeline.store.schemas import LABELS


@dataclass(frozen=True)
class LabelStats:
    """One label: its rows, their share of all rows, and how long their responses are."""

    count: int
    share: float | None
    chars: Spread
    tokens: Spread


@dataclass(frozen=True)
class GateStats:
    """One gate run. acceptance = (desirable + undesirable) / rows; gap is between the two means of final_score."""

    rows: int
    acceptance: float | None
    labels: dict[str, LabelStats]
    desirable: Spread
    undesirable: Spread
    gap: float | None
    score_variance: Spread


def gate_stats(decisions: pa.Table, candidates: pa.Table) -> GateStats:
    """Label distribution, final scores of the two kept labels, and response lengths per label.

    Columns read: decisions candidate_id, label, final_score, score_variance; candidates candidate_id,
    completion_tokens and response (or response_chars). Joined by candidate_id, never by position.
    Raises ValueError for a repeated id, an unknown label, and a decision whose candidate is missing.
    """
    place = _rows_of_candidates(decisions, candidates)
    chars, tokens = response_chars(candidates)[place], numbers(candidates.column("completion_tokens"))[place]
    labels = np.asarray(decisions.column("label").to_pylist(), dtype=object)
    if strangers := set(labels.tolist()) - set(LABELS):
        raise ValueError(f"decisions: labels outside {list(LABELS)}: {sorted(map(str, strangers))}")
    final = numbers(decisions.column("final_score"))
    rows = len(decisions)
    desirable, undesirable = (spread(final[labels == label]) for label in ("desirable", "undesirable"))
    counts = {label: int((labels == label).sum()) for label in LABELS}
    return GateStats(
        rows=rows,
        acceptance=(counts["desirable"] + counts["undesirable"]) / rows if rows else None,
        labels={
            label: LabelStats(
                count=counts[label],
                share=counts[label] / rows if rows else None,
                chars=spread(chars[labels == label]),
                tokens=spread(tokens[labels == label]),
            )
            for label in LABELS
        },
        desirable=desirable,
        undesirable=undesirable,
        gap=_gap(desirable, undesirable),
        score_variance=spread(numbers(decisions.column("score_variance"))),
    )


def _gap(desirable: Spread, undesirable: Spread) -> float | None:
    if desirable.mean is None or undesirable.mean is None:
        return None
    return desirable.mean - undesirable.mean


def _rows_of_candidates(decisions: pa.Table, candidates: pa.Table) -> NDArray[np.int64]:
    """Row number in `candidates` of each decision."""
    ids = chunk(decisions.column("candidate_id"))
    known = chunk(candidates.column("candidate_id"))
    refuse_repeats(ids, "decisions")
    refuse_repeats(known, "candidates")
    place = pc.index_in(ids, value_set=known)
    if place.null_count:
        lost = ids.filter(pc.is_null(place))[0].as_py()
        raise ValueError(f"decisions: {place.null_count} candidates are not in candidates, such as {lost}")
    return np.asarray(place, dtype=np.int64)
