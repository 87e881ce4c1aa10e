"""The whole fellowship workflow up to its pages, stage by stage in this process: real stages, tables and files, a real
tokenizer, and scripted models that play the pocket world's roles."""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dags.fellowship import FellowshipConfig, audit, fellowship
from ray_pipeline.config.loading import load_config
from ray_pipeline.engines.base import ChatEngine
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.graph.manifest import stage_entry
from ray_pipeline.graph.results import Run, StageRecord
from ray_pipeline.graph.stage import Dag, ShardInput, ShardWork, Stage, StageRef, StageResult, WholeInput
from ray_pipeline.pocket.reviewing import feedback_on
from ray_pipeline.pocket.tasks import rubric_scores, truth
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow import training
from tests.scripted import ScriptedEngine

SHARDS = 2


def worker(messages: Any, sampling: Any) -> str:
    """Generator, reviewer and judge. The generator is right on a third of first answers and half of revisions."""
    text = messages[-1]["content"]
    if len(messages) == 1 and text.startswith("task : "):
        (asked, _, rest), lines = text.removeprefix("task : ").partition(" answer : "), text.split("\n")
        answer = rest.split("\n")[0]
        if lines[-1].startswith("judge "):
            return json.dumps({"reason": "r", "score": rubric_scores(asked, answer)[lines[-1].removeprefix("judge ")]})
        return json.dumps({"reason": "r", "feedback": feedback_on(asked, answer)})
    right = truth(messages[0]["content"])
    luck = sampling.seed % 6
    if luck < 2 or (luck == 2 and len(messages) > 1):
        return right
    # Two kinds of faults: a review of another fault is not the same feedback again.
    return f"it is {right} moon" if luck % 2 else "sorry i can not"


def play(
    dag: Dag, root: Path, engine_of: Callable[[Stage], ChatEngine], run: Callable[[Any], Any] = asyncio.run
) -> dict[str, StageResult]:
    """Every stage in the order of the DAG; what Ray would do, without Ray."""
    results: dict[str, StageResult] = {}
    for stage in dag.stages:
        folder = Folder(str(root / stage.folder_name))
        inputs = {role: results[parent.name] for role, parent in stage.inputs.items()}
        if isinstance(stage.work, ShardWork):
            facts = _shards(stage, inputs, folder, root, engine_of, run)
        else:
            given = WholeInput(
                inputs, folder, Folder(str(root / "calls")), stage.fingerprint, SHARDS, stage.work.settings,
                lambda line: None, lambda *step: None,
            )  # fmt: skip
            facts = stage.work.function(given)
        results[stage.name] = StageResult(
            stage.name, stage.fingerprint, folder.location, SHARDS, stage.work.tables, {}, facts,
            role=stage.role_name,
        )  # fmt: skip
    return results


def _shards(stage: Stage, inputs: Any, folder: Folder, root: Path, engine_of: Any, run: Any) -> dict[str, Any]:
    counts: dict[str, int] = collections.Counter()
    for shard in range(SHARDS):
        tables = {
            role if len(parent.tables) == 1 else f"{role}.{kind}": parent.table(kind).read(shard)
            for role, parent in inputs.items()
            for kind in parent.tables
        }

        async def go(shard: int = shard, tables: Any = tables) -> Any:
            facts = {role: parent.facts for role, parent in inputs.items()}
            tail = (stage.work.settings, lambda rows: None, lambda name, read: None)
            if stage.work.engine is None:
                return stage.work.function(ShardInput(shard, SHARDS, tables, facts, None, *tail))
            async with LoggedEngine(engine_of(stage), Folder(str(root / "calls")), shard, SHARDS) as log:
                return await stage.work.function(ShardInput(shard, SHARDS, tables, facts, log, *tail))

        output = run(go())
        counts.update(output.counts)
        for kind, table in output.tables.items():
            StageRef.of(stage, str(root), SHARDS).table(kind).write(shard, table)
    return {"counts": dict(counts)}


@pytest.fixture(scope="module")
def config() -> FellowshipConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "validate_trainer_args", lambda *_: None)
        changes = [
            "models.generator.model=pocket:policy", "models.reviewer.model=pocket:judge",
            "prompts.sources.0.count=60", f"prompts.num_shards={SHARDS}", "evaluate.skip_generation=true",
        ]  # fmt: skip
        return load_config(FellowshipConfig, "pocket_fellowship", changes)


@pytest.fixture(scope="module")
def played(config: FellowshipConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageResult]:
    root, engine = tmp_path_factory.mktemp("fellowship"), ScriptedEngine(worker)
    return play(fellowship(config, str(root)), root, lambda stage: engine)


