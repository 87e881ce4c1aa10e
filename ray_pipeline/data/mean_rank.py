"""Candidates of each prompt ranked by mean score, the basis of every choice without thresholds."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_pipeline.data.gate import Cut, cut_reasons, cut_text, mean_and_variance, read_scores, with_nulls
from ray_pipeline.data.rows import one_array, refuse_repeats
from ray_pipeline.store.schemas import DECISIONS


@dataclasses.dataclass(frozen=True)
class MeanRank:
    """Candidates in the order of their table.

    Attributes:
        ids, prompts: candidate_id and prompt_id.
        scores: shape (candidates, judges), NaN where unread.
        mean, variance: of the judges' scores; NaN where one was not read.
        complete: all scores were read, and the candidate is not left out because it was cut off.
        cut: finish reason of candidates that were cut off, so that they are never the best; "" for others.
        of_prompt: prompt_id → places of its complete candidates, ascending.
    """

    ids: pa.Array
    prompts: pa.Array
    scores: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    complete: NDArray[np.bool_]
    cut: NDArray[np.object_]
    of_prompt: dict[str, list[int]]

    def texts(self, complete: str, incomplete: str) -> NDArray[np.object_]:
        """An initial column: one text for complete candidates, another for the others."""
        return np.where(self.complete, complete, incomplete).astype(object)

    def why(self, complete: str) -> NDArray[np.object_]:
        """An initial column `why`: a text for complete candidates, and what the others lack."""
        lacking = [cut_text(reason) if reason else "a score was not read" for reason in self.cut]
        return np.where(self.complete, complete, np.asarray(lacking, dtype=object)).astype(object)

    def whole(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows that can be the best."""
        return [row for row in rows if not self.cut[row]]

    def decisions(
        self, label: NDArray[np.object_], why: NDArray[np.object_], final: NDArray[np.float64] | None = None
    ) -> pa.Table:
        """A table of schema DECISIONS: there is no penalty, and the final score defaults to the mean."""
        columns = {
            "candidate_id": self.ids,
            "prompt_id": self.prompts,
            "mean_score": with_nulls(self.mean),
            "score_variance": with_nulls(self.variance),
            "penalty": with_nulls(0.0 * self.mean),
            "final_score": with_nulls(self.mean if final is None else final),
            "label": pa.array(label.tolist(), pa.string()),
            "why": pa.array(why.tolist(), pa.string()),
        }
        return pa.table([columns[name] for name in DECISIONS.names], schema=DECISIONS)


def mean_rank(
    candidates: pa.Table, verdicts: pa.Table, judges: Sequence[str], needs: str, cut: Cut = "exclude"
) -> MeanRank:
    """Mean scores of all candidates.

    Args:
        needs: subject of the error message ("a selection needs").
        cut: rule for candidates whose text is not whole.

    Raises:
        KeyMismatch: as `gate.decide`.
        ValueError: there are no judges, or one occurs twice.
    """
    judges = list(judges)
    if not judges or len(set(judges)) < len(judges):
        raise ValueError(f"{needs} one or more judges, each named once, not {judges}")
    ids, prompts = one_array(candidates["candidate_id"]), one_array(candidates["prompt_id"])
    refuse_repeats(ids, "candidates: candidate_id")
    scores, read = read_scores(verdicts, ids, judges)
    reasons = np.full(len(ids), "", dtype=object) if cut == "keep" else cut_reasons(candidates)
    complete = np.asarray(read.all(axis=1)) & ((reasons == "") | (cut != "exclude"))
    names, of_prompt = prompts.to_pylist(), collections.defaultdict(list)
    for row in np.flatnonzero(complete):
        of_prompt[names[row]].append(int(row))
    return MeanRank(ids, prompts, scores, *mean_and_variance(scores), complete, reasons, dict(of_prompt))
