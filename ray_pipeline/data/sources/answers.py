"""A prompt and one answer to it, from the forms in which rows of preference data and of completions hold the two."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray_pipeline.data.sources.chats import BadRow, chat_in_json, messages_of, turns_in_text
from ray_pipeline.data.sources.records import Thoughts
from ray_pipeline.engines.base import common_finish
from ray_pipeline.engines.thoughts import split_thoughts
from ray_pipeline.store.keys import normalise_messages, normalise_text


class Drop(Exception):
    """A row, or an answer, is left out; the argument is the reason."""


def finish_reason_of(value: Any, column: Any = None) -> str:
    """Why the generation of an answer ended, in the common word; `unknown` where the row does not say.

    Args:
        value: an answer as it is read; an object, or a chat whose last message is one, may have a `finish_reason`.
        column: what a column beside it holds; the object's own reason comes first.
    """
    last = value[-1] if isinstance(value, list) and value else value
    own = last.get("finish_reason") if isinstance(last, Mapping) else None
    reason = column if own is None else own
    return common_finish(reason) if isinstance(reason, str) and reason.strip() else "unknown"


class Answered(NamedTuple):
    """Prompt messages, the text of the answer, and the thoughts before it, None where there are none."""

    prompt: list[dict[str, str]]
    text: str
    thoughts: str | None


def split_answer(prompt: Any, value: Any, columns: tuple[str, str], thoughts: Thoughts = "split") -> Answered:
    """A prompt and the answer to it, from strings, messages, or a whole conversation.

    Args:
        thoughts: whether thoughts are split off the answer, as off every reply of an engine.

    Raises:
        BadRow: a value is neither text nor messages, or a text comes without a prompt.
        Drop: the last message is not an answer, one of the two is empty, or the answer ends within its thoughts.
    """
    turns = chat_in_text(value) if prompt is None else None
    if isinstance(value, str) and turns is None:
        if prompt is None:
            raise BadRow(
                f"column {columns[1]!r}: plain text without a prompt; put the prompt into its own column (TRL's "
                "`extract_prompt` does it for conversations written as one text)"
            )
        asked, text = _messages(prompt, columns[0]), value
    else:
        turns = _messages(turns or value, columns[1])
        if not turns or turns[-1]["role"] != "assistant":
            raise Drop("not_an_answer")
        text, before = turns[-1]["content"], turns[:-1]
        # The prompt is in its own column, at the start of the conversation, or in both (ultrafeedback_binarized).
        asked = before if before or prompt is None else _messages(prompt, columns[0])
        if before and isinstance(prompt, list):
            own = _messages(prompt, columns[0])
            asked = before if normalise_messages(before[: len(own)]) == normalise_messages(own) else [*own, *before]
    split = split_thoughts(text) if thoughts == "split" else None
    if split is not None and not split.closed:
        raise Drop("unfinished_thought")
    text = text if split is None else split.answer
    if not text.strip() or not asked or not normalise_text(asked[-1]["content"]):
        raise Drop("empty")
    if asked[-1]["role"] == "assistant":
        raise Drop("not_an_answer")
    return Answered(asked, text, None if split is None else split.thoughts)


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    try:
        return messages_of(value)
    except BadRow as fault:
        raise BadRow(f"column {column!r}: {fault}") from fault


def chat_in_text(value: Any) -> list[Any] | None:
    """The chat, as it stands, of a text that is one with an answer at its end; None for any other value."""
    with contextlib.suppress(BadRow):
        turns = turns_in_text(value) if isinstance(value, str) else None
        if turns and turns[-1]["role"] == "assistant":
            return chat_in_json(value) or turns
    return None
