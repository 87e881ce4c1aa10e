"""Rows of the call log: a reply as it came, and the completion that is read from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.engines.base import Completion, Message
from ray_pipeline.store.keys import bucket_of


def call_row(
    key: str,
    prompt_id: str,
    identity: Mapping[str, Any],
    role: str,
    messages: Sequence[Message],
    sampling: Mapping[str, Any],
    completion: Completion,
) -> dict[str, Any]:
    """The row of a call, of schema CALLS; its thoughts are split off again when it is read."""
    reply = completion.raw or completion
    return {
        "call_key": key,
        "bucket": bucket_of(prompt_id),
        "prompt_id": prompt_id,
        "model": json.dumps(dict(identity), sort_keys=True),
        "role": role,
        "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
        "sampling": json.dumps(sampling, sort_keys=True),
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "logprobs": None if reply.logprobs is None else json.dumps(reply.logprobs),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "cached_tokens": reply.cached_tokens,
        "latency_s": reply.latency_s,
        "reasoning": reply.reasoning,
        "inside": reply.inside or None,
        "answered_by": reply.answered_by or None,
        "reasoning_tokens": reply.reasoning_tokens,
    }


def completion_of(row: Mapping[str, Any]) -> Completion:
    """The reply of a row, as it came."""
    logprobs = None
    if row["logprobs"] is not None:
        logprobs = [[(token, value) for token, value in step] for step in json.loads(row["logprobs"])]
    return Completion(
        text=row["text"],
        finish_reason=row["finish_reason"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        cached_tokens=row["cached_tokens"],
        logprobs=logprobs,
        latency_s=row["latency_s"],
        from_log=True,
        reasoning=row["reasoning"],
        inside=bool(row["inside"]),
        answered_by=row["answered_by"] or "",
        reasoning_tokens=row["reasoning_tokens"],
    )
