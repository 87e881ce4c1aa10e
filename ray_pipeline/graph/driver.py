"""Run a DAG in a run folder: find what is there, let an executor make the rest, and keep the books."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console

from ray_pipeline.graph.display import Display
from ray_pipeline.graph.executor import Executor
from ray_pipeline.graph.failures import lift_quarantine
from ray_pipeline.graph.heartbeat import BEAT_SECONDS, Heartbeat, LogUse
from ray_pipeline.graph.interrupts import Interrupted, Interrupts
from ray_pipeline.graph.log import RunLog, logger
from ray_pipeline.graph.manifest import Manifest
from ray_pipeline.graph.progress import ProgressBoard, StageProgress
from ray_pipeline.graph.results import DECISION, final_round, is_skipped
from ray_pipeline.graph.resume import drop_skipped, drop_stale, drop_undone, finished, to_do
from ray_pipeline.graph.session import Session, StageTask, TaskGraph
from ray_pipeline.graph.spending import Budget, Spending
from ray_pipeline.graph.stage import Dag, Stage, StageResult
from ray_pipeline.graph.stage_work import End, Failure
from ray_pipeline.store.errors import NotWritten, StoreError
from ray_pipeline.store.files import Folder, point_at

Before = Callable[[Sequence[Stage], Mapping[str, StageResult], Callable[[str], None]], None]
"""Gets the stages to do, the results of the others, and what writes a line to log and terminal."""

#: Seconds between two looks at the board.
_LOOK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How to run, as opposed to what: nothing here changes a table.

    Attributes:
        session: what the workers get of it.
        config: the resolved configuration, for config.yaml and the manifest.
        given: what of it was set and is no default, for commands that read it back.
        report: what the report needs beside the tables, kept in the manifest so that it can be rewritten.
        workflow: name or file by which `find_workflow` finds the workflow again; default: the name of the DAG.
        partial: the DAG is a part of the stored run's; the manifest keeps the entries of the other stages.
        lift_quarantine: retry quarantined shards of `session.only`.
        budget: limit over all sessions.
        log_json: log as JSON lines, on the terminal and in logs/TIMESTAMP.jsonl.
        debug: show tracebacks on the terminal, too.
        shared: create the run folder and the call log for the user's group.
    """

    session: Session
    config: Mapping[str, Any]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    workflow: str = ""
    partial: bool = False
    lift_quarantine: bool = False
    budget: Budget = dataclasses.field(default_factory=Budget)
    log_json: bool = False
    debug: bool = False
    shared: bool = False
    beat_seconds: float = BEAT_SECONDS


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """Results by stage, what went wrong by stage, and the stages that were not run because of it."""

    results: dict[str, StageResult]
    failures: dict[str, Failure]
    not_run: list[str]


