"""A model's answers to the turns of a question."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ray_pipeline.data.candidates import reply_columns
from ray_pipeline.engines.base import ChatEngine, Message, Sampling


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A model's answers by turn; None where there is none, with the finish reason and the error.

    A turn after one without an answer is not asked (`skipped`).
    """

    turns: tuple[str | None, ...]
    finish_reasons: tuple[str, ...]
    errors: tuple[str | None, ...] = ()


async def answer_turns(engine: ChatEngine, turns: Sequence[str], sampling: Sequence[Sampling]) -> Conversation:
    """Ask turn after turn, each with the answers so far in the conversation.

    Args:
        sampling: of each turn; they differ in their seeds.
    """
    messages: list[Message] = []
    texts: list[str | None] = []
    reasons: list[str] = []
    errors: list[str | None] = []
    for question, one in zip(turns, sampling, strict=True):
        if texts and texts[-1] is None:
            text, reason, error = None, "skipped", None
        else:
            messages = [*messages, {"role": "user", "content": question}]
            reply = await reply_columns(engine, messages, one)
            text, reason, error = reply["response"], reply["finish_reason"], reply["error"]
            messages = [*messages, {"role": "assistant", "content": text or ""}]
        texts.append(text)
        reasons.append(reason)
        errors.append(error)
    return Conversation(tuple(texts), tuple(reasons), tuple(errors))
