"""Which shards of a stage failed, how often and of what: kept beside its shards until they are there.

One file a stage, `_failures.json`. Only the stage's own task writes it, so no shard can overwrite another's record.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterable

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.graph.stage import StageStop
from ray_pipeline.store.files import Folder
from ray_pipeline.store.outside import shown

logger = logging.getLogger("quorum.shards")

_NAME = "_failures.json"
#: Characters of an error that are kept: a reader wants the reason, not a page of what a server said.
_MOST = 2000


class FailureSettings(Settings):
    """The `failure` block: when a stage stops because too much goes wrong, and what becomes of shards that fail.

    None of this changes a table. A shard that fails is retried at once by the same worker, with back-off; then it is
    given up for this session, which counts as one failure. A worker lost with its actor or node (pre-emption) is no
    failure: the shard goes to another one. A dead engine is counted apart, because a shard may be what kills it.
    """

    max_error_rate: float = Field(
        0.5, gt=0, le=1, description="share of unreadable replies of one judge that stops a stage"
    )
    error_window: int = Field(200, ge=4, description="number of latest replies that the share is taken over")
    retries: int = Field(2, ge=0, description="further attempts at a failed shard before it is given up")
    backoff_s: float = Field(1.0, ge=0, description="seconds before the first retry; doubled each time")
    backoff_max_s: float = Field(60.0, ge=0, description="longest wait before a retry, in seconds")
    give_up_calls_after: int = Field(
        3,
        ge=1,
        description="sessions in which a call may fail; then its row keeps the status error, and is not asked again",
    )
    quarantine_after: int = Field(
        3, ge=1, description="times given up, over all sessions, before a shard is skipped until `quorum retry`"
    )
    max_failed_shards: float = Field(0.5, gt=0, le=1, description="share of failed shards that stops a stage")
    shard_window: int = Field(20, ge=2, description="number of latest shards that the share is taken over")
    engine_deaths: int = Field(4, ge=1, description="engines that may die on one shard in one session")
    preemptions: int = Field(50, ge=0, description="times that one shard may lose its actor or node in one session")

    def pause(self, tries: int) -> float:
        """Seconds to wait after so many failed tries (1, 2 …)."""
        return min(self.backoff_s * 2.0 ** (tries - 1), self.backoff_max_s)


@dataclasses.dataclass(frozen=True)
class ShardFailure:
    """One shard that is not there because it failed.

    Attributes:
        failures: times that it was given up, over all sessions.
        error: of the last time, beginning with its kind ("StoreError: …").
        quarantined: it is left alone until `quorum retry`.
        calls: calls that failed, if they are the only reason; such a shard is never quarantined.
    """

    shard: int
    failures: int
    error: str
    quarantined: bool = False
    calls: int = 0

    @property
    def kind(self) -> str:
        """The name of the error: what stands before the first colon, where that is one word."""
        word = self.error.split(":", 1)[0].strip()
        return word if word and " " not in word else "other"


def read_failures(stage: Folder, warn: Callable[[str], None] | None = None) -> dict[int, ShardFailure]:
    """Failed shards of a stage by number; none where nothing was written or it cannot be used (see `Folder.load`)."""
    return stage.load(_NAME, lambda rows: {int(row["shard"]): ShardFailure(**row) for row in rows}, warn) or {}


def write_failures(stage: Folder, failures: dict[int, ShardFailure]) -> None:
    """Keep these; no failures, no file."""
    if failures:
        stage.write_json(_NAME, [dataclasses.asdict(failures[shard]) for shard in sorted(failures)])
    else:
        stage.delete(_NAME)


def failed_again(
    before: ShardFailure | None, shard: int, error: str, quarantine_after: int, calls: int = 0
) -> ShardFailure:
    """The record of a shard that was given up once more."""
    failures = (before.failures if before else 0) + 1
    return ShardFailure(shard, failures, shown(error)[:_MOST], not calls and failures >= quarantine_after, calls)


def lift_quarantine(stage: Folder) -> list[int]:
    """Count the failures of all shards from nought again, keeping their errors; returns the shards."""
    failures = read_failures(stage, logger.warning)
    write_failures(stage, {s: dataclasses.replace(f, failures=0, quarantined=False) for s, f in failures.items()})
    return sorted(failures)


class FailureLedger:
    """The failures of one stage while it runs: kept on disk as they happen, and weighed against the policy.

    Args:
        missing: shards that are not there; records of others are out of date and go.
        warn: called with a line if the record of earlier sessions cannot be used.
    """

    def __init__(
        self,
        stage: Folder,
        policy: FailureSettings,
        missing: Iterable[int],
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        wanted = set(missing)
        self._stage, self._policy = stage, policy
        before = read_failures(stage, warn)
        self._known = {s: f for s, f in before.items() if s in wanted}
        if self._known != before:
            write_failures(stage, self._known)
        self.quarantined = {s for s, f in self._known.items() if f.quarantined}
        self._window: collections.deque[bool] = collections.deque(maxlen=policy.shard_window)
        self._now: set[int] = set()

    def done(self, shard: int) -> None:
        self._window.append(True)
        if self._known.pop(shard, None) is not None:
            write_failures(self._stage, self._known)

    def failed(self, shard: int, error: str, calls: int = 0) -> str | None:
        """Note a shard that was given up; returns why the stage should stop, if it should.

        Args:
            calls: of a :class:`ShardFailure`; `max_error_rate` is for these.
        """
        self._known[shard] = failed_again(self._known.get(shard), shard, error, self._policy.quarantine_after, calls)
        write_failures(self._stage, self._known)
        self._now.add(shard)
        if calls:
            return None
        self._window.append(False)
        failed, seen = self._window.count(False), len(self._window)
        if seen < max(2, self._policy.shard_window // 2) or failed <= self._policy.max_failed_shards * seen:
            return None
        return (
            f"{failed} of the last {seen} shards failed ({failed / seen:.0%}, allowed "
            f"{self._policy.max_failed_shards:.0%}), the last is shard {shard}: {error}. What is done is kept; "
            "find the reason, then the same command makes what is missing"
        )

    def check(self, name: str, num_shards: int) -> None:
        """Raises StageStop when shards failed or are in quarantine."""
        if not self._known:
            return
        if all(f.calls for f in self._known.values()):
            calls, first = sum(f.calls for f in self._known.values()), self._known[min(self._known)]
            raise StageStop(
                f"{name}: {calls} calls failed, in {len(self._known)} of {num_shards} shards (shard {first.shard}: "
                f"{first.error.removeprefix('CallsFailed: ')}). All replies are kept; the same command makes exactly "
                "these calls again. A call that fails in "
                f"{self._policy.give_up_calls_after} sessions (failure.give_up_calls_after) is given up"
            )
        failed = {s: f for s, f in self._known.items() if s in self._now}
        held = {s: f for s, f in self._known.items() if s not in self._now}
        if failed:
            shard = min(failed)
            more = f" and {len(held)} more are in quarantine" if held else ""
            raise StageStop(
                f"{name}: {len(failed)} of {num_shards} shards failed{more}, the first is shard {shard}: "
                f"{failed[shard].error}. The others are kept; the same command makes only what is missing"
            )
        shard = min(held)
        word = "are in quarantine" if any(f.quarantined for f in held.values()) else "failed before"
        raise StageStop(
            f"{name}: {len(held)} of {num_shards} shards {word}, the first is shard {shard}, which failed "
            f"{held[shard].failures} times: {held[shard].error}. The others are kept; when the reason is gone, "
            "`quorum retry RUN` makes them"
        )
