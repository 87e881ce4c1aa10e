"""The operator's commands on a real small run: watched, re-gated, repaired, limited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ray_pipeline.graph.failures import failed_again, read_failures, write_failures
from ray_pipeline.store.files import Folder
from tests.dags.conftest import CONFIG, COUNT, SMALL, engine_calls, manifest, run, tables
from tests.dags.in_process import here
from tests.dags.test_resume import to_datasets

pytestmark = pytest.mark.e2e


@pytest.fixture
def folder(small_run: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy, symlinks=True)
    return copy


def test_a_run_finds_what_regate_wrote(folder: Path) -> None:
    # Stages share an engine and its seconds.
    usages = [stage.get("usage", {}) for stage in manifest(folder)["stages"].values()]
    paid, started = (sum(usage.get(name, 0.0) for usage in usages) for name in ("device_seconds", "start_seconds"))
    assert paid > started > 0  # an engine's start is paid for and told apart
    state = json.loads(here("status", str(folder), "--json").output.splitlines()[-1])
    judge = next(stage for stage in state["stages"] if stage["name"] == "judge")
    assert state["life"] == "ended" and judge["status"] == "done" and judge["shards_done"] == 4
    here("regate", str(folder), "gate.tau=1.0", "--write")
    again = here(*to_datasets(folder, "gate.tau=1.0"))
    assert "to do" not in again.output and not again.engines


def test_a_quarantined_shard_waits_for_retry(folder: Path, small_run: Path) -> None:
    gate = folder / manifest(folder)["stages"]["gate"]["path"]
    (gate / "shard-00002.parquet").unlink()
    (gate / "_result.json").unlink()
    write_failures(Folder(str(gate)), {2: failed_again(None, 2, "OSError: the disk was full", 1)})

    left = here("run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "gate", *SMALL, expect=1)
    assert "1 of 4 shards are in quarantine" in left.output and "OSError: the disk was full" in left.output
    entry = manifest(folder)["stages"]["gate"]
    assert entry["status"] == "failed" and entry["failed_shards"][0]["quarantined"]

    (gate / "shard-00003.parquet").unlink()  # missing, but not failed: none of retry's
    retried = run("retry", str(folder))
    assert "gate: 1 shards to retry: 2" in retried.output and retried.engines == {}
    assert read_failures(Folder(str(gate))) == {}
    assert (gate / "shard-00002.parquet").exists() and not (gate / "shard-00003.parquet").exists()
    here("run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "gate", *SMALL)
    assert tables(folder, ("gate",)) == tables(small_run, ("gate",))


def test_a_limit_ends_a_run_in_good_order_and_a_higher_one_goes_on(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    price = ["--device-hour", "36000"]  # ten a second: the engine's start alone, about a second, is over the limit
    stop = ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), "--to", "judge", *SMALL, *price]
    stopped = run(*stop, "--max-cost", "2", expect=1, warm=False)
    assert "--max-cost is 2" in stopped.output and stopped.living_engines() == []
    assert json.loads((folder / "spent.json").read_text())["device_seconds"] >= 0.2
    here(*stop, "--max-cost", "10000", f"calls.root={small_run / 'calls'}")
    # What the first try was answered before it heard of the limit is kept; the small run's log answers the rest.
    assert [manifest(folder)["stages"][name]["status"] for name in ("candidates", "judge")] == ["done", "done"]
    assert engine_calls(folder).get("candidates", 0) <= 4 * COUNT
