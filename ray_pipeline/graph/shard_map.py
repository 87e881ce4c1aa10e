"""Ray Data maps the missing shards of stages over actors (with an engine) or tasks (without).

A row of the Ray Dataset is a stage and a shard number. Whoever gets it reads its shard of the inputs, runs the stage's
function, commits one Parquet file a table, and yields a receipt. Text never travels through Ray, and no error either:
of an error in a worker Ray hands on a page of stack frames, so a receipt says what went wrong.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from ray_pipeline.engines.base import ChatEngine, EngineDead, EngineStop
from ray_pipeline.engines.logged import CallNotLogged, CallStats, LoggedEngine
from ray_pipeline.engines.models import Placement
from ray_pipeline.graph.failures import FailureSettings
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
    policy: FailureSettings = dataclasses.field(default_factory=FailureSettings)

    def output(self, kind: str) -> ShardedTable:
        return stage_table(self.folder, self.work.tables, kind, self.num_shards, self.fingerprint)


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What became of one shard. `usage` holds calls, tokens and seconds; `counts` is deterministic.

    `status` is ok, failed, or stopped: `error` is then why its whole stage must stop, or was stopped.
    """

    stage: str
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
    return {"num_cpus": placement.num_cpus, "num_gpus": num_gpus, **placement.room()}


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


