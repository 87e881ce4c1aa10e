"""Which shards of an actor are open: as many as it takes to keep its calls in flight full, and no more."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator

#: Rows open for each call that may be in flight: one being answered, and one waiting while the next shard is read.
OPEN_ROWS = 2


class Admission:
    """Admits shards in the order in which they come while fewer than `most` rows are open. A row is open from the
    moment its shard is read until it is done, and has at least one call in flight or waiting all that time.

    Args:
        places: shards that fill the room as long as no shard of their stage has been read.
    """

    def __init__(self, most: int, places: int) -> None:
        self._most, self._first = most, most / places
        self._open = 0.0
        self._usual: dict[str, float] = {}  # by stage: rows of the shard read last
        self._waiting: collections.deque[Admitted] = collections.deque()

    @contextlib.asynccontextmanager
    async def shard(self, stage: str) -> AsyncIterator[Admitted]:
        """Wait until the shard may begin."""
        admitted = Admitted(self, stage)
        self._waiting.append(admitted)
        try:
            self._admit()
            await admitted.turn.wait()
            yield admitted
        finally:
            if admitted in self._waiting:
                self._waiting.remove(admitted)
            admitted.forget()

    def learn(self, stage: str, rows: int) -> None:
        """A shard of the stage was read."""
        self._usual[stage] = max(rows, 1)

    def add(self, rows: float) -> None:
        """So many more rows are open, or fewer."""
        self._open += rows
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._open < self._most:
            admitted = self._waiting.popleft()
            admitted.rows = self._usual.get(admitted.stage, self._first)
            self._open += admitted.rows
            admitted.turn.set()


class Admitted:
    """A shard that is open, or waits; `rows` of it are open."""

    def __init__(self, admission: Admission, stage: str) -> None:
        self.stage, self.rows, self.turn = stage, 0.0, asyncio.Event()
        self._admission = admission

    def plan(self, rows: int) -> None:
        """The shard has so many rows; until now as many were assumed as in the one before."""
        self._admission.learn(self.stage, rows)
        self._set(rows)

    def tick(self, rows: int) -> None:
        """So many of them are done."""
        self._set(max(self.rows - rows, 0))

    def forget(self) -> None:
        """None of its rows is open any more."""
        self._set(0)

    def _set(self, rows: float) -> None:
        change, self.rows = rows - self.rows, rows
        self._admission.add(change)
