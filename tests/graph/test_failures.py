"""Shards that fail: retries with back-off, quarantine, the window that stops a stage, and what does not count."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines.base import BudgetSpent, CallFailed, Completion, EngineError, Sampling
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph import receipts, shard_report
from ray_pipeline.graph.failures import FailureLedger, FailureSettings, read_failures
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.progress import ProgressBoard
from ray_pipeline.graph.receipts import Receipt
from ray_pipeline.graph.session import Session, StageTask
from ray_pipeline.graph.shards import EngineHost, make_columnar
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage, StageRef, StageStop
from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import DECISIONS
from tests.scripted import ScriptedEngine, logged_calls, said, user

QUICK = FailureSettings(backoff_s=0.0)
EMPTY = ShardOutput({"decisions": DECISIONS.empty_table()})


class Board(ProgressBoard):
    """A progress board that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.reason: str | None = None
        self.lines: list[str] = []
        self.traces: list[str] = []
        self.added: list[Usage] = []

    def say(self, line: str, shard: int | None = None) -> None:
        self.lines.append(line)

    def trace(self, text: str, shard: int | None = None) -> None:
        self.traces.append(text)

    def add(self, name: str, usage: Usage, **counts: Any) -> None:
        self.added.append(usage)

    def stopping(self, name: str) -> str | None:
        return self.reason


def job(
    folder: Path, function: Any, engine: Any = None, failure: FailureSettings = QUICK, board: Any = None
) -> StageTask:
    work = ShardWork(function=function, tables=("decisions",), engine=engine)
    session = Session(str(folder), str(folder / "calls"), 4, failure, id="s1", board=board or Board())
    return StageTask(StageRef("stage", "f", str(folder / "stage"), 4, ("decisions",)), work, {}, session)


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineHost]:
    monkeypatch.setattr(shard_report, "REPORT_SECONDS", 0.02)
    return lambda *jobs: EngineHost(jobs, devices=2.0)


def make(actor: EngineHost, shard: int = 0, stage: str = "stage") -> Receipt:
    return asyncio.run(actor.make(stage, shard))


def columnar(given: StageTask, shard: int = 1) -> Receipt:
    return make_columnar(given, shard)


def failing(times: int) -> tuple[Any, list[int]]:
    """A shard function that fails so many times, and the shards that it was called for."""
    seen: list[int] = []

    async def function(given: ShardInput) -> ShardOutput:
        seen.append(given.shard)
        if len(seen) <= times:
            raise OSError("no space left")
        return EMPTY

    return function, seen


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "status", "tries"), [(0, "ok", 1), (2, "ok", 3), (3, "failed", 3)])
def test_a_shard_is_tried_again_before_it_is_given_up(
    tmp_path: Path, actor: Callable[..., EngineHost], times: int, status: str, tries: int
) -> None:
    board = Board()
    function, seen = failing(times)
    receipt = make(actor(job(tmp_path, function, ScriptedEngine, board=board)))
    assert (receipt.status, len(seen)) == (status, tries)
    assert len(board.lines) == tries - 1 and all("again in 0 s" in line for line in board.lines)
    if status == "failed":
        assert receipt.error is not None and receipt.error.startswith("OSError: no space left")
    assert len(board.traces) == times and all("Traceback" in text and "no space left" in text for text in board.traces)


def test_columnar_shards_are_tried_again_too(tmp_path: Path) -> None:
    seen: list[int] = []

    def function(given: ShardInput) -> ShardOutput:
        seen.append(given.shard)
        if len(seen) < 3:
            raise OSError("no space left")
        return EMPTY

    assert columnar(job(tmp_path, function)).status == "ok" and seen == [1, 1, 1]
    assert columnar(job(tmp_path, failing_always, failure=FailureSettings(retries=0))).status == "failed"


def failing_always(given: ShardInput) -> ShardOutput:
    raise OSError("never")


class LostBoard(Board):
    """A board that ended with the node of the driver."""

    def stopping(self, name: str) -> str | None:
        raise ConnectionError("the board is gone")

    say = trace = add = stopping  # type: ignore[assignment]


