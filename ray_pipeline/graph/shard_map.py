"""Ray Data maps the missing shards of a stage over actors (with an engine) or tasks (without).

A row of the Ray Dataset is a shard number. Whoever gets it reads its shard of the inputs, runs the stage's function,
commits one Parquet file a table, and yields a receipt. Text never travels through Ray.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import os
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from ray_pipeline.engines.base import BudgetSpent, ChatEngine, EngineDead, EngineStop
from ray_pipeline.engines.logged import CallNotLogged, CallStats, LoggedEngine
from ray_pipeline.graph.failures import FailurePolicy
from ray_pipeline.graph.models import Placement
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, StageStop, stage_table
from ray_pipeline.store.files import Folder, StoreError
from ray_pipeline.store.tables import ShardedTable

logger = logging.getLogger("quorum.shards")

#: Shares of the shards that a pool can have in flight: from the first on it grows, at the second it may shrink.
GROW_AT, SHRINK_AT = 0.25, 0.1
#: Seconds between two reports of a worker to the progress board.
REPORT_SECONDS = 0.5
#: Replies that are counted before the board hears of them.
_REPLIES_AT_ONCE = 100
#: What ends the whole stage; any other error is of one shard.
_STOPS = (StageStop, EngineStop, CallNotLogged)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Everything that a worker needs to make any shard of one stage."""

    stage: str
    folder: str
    fingerprint: str
    num_shards: int
    work: ShardWork
    inputs: Mapping[str, ShardedTable]
    facts: Mapping[str, Mapping[str, Any]]
    calls_root: str
    session: str
    replay_only: bool
    board: Any
    policy: FailurePolicy = dataclasses.field(default_factory=FailurePolicy)

    def output(self, kind: str) -> ShardedTable:
        return stage_table(self.folder, self.work.tables, kind, self.num_shards, self.fingerprint)


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What became of one shard. `usage` holds calls, tokens and seconds; `counts` is deterministic.

    `status` is ok, failed, or stopped (nothing is wrong with the shard, but no more may be spent).
    """

    shard: int
    status: str
    rows: Mapping[str, int]
    counts: Mapping[str, int]
    usage: Mapping[str, float]
    error: str | None = None


def receipt_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def _engine_room(work: ShardWork, placement: Placement) -> dict[str, Any]:
    """Ray's resource arguments of an actor with an engine."""
    num_gpus = placement.num_gpus
    if num_gpus is None:
        factory_spec = getattr(work.engine, "args", ())
        # The specification of an engine that is elsewhere (an endpoint) has no such field.
        wanted = getattr(factory_spec[0], "tensor_parallel_size", 0) if factory_spec else 1
        num_gpus = wanted if ray.cluster_resources().get("GPU", 0) else 0
    room: dict[str, Any] = {"num_cpus": placement.num_cpus, "num_gpus": num_gpus}
    if placement.label_selector:
        room["label_selector"] = placement.label_selector
    if placement.resources:
        room["resources"] = placement.resources
    return room


def _pool(placement: Placement, shards: int) -> ActorPoolStrategy:
    """All actors that are allowed are asked for at once: what has no place yet waits for a node that joins, and tells
    the autoscaler that one is wanted."""
    actors = min(placement.max_actors, shards)
    return ActorPoolStrategy(
        min_size=min(placement.min_actors, actors),
        max_size=actors,
        initial_size=actors,
        max_tasks_in_flight_per_actor=placement.shards_in_flight,
        max_concurrent_calls_per_actor=placement.shards_in_flight,
    )


def check_room(stage: str, work: ShardWork) -> None:
    """Refuse a pool that would hold every CPU: Ray Data then waits for ever.

    Raises:
        StageStop: naming the stage and the numbers.
    """
    placement = work.placement
    cpus = ray.cluster_resources().get("CPU", 0)
    wanted = placement.max_actors * placement.num_cpus
    if wanted and wanted > cpus - 1:
        raise StageStop(
            f"{stage}: {placement.max_actors} actors × {placement.num_cpus:g} CPUs leave none of the cluster's "
            f"{cpus:g} CPUs for Ray Data, which would hang. Lower placement.max_actors or placement.num_cpus "
            "(0 is fine for engines)"
        )


