"""Making the stages of one pool to their ends, wherever that is: in the Ray task of a pool, or in this process.

A stage that fails is a value, not an error: the other stages of its pool have results, and a stage that reads the
failed one is not run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.failures import FailureLedger
from ray_pipeline.graph.receipts import Receipt, read_receipt
from ray_pipeline.graph.session import StageTask
from ray_pipeline.graph.stage import BadInput, ShardWork, StageResult, StageStop, WholeInput, WholeWork
from ray_pipeline.store.errors import NotWritten
from ray_pipeline.store.files import Folder


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a stage failed, in words for the user; whether their input is the reason; and the traceback, for a log."""

    reason: str
    bad_input: bool = False
    trace: str = ""


End = StageResult | Failure

#: Makes shards (stage and number), in about their order, and calls back with each receipt.
MapShards = Callable[[Sequence[StageTask], Sequence[tuple[str, int]], Callable[[Receipt], None]], None]


def explain(stage: str, error: BaseException) -> Failure:
    """An error in words: what a stage stopped for as it is, anything else with its kind."""
    trace = "".join(traceback.format_exception(error))
    cause = getattr(error, "cause", None) or error  # Ray's errors of a task show the stack, and hold what was raised
    if isinstance(cause, (StageStop, ValueError, FileNotFoundError)):
        return Failure(str(cause).removeprefix(f"{stage}: "), isinstance(cause, BadInput), trace)
    return Failure(f"{type(cause).__name__}: {str(cause).strip()}", trace=trace)


def run_stages(tasks: Sequence[StageTask], parents: Mapping[str, End], map_shards: MapShards) -> list[End]:
    """Make what is missing of one stage, or of several that share a pool of engines.

    Args:
        parents: by name, how the stages that they read ended.
    """
    results = {name: end for name, end in parents.items() if isinstance(end, StageResult)}
    ready = [t.reading(results) for t in tasks if all(parent.name in results for parent in t.inputs.values())]
    if ready and isinstance(ready[0].work, ShardWork):
        made = _run_sharded(ready, map_shards)
    else:
        made = [_end(task, functools.partial(_run_whole, task, task.work)) for task in ready]
    ends = dict(zip([task.name for task in ready], made, strict=True))
    return [ends.get(task.name) or Failure("a stage that it reads failed") for task in tasks]


def _end(task: StageTask, make: Callable[[], StageResult]) -> End:
    try:
        return make()
    except Exception as error:
        return explain(task.name, error)


def _finish(task: StageTask, facts: Mapping[str, Any], usage: Usage) -> StageResult:
    Folder(task.ref.folder).delete_folder("_attempts")
    return StageResult(**vars(task.ref), rows=task.ref.count_rows(), facts=facts, usage=usage).save(task.inputs)


def _check_stop(task: StageTask) -> None:
    """Raises StageStop when no more may be spent: a stage that waited for its inputs does not begin then."""
    if reason := task.session.board.stopping(task.name):
        raise StageStop(reason)


# --- whole tables -----------------------------------------------------------------------------------------------------


def _run_whole(task: StageTask, work: ShardWork | WholeWork) -> StageResult:
    assert isinstance(work, WholeWork)
    begin, session, board = time.monotonic(), task.session, task.session.board
    board.begin(task.name)
    _check_stop(task)

    def stopping() -> str | None:
        try:
            return board.stopping(task.name)
        except Exception:  # a board that is out of reach does not end a training
            return None

    given = WholeInput(
        {role: parent for role, parent in task.inputs.items() if isinstance(parent, StageResult)},
        Folder(task.ref.folder),
        Folder(session.calls_root),
        task.ref.fingerprint,
        session.num_shards,
        work.settings,
        lambda line: board.say(f"{task.name}: {line}"),
        lambda done, total, note: board.put(task.name, done, total, note),
        stopping,
        lambda phase: board.phase(task.name, phase),
        task.settings_key,
        task.name in session.again,
    )
    # Relative paths of the configuration start from the driver's folder; a worker may start elsewhere.
    there = os.path.isdir(session.working_folder)
    with contextlib.chdir(session.working_folder) if there else contextlib.nullcontext():
        facts = work.function(given)
    return _finish(task, facts, Usage(wall_seconds=time.monotonic() - begin))


# --- shard by shard ---------------------------------------------------------------------------------------------------


