"""Stages that share a pool of engines: which do, what becomes of one that fails, and how often the model is loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from dags.dmapo import DmapoConfig, dmapo
from ray_pipeline.config.loading import load_config
from ray_pipeline.engines.base import Sampling
from ray_pipeline.engines.models import Placement
from ray_pipeline.graph.driver import RunSettings, execute
from ray_pipeline.graph.executor import Executor
from ray_pipeline.graph.in_process import InProcessExecutor
from ray_pipeline.graph.pools import share_pools
from ray_pipeline.graph.ray_executor import RayExecutor
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, ShardInput, ShardOutput, ShardWork, Stage, StageStop, WholeInput, WholeWork
from ray_pipeline.store.schemas import DECISIONS
from tests.scripted import ScriptedEngine, user


def columnar(given: ShardInput) -> ShardOutput:
    return ShardOutput({})


def whole(given: WholeInput) -> dict[str, Any]:
    return {}


def asks(name: str, *parents: Stage, model: str = "m", **placement: Any) -> Stage:
    work = ShardWork(columnar, (), engine=functools.partial(dict, model=model), placement=Placement(**placement))
    return Stage(name, work, {}, {p.name: p for p in parents})


def names(stages: list[Stage]) -> list[tuple[str, ...]]:
    return [tuple(stage.name for stage in group) for group in share_pools(stages)]


def test_stages_that_can_begin_together_on_one_model_share_a_pool() -> None:
    prompts = Stage("prompts", WholeWork(whole), {})
    first, second = asks("first", prompts), asks("second", prompts)
    assert names([prompts, first, second]) == [("prompts",), ("first", "second")]
    # The order of the others stays, and each group comes after what it reads.
    gate = Stage("gate", ShardWork(columnar, ()), {}, {"first": first})
    third = asks("third", prompts, gate)
    assert names([prompts, first, gate, second, third]) == [("prompts",), ("first", "second"), ("gate",), ("third",)]


def test_another_model_another_place_or_no_model_is_another_pool() -> None:
    there = [asks("a"), asks("b", model="n"), asks("c", max_actors=2), Stage("d", ShardWork(columnar, ()), {})]
    assert names([*there, Stage("e", ShardWork(columnar, ()), {})]) == [("a",), ("b",), ("c",), ("d",), ("e",)]


def test_only_what_is_not_done_is_waited_for() -> None:
    prompts = Stage("prompts", WholeWork(whole), {})
    candidates = asks("candidates", prompts)
    judge, base = asks("judge", candidates), asks("base", prompts)
    assert names([prompts, candidates, judge, base]) == [("prompts",), ("candidates", "base"), ("judge",)]
    assert names([judge, base]) == [("judge", "base")]


def test_the_pocket_run_loads_its_models_four_times() -> None:
    config = load_config(DmapoConfig, "pocket")
    shared = [group for group in names(dmapo(config, "/run").stages) if len(group) > 1]
    assert shared == [
        ("candidates", "responses-base"),
        ("judge", "critic"),
        ("comparisons", "score-responses"),
    ]


# --- on a cluster and in this process ---------------------------------------------------------------------------------


def noted_engine(starts: str) -> ScriptedEngine:
    with open(starts, "a") as file:
        file.write("x")
    return ScriptedEngine()


async def answer(given: ShardInput) -> ShardOutput:
    assert given.engine is not None
    if given.settings == "refuses":
        raise StageStop("it has had enough")
    await given.engine.bound("0" * 32, "r").chat(user(f"{given.settings} {given.shard}"), Sampling())
    return ShardOutput({"decisions": DECISIONS.empty_table()})


@pytest.mark.parametrize(
    "executor", [InProcessExecutor(), pytest.param(RayExecutor(), marks=pytest.mark.e2e)], ids=["inprocess", "ray"]
)
def test_one_start_for_two_stages_and_each_has_its_own_end(tmp_path: Path, executor: Executor) -> None:
    starts = tmp_path / "starts"
    engine = functools.partial(noted_engine, str(starts))

    def asking(name: str, *parents: Stage) -> Stage:
        work = ShardWork(answer, ("decisions",), name, engine)
        return Stage(name, work, {}, {p.name: p for p in parents})

    prompts = Stage("prompts", WholeWork(whole), {})
    refuses, accepts = asking("refuses", prompts), asking("accepts", prompts)
    after = {s.name: Stage(f"after-{s.name}", WholeWork(whole), {}, {s.name: s}) for s in (refuses, accepts)}
    dag = Dag("two", [refuses, accepts, *after.values()])
    outcome = execute(dag, RunSettings(Session(str(tmp_path / "run"), str(tmp_path / "run/calls"), 3), {}), executor)
    assert set(outcome.results) == {"prompts", "accepts", "after-accepts"}
    assert {name: failure.reason for name, failure in outcome.failures.items()} == {"refuses": "it has had enough"}
    assert outcome.not_run == ["after-refuses"]
    assert outcome.results["accepts"].usage.calls_engine == 3
    assert starts.read_text() == "x"