@pytest.mark.parametrize("engine", [None, ScriptedEngine])
def test_an_error_that_nobody_foresaw_is_told_in_its_own_words(
    tmp_path: Path, actor: Callable[..., EngineHost], engine: Any
) -> None:
    """Ray hands on "UDF failed to process a data block" and keeps the cause to itself."""
    given = job(tmp_path, failing_always, engine, board=LostBoard())
    receipt = make(actor(given)) if engine else columnar(given)
    assert receipt.status == "failed" and str(receipt.error).startswith("ConnectionError: the board is gone")


@pytest.mark.parametrize("engine", [None, ScriptedEngine])
def test_a_node_that_does_not_see_the_run_folder_stops_the_stage_and_is_named(
    tmp_path: Path, actor: Callable[..., EngineHost], engine: Any
) -> None:
    """It may have joined when nobody asked the nodes any more."""
    unseen = StageRef("prompts", "f", str(tmp_path / "elsewhere"), 4, ("prompts",))
    given = dataclasses.replace(job(tmp_path, failing_always, engine), inputs={"prompts": unseen})
    receipt = make(actor(given)) if engine else columnar(given)
    assert receipt.status == "stopped"
    assert re.search(r"elsewhere.*: the node [\d.]+ does not see it. Mount the run folder", str(receipt.error))


def test_a_stage_that_stops_in_this_process_says_its_reason_alone(tmp_path: Path) -> None:
    def stops(given: ShardInput) -> ShardOutput:
        raise StageStop("there is nothing to gate")

    stage = Stage("gate", ShardWork(stops, ("decisions",)), {})
    with pytest.raises(StageStop, match=r"^there is nothing to gate$"):
        make_here([stage], Session(str(tmp_path), str(tmp_path / "calls"), 2), {}, lambda line: None)


def test_back_off_doubles_up_to_its_limit() -> None:
    policy = FailureSettings(backoff_s=2, backoff_max_s=10)
    assert [policy.pause(n) for n in (1, 2, 3, 4)] == [2, 4, 8, 10]


def test_an_engine_that_starts_with_its_first_call_tells_what_that_took(
    tmp_path: Path, actor: Callable[..., EngineHost]
) -> None:
    class Lazy(ScriptedEngine):
        start_seconds = 0.0

        async def chat(self, *given: Any) -> Completion:
            self.start_seconds = 30.0
            return await super().chat(*given)

    async def function(given: ShardInput) -> ShardOutput:
        assert given.engine is not None
        await given.engine.bound("0" * 32, "r").chat(user(str(given.shard)), Sampling())
        return EMPTY

    one = actor(job(tmp_path, function, Lazy))
    first, second = (make(one, shard).usage["start_seconds"] for shard in (0, 1))
    assert 60 <= first < 61 and second == 0.0  # 2 devices, and told once


def test_device_seconds_of_shards_of_one_actor_count_once(tmp_path: Path, actor: Callable[..., EngineHost]) -> None:
    async def slow(given: ShardInput) -> ShardOutput:
        await asyncio.sleep(0.3)
        return EMPTY

    board, begin = Board(), time.monotonic()
    one = actor(job(tmp_path, slow, ScriptedEngine, board=board))

    async def both() -> list[Receipt]:
        return await asyncio.gather(*(one.make("stage", shard) for shard in (0, 1)))

    one._limit = asyncio.Semaphore(8)
    receipts = asyncio.run(both())
    billed = sum(change.device_seconds for change in board.added)
    # 2 devices for one span of 0.3 s at least; counted by each shard, it would be twice the time that has passed.
    assert 0.6 <= billed <= 2 * (time.monotonic() - begin)
    assert sum(r.usage["device_seconds"] for r in receipts) <= billed


# --- lost workers and dead engines ------------------------------------------------------------------------------------


