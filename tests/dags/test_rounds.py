"""Rounds as a DAG: what they leave as it is, what a longer run remakes, and rows that are walked back over rounds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from dags.baselines import BaselinesConfig
from dags.dmapo import audit, dmapo
from ray_pipeline.config.loading import read_config
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.evaluate.rounds import round_stats
from ray_pipeline.evaluate.stage import write_report
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.manifest import stage_entry
from ray_pipeline.graph.results import Run, of_final_round, read_run
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, ShardWork, Stage, StageRef, StageResult
from ray_pipeline.operate.regate import regate
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.golden.scripted_run import ask

SHARDS = 4


def config(*overrides: str) -> DmapoConfig:
    values = yaml.safe_load(Path("tests/one_judge.yaml").read_text())
    saved = [f"prompts.num_shards={SHARDS}", "prompts.sources.0.count=48", "train.save=adapter"]
    return read_config(DmapoConfig, values, [*saved, *overrides])


def dag(*overrides: str) -> Dag:
    return dmapo(config(*overrides), "/run")


def known(made: Dag) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in made.stages}


def of(made: Dag, name: str) -> Stage:
    return next(stage for stage in made.stages if stage.name == name)


def test_one_round_is_a_run_without_rounds() -> None:
    plain, one = dag(), dag("rounds.n=1", "rounds.data=all")
    assert known(one) == known(plain)
    assert [(stage.name, stage.group_name, stage.round) for stage in one.stages] == [
        (stage.name, stage.group_name, 0) for stage in plain.stages
    ]


def test_a_longer_run_remakes_the_last_page_alone() -> None:
    plain, same = dag(), dag("rounds.n=3", "rounds.prompts=same")
    assert {name for name, key in known(plain).items() if known(same)[name] != key} == {"evaluate"}
    for how in ("data=last", "data=all", "data=window", "reference=previous"):
        three, five = (dag(f"rounds.n={n}", f"rounds.{how}") for n in (3, 5))
        assert {name for name, key in known(three).items() if known(five)[name] != key} == {"evaluate"}
        assert {"candidates-5", "judge-5", "critic-5", "gate-5", "train-5", "comparisons-5"} <= known(five).keys()


def test_every_round_has_groups_of_its_own() -> None:
    made = dag("rounds.n=3")
    assert [stage.name for stage in made.stages if stage.group_name == "datasets-2"] == ["dataset-rows-2", "datasets-2"]
    assert {stage.round for stage in made.upto("datasets-2")} == {0, 1, 2}
    assert {stage.round for stage in made.downstream("train-2")} == {0, 2, 3}
    assert of(made, "responses-base").round == 0 and of(made, "prompts").round == 0


def test_what_a_round_learns_from() -> None:
    def inputs(name: str, *how: str) -> dict[str, str]:
        return {role: parent.name for role, parent in of(dag("rounds.n=4", *how), name).inputs.items()}

    assert inputs("train") == {"datasets": "datasets"}
    assert inputs("train-3") == {"datasets": "datasets-3", "start": "train-2"}
    assert inputs("train-3", "rounds.data=all") == {"datasets": "datasets-3"}
    for data, used in (("last", {4}), ("window", {3, 4}), ("all", {1, 2, 3, 4})):
        rows = inputs("dataset-rows-4", f"rounds.data={data}")
        candidates = {name for role, name in rows.items() if role.startswith("candidates")}
        decisions = {name for role, name in rows.items() if role.startswith("decisions")}
        assert candidates == {f"candidates-{n}".removesuffix("-1") for n in used}
        assert decisions == {f"gate-{n}".removesuffix("-1") for n in used}
        assert {name for role, name in rows.items() if role.startswith("verdicts/")} == {
            f"judge-{n}".removesuffix("-1") for n in used
        }
    base, previous = (dag("rounds.n=2", f"rounds.reference={name}") for name in ("base", "previous"))
    assert known(base)["train"] == known(previous)["train"]  # there is no policy before it
    assert known(base)["train-2"] != known(previous)["train-2"]


def test_decisions_and_a_lower_learning_rate_change_nothing_before_them() -> None:
    plain, stopped = dag("rounds.n=3"), dag("rounds.n=3", "rounds.stop={metric: score}")
    assert {name for name, key in known(plain).items() if known(stopped)[name] != key} == {"evaluate"}
    assert known(stopped).keys() - known(plain).keys() == {"stop-1", "stop-2", "stop-3"}
    read = {parent.role_name for parent in of(stopped, "stop-2").inputs.values()}
    assert read == {"prompts", "responses", "comparisons", "response verdicts", "decision"}
    assert [of(stopped, f"stop-{n}").round for n in (1, 2, 3)] == [1, 2, 3]
    longer = known(dag("rounds.n=4", "rounds.stop={metric: score}"))
    assert {name for name, key in known(stopped).items() if longer[name] != key} == {"evaluate"}
    assert "stop-1" not in known(dag("rounds.n=1", "rounds.stop={metric: score}"))

    lower = dag("rounds.n=3", "rounds.decay=0.5")
    assert known(lower)["datasets-2"] == known(plain)["datasets-2"]
    assert known(lower)["train"] == known(plain)["train"] and known(lower)["train-2"] != known(plain)["train-2"]
    rates = [of(lower, name).work.settings.train.learning_rate for name in ("train", "train-2", "train-3")]
    assert rates == pytest.approx([2e-3, 1e-3, 5e-4])


def test_parts_are_the_prompts(tmp_path: Path) -> None:
    made = dmapo(config("rounds.n=4"), str(tmp_path))
    results: dict[str, StageResult] = {}
    session = Session(str(tmp_path), str(tmp_path / "calls"), SHARDS)
    names = ["prompts", *(f"prompts-{n}" for n in (1, 2, 3, 4))]
    make_here([of(made, name) for name in names], session, results, lambda line: None)
    whole, *parts, again = ([row["prompt_id"] for row in results[n].table().read_all().to_pylist()] for n in names)
    assert sorted(name for part in parts for name in part) == sorted(whole) and all(len(part) > 4 for part in parts)
    assert again == parts[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["train=null", "evaluate.perplexity=true"], "answers the prompts of the next, but train is null"),
        (["candidates.model=judge"], r"set candidates\.model to policy"),
        (["candidates.generators=[policy, judge]"], r"set candidates\.model to policy"),
        (["train.save=merged"], r"set train\.save to adapter or both"),
        (["train.lora=null", "train.save=both"], r"set train\.save to adapter or both"),
        (["train.shard=zero3"], r"set train\.shard to fsdp"),
        (["evaluate.skip_generation=true"], "leaves out what the curves show"),
        (["rounds.data=all", "rounds.reference=previous"], "each round trains from the base"),
        (["rounds.data=all", "rounds.decay=0.5"], "set decay to 1"),
        (["rounds.decay=1.5"], "less than or equal to 1"),
        (["rounds.stop={metric: truth}"], "'score' or 'accuracy'"),
        (["rounds.stop={patience: 0}"], "greater than or equal to 1"),
        (
            ["rounds.stop={metric: accuracy}", "prompts.sources=[{type: jsonl, path: a.jsonl, column: q}]"],
            "set evaluate.checker, or metric to score",
        ),
        (["rounds.stop={}", "benchmarks={ifeval: {}}"], "measure the finished run by `quorum run benchmarks`"),
        (["rounds.data=al"], "'last', 'all' or 'window'"),
    ],
)
def test_rounds_that_cannot_follow(given: list[str], words: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=words):
        config("rounds.n=2", *given)
    if not any(one.startswith("rounds") for one in given):
        config("rounds.n=1", *given)


def test_a_comparison_has_no_rounds() -> None:
    values = yaml.safe_load(Path("configs/pocket_baselines.yaml").read_text())
    with pytest.raises(ConfigError, match="rounds has no effect in a comparison"):
        read_config(BaselinesConfig, values, ["rounds.n=2"])


# --- two rounds on scripted replies -----------------------------------------------------------------------------------


def two_rounds(folder: Path, *overrides: str) -> tuple[Run, DmapoConfig]:
    """A run up to the second datasets by the real stages, as if a policy had been trained in between."""
    given = config("rounds.n=2", "rounds.prompts=same", "datasets.kinds=[kto,dpo,sft]", *overrides)
    made = dmapo(given, str(folder))
    session = Session(str(folder), str(folder / "calls"), SHARDS)
    results: dict[str, StageResult] = {}
    for stage in made.stages:
        if stage.group_name.startswith(("train", "evaluate")):
            continue
        if isinstance(stage.work, ShardWork) and stage.work.engine is not None:
            reads = {
                **results,
                "train": StageResult(**vars(StageRef.of(of(made, "train"), str(folder), SHARDS)), rows={}, facts={}),
            }
            results[stage.name] = asyncio.run(ask(stage, stage.work, session, reads))
        else:
            make_here([stage], session, results, lambda line: None)
    done = {name: {"status": "done", **result.plain()} for name, result in results.items()}
    manifest = {
        "dag": "dmapo",
        "config": given.model_dump(mode="json"),
        "given": given.model_dump(mode="json", exclude_unset=True),
        "report": given.page().model_dump(mode="json"),
        "num_shards": SHARDS,
        "stages": {stage.name: {**stage_entry(stage), **done.get(stage.name, {})} for stage in made.stages},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return read_run(str(folder)), given


@pytest.mark.parametrize("data", ["last", "all"])
def test_rows_are_walked_back_over_rounds(tmp_path: Path, data: str) -> None:
    run, given = two_rounds(tmp_path, f"rounds.data={data}")
    reports = audit(run, given).reports
    assert {name: report.found for name, report in reports.items()} == {"datasets": {}, "datasets-2": {}}
    ids = [set(run.results[f"candidates{n}"].table().read_all()["candidate_id"].to_pylist()) for n in ("", "-2")]
    assert not ids[0] & ids[1]
    tables = [pq.read_table(tmp_path / run.stages["datasets-2"].path / "kto" / split) for split in ("train", "val")]
    used = {name for table in tables for name in table["candidate_id"].to_pylist()}
    assert used & ids[1] and bool(used & ids[0]) == (data == "all")

    decisions = run.results["gate"].table()
    kept = decisions.read(0)
    changed = ["discard" if label == "desirable" else label for label in kept["label"].to_pylist()]
    assert changed != kept["label"].to_pylist()
    decisions.write(0, kept.set_column(kept.schema.get_field_index("label"), kept.schema.field("label"), [changed]))
    found = {name: report.found for name, report in audit(run, given).reports.items()}
    assert found["datasets"] and bool(found["datasets-2"]) == (data == "all")


def test_a_report_of_an_unfinished_run_has_the_rounds(tmp_path: Path) -> None:
    run, _ = two_rounds(tmp_path)
    assert {result.round for result in of_final_round(run.results).values()} == {0, 1}  # no policy yet
    first, second = round_stats(run.results, None)
    assert (first.number, second.number) == (1, 2) and first.candidates == second.candidates == 192
    decided = run.results["gate"].table().read_all()["label"].to_pylist()
    assert first.kept == sum(label in ("desirable", "undesirable") for label in decided) / len(decided)
    assert first.distinct is not None and 0 < first.distinct <= 1
    assert first.rows["kto"] == run.results["datasets"].facts["rows"]["kto"]["train"]
    folder = write_report(run)
    numbers: dict[str, Any] = folder.read_json("metrics.json")
    assert [one["number"] for one in numbers["rounds"]] == [1, 2]
    assert "Data by round" in folder.read_bytes("report.md").decode()


def test_thresholds_of_rounds_are_not_changed_in_place(tmp_path: Path) -> None:
    run, _ = two_rounds(tmp_path)
    with pytest.raises(ConfigError, match="regate does not rebuild rounds"):
        regate(run, ["gate.tau=1"])
