"""Which shards of a stage failed, how often and of what: kept beside its shards until they are there.

One file a stage, `_failures.json`. Only the stage's own task writes it, so no shard can overwrite another's record.
"""

from __future__ import annotations

import dataclasses

from ray_pipeline.store.files import Folder, StoreError

_NAME = "_failures.json"
#: Characters of an error that are kept: a reader wants the reason, not a page of what a server said.
_MOST = 2000


@dataclasses.dataclass(frozen=True)
class ShardFailure:
    """One shard that is not there because it failed.

    Attributes:
        failures: times that it was given up, over all sessions.
        error: of the last time, beginning with its kind ("StoreError: …").
        quarantined: it is left alone until `quorum retry`.
    """

    shard: int
    failures: int
    error: str
    quarantined: bool = False

    @property
    def kind(self) -> str:
        """The name of the error: what stands before the first colon, where that is one word."""
        word = self.error.split(":", 1)[0].strip()
        return word if word and " " not in word else "other"


def read_failures(stage: Folder) -> dict[int, ShardFailure]:
    """Failed shards of a stage by number; none where nothing was written or it cannot be read."""
    try:
        rows = stage.read_json(_NAME)
        return {int(row["shard"]): ShardFailure(**row) for row in rows}
    except (FileNotFoundError, NotADirectoryError, StoreError, TypeError, KeyError, ValueError):
        return {}


def write_failures(stage: Folder, failures: dict[int, ShardFailure]) -> None:
    """Keep these; no failures, no file."""
    if failures:
        stage.write_json(_NAME, [dataclasses.asdict(failures[shard]) for shard in sorted(failures)])
    else:
        stage.delete(_NAME)


def failed_again(before: ShardFailure | None, shard: int, error: str, quarantine_after: int) -> ShardFailure:
    """The record of a shard that was given up once more."""
    failures = (before.failures if before else 0) + 1
    return ShardFailure(shard, failures, error[:_MOST], failures >= quarantine_after)


def lift_quarantine(stage: Folder) -> list[int]:
    """Count the failures of all shards from nought again, keeping their errors; returns the shards."""
    failures = read_failures(stage)
    write_failures(stage, {s: dataclasses.replace(f, failures=0, quarantined=False) for s, f in failures.items()})
    return sorted(failures)
