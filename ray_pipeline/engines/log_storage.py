"""The storage under an engine's call log, as all shards on the engine see it: who writes, and whether that works.

No call starts while its reply could not be kept. A failed write, or one that takes too long, makes new calls wait;
the shard repeats the write with back-off. After a time the storage is given up, which stops the stage.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from ray_pipeline.engines.base import ChatEngine, Metered
from ray_pipeline.store.calls import Listing, identities
from ray_pipeline.store.errors import NotWritten, StoreError, not_written
from ray_pipeline.store.files import Folder

logger = logging.getLogger("quorum.calls")

#: Seconds between two writes of an engine's spending.
SETTLE_SECONDS = 1.0
#: Seconds that failed writes are repeated before the stage stops.
PATIENCE_SECONDS = 60.0
#: Seconds after which a write under way is treated as a failed one: some clients of object stores retry for minutes.
LATE_SECONDS = 10.0


class LogStorage:
    """Shared by the `LoggedEngine`s of one engine in one process.

    Args:
        root: folder of the call log.
        writers: writes at the same time. A shard has at most one, so as many as shards in flight never wait.

    Attributes:
        stopped: why no call can be kept any more, with the remedy; None while it can, or may be able to soon.
    """

    def __init__(self, engine: ChatEngine, root: Folder, writers: int = 64) -> None:
        self.stopped: str | None = None
        self._root, self._metered = root, engine if isinstance(engine, Metered) else None
        self._has_moved = getattr(engine, "has_moved", None)
        self._elsewhere: list[dict[str, Any]] | None = None
        self._threads = concurrent.futures.ThreadPoolExecutor(writers, thread_name_prefix="quorum-calls")
        self._looking = asyncio.Lock()
        self._listings: dict[str, asyncio.Task[Listing]] = {}  # folder → its next listing, which has not begun
        self._listing = asyncio.Lock()
        self._open = 0
        self._settler: asyncio.Task[None] | None = None
        self._failing: dict[object, str] = {}  # shard → why its replies are unwritten
        self._deadline: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    async def elsewhere(self, warn: Callable[[str], None]) -> list[dict[str, Any]]:
        """Identities under which the log has calls of the engine's model at other addresses.

        Args:
            warn: called once with a line for the user if there are any.
        """
        if self._has_moved is None:
            return []
        async with self._looking:
            if self._elsewhere is None:
                known = await asyncio.to_thread(identities, self._root)
                self._elsewhere = [other for other in known if self._has_moved(other)]
                if self._elsewhere:
                    places = ", ".join(sorted({other["model"].removeprefix("endpoint:") for other in self._elsewhere}))
                    warn(
                        f"calls of the same model stored for another address are used ({places}); if other weights "
                        "have the same name, set the model's endpoint.identity"
                    )
        return self._elsewhere

    async def parts(self, folder: Folder) -> Listing:
        """The parts in a model's folder, by a listing that begins after this call.

        Shards that begin together share one: a listing for each of them would take quadratic time.
        """
        if folder.location not in self._listings:
            self._listings[folder.location] = asyncio.create_task(self._list(folder))
        return await asyncio.shield(self._listings[folder.location])

    async def _list(self, folder: Folder) -> Listing:
        async with self._listing:
            del self._listings[folder.location]  # what is written from now on may be missing in it
            return await asyncio.to_thread(Listing, folder)

    # --- spending -----------------------------------------------------------------------------------------------------

    async def enter(self) -> None:
        """A shard begins: know what other engines have spent."""
        self._open += 1
        if self._metered is not None:
            await self._settle(self._metered)
            if self._settler is None:
                self._settler = asyncio.create_task(self._settle_forever(self._metered))

    async def leave(self, shard: object) -> None:
        """A shard ended: its spending is written before its receipt."""
        self._open -= 1
        self._succeeded(shard)
        if self._metered is None:
            return
        if not self._open and self._settler is not None:
            self._settler.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._settler
            self._settler = None
        await self._settle(self._metered)

    async def _settle_forever(self, metered: Metered) -> None:
        while True:
            await asyncio.sleep(SETTLE_SECONDS)
            await self._settle(metered)

    async def _settle(self, metered: Metered) -> None:
        try:
            await metered.settle(self._root)
        except (OSError, StoreError) as error:
            logger.warning("cannot write spending under %s yet (%s)", self._root.location, error)

    # --- replies ------------------------------------------------------------------------------------------------------

    async def write(self, shard: object, location: str, work: Callable[[], None]) -> None:
        """Do one shard's write in a thread. Raises what it raises, after new calls have been made to wait."""
        loop = asyncio.get_running_loop()
        no_response = OSError(f"no response for {LATE_SECONDS:g} s")
        late = loop.call_later(LATE_SECONDS, self._failed, shard, location, no_response)
        try:
            await loop.run_in_executor(self._threads, work)
        except Exception as error:
            self._failed(shard, location, error)
            raise
        else:
            self._succeeded(shard)
        finally:
            late.cancel()

    async def ready(self, seconds: float) -> None:
        """Return once replies can be written or never will be, at the latest after some seconds."""
        if not self._writable.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._writable.wait(), seconds)

    @property
    def is_ready(self) -> bool:
        return self._writable.is_set()

    def give_up(self) -> None:
        """Stop waiting for failed writes: no further call is made on the engine."""
        if self._failing and self.stopped is None:
            self.stopped = next(iter(self._failing.values()))
            self._writable.set()

    def _failed(self, shard: object, location: str, error: Exception) -> None:
        if not isinstance(error, NotWritten):
            error = not_written(location, error if isinstance(error, OSError) else OSError(str(error)))
        self._failing[shard] = str(error)
        if self.stopped is None:
            self._writable.clear()
            if self._deadline is None:
                self._deadline = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self.give_up)

    def _succeeded(self, shard: object) -> None:
        self._failing.pop(shard, None)
        if not self._failing and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            self._writable.set()
