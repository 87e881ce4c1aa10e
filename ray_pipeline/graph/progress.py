"""What a run is doing right now: a board that workers write to."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.meters import Meters
from ray_pipeline.graph.pace import Pace


class Note(NamedTuple):
    """A line for the run's log, with its shard where it has one."""

    text: str
    shard: int | None = None
    is_trace: bool = False


@dataclasses.dataclass
class StageProgress:
    """One stage at work.

    Attributes:
        phase: what a running stage does before or beside its rows ("loading model"); empty: it makes rows.
        rows_total: rows that this session has to make, from the shards that were read so far; 0: unknown.
        unit: of `rows`.
        note: the newest figures of the stage itself (a loss, say).
        usage: of this session.
        seconds: time on the clock since the stage began.
        eta: seconds to go; None while nothing can be said.
    """

    name: str
    status: str = "waiting"
    phase: str = ""
    shards: int = 0
    shards_done: int = 0
    shards_failed: int = 0
    rows: float = 0
    rows_total: float = 0
    unit: str = "rows"
    note: str = ""
    usage: Usage = dataclasses.field(default_factory=Usage)
    seconds: float = 0.0
    eta: float | None = None

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> StageProgress:
        """From what `plain` gave. Raises TypeError when it is something else."""
        own = {name: value for name, value in stored.items() if name == "seconds" or name not in vars(Usage())}
        return cls(**own, usage=Usage.read({**stored, "seconds": 0.0}))

    def plain(self) -> dict[str, Any]:
        """Flat, as progress.json holds it."""
        return {**vars(self.usage), **{name: value for name, value in vars(self).items() if name != "usage"}}

    @property
    def state(self) -> str:
        """In a word or two."""
        return self.phase if self.phase and self.status == "running" else self.status

    @property
    def amount(self) -> str:
        """`12/640`, `12`, or nothing."""
        if self.rows_total:
            return f"{self.rows:.0f}/{self.rows_total:.0f}"
        return f"{self.rows:.0f}" if self.rows else ""

    @property
    def tokens_per_second(self) -> float:
        return self.usage.tokens / self.seconds if self.seconds > 0 else 0.0

    def line(self) -> str:
        """One line for a log."""
        parts = [f"{self.name}: {self.state}"]
        if self.shards:
            parts.append(
                f"shards {self.shards_done}/{self.shards}"
                + (f" ({self.shards_failed} failed)" if self.shards_failed else "")
            )
        if self.amount:
            parts.append(f"{self.unit} {self.amount}")
        if self.usage.calls:
            parts.append(f"calls {self.usage.calls_engine:.0f} engine + {self.usage.calls_log:.0f} log")
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        if self.note:
            parts.append(self.note)
        if self.eta is not None:
            parts.append(f"ETA {duration(self.eta)}")
        elif self.seconds and self.status != "running":
            parts.append(duration(self.seconds))
        return ", ".join(parts)


class _Watched:
    """What the board keeps of a stage beside its counters.

    Attributes:
        rows, shards: how fast they grow.
        workers: what each of its workers is doing.
        is_new: no step was counted in this phase.
        inputs: rows that this session has to read; `read` are those of the shards that have begun, and `planned` the
            rows that they make.
    """

    def __init__(self, name: str, shards: int = 0, shards_done: int = 0, inputs: float = 0, phase: str = "") -> None:
        self.stage = StageProgress(name, "waiting", phase, shards, shards_done)
        self.began: float | None = None
        self.rows, self.shards = Pace(), Pace()
        self.workers: dict[str, str] = {}
        self.is_new = True
        self.inputs, self.read, self.planned = inputs, 0.0, 0.0

    def start(self) -> None:
        """Begin, if it has not begun."""
        if self.stage.status == "waiting":
            self.stage.status, self.began = "running", time.monotonic()
            self.enter(self.stage.phase)

    def enter(self, phase: str) -> None:
        """Begin a phase: what came before it says nothing about the time that is left."""
        now, self.stage.phase, self.is_new = time.monotonic(), phase, True
        self.rows.restart(now, self.stage.rows)
        self.shards.restart(now, self.stage.shards_done)

    def look(self) -> None:
        """Bring total, time and ETA up to date."""
        stage, now = self.stage, time.monotonic()
        if self.read > 0:
            stage.rows_total = round(self.planned * max(self.inputs / self.read, 1.0))
        if self.began is None:
            return
        stage.seconds = now - self.began
        if stage.rows_total:
            stage.eta = self.rows.left(now, stage.rows_total - stage.rows)
        else:
            stage.eta = self.shards.left(now, stage.shards - stage.shards_done)

    def end(self, status: str) -> None:
        self.look()
        self.stage.status, self.stage.phase, self.stage.eta, self.began = status, "", None, None


