"""The call log in front of an engine: a call with a stored reply is not made again.

One `LoggedEngine` serves one attempt at one shard. Agents get a view bound to a prompt and a role, which is an ordinary
`ChatEngine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.engines.base import (
    BudgetSpent,
    ChatEngine,
    Completion,
    EngineDead,
    EngineError,
    Message,
    Metered,
    PromptTooLong,
    Sampling,
)
from ray_pipeline.engines.usage import Usage, prompt_token_estimate, reply_token_estimate
from ray_pipeline.store.calls import CallWriter, model_folder, read_calls
from ray_pipeline.store.files import Folder, StoreError
from ray_pipeline.store.keys import bucket_of, call_key
from ray_pipeline.store.outside import storable, token_count

logger = logging.getLogger("quorum.calls")

#: Seconds between two part files: the replies of this time can be lost when a process is killed.
FLUSH_SECONDS = 2.0


class CallNotLogged(RuntimeError):
    """A replay needs a call that is not in the log."""


class LoggedEngine:
    """Stores every reply of `engine` under `root`.

    Args:
        engine: answers calls that are not in the log; its `identity` is part of every key.
        root: folder of the call log; several runs may share it, also concurrently.
        limit: bounds the calls in flight on the engine, across all shards of an actor.
        replay_only: never call the engine; a call that is not in the log raises CallNotLogged.
    """

    def __init__(
        self,
        engine: ChatEngine,
        root: Folder,
        shard: int,
        num_shards: int,
        *,
        limit: asyncio.Semaphore | None = None,
        replay_only: bool = False,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self.engine = engine
        self.identity: Mapping[str, Any] = engine.identity
        self.stats = Usage()
        self._root, self._folder = root, model_folder(root, self.identity)
        self._metered = engine if isinstance(engine, Metered) else None
        self._shard, self._num_shards = shard, num_shards
        self._writer = CallWriter(self._folder, shard, num_shards)
        self._limit = limit or asyncio.Semaphore(256)
        self._replay_only = replay_only
        self._flush_seconds = flush_seconds
        self._known: dict[str, Completion] = {}
        self._in_flight: dict[str, asyncio.Future[Completion]] = {}
        self._pending: list[dict[str, Any]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._stopped: str | None = None
        self._under_way, self._idle = 0, asyncio.Event()
        self._idle.set()
        self._writing = asyncio.Lock()  # CallWriter is not thread-safe: a periodic flush may overlap the last one.

    async def __aenter__(self) -> LoggedEngine:
        table = await asyncio.to_thread(read_calls, self._folder, self._shard, self._num_shards)
        for row in table.drop_columns(["messages", "sampling"]).to_pylist():
            known = self._known.get(row["call_key"])
            if known is None or known.finish_reason == _TOO_LONG:  # a reply takes precedence over a refusal
                self._known[row["call_key"]] = _from_row(row)
        await self._settle()
        self._flusher = asyncio.create_task(self._flush_forever())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Write pending replies, however the shard ended; merge the parts only after a success."""
        if self._flusher is not None:
            self._flusher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flusher
        try:
            await self.flush()
        except Exception as unwritten:
            if kind is None:
                raise
            # This must not hide the error that ended the shard (a dead engine, a stop).
            logger.warning("call log: %d calls were not written (%s)", len(self._pending), unwritten)
        if kind is None:
            async with self._writing:
                try:
                    await asyncio.to_thread(self._writer.compact)
                except (OSError, StoreError) as error:  # unmerged parts contain the same calls
                    logger.warning("call log: parts under %s stay unmerged (%s)", self._folder.location, error)

    def bound(self, prompt_id: str, role: str) -> BoundEngine:
        """A `ChatEngine` for the calls of one prompt in one role (for example `judge/helpfulness`)."""
        return BoundEngine(self, prompt_id, role)

    async def flush(self) -> None:
        """Write pending replies as one part; if that fails, they stay pending."""
        await self._settle()
        async with self._writing:
            rows, self._pending = self._pending, []
            if not rows:
                return
            try:
                await asyncio.to_thread(self._writer.flush, rows)
            except BaseException:
                self._pending = rows + self._pending
                raise

    async def _settle(self) -> None:
        """Write the cost of replies as often as the replies."""
        if self._replay_only or self._metered is None:
            return
        try:
            await self._metered.settle(self._root)
        except (OSError, StoreError) as error:
            logger.warning("cannot write spending under %s yet (%s)", self._root.location, error)

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(self._flush_seconds)
            try:
                await asyncio.shield(asyncio.ensure_future(self.flush()))
            except Exception as error:  # a full disk may have space again; only the last flush must succeed
                logger.warning("call log: cannot write under %s yet (%s)", self._folder.location, error)

    async def call(self, prompt_id: str, role: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        asked = sampling.key()
        key = call_key(self.identity, messages, asked)
        known = self._known.get(key)
        if known is not None and known.finish_reason != _TOO_LONG:
            self.stats.calls_log += 1
            return known
        if known is not None and self._replay_only:
            raise PromptTooLong(known.prompt_tokens, sampling.max_tokens, known.cached_tokens, known.text)
        if self._replay_only:
            raise CallNotLogged(
                f"the call log has no {role} call for prompt {prompt_id}; set calls.replay_only: false to make it"
            )
        while (running := self._in_flight.get(key)) is not None:
            try:
                completion = await asyncio.shield(running)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not running.cancelled() or (task is not None and task.cancelling()):
                    raise
                continue  # only the caller that made the call was cancelled: make the call instead
            self.stats.calls_shared += 1
            return completion
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = future
        try:
            completion = await self._ask(messages, sampling)
        except PromptTooLong as error:
            # Used in replays only: with an engine the limit may differ next time.
            if known is None:
                refused = Completion(error.reason, _TOO_LONG, error.prompt_tokens, 0, error.limit)
                self._remember(key, prompt_id, role, messages, asked, refused)
            self._fail(future, error)
            raise
        except BaseException as error:
            if isinstance(error, EngineError):
                self.stats.errors += 1
                self.stats.cost += error.unread_cost
            self._fail(future, error)
            raise
        finally:
            del self._in_flight[key]
        future.set_result(completion)
        self.stats.calls_engine += 1
        self.stats.prompt_tokens += completion.prompt_tokens
        self.stats.completion_tokens += completion.completion_tokens
        self.stats.cached_tokens += completion.cached_tokens
        self.stats.cost += completion.unread_cost
        self.stats.cost += self._metered.cost(completion) if self._metered is not None else 0.0
        self._remember(key, prompt_id, role, messages, asked, completion)
        return completion

    def stop(self, reason: str) -> None:
        """Make no further call: calls in progress are awaited and kept, every other call raises BudgetSpent."""
        self._stopped = self._stopped or reason

    async def _ask(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        async with self._limit:
            begin = time.monotonic()
            if self._stopped is None:
                self._under_way += 1
                self._idle.clear()
                try:
                    completion = await self.engine.chat(messages, sampling)
                finally:
                    self._under_way -= 1
                    if not self._under_way:
                        self._idle.set()
            else:
                completion = None
        if completion is None:
            # Raising immediately would cancel this shard's calls in progress.
            await self._idle.wait()
            raise BudgetSpent(self._stopped or "stopped")
        # What is returned must be what the log returns after a resume, so it is made storable here.
        return dataclasses.replace(
            completion,
            text=storable(completion.text),
            finish_reason=storable(completion.finish_reason),
            prompt_tokens=token_count(completion.prompt_tokens, prompt_token_estimate(messages)),
            completion_tokens=token_count(completion.completion_tokens, reply_token_estimate(completion.text)),
            cached_tokens=token_count(completion.cached_tokens),
            latency_s=completion.latency_s or time.monotonic() - begin,
        )

    @staticmethod
    def _fail(future: asyncio.Future[Completion], error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
            return
        future.set_exception(error)
        future.exception()  # mark it as retrieved: possibly no caller waits for the shared reply

    def _remember(
        self,
        key: str,
        prompt_id: str,
        role: str,
        messages: Sequence[Message],
        asked: dict[str, Any],
        completion: Completion,
    ) -> None:
        self._known[key] = dataclasses.replace(completion, from_log=True)
        self._pending.append(
            {
                "call_key": key,
                "bucket": bucket_of(prompt_id),
                "prompt_id": prompt_id,
                "model": json.dumps(dict(self.identity), sort_keys=True),
                "role": role,
                "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                "sampling": json.dumps(asked, sort_keys=True),
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "logprobs": None if completion.logprobs is None else json.dumps(completion.logprobs),
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": completion.completion_tokens,
                "cached_tokens": completion.cached_tokens,
                "latency_s": completion.latency_s,
            }
        )


#: finish_reason of a stored refusal; of such a row, `cached_tokens` is the context length that the prompt exceeds, and
#: `text` has the server's words.
_TOO_LONG = "too_long"


@dataclasses.dataclass(frozen=True)
class BoundEngine:
    """A `ChatEngine` that logs its calls under one prompt and one role."""

    log: LoggedEngine
    prompt_id: str
    role: str

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.log.identity

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        return await self.log.call(self.prompt_id, self.role, messages, sampling)


def _from_row(row: dict[str, Any]) -> Completion:
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
    )


__all__ = ["FLUSH_SECONDS", "BoundEngine", "CallNotLogged", "EngineDead", "LoggedEngine"]
