"""Conversion of pairs into KTO and SFT rows, with counts of what was left out.

A pair prefers one answer to another. For KTO it is one desirable and one undesirable answer, for SFT one answer to
imitate. An answer may be in several pairs of a prompt; it gives one row at most.
"""

from __future__ import annotations

import collections
from typing import Any

import pyarrow as pa

from ray_pipeline.store.schemas import KTO, SFT, to_table


def pairs_to_kto(pairs: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """Chosen answers as desirable rows, rejected ones as undesirable, in the order of `pairs`, chosen first.

    Args:
        pairs: schema DPO; all pairs of a prompt.

    Returns:
        A table of schema KTO, and counts: `answers` (two a pair), `kept`, and `dropped`: `repeated` (the answer has a
        row already) and `contradictory` (chosen in one pair, rejected in another).
        answers = kept + the sum of dropped.
    """
    rows = pairs.to_pylist()
    seen: dict[str, set[bool]] = collections.defaultdict(set)
    for row in rows:
        seen[row["chosen_id"]].add(True)
        seen[row["rejected_id"]].add(False)
    dropped = {"repeated": 0, "contradictory": 0}
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        for side, label in (("chosen", True), ("rejected", False)):
            name = row[f"{side}_id"]
            if len(seen[name]) > 1:
                dropped["contradictory"] += 1
            elif name in kept:
                dropped["repeated"] += 1
            else:
                kept[name] = {
                    "candidate_id": name,
                    "prompt_id": row["prompt_id"],
                    "split": row["split"],
                    "prompt": row["prompt"],
                    "completion": row[side],
                    "label": label,
                    "final_score": row[f"score_{side}"],
                    "scores": None,
                    "copies": None,
                    "model": row[f"{side}_model"],
                }
    return to_table(list(kept.values()), KTO), {"answers": 2 * len(rows), "kept": len(kept), "dropped": dropped}


def pairs_to_sft(pairs: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """Chosen answers as rows to imitate, in the order of `pairs`.

    Args:
        pairs: schema DPO; all pairs of a prompt.

    Returns:
        A table of schema SFT, and counts: `pairs`, `kept` and `dropped` (`repeated`: the answer has a row already).
    """
    kept: dict[str, dict[str, Any]] = {}
    for row in pairs.to_pylist():
        kept.setdefault(
            row["chosen_id"],
            {
                "candidate_id": row["chosen_id"],
                "prompt_id": row["prompt_id"],
                "split": row["split"],
                "prompt": row["prompt"],
                "completion": row["chosen"],
                "final_score": row["score_chosen"],
                "model": row["chosen_model"],
            },
        )
    counts = {"pairs": pairs.num_rows, "kept": len(kept), "dropped": {"repeated": pairs.num_rows - len(kept)}}
    return to_table(list(kept.values()), SFT), counts
