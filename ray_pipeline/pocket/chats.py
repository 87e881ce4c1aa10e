"""Chats as the pocket models read them; imports no torch."""

from __future__ import annotations

Pair = tuple[str, str]  # user message (or a `conversation`), reply


def conversation(turns: list[str]) -> str:
    """A chat of several turns (user, assistant, user ...) as the one message that `training` encodes and answers."""
    speakers = ("<|user|>", "<|assistant|>")
    opened = [f"{speakers[index % 2]}{turn}" for index, turn in enumerate(turns)]
    return "<|end|>".join(opened).removeprefix(speakers[0])
