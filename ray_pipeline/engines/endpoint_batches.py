"""Calls in batches (`engine: openai_batch`): files of requests, answered within a day at a share of the price.

`post` of a `BatchConnection` waits until the call's batch is done. Calls are collected until none has come for a while,
uploaded as one file (`POST /files`), and made as one batch (`POST /batches`), which is looked at until it has ended.
What a reply or an error of a call means is decided as for single requests.

**Nothing is paid twice.** A call is known by the digest of its request, which is its `custom_id`. Every batch has a
record in the call log's folder, `batches-<digest>/<name>.json`, written before the upload. After a crash a call that is
in a recorded batch waits for that batch, and is not sent again. A batch that was made but whose number was not recorded
any more is found in the server's list by the file of its requests.

A call that its batch did not answer (the batch expired or was cancelled, or the line of the call has an error) is
retried like any other, in a later batch; what the batch did answer is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from ray_pipeline.engines.base import EngineError
from ray_pipeline.engines.batch_records import BATCHES, Batch, read_batches
from ray_pipeline.engines.endpoint_connection import Connection, Refuse, encoded
from ray_pipeline.engines.endpoint_errors import Again, Asked, clean
from ray_pipeline.engines.endpoint_retry import Retries
from ray_pipeline.engines.endpoint_settings import OpenAISpec
from ray_pipeline.engines.lifetime import Lifetime
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest
from ray_pipeline.store.outside import json_value

logger = logging.getLogger("quorum.openai")

#: Bytes of a file of requests; OpenAI takes 200 MB.
_FILE_BYTES = 100 << 20
#: Bytes of a file of replies.
_REPLIES_BYTES = 2 << 30
_PAGE, _PAGES = 100, 50  # of the server's list of batches
_PAGE_BYTES = 64 << 20
#: Seconds without a reply to questions about a batch, which takes hours, after which the run stops.
_PATIENCE_SECONDS = 3600.0

T = TypeVar("T")

Reply = tuple[int, Any]
"""HTTP status and body of a call's line."""


