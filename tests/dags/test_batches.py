"""Runs whose judges are asked in batches: the tables of single requests, half the price, and nothing paid twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_pipeline.config.loading import read_config
from ray_pipeline.operate.plan import plan
from ray_pipeline.operate.prices import Rates
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from ray_pipeline.workflow.registry import find_workflow
from tests.batch_endpoint import BatchEndpoint
from tests.dags.conftest import ROOT, tables
from tests.endpoint import KEY, opinion
from tests.operate.at_an_endpoint import RUBRICS, quorum

PRICES = {"input": 1000.0, "output": 1000.0}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchEndpoint]:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    with BatchEndpoint(opinion) as endpoint:
        yield endpoint


def command(folder: Path, server: BatchEndpoint, engine: str, **changes: Any) -> list[str]:
    """Arguments of a command on DMAPO with judge and critic on this engine; the run is `folder/run`."""
    endpoint = {"base_url": server.url, "api_key_env": "LOOPBACK_KEY", "retries": 1, "prices": PRICES}
    batch = {"batch": {"quiet_s": 0.3, "poll_s": 0.05}} if engine == "openai_batch" else {}
    values = {
        "models": {
            "writer": {"engine": "openai", "model": "writer", "endpoint": endpoint},
            "judge": {"engine": engine, "model": "judge", "endpoint": {**endpoint, **batch}, "canary": False},
        },
        "prompts": {"sources": [{"type": "pocket", "count": 12, "seed": 0}], "num_shards": 4},
        "candidates": {"model": "writer", "k": 3},
        "judge": {"rubrics": RUBRICS},
        "train": None,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return ["dmapo", "-c", str(folder / "config.yaml"), "--run-dir", str(folder / "run")]


MADE = ("candidates", "judge", "critic", "gate", "dataset-rows")


@pytest.mark.parametrize("executor", ["inprocess", pytest.param("ray", marks=pytest.mark.e2e)])
def test_batches_give_the_tables_of_single_requests(server: BatchEndpoint, tmp_path: Path, executor: str) -> None:
    made = {}
    for engine, where in (("openai", "inprocess"), ("openai_batch", executor)):
        folder = tmp_path / engine
        quorum("run", *command(folder, server, engine), "--executor", where)
        made[engine] = tables(folder / "run", MADE)
    assert made["openai"] == made["openai_batch"] and len(made["openai"]) > 4
    # All shards of a stage are in one batch: judges and critic, on a cluster in any order.
    assert sorted(len(batch.calls) for batch in server.batches) == [12 * 3, 12 * 3 * len(RUBRICS)]
    assert (
        sum(body["model"] == "judge" for body in server.asked)
        == len(server.paid)
        == sum(len(batch.calls) for batch in server.batches)
    )
    # What one engine has made serves the other.
    quorum("run", *command(tmp_path / "openai", server, "openai_batch"), "--executor", "inprocess")
    assert len(server.batches) == 2


def test_a_plan_prices_batches_at_half(server: BatchEndpoint, tmp_path: Path) -> None:
    def cost(engine: str, **batch: Any) -> float:
        command(tmp_path / engine, server, engine)
        values = yaml.safe_load((tmp_path / engine / "config.yaml").read_text())
        if batch:
            values["models"]["judge"]["endpoint"]["batch"] = batch
        config = read_config(DmapoConfig, values)
        found = plan(config, find_workflow("dmapo").wire(config, str(tmp_path / "planned")), Rates())
        assert all(stage.money is not None for stage in found.stages)
        return sum(stage.money or 0.0 for stage in found.stages if stage.model == "judge")

    full = cost("openai")
    assert full > 0 and cost("openai_batch") == pytest.approx(full / 2)
    assert cost("openai_batch", price=0.8) == pytest.approx(0.8 * full)


def test_a_run_that_is_killed_while_it_waits_finds_its_batch_again(server: BatchEndpoint, tmp_path: Path) -> None:
    server.looks = 10**9
    arguments = command(tmp_path, server, "openai_batch")
    run = str(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_pipeline.cli", "run", *arguments, "--executor", "inprocess"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 300
        while not (server.batches and server.batches[0].looks) and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(0.5)
        told = quorum("status", run)
        assert f"batch batch_0: {12 * 3 * len(RUBRICS)} calls of judge, in_progress, " in told and " old" in told
        (batch,) = json.loads(quorum("status", run, "--json"))["batches"]
        assert (batch["id"], batch["status"], batch["model"]) == ("batch_0", "in_progress", "judge")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    server.looks = 0
    quorum("run", *arguments, "--executor", "inprocess")
    assert [len(batch.calls) for batch in server.batches] == [12 * 3 * len(RUBRICS), 12 * 3]
    assert len(server.paid) == sum(len(batch.calls) for batch in server.batches)
    assert "batch batch_" not in quorum("status", run)
    spent = [json.loads(path.read_text()) for path in (tmp_path / "run" / "calls").glob("spent-*/*.json")]
    assert sum(one["calls"] for one in spent if one.get("in_batches")) == len(server.paid)
