"""What is not asked twice: resumed runs, changed settings, killed processes. Real engines, real processes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.dags.conftest import CONFIG, SMALL, Quorum, engine_calls, manifest, run, tables

pytestmark = pytest.mark.e2e

#: The tables that a replay must give byte for byte.
STAGES = ("prompts", "candidates", "judge", "critic", "gate", "dataset-rows", "datasets")
#: Few calls in flight, so that a stage lasts long enough to be hit in its middle.
SLOW = ["models.judge.placement.concurrency=2", "models.judge.placement.shards_in_flight=2"]


def to_datasets(folder: Path, *more: str) -> list[str]:
    return ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "datasets", *SMALL, *more]


def logged_calls(calls: Path, role: str) -> int:
    """Distinct calls of a role prefix in a call log."""
    keys: set[str] = set()
    for part in calls.rglob("*.parquet"):
        try:
            table = pq.read_table(part, columns=["call_key", "role"])
        except FileNotFoundError:  # Merged away while we look.
            continue
        keys.update(
            k
            for k, r in zip(table["call_key"].to_pylist(), table["role"].to_pylist(), strict=True)
            if r.startswith(role)
        )
    return len(keys)


def unanswered_verdicts(folder: Path) -> list[dict[str, object]]:
    """Verdicts and critiques whose call failed: a failed call is not remembered, so a replay has no answer for it."""
    stages = manifest(folder)["stages"]
    files = [f for name in ("judge", "critic") for f in (folder / stages[name]["path"]).glob("*.parquet")]
    return [row for f in files for row in pq.read_table(f).to_pylist() if row["parse_status"] == "error"]


def contradictions(calls: Path) -> list[set[str]]:
    """Different replies to one call: each call must have been made once."""
    texts: dict[str, set[str]] = {}
    for part in calls.rglob("*.parquet"):
        for row in pq.read_table(part, columns=["call_key", "text"]).to_pylist():
            texts.setdefault(row["call_key"], set()).add(row["text"])
    return [found for found in texts.values() if len(found) > 1]


def replay(folder: Path, into: Path) -> None:
    """A fresh run that may read the finished run's call log and nothing else gives the same bytes."""
    assert unanswered_verdicts(folder) == []
    assert contradictions(folder / "calls") == []
    run(*to_datasets(into, f"calls.root={folder / 'calls'}", "calls.replay_only=true"))
    assert engine_calls(into) == {}
    assert tables(into, STAGES) == tables(folder, STAGES)


def wait_until(quorum: Quorum, ready: Callable[[], bool], seconds: float = 480) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert quorum.process.poll() is None, f"ended before the moment came\n{quorum.output}"
        assert time.monotonic() < end, f"the moment never came\n{quorum.output}"
        time.sleep(0.05)


def test_the_same_command_again_does_nothing(small_run: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in small_run.rglob("*.parquet")}
    again = run(*to_datasets(small_run))
    assert "to do" not in again.output
    assert again.engines == {}
    assert {f: f.stat().st_mtime_ns for f in small_run.rglob("*.parquet")} == before


def test_a_replay_with_the_engine_forbidden_gives_the_same_bytes(small_run: Path, tmp_path: Path) -> None:
    replay(small_run, tmp_path / "replay")


def test_new_thresholds_make_no_call(small_run: Path, tmp_path: Path) -> None:
    calls = f"calls.root={small_run / 'calls'}"
    folder = tmp_path / "run"
    run(*to_datasets(folder, calls, "gate.tau=1.0", "gate.desirable_at=8"))
    assert engine_calls(folder) == {}
    assert tables(folder, ("gate",)) != tables(small_run, ("gate",))