class BatchConnection(Connection):
    """A connection whose replies come from batches. The short call at the start is made directly."""

    def __init__(self, spec: OpenAISpec, lifetime: Lifetime) -> None:
        super().__init__(spec, lifetime)
        assert spec.batch is not None
        self._batch = spec.batch
        self._retries = Retries(spec, lifetime, self)
        patience = {"patience_s": max(spec.endpoint.patience_s, _PATIENCE_SECONDS)}
        patient = dataclasses.replace(spec, endpoint=spec.endpoint.model_copy(update=patience))
        self._waits = Retries(patient, lifetime, self)
        self._folder: Folder | None = None
        self._turn = asyncio.Lock()
        self._recorded: dict[str, Batch] = {}  # of a call: the newest batch with it whose reply was not taken
        self._gathering: _Gathering | None = None
        self._tasks: dict[str, asyncio.Task[Any]] = {}  # of a batch by its name: until it is sent, until it has ended

    async def settle(self, root: Folder) -> None:
        """Read the records under a call log's folder; the first one is used for the connection's lifetime."""
        async with self._turn:
            if self._folder is None:
                folder = root / f"{BATCHES}{digest([self._settings.address, self._spec.model], size=8)}"
                for batch in await asyncio.to_thread(read_batches, folder):
                    self._recorded.update(dict.fromkeys(batch.ids, batch))
                self._folder = folder

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await super().close()

    async def _reply(
        self, body: Mapping[str, Any], refused: Refuse, *, starting: bool, most_bytes: int, unread: Callable[[], None]
    ) -> Any:
        if starting:
            return await super()._reply(body, refused, starting=starting, most_bytes=most_bytes, unread=unread)
        call = digest(["request", body])
        batch = self._recorded.get(call)
        if batch is not None and not batch.id:
            await self._find(batch)
        if batch is None or not batch.id:
            batch = await self._sent(call, body)
        replies, fault = await self._once(f"{batch.name} ended", self._ended(batch))
        self._recorded.pop(call, None)  # a retry is sent in another batch
        if fault is not None:
            raise refused(400, {}, json.dumps({"error": fault}))
        if call not in replies:
            raise Again(f"batch {batch.id} is {batch.status} and has no reply to this call", "call")
        status, value = replies.pop(call)  # what was taken need not stay in memory
        if not 200 <= status < 300:
            raise refused(status, {}, json.dumps(value))
        return value

    async def _once(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work of this name, which is done once for all calls that wait for it."""
        if name in self._tasks:
            work.close()
        else:
            self._tasks[name] = asyncio.create_task(work, name=name)
            self._tasks[name].add_done_callback(functools.partial(self._forget, name))
        task: asyncio.Task[T] = self._tasks[name]
        return await asyncio.shield(task)

    def _forget(self, name: str, task: asyncio.Task[Any]) -> None:
        """What has failed is tried again by whoever asks next."""
        if task.cancelled() or task.exception() is not None:
            self._tasks.pop(name, None)

    # --- sending ------------------------------------------------------------------------------------------------------

    async def _sent(self, call: str, body: Mapping[str, Any]) -> Batch:
        """The batch with this call, once it is made."""
        gathering = self._gathering
        if gathering is None:
            gathering = self._gathering = _Gathering(uuid.uuid4().hex)
        gathering.add(call, body)
        if len(gathering.lines) >= self._batch.requests or gathering.size > _FILE_BYTES:
            gathering.full.set()
            self._gathering = None
        return await self._once(f"{gathering.name} sent", self._send(gathering))

    async def _send(self, gathering: _Gathering) -> Batch:
        """Make a batch of the calls that come until none has come for a while."""
        while not gathering.full.is_set() and (left := gathering.last + self._batch.quiet_s - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gathering.full.wait(), left)
        if self._gathering is gathering:
            self._gathering = None
        batch = Batch(gathering.name, list(gathering.lines), self._spec.model, created=time.time())
        await self._record(batch)
        self._recorded.update(dict.fromkeys(batch.ids, batch))
        together = self._batch.form == "together"
        form, kind = _form(gathering, together)
        file = await self._retries.persist(
            lambda: self._object("POST", "files/upload" if together else "files", form, kind)
        )
        batch.file = _text(file, "id")
        await self._record(batch)
        await self._make(batch)
        logger.info("batch %s: %d calls of %s", batch.id, len(batch.ids), self._spec.model)
        return batch

    async def _make(self, batch: Batch) -> None:
        """Ask for the batch. A request that failed on the way may have made it, so it is looked for before another."""
        asked = False

        async def once() -> tuple[str, str]:
            nonlocal asked
            if asked and batch.file in (found := await self._listed()):
                return found[batch.file]
            asked = True
            body = {
                "input_file_id": batch.file,
                "endpoint": "/v1/chat/completions",
                "completion_window": self._batch.window,
            }
            values = await self._object("POST", "batches", body)
            return _text(values, "id"), _text(values, "status").lower()

        batch.id, batch.status = await self._retries.persist(once)
        await self._record(batch)

    async def _record(self, batch: Batch) -> None:
        async with self._turn:  # so that the last write is that of the last state
            if self._folder is not None:
                await asyncio.to_thread(self._folder.write_json, f"{batch.name}.json", dataclasses.asdict(batch))

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def _find(self, batch: Batch) -> None:
        """Look for the number of a batch that was recorded and not seen to be made."""
        if (sending := self._tasks.get(f"{batch.name} sent")) is not None:
            await asyncio.shield(sending)
            return
        found = await self._once("list", self._listed()) if batch.file else {}
        if batch.file in found and not batch.id:
            batch.id, batch.status = found[batch.file]
            await self._record(batch)

    async def _listed(self) -> dict[str, tuple[str, str]]:
        """Number and status of the server's batches by the file of their requests; empty if it lists none."""
        found: dict[str, tuple[str, str]] = {}
        after = ""
        for _ in range(_PAGES):
            path = f"batches?limit={_PAGE}{after and f'&after={after}'}"
            try:
                page = await self._retries.persist(functools.partial(self._json, "GET", path))
            except EngineError as error:
                logger.warning("%s lists no batches (%s); calls may be sent twice", self._settings.address, error)
                break
            listed = page.get("data") if isinstance(page, Mapping) else page
            rows = [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
            for row in rows:
                if isinstance(file := row.get("input_file_id"), str):
                    found[file] = _text(row, "id"), _text(row, "status").lower()
            if not rows or not isinstance(page, Mapping) or not page.get("has_more"):
                break
            after = _text(rows[-1], "id")
        return found

    async def _ended(self, batch: Batch) -> tuple[dict[str, Reply], Any]:
        """The replies of a batch once it has ended, and why the server refused the whole batch, if it did."""
        while True:
            try:
                values = await self._waits.persist(lambda: self._object("GET", f"batches/{batch.id}"))
            except _Gone:  # servers keep batches for some weeks
                values = {"status": "expired"}
            if (status := _text(values, "status").lower()) != batch.status:
                batch.status = status
                await self._record(batch)
            if not batch.open:
                break
            await asyncio.sleep(self._batch.poll_s)
        replies: dict[str, Reply] = {}
        for key in ("error_file_id", "output_file_id"):
            if isinstance(file := values.get(key), str):
                with contextlib.suppress(_Gone):
                    replies |= _lines(await self._downloaded(file))
        faults = (values.get("errors") or {}).get("data") if isinstance(values.get("errors"), Mapping) else None
        refused = batch.status == "failed" and not replies
        return replies, (faults or [{"message": f"batch {batch.id} failed"}])[0] if refused else None

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _json(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Any:
        seconds = self._settings.timeout_s
        return await self._exchange(
            method, path, body, self._no, seconds=seconds, most_bytes=_PAGE_BYTES, content_type=content_type
        )

    async def _object(self, *request: Any) -> Mapping[str, Any]:
        """The description of a file or batch that a request is answered with."""
        value = await self._json(*request)
        if isinstance(value, Mapping) and isinstance(value.get("job"), Mapping):  # as Together answers
            value = value["job"]
        if not isinstance(value, Mapping):
            raise EngineError(f"{self._settings.address}/{request[1]} is answered with no object")
        return value

    async def _downloaded(self, file: str) -> bytes:
        limits: dict[str, Any] = {"seconds": self._settings.timeout_s, "most_bytes": _REPLIES_BYTES}
        return await self._waits.persist(
            lambda: self._content("GET", f"files/{file}/content", None, self._no, **limits)
        )

    def _no(self, status: int, headers: Mapping[str, str], body: str) -> Exception:
        """The exception for a refused request about files or batches."""
        if status == 404:
            return _Gone(clean(f"HTTP 404: {body[:200]}", self.key))
        return self._refusal(Asked((), False, 0, 0), status, headers, body)


class _Gone(EngineError):
    """The server does not know (any more) what a request is about."""


class _Gathering:
    """Calls that will be one batch."""

    def __init__(self, name: str) -> None:
        self.name, self.lines, self.size = name, dict[str, bytes](), 0
        self.last, self.full = time.monotonic(), asyncio.Event()

    def add(self, call: str, body: Mapping[str, Any]) -> None:
        line = {"custom_id": call, "method": "POST", "url": "/v1/chat/completions", "body": body}
        self.lines[call] = encoded(line)
        self.size += len(self.lines[call])
        self.last = time.monotonic()


def _form(gathering: _Gathering, together: bool) -> tuple[bytes, str]:
    """The file of requests as a multipart form, and its content type."""
    name = f"{gathering.name}.jsonl"
    fields = {"purpose": "batch-api", "file_name": name, "file_type": "jsonl"} if together else {"purpose": "batch"}
    head = f"--{gathering.name}\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{field}"\r\n\r\n{value}\r\n' for field, value in fields.items()]
    parts.append(f'{head}"file"; filename="{name}"\r\nContent-Type: application/jsonl\r\n\r\n')
    lines = b"\n".join(gathering.lines.values())
    form = b"".join(["".join(parts).encode(), lines, f"\n\r\n--{gathering.name}--\r\n".encode()])
    return form, f"multipart/form-data; boundary={gathering.name}"


def _lines(content: bytes) -> dict[str, Reply]:
    """Replies by `custom_id`; a line that cannot be read is none."""
    found: dict[str, Reply] = {}
    for line in content.decode("utf-8", "replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json_value(line)
            response = row.get("response")
            if response:
                found[row["custom_id"]] = int(response["status_code"]), response.get("body")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning("a line of a batch's replies cannot be read (%s)", error)
    return found


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise EngineError(f"the server's description of a file or batch has no {name}")
    return value