def map_shards(
    jobs: Sequence[ShardJob], shards: Sequence[tuple[str, int]], room: Mapping[str, Any] | None = None
) -> Iterable[Receipt]:
    """Make the given shards (stage and number), in about their order; yields a receipt as each is done.

    Args:
        jobs: of one stage, or of several with the same engine and placement: they share the actors.
        room: labels and custom resources for tasks without an engine; an engine's are in its placement.

    Raises:
        StageStop: the actors would hold every CPU.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data gives back actors beyond the GPUs that are there now, and asks for them again when the pool is busy
    # enough. Its own measure of busy (1.75 times what the actors can do at once) is never reached by a pool that is
    # given no more than that.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = GROW_AT
    context.autoscaling_config.actor_pool_util_downscaling_threshold = SHRINK_AT
    rows = [{"stage": stage, "shard": shard} for stage, shard in shards]
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    first = jobs[0]
    if first.work.engine is not None:
        placement = first.work.placement
        check_room(first.stage, first.work)
        dataset = dataset.map_batches(
            ShardActor,
            batch_size=1,
            fn_constructor_args=(tuple(jobs),),
            compute=_pool(placement, len(rows)),
            **_engine_room(first.work, placement),
        )
    else:
        (job,) = jobs
        dataset = dataset.map_batches(
            make_shard,  # type: ignore[arg-type]
            batch_size=1,
            fn_args=(job,),
            compute=TaskPoolStrategy(),
            num_cpus=1,
            **(room or {}),
        )
    for row in dataset.iter_rows():
        yield Receipt(**json.loads(row["receipt"]))


class ShardActor:
    """Makes shards of LLM stages, several at once, on one engine.

    Args:
        jobs: of stages with the same engine and placement.
    """

    def __init__(self, jobs: Sequence[ShardJob]) -> None:
        self._jobs = {job.stage: job for job in jobs}
        first = jobs[0].work
        assert first.engine is not None
        self._billed, self._devices = time.monotonic(), _devices()
        self._engine: ChatEngine = first.engine()
        self._making_seconds = time.monotonic() - self._billed
        self._start_told = 0.0
        self._limit = asyncio.Semaphore(first.placement.concurrency)
        self._open: dict[LoggedEngine, tuple[ShardJob, int]] = {}
        self._watched: dict[tuple[str, str], collections.deque[bool]] = {}
        self._replies: dict[str, collections.Counter[tuple[str, bool]]] = {}
        self._told = 0
        if first.placement.max_actors > 1 and jobs[0].board is not None:
            jobs[0].board.actor.remote(jobs[0].stage, ray.util.get_node_ip_address())

    async def __call__(self, batch: Mapping[str, Any]) -> Any:
        job, shard = self._jobs[str(batch["stage"][0])], int(batch["shard"][0])
        try:
            receipt = await self._make(job, shard)
        except Exception as error:
            logger.exception("%s, shard %d", job.stage, shard)
            receipt = _failed(job, shard, _describe(error))
        yield {"receipt": [json.dumps(dataclasses.asdict(receipt))]}

    async def _make(self, job: ShardJob, shard: int) -> Receipt:
        """Try a shard until it is there, it was given up, or nobody may go on."""
        policy = job.policy
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
                return _stopped(job, shard, reason)
            receipt = await self._try(job, shard)
            tries += 1
            if receipt.status != "failed" or tries > policy.retries:
                return receipt
            if job.board is not None:
                job.board.say.remote(
                    f"{job.stage}: shard {shard} failed ({receipt.error}); again in {policy.pause(tries):g} s", shard
                )
            await asyncio.sleep(policy.pause(tries))

    async def _try(self, job: ShardJob, shard: int) -> Receipt:
        begin = time.monotonic()
        engine = LoggedEngine(
            self._engine,
            Folder(job.calls_root),
            shard,
            job.num_shards,
            limit=self._limit,
            replay_only=job.replay_only,
        )
        report = _Report(job, engine.stats, self._bill, engine.stop)
        self._open[engine] = (job, shard)
        try:
            async with engine:
                tables = await asyncio.to_thread(_read_inputs, job, shard)
                watch = functools.partial(self._watch, job)
                given = ShardInput(
                    shard, job.num_shards, tables, job.facts, engine, job.work.settings, report.tick, watch
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
                "start_seconds": self._start_seconds(),
            }
            return await asyncio.to_thread(_commit, job, shard, output, {**dataclasses.asdict(engine.stats), **spent})
        except EngineDead as error:
            # No call can succeed any more. Save what every shard of this actor has learnt, then end the process:
            # Ray Data replaces the actor and gives the shards to the new one.
            logger.error("%s, shard %d: %s; the actor ends itself", job.stage, shard, error)
            for other, (its_job, its_shard) in list(self._open.items()):
                _mark_death(its_job, its_shard)
                await other.flush()
            os._exit(1)
        except _STOPS as error:
            # The other shards come here one by one, find it on the board, or are answered by the log alone.
            return _stopped(job, shard, str(error))
        except Exception as error:
            logger.exception("%s, shard %d", job.stage, shard)
            return _failed(job, shard, _describe(error))
        finally:
            self._open.pop(engine, None)
            report.send()
            self._tell(job)

    def _bill(self) -> float:
        """Device seconds since somebody last asked: shards of an actor share its devices, each second counts once."""
        now = time.monotonic()
        passed, self._billed = now - self._billed, now
        return passed * self._devices

    def _start_seconds(self) -> float:
        """Device seconds of the engine's start that no receipt has told of: paid for like the rest, and told apart, so
        that a plan does not take them for the time of calls. Most engines start with their first call."""
        start = (self._making_seconds + getattr(self._engine, "start_seconds", 0.0)) * self._devices
        new, self._start_told = start - self._start_told, start
        return new

    def _tell(self, job: ShardJob) -> None:
        """Hand on what the engine wants the user to know (structured output that a server refuses, say)."""
        self._count_replies(job)
        notes = getattr(self._engine, "notes", ())
        if job.board is not None:
            for note in notes[self._told :]:
                job.board.say.remote(f"{job.stage}: {note}")
        self._told = len(notes)

    def _count_replies(self, job: ShardJob) -> None:
        """Hand on how many replies could be read, judge by judge."""
        replies = self._replies.pop(job.stage, None)
        if replies and job.board is not None:
            job.board.replies.remote(job.stage, dict(replies))

    def _watch(self, job: ShardJob, judge: str, read: bool) -> None:
        """Stop the stage when too many of a judge's last replies could not be read."""
        policy, replies = job.policy, self._replies.setdefault(job.stage, collections.Counter())
        replies[judge, read] += 1
        if replies.total() >= _REPLIES_AT_ONCE:
            self._count_replies(job)
        window = self._watched.setdefault((job.stage, judge), collections.deque(maxlen=policy.error_window))
        window.append(read)
        unread = window.count(False) if not read else 0
        if len(window) >= max(1, policy.error_window // 4) and unread > policy.max_error_rate * len(window):
            raise StageStop(
                f"{unread} of the last {len(window)} replies of {judge} could not be read "
                f"({unread / len(window):.0%}, allowed {policy.max_error_rate:.0%}). The call log holds what it says; "
                "a wrong model, a wrong template or a grammar that is turned off are the usual reasons"
            )


def make_shard(batch: dict[str, Any], job: ShardJob) -> dict[str, Any]:
    """Make one shard of a columnar stage."""
    shard = int(batch["shard"][0])
    try:
        receipt = _make_columnar(job, shard)
    except Exception as error:
        logger.exception("%s, shard %d", job.stage, shard)
        receipt = _failed(job, shard, _describe(error))
    return {"receipt": [json.dumps(dataclasses.asdict(receipt))]}


def _make_columnar(job: ShardJob, shard: int) -> Receipt:
    tries = 0
    while True:
        reason = ray.get(job.board.stopping.remote(job.stage)) if job.board is not None else None
        if reason:
            return _stopped(job, shard, reason)
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
    except StageStop as error:
        return _stopped(job, shard, str(error))
    except Exception as error:
        logger.exception("%s, shard %d", job.stage, shard)
        return _failed(job, shard, _describe(error))


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
    """Raises StageStop where an input is not there: a stage begins when all of it is written, so this node, which may
    have joined after the run began, does not see the run folder."""
    try:
        return {role: table.read(shard) for role, table in job.inputs.items()}
    except FileNotFoundError as error:
        raise StageStop(
            f"{error}: the node {ray.util.get_node_ip_address()} does not see it. Mount the run folder on every node, "
            "also on those that join later, or use a URI such as s3://bucket/run; then the same command goes on"
        ) from error


def _commit(job: ShardJob, shard: int, output: ShardOutput, usage: Mapping[str, float]) -> Receipt:
    """Write the receipt, then the tables: a shard that is there has its receipt, whatever happens in between."""
    if set(output.tables) != set(job.work.tables):
        raise ValueError(f"{job.stage} made {sorted(output.tables)}, not {sorted(job.work.tables)}")
    rows = {kind: table.num_rows for kind, table in output.tables.items()}
    receipt = Receipt(job.stage, shard, "ok", rows, dict(output.counts), dict(usage))
    (Folder(job.folder) / "_receipts").write_json(receipt_name(shard), dataclasses.asdict(receipt))
    for kind, table in output.tables.items():
        job.output(kind).write(shard, table)
    return receipt


def _failed(job: ShardJob, shard: int, error: str) -> Receipt:
    return Receipt(job.stage, shard, "failed", {}, {}, {}, error)


def _stopped(job: ShardJob, shard: int, reason: str) -> Receipt:
    return Receipt(job.stage, shard, "stopped", {}, {}, {}, reason)


def _describe(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
    place = f" ({os.path.basename(where[0].filename)}:{where[0].lineno})" if where else ""
    return f"{type(error).__name__}: {error}{place}"
