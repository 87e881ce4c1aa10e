"""What the Ray task of a stage does, or of several stages that share a pool of engines.

A stage that fails is a value, not an error: the other stages of its task have results, and whoever reads the failed one
is not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from ray_pipeline.graph.failures import FailureLedger, FailureSettings
from ray_pipeline.graph.shard_map import Receipt, ShardJob, map_shards
from ray_pipeline.graph.stage import (
    BadInput,
    ShardWork,
    StageResult,
    StageStop,
    WholeInput,
    WholeWork,
    stage_table,
)
from ray_pipeline.graph.totals import receipts_of, rows_of_tables, tables_by_role
from ray_pipeline.store.files import Folder


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a stage failed, in words for the user; whether it is what the user gave; and where in the code, for a log."""

    reason: str
    bad_input: bool = False
    trace: str = ""


@dataclasses.dataclass(frozen=True)
class StageJob:
    """A stage as its Ray task gets it."""

    name: str
    fingerprint: str
    folder: str
    num_shards: int
    work: ShardWork | WholeWork
    calls_root: str
    session: str
    replay_only: bool
    board: Any
    policy: FailureSettings
    only: tuple[int, ...] | None
    room: Mapping[str, Any]
    working_folder: str


def explain(stage: str, error: BaseException) -> Failure:
    """An error in words: what a stage stopped for as it is said, anything else with its kind."""
    trace = "".join(traceback.format_exception(error))
    cause = getattr(error, "cause", None) or error  # Ray's errors of a task say the stack, and hold what was raised
    if isinstance(cause, (StageStop, ValueError, FileNotFoundError)):
        return Failure(str(cause).removeprefix(f"{stage}: "), isinstance(cause, BadInput), trace)
    return Failure(f"{type(cause).__name__}: {str(cause).strip()}", trace=trace)


def run_stages(jobs: Sequence[StageJob], roles: Sequence[Sequence[str]], *parents: StageResult | Failure) -> Any:
    """Make what is missing of stages.

    Args:
        jobs: one, or several whose engine and placement are the same.
        roles: for each the roles of the stages that it reads.
        parents: the results of those, for all jobs one after another: Ray resolves what is not inside a list.

    Returns:
        The stage's StageResult or Failure; of several stages a list.
    """
    if any(isinstance(parent, Failure) for parent in parents):
        ends: list[StageResult | Failure] = [Failure("a stage that it reads failed")] * len(jobs)
    else:
        given = iter(parents)
        inputs: list[Any] = [dict(zip(names, itertools.islice(given, len(names)), strict=True)) for names in roles]
        if isinstance(jobs[0].work, ShardWork):
            ends = _run_sharded(jobs, inputs)
        else:
            ends = [_end(job, functools.partial(_run_whole, job, read)) for job, read in zip(jobs, inputs, strict=True)]
    return ends if len(ends) > 1 else ends[0]


def _end(job: StageJob, make: Callable[[], StageResult]) -> StageResult | Failure:
    try:
        return make()
    except Exception as error:
        return explain(job.name, error)


def _finish(job: StageJob, rows: dict[str, int], facts: dict[str, Any], usage: dict[str, float]) -> StageResult:
    Folder(job.folder).delete_folder("_attempts")
    tables = job.work.tables
    return StageResult(job.name, job.fingerprint, job.folder, job.num_shards, tables, rows, facts, usage).save()


def _check_stop(job: StageJob) -> None:
    """Raises StageStop when no more may be spent: a stage that waited for its inputs does not begin then."""
    reason = ray.get(job.board.stopping.remote(job.name))
    if reason:
        raise StageStop(reason)


# --- whole tables -----------------------------------------------------------------------------------------------------


def _run_whole(job: StageJob, parents: Mapping[str, StageResult]) -> StageResult:
    assert isinstance(job.work, WholeWork)
    begin = time.monotonic()
    job.board.begin.remote(job.name)
    _check_stop(job)

    def log(line: str) -> None:
        job.board.say.remote(f"{job.name}: {line}")

    def tick(done: int, total: int) -> None:
        job.board.put.remote(job.name, {"rows": done, "rows_total": total})

    def stopping() -> str | None:
        try:
            return ray.get(job.board.stopping.remote(job.name), timeout=10)
        except ray.exceptions.RayError:  # whoever cannot be asked does not end a training
            return None

    given = WholeInput(
        parents,
        Folder(job.folder),
        Folder(job.calls_root),
        job.fingerprint,
        job.num_shards,
        job.work.settings,
        log,
        tick,
        stopping,
    )
    # Paths that the user gave are those of the driver's folder; a worker of a cluster that was there begins elsewhere.
    there = os.path.isdir(job.working_folder)
    with contextlib.chdir(job.working_folder) if there else contextlib.nullcontext():
        facts = job.work.function(given)
    outputs = {k: stage_table(job.folder, job.work.tables, k, job.num_shards, job.fingerprint) for k in job.work.tables}
    rows = rows_of_tables(job.name, outputs)
    return _finish(job, rows, facts, {"wall_seconds": time.monotonic() - begin})


