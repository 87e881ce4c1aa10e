"""What a shard has done, sent to the progress board while the shard is made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.session import StageTask

#: Seconds between two reports of a worker to the progress board.
REPORT_SECONDS = 0.5


class ShardReport:
    """Sends what a shard has done to the progress board, as differences, and stops the shard when the board says so.

    Args:
        bill: device seconds that are not reported yet.
        stop: called with the reason when the stage should end.
        look: called at every report while the shard is made.
    """

    def __init__(
        self,
        task: StageTask,
        stats: Usage,
        bill: Callable[[], float] = lambda: 0.0,
        stop: Callable[[str], None] = lambda reason: None,
        look: Callable[[StageTask], None] = lambda task: None,
    ) -> None:
        self._task, self._stage, self._board = task, task.name, task.session.board
        self._stats, self._bill, self._stop, self._look = stats, bill, stop, look
        self._rows = self._rows_sent = 0
        self._planned = (0, 0)
        self._sent = Usage()
        self.device_seconds = 0.0

    def tick(self, rows: int) -> None:
        self._rows += rows

    def plan(self, rows: int, read: int) -> None:
        """Note how many rows the shard will have, and of how many rows it makes them."""
        self._planned = (rows, read)
        self._board.add(self._stage, Usage(), planned=rows, read=read)

    def forget_rows(self) -> None:
        """The shard is not done; if it is made again, its rows will be counted again."""
        self._rows = 0
        if any(self._planned):
            self.plan(*(-count for count in self._planned))
            self._planned = (0, 0)

    async def forever(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self._look(self._task)
            self.send()
            if reason := await asyncio.to_thread(self._board.stopping, self._stage):
                self._stop(reason)

    def send(self) -> None:
        """Report what is new."""
        self.device_seconds += self._bill()
        now = self._stats + Usage(device_seconds=self.device_seconds)
        rows, change = self._rows - self._rows_sent, now - self._sent
        if rows or change:
            self._rows_sent, self._sent = self._rows, now
            self._board.add(self._stage, change, rows=rows)