def test_a_lost_worker_is_no_failure_and_a_dead_engine_is(tmp_path: Path, actor: Callable[..., EngineHost]) -> None:
    policy = FailureSettings(retries=0, engine_deaths=2, preemptions=3)
    function, seen = failing(0)
    board = Board()
    given = job(tmp_path, function, ScriptedEngine, policy, board)
    receipts.begin_attempt(given, 2)  # whoever made these marks never came back
    receipts.begin_attempt(given, 2)
    assert make(actor(given), 2).status == "ok"
    assert board.lines == ["stage: shard 2 restarts: its actor or node was lost"]

    receipts.mark_death(given, 3)
    assert make(actor(given), 3).status == "ok"
    (tmp_path / "stage/shard-00003.parquet").unlink()
    receipts.mark_death(given, 3)
    receipt = make(actor(given), 3)
    assert receipt.status == "failed" and receipt.error == "EngineDead: given up, the engine died 2 times on this shard"

    for _ in range(4):
        receipts.begin_attempt(given, 0)
    receipt = make(actor(given), 0)
    assert receipt.status == "failed" and receipt.error is not None and "lost 4 times" in receipt.error
    assert seen == [2, 3]


@pytest.mark.parametrize(
    ("marks", "deaths", "status"), [(0, 0, "ok"), (3, 0, "ok"), (4, 0, "failed"), (5, 2, "ok"), (6, 2, "failed")]
)
def test_a_shard_may_lose_its_worker_as_often_as_is_allowed_and_no_more(
    tmp_path: Path, actor: Callable[..., EngineHost], marks: int, deaths: int, status: str
) -> None:
    """Attempts that an engine's death ended are no preemptions."""
    function, seen = failing(0)
    given = job(tmp_path, function, ScriptedEngine, FailureSettings(retries=0, engine_deaths=9, preemptions=3))
    for _ in range(marks):
        receipts.begin_attempt(given, 1)
    for _ in range(deaths):
        receipts.mark_death(given, 1)
    receipt = make(actor(given), 1)
    assert (receipt.status, len(seen)) == (status, int(status == "ok"))
    assert (receipt.error or "").startswith("Preempted: ") == (status == "failed")


# --- stopping in good order -------------------------------------------------------------------------------------------


def test_a_stopped_engine_keeps_what_is_under_way_and_asks_nothing_more(tmp_path: Path) -> None:
    engine = ScriptedEngine("ok", delay=0.2)

    async def go() -> list[Any]:
        logged = LoggedEngine(engine, Folder(str(tmp_path)), 0, 1)
        async with logged:
            calls = [asyncio.create_task(logged.call("0" * 32, "r", user(str(n)), Sampling())) for n in range(3)]
            await asyncio.sleep(0.05)
            logged.stop("enough")
            logged.stop("later reasons do not count")
            late = asyncio.create_task(logged.call("0" * 32, "r", user("late"), Sampling()))
            return await asyncio.gather(*calls, late, return_exceptions=True)

    *answered, late = asyncio.run(go())
    assert all(isinstance(a, Completion) for a in answered)
    assert isinstance(late, BudgetSpent) and str(late) == "enough"
    assert engine.calls == 3 and logged_calls(Folder(str(tmp_path))).num_rows == 3


def test_the_board_stops_a_shard_and_its_calls_are_kept(tmp_path: Path, actor: Callable[..., EngineHost]) -> None:
    board = Board()

    async def function(given: ShardInput) -> ShardOutput:
        assert given.engine is not None
        for n in range(1000):
            if n == 3:
                board.reason = "the run may cost no more"
            await given.engine.bound("0" * 32, "r").chat(user(str(n)), Sampling())
            await asyncio.sleep(0.03)
        return EMPTY

    def engine() -> ScriptedEngine:
        return ScriptedEngine(lambda messages, sampling: said("yes"))

    receipt = make(actor(job(tmp_path, function, engine, board=board)))
    assert (receipt.status, receipt.error) == ("stopped", "the run may cost no more")
    assert 3 < logged_calls(Folder(str(tmp_path / "calls"))).num_rows < 50
    again = make(actor(job(tmp_path, function, engine, board=board)), 1)
    assert again.status == "stopped"  # a shard that has not begun does not begin