def test_another_shard_count_makes_no_call(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(*to_datasets(folder, f"calls.root={small_run / 'calls'}", "prompts.num_shards=16"))
    assert engine_calls(folder) == {}
    rows = manifest(folder)["stages"]["judge"]["rows"]
    assert rows == manifest(small_run)["stages"]["judge"]["rows"]


def test_a_fourth_judge_makes_only_its_own_calls(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run / "calls", tmp_path / "calls")
    rubrics = "[{name: helpfulness}, {name: factuality}, {name: conciseness}, {name: helpfulness-again}]"
    run(
        *to_datasets(folder, f"calls.root={tmp_path / 'calls'}", f"judge.rubrics={rubrics}", "failure.max_error_rate=1")
    )
    candidates = manifest(folder)["stages"]["candidates"]["rows"]["candidates"]
    calls = engine_calls(folder)
    assert set(calls) == {"judge"}
    # Each candidate once, and a retry where the reply to an unknown rubric could not be read.
    assert calls["judge"] <= 3 * candidates
    assert logged_calls(tmp_path / "calls", "judge/helpfulness-again") == calls["judge"]


def test_more_prompts_make_only_their_calls(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run / "calls", tmp_path / "calls")
    run(*to_datasets(folder, f"calls.root={tmp_path / 'calls'}"), "prompts.sources.0.count=48")
    old, new = manifest(small_run)["stages"], manifest(folder)["stages"]
    added = new["candidates"]["rows"]["candidates"] - old["candidates"]["rows"]["candidates"]
    assert added == 8 * 4
    assert engine_calls(folder)["candidates"] == added
    assert engine_calls(folder)["critic"] <= added + 2
    assert engine_calls(folder)["judge"] <= 3 * (added + 2)


def test_a_shard_that_was_cut_in_half_is_named_and_remade(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder, symlinks=True)
    shard = folder / manifest(folder)["stages"]["judge"]["path"] / "shard-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    again = run(*to_datasets(folder))
    assert str(shard) in again.output and "cut short" in again.output
    assert shard.read_bytes() == whole
    assert engine_calls(folder).get("judge") is not None  # what it took the first time is still told


def test_the_driver_killed_in_the_judge_stage(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Quorum(*to_datasets(folder, *SLOW))
    wait_until(first, lambda: (folder / "calls").exists() and logged_calls(folder / "calls", "judge/") > 20)
    time.sleep(1.0)
    first.kill()
    assert first.living_engines() == []
    assert not list(folder.glob("datasets-*/stats.json")), "the run was over before it was killed"
    kept = logged_calls(folder / "calls", "judge/")
    progress = {s["name"]: s for s in json.loads((folder / "progress.json").read_text())}
    answered = progress["judge"]["calls_engine"]
    rate = answered / max(progress["judge"]["seconds"], 1)

    second = run(*to_datasets(folder, *SLOW))
    assert "taking the run over" in second.output
    assert second.living_engines() == []
    total = logged_calls(folder / "calls", "judge/")
    lost = max(0.0, answered - kept)
    # In flight (2), and what was answered since the last flush (2 s) or told by a progress file that is 2 s old.
    print(f"\ndriver killed: {answered:.0f} calls answered, {kept} in the log, {lost:.0f} made twice, {total} in all")
    assert lost <= 2 + 4.0 * max(rate, 1.0)
    assert sum(engine_calls(folder).values()) > 0
    replay(folder, tmp_path / "replay")


def test_killed_engines_and_actors_are_replaced_without_a_rerun(tmp_path: Path) -> None:
    """First every engine core that lives, later every actor; the judge and critic stages run side by side."""
    folder = tmp_path / "run"
    quorum = Quorum(*to_datasets(folder, *SLOW))
    for calls, victims in ((20, engine_cores), (150, actors)):
        wait_until(quorum, lambda n=calls: (folder / "calls").exists() and logged_calls(folder / "calls", "judge/") > n)
        chosen = victims(quorum)
        assert chosen, f"no {victims.__name__} to kill"
        for process in chosen:
            process.kill()
    assert quorum.wait() == 0, quorum.output
    assert quorum.living_engines() == []
    stages = manifest(folder)["stages"]
    assert stages["judge"]["rows"]["verdicts"] == 3 * stages["candidates"]["rows"]["candidates"]
    replay(folder, tmp_path / "replay")


def engine_cores(quorum: Quorum) -> list[psutil.Process]:
    return [p for p in quorum.engines.values() if p.is_running() and "EngineCore" in p.cmdline()[0]]


def actors(quorum: Quorum) -> list[psutil.Process]:
    return [p for p in quorum.actors.values() if p.is_running()]
