"""What a run is doing right now: a board that workers write to, and its picture on the terminal."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.meters import Meters

#: Seconds between two lines in a log.
LINE_SECONDS = 10.0
#: Stages that a live table shows before it leaves out those that wait or are done.
MOST_LINES = 20


class Note(NamedTuple):
    """A line for the run's log, with its shard where it has one."""

    text: str
    shard: int | None = None
    is_trace: bool = False


@dataclasses.dataclass
class StageProgress:
    """One stage at work: `usage` is of this session, `seconds` is time on the clock since it began."""

    name: str
    status: str = "waiting"
    shards: int = 0
    shards_done: int = 0
    shards_failed: int = 0
    rows: float = 0
    rows_total: float = 0
    usage: Usage = dataclasses.field(default_factory=Usage)
    seconds: float = 0.0
    began: float | None = None
    shards_at_start: int = 0

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> StageProgress:
        """From what `plain` gave. Raises TypeError when it is something else."""
        own = {name: value for name, value in stored.items() if name == "seconds" or name not in vars(Usage())}
        return cls(**own, usage=Usage.read({**stored, "seconds": 0.0}))

    def plain(self) -> dict[str, Any]:
        """Flat, as progress.json holds it."""
        return {**vars(self.usage), **{name: value for name, value in vars(self).items() if name != "usage"}}

    @property
    def eta(self) -> float | None:
        """Seconds to go, from the rows or shards of this session, or None when nothing can be said yet."""
        if self.status != "running" or self.seconds <= 0:
            return None
        if self.rows_total and self.rows:
            return self.seconds * max(self.rows_total - self.rows, 0) / self.rows
        done = self.shards_done - self.shards_at_start
        if done > 0:
            return self.seconds * (self.shards - self.shards_done) / done
        return None

    @property
    def tokens_per_second(self) -> float:
        return self.usage.tokens / self.seconds if self.seconds > 0 else 0.0

    def line(self) -> str:
        """One line for a log."""
        parts = [f"{self.name}: {self.status}"]
        if self.shards:
            parts.append(
                f"shards {self.shards_done}/{self.shards}"
                + (f" ({self.shards_failed} failed)" if self.shards_failed else "")
            )
        if self.rows:
            parts.append(f"rows {self.rows:.0f}" + (f"/{self.rows_total:.0f}" if self.rows_total else ""))
        if self.usage.calls:
            parts.append(f"calls {self.usage.calls_engine:.0f} engine + {self.usage.calls_log:.0f} log")
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        if self.eta is not None:
            parts.append(f"ETA {duration(self.eta)}")
        elif self.seconds and self.status != "running":
            parts.append(duration(self.seconds))
        return ", ".join(parts)


