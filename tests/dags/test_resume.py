"""What is not asked twice: resumed runs, changed settings, bad judges, killed processes. Real engines and processes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from ray_pipeline.pocket import model_path
from tests.dags.conftest import (
    CONFIG,
    COUNT,
    SMALL,
    Quorum,
    calls_by_role,
    calls_of,
    contradictions,
    engine_calls,
    manifest,
    run,
    tables,
    wait_until,
)  # fmt: skip
from tests.dags.in_process import here
from tests.endpoint import KEY, Answer, Endpoint, said
from tests.interpreter import interpreter

pytestmark = pytest.mark.e2e

#: The tables that a replay must give byte for byte.
STAGES = ("prompts", "candidates", "judge", "critic", "gate", "dataset-rows", "datasets")
RUBRICS = ("helpfulness", "factuality", "conciseness")
#: Judging that the small run's call log has no answers to, and few calls in flight, so that the stage lasts long
#: enough to be hit in its middle: half the prompts suffice for that. The candidates come from the log.
SLOW = [
    f"prompts.sources.0.count={COUNT // 2}",
    "judge.sampling.max_tokens=63",
    "critic.sampling.max_tokens=63",
    "models.judge.placement.concurrency=2",
    "models.judge.placement.shards_in_flight=2",
]


def to_datasets(folder: Path, *more: str) -> list[str]:
    return ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "datasets", *SMALL, *more]


def verdict_calls(calls: Path) -> int:
    return calls_of(calls, "judge/")


@pytest.fixture
def log(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run's call log."""
    return shutil.copytree(small_run / "calls", tmp_path / "calls")


def unanswered_verdicts(folder: Path) -> list[dict[str, object]]:
    """Verdicts and critiques whose call failed: a failed call is not remembered, so a replay has no answer for it."""
    stages = manifest(folder)["stages"]
    asked = [stages[name]["path"] for name in ("judge", "critic") if name in stages]
    files = [file for path in asked for file in (folder / path).glob("*.parquet")]
    return [row for f in files for row in pq.read_table(f).to_pylist() if row["parse_status"] == "error"]


def replay(folder: Path, log: Path, into: Path, *settings: str) -> None:
    """A fresh run that may read the finished run's call log and nothing else gives the same bytes."""
    assert unanswered_verdicts(folder) == []
    assert contradictions(log) == []
    here(*to_datasets(into, *settings, f"calls.root={log}", "calls.replay_only=true"))
    assert engine_calls(into) == {}
    stages = [name for name in STAGES if name in manifest(folder)["stages"]]
    assert tables(into, stages) == tables(folder, stages)


def test_the_same_command_again_does_nothing(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder, symlinks=True)  # others read it meanwhile
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*.parquet")}
    again = run(*to_datasets(folder))
    assert "to do" not in again.output
    assert again.engines == {}
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*.parquet")} == before


