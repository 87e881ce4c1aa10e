"""An engine that answers from a script: for tests of the logic around engines, never of engines."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_pipeline.engines.base import Completion, EngineError, Message, Sampling
from ray_pipeline.store.calls import read_calls
from ray_pipeline.store.files import Folder

#: What a script may say: text, a whole completion, or an exception, which is raised.
Reply = str | Completion | BaseException
Script = Callable[[Sequence[Message], Sampling], Reply]


class ScriptedEngine:
    """A `ChatEngine` whose replies come from a function.

    Args:
        reply: `(messages, sampling) -> Reply`, or one reply for every call. Text becomes a finished completion.
        identity: who answers; two engines of one identity share a call log.
        delay: seconds that every call takes.
    """

    def __init__(self, reply: Script | Reply = "ok", *, identity: Mapping[str, Any] | None = None, delay: float = 0.0):
        self._reply = reply
        self._identity = dict(identity or {"engine": "scripted", "model": "scripted"})
        self.delay = delay
        self.asked: list[tuple[list[Message], Sampling]] = []
        self.in_flight = 0
        self.most_in_flight = 0

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    @property
    def calls(self) -> int:
        return len(self.asked)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        self.asked.append(([dict(m) for m in messages], sampling))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.in_flight -= 1
        reply = self._reply(messages, sampling) if callable(self._reply) else self._reply
        if isinstance(reply, BaseException):
            raise reply
        return said(reply) if isinstance(reply, str) else reply


def said(text: str, finish_reason: str = "stop", logprobs: Any = None) -> Completion:
    """A completion with token counts that follow from the text."""
    return Completion(text, finish_reason, 11, max(1, len(text.split())), 3, logprobs=logprobs)


def echo(messages: Sequence[Message], sampling: Sampling) -> str:
    """A reply that depends on everything that was asked and on nothing else."""
    asked = repr(([(m["role"], m["content"]) for m in messages], sampling.key()))
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def failing(message: str = "boom") -> EngineError:
    return EngineError(message)


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def logged_calls(root: Folder) -> pa.Table:
    """All calls in the logs of all models."""
    return pa.concat_tables(read_calls(root / model, 0, 1) for model in root.folders())
