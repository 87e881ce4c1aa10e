"""Making one shard: read its inputs, run the stage's function, commit one Parquet file a table, give a receipt.

Nothing here depends on where it runs. An error becomes a receipt with the reason, and its traceback goes to the board.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from ray_pipeline.engines.base import EngineDead, EngineStop
from ray_pipeline.engines.log_storage import LogStorage
from ray_pipeline.engines.logged import CallNotLogged, LoggedEngine
from ray_pipeline.engines.sharing import open_shared
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.admission import OPEN_ROWS, Admission, Admitted
from ray_pipeline.graph.receipts import (
    Receipt,
    begin_attempt,
    calls_failed,
    committed,
    failed,
    failed_shard,
    give_up,
    mark_death,
    receipt_name,
    stopped_shard,
)
from ray_pipeline.graph.session import StageTask
from ray_pipeline.graph.shard_report import ShardReport
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, StageStop
from ray_pipeline.store.errors import DamagedFile
from ray_pipeline.store.files import Folder
from ray_pipeline.store.tables import ShardedTable

logger = logging.getLogger("quorum.shards")

#: Replies that are counted before they are reported to the board.
_REPLIES_AT_ONCE = 100
#: Calls in flight, where neither the user nor the engine says how many.
CONCURRENCY = 256
#: What ends the whole stage; any other error is of one shard.
_STOPS = (StageStop, EngineStop, CallNotLogged)


def sharded(task: StageTask) -> ShardWork:
    assert isinstance(task.work, ShardWork)
    return task.work


# --- with an engine -------------------------------------------------------------------------------------------------


class EngineHost:
    """Makes shards of LLM stages, several at once, on one engine.

    Args:
        tasks: of stages with the same placement, whose calls can go to one engine.
        devices: number of devices that the engine holds.
    """

    def __init__(self, tasks: Sequence[StageTask], devices: float = 1.0) -> None:
        self._tasks = {task.name: task for task in tasks}
        first = sharded(tasks[0])
        self.dead = False
        self._billed, self._devices = time.monotonic(), devices
        factories = [factory for task in tasks if (factory := sharded(task).engine) is not None]
        self._engine, engines = open_shared(factories)
        self._engines = dict(zip(self._tasks, engines, strict=True))
        self._making_seconds = time.monotonic() - self._billed
        self._start_reported = 0.0
        # A call that waits inside the engine could not be held back when the stage stops.
        concurrency = first.placement.concurrency
        if concurrency is None:
            concurrency = int(getattr(self._engine, "useful_concurrency", CONCURRENCY))
        concurrency = int(min(concurrency, getattr(self._engine, "concurrency", math.inf)))
        self._limit = asyncio.Semaphore(concurrency)
        self._admission = Admission(OPEN_ROWS * concurrency, first.placement.shards_in_flight)
        root = Folder(tasks[0].session.calls_root)
        self._storage = LogStorage(self._engine, root)
        self._open: dict[LoggedEngine, tuple[StageTask, int]] = {}
        self._watched: dict[tuple[str, str], collections.deque[bool]] = {}
        self._replies: dict[str, collections.Counter[tuple[str, bool]]] = {}
        self._notes_reported = 0
        self._worker = uuid.uuid4().hex[:8]
        self._phases: dict[str, str] = {}

    async def make(self, stage: str, shard: int) -> Receipt:
        """Make one shard, with retries.

        Raises:
            EngineDead: no call can succeed any more; a new host has to take the shard.
        """
        task = self._tasks[stage]
        try:
            async with self._admission.shard(stage) as admitted:
                if self.dead:
                    raise EngineDead("the engine died before this shard began")
                return await self._make(task, shard, admitted)
        except EngineDead:
            raise
        except Exception as error:
            return failed(task, shard, error)

    async def close(self) -> None:
        """End the engine, where it has something to end."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            await close()

    async def _make(self, task: StageTask, shard: int, admitted: Admitted) -> Receipt:
        """Retry the shard until it is committed, given up, or the stage stops."""
        policy, board = task.session.failure, task.session.board
        begun, deaths = await asyncio.to_thread(begin_attempt, task, shard)
        if begun > 1 and (before := await asyncio.to_thread(committed, task, shard)) is not None:
            return before  # the actor was lost with another shard of its batch
        if deaths >= policy.engine_deaths:
            return failed_shard(task, shard, f"EngineDead: given up, the engine died {deaths} times on this shard")
        lost = begun - deaths - 1
        if lost > policy.preemptions:
            return failed_shard(task, shard, f"Preempted: given up, its actor or node was lost {lost} times")
        if lost > 0:
            board.say(f"{task.name}: shard {shard} restarts: its actor or node was lost", shard)
        tries = 0
        while True:
            if reason := await asyncio.to_thread(board.stopping, task.name):
                return stopped_shard(task, shard, reason)
            receipt = await self._try(task, shard, admitted, last=tries == policy.retries)
            tries += 1
            if receipt.status != "failed" or tries > policy.retries:
                return receipt
            pause = policy.pause(tries)
            board.say(f"{task.name}: shard {shard} failed ({receipt.error}); again in {pause:g} s", shard)
            await asyncio.sleep(pause)

    async def _try(self, task: StageTask, shard: int, admitted: Admitted, last: bool) -> Receipt:
        """Make the shard once.

        Args:
            last: no retry follows in this session.
        """
        begin, session = time.monotonic(), task.session
        engine = LoggedEngine(
            self._engines[task.name],
            Folder(session.calls_root),
            shard,
            session.num_shards,
            limit=self._limit,
            storage=self._storage,
            replay_only=session.replay_only,
            warn=lambda line: session.board.say(f"{task.name}: {line}", shard),
        )
        report = ShardReport(task, engine.stats, self._bill, engine.stop, self._report_phase)
        self._open[engine] = (task, shard)
        committed = False
        try:
            async with engine:
                tables = await asyncio.to_thread(read_inputs, task, shard)
                watch = functools.partial(self._watch, task, engine)
                given = _given(task, shard, tables, engine, report, watch, admitted)
                reporter = asyncio.create_task(report.forever())
                try:
                    output = await sharded(task).function(given)  # type: ignore[misc]
                finally:
                    reporter.cancel()
            if engine.failed and not (last and await asyncio.to_thread(give_up, task, shard, engine.failed)):
                return calls_failed(task, shard, engine.failed)
            report.send()
            took = Usage(
                seconds=time.monotonic() - begin,
                device_seconds=report.device_seconds,
                start_seconds=self._start_seconds(),
            )
            receipt = await asyncio.to_thread(_commit, task, shard, output, engine.stats + took)
            committed = True
            return receipt
        except EngineDead as error:
            # Save what every shard on this engine has learnt: another engine goes on with it.
            logger.error("%s, shard %d: %s; the engine is given up", task.name, shard, error)
            if not self.dead:
                self.dead = True
                for its_task, its_shard in self._open.values():
                    mark_death(its_task, its_shard)
                await asyncio.gather(*(other.save() for other in self._open))
            raise
        except _STOPS as error:
            # The other shards come here one by one, find it on the board, or are answered by the log alone.
            return stopped_shard(task, shard, str(error))
        except Exception as error:
            return failed(task, shard, error, last)
        finally:
            self._open.pop(engine, None)
            admitted.forget()
            if not committed:
                report.forget_rows()
            report.send()
            if engine.unwritten:
                session.board.say(f"{task.name}: {engine.unwritten}", shard)
            self._report_notes(task)

    def _bill(self) -> float:
        """Device seconds since the last call: shards share the engine's devices, and each second counts once."""
        now = time.monotonic()
        passed, self._billed = now - self._billed, now
        return passed * self._devices

    def _start_seconds(self) -> float:
        """Device seconds of the engine's start that are in no receipt yet. They are paid for like the rest, and
        counted apart so that a plan does not take them for the time of calls. Most engines start with their first
        call."""
        start = (self._making_seconds + getattr(self._engine, "start_seconds", 0.0)) * self._devices
        new, self._start_reported = start - self._start_reported, start
        return new

    def _report_phase(self, task: StageTask) -> None:
        """Hand on whether the engine loads its model, which most do with their first call."""
        phase = "loading model" if getattr(self._engine, "loading", False) else ""
        if self._phases.get(task.name) != phase:
            self._phases[task.name] = phase
            task.session.board.phase(task.name, phase, self._worker)

    def _report_notes(self, task: StageTask) -> None:
        """Hand on the engine's notes for the user (structured output that a server refuses, say)."""
        self._report_replies(task)
        notes = getattr(self._engine, "notes", ())
        for note in notes[self._notes_reported :]:
            task.session.board.say(f"{task.name}: {note}")
        self._notes_reported = len(notes)

    def _report_replies(self, task: StageTask) -> None:
        """Hand on how many replies could be read, by judge."""
        if replies := self._replies.pop(task.name, None):
            task.session.board.replies(task.name, dict(replies))

    def _watch(self, task: StageTask, engine: LoggedEngine, judge: str, read: bool) -> None:
        """Stop the stage when too many of a judge's last replies could not be read."""
        policy, replies = task.session.failure, self._replies.setdefault(task.name, collections.Counter())
        replies[judge, read] += 1
        if replies.total() >= _REPLIES_AT_ONCE:
            self._report_replies(task)
        window = self._watched.setdefault((task.name, judge), collections.deque(maxlen=policy.error_window))
        window.append(read)
        unread = window.count(False) if not read else 0
        if len(window) >= max(1, policy.error_window // 4) and unread > policy.max_error_rate * len(window):
            raise StageStop(
                f"{unread} of the last {len(window)} replies of {judge} could not be read "
                f"({unread / len(window):.0%}, allowed {policy.max_error_rate:.0%}). "
                + (
                    f"The last call failed: {engine.last_error}. Rerun the same command when the reason is gone"
                    if engine.last_error
                    else "The call log has the replies; a wrong model, a wrong template or a grammar that is turned "
                    "off are the usual reasons"
                )
            )


# --- without an engine ------------------------------------------------------------------------------------------------


def make_columnar(task: StageTask, shard: int) -> Receipt:
    """Make one shard of a stage without an engine, with retries."""
    policy, tries = task.session.failure, 0
    try:
        while True:
            if reason := task.session.board.stopping(task.name):
                return stopped_shard(task, shard, reason)
            receipt = _try_columnar(task, shard, last=tries == policy.retries)
            tries += 1
            if receipt.status != "failed" or tries > policy.retries:
                return receipt
            time.sleep(policy.pause(tries))
    except Exception as error:
        return failed(task, shard, error)


def _try_columnar(task: StageTask, shard: int, last: bool) -> Receipt:
    begin = time.monotonic()
    try:
        report = ShardReport(task, Usage())
        given = _given(task, shard, read_inputs(task, shard), None, report, lambda *_: None)
        output: ShardOutput = sharded(task).function(given)  # type: ignore[assignment]
        receipt = _commit(task, shard, output, Usage(seconds=time.monotonic() - begin))
        report.send()
        return receipt
    except StageStop as error:
        return stopped_shard(task, shard, str(error))
    except Exception as error:
        return failed(task, shard, error, last)


# --- pieces of both ---------------------------------------------------------------------------------------------------


def _given(
    task: StageTask,
    shard: int,
    tables: Mapping[str, pa.Table],
    engine: LoggedEngine | None,
    report: ShardReport,
    watch: Callable[[str, bool], None],
    admitted: Admitted | None = None,
) -> ShardInput:
    read = sum(table.num_rows for table in tables.values())

    def tick(rows: int) -> None:
        report.tick(rows)
        if admitted is not None:
            admitted.tick(rows)

    def plan(rows: int) -> None:
        report.plan(rows, read)
        if admitted is not None:
            admitted.plan(rows)

    return ShardInput(
        shard,
        task.session.num_shards,
        tables,
        task.facts,
        engine,
        sharded(task).settings,
        tick,
        watch,
        plan,
    )


def tables_by_role(task: StageTask) -> dict[str, ShardedTable]:
    """The tables that a stage reads: by role, or `role.kind` where a stage writes several."""
    return {
        role if len(parent.tables) == 1 else f"{role}.{kind}": parent.table(kind)
        for role, parent in task.inputs.items()
        for kind in parent.tables
    }


def read_inputs(task: StageTask, shard: int) -> dict[str, pa.Table]:
    """Raises StageStop where an input is damaged, or missing: a stage begins when all of it is written, so this node,
    which may have joined after the run began, does not see the run folder."""
    try:
        return {role: table.read(shard) for role, table in tables_by_role(task).items()}
    except DamagedFile as error:
        raise StageStop(str(error)) from error
    except FileNotFoundError as error:
        from ray.util import get_node_ip_address

        raise StageStop(
            f"{error}: the node {get_node_ip_address()} does not see it. Mount the run folder on every node, "
            "also on those that join later, or use a URI such as s3://bucket/run; then rerun the same command"
        ) from error


def _commit(task: StageTask, shard: int, output: ShardOutput, usage: Usage) -> Receipt:
    """Write the receipt, then the tables: a shard that is there has its receipt, whatever happens in between."""
    if set(output.tables) != set(task.ref.tables):
        raise ValueError(f"{task.name} made {sorted(output.tables)}, not {sorted(task.ref.tables)}")
    rows = {kind: table.num_rows for kind, table in output.tables.items()}
    receipt = Receipt(task.name, shard, "ok", rows, dict(output.counts), usage.plain())
    (Folder(task.ref.folder) / "_receipts").write_json(receipt_name(shard), dataclasses.asdict(receipt))
    for kind, table in output.tables.items():
        task.ref.table(kind).write(shard, table)
    return receipt