class ProgressBoard:
    """Counters by stage and notes to show; every call is quick. One thread may report while another looks."""

    def __init__(self) -> None:
        self._stages: dict[str, StageProgress] = {}
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

    def begin(self, name: str, shards: int = 0, shards_done: int = 0, *, waits: bool = False) -> None:
        """Show a stage; one that waits begins with the first report from a worker."""
        stage = self._stages[name] = StageProgress(name, "waiting", shards, shards_done)
        stage.shards_at_start = shards_done
        if not waits:
            self._start(stage)

    def add(self, name: str, usage: Usage, *, rows: float = 0, shards_done: int = 0, shards_failed: int = 0) -> None:
        """Add to a stage's counters."""
        stage = self._at_work(name)
        stage.usage += usage
        stage.rows += rows
        stage.shards_done += shards_done
        stage.shards_failed += shards_failed
        if self._meters is not None:
            self._meters.add(name, usage, rows)

    def actor(self, name: str, address: str) -> None:
        """Note an actor that begins to work for a stage, on the node with that address."""
        self._actors[name] += 1
        self.say(f"{name}: actor {self._actors[name]} begins on {address}")

    def put(self, name: str, rows: float, rows_total: float) -> None:
        """Set how far a stage is whose rows do not add up (steps of a training, say)."""
        stage = self._at_work(name)
        stage.rows, stage.rows_total = rows, rows_total

    def end(self, name: str, status: str) -> None:
        stage = self._stages.setdefault(name, StageProgress(name))
        self._age(stage)
        stage.status = status
        stage.began = None

    def say(self, line: str, shard: int | None = None) -> None:
        self._notes.append(Note(line, shard))

    def trace(self, text: str, shard: int | None = None) -> None:
        """Note a traceback."""
        self._notes.append(Note(text, shard, is_trace=True))

    def look(self) -> tuple[list[dict[str, Any]], list[Note]]:
        """All stages as plain data, and the notes since the last look."""
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        stages = list(self._stages.values())
        for stage in stages:
            self._age(stage)
            if self._meters is not None:
                self._meters.look(stage.name, stage.shards, stage.shards_done, stage.shards_failed, stage.seconds)
        return [stage.plain() for stage in stages], notes

    def _at_work(self, name: str) -> StageProgress:
        """The counters of a stage that a worker speaks of: if it has not begun, it begins."""
        stage = self._stages.setdefault(name, StageProgress(name))
        if stage.status == "waiting":
            self._start(stage)
        return stage

    @staticmethod
    def _start(stage: StageProgress) -> None:
        stage.status, stage.began = "running", time.monotonic()

    @staticmethod
    def _age(stage: StageProgress) -> None:
        if stage.began is not None:
            stage.seconds = time.monotonic() - stage.began


class Display:
    """Shows a board: a live table on a terminal, plain lines elsewhere.

    Args:
        names: of the stages.
        live: False writes lines on a terminal, too.
    """

    def __init__(self, console: Console, names: list[str], live: bool = True) -> None:
        self._console = console
        self._names = names
        self._live: Live | None = None
        self._last: dict[str, str] = {}
        self._shown = 0.0
        if live and console.is_terminal:
            self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, stages: list[StageProgress]) -> None:
        by_name = {s.name: s for s in stages}
        if self._live is not None:
            self._live.update(_picture([by_name.get(n, StageProgress(n)) for n in self._names]))
            return
        if time.monotonic() - self._shown < LINE_SECONDS:
            return
        self._shown = time.monotonic()
        for stage in stages:
            if stage.status == "running":
                line = stage.line()
                if line != self._last.get(stage.name):
                    self._last[stage.name] = line
                    self.say(f"  {line}")


def _picture(stages: list[StageProgress]) -> Table:
    table = Table(box=None, pad_edge=False)
    if len(stages) > MOST_LINES:  # a comparison has dozens: show those that something happens to, and count the others
        others = collections.Counter(s.status for s in stages if s.status not in ("running", "failed"))
        table.caption = ", ".join(f"{n} stages {status}" for status, n in others.items())
        stages = [s for s in stages if s.status in ("running", "failed")]
    for title, justify in [
        ("stage", "left"),
        ("", "left"),
        ("shards", "right"),
        ("rows", "right"),
        ("calls engine+log", "right"),
        ("tokens/s", "right"),
        ("time", "right"),
        ("ETA", "right"),
    ]:
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for s in stages:
        table.add_row(
            s.name,
            s.status,
            f"{s.shards_done}/{s.shards}" if s.shards else "",
            f"{s.rows:.0f}/{s.rows_total:.0f}" if s.rows_total else (f"{s.rows:.0f}" if s.rows else ""),
            f"{s.usage.calls_engine:.0f}+{s.usage.calls_log:.0f}" if s.usage.calls else "",
            f"{s.tokens_per_second:.0f}" if s.usage.calls_engine else "",
            duration(s.seconds) if s.seconds else "",
            duration(s.eta) if s.eta is not None else "",
            style={"waiting": "dim", "failed": "red", "done": "green", "cached": "green"}.get(s.status),
        )
    return table


def duration(seconds: float) -> str:
    """Seconds for readers: `99 s`, `12 min 05 s`, `25 h 00 min`."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
