"""A run watched from its folder alone: planted manifests, progress files, receipts and heartbeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.graph.failures import failed_again, lift_quarantine, read_failures, write_failures
from ray_pipeline.graph.progress import StageProgress
from ray_pipeline.operate.status import Watch
from ray_pipeline.operate.status_page import lines, picture, stage_line
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from tests.operate.planted_run import plant


class Clock:
    """Seconds that pass only by sleeping; `then` happens at given moments."""

    def __init__(self, then: dict[float, Any] | None = None) -> None:
        self.now, self._then = 0.0, dict(then or {})

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for moment in [m for m in self._then if m <= self.now]:
            self._then.pop(moment)()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return plant(tmp_path / "run")


def beat(run: Path, number: int) -> None:
    (run / "heartbeat.json").write_text(json.dumps({"owner": "a", "beat": number}))


def progress(run: Path, **counts: float | str) -> None:
    stage = StageProgress.read({"name": "responses-base", "status": "running", **counts})
    (run / "progress.json").write_text(json.dumps([stage.plain()]))


def half_of(run: Path, stage: str) -> Path:
    """Take shards 2 and 3 of a finished stage away, and its word that it is done."""
    manifest = json.loads((run / "manifest.json").read_text())
    entry = manifest["stages"][stage]
    for key in ("rows", "facts", "usage"):
        del entry[key]
    entry["status"] = "failed"
    entry["error"] = "2 of 4 shards failed"
    (run / "manifest.json").write_text(json.dumps(manifest))
    for name in ("shard-00002.parquet", "shard-00003.parquet"):
        (run / entry["path"] / name).unlink()
        (run / entry["path"] / "_receipts" / name.replace(".parquet", ".json")).unlink()
    return run / entry["path"]


def test_a_run_that_nobody_works_on(run: Path) -> None:
    state = Watch(str(run)).look()
    judge = next(s for s in state.stages if s.name == "judge")
    assert state.life == "ended" and not state.done and state.failed == []
    assert (judge.status, judge.shards_done, judge.rows) == ("done", 4, 480)
    assert judge.usage.prefix_hit_rate == 0.25 and judge.tokens_per_second == 600
    assert judge.errors == {"rows.unparsed": 4}  # of both judges
    assert "calls 160 engine + 0 log, 600 tokens/s, prefix hits 25%, 2 s, rows.unparsed 4" in stage_line(judge)
    assert next(s for s in state.stages if s.name == "train").status == "waiting"


def test_failed_and_quarantined_shards_are_counted_by_kind(run: Path) -> None:
    place = half_of(run, "critic")
    receipt = place / "_receipts" / "shard-00000.json"
    receipt.write_text(json.dumps({**json.loads(receipt.read_text()), "counts": {"ok": 5, "truncated": 2}}))
    failures = {
        2: failed_again(None, 2, "StoreError: x.parquet is cut short", 3),
        3: failed_again(failed_again(None, 3, "x", 2), 3, "KeyMismatch: [red]who[/red]", 2),
    }
    write_failures(Folder(str(place)), failures)
    state = Watch(str(run)).look()
    critic = next(s for s in state.stages if s.name == "critic")
    assert (critic.shards_done, critic.shards_failed, critic.shards_quarantined) == (2, 2, 1)
    assert critic.errors == {"rows.truncated": 2, "shards.KeyMismatch": 1, "shards.StoreError": 1}
    assert state.failed == [critic]
    line = stage_line(critic)
    assert "shards 2/4, 2 failed, 1 quarantined" in line and line.endswith("2 of 4 shards failed")
    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(picture(state))
    shown = console.export_text()
    assert "shards.StoreError 1" in shown and "stages waiting" in shown and "train" not in shown.replace("train-", "")
    assert lift_quarantine(Folder(str(place))) == [2, 3]
    assert [f.failures for f in read_failures(Folder(str(place))).values()] == [0, 0]
    assert read_failures(Folder(str(place)))[3].error.startswith("KeyMismatch")
    write_failures(Folder(str(place)), {})
    assert read_failures(Folder(str(place))) == {} and not (place / "_failures.json").exists()


def test_a_living_run_shows_rates_of_the_last_interval(run: Path) -> None:
    beat(run, 1)
    progress(run, shards=4, shards_done=1, rows=100, seconds=10.0, calls_engine=50, prompt_tokens=900,
             completion_tokens=100, cached_tokens=450, eta=30.0, phase="loading model")  # fmt: skip
    clock = Clock({0.5: lambda: beat(run, 2)})
    watch = Watch(str(run), clock=clock, sleep=clock.sleep)
    state = watch.look()
    now = next(s for s in state.stages if s.name == "responses-base")
    assert state.life == "running" and clock.now < 1
    assert (now.status, now.shards_done, now.rows_per_second, now.tokens_per_second) == ("running", 1, 10, 100)
    assert now.eta_seconds == 30.0 == state.eta_seconds and now.usage.prefix_hit_rate == 0.5
    assert "running  loading model, shards 1/4" in stage_line(now)

    beat(run, 3)
    progress(run, shards=4, shards_done=2, rows=400, seconds=12.0, prompt_tokens=1900, completion_tokens=300)
    now = next(s for s in watch.look().stages if s.name == "responses-base")
    assert (now.rows_per_second, now.tokens_per_second) == (150, 600)  # 300 rows and 1,200 tokens in 2 s

    beat(run, 4)
    progress(run, shards=4, shards_done=2, rows=30, seconds=3.0)  # another session has begun
    now = next(s for s in watch.look().stages if s.name == "responses-base")
    assert now.rows_per_second == 10


def test_a_heartbeat_that_stands_still_is_a_run_that_was_killed(run: Path) -> None:
    beat(run, 7)
    progress(run, shards=4, shards_done=1, rows=100, seconds=10.0)
    clock = Clock()
    state = Watch(str(run), clock=clock, sleep=clock.sleep).look()
    now = next(s for s in state.stages if s.name == "responses-base")
    assert state.life == "silent" and 3.0 <= clock.now < 3.5
    assert now.status == "stopped" and now.rows_per_second is None and now.eta_seconds is None
    assert "heartbeat stopped" in lines(state)[0]


def test_a_watch_ends_when_the_run_does(run: Path) -> None:
    beat(run, 1)
    number = iter(range(2, 100))
    clock = Clock(
        {t / 2: lambda: beat(run, next(number)) for t in range(1, 11)} | {6.0: (run / "heartbeat.json").unlink}
    )
    watch = Watch(str(run), clock=clock, sleep=clock.sleep)
    seen = [state.life for state in watch.until_ended(1.0)]
    assert seen[-1] == "ended" and set(seen[:-1]) == {"running"} and len(seen) > 3


def test_progress_of_another_version_is_passed_over(run: Path) -> None:
    for text in ("[{", '[{"name": "judge", "pace": 1}]', "{}"):
        (run / "progress.json").write_text(text)
        beat(run, 1)
        clock = Clock({0.5: lambda: beat(run, 2)})
        assert Watch(str(run), clock=clock, sleep=clock.sleep).look().life == "running"


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no run"):
        Watch(str(tmp_path)).look()


def test_the_command(run: Path) -> None:
    plain = CliRunner().invoke(app, ["status", str(run)])
    assert plain.exit_code == 0 and "prompts" in plain.output and "not running" in plain.output
    document = json.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).output)
    assert document["life"] == "ended" and document["stages"][0]["name"] == "prompts"
    watched = CliRunner().invoke(app, ["status", str(run), "--watch"])
    assert watched.exit_code == 1  # work is left
    nothing = CliRunner().invoke(app, ["status", str(run.parent)])
    assert nothing.exit_code == 2
