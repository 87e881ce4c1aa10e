"""Stages are values with a fingerprint; a DAG knows what a stage needs and who needs it."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines.models import Placement
from ray_pipeline.graph import manifest
from ray_pipeline.graph.manifest import stage_entry
from ray_pipeline.graph.stage import Dag, ShardWork, Stage, StageRef, StageResult
from ray_pipeline.graph.stage_work import Failure
from ray_pipeline.store.files import Folder


def nothing(given: Any) -> Any:
    raise NotImplementedError


def stage(name: str, *parents: Stage, **changes: Any) -> Stage:
    values: dict[str, Any] = {
        "work": ShardWork(function=nothing, tables=("prompts",)),
        "config": {"a": 1, "b": [1, 2]},
        "inputs": {p.name: p for p in parents},
        "external": {"model": "sha256:0"},
    }
    return Stage(name=name, **{**values, **changes})


def test_a_fingerprint_changes_with_everything_that_decides_the_output() -> None:
    parent = stage("parent")
    base = stage("s", parent)
    found = [
        base,
        stage("t", parent),
        stage("s", parent, version=2),
        stage("s", parent, config={"a": 2, "b": [1, 2]}),
        stage("s", parent, config={"a": 1, "b": [2, 1]}),
        stage("s", parent, config={"a": True, "b": [1, 2]}),
        stage("s", parent, external={"model": "sha256:1"}),
        stage("s", parent, external={}),
        stage("s"),
        stage("s", inputs={"other role": parent}),
        stage("s", stage("parent", config={"a": 3})),
        stage("s", stage("parent", stage("grandparent"))),
    ]
    fingerprints = [s.fingerprint for s in found]
    assert len(set(fingerprints)) == len(fingerprints) and all(len(f) == 16 for f in fingerprints)


def test_a_manifest_makes_an_entry_again_only_when_its_stage_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(manifest, "stage_entry", lambda stage: made.append(stage.name) or stage_entry(stage))
    stages = [stage(name) for name in "abc"]
    book = manifest.Manifest(Folder(str(tmp_path)), Dag("d", stages), {}, {})
    results: dict[str, StageResult] = {}
    failures: dict[str, Failure] = {}

    def written(*changed: str) -> dict[str, str]:
        made.clear()
        book.write(results, failures)
        assert made == list(changed)
        return {name: entry["status"] for name, entry in json.loads(read())["stages"].items()}

    def read() -> str:
        return (tmp_path / "manifest.json").read_text()

    assert written("a", "b", "c") == {"a": "waiting", "b": "waiting", "c": "waiting"}
    results["b"] = StageResult(**vars(StageRef.of(stages[1], str(tmp_path), 1)), rows={"prompts": 7}, facts={})
    assert written("b") == {"a": "waiting", "b": "done", "c": "waiting"} and '"prompts": 7' in read()
    failures["c"] = Failure("no")
    assert written("c") == {"a": "waiting", "b": "done", "c": "failed"}
    results["b"] = dataclasses.replace(results["b"], rows={"prompts": 8})
    failures.clear()
    assert written("b") == {"a": "waiting", "b": "done", "c": "waiting"} and '"prompts": 8' in read()
    del results["b"]  # its file was damaged
    assert written("b") == {"a": "waiting", "b": "waiting", "c": "waiting"}


def test_a_fingerprint_does_not_change_with_how_it_is_run() -> None:
    same = stage("s").fingerprint
    work = ShardWork(
        function=nothing,
        tables=("prompts",),
        placement=Placement(min_actors=2, max_actors=8, num_gpus=1),
    )
    assert stage("s", work=work, group="g", view="v").fingerprint == same
    assert stage("s", config={"b": [1, 2], "a": 1}).fingerprint == same
    assert pickle.loads(pickle.dumps(stage("s"))).fingerprint == same
    assert stage("s").folder_name == f"s-{same}"


def test_a_fingerprint_is_worked_out_once_in_a_deep_dag() -> None:
    # Each stage reads the two before it: without memory there are some 10^12 paths to the first one.
    stages = [stage("s0"), stage("s1")]
    for n in range(2, 60):
        stages.append(stage(f"s{n}", *stages[-2:]))
    assert len(stages[-1].fingerprint) == 16


PROMPTS = stage("prompts")
ANSWERS = stage("candidates", PROMPTS)
LAYOUT = stage("judge-a-layout", PROMPTS, ANSWERS, group="judge")
JUDGES = [stage(f"judge-{n}", PROMPTS, ANSWERS, LAYOUT, group="judge") for n in "ab"]
CRITIC = stage("critic", PROMPTS, ANSWERS)
GATE = stage("gate", ANSWERS, *JUDGES, CRITIC)
REPORT = stage("report", GATE, PROMPTS)
DAG = Dag("dmapo", [REPORT, CRITIC])


def names(stages: list[Stage]) -> list[str]:
    return [s.name for s in stages]


def test_a_dag_takes_in_what_its_stages_read_and_puts_it_first() -> None:
    assert names(DAG.stages) == [
        "prompts",
        "candidates",
        "judge-a-layout",
        "judge-a",
        "judge-b",
        "critic",
        "gate",
        "report",
    ]
    assert DAG.groups == ["prompts", "candidates", "judge", "critic", "gate", "report"]


def test_upto_is_what_a_group_needs() -> None:
    assert names(DAG.upto(None)) == names(DAG.stages)
    assert names(DAG.upto("critic")) == ["prompts", "candidates", "critic"]
    assert names(DAG.upto("judge")) == ["prompts", "candidates", "judge-a-layout", "judge-a", "judge-b"]
    assert names(DAG.upto("prompts")) == ["prompts"]
    assert names(DAG.upto("report")) == names(DAG.stages)


def test_downstream_is_a_group_and_all_that_needs_it() -> None:
    assert names(DAG.downstream("critic")) == ["critic", "gate", "report"]
    assert names(DAG.downstream("judge")) == ["judge-a-layout", "judge-a", "judge-b", "gate", "report"]
    assert names(DAG.downstream("prompts")) == names(DAG.stages)
    assert names(DAG.downstream("report")) == ["report"]


@pytest.mark.parametrize("ask", ["upto", "downstream"])
def test_a_group_that_is_none(ask: str) -> None:
    with pytest.raises(
        ValueError, match="dmapo has no stage 'judges'; it has 1 prompts, 2 candidates, 3 judge, 4 critic, 5 gate"
    ):
        getattr(DAG, ask)("judges")


def test_a_group_is_named_or_numbered() -> None:
    assert DAG.groups[2] == DAG.group("3") == DAG.group("judge") == "judge"
    assert names(DAG.upto("3")) == names(DAG.upto("judge"))
    assert names(DAG.downstream("4")) == names(DAG.downstream("critic"))
    assert [DAG.is_before(GATE, group) for group in ("6", "5")] == [True, False]
    for none in ("0", "7", "-1", "³", "1.0", ""):
        with pytest.raises(ValueError, match="has no stage"):
            DAG.group(none)
    assert Dag("d", [stage("2"), stage("1")]).group("1") == "1"  # a name comes first


def test_two_stages_of_one_name_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"the same name: candidates$"):
        Dag("d", [REPORT, stage("candidates", stage("x"))])
    assert names(Dag("d", [GATE, GATE, REPORT]).stages) == names(DAG.stages)  # the same stage twice is one stage


def result(**changes: Any) -> StageResult:
    values: dict[str, Any] = {
        "name": "s",
        "fingerprint": "f",
        "folder": "/run/s-f",
        "num_shards": 4,
        "tables": ("kto", "dpo"),
        "rows": {},
        "facts": {},
    }
    return StageResult(**{**values, **changes})


def test_where_the_tables_of_a_result_lie() -> None:
    two, one = result(), result(tables=("prompts",))
    assert two.table("dpo").folder == "/run/s-f/dpo" and two.table("dpo").kind == "dpo"
    assert one.table().folder == "/run/s-f" and one.table("prompts") == one.table()
    assert (one.table().num_shards, one.table().fingerprint) == (4, "f")
    with pytest.raises(ValueError, match="too many values"):
        two.table()
    assert dataclasses.replace(one, cached=True).table() == one.table()
