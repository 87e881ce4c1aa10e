"""Preference data as it is usually made, without a gate: best and worst of k by the mean of some judges' scores.

The gate is compared with it. Its decisions have the schema of the gate's, so that the same code makes training rows
of both: the best candidate of a prompt is desirable, the worst undesirable, the others are discarded. There is no
abstention, no penalty and no threshold; the two scores must only differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from ray_pipeline.data.gate import Cut, cut_text
from ray_pipeline.data.mean_rank import mean_rank
from ray_pipeline.store.keys import unit_hash

Rejected = Literal["worst", "random"]


def best_and_worst(
    candidates: pa.Table,
    verdicts: pa.Table,
    judges: Sequence[str],
    cut: Cut = "exclude",
    rejected: Rejected = "worst",
) -> pa.Table:
    """One decision for each candidate, in the order of `candidates`; of equal scores the smaller candidate_id counts.

    Args:
        candidates: columns candidate_id, prompt_id and, if it is there, finish_reason are read; all candidates of each
            prompt.
        verdicts: columns candidate_id, judge, score, parse_status; rows of other judges are left out.
        judges: whose mean ranks the candidates; one name for a single judge.
        cut: rule for candidates whose text is not whole: they are `incomplete`, at most the worst, or like others.
        rejected: which one is undesirable; `random`: of those with a lower mean than the best, the smallest hash.

    Returns:
        A table of schema DECISIONS. A candidate with an unread score is `incomplete` and never best or worst; all
        candidates of a prompt whose best and worst score are equal are discarded.

    Raises:
        KeyMismatch: as `gate.decide`.
        ValueError: there are no judges, or one occurs twice.
    """
    ranked = mean_rank(candidates, verdicts, judges, "best and worst need", cut)
    mean, names = ranked.mean, ranked.ids.to_pylist()
    label = ranked.texts("discard", "incomplete")
    why = ranked.why("neither best nor worst")
    for rows in ranked.of_prompt.values():
        whole = ranked.whole(rows)
        best = min(whole or rows, key=lambda row: (-mean[row], names[row]))
        below = [row for row in rows if mean[row] < mean[best]]
        worst = min(
            below or rows, key=lambda row: (mean[row] if rejected == "worst" else _drawn(names[row]), names[row])
        )
        if not whole:
            label[rows], why[rows] = "incomplete", [cut_text(ranked.cut[row]) for row in rows]
        elif mean[best] > mean[worst]:
            label[best], why[best] = "desirable", f"best of {len(rows)}: {mean[best]:g}"
            which = "worst" if rejected == "worst" else "a random one"
            label[worst], why[worst] = "undesirable", f"{which} of {len(rows)}: {mean[worst]:g}"
        else:
            why[rows] = f"all {len(rows)} have the score {mean[best]:g}"
    return ranked.decisions(label, why)


def _drawn(candidate: str) -> float:
    return unit_hash("rejected", candidate)