def map_shards(job: ShardJob, shards: list[int]) -> Iterable[Receipt]:
    """Make the given shards; yields a receipt as each is done, in the order in which they end.

    Raises:
        StageStop: a worker found a reason to stop the whole stage.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data gives back actors beyond the GPUs that are there now, and asks for them again when the pool is busy
    # enough. Its own measure of busy (1.75 times what the actors can do at once) is never reached by a pool that is
    # given no more than that.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = GROW_AT
    context.autoscaling_config.actor_pool_util_downscaling_threshold = SHRINK_AT
    dataset: ray.data.Dataset = ray.data.from_items([{"shard": s} for s in shards], override_num_blocks=len(shards))
    if job.work.engine is not None:
        placement = job.work.placement
        check_room(job.stage, job.work)
        dataset = dataset.map_batches(
            ShardActor,
            batch_size=1,
            fn_constructor_args=(job,),
            compute=_pool(placement, len(shards)),
            **_engine_room(job.work, placement),
        )
    else:
        dataset = dataset.map_batches(make_shard, batch_size=1, fn_args=(job,), compute=TaskPoolStrategy(), num_cpus=1)  # type: ignore[arg-type]
    try:
        for row in dataset.iter_rows():
            yield Receipt(**json.loads(row["receipt"]))
    except ray.exceptions.RayError as error:
        raise _reason(job, error) from error


def _leave_reason(job: ShardJob, error: BaseException) -> None:
    """Write down why a worker stops the stage: of an error in a worker, Ray hands on a text full of stack frames."""
    reason = str(error) if isinstance(error, _STOPS) else _describe(error)
    with contextlib.suppress(OSError, StoreError):  # the error itself is what counts
        (Folder(job.folder) / "_attempts").write_json(f"stop-{job.session}.json", {"reason": reason})


def _reason(job: ShardJob, error: BaseException) -> BaseException:
    """The error that a worker stopped for, or what Ray says when none left a word."""
    try:
        return StageStop((Folder(job.folder) / "_attempts").read_json(f"stop-{job.session}.json")["reason"])
    except (FileNotFoundError, StoreError):
        return error


class ShardActor:
    """Makes shards of an LLM stage, several at once, on one engine."""

    def __init__(self, job: ShardJob) -> None:
        self._job = job
        assert job.work.engine is not None
        self._billed, self._devices = time.monotonic(), _devices()
        self._engine: ChatEngine = job.work.engine()
        # Paid for like the rest, and told apart: a plan must not take it for the time of calls.
        self._start_seconds = (time.monotonic() - self._billed) * self._devices
        self._limit: asyncio.Semaphore | None = None
        self._open: dict[LoggedEngine, int] = {}
        self._watched: dict[str, collections.deque[bool]] = {}
        self._replies: collections.Counter[tuple[str, bool]] = collections.Counter()
        self._told = 0

    async def __call__(self, batch: Mapping[str, Any]) -> Any:
        if self._limit is None:
            self._limit = asyncio.Semaphore(self._job.work.placement.concurrency)
        try:
            receipt = await self._make(int(batch["shard"][0]))
        except Exception as error:
            # Ray ends the actor with this error, and what its other shards were answered would be lost.
            for other in list(self._open):
                with contextlib.suppress(OSError, StoreError):
                    await other.flush()
            await asyncio.to_thread(_leave_reason, self._job, error)
            raise
        yield {"receipt": [json.dumps(dataclasses.asdict(receipt))]}

    async def _make(self, shard: int) -> Receipt:
        """Try a shard until it is there, it was given up, or nobody may go on."""
        job, policy = self._job, self._job.policy
        begun, deaths = await asyncio.to_thread(_begin_attempt, job, shard)
        if deaths >= policy.engine_deaths:
            return _failed(job, shard, f"EngineDead: given up, the engine died {deaths} times on this shard")
        if begun - deaths - 1 > policy.preemptions:
            return _failed(job, shard, f"Preempted: given up, its actor or node was lost {begun - deaths - 1} times")
        if begun - deaths > 1 and job.board is not None:
            job.board.say.remote(f"{job.stage}: shard {shard} begins anew, its actor or node was lost", shard)
        tries = 0
        while True:
            reason = await job.board.stopping.remote(job.stage) if job.board is not None else None
            if reason:
                return dataclasses.replace(_failed(job, shard, reason), status="stopped")
            receipt = await self._try(shard)
            tries += 1
            if receipt.status != "failed" or tries > policy.retries:
                return receipt
            if job.board is not None:
                job.board.say.remote(
                    f"{job.stage}: shard {shard} failed ({receipt.error}); again in {policy.pause(tries):g} s", shard
                )
            await asyncio.sleep(policy.pause(tries))

    async def _try(self, shard: int) -> Receipt:
        job, begin = self._job, time.monotonic()
        engine = LoggedEngine(
            self._engine,
            Folder(job.calls_root),
            shard,
            job.num_shards,
            limit=self._limit,
            replay_only=job.replay_only,
        )
        report = _Report(job, engine.stats, self._bill, engine.stop)
        self._open[engine] = shard
        try:
            async with engine:
                tables = await asyncio.to_thread(_read_inputs, job, shard)
                given = ShardInput(
                    shard, job.num_shards, tables, job.facts, engine, job.work.settings, report.tick, self._watch
                )
                reporter = asyncio.create_task(report.forever())
                try:
                    output = await job.work.function(given)  # type: ignore[misc]
                finally:
                    reporter.cancel()
            report.send()
            spent = {
                "seconds": time.monotonic() - begin,
                "device_seconds": report.device_seconds,
                "start_seconds": self._start_seconds,
            }
            self._start_seconds = 0.0
            return await asyncio.to_thread(_commit, job, shard, output, {**dataclasses.asdict(engine.stats), **spent})
        except EngineDead as error:
            # No call can succeed any more. Save what every shard of this actor has learnt, then end the process:
            # Ray Data replaces the actor and gives the shards to the new one.
            logger.error("%s, shard %d: %s; the actor ends itself", job.stage, shard, error)
            for other, number in list(self._open.items()):
                _mark_death(job, number)
                await other.flush()
            os._exit(1)
        except BudgetSpent as error:
            # No call is under way. The other shards come here one by one, or are answered by the log alone.
            return dataclasses.replace(_failed(job, shard, str(error)), status="stopped")
        except _STOPS:
            raise
        except Exception as error:
            logger.exception("%s, shard %d", job.stage, shard)
            return _failed(job, shard, _describe(error))
        finally:
            self._open.pop(engine, None)
            report.send()
            self._tell()

    def _bill(self) -> float:
        """Device seconds since somebody last asked: shards of an actor share its devices, each second counts once."""
        now = time.monotonic()
        passed, self._billed = now - self._billed, now
        return passed * self._devices

    def _tell(self) -> None:
        """Hand on what the engine wants the user to know (structured output that a server refuses, say)."""
        self._count_replies()
        notes = getattr(self._engine, "notes", ())
        if self._job.board is not None:
            for note in notes[self._told :]:
                self._job.board.say.remote(f"{self._job.stage}: {note}")
        self._told = len(notes)

    def _count_replies(self) -> None:
        """Hand on how many replies could be read, judge by judge."""
        if self._replies and self._job.board is not None:
            self._job.board.replies.remote(self._job.stage, dict(self._replies))
        self._replies.clear()

    def _watch(self, judge: str, read: bool) -> None:
        """Stop the stage when too many of a judge's last replies could not be read."""
        work = self._job.work
        self._replies[judge, read] += 1
        if self._replies.total() >= _REPLIES_AT_ONCE:
            self._count_replies()
        window = self._watched.setdefault(judge, collections.deque(maxlen=work.error_window))
        window.append(read)
        unread = window.count(False) if not read else 0
        if len(window) >= max(1, work.error_window // 4) and unread > work.max_error_rate * len(window):
            raise StageStop(
                f"{self._job.stage}: {unread} of the last {len(window)} replies of {judge} could not be read "
                f"({unread / len(window):.0%}, allowed {work.max_error_rate:.0%}). The call log holds what it says; "
                "a wrong model, a wrong template or a grammar that is turned off are the usual reasons"
            )


def make_shard(batch: dict[str, Any], job: ShardJob) -> dict[str, Any]:
    """Make one shard of a columnar stage."""
    try:
        receipt = _make_columnar(job, int(batch["shard"][0]))
    except Exception as error:
        _leave_reason(job, error)
        raise
    return {"receipt": [json.dumps(dataclasses.asdict(receipt))]}


def _make_columnar(job: ShardJob, shard: int) -> Receipt:
    tries = 0
    while True:
        reason = ray.get(job.board.stopping.remote(job.stage)) if job.board is not None else None
        if reason:
            return dataclasses.replace(_failed(job, shard, reason), status="stopped")
        receipt = _try_columnar(job, shard)
        tries += 1
        if receipt.status != "failed" or tries > job.policy.retries:
            return receipt
        time.sleep(job.policy.pause(tries))


def _try_columnar(job: ShardJob, shard: int) -> Receipt:
    begin = time.monotonic()
    try:
        tables = _read_inputs(job, shard)
        report = _Report(job, CallStats())
        given = ShardInput(
            shard, job.num_shards, tables, job.facts, None, job.work.settings, report.tick, lambda *_: None
        )
        output: ShardOutput = job.work.function(given)  # type: ignore[assignment]
        receipt = _commit(job, shard, output, {"seconds": time.monotonic() - begin})
        report.send()
        return receipt
    except StageStop:
        raise
    except Exception as error:
        logger.exception("%s, shard %d", job.stage, shard)
        return _failed(job, shard, _describe(error))


async def all_of(coroutines: Iterable[Awaitable[T]]) -> list[T]:
    """Await all, in order; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[T]] = [group.create_task(c) for c in coroutines]  # type: ignore[arg-type]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]


class _Report:
    """Sends what a shard has done to the progress board, as differences, and hears from it when to stop.

    Args:
        bill: device seconds that nobody has reported yet.
        stop: called with the reason when the board wants the stage to end.
    """

    def __init__(
        self,
        job: ShardJob,
        stats: CallStats,
        bill: Callable[[], float] = lambda: 0.0,
        stop: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._job, self._stats, self._bill, self._stop = job, stats, bill, stop
        self._rows = 0
        self._sent: dict[str, float] = {}
        self.device_seconds = 0.0

    def tick(self, rows: int) -> None:
        self._rows += rows

    async def forever(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            answer = self.send()
            if answer is not None and (reason := await answer):
                self._stop(reason)

    def send(self) -> Any:
        """Report what is new; returns what the board answers, to be awaited, or None when there is nothing new."""
        if self._job.board is None:
            return None
        self.device_seconds += self._bill()
        now = {"rows": float(self._rows), "device_seconds": self.device_seconds}
        for name in ("calls_engine", "calls_log", "prompt_tokens", "completion_tokens", "cached_tokens", "cost"):
            now[name] = float(getattr(self._stats, name))
        change = {k: v - self._sent.get(k, 0.0) for k, v in now.items() if v != self._sent.get(k, 0.0)}
        if not change:
            return None
        self._sent = now
        return self._job.board.add.remote(self._job.stage, change)


def _devices() -> float:
    """GPUs that this actor holds; an engine without any counts as one device."""
    if not ray.is_initialized():  # asking would start a cluster
        return 1.0
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0)) or 1.0


def _begin_attempt(job: ShardJob, shard: int) -> tuple[int, int]:
    """Leave a mark that this session began the shard; returns how often it has, and how many engines died under it."""
    folder = Folder(job.folder) / "_attempts"
    names = folder.names()
    prefix = f"shard-{shard:05d}-{job.session}-"
    number = sum(name.startswith(prefix) for name in names) + 1
    folder.write_bytes(f"{prefix}{number}", b"")
    return number, sum(name.startswith(f"died-{prefix}") for name in names)


def _mark_death(job: ShardJob, shard: int) -> None:
    """Leave a mark that the engine died while this shard was at work; without it, the actor or its node was lost."""
    name = f"died-shard-{shard:05d}-{job.session}-{uuid.uuid4().hex[:8]}"
    with contextlib.suppress(OSError, StoreError):
        (Folder(job.folder) / "_attempts").write_bytes(name, b"")


def _read_inputs(job: ShardJob, shard: int) -> dict[str, pa.Table]:
    return {role: table.read(shard) for role, table in job.inputs.items()}


def _commit(job: ShardJob, shard: int, output: ShardOutput, usage: Mapping[str, float]) -> Receipt:
    """Write the receipt, then the tables: a shard that is there has its receipt, whatever happens in between."""
    if set(output.tables) != set(job.work.tables):
        raise ValueError(f"{job.stage} made {sorted(output.tables)}, not {sorted(job.work.tables)}")
    rows = {kind: table.num_rows for kind, table in output.tables.items()}
    receipt = Receipt(shard, "ok", rows, dict(output.counts), dict(usage))
    (Folder(job.folder) / "_receipts").write_json(receipt_name(shard), dataclasses.asdict(receipt))
    for kind, table in output.tables.items():
        job.output(kind).write(shard, table)
    return receipt


def _failed(job: ShardJob, shard: int, error: str) -> Receipt:
    return Receipt(shard, "failed", {}, {}, {}, error)


def _describe(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
    place = f" ({os.path.basename(where[0].filename)}:{where[0].lineno})" if where else ""
    return f"{type(error).__name__}: {error}{place}"
