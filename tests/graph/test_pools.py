"""Stages that share a pool of engines: which do, what becomes of one that fails, and how often the model is loaded."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dags.dmapo import dmapo
from ray_pipeline.config.loading import load_config
from ray_pipeline.engines.base import Sampling
from ray_pipeline.engines.models import Placement
from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.graph.driver import RunSettings, execute
from ray_pipeline.graph.executor import Executor
from ray_pipeline.graph.in_process import InProcessExecutor
from ray_pipeline.graph.pools import share_pools
from ray_pipeline.graph.ray_executor import RayExecutor
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Dag, ShardInput, ShardOutput, ShardWork, Stage, StageStop, WholeInput, WholeWork
from ray_pipeline.store.schemas import DECISIONS
from ray_pipeline.workflow.dmapo_config import DmapoConfig
from tests.scripted import ScriptedEngine, user


def columnar(given: ShardInput) -> ShardOutput:
    return ShardOutput({})


def whole(given: WholeInput) -> dict[str, Any]:
    return {}


def asks(name: str, *parents: Stage, model: str = "m", adapter: str | None = None, **placement: Any) -> Stage:
    engine: Any = functools.partial(Adaptable, VllmSpec(model, adapter=adapter))
    work = ShardWork(columnar, (), engine=engine, placement=Placement(**placement))
    return Stage(name, work, {}, {p.name: p for p in parents})


class Adaptable:
    """Makes scripted engines as `VllmEngine` serves adapters; each start is a letter in the file `starts`."""

    def __init__(self, spec: VllmSpec, adapters: Sequence[str] = (), *, starts: str = "") -> None:
        self._spec, self._adapters = spec, {None, *adapters}
        with open(starts, "a") as file:
            file.write("x")

    def serving(self, adapter: str | None) -> ScriptedEngine:
        assert adapter in self._adapters
        return ScriptedEngine(f"by {adapter}", identity={"engine": "vllm", "model": "m", "adapter": adapter})


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


def trains(name: str, *parents: Stage) -> Stage:
    return Stage(name, WholeWork(whole), {}, {p.name: p for p in parents})


def test_adapters_of_one_base_share_a_pool_once_all_are_trained() -> None:
    prompts = trains("prompts")
    base = asks("base", prompts)
    first, second = trains("train-1", prompts), trains("train-2", prompts)
    one, two = asks("one", first, adapter="/a"), asks("two", second, adapter="/b")
    page = trains("page", one)
    # The order of the pools follows from what they read, not from where their first stages are.
    shared = [("prompts",), ("train-1",), ("train-2",), ("base", "one", "two"), ("page",)]
    assert names([prompts, base, first, one, page, second, two]) == shared
    # A policy that is trained on answers of the base cannot share the engine that gave them.
    data = trains("data", base)
    learnt = asks("learnt", trains("train-3", data), adapter="/c")
    assert names([prompts, base, data, *learnt.inputs.values(), learnt]) == [
        ("prompts",), ("base",), ("data",), ("train-3",), ("learnt",),
    ]  # fmt: skip
    # Nor do adapters of another base, or in another place, share it.
    other = [asks("n", adapter="/a", model="n"), asks("p", adapter="/b", max_actors=2), asks("m", adapter="/c")]
    assert names(other) == [("n",), ("p",), ("m",)]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_stage_is_in_one_pool_that_comes_after_all_that_it_reads(data: st.DataObject) -> None:
    stages: list[Stage] = []
    for number in range(data.draw(st.integers(1, 9))):
        parents = data.draw(st.lists(st.sampled_from(stages), max_size=2)) if stages else []
        adapter = data.draw(st.sampled_from([None, "/a", "/b"]))
        made = (
            asks(str(number), *parents, adapter=adapter) if data.draw(st.booleans()) else trains(str(number), *parents)
        )
        stages.append(made)
    groups = share_pools(stages)
    assert sorted(stage.name for group in groups for stage in group) == [stage.name for stage in stages]
    before: set[str] = set()
    for group in groups:
        assert {parent for stage in group for parent in stage.inputs} <= before
        before |= {stage.name for stage in group}


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
        ("judge-helpfulness", "judge-factuality", "judge-conciseness", "critic"),
        (
            "comparisons",
            "score-responses-helpfulness",
            "score-responses-factuality",
            "score-responses-conciseness",
        ),
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


async def who_answers(given: ShardInput) -> ShardOutput:
    assert given.engine is not None
    reply = await given.engine.bound("0" * 32, "r").chat(user("who?"), Sampling())
    assert reply.text == f"by {given.settings}" and given.engine.identity["adapter"] == given.settings
    return ShardOutput({"decisions": DECISIONS.empty_table()})


def fails(given: WholeInput) -> dict[str, Any]:
    raise StageStop("it does not converge")


@pytest.mark.parametrize(
    "executor",
    [InProcessExecutor(), pytest.param(RayExecutor(max_stages=1), marks=pytest.mark.e2e)],
    ids=["inprocess", "ray"],
)
def test_policies_on_one_engine_get_their_own_adapter_and_do_not_fail_together(
    tmp_path: Path, executor: Executor
) -> None:
    starts = tmp_path / "starts"
    trained = {n: Stage(f"train-{n}", WholeWork(fails if n == "b" else whole), {}) for n in "abc"}
    data = trains("data", trained["b"])

    def served(name: str, adapter: str | None, *parents: Stage) -> Stage:
        engine: Any = functools.partial(Adaptable, VllmSpec("m", adapter=adapter), starts=str(starts))
        return Stage(name, ShardWork(who_answers, ("decisions",), adapter, engine), {}, {p.name: p for p in parents})

    answers = [served("base", None), *(served(n, f"/{n}", trained[n]) for n in "ab"), served("c", "/c", trained["c"])]
    dag = Dag("policies", [*answers, served("after-b", "/d", data)])
    outcome = execute(dag, RunSettings(Session(str(tmp_path / "run"), str(tmp_path / "run/calls"), 2), {}), executor)
    assert set(outcome.results) == {"train-a", "train-c", "base", "a", "c"}
    assert {name: failure.reason for name, failure in outcome.failures.items()} == {"train-b": "it does not converge"}
    assert sorted(outcome.not_run) == ["after-b", "b", "data"]
    assert starts.read_text() == "x"
