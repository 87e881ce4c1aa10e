"""The board that workers write to, its lines, and a run folder that is read back."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph import progress
from ray_pipeline.graph.display import LINE_SECONDS, Display, picture
from ray_pipeline.graph.log import RunLog
from ray_pipeline.graph.pace import Pace, Reminder
from ray_pipeline.graph.progress import Note, ProgressBoard, StageProgress
from ray_pipeline.graph.results import read_run
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds; the test moves them."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def stages(board: ProgressBoard) -> dict[str, StageProgress]:
    return {s["name"]: StageProgress.read(s) for s in board.look()[0]}


def work(board: ProgressBoard, clock: list[float], seconds: int, rows_per_second: float, **usage: float) -> None:
    """Let a judge stage make rows for a while, with a report every second."""
    for _ in range(seconds):
        clock[0] += 1
        board.add("judge", Usage(**usage or {"calls_engine": 1}), rows=rows_per_second)


def test_a_board_adds_up_and_keeps_time(clock: list[float]) -> None:
    board = ProgressBoard()
    board.begin("judge", 8, 2)
    board.add("judge", Usage(calls_engine=3, calls_log=1, prompt_tokens=100, completion_tokens=20))
    clock[0] += 5
    board.add("judge", Usage(calls_engine=1), rows=3, shards_done=1)
    clock[0] += 5
    board.add("judge", Usage(calls_engine=1), rows=2, shards_done=1)
    judge = stages(board)["judge"]
    assert (judge.usage.calls_engine, judge.usage.calls_log, judge.shards_done, judge.seconds) == (5, 1, 4, 10.0)
    assert judge.tokens_per_second == 12.0
    assert judge.eta == 20.0  # two shards of this session in 10 s, four to go: the two of before do not count
    assert judge.line() == "judge: running, shards 4/8, rows 5, calls 5 engine + 1 log, 12 tokens/s, ETA 20 s"
    board.end("judge", "done")
    clock[0] += 100
    done = stages(board)["judge"]
    assert done.seconds == 10.0 and done.line().endswith("10 s") and done.eta is None


def test_a_board_knows_stages_that_it_was_not_told_of(clock: list[float]) -> None:
    board = ProgressBoard()
    board.add("late", Usage(), rows=1)
    board.put("train", 5, 20)
    board.end("never begun", "failed")
    clock[0] += 4
    found = stages(board)
    assert found["train"].amount == "5/20" and found["late"].rows == 1 and found["never begun"].status == "failed"
    board.say("hello")
    assert board.look()[1] == [Note("hello")] and board.look()[1] == []


# --- when it will be done ---------------------------------------------------------------------------------------------


def test_totals_are_known_from_the_first_shard(clock: list[float]) -> None:
    """k rows for each prompt, in shards of different sizes: the first that begins gives the total of all."""
    board = ProgressBoard()
    board.begin("candidates", 3, inputs=100)
    assert stages(board)["candidates"].rows_total == 0
    for prompts in (10, 60, 30):
        board.add("candidates", Usage(), planned=4 * prompts, read=prompts)
        assert stages(board)["candidates"].rows_total == 400
    board.add("candidates", Usage(), planned=-4 * 60, read=-60)  # this one is made again
    assert stages(board)["candidates"].rows_total == 400


def test_no_eta_until_enough_has_been_seen(clock: list[float]) -> None:
    board = ProgressBoard()
    board.begin("judge", 4, inputs=100)
    board.add("judge", Usage(), planned=1000, read=100)
    work(board, clock, 9, 10)
    assert stages(board)["judge"].eta is None
    work(board, clock, 1, 10)
    assert stages(board)["judge"].eta == 90.0


def test_start_up_is_left_out_of_the_eta(clock: list[float]) -> None:
    """Ten minutes until the engine is there, then 10 rows a second."""
    board = ProgressBoard()
    board.begin("judge", 4, inputs=100, phase="starting engine")
    assert stages(board)["judge"].line() == "judge: starting engine, shards 0/4"
    clock[0] += 300
    board.phase("judge", "loading model", "a")
    board.add("judge", Usage(), planned=1000, read=100)
    clock[0] += 300
    assert stages(board)["judge"].line() == "judge: loading model, shards 0/4, rows 0/1000"
    board.phase("judge", "", "a")
    assert stages(board)["judge"].state == "running"
    work(board, clock, 20, 10)
    judge = stages(board)["judge"]
    assert judge.eta == 80.0 and judge.seconds == 620.0
    board.phase("judge", "loading model", "b")  # a second worker does not stop the first
    assert stages(board)["judge"].state == "running" and stages(board)["judge"].eta == 80.0


def test_resumed_work_is_left_out_of_the_eta(clock: list[float]) -> None:
    """5,000 rows come from the call log within a second, the others at 10 a second."""
    board = ProgressBoard()
    board.begin("judge", 4, 1, inputs=100)
    board.add("judge", Usage(), planned=6000, read=100)
    work(board, clock, 1, 5000, calls_log=5000)
    work(board, clock, 21, 10)
    assert stages(board)["judge"].eta == pytest.approx(79.0)


def test_a_changed_rate_is_followed(clock: list[float]) -> None:
    board = ProgressBoard()
    board.begin("judge", 4, inputs=100)
    board.add("judge", Usage(), planned=100_000, read=100)
    work(board, clock, 1000, 20)
    assert stages(board)["judge"].eta == pytest.approx(80_000 / 20)
    work(board, clock, 60, 5)
    half = stages(board)["judge"].eta
    work(board, clock, 60, 5)
    after = stages(board)["judge"]
    assert half is not None and 80_000 / 20 < half < 80_000 / 5
    assert after.eta == pytest.approx((100_000 - after.rows) / 5, rel=0.01)


def test_a_stage_that_stands_still_takes_longer_and_longer(clock: list[float]) -> None:
    board = ProgressBoard()
    board.begin("judge", 4, inputs=100)
    board.add("judge", Usage(), planned=1000, read=100)
    work(board, clock, 50, 10)
    etas = []
    for _ in range(3):
        etas.append(stages(board)["judge"].eta or 0.0)
        clock[0] += 100
    assert etas[0] == 50.0 and etas == sorted(set(etas))


def test_the_first_step_of_a_training_and_the_resumed_ones_are_left_out(clock: list[float]) -> None:
    """30 s until the first of the steps after a resume, then one every 2 s, reported every third."""
    board = ProgressBoard()
    board.begin("train")
    for phase in ("starting workers", "loading model", "training"):
        board.phase("train", phase)
        assert stages(board)["train"].line().startswith(f"train: {phase}")
        clock[0] += 30
    board.put("train", 101, 186, "loss 0.7000")
    assert stages(board)["train"].eta is None
    for step in (104, 107):
        clock[0] += 6
        board.put("train", step, 186, "loss 0.6000")
    train = stages(board)["train"]
    assert train.eta == 2 * (186 - 107)
    assert train.line() == "train: training, steps 107/186, loss 0.6000, ETA 2 min 38 s"
    clock[0] += 2
    assert stages(board)["train"].eta == 158.0  # a report is not due yet
    board.phase("train", "writing model")
    assert stages(board)["train"].eta is None


def test_rows_that_are_counted_twice_do_not_make_it_negative(clock: list[float]) -> None:
    board = ProgressBoard()
    board.begin("judge", 4, inputs=1)
    board.add("judge", Usage(), planned=20, read=1)
    work(board, clock, 15, 2)
    assert stages(board)["judge"].rows == 30 and stages(board)["judge"].eta == 0.0


@given(
    rate=st.floats(0.5, 1000),
    start_up=st.integers(0, 5000),
    seconds=st.integers(12, 400),
    resumed=st.integers(0, 10_000),
)
def test_a_steady_rate_gives_the_time_that_is_left(rate: float, start_up: int, seconds: int, resumed: int) -> None:
    pace = Pace()
    pace.restart(start_up, resumed)
    for second in range(1, seconds + 1):
        pace.see(start_up + second, resumed + rate * second)
    assert pace.left(start_up + seconds, 100 * rate) == pytest.approx(100, rel=1e-6)


def test_lines_become_rare() -> None:
    reminder = Reminder(10, 60)
    due = [second for second in range(7200) if reminder.due(float(second))]
    assert due[:4] == [0, 10, 20, 30] and max(b - a for a, b in itertools.pairwise(due)) == 60
    assert len(due) < 150


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99.4, "99 s"),
        (99.6, "1 min 40 s"),
        (5999, "99 min 59 s"),
        (6000, "1 h 40 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_lines_where_there_is_no_terminal(clock: list[float]) -> None:
    out = io.StringIO()
    running, done = StageProgress("judge", "running", shards=4), StageProgress("prompts", "done")
    with Display(Console(file=out, width=40), ["prompts", "judge"]) as display:
        display.show([done, running])
        running.shards_done = 1
        display.show([done, running])  # too early
        clock[0] += LINE_SECONDS
        display.show([done, running])
        clock[0] += LINE_SECONDS
        display.show([done, running])  # nothing new
        display.say("[red]not markup[/red] and a line that is longer than the console is wide")
    assert out.getvalue().splitlines() == [
        "  judge: running, shards 0/4",
        "  judge: running, shards 1/4",
        "[red]not markup[/red] and a line that is longer than the console is wide",
    ]


def test_a_picture_of_many_stages_shows_those_that_something_happens_to() -> None:
    status = ["done"] * 15 + ["running"] * 2 + ["waiting"] * 20
    stages = [StageProgress(f"train-{i}", state) for i, state in enumerate(status)]
    out = io.StringIO()
    Console(file=out, width=120).print(picture(stages))
    shown = out.getvalue()
    assert "train-15" in shown and "train-16" in shown and "train-14" not in shown and "train-17" not in shown
    assert "15 stages done, 20 stages waiting" in shown


def test_a_picture_on_a_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=120), ["prompts", "judge", "gate"]) as display:
        display.show(
            [StageProgress("judge", "running", shards=4, shards_done=1, usage=Usage(calls_engine=7), seconds=3.0)]
        )
    running = StageProgress("judge [x]", "running", shards=4, shards_done=1, seconds=3.0)
    console = Console(file=out, width=120, record=True)
    console.print(picture([running, dataclasses.replace(running, phase="loading model", eta=50.0)]))
    shown = console.export_text()
    assert "1/4" in shown and "judge [x]" in shown and "loading model" in shown and "ETA 50 s" in shown


def test_piped_output_has_no_control_characters(clock: list[float], tmp_path: Path) -> None:
    """What a log file, a CI job or `ray job logs` gets: whole lines, whatever a model or a server said."""
    out = io.StringIO()
    console = Console(file=out, soft_wrap=True)
    with RunLog(Folder(str(tmp_path)), console) as log, Display(console, ["judge"]) as display:
        log.display = display
        log.say("judge: \x1b[31mred\x1b[0m and\rback,\nand a second line \x07")
        for _ in range(5):
            display.show([StageProgress("judge", "running", "loading model", shards=4, note="loss \x1b[1m")])
            clock[0] += LINE_SECONDS
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[1].startswith("  judge: loading model, shards 0/4")
    assert not [c for c in out.getvalue() if unicodedata.category(c) == "Cc" and c != "\n"]
    (file,) = (tmp_path / "logs").glob("*.log")
    assert len(file.read_text().splitlines()) == 1


# --- run folders ------------------------------------------------------------------------------------------------------


def manifest(**stages: dict[str, Any]) -> dict[str, Any]:
    return {"dag": "dmapo", "num_shards": 4, "stages": stages}


DONE = {
    "status": "done",
    "fingerprint": "f",
    "path": "prompts-f",
    "tables": ["prompts"],
    "rows": {"prompts": 3},
    "facts": {"counts": {}},
    "usage": {"seconds": 1.0},
}


def test_a_run_is_read_back(tmp_path: Path) -> None:
    waiting = {"status": "waiting", "fingerprint": "g", "path": "judge-g", "tables": ["verdicts"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(prompts=DONE, judge=waiting)))
    run = read_run(str(tmp_path))
    assert list(run.results) == ["prompts"] and run.workflow == "dmapo"
    table = run.results["prompts"].table()
    assert (table.folder, table.num_shards, table.fingerprint) == (str(tmp_path / "prompts-f"), 4, "f")
    assert run.results["prompts"].cached


def test_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match="holds no run"):
            read_run(str(place))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file holds no run"):
        read_run(str(tmp_path / "file"))


@pytest.mark.parametrize("text", ["[]", "{}", '{"stages": {}}', "{"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json is (no manifest|not valid JSON)"):
        read_run(str(tmp_path))
