"""What a run is doing right now: a board that workers write to, and its picture on the terminal."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ray_pipeline.graph.meters import Meters

#: Seconds between two pictures: a live table may be quick, lines in a log should be few.
LIVE_SECONDS = 0.5
LINE_SECONDS = 10.0
#: Stages that a live table shows before it leaves out those that wait or are done.
MOST_LINES = 20


@dataclasses.dataclass
class StageProgress:
    """Counters of one stage. Token counts are of calls that the engine answered; `cost` is what endpoints asked for
    them; `device_seconds` is time of GPUs (without GPUs: of engines) that actors held, idle or not."""

    name: str
    status: str = "waiting"
    shards: int = 0
    shards_done: int = 0
    shards_failed: int = 0
    rows: float = 0
    rows_total: float = 0
    calls_engine: float = 0
    calls_log: float = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0
    cached_tokens: float = 0
    cost: float = 0.0
    device_seconds: float = 0.0
    seconds: float = 0.0
    began: float | None = None
    shards_at_start: int = 0

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
        return (self.prompt_tokens + self.completion_tokens) / self.seconds if self.seconds > 0 else 0.0

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
        if self.calls_engine or self.calls_log:
            parts.append(f"calls {self.calls_engine:.0f} engine + {self.calls_log:.0f} log")
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        if self.eta is not None:
            parts.append(f"ETA {duration(self.eta)}")
        elif self.seconds and self.status != "running":
            parts.append(duration(self.seconds))
        return ", ".join(parts)


class ProgressBoard:
    """Counters by stage and lines to show. Lives in an actor of its own; every call is quick."""

    def __init__(self) -> None:
        self._stages: dict[str, StageProgress] = {}
        self._lines: list[str] = []
        self._of_shards: list[int | None] = []
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
        self, name: str, shards: int = 0, shards_done: int = 0, rows_total: float = 0, *, waits: bool = False
    ) -> None:
        """Show a stage; one that waits begins with the first word from a worker."""
        stage = self._stages[name] = StageProgress(name, "waiting", shards, shards_done, rows_total=rows_total)
        stage.shards_at_start = shards_done
        if not waits:
            self._start(stage)

    def add(self, name: str, counts: Mapping[str, float]) -> str | None:
        """Add to counters; returns why the stage should end, if it should."""
        stage = self._at_work(name)
        for key, value in counts.items():
            setattr(stage, key, getattr(stage, key) + value)
        if self._meters is not None:
            self._meters.add(name, counts)
        return self.stopping(name)

    def actor(self, name: str, address: str) -> None:
        """Tell of an actor that begins to work for a stage, on the node with that address."""
        self._actors[name] += 1
        self.say(f"{name}: actor {self._actors[name]} begins on {address}")

    def put(self, name: str, counts: Mapping[str, float]) -> None:
        """Set counters that do not add up (steps of a training, say)."""
        stage = self._at_work(name)
        for key, value in counts.items():
            setattr(stage, key, value)

    def end(self, name: str, status: str) -> None:
        stage = self._stages.setdefault(name, StageProgress(name))
        self._age(stage)
        stage.status = status
        stage.began = None

    def say(self, line: str, shard: int | None = None) -> None:
        self._lines.append(line)
        self._of_shards.append(shard)

    def look(self) -> tuple[list[dict[str, Any]], list[str], list[int | None]]:
        """All stages as plain data, the lines since the last look, and the shard of each line where it has one."""
        lines, self._lines = self._lines, []
        shards, self._of_shards = self._of_shards, []
        for stage in self._stages.values():
            self._age(stage)
            if self._meters is not None:
                self._meters.look(stage.name, stage.shards, stage.shards_done, stage.shards_failed, stage.seconds)
        return [dataclasses.asdict(stage) for stage in self._stages.values()], lines, shards

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
    """Shows a board: a live table on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, names: list[str]) -> None:
        self._console = console
        self._names = names
        self._live: Live | None = None
        self._last: dict[str, str] = {}
        self._shown = 0.0
        if console.is_terminal:
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
            f"{s.calls_engine:.0f}+{s.calls_log:.0f}" if s.calls_engine or s.calls_log else "",
            f"{s.tokens_per_second:.0f}" if s.calls_engine else "",
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