def execute(
    dag: Dag,
    settings: RunSettings,
    executor: Executor,
    *,
    from_group: str | None = None,
    to_group: str | None = None,
    console: Console | None = None,
    before: Before | None = None,
) -> RunOutcome:
    """Run the stages that are not done. A failure ends only what needs it.

    Args:
        before: called if there is anything to do, before the first stage; what it raises ends the run.

    Raises:
        RunBusy: another living process holds the run folder.
        ValueError: `from_group` or `to_group` is no stage, or a stage before `from_group` is not complete.
        Interrupted: SIGINT or SIGTERM came; the calls that were answered are in the call log.
    """
    console, session = console or Console(), settings.session
    folder = Folder(session.folder)
    wanted = dag.upto(to_group)
    again = [s for s in dag.downstream(from_group) if s in wanted] if from_group else []
    for new in (folder, Folder(session.calls_root)):
        new.make(settings.shared)
    interrupts = Interrupts()
    with (
        RunLog(folder, console, settings.log_json, settings.debug) as log,
        Heartbeat(
            folder, beat_seconds=settings.beat_seconds, on_loss=lambda: _lost(folder, log, interrupts), say=log.say
        ),
    ):
        folder.write_bytes("config.yaml", yaml.safe_dump(dict(settings.config), sort_keys=False).encode())
        results = finished(dag, wanted, session, from_group, log.say)
        again += [s for s in drop_stale(wanted, results) if s not in again]
        todo = to_do(wanted, results)
        if todo and before is not None:
            before(todo, results, log.say)
        head = {
            "workflow": settings.workflow or dag.name,
            "given": dict(settings.given),
            "report": dict(settings.report),
            "num_shards": session.num_shards,
            "calls_root": session.calls_root,
        }
        books = _Books(folder, Manifest(folder, dag, settings.config, head, settings.partial), log, results)
        width = max(len(stage.name) for stage in wanted)
        for stage in wanted:
            state = "done before" if stage.name in results else "skipped" if is_skipped(stage, results) else "to do"
            log.say(f"{stage.name:<{width}}  {state:<11}  {stage.folder_name}")
        for last in (False, True):
            todo = to_do(wanted, results)
            for stage in todo:
                if settings.lift_quarantine and stage.name in (session.only or {}):
                    lift_quarantine(folder / stage.folder_name)
                if stage in again:
                    folder.delete_folder(stage.folder_name)
            if todo:
                log.stages = [stage.name for stage in wanted]
                with _log_use(settings, log.say):
                    _make(todo, again, settings, executor, books, console, interrupts)
            if last or not books.failures or not (undone := drop_undone(wanted, folder, results)):
                break
            # A stage failed because a file that it read was damaged, and the file was set aside.
            log.say(f"remaking what was damaged: {', '.join(stage.name for stage in undone)}")
            again = drop_stale(wanted, results)
            books.failures.clear()
        shown, final = [s for s in wanted if s.view and s.name in results], final_round(results)
        for stage in sorted(shown, key=lambda s: s.round == final):  # of several, the last is shown
            point_at(folder, stage.view, stage.folder_name)
        books.write()
        not_run = [s.name for s in to_do(wanted, results) if s.name not in books.failures]
        return RunOutcome(results, books.failures, not_run)


def _log_use(settings: RunSettings, say: Callable[[str], None]) -> contextlib.AbstractContextManager[object]:
    session = settings.session
    if session.replay_only:
        return contextlib.nullcontext()
    return LogUse(Folder(session.calls_root), session.folder, beat_seconds=settings.beat_seconds, say=say)


def _lost(folder: Folder, log: RunLog, interrupts: Interrupts) -> None:
    """End this process at once: two writers must not work in one run folder."""
    log.say(f"another process has taken over {folder.location}; this one stops")
    interrupts.end_now()


def _make(
    todo: Sequence[Stage],
    again: Sequence[Stage],
    settings: RunSettings,
    executor: Executor,
    books: _Books,
    console: Console,
    interrupts: Interrupts,
) -> None:
    """Make stages and keep the books. A book that cannot be written, or a signal, stops the stages gracefully."""
    unwritten: NotWritten | None = None
    by_name = {stage.name: stage for stage in todo}
    spending = Spending(Folder(settings.session.folder), settings.budget, books.log.say)
    with executor.open(settings.session, todo, books.log.say) as board, interrupts:  # Ray takes SIGTERM when it starts
        remade = frozenset(stage.name for stage in again)
        session = dataclasses.replace(settings.session, id=uuid.uuid4().hex[:8], board=board, again=remade)
        if reason := spending.over():
            board.stop("*", reason)
        shown_on = Console(quiet=True) if settings.log_json else console
        with _shown(books, board, spending, shown_on, executor.live, interrupts):
            for part in _up_to_decisions(todo):
                graph = TaskGraph(tuple(_task(session, stage, books.results) for stage in to_do(part, books.results)))
                for name, end in executor.run(graph, dict(books.results)):
                    if isinstance(end, StageResult) or interrupts.number is None:
                        try:
                            books.take(by_name[name], end, board)
                        except NotWritten as error:
                            unwritten = unwritten or error
                            board.stop("*", str(error))
                if to_do(part, books.results):
                    break  # without its decision nothing after it can be made
        if interrupts.number is not None and to_do(todo, books.results):
            raise Interrupted(interrupts.number)
        if unwritten is not None:
            raise unwritten