# --- shard by shard ---------------------------------------------------------------------------------------------------


def _run_sharded(jobs: Sequence[StageJob], inputs: Sequence[Mapping[str, StageResult]]) -> list[StageResult | Failure]:
    """Make the missing shards of all jobs with one pool, job after job, as far as the pool does not wait for them."""
    ends: dict[str, StageResult | Failure] = {}
    at_work: dict[str, _Sharded] = {}
    for job, parents in zip(jobs, inputs, strict=True):
        try:
            at_work[job.name] = _Sharded(job, parents, waits=bool(at_work))
        except Exception as error:
            ends[job.name] = explain(job.name, error)
    todo = [(name, shard) for name, stage in at_work.items() for shard in stage.todo]
    begin = time.monotonic()
    try:
        if todo:
            for receipt in map_shards([stage.shard_job() for stage in at_work.values()], todo, jobs[0].room):
                at_work[receipt.stage].take(receipt)
    except Exception as error:  # what is done of them is kept
        return [ends.get(job.name) or explain(job.name, error) for job in jobs]
    for name, stage in at_work.items():
        ends[name] = _end(stage.job, functools.partial(stage.finish, begin))
        begin = max(begin, stage.last)
    return [ends[job.name] for job in jobs]


class _Sharded:
    """A stage whose shards are made: `todo`, those that are not there and may be made now, and what became of them.

    Args:
        waits: its shards come after those of another stage.

    Raises:
        StageStop: no more may be spent.
    """

    def __init__(self, job: StageJob, parents: Mapping[str, StageResult], waits: bool) -> None:
        assert isinstance(job.work, ShardWork)
        self.job, self._work = job, job.work
        self._inputs = tables_by_role(parents)
        self._facts = {role: parent.facts for role, parent in parents.items()}
        self._outputs = {
            kind: stage_table(job.folder, job.work.tables, kind, job.num_shards, job.fingerprint)
            for kind in job.work.tables
        }
        self._stopped: dict[int, str] = {}
        self.last = 0.0  # when its last receipt came
        missing = sorted({s for table in self._outputs.values() for s in table.state().missing})
        job.board.begin.remote(job.name, job.num_shards, job.num_shards - len(missing), waits=waits)
        _check_stop(job)
        self._ledger = ledger = FailureLedger(Folder(job.folder), job.policy, missing)
        self.todo = [s for s in missing if s not in ledger.quarantined and (job.only is None or s in job.only)]
        self._left = len(set(missing) - set(self.todo) - set(ledger.quarantined))

    def shard_job(self) -> ShardJob:
        job = self.job
        return ShardJob(
            job.name,
            job.folder,
            job.fingerprint,
            job.num_shards,
            self._work,
            self._inputs,
            self._facts,
            job.calls_root,
            job.session,
            job.replay_only,
            job.board,
            job.policy,
        )

    def take(self, receipt: Receipt) -> None:
        job = self.job
        self.last = time.monotonic()
        reason = receipt.error or "no reason given"
        if receipt.status == "ok":
            job.board.add.remote(job.name, {"shards_done": 1})
            self._ledger.done(receipt.shard)
        elif receipt.status == "stopped":
            self._stopped[receipt.shard] = reason
            job.board.stop.remote(job.name, reason)
        else:
            job.board.add.remote(job.name, {"shards_failed": 1})
            job.board.say.remote(f"{job.name}: shard {receipt.shard} failed: {receipt.error}", receipt.shard)
            too_many = self._ledger.failed(receipt.shard, reason)
            if too_many:
                job.board.stop.remote(job.name, too_many)

    def finish(self, begin: float) -> StageResult:
        """The result, if all shards are there. Raises StageStop with the reason if not.

        Args:
            begin: when the pool came to its shards; stages of one pool follow each other.
        """
        job, end = self.job, time.monotonic()
        if self._stopped:
            raise StageStop(min(self._stopped.items())[1])
        self._ledger.check(job.name, job.num_shards)
        if self._left:
            raise StageStop(f"{self._left} of {job.num_shards} shards were not to be made now; `quorum run` makes them")
        rows = rows_of_tables(job.name, self._outputs)
        facts, usage = receipts_of(Folder(job.folder), job.num_shards)
        seconds = max(0.0, self.last - begin) + time.monotonic() - end
        return _finish(job, rows, facts, {**usage, "wall_seconds": seconds})
