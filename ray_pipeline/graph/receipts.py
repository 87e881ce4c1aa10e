"""What became of a shard: its receipt, the marks of the attempts at it, and when calls that fail are given up."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import traceback
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.failures import read_failures
from ray_pipeline.graph.session import StageTask
from ray_pipeline.store.errors import NotWritten, StoreError
from ray_pipeline.store.files import Folder

logger = logging.getLogger("quorum.shards")


@dataclasses.dataclass(frozen=True)
class Receipt:
    """The outcome of one shard. `usage` holds calls, tokens and seconds by name; `counts` is deterministic.

    `status` is ok, failed, or stopped: `error` is then why its whole stage must stop, or was stopped. `calls` is the
    number of calls that failed, if the shard failed only because of them.
    """

    stage: str
    shard: int
    status: str
    rows: Mapping[str, int]
    counts: Mapping[str, int]
    usage: Mapping[str, float]
    error: str | None = None
    calls: int = 0


def receipt_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def read_receipt(stage: Folder, shard: int, warn: Callable[[str], None]) -> Receipt | None:
    """The receipt of a shard that is there; None where it is missing or cannot be used (see `Folder.load`)."""

    def parse(value: Any) -> Receipt:
        rows, counts, usage = (dict(value[name]) for name in ("rows", "counts", "usage"))
        _ = Usage() + Usage.read(usage), sum(counts.values()), sum(rows.values())  # they are numbers
        return Receipt(value["stage"], shard, value["status"], rows, counts, usage)

    return (stage / "_receipts").load(receipt_name(shard), parse, warn)


def begin_attempt(task: StageTask, shard: int) -> tuple[int, int]:
    """Leave a mark that this session began the shard; returns how often it has, and how many engines died under it."""
    folder = _attempts(task, shard)
    names = folder.names()
    prefix = f"{task.session.id}-"
    number = sum(name.startswith(prefix) for name in names) + 1
    folder.write_bytes(f"{prefix}{number}", b"")
    return number, sum(name.startswith(f"died-{prefix}") for name in names)


def mark_death(task: StageTask, shard: int) -> None:
    """Leave a mark that the engine died while this shard was at work; without it, the actor or its node was lost."""
    name = f"died-{task.session.id}-{uuid.uuid4().hex[:8]}"
    with contextlib.suppress(OSError, StoreError):
        _attempts(task, shard).write_bytes(name, b"")


def _attempts(task: StageTask, shard: int) -> Folder:
    """A folder for each shard: listing one of all shards for every shard would be quadratic."""
    return Folder(task.ref.folder) / "_attempts" / f"shard-{shard:05d}"


def committed(task: StageTask, shard: int) -> Receipt | None:
    """The receipt of a shard whose tables are all there, else None."""
    if not all(task.ref.table(kind).has(shard) for kind in task.ref.tables):
        return None
    return read_receipt(Folder(task.ref.folder), shard, logger.warning)


def failed(task: StageTask, shard: int, error: BaseException, last: bool = True) -> Receipt:
    """The receipt of a shard that an error ended; the traceback goes to the run's log.

    Storage that cannot be written is no fault of the shard: it is retried like a failure, but then stops the whole
    stage and counts towards no quarantine.

    Args:
        last: no retry follows in this session.
    """
    if last and isinstance(error, NotWritten):
        return stopped_shard(task, shard, str(error))
    text = f"{task.name}: shard {shard}: {''.join(traceback.format_exception(error))}"
    try:
        task.session.board.trace(text, shard)
    except Exception:  # the board may be what is gone
        logger.error(text)
    where = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
    place = f" ({os.path.basename(where[0].filename)}:{where[0].lineno})" if where else ""
    return failed_shard(task, shard, f"{type(error).__name__}: {error}{place}")


def failed_shard(task: StageTask, shard: int, error: str) -> Receipt:
    return Receipt(task.name, shard, "failed", {}, {}, {}, error)


def calls_failed(task: StageTask, shard: int, calls: Mapping[str, str]) -> Receipt:
    error = f"CallsFailed: {len(calls)} calls, the last: {list(calls.values())[-1]}"
    return Receipt(task.name, shard, "failed", {}, {}, {}, error, len(calls))


def give_up(task: StageTask, shard: int, calls: Mapping[str, str]) -> bool:
    """Whether the shard is finished without the calls that failed, because they did so in enough sessions."""
    before = read_failures(Folder(task.ref.folder)).get(shard)
    sessions = (before.failures if before else 0) + 1
    if sessions < task.session.failure.give_up_calls_after:
        return False
    task.session.board.say(
        f"{task.name}: shard {shard}: {len(calls)} calls are given up after {sessions} sessions, their rows keep the "
        f"status error; the last: {list(calls.values())[-1]}",
        shard,
    )
    return True


def stopped_shard(task: StageTask, shard: int, reason: str) -> Receipt:
    return Receipt(task.name, shard, "stopped", {}, {}, {}, reason)
