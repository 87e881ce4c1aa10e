"""The state of a run, read only from its folder: it may run on another machine.

The manifest lists the finished stages; `progress.json`, written every two seconds by the running process, has the
progress of the others; receipts and failure records have the errors. A run is alive if its heartbeat changes: clocks
of two machines are never compared.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ray_pipeline.engines.batch_records import batches_of
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.failures import read_failures
from ray_pipeline.graph.heartbeat import BEAT_SECONDS
from ray_pipeline.graph.progress import StageProgress
from ray_pipeline.graph.results import Run, StageRecord, decision, read_run
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

#: Last parts of a count's name that mark bad rows (`helpfulness.unparsed`, `error`).
ROW_ERRORS = ("unparsed", "truncated", "too_long", "error", "missing", "prompt_cut")

#: Life of a run: its heartbeat changes; the heartbeat stopped (killed, or cut off from its storage); it has none.
Life = Literal["running", "silent", "ended"]


@dataclasses.dataclass
class StageState:
    """One stage as shown to an operator. Rates cover the time since the last look, or the whole stage at the first.

    `phase` is what a running stage does before its rows ("loading model"). `errors` is by kind: `rows.unparsed`,
    `shards.StoreError`, …; `error` is the reason of a failed stage.
    """

    name: str
    status: str
    phase: str = ""
    shards: int = 0
    shards_done: int = 0
    shards_failed: int = 0
    shards_quarantined: int = 0
    calls_failed: int = 0
    rows: float = 0
    usage: Usage = dataclasses.field(default_factory=Usage)
    seconds: float = 0.0
    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    errors: dict[str, int] = dataclasses.field(default_factory=dict)
    error: str = ""

    def plain(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "usage"}
        return {**vars(self.usage), **own, "prefix_hit_rate": self.usage.prefix_hit_rate}


@dataclasses.dataclass
class BatchState:
    """An open batch of calls (`engine: openai_batch`) in the run's call log, as the run saw it last.

    Attributes:
        id: the server's number; "" while it is being sent.
        age_seconds: since it was recorded, by the clock of the machine that did.
    """

    id: str
    model: str
    calls: int
    status: str
    age_seconds: float


@dataclasses.dataclass
class RunState:
    """A run folder at one moment. `decided`: with `rounds.stop`, the best round, and why the run stopped."""

    folder: str
    workflow: str
    life: Life
    stages: list[StageState]
    batches: list[BatchState] = dataclasses.field(default_factory=list)
    decided: str = ""

    @property
    def failed(self) -> list[StageState]:
        return [s for s in self.stages if s.status == "failed" or s.shards_failed]

    @property
    def done(self) -> bool:
        return all(s.status in ("done", "skipped") for s in self.stages)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the stages that are running now are done; waiting stages are not estimated."""
        known = [s.eta_seconds for s in self.stages if s.status == "running" and s.eta_seconds is not None]
        return max(known) if known else None

    def plain(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "folder": self.folder,
            "workflow": self.workflow,
            "life": self.life,
            "eta_seconds": self.eta_seconds,
            "stages": [stage.plain() for stage in self.stages],
            "batches": [vars(batch) for batch in self.batches],
            **({"decided": self.decided} if self.decided else {}),
        }


