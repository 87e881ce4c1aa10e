"""The feedback loop on the prompts of a frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ray_pipeline.agents import feedback_loop as loops
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.api.calls import CONCURRENCY, each, settings_of
from ray_pipeline.api.engines import bound, templates_of
from ray_pipeline.api.frames import Frame, column_names, give, need, rows_with_ids
from ray_pipeline.engines.base import ChatEngine, Completion
from ray_pipeline.store.keys import derived_seed


def feedback_loop(
    frame: Frame,
    generator: ChatEngine,
    reviewers: ChatEngine | Mapping[str, ChatEngine] | None = None,
    *,
    responses: int = 3,
    templates: str | None = None,
    sampling: SamplingSettings | Mapping[str, Any] | None = None,
    reviewing: SamplingSettings | Mapping[str, Any] | None = None,
    asking: loops.ReviewAsking | Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
) -> Frame:
    """Answer each prompt, review the answer, and revise it according to the reviews until no change is requested.

    Args:
        frame: column `prompt` (or `messages`).
        generator: engine that answers and revises.
        reviewers: one engine, or name → engine; default: the generator.
        responses: maximum number of responses to a prompt; the last of them is not reviewed.
        templates: built-in name or YAML file of the prompts for reviews and revisions.
        sampling, reviewing: sampling of responses and of reviews.
        asking: keys of a `ReviewAsking` (`{"retries": 2, "scored": True}`).

    Returns:
        One row for each response, first to last: candidate_id, prompt_id, prompt, k (0 is the first), response,
        finish_reason, reviews (list of structs reviewer, feedback, score, parse_status; empty for the last) and
        stop (why the loop ended, on its last row: limit, empty, repeated, unread, no_response). `judge` and `gate`
        accept it unchanged.

    Raises:
        ColumnError, ValueError: as `judge`.
    """
    name = templates_of(generator, templates)
    texts = loops.load_feedback_templates(name)
    answer = settings_of(SamplingSettings, sampling, name, "answer")
    how = settings_of(SamplingSettings, reviewing, name, "sampling")
    rules = settings_of(loops.ReviewAsking, asking, name, "review")
    if reviewers is None:
        reviewers = generator
    by_name = reviewers if isinstance(reviewers, Mapping) else {"reviewer": reviewers}
    column = "messages" if "messages" in column_names(frame, "frame") else "prompt"
    need(frame, [column], "frame")
    rows = rows_with_ids(frame, "row_id", [], "frame")

    async def one(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        pid = row["prompt_id"]
        looking = {n: loops.Reviewer(bound(e, pid, f"review/{n}"), how) for n, e in by_name.items()}
        drawn = [
            answer.sampling(seed=derived_seed("loop", pid, k) if answer.temperature > 0 else None)
            for k in range(responses)
        ]
        own = bound(generator, pid, "generator")
        loop = await loops.feedback_loop(own, looking, row["messages"], responses, texts, drawn.__getitem__, rules)
        return _loop_rows(row, loop)

    made = [row for loop in each([(row,) for row in rows], one, concurrency) for row in loop]
    return give(pa.Table.from_pylist(made, schema=_LOOP), frame)


_REVIEW = pa.struct(
    [("reviewer", pa.string()), ("feedback", pa.string()), ("score", pa.float64()), ("parse_status", pa.string())]
)
_LOOP = pa.schema(
    [
        ("candidate_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("k", pa.int32()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("reviews", pa.list_(_REVIEW)),
        ("stop", pa.string()),
    ]
)


def _loop_rows(row: Mapping[str, Any], loop: loops.Loop) -> list[dict[str, Any]]:
    given: list[Completion | None] = list(loop.responses)
    if loop.stop == "no_response":
        given.append(None)
    rows = []
    for k, reply in enumerate(given):
        said = loop.reviews[k] if k < len(loop.reviews) else {}
        reviews = [
            {"reviewer": n, "feedback": r.feedback, "score": r.score, "parse_status": r.parse_status}
            for n, r in said.items()
        ]
        rows.append(
            {
                "candidate_id": f"{row['row_id']}-{k}",
                "prompt_id": row["prompt_id"],
                "prompt": row["messages"],
                "k": k,
                "response": None if reply is None else reply.text,
                "finish_reason": "error" if reply is None else reply.finish_reason,
                "reviews": reviews,
                "stop": loop.stop if k == len(given) - 1 else None,
            }
        )
    return rows