class ProgressBoard:
    """Counters by stage and notes to show; every call is quick. One thread may report while another looks."""

    def __init__(self) -> None:
        self._stages: dict[str, _Watched] = {}
        self._notes: collections.deque[Note] = collections.deque()
        self._stops: dict[str, str] = {}
        self._actors: collections.Counter[str] = collections.Counter()
        self._meters: Meters | None = None

    def meter(self, run: str) -> None:
        """Export the counters to Prometheus, under the name of a run."""
        self._meters = Meters(run)

    def replies(self, name: str, counts: Mapping[tuple[str, bool], int]) -> None:
        """Replies of judges that were read or not, since the worker's last word."""
        if self._meters is not None:
            self._meters.replies(name, counts)

    def stop(self, name: str, reason: str) -> None:
        """Ask the workers of a stage (`*`: of every stage) to end in good order; the first reason stays."""
        self._stops.setdefault(name, reason)

    def stopping(self, name: str) -> str | None:
        """Why a stage should end, or None."""
        return self._stops.get(name) or self._stops.get("*")

    def begin(
        self,
        name: str,
        shards: int = 0,
        shards_done: int = 0,
        *,
        waits: bool = False,
        inputs: float = 0,
        phase: str = "",
    ) -> None:
        """Show a stage.

        Args:
            waits: it begins with the first report from a worker.
            inputs: rows that its missing shards read.
            phase: what it begins with.
        """
        watched = self._stages[name] = _Watched(name, shards, shards_done, inputs, phase)
        if not waits:
            watched.start()

    def add(
        self,
        name: str,
        usage: Usage,
        *,
        rows: float = 0,
        shards_done: int = 0,
        shards_failed: int = 0,
        planned: float = 0,
        read: float = 0,
    ) -> None:
        """Add to a stage's counters.

        Args:
            planned: rows that shards which begin now will make, from so many rows that they `read`.
        """
        watched = self._at_work(name)
        stage = watched.stage
        if stage.phase and (usage.calls_engine or shards_done):
            watched.enter("")
        resumed = usage.calls_engine and stage.usage.calls_log and not stage.usage.calls_engine
        stage.usage += usage
        stage.rows += rows
        stage.shards_done += shards_done
        stage.shards_failed += shards_failed
        watched.planned += planned
        watched.read += read
        if resumed:  # up to here all was in the call log, which takes no time
            watched.enter("")
        now = time.monotonic()
        watched.rows.see(now, stage.rows)
        watched.shards.see(now, stage.shards_done)
        if self._meters is not None:
            self._meters.add(name, usage, rows)

    def phase(self, name: str, phase: str, worker: str = "") -> None:
        """Note what a worker of a stage is doing; while one of them makes rows (an empty phase), the stage does."""
        watched = self._at_work(name)
        watched.workers[worker] = phase
        shown = "" if "" in watched.workers.values() else phase
        if shown != watched.stage.phase:
            watched.enter(shown)

    def actor(self, name: str, address: str) -> None:
        """Note an actor that begins to work for a stage, on the node with that address."""
        self._actors[name] += 1
        self.say(f"{name}: actor {self._actors[name]} begins on {address}")

    def put(self, name: str, steps: float, steps_total: float, note: str = "") -> None:
        """Set how far a stage is whose work is steps (a training). The first of them takes longer than the others, and
        what came before it may be resumed, so the pace is that of the steps after it."""
        watched = self._at_work(name)
        stage, now = watched.stage, time.monotonic()
        stage.rows, stage.rows_total, stage.unit, stage.note = steps, steps_total, "steps", note
        if watched.is_new:
            watched.is_new = False
            watched.rows.restart(now, steps)
        else:
            watched.rows.see(now, steps)

    def end(self, name: str, status: str) -> None:
        self._stages.setdefault(name, _Watched(name)).end(status)

    def say(self, line: str, shard: int | None = None) -> None:
        self._notes.append(Note(line, shard))

    def trace(self, text: str, shard: int | None = None) -> None:
        """Note a traceback."""
        self._notes.append(Note(text, shard, is_trace=True))

    def look(self) -> tuple[list[dict[str, Any]], list[Note]]:
        """All stages as plain data, and the notes since the last look."""
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        watched = list(self._stages.values())
        for one in watched:
            one.look()
            if self._meters is not None:
                stage = one.stage
                self._meters.look(stage.name, stage.shards, stage.shards_done, stage.shards_failed, stage.seconds)
        return [one.stage.plain() for one in watched], notes

    def _at_work(self, name: str) -> _Watched:
        """A stage that a worker speaks of: if it has not begun, it begins."""
        watched = self._stages.setdefault(name, _Watched(name))
        watched.start()
        return watched


def duration(seconds: float) -> str:
    """Seconds for readers: `99 s`, `12 min 05 s`, `25 h 00 min`."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
