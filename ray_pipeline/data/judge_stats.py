"""How each judge scored, and how far the judges agree."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.agents.verdicts import unread_reasons
from ray_pipeline.stats.alpha import krippendorff_alpha
from ray_pipeline.stats.columns import Spread, chunk, count_values, numbers, refuse_repeats, spread
from ray_pipeline.stats.kappa import PairKappa, pairwise_kappas


@dataclass(frozen=True)
class JudgeStats:
    """One judge's verdicts.

    `unread` counts null scores other than skipped ones; `missing` counts candidates without any verdict row
    of this judge; `unread_by` counts unparsed replies by why, where the table has a column `reason`;
    `histogram` has the score, rounded half up to a whole number, as key.
    """

    rows: int
    read: int
    unread: int
    skipped: int
    missing: int
    score: Spread
    histogram: dict[int, int]
    parse_status: dict[str, int]
    unread_by: dict[str, int]


@dataclass(frozen=True)
class JudgingStats:
    """All judges. `judged` candidates have every judge's score; `agreement_rows` have at least two of the slice."""

    candidates: int
    judged: int
    judges: dict[str, JudgeStats]
    kappas: list[PairKappa]
    alpha: float | None
    agreement_rows: int


def judging_stats(
    verdicts: pa.Table,
    candidate_ids: pa.ChunkedArray | pa.Array,
    *,
    desirable_from: float = 7.0,
    undesirable_to: float = 4.0,
    agreement_on: Collection[str] | None = None,
) -> JudgingStats:
    """Scores, statuses and agreement of the judges over `candidate_ids` (each once).

    Columns read of `verdicts`: candidate_id, judge, score (null when unread), parse_status; joined by id.
    `agreement_on` limits kappa and alpha to these candidates: the audit slice when early exit is on, since skipping
    makes the other scores a selected sample. Raises ValueError for a repeated candidate or verdict.
    """
    ids = chunk(candidate_ids)
    refuse_repeats(ids, "candidates")
    scores = scores_by_judge(verdicts, ids)
    in_slice = np.ones(len(ids), dtype=bool)
    if agreement_on is not None:
        in_slice = np.asarray(pc.is_in(ids, value_set=pa.array(sorted(agreement_on), ids.type)))
    sliced = {judge: column[in_slice] for judge, column in scores.items()}
    by_judge = np.stack(list(scores.values())) if scores else np.full((1, len(ids)), np.nan)
    read = ~np.isnan(by_judge)
    return JudgingStats(
        candidates=len(ids),
        judged=int(read.all(axis=0).sum()),
        judges={judge: _judge_stats(verdicts, judge, ids) for judge in scores},
        kappas=pairwise_kappas(sliced, desirable_from=desirable_from, undesirable_to=undesirable_to),
        alpha=krippendorff_alpha(by_judge[:, in_slice]),
        agreement_rows=int((read[:, in_slice].sum(axis=0) >= 2).sum()),
    )


def scores_by_judge(verdicts: pa.Table, ids: pa.Array) -> dict[str, NDArray[np.float64]]:
    """Each judge's scores in the order of `ids`, NaN where unread or absent."""
    scores: dict[str, NDArray[np.float64]] = {}
    for judge in sorted(verdicts.column("judge").unique().to_pylist()):
        own = verdicts.filter(pc.equal(verdicts.column("judge"), judge))
        keys = chunk(own.column("candidate_id"))
        refuse_repeats(keys, f"verdicts of judge {judge}")
        scores[judge] = numbers(own.column("score").take(pc.index_in(ids, value_set=keys)))
    return scores


def _judge_stats(verdicts: pa.Table, judge: str, ids: pa.Array) -> JudgeStats:
    own = verdicts.filter(pc.equal(verdicts.column("judge"), judge))
    scores = numbers(own.column("score"))
    null = np.isnan(scores)
    skipped = np.asarray([status == "skipped" for status in own.column("parse_status").to_pylist()], dtype=bool)
    rounded, counts = np.unique(np.floor(scores[~null] + 0.5).astype(int), return_counts=True)
    found = pc.is_in(ids, value_set=chunk(own.column("candidate_id")))
    return JudgeStats(
        rows=len(own),
        read=int((~null).sum()),
        unread=int((null & ~skipped).sum()),
        skipped=int((null & skipped).sum()),
        missing=len(ids) - int(np.asarray(found).sum()),
        score=spread(scores),
        histogram=dict(zip(rounded.tolist(), counts.tolist(), strict=True)),
        parse_status=count_values(own.column("parse_status")),
        unread_by=_unread_by(own),
    )


def _unread_by(verdicts: pa.Table) -> dict[str, int]:
    if "reason" not in verdicts.column_names:
        return {}
    unparsed = verdicts.filter(pc.equal(verdicts.column("parse_status"), "unparsed"))
    return unread_reasons(unparsed.column("reason").to_pylist())
