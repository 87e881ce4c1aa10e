"""Rounds on real engines and real trainings, killed in the second and stopped after it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.dags.conftest import CONFIG, Quorum, contradictions, manifest, wait_until
from tests.dags.in_process import here

pytestmark = pytest.mark.e2e

SMALL = [
    "prompts.sources.0.count=48",
    "prompts.num_shards=2",
    "train.num_workers=1",
    "train.global_batch=8",
    "train.batch_size=4",
    "train.epochs=1",
    "train.save=adapter",
]
#: The second policy is the first one again, so that it is no better and the third round is skipped.
ROUNDS = ["rounds.n=3", "rounds.parts=2", "rounds.decay=1e-12", "rounds.stop={metric: accuracy, patience: 1}"]


def logged(folder: Path) -> Counter[str]:
    """How often each call is in the log."""
    tables = [pq.read_table(part, columns=["call_key"]) for part in (folder / "calls").rglob("*.parquet")]
    return Counter(key for table in tables for key in table["call_key"].to_pylist())


def test_a_run_killed_in_its_second_round_repeats_no_answered_call(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), *SMALL, *ROUNDS]
    first = Quorum(*command, "--executor", "inprocess")  # its stages begin at once; killed Ray runs: test_resume.py
    wait_until(first, lambda: any(folder.glob("judge-2-*/shard-*.parquet")))
    first.kill()
    assert first.living_engines() == []
    kept = logged(folder)
    assert kept and not (folder / "report").exists()

    here(*command)
    after = logged(folder)
    assert len(after) > len(kept) and {call: after[call] for call in kept} == kept
    assert contradictions(folder / "calls") == []
    stages = manifest(folder)["stages"]
    skipped = {name for name, entry in stages.items() if entry["status"] == "skipped"}
    assert {entry["status"] for entry in stages.values()} == {"done", "skipped"}
    assert skipped == {name for name, entry in stages.items() if entry.get("round", 0) > 2}
    rows = [stages[f"candidates{ending}"]["rows"]["candidates"] for ending in ("", "-2")]
    assert sum(rows) == 4 * 48 and min(rows) > 0
    policies = [folder / stages[name]["path"] for name in ("train", "train-2")]
    assert all((policy / "adapter").is_dir() and not (policy / "merged").exists() for policy in policies)
    assert (folder / "policy").resolve() == policies[0]
    assert "starts from" in (policies[1] / "adapter" / "README.md").read_text()

    audited = here("audit", str(folder)).output
    assert "datasets-2" in audited
    numbers = json.loads((folder / "report" / "metrics.json").read_text())
    assert [one["number"] for one in numbers["rounds"]] == [1, 2]
    decided = numbers["decided"]
    assert decided["best"] == 1 and decided["stop"] and "Stopped after round 2: no higher accuracy" in decided["text"]
    assert decided["text"] in audited and decided["text"] in here("status", str(folder)).output
    here("export", str(folder), "--out", str(tmp_path / "out"), "--policy", "train", "--no-datasets")
    card = (tmp_path / "out" / "policy" / "adapter" / "README.md").read_text()
    assert f"This is the policy of round 1. {decided['text']}" in card and "accuracy, greedy" in card
    found = [[stats["accuracy"]["mean"] for stats in one["policy"]] for one in numbers["rounds"]]
    assert [one["metric"] for one in decided["rounds"]] == pytest.approx([sum(own) / len(own) for own in found])
    assert [one["panel"] for one in decided["rounds"]] == [one["panel"]["mean"] for one in numbers["rounds"]]
    best = {stats["mode"]: stats for stats in numbers["rounds"][0]["policy"]}
    shown = {s["mode"]: s for s in numbers["evaluation"]["responses"] if s["model"] == "policy"}
    assert best == shown and best.keys() == {"greedy", "sampled"}
    assert all(one["panel"] and one["scores"] and one["kl"] is not None for one in numbers["rounds"])
