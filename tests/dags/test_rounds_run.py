"""Two rounds on real engines and real trainings, killed in the second."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.dags.conftest import CONFIG, Quorum, contradictions, manifest, run, wait_until

pytestmark = pytest.mark.e2e

SMALL = [
    "prompts.sources.0.count=96",
    "prompts.num_shards=4",
    "train.num_workers=1",
    "train.global_batch=8",
    "train.batch_size=4",
    "train.epochs=1",
    "train.save=adapter",
]


def logged(folder: Path) -> Counter[str]:
    """How often each call is in the log."""
    tables = [pq.read_table(part, columns=["call_key"]) for part in (folder / "calls").rglob("*.parquet")]
    return Counter(key for table in tables for key in table["call_key"].to_pylist())


def test_a_run_killed_in_its_second_round_repeats_no_answered_call(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), *SMALL, "rounds.n=2", "rounds.parts=2"]
    first = Quorum(*command)
    wait_until(first, lambda: any(folder.glob("judge-2-*/shard-*.parquet")))
    first.kill()
    assert first.living_engines() == []
    kept = logged(folder)
    assert kept and not (folder / "report").exists()

    run(*command)
    after = logged(folder)
    assert len(after) > len(kept) and {call: after[call] for call in kept} == kept
    assert contradictions(folder / "calls") == []
    stages = manifest(folder)["stages"]
    assert {entry["status"] for entry in stages.values()} == {"done"}
    rows = [stages[f"candidates{ending}"]["rows"]["candidates"] for ending in ("", "-2")]
    assert sum(rows) == 4 * 96 and min(rows) > 0
    policies = [folder / stages[name]["path"] for name in ("train", "train-2")]
    assert all((policy / "adapter").is_dir() and not (policy / "merged").exists() for policy in policies)
    assert (folder / "policy").resolve() == policies[1]
    assert "starts from" in (policies[1] / "adapter" / "README.md").read_text()

    assert "datasets-2" in run("audit", str(folder)).output
    numbers = json.loads((folder / "report" / "metrics.json").read_text())
    assert [one["number"] for one in numbers["rounds"]] == [1, 2]
    last = {stats["mode"]: stats for stats in numbers["rounds"][1]["policy"]}
    shown = {s["mode"]: s for s in numbers["evaluation"]["responses"] if s["model"] == "policy"}
    assert last == shown and last.keys() == {"greedy", "sampled"}
    assert all(one["panel"] and one["scores"] and one["kl"] is not None for one in numbers["rounds"])