def test_new_thresholds_and_another_shard_count_make_no_call(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    calls = f"calls.root={small_run / 'calls'}"
    here(*to_datasets(folder, calls, "gate.tau=1.0", "gate.desirable_at=8", "prompts.num_shards=16"))
    assert engine_calls(folder) == {}
    new, old = manifest(folder)["stages"], manifest(small_run)["stages"]
    assert new["judge"]["rows"] == old["judge"]["rows"]
    assert new["gate"]["facts"]["counts"] != old["gate"]["facts"]["counts"]


def test_a_fourth_judge_and_more_prompts_make_only_their_own_calls(small_run: Path, log: Path, tmp_path: Path) -> None:
    folder, before = tmp_path / "run", calls_by_role(log)
    rubrics = "[{name: helpfulness}, {name: factuality}, {name: conciseness}, {name: helpfulness-again}]"
    more = f"prompts.sources.0.count={COUNT + 8}"
    # Replies to a rubric that the judge never learnt may be unreadable; they are asked again, and that is all right.
    here(*to_datasets(folder, f"calls.root={log}", f"judge.rubrics={rubrics}", "failure.max_error_rate=1"), more)
    new, old = manifest(folder)["stages"], manifest(small_run)["stages"]
    candidates = new["candidates"]["rows"]["candidates"]
    added = candidates - old["candidates"]["rows"]["candidates"]
    assert added == 8 * 4
    made = {role: n - before.get(role, 0) for role, n in calls_by_role(log).items()}
    calls = engine_calls(folder)
    assert calls["candidates"] == made["candidate"] == added
    assert calls["critic"] == made["critic"] <= added
    assert all(made[f"judge/{name}"] <= added for name in RUBRICS)
    again = made["judge/helpfulness-again"]
    assert again <= 3 * candidates  # each once, and at most two retries
    assert calls["judge"] == again + sum(made[f"judge/{name}"] for name in RUBRICS)


def test_a_shard_that_was_cut_in_half_is_named_and_remade(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder, symlinks=True)
    shard = folder / manifest(folder)["stages"]["judge"]["path"] / "shard-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    again = here(*to_datasets(folder))
    assert str(shard) in again.output and "is damaged" in again.output
    assert shard.read_bytes() == whole
    assert engine_calls(folder).get("judge") is not None  # what it took the first time is still told


def test_a_judge_that_talks_nonsense_stops_the_stage(log: Path, tmp_path: Path) -> None:
    """And when that much nonsense is allowed, the run goes on and has incomplete rows."""
    folder = tmp_path / "run"
    # The policy knows no judge's prompts; without a grammar nothing forces it into the form of a verdict.
    command = [
        "run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "gate", *SMALL, f"calls.root={log}",
        "models.judge.model=pocket:policy", "judge.asking.grammar=false", "judge.asking.retries=0",
        "models.judge.canary=false", "gate.use_critic=false",
    ]  # fmt: skip
    stopped = here(*command, expect=1)
    assert "could not be read" in stopped.output and "judge " in stopped.output and "%" in stopped.output
    assert manifest(folder)["stages"]["judge"]["status"] == "failed"
    assert stopped.engines == {model_path("pocket:policy")}
    here(*command, "failure.max_error_rate=1.0")
    counts = manifest(folder)["stages"]["gate"]["facts"]["counts"]
    # Not all of them: the policy may say a number where a verdict is asked.
    assert counts["incomplete"] > 0.5 * sum(counts.values())


def test_the_driver_killed_in_the_judge_stage(log: Path, tmp_path: Path) -> None:
    folder, before = tmp_path / "run", verdict_calls(log)
    slow = [*SLOW, "gate.use_critic=false"]  # an engine less to wait for
    command = to_datasets(folder, *slow, f"calls.root={log}")
    first = Quorum(*command)
    wait_until(first, lambda: verdict_calls(log) > before + 20)
    time.sleep(1.0)
    first.kill()
    assert first.living_engines() == []
    assert not list(folder.glob("datasets-*/stats.json")), "the run was over before it was killed"
    kept = verdict_calls(log) - before
    progress = {s["name"]: s for s in json.loads((folder / "progress.json").read_text())}
    answered = progress["judge"]["calls_engine"]
    rate = answered / max(progress["judge"]["seconds"], 1)

    second = here(*command)
    assert "taking the run over" in second.output
    total = verdict_calls(log) - before
    lost = max(0.0, answered - kept)
    # In flight (2), and what was answered since the last flush (2 s) or told by a progress file that is 2 s old.
    print(f"\ndriver killed: {answered:.0f} calls answered, {kept} in the log, {lost:.0f} made twice, {total} in all")
    assert lost <= 2 + 4.0 * max(rate, 1.0)
    assert total > kept, "judging was over before it was killed"
    assert sum(engine_calls(folder).values()) > 0
    replay(folder, log, tmp_path / "replay", *slow)


def test_a_signal_ends_the_command_and_every_answered_call_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls in progress when it comes, too. The endpoint is scripted; command, Ray and signals are real."""
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    folder, slow = tmp_path / "run", Answer(**{**vars(said("The answer is 7.")), "delay": 0.5})
    with Endpoint(lambda body, n: slow) as server:
        endpoint = f"{{base_url: '{server.url}', api_key_env: LOOPBACK_KEY, concurrency: 2}}"
        model = f"models.judge={{engine: openai, model: m, canary: false, endpoint: {endpoint}}}"
        command = ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "candidates", *SMALL]
        command += [model, "candidates.model=judge"]
        for code, end in ((130, Quorum.interrupt), (143, lambda quorum: quorum.process.terminate())):
            before = len(server.asked)
            quorum = Quorum(*command)
            wait_until(quorum, lambda least=before + 8: len(server.asked) > least)
            end(quorum)
            output = quorum.ends(code)
            assert "quorum: interrupted; finished work is kept; rerun the same command to resume" in output
            assert "no further call is made" in output and "FAILED" not in output
            assert calls_of(folder / "calls", "candidate") == len(server.asked), output
        slow = said("The answer is 7.")
        here(*command)
        assert calls_of(folder / "calls", "candidate") == len(server.asked) == 4 * COUNT


def test_killed_engines_and_actors_are_replaced_without_a_rerun(log: Path, tmp_path: Path) -> None:
    """First every engine core that lives, later every actor; the judge and critic stages run side by side."""
    folder, before = tmp_path / "run", calls_by_role(log)
    quorum = Quorum(*to_datasets(folder, *SLOW, f"calls.root={log}"), warm=True)

    def answered(least: int) -> bool:
        """Of both stages: an engine that dies while it starts is told as one that cannot start."""
        made = {role: n - before.get(role, 0) for role, n in calls_by_role(log).items()}
        return made["critic"] > 0 and sum(n for role, n in made.items() if role.startswith("judge/")) > least

    for calls, victims in ((20, engine_cores), (100, actors)):
        wait_until(quorum, lambda n=calls: answered(n))
        chosen = victims(quorum)
        assert chosen, f"no {victims.__name__} to kill"
        for process in chosen:
            process.kill()
    assert quorum.wait() == 0, quorum.output
    assert quorum.living_engines() == []
    stages = manifest(folder)["stages"]
    assert stages["judge"]["rows"]["verdicts"] == 3 * stages["candidates"]["rows"]["candidates"]
    replay(folder, log, tmp_path / "replay", *SLOW)


def engine_cores(quorum: Quorum) -> list[psutil.Process]:
    return [p for p in quorum.engines.values() if p.is_running() and "EngineCore" in p.cmdline()[0]]


def actors(quorum: Quorum) -> list[psutil.Process]:
    return [p for p in quorum.actors.values() if p.is_running()]


def test_two_runs_at_once_share_a_call_log(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    folders = [tmp_path / "one", tmp_path / "other"]
    command = ["run", "dmapo", "-c", CONFIG, "--to", "candidates", *SMALL, f"calls.root={log}"]
    alone = {"warm": True, "python": interpreter()}
    both = [Quorum(*command, "--executor", "inprocess", "--run-dir", str(folder), **alone) for folder in folders]
    for quorum, folder in zip(both, folders, strict=True):
        quorum.ends(0)
        assert manifest(folder)["stages"]["candidates"]["rows"] == {"candidates": 4 * COUNT}
    assert any(f"is running on the same call log ({log})" in quorum.output for quorum in both)
    # What both asked at the same moment lies there twice, and may differ: their engines had other batches.
    assert calls_of(log, "candidate") == 4 * COUNT
    again = tmp_path / "again"
    here(*command, "--run-dir", str(again), "calls.replay_only=true")
    assert engine_calls(again) == {} and manifest(again)["stages"]["candidates"]["rows"] == {"candidates": 4 * COUNT}
