"""A run in one process with real engines: the tables, receipts and manifest of the same run on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dags.conftest import CONFIG, engine_calls, manifest, run, tables

pytestmark = pytest.mark.e2e

STAGES = ("prompts", "candidates", "judge-layout", "judge", "critic", "gate", "dataset-rows", "datasets")


def test_in_process_writes_what_ray_writes(tmp_path: Path) -> None:
    small = ["prompts.sources.0.count=16", "prompts.num_shards=2"]
    here, there = tmp_path / "here", tmp_path / "there"
    command = ["run", "dmapo", "-c", CONFIG, "--to", "datasets", *small]
    checked = run("check", *command[1:], "--engines", "--run-dir", str(here))
    assert checked.output.count("test calls answered in") == 2 and checked.living_engines() == [] and not here.exists()
    first = run(*command, "--run-dir", str(here), "--executor", "inprocess")
    assert first.living_engines() == [] and first.actors == {}
    assert set(engine_calls(here)) == {"candidates", "judge", "critic"}
    done = run(*command, "--run-dir", str(there), f"calls.root={here / 'calls'}", "calls.replay_only=true")
    assert done.actors and engine_calls(there) == {}
    names = [name for name in STAGES if name in manifest(here)["stages"]]
    assert len(names) >= 7 and tables(here, names) == tables(there, names)

    ours, theirs = manifest(here)["stages"], manifest(there)["stages"]
    for name in names:
        for key in ("fingerprint", "path", "tables", "inputs", "status", "rows", "facts"):
            assert ours[name][key] == theirs[name][key], (name, key)
        assert list(ours[name]["usage"]) == list(theirs[name]["usage"]), name
        receipts = [sorted(p.name for p in (f / ours[name]["path"] / "_receipts").glob("*")) for f in (here, there)]
        assert receipts[0] == receipts[1]
    assert {s["name"] for s in json.loads((here / "progress.json").read_text())} == {
        s["name"] for s in json.loads((there / "progress.json").read_text())
    }
    # A shard that is gone is made again from the call log, on the executor that did not make it.
    place = here / ours["judge"]["path"]
    before = (place / "shard-00001.parquet").read_bytes()
    kept = json.loads((place / "_receipts" / "shard-00000.json").read_text())["usage"]["calls_engine"]
    (place / "shard-00001.parquet").unlink()
    again = run(*command, "--run-dir", str(here))
    assert (place / "shard-00001.parquet").read_bytes() == before and again.living_engines() == []
    assert engine_calls(here)["judge"] == kept
