"""A run's state as lines of text and as a live table."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ray_pipeline.graph.progress import duration
from ray_pipeline.operate.status import BatchState, RunState, StageState

_LIFE = {
    "running": "running",
    "silent": "heartbeat stopped: killed, or cut off from its storage; rerun the same `quorum run` to resume",
    "ended": "not running",
}
_STYLE = {"waiting": "dim", "failed": "red", "stopped": "yellow", "partial": "yellow", "done": "green"}


def head_line(state: RunState) -> str:
    done = sum(stage.status == "done" for stage in state.stages)
    eta = f", {duration(state.eta_seconds)} until the running stages are done" if state.eta_seconds is not None else ""
    skipped = sum(stage.status == "skipped" for stage in state.stages)
    stages = f"{done} of {len(state.stages)} stages done{f', {skipped} skipped' if skipped else ''}"
    return f"{state.folder}: {state.workflow}, {stages}; {_LIFE[state.life]}{eta}"


def stage_line(stage: StageState) -> str:
    """One line with the known figures of a stage."""
    parts = [stage.phase] if stage.phase else []
    if stage.shards:
        parts.append(f"shards {stage.shards_done}/{stage.shards}")
    if stage.shards_failed:
        quarantined = f", {stage.shards_quarantined} quarantined" if stage.shards_quarantined else ""
        calls = f", {stage.calls_failed} calls to make again" if stage.calls_failed else ""
        parts.append(f"{stage.shards_failed} failed{quarantined}{calls}")
    if stage.rows:
        rate = f" ({stage.rows_per_second:.3g}/s)" if stage.rows_per_second is not None else ""
        parts.append(f"{stage.rows:.0f} rows{rate}")
    if stage.usage.calls:
        parts.append(f"calls {stage.usage.calls_engine:.0f} engine + {stage.usage.calls_log:.0f} log")
        if stage.tokens_per_second is not None:
            parts.append(f"{stage.tokens_per_second:.0f} tokens/s")
        if stage.usage.prefix_hit_rate is not None:
            parts.append(f"prefix hits {stage.usage.prefix_hit_rate:.0%}")
    if stage.seconds:
        parts.append(duration(stage.seconds))
    if stage.eta_seconds is not None:
        parts.append(f"ETA {duration(stage.eta_seconds)}")
    parts += [f"{kind} {number}" for kind, number in stage.errors.items()]
    if stage.error:
        parts.append(stage.error)
    return f"{stage.name:<28} {stage.status:<8} {', '.join(parts)}".rstrip()


def batch_line(batch: BatchState) -> str:
    """One line about an open batch."""
    age = duration(batch.age_seconds)
    return f"batch {batch.id or '(no number yet)'}: {batch.calls:,} calls of {batch.model}, {batch.status}, {age} old"


def lines(state: RunState) -> list[str]:
    decided = [state.decided] if state.decided else []
    return [head_line(state), *decided, *(stage_line(stage) for stage in state.stages), *map(batch_line, state.batches)]


def picture(state: RunState) -> Group:
    """The state as a table for a terminal; waiting and skipped stages are counted, not listed."""
    table = Table(box=None, pad_edge=False)
    for title in ("stage", ""):
        table.add_column(title)
    for title in ("shards", "failed", "rows", "rows/s", "tokens/s", "prefix", "time", "ETA"):
        table.add_column(title, justify="right")
    table.add_column("errors by kind")
    for stage in state.stages:
        if stage.status in ("waiting", "skipped"):
            continue
        hits = stage.usage.prefix_hit_rate
        table.add_row(
            stage.name,
            stage.phase or stage.status,
            f"{stage.shards_done}/{stage.shards}" if stage.shards else "",
            str(stage.shards_failed or ""),
            f"{stage.rows:.0f}" if stage.rows else "",
            f"{stage.rows_per_second:.3g}" if stage.rows_per_second else "",
            f"{stage.tokens_per_second:.0f}" if stage.tokens_per_second else "",
            f"{hits:.0%}" if hits is not None else "",
            duration(stage.seconds) if stage.seconds else "",
            duration(stage.eta_seconds) if stage.eta_seconds is not None else "",
            # Errors may quote models and servers, so they are never markup.
            Text(", ".join([*(f"{k} {n}" for k, n in stage.errors.items()), *([stage.error] if stage.error else [])])),
            style=_STYLE.get(stage.status),
        )
    waiting = sum(stage.status == "waiting" for stage in state.stages)
    foot = [Text(f"{waiting} stages waiting", style="dim")] if waiting else []
    decided = [Text(state.decided)] if state.decided else []
    return Group(Text(head_line(state)), *decided, table, *foot, *(Text(batch_line(batch)) for batch in state.batches))