class Watch:
    """Repeated looks at a run folder; caches immutable files and the last counters, for rates.

    Args:
        clock, sleep: in seconds; replaced in tests.
    """

    def __init__(
        self,
        location: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder = Folder(location)
        self._clock, self._sleep = clock, sleep
        self._receipts: dict[tuple[str, str], dict[str, Any]] = {}
        self._last: dict[str, tuple[float, float, float]] = {}  # stage → its seconds, rows, tokens at the last look
        self._untouched: set[str] = set()
        self._beat: object = None

    def look(self, patience: float = 1.5 * BEAT_SECONDS) -> RunState:
        """The current state of the run.

        Args:
            patience: seconds to wait for the heartbeat to change before the run is called silent.

        Raises:
            StoreError: the folder contains no run.
        """
        run = read_run(self.folder.location)
        life = self._life(patience)
        if life == "ended":  # it may have ended since the manifest was read
            run = read_run(self.folder.location)
        running = self._progress() if life != "ended" else {}
        stages = [self._stage(run, stage, running.get(name)) for name, stage in run.stages.items()]
        if life == "silent":
            for stage in stages:
                stage.eta_seconds = stage.rows_per_second = stage.tokens_per_second = None
                stage.status, stage.phase = "stopped" if stage.status == "running" else stage.status, ""
        decided = decision(run.results)
        text = "" if decided is None else decided.facts["text"]
        return RunState(self.folder.location, run.workflow, life, stages, _open_batches(run), text)

    def until_ended(self, every: float) -> Iterator[RunState]:
        """The state of the run now and every `every` seconds, until the run ends or goes silent."""
        while True:
            state = self.look()
            yield state
            if state.life != "running":
                return
            self._sleep(every)

    def _life(self, patience: float) -> Life:
        begin = self._clock()
        while True:
            try:
                beat: object = self.folder.read_json("heartbeat.json")
            except FileNotFoundError:
                return "ended"
            except StoreError:
                beat = None
            first, moved = self._beat is None, beat != self._beat
            self._beat = beat
            if moved and not first:
                return "running"
            if self._clock() - begin >= patience:
                return "silent"
            self._sleep(0.2)

    def _progress(self) -> dict[str, StageProgress]:
        try:
            stages = self.folder.read_json("progress.json")
            return {stage["name"]: StageProgress.read(stage) for stage in stages}
        except (FileNotFoundError, StoreError, TypeError, KeyError):  # not written yet, or by another version
            return {}

    def _stage(self, run: Run, stage: StageRecord, now: StageProgress | None) -> StageState:
        state = StageState(stage.name, stage.status, error=stage.error)
        if stage.done:
            self._finished(state, run, stage)
        if stage.done or stage.status == "skipped":
            return state
        folder = self.folder / stage.path
        counts: collections.Counter[str] = collections.Counter()
        if now is not None or stage.status != "waiting" or stage.name not in self._untouched:
            self._unfinished(state, folder, stage.tables, counts, run.num_shards)
            state.errors = bad_rows(counts) | self._shard_errors(state, folder)
            if state.shards_done:
                state.status = "partial" if state.status == "waiting" else state.status
            elif now is None:
                self._untouched.add(stage.name)  # not listed again until it starts
        if now is not None and now.status == "running":
            self._live(state, now)
        return state

    def _finished(self, state: StageState, run: Run, stage: StageRecord) -> None:
        counts = stage.facts.get("counts", {})
        state.rows = sum(stage.rows.values())
        if stage.tables:
            state.shards = state.shards_done = run.num_shards
        state.usage = stage.usage
        state.seconds = state.usage.wall_seconds
        state.errors = bad_rows(counts)
        if state.seconds:
            state.rows_per_second = state.rows / state.seconds
            state.tokens_per_second = state.usage.tokens / state.seconds

    def _unfinished(
        self,
        state: StageState,
        folder: Folder,
        tables: Sequence[str],
        counts: collections.Counter[str],
        num_shards: int,
    ) -> None:
        """Fill in an unfinished stage from the names of its shards and their receipts (read once)."""
        places = [folder / kind for kind in tables] if len(tables) > 1 else [folder] * len(tables)
        if not tables:
            return
        state.shards = num_shards
        state.shards_done = min(len(place.names(".parquet")) for place in places)
        receipts = folder / "_receipts"
        for name in receipts.names(".json"):
            receipt = self._receipt(receipts, name)
            counts.update(receipt.get("counts", {}))
            state.rows += sum(receipt.get("rows", {}).values())
            state.usage += Usage.read(receipt.get("usage", {}))

    def _receipt(self, folder: Folder, name: str) -> dict[str, Any]:
        key = (folder.location, name)
        if key not in self._receipts:
            try:
                self._receipts[key] = folder.read_json(name)
            except (FileNotFoundError, StoreError):
                return {}
        return self._receipts[key]

    def _live(self, state: StageState, now: StageProgress) -> None:
        """Fill in the counters of the running session, and the rates between two looks."""
        state.status, state.phase, state.seconds, state.eta_seconds = "running", now.phase, now.seconds, now.eta
        state.shards, state.shards_done = now.shards or state.shards, max(now.shards_done, state.shards_done)
        state.rows, state.usage, tokens = now.rows, now.usage, now.usage.tokens
        before = self._last.get(state.name, (0.0, 0.0, 0.0))
        if now.seconds <= before[0]:  # no progress since, or a new session
            before = (0.0, 0.0, 0.0)
        passed = now.seconds - before[0]
        if passed > 0:
            state.rows_per_second = max(now.rows - before[1], 0) / passed
            state.tokens_per_second = max(tokens - before[2], 0) / passed
        self._last[state.name] = (now.seconds, now.rows, tokens)

    def _shard_errors(self, state: StageState, folder: Folder) -> dict[str, int]:
        failures = read_failures(folder)
        state.shards_failed = len(failures)
        state.shards_quarantined = sum(f.quarantined for f in failures.values())
        state.calls_failed = sum(f.calls for f in failures.values())
        return dict(sorted(collections.Counter(f"shards.{f.kind}" for f in failures.values()).items()))


def _open_batches(run: Run) -> list[BatchState]:
    now = time.time()
    return [
        BatchState(batch.id, batch.model, len(batch.ids), batch.status, max(now - batch.created, 0.0))
        for batch in (batches_of(Folder(run.calls_root)) if run.calls_root else ())
        if batch.open
    ]


def bad_rows(counts: Mapping[str, Any]) -> dict[str, int]:
    """Bad rows by kind, over all judges, from the counts of a stage."""
    errors: collections.Counter[str] = collections.Counter()
    for name, number in counts.items():
        kind = name.rsplit(".", 1)[-1]
        if kind in ROW_ERRORS and isinstance(number, int) and number:
            errors[f"rows.{kind}"] += number
    return dict(sorted(errors.items()))