def test_a_stage_that_stops_leaves_the_others_of_its_pool_at_work(
    tmp_path: Path, actor: Callable[..., EngineHost]
) -> None:
    """Two stages on one engine, and of one every reply is unreadable."""
    engines: list[ScriptedEngine] = []

    def engine() -> ScriptedEngine:
        engines.append(ScriptedEngine())
        return engines[-1]

    def reading(read: bool) -> Any:
        async def function(given: ShardInput) -> ShardOutput:
            assert given.engine is not None
            for n in range(8):
                await given.engine.bound("0" * 32, "r").chat(user(f"{read} {given.shard} {n}"), Sampling())
                given.watch("judge", read)
            return EMPTY

        return function

    def named(name: str, read: bool) -> StageTask:
        made = job(tmp_path, reading(read), engine, FailureSettings(backoff_s=0.0, error_window=8))
        return dataclasses.replace(made, ref=dataclasses.replace(made.ref, name=name, folder=str(tmp_path / name)))

    pool = actor(named("deaf", read=False), named("well", read=True))
    stopped = make(pool, 0, "deaf")
    assert stopped.stage == "deaf" and stopped.status == "stopped"
    assert stopped.error is not None and stopped.error.startswith("2 of the last 2 replies of judge could not be read")
    assert make(pool, 0, "well").status == "ok"
    assert len(engines) == 1 and engines[0].calls == 2 + 8


@pytest.mark.parametrize(("allowed", "status"), [(0.25, "stopped"), (0.5, "ok")])
def test_every_llm_stage_stops_by_the_configured_error_rate(
    tmp_path: Path, actor: Callable[..., EngineHost], allowed: float, status: str
) -> None:
    async def function(given: ShardInput) -> ShardOutput:
        for read in (True, True, False):
            given.watch("judge", read)
        return EMPTY

    policy = FailureSettings(max_error_rate=allowed, error_window=8)
    receipt = make(actor(job(tmp_path, function, ScriptedEngine, policy)))
    assert receipt.status == status
    if status == "stopped":
        assert "1 of the last 3 replies of judge could not be read (33%, allowed 25%)" in str(receipt.error)


def asking(statuses: list[str]) -> Any:
    """A shard function with three calls, which notes what became of them."""

    async def function(given: ShardInput) -> ShardOutput:
        assert given.engine is not None
        statuses.clear()
        for text in ("one", "two", "three"):
            try:
                await given.engine.bound("0" * 32, "r").chat(user(text), Sampling())
            except EngineError as error:
                statuses.append(type(error).__name__)
            else:
                statuses.append("ok")
        return EMPTY

    return function


def test_only_calls_that_failed_are_made_again_until_they_are_given_up(
    tmp_path: Path, actor: Callable[..., EngineHost]
) -> None:
    """A session has two tries, and the call is given up in the second session."""
    policy, board = FailureSettings(retries=1, backoff_s=0.0, give_up_calls_after=2), Board()
    engine = ScriptedEngine(lambda messages, _: CallFailed("HTTP 500: busy") if messages == user("two") else "fine")
    statuses: list[str] = []
    stage = job(tmp_path, asking(statuses), lambda: engine, policy, board)

    ledger = FailureLedger(Folder(stage.ref.folder), policy, range(4))
    receipt = make(actor(stage))
    assert (receipt.status, receipt.calls, engine.calls) == ("failed", 1, 3 + 1)
    assert receipt.error == "CallsFailed: 1 calls, the last: HTTP 500: busy" and board.traces == []
    assert ledger.failed(0, receipt.error, receipt.calls) is None
    with pytest.raises(StageStop, match=r"1 calls failed, in 1 of 4 shards .*HTTP 500: busy.*exactly these calls"):
        ledger.check("stage", 4)
    assert not stage.ref.table("decisions").state().rows

    receipt = make(actor(stage))
    assert (receipt.status, statuses) == ("ok", ["ok", "CallFailed", "ok"]) and engine.calls == 3 + 1 + 2
    assert any(
        "1 calls are given up after 2 sessions, their rows keep the status error" in line for line in board.lines
    )


