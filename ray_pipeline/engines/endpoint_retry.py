"""Limits per minute, retries, and patience with an endpoint that is down."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray_pipeline.engines.base import CallFailed, EngineStop
from ray_pipeline.engines.endpoint_connection import Connection
from ray_pipeline.engines.endpoint_errors import Again, clean
from ray_pipeline.engines.endpoint_settings import OpenAISpec
from ray_pipeline.engines.lifetime import Lifetime

logger = logging.getLogger("quorum.openai")

_BACKOFF_SECONDS = 0.5  # before the second try; doubles with every further one
_BACKOFF_MOST = 60.0
_LIMITED_MOST = 200  # attempts of one call that may end in 429 while others are answered

T = TypeVar("T")


class Retries:
    """Makes requests to one endpoint until they are answered, at the pace that its settings allow.

    Attributes:
        silent_since: time of the first sign since the last reply that the endpoint is down; None if there is none.
        token_pace: limit of tokens per minute.
    """

    def __init__(self, spec: OpenAISpec, lifetime: Lifetime, connection: Connection) -> None:
        self._settings = settings = spec.endpoint
        self._lifetime, self._connection = lifetime, connection
        self._request_pace = Pace(settings.requests_per_minute, spec.share)
        self.token_pace = Pace(settings.tokens_per_minute, spec.share)
        self._pause_until = 0.0  # after a 429 with a waiting time
        self.silent_since: float | None = None

    async def persist(self, request: Callable[[], Awaitable[T]], *, retries: int | None = None, tokens: int = 0) -> T:
        """Retry a request until it is answered or rejected, has failed too often, or the endpoint counts as down."""
        retries = self._settings.retries if retries is None else retries
        failures = limited = answered = 0
        while True:
            self._lifetime.check_open()
            await self._request_pace.wait(1)
            await self.token_pace.wait(tokens)
            while (left := self._pause_until - time.monotonic()) > 0:
                await asyncio.sleep(left + random.uniform(0, min(1.0, left)))
            self._lifetime.check_open()
            try:
                answer = await request()
            except Again as error:
                trouble = Again(clean(str(error), self._connection.key), error.blame, error.wait)
                if not failures and not limited:
                    answered = self._connection.answered
                if trouble.blame == "limit":
                    limited += 1
                else:
                    failures += 1
                own_fault = trouble.blame == "call" or self._connection.answered > answered
                if (own_fault and failures > retries) or limited > _LIMITED_MOST:
                    raise CallFailed(f"given up after {failures + limited} attempts: {trouble}") from None
                await self._wait(trouble, failures + limited)
            else:
                self.silent_since = None
                return answer

    async def _wait(self, trouble: Again, tries: int) -> None:
        """Wait before the next attempt, or stop if the endpoint has been silent for too long."""
        wait = min(_BACKOFF_MOST, _BACKOFF_SECONDS * 2 ** min(tries - 1, 10)) * random.uniform(0.5, 1.0)
        if trouble.wait is not None:
            wait = trouble.wait + random.uniform(0, min(1.0, 0.1 + trouble.wait / 10))
        now, patience = time.monotonic(), self._settings.patience_s
        if trouble.blame == "call":
            wait = min(wait, max(patience, _BACKOFF_MOST))
        else:
            if self.silent_since is None:
                self.silent_since = now
            left = self.silent_since + patience - now
            if left <= 0 or (trouble.wait is not None and trouble.wait > left):
                raise EngineStop(self._unreachable(trouble, now - self.silent_since))
            if trouble.wait is None:
                wait = min(wait, left)
            elif trouble.blame == "limit":
                self._pause_until = max(self._pause_until, now + trouble.wait)
        logger.debug("%s: retrying in %.1f s (%s)", self._settings.address, wait, trouble)
        await asyncio.sleep(wait)

    def _unreachable(self, trouble: Again, silent: float) -> str:
        asks = f", and requests a wait of {trouble.wait:.0f} s" if trouble.wait is not None else ""
        remedy = (
            "Lower endpoint.requests_per_minute, tokens_per_minute or concurrency, or raise patience_s"
            if trouble.blame == "limit"
            else "Check base_url, the network (and its proxy settings), and that the server runs"
        )
        return (
            f"{self._settings.address} has not responded for {silent:.0f} s ({trouble}){asks}; endpoint.patience_s "
            f"is {self._settings.patience_s:g}. {remedy}. All replies are in the call log: rerun the same command to "
            "resume"
        )


class Pace:
    """Spreads requests evenly over time, so that no minute exceeds its share of a limit.

    There are no bursts and unused capacity is lost, since servers count in their own windows, some of them seconds.
    """

    def __init__(self, per_minute: float | None, share: int) -> None:
        self._gap = 0.0 if per_minute is None else 60.0 * share / per_minute  # seconds per unit
        self._next = 0.0
        self._turn = asyncio.Lock()

    async def wait(self, amount: int) -> None:
        """Wait for the turn of a request of that size, in order of arrival."""
        if not self._gap:
            return
        async with self._turn:
            while (left := self._next - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.05))  # short, because `give_back` may move the turn forward
            self._next = max(self._next, time.monotonic()) + amount * self._gap

    def give_back(self, amount: int) -> None:
        """Correct for a request that used less (or more) than estimated."""
        self._next -= amount * self._gap
