"""The call log in front of an engine: a call with a stored reply is not made again.

One `LoggedEngine` serves one attempt at one shard. Agents get a view bound to a prompt and a role, which is an ordinary
`ChatEngine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_pipeline.engines.base import (
    BudgetSpent,
    ChatEngine,
    Completion,
    EngineError,
    EngineStop,
    Message,
    Metered,
    PromptTooLong,
    Sampling,
)
from ray_pipeline.engines.log_rows import call_row, completion_of
from ray_pipeline.engines.log_storage import LogStorage
from ray_pipeline.engines.thoughts import answered
from ray_pipeline.engines.usage import Usage, prompt_token_estimate, prompt_was_cut, reply_token_estimate
from ray_pipeline.store.calls import CallWriter, model_folder, put_back, read_calls, set_aside
from ray_pipeline.store.errors import NotWritten, StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import call_key
from ray_pipeline.store.outside import storable, token_count

logger = logging.getLogger("quorum.calls")

#: Age of a reply at which it is written, with all that came since: these can be lost when a process is killed. The
#: write itself comes on top.
FLUSH_SECONDS = 0.75
#: Longest wait before a failed write is repeated, in seconds.
_LONGEST_PAUSE = 5.0
#: Seconds between two looks of a call that waits for the storage at whether its shard was stopped.
_LOOK_SECONDS = 0.5


class CallNotLogged(RuntimeError):
    """A replay needs a call that is not in the log."""


class LoggedEngine:
    """Stores every reply of `engine` under `root`.

    Args:
        engine: answers calls that are not in the log; its `identity` is part of every key.
        root: folder of the call log; several runs may share it, also concurrently.
        limit: bounds the calls in flight on the engine, across all shards of an actor.
        storage: of the call log, shared by all shards of an actor.
        replay_only: never call the engine; a call that is not in the log raises CallNotLogged.
        warn: called with a line for each part of the log that cannot be read.

    Attributes:
        failed: reasons of the calls that failed, and not finally, by call key; a later reply removes its call.
        last_error: reason of the last call that failed or was rejected.
        unwritten: what became of replies that could not be written; "" if there are none.
    """

    def __init__(
        self,
        engine: ChatEngine,
        root: Folder,
        shard: int,
        num_shards: int,
        *,
        limit: asyncio.Semaphore | None = None,
        storage: LogStorage | None = None,
        replay_only: bool = False,
        flush_seconds: float = FLUSH_SECONDS,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self.engine, self._warn = engine, warn
        self.identity: Mapping[str, Any] = engine.identity
        self.stats = Usage()
        self.failed: dict[str, str] = {}
        self.last_error = ""
        self.unwritten = ""
        self._root, self._folder = root, model_folder(root, self.identity)
        self._elsewhere: Sequence[Mapping[str, Any]] = ()
        self._storage = storage or LogStorage(engine, root)
        self._metered = engine if isinstance(engine, Metered) else None
        self._keeps_thoughts = bool(getattr(engine, "keeps_thoughts", False))
        self._shard, self._num_shards = shard, num_shards
        self._writer = CallWriter(self._folder, shard, num_shards)
        self._limit = limit or asyncio.Semaphore(256)
        self._replay_only = replay_only
        self._flush_seconds = flush_seconds
        self._known: dict[str, Completion] = {}
        self._in_flight: dict[str, asyncio.Future[Completion]] = {}
        self._pending: list[dict[str, Any]] = []
        self._oldest, self._any_pending = 0.0, asyncio.Event()  # when the first pending reply came, if there is one
        self._flusher: asyncio.Task[None] | None = None
        self._stopped: str | None = None
        self._under_way, self._idle = 0, asyncio.Event()
        self._idle.set()
        self._writing = asyncio.Lock()  # CallWriter is not thread-safe: a periodic flush may overlap the last one.

    async def __aenter__(self) -> LoggedEngine:
        if not self._replay_only:
            await self._put_back()
        self._elsewhere = await self._storage.elsewhere(self._warn)
        for identity in (self.identity, *self._elsewhere):
            folder = model_folder(self._root, identity)
            listing = await self._storage.parts(folder)
            table = await asyncio.to_thread(read_calls, folder, self._shard, self._num_shards, self._warn, listing)
            for row in table.drop_columns(["messages", "sampling"]).to_pylist():
                known = self._known.get(row["call_key"])
                if known is None or known.finish_reason == _TOO_LONG:  # a reply takes precedence over a refusal
                    self._known[row["call_key"]] = answered(completion_of(row), self._keeps_thoughts)
        if not self._replay_only:
            await self._storage.enter()
            self._flusher = asyncio.create_task(self._flush_forever())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Write pending replies, however the shard ended; merge the parts only after a success.

        Raises:
            EngineStop: replies could not be written; see `unwritten`. Not after another error, which this must not hide
                (a dead engine, a stop).
        """
        if self._flusher is None:
            return
        self._flusher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._flusher
        try:
            await self._flush_at_last(patiently=kind is None)
        except EngineStop:
            if kind is None:
                raise
        finally:
            await self._storage.leave(self)
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
        """Write pending replies as one part; if that fails, they stay pending and new calls wait."""
        async with self._writing:
            rows, self._pending = self._pending, []
            self._any_pending.clear()
            if not rows:
                return
            oldest = self._oldest
            try:
                await self._storage.write(self, self._folder.location, functools.partial(self._writer.flush, rows))
            except BaseException:
                self._pending, self._oldest = rows + self._pending, oldest
                self._any_pending.set()
                raise

    async def save(self) -> None:
        """Keep pending replies before the process ends: in the call log, or else aside on this machine."""
        with contextlib.suppress(EngineStop):
            await self._flush_at_last()

    async def _flush_forever(self) -> None:
        pause = 0.0
        while True:
            await self._any_pending.wait()
            await asyncio.sleep(max(self._oldest + self._flush_seconds - time.monotonic(), pause))
            flush = asyncio.ensure_future(self.flush())
            flush.add_done_callback(lambda done: done.cancelled() or done.exception())  # the shard may have ended
            try:
                await asyncio.shield(flush)
                pause = 0.0
            except Exception as error:
                pause = self._longer(pause)
                logger.warning("call log: cannot write under %s yet (%s)", self._folder.location, error)

    def _longer(self, pause: float) -> float:
        return min(max(2 * pause, self._flush_seconds), _LONGEST_PAUSE)

    async def _flush_at_last(self, patiently: bool = False) -> None:
        """Flush, or set the replies aside and give the storage up: another attempt would have to pay for them again.

        Args:
            patiently: repeat a failed write as long as the storage is not given up and the shard may go on.

        Raises:
            EngineStop: they could not be written.
        """
        pause = 0.0
        while True:
            try:
                return await self.flush()
            except Exception as error:
                if not patiently or self._refusal() is not None:
                    self._storage.give_up()
                    await self._set_aside(error)
                    raise EngineStop(self._storage.stopped or str(error)) from error
            pause = self._longer(pause)
            await self._storage.ready(pause)

    async def _set_aside(self, why: Exception) -> None:
        rows, self._pending = self._pending, []
        self._any_pending.clear()
        try:
            place = await asyncio.to_thread(set_aside, self._folder, self._shard, self._num_shards, rows)
            self.unwritten = (
                f"{len(rows)} calls could not be written ({why}); they are kept in {place} on this machine, and the "
                "next run on it adds them to the call log"
            )
        except Exception as error:
            self.unwritten = f"{len(rows)} calls were not written ({why}), nor kept on this machine ({error})"
        logger.warning("call log: %s", self.unwritten)

    async def _put_back(self) -> None:
        """Raises EngineStop where calls that were set aside still cannot be written: they would be paid for again."""
        try:
            await asyncio.to_thread(put_back, self._folder)
        except NotWritten as error:
            raise EngineStop(str(error)) from error

    async def call(self, prompt_id: str, role: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        completion = await self._call(prompt_id, role, messages, sampling)
        # Of other engines, tokens are counted before the prompt is read, and never cut.
        figures = completion.prompt_tokens, completion.cached_tokens
        if self.identity.get("engine") == "openai" and prompt_was_cut(messages, *figures):
            self.stats.cut_prompts += 1
            return dataclasses.replace(completion, prompt_cut=True)
        return completion

    async def _call(self, prompt_id: str, role: str, messages: Sequence[Message], sampling: Sampling) -> Completion:
        asked = sampling.key()
        key = call_key(self.identity, messages, asked)
        known = self._known.get(key)
        for other in self._elsewhere if known is None else ():
            moved = self._known.get(call_key(other, messages, asked))
            known = moved if moved is not None and moved.finish_reason != _TOO_LONG else known
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
                self.last_error = str(error)
                if not error.final:
                    self.failed[key] = str(error)
            self._fail(future, error)
            raise
        finally:
            del self._in_flight[key]
        future.set_result(completion)
        self.failed.pop(key, None)
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
        self._flush_seconds = min(self._flush_seconds, 0.1)  # the process may have to end soon

    def _refusal(self) -> EngineStop | None:
        """Why no further call is made, or None."""
        if self._stopped is not None:
            return BudgetSpent(self._stopped)
        return None if self._storage.stopped is None else EngineStop(self._storage.stopped)

    async def _ask(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        async with self._limit:
            while not self._storage.is_ready and self._refusal() is None:
                await self._storage.ready(_LOOK_SECONDS)
            begin = time.monotonic()
            refusal = self._refusal()
            if refusal is None:
                self._under_way += 1
                self._idle.clear()
                try:
                    completion = await self.engine.chat(messages, sampling)
                finally:
                    self._under_way -= 1
                    if not self._under_way:
                        self._idle.set()
        if refusal is not None:
            # Raising immediately would cancel this shard's calls in progress.
            await self._idle.wait()
            raise refusal
        # What is returned must be what the log returns after a resume, so it is made storable here.
        reply = completion.raw or completion
        reply = dataclasses.replace(
            reply,
            text=storable(reply.text),
            finish_reason=storable(reply.finish_reason),
            reasoning=None if reply.reasoning is None else storable(reply.reasoning),
            answered_by=storable(reply.answered_by),
            prompt_tokens=token_count(reply.prompt_tokens, prompt_token_estimate(messages)),
            completion_tokens=token_count(reply.completion_tokens, reply_token_estimate(reply.text)),
            cached_tokens=token_count(reply.cached_tokens),
            latency_s=completion.latency_s or time.monotonic() - begin,
            unread_cost=completion.unread_cost,
        )
        return answered(reply, self._keeps_thoughts)

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
        if not self._any_pending.is_set():
            self._oldest = time.monotonic()
            self._any_pending.set()
        self._pending.append(call_row(key, prompt_id, self.identity, role, messages, asked, completion))


#: finish_reason of a stored refusal; of such a row, `cached_tokens` is the context length that the prompt exceeds, and
#: `text` has the server's words.
_TOO_LONG = "too_long"


@dataclasses.dataclass
class BoundEngine:
    """A `ChatEngine` that logs its calls under one prompt and one role.

    Attributes:
        cut_prompts: replies to prompts of which the server left out a part.
    """

    log: LoggedEngine
    prompt_id: str
    role: str
    cut_prompts: int = 0

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.log.identity

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        completion = await self.log.call(self.prompt_id, self.role, messages, sampling)
        self.cut_prompts += completion.prompt_cut
        return completion