def _run_sharded(tasks: Sequence[StageTask], map_shards: MapShards) -> list[End]:
    """Make the missing shards of all stages with one pool, stage after stage as far as the pool never waits."""
    ends: dict[str, End] = {}
    at_work: dict[str, _Sharded] = {}
    for task in tasks:
        try:
            at_work[task.name] = _Sharded(task, waits=bool(at_work))
        except Exception as error:
            ends[task.name] = explain(task.name, error)
    todo = [(name, shard) for name, stage in at_work.items() for shard in stage.todo]
    begin = time.monotonic()
    try:
        if todo:
            workers = [stage.task for stage in at_work.values()]
            map_shards(workers, todo, lambda receipt: at_work[receipt.stage].take(receipt))
    except Exception as error:  # what is done of them is kept
        return [ends.get(task.name) or explain(task.name, error) for task in tasks]
    for name, stage in at_work.items():
        ends[name] = _end(stage.task, functools.partial(stage.finish, begin))
        begin = max(begin, stage.last)
    return [ends[task.name] for task in tasks]


def _rows_to_read(task: StageTask, missing: Sequence[int]) -> float:
    """Rows of all inputs in the shards that are missing."""
    parents = [parent for parent in task.inputs.values() if isinstance(parent, StageResult)]
    if len(missing) == task.session.num_shards:
        return sum(sum(parent.rows.values()) for parent in parents)
    states = [parent.table(kind).state() for parent in parents for kind in parent.tables] if missing else []
    return sum(state.rows.get(shard, 0) for state in states for shard in missing)


class _Sharded:
    """A stage whose shards are made: `todo`, those that are missing and may be made now, and how they ended.

    Args:
        waits: its shards come after those of another stage.

    Raises:
        StageStop: no more may be spent.
    """

    def __init__(self, task: StageTask, waits: bool) -> None:
        self.task, self._board = task, task.session.board
        self._stopped: dict[int, str] = {}
        self._receipts: dict[int, Receipt] = {}
        self.last = 0.0  # when its last receipt came
        session, missing = task.session, self._missing()
        self._board.begin(
            task.name,
            session.num_shards,
            session.num_shards - len(missing),
            waits=waits,
            inputs=_rows_to_read(task, missing),
            phase="starting engine" if isinstance(task.work, ShardWork) and task.work.engine is not None else "",
        )
        _check_stop(task)
        self._ledger = ledger = FailureLedger(Folder(task.ref.folder), session.failure, missing, self._warn)
        self.todo = [s for s in missing if s not in ledger.quarantined and session.may_make(task.name, s)]
        self._left = len(set(missing) - set(self.todo) - set(ledger.quarantined))

    def _missing(self) -> list[int]:
        """Shards to be made: those without a table, and those whose receipt is lost, as its counts are nowhere else."""
        missing = self.task.ref.missing()
        for shard in sorted(set(range(self.task.session.num_shards)) - set(missing)):
            receipt = read_receipt(Folder(self.task.ref.folder), shard, self._warn)
            if receipt is None:
                self._warn(f"shard {shard} has no receipt and is remade; its calls are in the call log")
                missing.append(shard)
            else:
                self._receipts[shard] = receipt
        return sorted(missing)

    def _warn(self, line: str) -> None:
        self._board.say(f"{self.task.name}: {line}")

    def take(self, receipt: Receipt) -> None:
        """Note how a shard ended. Storage that cannot be written stops the stage: raised here, the error would end the
        workers at once, with replies that they have not written yet."""
        try:
            self._take(receipt)
        except NotWritten as error:
            self._stopped[receipt.shard] = str(error)
            self._board.stop(self.task.name, str(error))

    def _take(self, receipt: Receipt) -> None:
        name, shard = self.task.name, receipt.shard
        self.last = time.monotonic()
        reason = receipt.error or "no reason given"
        if receipt.status == "ok":
            self._board.add(name, Usage(), shards_done=1)
            self._ledger.done(shard)
            self._receipts[shard] = receipt
        elif receipt.status == "stopped":
            self._stopped[shard] = reason
            self._board.stop(name, reason)
        else:
            self._board.add(name, Usage(), shards_failed=1)
            self._board.say(f"{name}: shard {shard} failed: {receipt.error}", shard)
            if too_many := self._ledger.failed(shard, reason, receipt.calls):
                self._board.stop(name, too_many)

    def finish(self, begin: float) -> StageResult:
        """The result, if all shards are there. Raises StageStop with the reason if not.

        Args:
            begin: when the pool came to its shards; stages of one pool follow each other.
        """
        task, end = self.task, time.monotonic()
        if self._stopped:
            raise StageStop(min(self._stopped.items())[1])
        self._ledger.check(task.name, task.session.num_shards)
        if self._left:
            raise StageStop(
                f"{self._left} of {task.session.num_shards} shards were left out of this session; "
                "`quorum run` makes them"
            )
        counts, usage = collections.Counter[str](), Usage()
        for _, receipt in sorted(self._receipts.items()):
            counts.update(receipt.counts)
            usage += Usage.read(receipt.usage)
        seconds = max(0.0, self.last - begin) + time.monotonic() - end
        return _finish(task, {"counts": dict(sorted(counts.items()))}, usage + Usage(wall_seconds=seconds))
