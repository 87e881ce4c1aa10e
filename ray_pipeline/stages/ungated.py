"""Preference data as it is usually made, without a gate: best and worst of k by the mean of some judges' scores.

It is what the gate is compared with. Its decisions have the schema of the gate's, so that the same code makes training
rows of both: the best candidate of a prompt is desirable, the worst undesirable, the others are discarded. Nobody
abstains, no flaw costs anything, no score has to reach anything; the two scores must only differ.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ray_pipeline.stages.gate import mean_and_variance, read_scores, with_nulls
from ray_pipeline.stages.rows import one_array, refuse_repeats
from ray_pipeline.store.schemas import DECISIONS


def best_and_worst(candidates: pa.Table, verdicts: pa.Table, judges: Sequence[str]) -> pa.Table:
    """One decision for each candidate, in the order of `candidates`; of equal scores the smaller candidate_id counts.

    Args:
        candidates: columns candidate_id and prompt_id are read; all candidates of each prompt.
        verdicts: columns candidate_id, judge, score, parse_status; rows of other judges are left out.
        judges: whose mean ranks the candidates; one name for a single judge.

    Returns:
        A table of schema DECISIONS. A candidate with an unread score is `incomplete` and never best or worst; all
        candidates of a prompt whose best and worst score are equal are discarded.

    Raises:
        KeyMismatch: as `gate.decide`.
        ValueError: there are no judges, or one is named twice.
    """
    judges = list(judges)
    if not judges or len(set(judges)) < len(judges):
        raise ValueError(f"best and worst need one or more judges, each named once, not {judges}")
    ids = one_array(candidates["candidate_id"])
    refuse_repeats(ids, "candidates: candidate_id")
    scores, read = read_scores(verdicts, ids, judges)
    mean, variance = mean_and_variance(scores)
    complete = np.asarray(read.all(axis=1))

    names, prompts = ids.to_pylist(), one_array(candidates["prompt_id"]).to_pylist()
    label = np.where(complete, "discard", "incomplete").astype(object)
    why = np.where(complete, "neither best nor worst", "a score was not read").astype(object)
    of_prompt: dict[str, list[int]] = collections.defaultdict(list)
    for row in np.flatnonzero(complete):
        of_prompt[prompts[row]].append(int(row))
    for rows in of_prompt.values():
        best = min(rows, key=lambda row: (-mean[row], names[row]))
        worst = min(rows, key=lambda row: (mean[row], names[row]))
        if mean[best] > mean[worst]:
            label[best], why[best] = "desirable", f"best of {len(rows)}: {mean[best]:g}"
            label[worst], why[worst] = "undesirable", f"worst of {len(rows)}: {mean[worst]:g}"
        else:
            why[rows] = f"all {len(rows)} have the score {mean[best]:g}"
    columns = {
        "candidate_id": ids,
        "prompt_id": one_array(candidates["prompt_id"]),
        "mean_score": with_nulls(mean),
        "score_variance": with_nulls(variance),
        "penalty": with_nulls(0.0 * mean),
        "final_score": with_nulls(mean),
        "label": pa.array(label.tolist(), pa.string()),
        "why": pa.array(why.tolist(), pa.string()),
    }
    return pa.table([columns[name] for name in DECISIONS.names], schema=DECISIONS)
