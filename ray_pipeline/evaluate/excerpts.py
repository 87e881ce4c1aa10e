"""A few kept rows to read, from prompt to label."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.report.figures import number
from ray_pipeline.report.page import Excerpt


def pick_excerpts(data: ReportData, count: int = 3) -> list[Excerpt]:
    """Up to `count` kept rows, both labels in turn, each the smallest candidate_id: ids are hashes, so the choice is
    arbitrary, fixed, and not the most flattering. Empty without decisions or the texts of the responses.
    """
    if data.decisions is None or data.candidates is None or "response" not in data.candidates.column_names:
        return []
    chosen = _both_labels_in_turn(data.decisions, count)
    rows = [_only_row(data.decisions, "candidate_id", i) for i in chosen]
    return [_excerpt(data, data.candidates, row) for row in rows if row is not None]


def _excerpt(data: ReportData, candidates: pa.Table, decision: dict[str, Any]) -> Excerpt:
    candidate_id = decision["candidate_id"]
    candidate = _only_row(candidates, "candidate_id", candidate_id) or {}
    prompt = None if data.prompts is None else _only_row(data.prompts, "prompt_id", candidate.get("prompt_id"))
    scores: list[tuple[str, float | None]] = []
    if data.verdicts is not None:
        own = data.verdicts.filter(pc.equal(data.verdicts.column("candidate_id"), candidate_id))
        scores = sorted(((r["judge"], r["score"]) for r in own.to_pylist()), key=lambda pair: pair[0])
    listed = ", ".join(f"{judge} {number(score, 0)}" for judge, score in scores)
    return Excerpt(
        title=f"{decision['label']}, final score {number(decision['final_score'])}",
        note=f"Candidate {candidate_id}; {listed}. {decision.get('why') or ''}",
        texts=[
            ("Prompt", "(prompt not given)" if prompt is None else as_text(prompt["messages"])),
            ("Response", candidate.get("response") or ""),
        ],
        id=candidate_id,
    )


def _both_labels_in_turn(decisions: pa.Table, count: int) -> list[str]:
    by_label = []
    for label in ("desirable", "undesirable"):
        ids = decisions.column("candidate_id").filter(pc.equal(decisions.column("label"), label)).to_pylist()
        by_label.append(sorted(ids)[:count])
    turns = max(map(len, by_label), default=0)
    return [ids[turn] for turn in range(turns) for ids in by_label if turn < len(ids)][:count]


def _only_row(table: pa.Table, column: str, key: Any) -> dict[str, Any] | None:
    found = table.filter(pc.equal(table.column(column), key)).slice(0, 1).to_pylist()
    return found[0] if found else None


def as_text(messages: Sequence[dict[str, str]] | str) -> str:
    """A conversation as text; a single user message is only its content."""
    turns: Sequence[dict[str, str]] = json.loads(messages) if isinstance(messages, str) else messages
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in turns)
