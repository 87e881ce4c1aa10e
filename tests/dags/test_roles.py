"""What a stage's table is, in the DAG, in the manifest, and in manifests from before stages had roles."""

from __future__ import annotations

import pytest

from ray_pipeline.config.loading import load_config
from ray_pipeline.graph.results import StageRecord
from ray_pipeline.workflow.registry import find_workflow

BENCHMARKS = "benchmarks={mt_bench: {questions: 'pocket:mt_bench', references: null}, floors: [x]}"


@pytest.mark.parametrize(
    ("workflow", "config", "overrides"),
    [
        ("dmapo", "pocket", [BENCHMARKS]),
        ("baselines", "pocket_baselines", []),
        ("fellowship", "pocket_fellowship", []),
        ("agreement", "pocket_agreement", []),
        ("winrate", "pocket_winrate", []),
    ],
)
def test_an_old_manifest_gives_the_same_roles(workflow: str, config: str, overrides: list[str]) -> None:
    found = find_workflow(workflow)
    dag = found.wire(load_config(found.config, config, overrides), "/run")
    for stage in dag.stages:
        tables = list(stage.work.tables)
        entry = {"group": stage.group_name, "fingerprint": "f", "path": "p", "tables": tables, "status": "waiting"}
        assert StageRecord.read(stage.name, entry).role == stage.role_name, stage.name
        assert StageRecord.read(stage.name, {**entry, "role": "mine"}).role == "mine"


def test_roles_tell_tables_of_one_kind_apart() -> None:
    found = find_workflow("fellowship")
    dag = found.wire(load_config(found.config, "pocket_fellowship"), "/run")
    roles = {stage.name: stage.role_name for stage in dag.stages}
    assert (roles["judge"], roles["score-responses"], roles["improve-judge"]) == (
        "verdicts",
        "response verdicts",
        "branch verdicts",
    )
    assert (roles["candidates"], roles["generate-1"]) == ("candidates", "turns")
    assert (roles["datasets"], roles["datasets-reviews"], roles["train"]) == ("datasets", "branch datasets", "policy")
