"""How sure the judges are of a training row: weights of rows in a loss, and the order in which prompts are kept.

Every judge is a source with a probability of its own, and independent sources are joined by Bayes' rule,

    P = ∏ p_j / (∏ p_j + ∏ (1 − p_j)),

as BeeS joins its margins (Deng et al. 2025, arXiv:2502.14560). p_j is linear in the judge's score and clipped. The
probabilities are those of the scores alone: a label that came about otherwise does not change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from ray_pipeline.data.early_exit import Scale
from ray_pipeline.data.gate import Floats, read_scores
from ray_pipeline.data.rows import one_array
from ray_pipeline.store.schemas import CONFIDENCE

#: The most that a single judge is trusted.
_SUREST = 0.95


def panel_confidence(candidates: pa.Table, verdicts: pa.Table, judges: Sequence[str], scale: Scale) -> pa.Table:
    """P that a candidate is desirable, by the scores that were read; 0.5 where none was.

    Args:
        candidates: columns candidate_id and prompt_id.
        verdicts: columns candidate_id, judge, score, parse_status, of these candidates.
        scale: lowest and highest score, at which a judge's own probability would be 0 and 1.

    Returns:
        A table of schema CONFIDENCE in the order of `candidates`.
    """
    ids = one_array(candidates["candidate_id"])
    scores, read = read_scores(verdicts, ids, list(judges))
    low, high = scale
    own = np.clip((scores - low) / (high - low), 1 - _SUREST, _SUREST)
    log_odds = np.where(read, np.log(own / (1 - own)), 0.0).sum(axis=1)
    columns = [ids, one_array(candidates["prompt_id"]), pa.array(1 / (1 + np.exp(-log_odds)))]
    return pa.table(columns, schema=CONFIDENCE)


def row_weights(rows: pa.Table, desirable: Mapping[str, float]) -> Floats:
    """P that the label of each row is right, shape (rows,).

    Of a pair it is P that the chosen response is the better one, given that one of the two is desirable and the other
    is not.

    Args:
        rows: columns candidate_id and label (kto), or chosen_id and rejected_id (dpo).
        desirable: candidate_id → P that it is desirable.
    """
    if "label" in rows.column_names:
        own = _of(rows["candidate_id"].to_pylist(), desirable)
        return np.where(np.asarray(one_array(rows["label"]), dtype=bool), own, 1 - own)
    chosen, rejected = (_of(rows[name].to_pylist(), desirable) for name in ("chosen_id", "rejected_id"))
    as_labelled, opposite = chosen * (1 - rejected), (1 - chosen) * rejected
    weights: Floats = as_labelled / (as_labelled + opposite)
    return weights


def _of(ids: Iterable[str], desirable: Mapping[str, float]) -> Floats:
    return np.array([desirable[one] for one in ids], dtype=np.float64)
