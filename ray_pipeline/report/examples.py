"""A few kept rows to read, from prompt to label."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.evaluate.data import ReportData


@dataclass(frozen=True)
class Example:
    """One kept candidate; `scores` is (judge, score) sorted by judge, None where unread."""

    candidate_id: str
    label: str
    final_score: float | None
    scores: list[tuple[str, float | None]]
    prompt: str
    response: str
    why: str


def pick_examples(data: ReportData, count: int = 3) -> list[Example]:
    """Up to `count` kept rows, both labels in turn, each the smallest candidate_id: ids are hashes, so the choice is
    arbitrary, fixed, and not the most flattering. Empty when decisions or the response texts are not there.
    """
    if data.decisions is None or data.candidates is None or "response" not in data.candidates.column_names:
        return []
    chosen = _both_labels_in_turn(data.decisions, count)
    rows = [_only_row(data.decisions, "candidate_id", i) for i in chosen]
    return [_example(data, row) for row in rows if row is not None]


def _example(data: ReportData, decision: dict[str, Any]) -> Example:
    candidate_id = decision["candidate_id"]
    assert data.candidates is not None  # pick_examples has looked
    candidate = _only_row(data.candidates, "candidate_id", candidate_id) or {}
    prompt = None if data.prompts is None else _only_row(data.prompts, "prompt_id", candidate.get("prompt_id"))
    scores: list[tuple[str, float | None]] = []
    if data.verdicts is not None:
        own = data.verdicts.filter(pc.equal(data.verdicts.column("candidate_id"), candidate_id))
        pairs = own.select(["judge", "score"]).to_pylist()
        scores = sorted(((r["judge"], r["score"]) for r in pairs), key=lambda pair: pair[0])
    return Example(
        candidate_id=candidate_id,
        label=decision["label"],
        final_score=decision["final_score"],
        scores=scores,
        prompt="(prompt not given)" if prompt is None else as_text(prompt["messages"]),
        response=candidate.get("response") or "",
        why=decision.get("why") or "",
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