def rows(played: dict[str, StageResult], stage: str) -> list[dict[str, Any]]:
    return played[stage].table().read_all().to_pylist()


def data(played: dict[str, StageResult], stage: str, kind: str) -> list[dict[str, Any]]:
    files = sorted(Path(Folder(played[stage].folder).path(kind)).rglob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_what_is_accepted_is_right_and_what_is_rejected_is_worse(played: dict[str, StageResult]) -> None:
    asked = {row["prompt_id"]: row["messages"][0]["content"] for row in rows(played, "prompts")}
    kto, dpo = data(played, "datasets", "kto"), data(played, "datasets", "dpo")
    assert len(kto) > 40 and len(dpo) > 25
    worth = {
        row["candidate_id"]: sum(rubric_scores(asked[row["prompt_id"]], row["response"]).values())
        for row in rows(played, "candidates")
    }
    assert all(worth[row["chosen_id"]] > worth[row["rejected_id"]] for row in dpo)
    accepted = {row["prompt_id"]: worth[row["candidate_id"]] for row in kto if row["label"]}
    best = {
        p: max(worth[c["candidate_id"]] for c in rows(played, "candidates") if c["prompt_id"] == p) for p in accepted
    }
    assert accepted == best
    several = collections.Counter(row["prompt_id"] for row in dpo)
    assert max(several.values()) == 2  # one pair per rejected response


def test_the_page_tells_the_truth_by_iteration(played: dict[str, StageResult]) -> None:
    stats = json.loads(Path(Folder(played["loop"].folder).path("loop.json")).read_text())
    first, second, _ = stats["responses"]
    assert stats["prompts"] == 60 == sum(stats["ends"].values()) == first["responses"]
    assert stats["ends"]["empty"] > 10 and set(stats["ends"]) <= {"empty", "limit", "repeated"}
    # The reviewer sees through everything: only wrong answers come back from it.
    assert second["responses"] == second["wrong_before"] and second["mended"] / second["wrong_before"] > 0.4
    so_far = [r["accuracy_so_far"] for r in stats["responses"]]
    assert so_far == sorted(so_far) and so_far[-1] > so_far[0] + 0.3
    page = Path(Folder(played["loop"].folder).path("report.md")).read_text()
    assert "## The truth" in page and "nothing to improve" in page


def test_the_second_kind_leads_back_and_prefers_what_helped(played: dict[str, StageResult]) -> None:
    reviews = {row["review_id"]: row for row in rows(played, "improve-review")}
    revisions = {row["candidate_id"]: row for row in rows(played, "improve-revise")}
    asked = {row["prompt_id"]: row for row in rows(played, "prompts")}
    pairs = data(played, "datasets-revisions", "dpo")
    assert pairs
    for row in pairs:
        prompt = asked[row["prompt_id"]]
        assert row["split"] == prompt["split"] and row["prompt"][0] == prompt["messages"][0]
        assert reviews[revisions[row["chosen_id"]]["review_id"]]["feedback"] == row["prompt"][-1]["content"]
        instruction = prompt["messages"][0]["content"]
        chosen, rejected = (
            sum(rubric_scores(instruction, row[s][0]["content"]).values()) for s in ("chosen", "rejected")
        )
        assert chosen > rejected
    # A scripted reviewer says the same every time, so no review is better than another.
    assert data(played, "datasets-reviews", "dpo") == []


def test_the_report_and_the_audit_read_the_run(played: dict[str, StageResult], config: FellowshipConfig) -> None:
    metrics = json.loads(Path(Folder(played["evaluate"].folder).path("metrics.json")).read_text())
    assert metrics["run"]["workflow"] == "fellowship" and metrics["missing_stages"] == ["train", "evaluate"]
    folder = Folder(str(Path(Folder(played["prompts"].folder).path()).parent))
    stages = {s.name: StageRecord.read(s.name, stage_entry(s)) for s in fellowship(config, folder.location).stages}
    run = Run(folder, "fellowship", "fellowship", stages, played, SHARDS, config=config.model_dump(mode="json"))
    (found,) = audit(run, config).reports.values()
    assert found.ok, found.problems[:3]
    assert found.rows["prompts"] == 60 and found.rows["dpo"] == len(data(played, "datasets", "dpo"))


def test_the_same_calls_give_the_same_bytes(config: FellowshipConfig, tmp_path: Path) -> None:
    def made(name: str) -> dict[str, bytes]:
        dag = fellowship(config, str(tmp_path / name))
        dag.stages = dag.upto("datasets")
        found = play(dag, tmp_path / name, lambda stage: ScriptedEngine(worker))
        files = [f for r in found.values() for f in sorted(Path(Folder(r.folder).path()).rglob("*.parquet"))]
        return {str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files}

    assert made("a") == made("b")
