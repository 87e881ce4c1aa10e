"""What happened in a feedback loop, response by response: how far loops went, why they ended, if reviews helped.

All figures are over the stored tables. Where the truth is known (`correct`), it is counted here and nowhere earlier.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa


def loop_stats(candidates: pa.Table, reviews: pa.Table, decisions: pa.Table, ends: Mapping[str, str]) -> dict[str, Any]:
    """The loop as a JSON-able document.

    Args:
        candidates: columns candidate_id, prompt_id, k, response, and `correct` (bool, may be null) where it is known.
        reviews: columns reviewer, iteration, feedback, parse_status.
        decisions: columns candidate_id, mean_score, label.
        ends: prompt_id → why its loop ended.

    Returns:
        `prompts`; `ends` (reason → prompts); `responses`, one entry for each k: `responses`, `scored`, `mean_score` and
        `sd` of those with a score, `accepted`, `better`, `equal` and `worse` (than the response before, where both
        have a score), and with truth `right`, `of`, `accuracy`, `accuracy_so_far` (each prompt's newest response up to
        k), `mended` of `wrong_before` and `kept_right` of `right_before`; `reviewers`: for each reviewer and iteration
        the number of `reviews`, of those that were `unread`, and of those with `nothing_to_improve`.
    """
    judged = {row["candidate_id"]: row for row in decisions.select(["candidate_id", "mean_score", "label"]).to_pylist()}
    truth = "correct" in candidates.column_names
    by_prompt: dict[str, dict[int, dict[str, Any]]] = collections.defaultdict(dict)
    for row in candidates.to_pylist():
        by_prompt[row["prompt_id"]][row["k"]] = {**row, **judged.get(row["candidate_id"], {})}
    last = max((k for rows in by_prompt.values() for k in rows), default=-1)
    return {
        "prompts": len(by_prompt),
        "truth": truth,
        "ends": dict(sorted(collections.Counter(ends[prompt] for prompt in by_prompt).items())),
        "responses": [_of_response(k, list(by_prompt.values()), truth) for k in range(last + 1)],
        "reviewers": _of_reviews(reviews),
    }


def _of_response(k: int, prompts: Sequence[Mapping[int, Mapping[str, Any]]], truth: bool) -> dict[str, Any]:
    here = [rows[k] for rows in prompts if k in rows]
    scores = [row["mean_score"] for row in here if row.get("mean_score") is not None]
    steps = [(rows[k - 1], rows[k]) for rows in prompts if k in rows and k - 1 in rows]
    moved = [
        after["mean_score"] - before["mean_score"]
        for before, after in steps
        if after.get("mean_score") is not None and before.get("mean_score") is not None
    ]
    found: dict[str, Any] = {
        "response": k + 1,
        "responses": len(here),
        "scored": len(scores),
        "mean_score": statistics.fmean(scores) if scores else None,
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "accepted": sum(row.get("label") == "desirable" for row in here),
        "better": sum(step > 0 for step in moved),
        "equal": sum(step == 0 for step in moved),
        "worse": sum(step < 0 for step in moved),
    }
    if truth:
        known = [bool(row["correct"]) for row in here if row["correct"] is not None]
        newest = [rows[max(n for n in rows if n <= k)]["correct"] for rows in prompts]
        newest = [bool(right) for right in newest if right is not None]
        wrong = [bool(after["correct"]) for before, after in steps if before["correct"] is False]
        right = [bool(after["correct"]) for before, after in steps if before["correct"]]
        found |= {
            "right": sum(known),
            "of": len(known),
            "accuracy": _share(known),
            "accuracy_so_far": _share(newest),
            "wrong_before": len(wrong),
            "mended": sum(wrong),
            "right_before": len(right),
            "kept_right": sum(right),
        }
    return found


def _of_reviews(reviews: pa.Table) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = collections.defaultdict(list)
    for row in reviews.select(["reviewer", "iteration", "feedback"]).to_pylist():
        groups[row["reviewer"], row["iteration"]].append(row)
    return [
        {
            "reviewer": reviewer,
            "of_response": iteration + 1,
            "reviews": len(rows),
            "unread": sum(row["feedback"] is None for row in rows),
            "nothing_to_improve": sum(row["feedback"] == "" for row in rows),
        }
        for (reviewer, iteration), rows in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