def test_a_call_that_works_again_and_one_that_is_rejected_finish_their_shard(
    tmp_path: Path, actor: Callable[..., EngineHost]
) -> None:
    def script(messages: Any, sampling: Any) -> Any:
        if messages == user("one"):
            return EngineError("HTTP 400: content policy")
        return CallFailed("HTTP 500: busy") if messages == user("two") and engine.calls <= 3 else "fine"

    engine = ScriptedEngine(script)
    statuses: list[str] = []
    receipt = make(actor(job(tmp_path, asking(statuses), lambda: engine)))
    assert (receipt.status, receipt.calls, statuses) == ("ok", 0, ["EngineError", "ok", "ok"])


def test_a_stage_that_stops_for_unread_replies_says_why_calls_failed(
    tmp_path: Path, actor: Callable[..., EngineHost]
) -> None:
    async def function(given: ShardInput) -> ShardOutput:
        assert given.engine is not None
        for _ in range(3):
            with contextlib.suppress(EngineError):
                await given.engine.bound("0" * 32, "r").chat(user("x"), Sampling())
            given.watch("judge", False)
        return EMPTY

    engine = ScriptedEngine(lambda *_: EngineError("HTTP 400: System role not supported"))
    receipt = make(actor(job(tmp_path, function, lambda: engine, FailureSettings(error_window=8))))
    assert receipt.status == "stopped" and "The last call failed: HTTP 400: System role not" in str(receipt.error)


# --- the record of a stage --------------------------------------------------------------------------------------------


def test_quarantine_comes_after_so_many_sessions_and_keeps_the_error(tmp_path: Path) -> None:
    stage, policy = Folder(str(tmp_path)), FailureSettings(quarantine_after=2)
    for session in (1, 2):
        ledger = FailureLedger(stage, policy, [1, 2, 3])
        assert ledger.quarantined == set()
        ledger.done(1)
        assert ledger.failed(2, f"OSError: session {session}") is None
        with pytest.raises(StageStop, match=f"1 of 4 shards failed, the first is shard 2: OSError: session {session}"):
            ledger.check("stage", 4)
    found = read_failures(stage)[2]
    assert (found.failures, found.quarantined, found.error, found.kind) == (2, True, "OSError: session 2", "OSError")
    ledger = FailureLedger(stage, policy, [2, 3])
    assert ledger.quarantined == {2}
    with pytest.raises(StageStop, match=r"quarantine, the first is shard 2, which failed 2 times.*quorum retry"):
        ledger.check("stage", 4)
    ledger.done(2)
    ledger.check("stage", 4)
    assert read_failures(stage) == {}


def test_records_of_shards_that_are_there_by_now_go(tmp_path: Path) -> None:
    stage = Folder(str(tmp_path))
    FailureLedger(stage, QUICK, [1]).failed(1, "x")
    FailureLedger(stage, QUICK, [2])
    assert read_failures(stage) == {}
    (tmp_path / "_failures.json").write_text("{")
    assert read_failures(stage) == {}


def test_too_many_failed_shards_stop_a_stage(tmp_path: Path) -> None:
    ledger = FailureLedger(Folder(str(tmp_path)), FailureSettings(max_failed_shards=0.5, shard_window=6), range(99))
    assert ledger.failed(0, "x") is None and ledger.failed(1, "x") is None  # too few to say
    for shard in (2, 3, 4):
        ledger.done(shard)
    assert ledger.failed(5, "x") is None  # 3 of 6
    assert ledger.failed(6, "x") is None  # the window has moved on: 3 of 6 again
    reason = ledger.failed(7, "OSError: disk full")
    assert reason is None  # 3 of 6: two old failures have left the window
    assert "4 of the last 6 shards failed (67%, allowed 50%)" in (ledger.failed(8, "OSError: disk full") or "")
