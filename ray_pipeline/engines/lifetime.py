"""The states that every engine goes through: started once, stopped for a reason, closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ray_pipeline.engines.base import EngineDead, EngineStop


class Lifetime:
    """Whether an engine may make calls. It belongs to the event loop that the engine was started on."""

    def __init__(self) -> None:
        self.starting: asyncio.Task[None] | None = None
        self.closed = False
        self._stopped: EngineStop | None = None

    @property
    def is_starting(self) -> bool:
        """Whether the engine's start has begun and is not over."""
        return self.starting is not None and not self.starting.done()

    async def start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work` once, however often this is called; later calls wait for it and raise the same error."""
        if self.starting is None:
            # A separate task: the first caller may be cancelled while others wait for the same start.
            self.starting = asyncio.create_task(work(), name="engine-start")
        try:
            await asyncio.shield(self.starting)
        except asyncio.CancelledError:
            if self.closed and self.starting.cancelled():
                raise EngineDead("the engine was closed") from None
            raise

    def stop(self, error: EngineStop) -> EngineStop:
        """Record why no further call is made; the first reason counts. Returns `error`, to be raised."""
        self._stopped = self._stopped or error
        return error

    def check_open(self) -> None:
        """Raise EngineDead for a closed engine, and the recorded reason for a stopped one."""
        if self.closed:
            raise EngineDead("the engine was closed")
        if self._stopped is not None:
            raise type(self._stopped)(str(self._stopped))
