"""What judges judge: candidates of the policy, or responses of an evaluated model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from ray_pipeline.engines.base import Message
from ray_pipeline.store.schemas import NO_REPLY


class Answer(NamedTuple):
    """A candidate, or a response of an evaluated model, as the answer to judge.

    Attributes:
        missing: why there is no answer, as a parse status; `response` is "" then.
    """

    prompt_id: str
    id: str
    messages: list[Message]
    response: str
    missing: str | None


def answers_of(prompts: pa.Table, *tables: pa.Table) -> list[Answer]:
    """Rows of candidates or evaluation responses, joined to their prompts by id; table after table."""
    messages = {row["prompt_id"]: row["messages"] for row in prompts.to_pylist()}
    return [
        Answer(
            row["prompt_id"],
            row.get("candidate_id") or row["response_id"],
            messages[row["prompt_id"]],
            row["response"] or "",
            unanswered(row),
        )
        for table in tables
        for row in table.to_pylist()
    ]


def unanswered(row: Mapping[str, Any]) -> str | None:
    """Why a row of candidates or responses holds no answer, as a parse status; None when it holds one."""
    if row["response"] is not None:
        return None
    return row["finish_reason"] if row["finish_reason"] in NO_REPLY else "truncated"
