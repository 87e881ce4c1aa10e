"""Conversion of pairs into KTO and SFT rows, with counts of what was left out.

A pair prefers one answer to another. For KTO it is one desirable and one undesirable answer, for SFT one answer to
imitate. An answer may be in several pairs of a prompt; it gives one row at most, and `copies` is their number. Answers
are equal if `keys.normalise_text` does not tell them apart.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ray_pipeline.store.keys import normalise_text, prompt_id
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
    sides = [(_answer_key(row, side), row, side) for row in rows for side in ("chosen", "rejected")]
    seen: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for key, _, side in sides:
        seen[key].add(side)
    dropped = {"repeated": 0, "contradictory": 0}
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for key, row, side in sides:
        if len(seen[key]) > 1:
            dropped["contradictory"] += 1
        elif key in kept:
            dropped["repeated"] += 1
            kept[key]["copies"] += row["copies"] or 1
        else:
            kept[key] = {
                "candidate_id": row[f"{side}_id"],
                "prompt_id": row["prompt_id"],
                "split": row["split"],
                "prompt": row["prompt"],
                "completion": row[side],
                "label": side == "chosen",
                "final_score": row[f"score_{side}"],
                "scores": None,
                "copies": row["copies"] or 1,
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
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for row in pairs.to_pylist():
        same = kept.setdefault(
            _answer_key(row, "chosen"),
            {
                "candidate_id": row["chosen_id"],
                "prompt_id": row["prompt_id"],
                "split": row["split"],
                "prompt": row["prompt"],
                "completion": row["chosen"],
                "final_score": row["score_chosen"],
                "copies": 0,
                "model": row["chosen_model"],
            },
        )
        same["copies"] += row["copies"] or 1
    counts = {"pairs": pairs.num_rows, "kept": len(kept), "dropped": {"repeated": pairs.num_rows - len(kept)}}
    return to_table(list(kept.values()), SFT), counts


def _answer_key(pair: Mapping[str, Any], side: str) -> tuple[str, str]:
    """Equal for equal answers to the same conversation."""
    return prompt_id(pair["prompt"]), normalise_text(pair[side][-1]["content"])
