"""Progress for readers: a live picture on a terminal, plain lines in logs and elsewhere."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from ray_pipeline.graph.pace import Reminder
from ray_pipeline.graph.progress import StageProgress, duration
from ray_pipeline.store.outside import shown

#: Seconds between two lines about progress, at first and in the end.
LINE_SECONDS, LONGEST_SECONDS = 10.0, 60.0
#: Stages that a picture shows before it leaves out those that wait or are done.
MOST_LINES = 20
_STYLES = {"waiting": "dim", "failed": "red", "done": "green", "cached": "green"}


class ProgressLines:
    """The lines about running stages that are due; a stage without news has none."""

    def __init__(self) -> None:
        self._reminder = Reminder(LINE_SECONDS, LONGEST_SECONDS)
        self._last: dict[str, str] = {}

    def due(self, stages: Sequence[StageProgress]) -> list[tuple[StageProgress, str]]:
        if not self._reminder.due(time.monotonic()):
            return []
        lines = [(stage, stage.line()) for stage in stages if stage.status == "running"]
        new = [(stage, line) for stage, line in lines if self._last.get(stage.name) != line]
        self._last.update({stage.name: line for stage, line in new})
        return new


class Display:
    """Shows a board: a live picture on a terminal, plain lines elsewhere.

    Args:
        names: of the stages.
        live: False writes lines on a terminal, too.
    """

    def __init__(self, console: Console, names: list[str], live: bool = True) -> None:
        self._console = console
        self._names = names
        self._live: Live | None = None
        self._lines = ProgressLines()
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
            self._live.update(picture([by_name.get(n, StageProgress(n)) for n in self._names]))
            return
        for _, line in self._lines.due(stages):
            self.say(f"  {shown(line)}")


def picture(stages: list[StageProgress]) -> Progress:
    """A line with a bar for each stage; of many, only for those that something happens to."""
    left_out: collections.Counter[str] = collections.Counter()
    if len(stages) > MOST_LINES:  # a comparison has dozens
        left_out.update(s.status for s in stages if s.status not in ("running", "failed"))
        stages = [s for s in stages if s.status in ("running", "failed")]
    columns = [_Words(name) for name in ("amount", "time", "eta", "figures")]
    drawn = Progress(_Words("name"), _Words("state"), BarColumn(12), *columns)
    for stage in stages:
        done, total = _share(stage)
        words = {
            "name": stage.name,
            "state": stage.state,
            "amount": f"{stage.amount} {stage.unit}" if stage.amount else "",
            "time": duration(stage.seconds) if stage.seconds else "",
            "eta": f"ETA {duration(stage.eta)}" if stage.eta is not None else "",
            "figures": _figures(stage),
        }
        drawn.add_task("", completed=int(done), total=total, words=words, style=_STYLES.get(stage.status, ""))
    if left_out:
        words = {"name": ", ".join(f"{n} stages {status}" for status, n in left_out.items())}
        drawn.add_task("", total=1, words=words, style="dim")
    return drawn


class _Words(ProgressColumn):
    """Words about a stage; names of stages come from configurations, so none of it is markup. On a narrow terminal the
    last figures are cut off."""

    def __init__(self, which: str) -> None:
        super().__init__(Column(no_wrap=which != "figures"))  # what may wrap is what becomes narrow
        self._which = which

    def render(self, task: Task) -> Text:
        return Text(
            shown(task.fields["words"].get(self._which, "")), task.fields["style"], no_wrap=True, overflow="ellipsis"
        )


def _share(stage: StageProgress) -> tuple[float, float | None]:
    """How much of how much is done; of an unknown amount (None) the bar moves to and fro."""
    if stage.status in ("done", "cached"):
        return 1, 1
    if stage.rows_total:
        return min(stage.rows, stage.rows_total), stage.rows_total
    if stage.shards:
        return stage.shards_done, stage.shards
    return 0, None if stage.status == "running" else 1


def _figures(stage: StageProgress) -> str:
    parts = [
        f"{stage.shards_done}/{stage.shards} shards" if stage.shards else "",
        f"{stage.shards_failed} failed" if stage.shards_failed else "",
        f"{stage.usage.calls_engine:.0f}+{stage.usage.calls_log:.0f} calls" if stage.usage.calls else "",
        f"{stage.tokens_per_second:.0f} tokens/s" if stage.usage.calls_engine else "",
        stage.note,
    ]
    return "  ".join(part for part in parts if part)