def _up_to_decisions(todo: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in parts that are made one after another: each ends with a decision whether later rounds are made."""
    parts: list[list[Stage]] = [[]]
    for stage in todo:
        parts[-1].append(stage)
        if stage.role == DECISION:
            parts.append([])
    return [part for part in parts if part]


def _task(session: Session, stage: Stage, results: Mapping[str, StageResult]) -> StageTask:
    """A task that reads the inputs which are not skipped."""
    task = session.task(stage)
    inputs = {role: parent for role, parent in task.inputs.items() if not is_skipped(parent, results)}
    return dataclasses.replace(task, inputs=inputs)


class _Books:
    """What became of the stages: in the log, the manifest and the results."""

    def __init__(self, folder: Folder, manifest: Manifest, log: RunLog, results: dict[str, StageResult]) -> None:
        self.folder, self.manifest, self.log, self.results = folder, manifest, log, results
        self.failures: dict[str, Failure] = {}
        self.write()

    def write(self) -> None:
        self.manifest.write(self.results, self.failures)

    def take(self, stage: Stage, end: End, board: ProgressBoard) -> None:
        if isinstance(end, StageResult):
            self.results[stage.name] = end
            board.end(stage.name, "done")
            self.log.say(_done_line(end))
            for skipped in drop_skipped(self.manifest.stages, self.results) if stage.role == DECISION else ():
                board.end(skipped.name, "skipped")
        elif not to_do(list(stage.inputs.values()), self.results):
            # A stage fails with the one that it reads; only the first is a failure to report.
            self.failures[stage.name] = end
            self.log.trace(end.trace)
            self.log.say(f"{stage.name}: FAILED: {end.reason}")
            board.end(stage.name, "failed")
        self.write()


def _done_line(result: StageResult) -> str:
    usage, parts = result.usage, [f"{result.name}: done in {result.usage.wall_seconds:.1f} s"]
    parts += [f"{n} {kind}" for kind, n in result.rows.items()]
    if usage.calls:
        parts.append(f"calls {usage.calls_engine:.0f} engine + {usage.calls_log:.0f} log")
        # Shards that an earlier session made have tokens here, and no seconds.
        if usage.wall_seconds >= 1:
            parts.append(f"{usage.tokens / usage.wall_seconds:.0f} tokens/s")
        parts.append(f"prefix hits {usage.prefix_hit_rate or 0.0:.0%}")
    if usage.cost:
        parts.append(f"cost {usage.cost:.4g}")
    return ", ".join(parts)


@contextlib.contextmanager
def _shown(
    books: _Books, board: ProgressBoard, spending: Spending, console: Console, live: bool, interrupts: Interrupts
) -> Iterator[None]:
    """Look at the board twice a second, in a thread: show it, write it down, and stop the run at its limit or after a
    signal."""
    ended = threading.Event()

    def look(last: bool = False) -> None:
        try:
            stages, notes = board.look()
        except Exception as error:  # The display must never end a run.
            logger.debug("progress: %s", error)
            return
        for note in notes:
            (books.log.trace if note.is_trace else books.log.say)(note.text, note.shard)
        progress = [StageProgress.read(s) for s in stages]
        books.log.progress(progress)
        known = {s.name for s in progress}
        progress += [StageProgress(name, "cached") for name in list(books.results) if name not in known]
        display.show(progress)
        try:
            books.manifest.progress(stages, last)
            if reason := spending.look(stages, write=last):
                board.stop("*", reason)
        except StoreError as error:
            logger.debug("progress: %s", error)

    def forever() -> None:
        while not ended.wait(_LOOK_SECONDS):
            interrupts.pass_on(board, books.log.say)
            look()

    with Display(console, books.log.stages, live) as display:
        books.log.display = display
        thread = threading.Thread(target=forever, name="quorum-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=30)
            books.log.display = None
        look(last=True)  # not after an interrupt: the run folder may be another process's by now
