"""`quorum list`: runs of every state, damaged ones and folders that are no run, read from manifests alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.operate.run_list import ListedRun, list_runs
from ray_pipeline.store.errors import StoreError
from tests.operate.at_an_endpoint import quorum


def stage(name: str, status: str = "done", **more: Any) -> dict[str, Any]:
    return {name: {"fingerprint": "f", "path": f"{name}-f", "tables": [], "status": status, **more}}


def plant(folder: Path, age: int, stages: dict[str, Any], **config: Any) -> Path:
    """A run whose manifest was written so many seconds before another's."""
    folder.mkdir()
    manifest = {"dag": "dmapo", "num_shards": 2, "stages": stages, "config": config}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.utime(folder / "manifest.json", (1_800_000_000 - age, 1_800_000_000 - age))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    models = {"policy": {"model": "/somewhere/Mistral-7B"}, "judge": {"model": "Qwen/Qwen3-8B"}}
    rows = {"rows": {"kto": {"train": 1200, "val": 34}}}
    page = {"headline": {"verdict": "better", "text": "The policy got better."}}
    plant(
        tmp_path / "good",
        30,
        {**stage("datasets", role="datasets", facts=rows), **stage("evaluate", role="page", facts=page)},
        models=models,
        train={"method": "kto"},
    )
    plant(
        tmp_path / "data", 20, stage("datasets", role="datasets", facts=rows), models={"m": models["judge"]}, train=None
    )
    plant(
        tmp_path / "half",
        10,
        {**stage("prompts"), **stage("judge", "waiting")},
        baselines={"methods": {"sft": {}, "dpo": {}}},
    )
    plant(tmp_path / "broken", 5, stage("judge", "failed", error="3 of 4 shards failed"), models=models)
    (tmp_path / "latest").symlink_to("good")
    (tmp_path / "notes").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_text('{"dag": "dma')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"name": "a web app", "stages": 3}')
    return tmp_path


def by_name(runs: list[ListedRun]) -> dict[str, ListedRun]:
    return {Path(run.folder).name: run for run in runs}


def test_every_folder_is_a_line_of_its_own(root: Path) -> None:
    runs = by_name(list_runs(str(root)))
    assert set(runs) == {"good", "data", "half", "broken", "notes", "torn", "foreign"}
    good = runs["good"]
    assert (good.state, good.workflow, good.method, list(good.models)) == (
        "done",
        "dmapo",
        "kto",
        ["Mistral-7B", "Qwen/Qwen3-8B"],
    )
    assert good.result == "The policy got better." and good.date.startswith("2027-01-1")
    assert (runs["data"].state, runs["data"].method) == ("done", "")
    assert runs["data"].result == "kto 1,234 rows; 1 of 1 stages done"
    assert (runs["half"].state, runs["half"].method, runs["half"].result) == (
        "unfinished",
        "sft, dpo",
        "1 of 2 stages done",
    )
    assert runs["broken"].state == "failed" and runs["broken"].result.startswith("judge: 3 of 4 shards failed")
    assert runs["notes"].state == "no run" and runs["torn"].state == runs["foreign"].state == "damaged"
    assert "not valid JSON" in runs["torn"].result


def test_the_newest_is_first_and_no_run_is_last(root: Path) -> None:
    names = [Path(run.folder).name for run in list_runs(str(root))]
    assert [name for name in names if name in ("good", "data", "half", "broken")] == ["broken", "half", "data", "good"]
    assert names[-1] == "notes"


def test_a_heartbeat_tells_a_living_run_from_a_killed_one(root: Path) -> None:
    for name in ("half", "data"):
        (root / name / "heartbeat.json").write_text('{"beat": 1}')
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        (root / "half" / "heartbeat.json").write_text('{"beat": 2}')

    runs = by_name(list_runs(str(root), sleep))
    assert (runs["half"].state, runs["data"].state, runs["good"].state) == ("running", "stopped", "done")
    assert len(slept) == 1


def test_the_command_prints_lines_and_json(root: Path) -> None:
    lines = quorum("list", str(root)).splitlines()
    assert len(lines) == 7 and any(line.endswith("The policy got better.") for line in lines)
    plain = json.loads(quorum("list", str(root), "--json"))
    assert {run["state"] for run in plain} == {"done", "unfinished", "failed", "damaged", "no run"}
    (alone,) = json.loads(quorum("list", str(root / "good"), "--json"))
    assert alone["workflow"] == "dmapo"


def test_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert list_runs(str(tmp_path)) == []
    with pytest.raises(StoreError, match=r"no folder .*nowhere"):
        list_runs(str(tmp_path / "nowhere"))
