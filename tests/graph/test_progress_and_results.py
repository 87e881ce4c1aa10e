"""The board that workers write to, its lines, and a run folder that is read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph import progress
from ray_pipeline.graph.progress import Display, Note, ProgressBoard, StageProgress
from ray_pipeline.graph.results import read_run
from ray_pipeline.store.errors import StoreError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds; the test moves them."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def stages(board: ProgressBoard) -> dict[str, StageProgress]:
    return {s["name"]: StageProgress.read(s) for s in board.look()[0]}


def test_a_board_adds_up_and_keeps_time(clock: list[float]) -> None:
    board = ProgressBoard()
    board.begin("judge", 8, 2)
    board.add("judge", Usage(calls_engine=3, calls_log=1, prompt_tokens=100, completion_tokens=20))
    board.add("judge", Usage(calls_engine=2), rows=5, shards_done=1)
    clock[0] += 10
    judge = stages(board)["judge"]
    assert (judge.usage.calls_engine, judge.usage.calls_log, judge.shards_done, judge.seconds) == (5, 1, 3, 10.0)
    assert judge.tokens_per_second == 12.0
    assert judge.eta == 50.0  # one shard of this session in 10 s, five to go: the two of before do not count
    assert judge.line() == "judge: running, shards 3/8, rows 5, calls 5 engine + 1 log, 12 tokens/s, ETA 50 s"
    board.end("judge", "done")
    clock[0] += 100
    assert stages(board)["judge"].seconds == 10.0 and stages(board)["judge"].line().endswith("10 s")


def test_a_board_knows_stages_that_it_was_not_told_of(clock: list[float]) -> None:
    board = ProgressBoard()
    board.add("late", Usage(), rows=1)
    board.put("train", 5, 20)
    board.end("never begun", "failed")
    clock[0] += 4
    found = stages(board)
    assert found["train"].eta == 12.0 and found["late"].rows == 1 and found["never begun"].status == "failed"
    board.say("hello")
    assert board.look()[1] == [Note("hello")] and board.look()[1] == []


@pytest.mark.parametrize(
    ("changes", "eta"),
    [
        ({"status": "done"}, None),
        ({"seconds": 0.0}, None),
        ({}, None),
        ({"shards": 4, "shards_done": 2, "shards_at_start": 2}, None),
        ({"rows": 30, "rows_total": 20}, 0.0),  # rows of a shard that was begun again count twice
        ({"rows": 5, "rows_total": 20}, 30.0),
    ],
)
def test_when_it_will_be_done(changes: dict[str, Any], eta: float | None) -> None:
    assert StageProgress(**{"name": "s", "status": "running", "seconds": 10.0, **changes}).eta == eta


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
        clock[0] += progress.LINE_SECONDS
        display.show([done, running])
        clock[0] += progress.LINE_SECONDS
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
    Console(file=out, width=120).print(progress._picture(stages))
    shown = out.getvalue()
    assert "train-15" in shown and "train-16" in shown and "train-14" not in shown and "train-17" not in shown
    assert "15 stages done, 20 stages waiting" in shown


def test_a_picture_on_a_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=120), ["prompts", "judge", "gate"]) as display:
        display.show(
            [StageProgress("judge", "running", shards=4, shards_done=1, usage=Usage(calls_engine=7), seconds=3.0)]
        )
    picture = progress._picture([StageProgress("judge", "running", shards=4, shards_done=1, seconds=3.0)])
    console = Console(file=out, width=120, record=True)
    console.print(picture)
    assert "1/4" in console.export_text()


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
