"""The executor of one process: resume, failures, retries, stops, replays and dead engines, as on a cluster."""

from __future__ import annotations

import asyncio
import errno
import functools
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from ray_pipeline.cli.terminal import refused
from ray_pipeline.engines import log_storage
from ray_pipeline.engines.base import Completion, EngineDead, Message, Sampling
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.models import Placement
from ray_pipeline.graph import interrupts
from ray_pipeline.graph.driver import RunOutcome, RunSettings, execute
from ray_pipeline.graph.failures import FailureSettings, read_failures
from ray_pipeline.graph.in_process import InProcessExecutor
from ray_pipeline.graph.interrupts import Interrupted
from ray_pipeline.graph.session import Session, ShardTask, TaskGraph
from ray_pipeline.graph.spending import Budget
from ray_pipeline.graph.stage import Dag, ShardInput, ShardOutput, ShardWork, Stage, WholeInput, WholeWork
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import CRITIQUES, to_table
from tests.scripted import ScriptedEngine, echo, user

SHARDS = 4
QUICK = FailureSettings(backoff_s=0.0)


class World:
    """A stage that asks, one that reads its table, and one that reads that; what happened; what shall go wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engines: list[Engine] = []
        self.asked: list[int] = []
        self.failing: dict[int, int] = {}  # shard → times to fail
        self.deaths = 0
        self.delay = 0.0
        self.held: Callable[[], bool] = lambda: False  # whether replies are held back
        self.on_shard: Callable[[int], None] = lambda shard: None
        self.ask = Stage("ask", ShardWork(self._ask, ("critiques",), engine=self._engine), {})
        self.copy = Stage("copy", ShardWork(self._copy, ("critiques",)), {}, {"asked": self.ask})
        self.count = Stage("count", WholeWork(self._count), {}, {"copied": self.copy})
        self.dag = Dag("world", [self.count])

    def run(self, failure: FailureSettings = QUICK, only: Any = None, **more: Any) -> RunOutcome:
        session = Session(
            str(self.folder), str(self.folder / "calls"), SHARDS, failure, more.pop("replay_only", False), only
        )
        self.out = io.StringIO()
        settings = RunSettings(session, {}, beat_seconds=0.4, **{k: v for k, v in more.items() if k != "from_group"})
        return execute(
            self.dag, settings, InProcessExecutor(), from_group=more.get("from_group"), console=Console(file=self.out)
        )

    def log(self) -> str:
        return "".join(file.read_text() for file in (self.folder / "logs").glob("*.log"))

    def tables(self) -> dict[str, bytes]:
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in self.folder.glob("*/shard-*.parquet")}

    def _engine(self) -> Engine:
        self.engines.append(Engine(self))
        return self.engines[-1]

    async def _ask(self, given: ShardInput) -> ShardOutput:
        assert given.engine is not None
        self.asked.append(given.shard)
        self.on_shard(given.shard)
        reply = await given.engine.bound(f"{given.shard:032x}", "r").chat(user(str(given.shard)), Sampling())
        given.watch("judge", True)
        given.tick(1)
        if self.failing.get(given.shard, 0) > 0:
            self.failing[given.shard] -= 1
            raise OSError("no space left")
        row = {
            "candidate_id": reply.text, "prompt_id": f"{given.shard:032x}", "flawed": None, "failure_type": None,
            "reason": reply.text, "parse_status": "ok", "raw": None, "attempts": 1,
        }  # fmt: skip
        row = {name: row.get(name) for name in CRITIQUES.names}
        return ShardOutput({"critiques": to_table([row], CRITIQUES)}, {"rows": 1})

    def _copy(self, given: ShardInput) -> ShardOutput:
        assert given.facts["asked"]["counts"] == {"rows": SHARDS}
        return ShardOutput({"critiques": given.tables["asked"]})

    def _count(self, given: WholeInput) -> dict[str, Any]:
        given.log("counting")
        return {"rows": given.inputs["copied"].table().read_all().num_rows}


class Engine(ScriptedEngine):
    """Dies with its first call as often as its world wants."""

    useful_concurrency = 2  # calls in flight where the placement sets none

    def __init__(self, world: World) -> None:
        super().__init__(echo, delay=world.delay)
        self.world, self.closed = world, 0

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        if self.world.deaths > 0:
            self.world.deaths -= 1
            raise EngineDead("its process is gone")
        reply = await super().chat(messages, sampling)
        self.in_flight += 1
        while self.world.held():
            await asyncio.sleep(0.01)
        self.in_flight -= 1
        return reply

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "run")


def test_a_run_and_the_same_command_again(world: World) -> None:
    outcome = world.run()
    assert not outcome.failures and outcome.results["count"].facts == {"rows": SHARDS}
    assert [engine.closed for engine in world.engines] == [1] and sorted(world.asked) == [0, 1, 2, 3]
    assert outcome.results["ask"].usage.calls_engine == SHARDS and outcome.results["ask"].usage.device_seconds > 0
    manifest = json.loads((world.folder / "manifest.json").read_text())
    assert {name: entry["status"] for name, entry in manifest["stages"].items()} == dict.fromkeys(
        ("ask", "copy", "count"), "done"
    )
    assert manifest["stages"]["ask"]["usage"]["calls_engine"] == SHARDS
    assert list(manifest["stages"]["count"]["usage"]) == ["wall_seconds"]
    progress = {stage["name"]: stage for stage in json.loads((world.folder / "progress.json").read_text())}
    assert (progress["ask"]["status"], progress["ask"]["shards_done"], progress["ask"]["rows"]) == ("done", 4, 4)
    assert "count: counting" in world.log() and "ask: done in" in world.out.getvalue()
    assert not (world.folder / world.ask.folder_name / "_attempts").exists()

    again = world.run()
    assert all(result.cached for result in again.results.values()) and len(world.engines) == 1


def test_only_missing_shards_are_made_again_and_their_calls_come_from_the_log(world: World) -> None:
    world.run()
    before = world.tables()
    (world.folder / world.ask.folder_name / "shard-00002.parquet").unlink()
    world.asked.clear()
    outcome = world.run()
    assert world.asked == [2] and world.engines[-1].calls == 0 and outcome.results["copy"].cached
    assert world.tables() == before
    world.run(from_group="copy")
    assert world.asked == [2] and world.tables() == before


def test_a_shard_that_fails_is_retried_and_its_traceback_is_in_the_log(world: World) -> None:
    world.failing = {1: 2}
    outcome = world.run()
    assert not outcome.failures and world.asked.count(1) == 3
    assert "ask: shard 1 failed (OSError: no space left" in world.out.getvalue()
    assert "Traceback" in world.log() and 'raise OSError("no space left")' in world.log()
    assert "Traceback" not in world.out.getvalue()


def test_debug_shows_the_traceback_on_the_terminal(world: World) -> None:
    world.failing = {1: 1}
    world.run(debug=True)
    assert 'raise OSError("no space left")' in world.out.getvalue()


def test_a_shard_that_is_given_up_fails_its_stage_and_what_reads_it(world: World) -> None:
    world.failing = {1: 99}
    failure = FailureSettings(backoff_s=0.0, retries=0, quarantine_after=2)
    outcome = world.run(failure)
    assert "1 of 4 shards failed, the first is shard 1: OSError: no space left" in outcome.failures["ask"].reason
    assert outcome.not_run == ["copy", "count"] and world.engines[-1].closed == 1
    stage = Folder(str(world.folder)) / world.ask.folder_name
    assert list(read_failures(stage)) == [1] and len(stage.names(".parquet")) == 3
    world.run(failure)
    assert read_failures(stage)[1].quarantined and world.asked.count(1) == 2
    outcome = world.run(failure)  # left alone
    assert world.asked.count(1) == 2 and "quarantine" in outcome.failures["ask"].reason
    world.failing = {}
    outcome = world.run(failure, {"ask": (1,)}, lift_quarantine=True)
    assert "ask" in outcome.results and read_failures(stage) == {}


def test_a_run_at_its_limit_stops_and_goes_on(world: World) -> None:
    (world.folder).mkdir()
    (world.folder / "spent.json").write_text('{"device_seconds": 3600, "cost": 0.0}')
    outcome = world.run(budget=Budget(max_cost=1.0, device_hour=2.0))
    assert "--max-cost is 1" in outcome.failures["ask"].reason and world.asked == [] and world.engines == []
    assert not world.run(budget=Budget(max_cost=9.0, device_hour=2.0)).failures


def test_what_stops_a_stage_is_its_reason_and_the_rest_is_kept(world: World) -> None:
    from ray_pipeline.graph.stage import StageStop

    def stop(shard: int) -> None:
        if shard == 3:
            raise StageStop("the judge is deaf")

    world.on_shard = stop
    assert world.run().failures["ask"].reason == "the judge is deaf"
    world.on_shard = lambda shard: None
    world.asked.clear()
    assert not world.run().failures and world.asked == [3]


def test_a_replay_asks_no_engine(world: World, tmp_path: Path) -> None:
    missing = world.run(replay_only=True)
    assert "the call log has no r call" in missing.failures["ask"].reason and world.engines[-1].calls == 0
    world.run()
    replayed = World(tmp_path / "replay")
    replayed.folder.mkdir()
    (replayed.folder / "calls").symlink_to(world.folder / "calls")
    assert not replayed.run(replay_only=True).failures
    assert replayed.engines[0].calls == 0 and replayed.tables() == world.tables()


@pytest.mark.parametrize("part", ["calls", "ask-"])
def test_storage_that_cannot_be_written_stops_the_run_and_no_call_is_made_twice(
    world: World, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call log, or the stage's own folder with its receipts and its record of failures."""
    monkeypatch.setattr(log_storage, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setenv("QUORUM_CACHE", str(world.folder.parent / "cache"))
    write, room = Folder._write_bytes, [False]

    def full(folder: Folder, name: str, data: bytes) -> None:
        if not room[0] and folder.location.startswith(f"{world.folder}/{part}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, name, data)

    monkeypatch.setattr(Folder, "_write_bytes", full)
    reason = world.run().failures["ask"].reason
    assert f"cannot write {world.folder}/{part}" in reason
    assert "No space left on device; free disk space there, then rerun the same command to resume" in reason
    room[0] = True
    assert not world.run().failures
    assert sum(engine.calls for engine in world.engines) == SHARDS


@pytest.mark.parametrize("stage", ["ask", "copy"])
def test_a_full_disk_puts_no_shard_in_quarantine(world: World, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for small files, and for no table of the stage."""
    write, room = Folder._write_bytes, [False]

    def full(folder: Folder, name: str, data: bytes) -> None:
        if not room[0] and folder.location.startswith(f"{world.folder}/{stage}-") and name.endswith(".parquet"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, name, data)

    monkeypatch.setattr(Folder, "_write_bytes", full)
    for _ in range(QUICK.quarantine_after + 1):
        reason = world.run().failures[stage].reason
        assert f"cannot write {world.folder}/{stage}-" in reason and "free disk space there" in reason
        [folder] = world.folder.glob(f"{stage}-*")
        assert read_failures(Folder(str(folder))) == {}
    room[0] = True
    assert not world.run().failures
    assert sum(engine.calls for engine in world.engines) == SHARDS


def send(number: int, when: Callable[[], bool]) -> threading.Thread:
    """Send this process a signal at some moment."""

    def wait() -> None:
        while not when():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_gracefully_and_calls_in_progress_are_kept(
    world: World, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    opened: set[LoggedEngine] = set()
    told: set[LoggedEngine] = set()
    enter, stop = LoggedEngine.__aenter__, LoggedEngine.stop
    monkeypatch.setattr(LoggedEngine, "__aenter__", lambda engine: (opened.add(engine), enter(engine))[1])
    monkeypatch.setattr(LoggedEngine, "stop", lambda engine, reason: (told.add(engine), stop(engine, reason))[1])
    world.held = lambda: not opened <= told  # calls in progress end when every open shard has heard of the signal
    sender = send(number, lambda: len(opened) == Placement().shards_in_flight and world.engines[0].in_flight == 2)
    with pytest.raises(typer.Exit) as ended, refused():
        world.run()
    sender.join()
    assert ended.value.exit_code == code
    assert f"{signal.Signals(number).name}: no further call is made; waiting up to 10 s" in world.out.getvalue()
    assert "FAILED" not in world.out.getvalue() and not (world.folder / "heartbeat.json").exists()
    assert world.engines[0].calls == 2 and world.engines[0].closed == 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers

    world.held = lambda: False
    assert not world.run().failures and world.engines[1].calls == SHARDS - 2


def test_a_call_that_takes_too_long_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 1.0)
    world.delay = 60.0
    sender = send(signal.SIGTERM, lambda: bool(world.engines) and world.engines[0].in_flight == 2)
    begin = time.monotonic()
    with pytest.raises(Interrupted) as ended:
        world.run()
    sender.join()
    assert ended.value.number == signal.SIGTERM and time.monotonic() - begin < 30
    world.delay = 0.0
    assert not world.run().failures


def test_an_engine_that_dies_is_replaced(world: World) -> None:
    world.deaths = 1
    outcome = world.run()
    assert not outcome.failures and len(world.engines) == 2 and [e.closed for e in world.engines] == [1, 1]
    world = World(world.folder.parent / "other")
    world.deaths = 99
    outcome = world.run(FailureSettings(engine_deaths=2, retries=0, max_failed_shards=1.0))
    assert "EngineDead: given up, the engine died 2 times on this shard" in outcome.failures["ask"].reason


def test_an_executor_sees_what_each_shard_waits_for(world: World) -> None:
    session = Session(str(world.folder), "calls", 2)
    graph = TaskGraph(tuple(session.task(stage) for stage in world.dag.stages))
    assert graph.shards == (
        ShardTask("ask", 0, ()),
        ShardTask("ask", 1, ()),
        ShardTask("copy", 0, (("ask", 0),)),
        ShardTask("copy", 1, (("ask", 1),)),
        ShardTask("count", None, (("copy", 0), ("copy", 1))),
    )
    world.run()
    session = Session(str(world.folder), "calls", SHARDS)
    assert TaskGraph((session.task(world.copy),)).shards == ()  # what is done needs nothing


@functools.cache
def _imports() -> str:
    modules = ("stage", "failures", "gather", "session", "shards", "stage_work", "driver", "in_process", "resume")
    code = f"import sys\nfor name in {modules}: __import__('ray_pipeline.graph.' + name)\nprint('ray' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_only_the_executor_on_ray_imports_ray() -> None:
    assert _imports() == "False"


@pytest.mark.parametrize(("shared", "folder", "file"), [(False, 0o700, 0o600), (True, 0o2770, 0o660)])
def test_a_run_folder_is_for_the_user_alone_unless_it_is_shared(
    shared: bool, folder: int, file: int, tmp_path: Path
) -> None:
    world = World(tmp_path / "run")
    world.run(shared=shared)
    found = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_dir()} == {folder}
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_file()} == {file}
    assert len(found) > 10
