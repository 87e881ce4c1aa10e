"""The shard functions of the LLM stages, with an engine that answers from a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings
from ray_pipeline.agents.templates import load_templates
from ray_pipeline.data import critic, judge_layout
from ray_pipeline.data import judging as judge
from ray_pipeline.data.candidates import DRAW, CandidateSettings
from ray_pipeline.data.critic import CRITIC, CriticSettings
from ray_pipeline.data.judging import JUDGES, JudgeSettings
from ray_pipeline.engines.base import EngineDead, EngineError, PromptTooLong, Sampling
from ray_pipeline.engines.logged import CallNotLogged, LoggedEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.stage import ShardInput, ShardOutput, Stage, StageStop, WholeInput, WholeWork
from ray_pipeline.policy import comparisons as compare
from ray_pipeline.policy.comparisons import COMPARE, RESPOND, EvaluateSettings, Mode
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id
from ray_pipeline.store.schemas import CANDIDATES, PROMPTS, RESPONSES, to_table
from tests.scripted import ScriptedEngine, echo, user

TEXTS = load_templates("default")
COLD = SamplingSettings(max_tokens=64)


def prompts(*texts: str, split: str = "val") -> pa.Table:
    rows = [
        {
            "prompt_id": prompt_id(user(text)),
            "messages": user(text),
            "source": "test",
            "task_type": "general",
            "split": split,
            "meta": "{}",
        }
        for text in texts
    ]
    return to_table(rows, PROMPTS)


class Shard:
    """One shard function under test: its input, and what it told the outside."""

    def __init__(self, tables: dict[str, pa.Table], settings: Any, **facts: Any) -> None:
        self.tables, self.settings, self.facts = tables, settings, facts
        self.watched: list[tuple[str, bool]] = []
        self.ticks = 0
        self.stop_after: int | None = None

    def watch(self, name: str, read: bool) -> None:
        self.watched.append((name, read))
        if self.stop_after is not None and len(self.watched) >= self.stop_after:
            raise StageStop("enough")

    def tick(self, rows: int) -> None:
        self.ticks += rows

    def run(
        self, function: Callable[[ShardInput], Any], engine: ScriptedEngine, root: Path, **options: Any
    ) -> ShardOutput:
        async def go() -> ShardOutput:
            async with LoggedEngine(engine, Folder(str(root)), 0, 1, **options) as log:
                return await function(
                    ShardInput(0, 1, self.tables, self.facts, log, self.settings, self.tick, self.watch)
                )

        return asyncio.run(asyncio.wait_for(go(), 60))


def column(output: ShardOutput, name: str) -> list[Any]:
    (table,) = output.tables.values()
    return table[name].to_pylist()


def asked(engine: ScriptedEngine) -> list[str]:
    return [messages[-1]["content"] for messages, _ in engine.asked]


# --- candidates -------------------------------------------------------------------------------------------------------


def draw_shard(*texts: str, **settings: Any) -> Shard:
    return Shard({"prompts": prompts(*texts)}, CandidateSettings(**settings))


def test_k_rows_a_prompt_with_k_seeds(tmp_path: Path) -> None:
    engine = ScriptedEngine(echo)
    shard = draw_shard("one", "two", k=5)
    found = shard.run(DRAW, engine, tmp_path)
    table = found.tables["candidates"]
    assert table.schema.equals(CANDIDATES) and table.num_rows == shard.ticks == engine.calls == 10
    assert column(found, "k") == [0, 1, 2, 3, 4] * 2
    assert len(set(column(found, "seed"))) == len(set(column(found, "candidate_id"))) == 10
    assert len(set(column(found, "response"))) == 10  # the script's reply depends on the seed
    assert {s.seed for _, s in engine.asked} == set(column(found, "seed"))
    assert all((s.temperature, s.top_p, s.max_tokens, s.grammar) == (0.8, 0.95, 512, None) for _, s in engine.asked)
    assert set(column(found, "generator")) == {"scripted"} and found.counts == {"stop": 10}


def test_rows_are_ordered_by_prompt_and_k_whatever_finishes_first(tmp_path: Path) -> None:
    class Racing(ScriptedEngine):
        async def chat(self, messages: Sequence[dict[str, str]], sampling: Sampling) -> Any:
            await asyncio.sleep((sampling.seed or 0) % 7 / 500)
            return await super().chat(messages, sampling)

    shard = draw_shard(*(f"p{n}" for n in range(6)), k=3)
    slow, fast = shard.run(DRAW, Racing(echo), tmp_path / "a"), shard.run(DRAW, ScriptedEngine(echo), tmp_path / "b")
    assert slow.tables["candidates"].equals(fast.tables["candidates"])
    assert column(slow, "prompt_id") == [
        p for p in prompts(*(f"p{n}" for n in range(6)))["prompt_id"].to_pylist() for _ in "abc"
    ]


def test_more_candidates_make_only_their_own_calls(tmp_path: Path) -> None:
    first = draw_shard("one", k=2).run(DRAW, ScriptedEngine(echo), tmp_path)
    engine = ScriptedEngine(echo)
    more = draw_shard("one", k=4).run(DRAW, engine, tmp_path)
    assert engine.calls == 2 and column(more, "candidate_id")[:2] == column(first, "candidate_id")
    engine = ScriptedEngine(echo)
    assert draw_shard("one", k=4, seed=1).run(DRAW, engine, tmp_path).tables["candidates"].num_rows == engine.calls == 4


def test_one_prompts_trouble_is_its_own_rows(tmp_path: Path) -> None:
    def script(messages: Any, sampling: Any) -> Any:
        text = messages[-1]["content"]
        if text == "long":
            return PromptTooLong(9000, 512, 4096)
        return EngineError("boom") if text == "bad" else f"re: {text}"

    shard = draw_shard("fine", "long", "bad", k=2)
    found = shard.run(DRAW, ScriptedEngine(script), tmp_path)
    assert column(found, "response") == ["re: fine", "re: fine", None, None, None, None]
    assert column(found, "finish_reason") == ["stop", "stop", "too_long", "too_long", "error", "error"]
    assert column(found, "prompt_tokens") == [11, 11, 9000, 9000, None, None]
    assert found.counts == {"stop": 2, "too_long": 2, "error": 2} and shard.ticks == 6
    # A prompt that is too long is no fault of the model; a failed call is.
    assert sorted(shard.watched) == [("the generator", False)] * 2 + [("the generator", True)] * 4


def test_thoughts_and_cut_prompts_are_in_columns(tmp_path: Path) -> None:
    """K4.2 and K4.3; the scripted replies have 11 prompt tokens."""

    def script(messages: Any, sampling: Any) -> Any:
        return "<think>hm" if messages[-1]["content"] == "two" else "<think>hm</think>\nyes"

    engine = ScriptedEngine(script, identity={"engine": "openai", "model": "endpoint:m@http://host/v1"})
    found = draw_shard("one", "two", "words " * 1000, k=1).run(DRAW, engine, tmp_path)
    rows = {
        (row["response"], row["finish_reason"], row["thoughts"], row["prompt_cut"])
        for row in found.tables["candidates"].to_pylist()
    }
    assert rows == {("yes", "stop", "hm", None), (None, "length", "hm", None), ("yes", "stop", "hm", True)}
    assert found.counts == {"stop": 2, "length": 1, "prompt_cut": 1}


def test_no_prompts_make_an_empty_table_of_the_full_schema(tmp_path: Path) -> None:
    found = Shard({"prompts": PROMPTS.empty_table()}, CandidateSettings()).run(DRAW, ScriptedEngine(echo), tmp_path)
    assert found.tables["candidates"].schema.equals(CANDIDATES) and found.tables["candidates"].num_rows == 0


def test_a_dead_engine_and_a_stop_end_the_shard(tmp_path: Path) -> None:
    with pytest.raises(EngineDead):
        draw_shard("one").run(DRAW, ScriptedEngine(EngineDead("gone")), tmp_path)
    shard = draw_shard(*(f"p{n}" for n in range(5)), k=4)
    shard.stop_after = 3
    engine = ScriptedEngine(echo)
    with pytest.raises(StageStop, match="enough"):
        shard.run(DRAW, engine, tmp_path)
    shard.stop_after = None
    again = ScriptedEngine(echo)
    shard.run(DRAW, again, tmp_path)
    assert engine.calls + again.calls >= 20 > again.calls  # what was answered before the stop is kept


def test_replaying_makes_the_same_table_and_no_call(tmp_path: Path) -> None:
    def script(messages: Any, sampling: Any) -> Any:
        return (
            PromptTooLong(9, sampling.max_tokens, 9) if messages[-1]["content"] == "long" else echo(messages, sampling)
        )

    shard = draw_shard("one", "long", "two")
    first = shard.run(DRAW, ScriptedEngine(script), tmp_path)
    never = ScriptedEngine("never")
    again = shard.run(DRAW, never, tmp_path, replay_only=True)
    assert never.calls == 0 and again.tables["candidates"].equals(first.tables["candidates"])
    with pytest.raises(CallNotLogged):
        draw_shard("new").run(DRAW, never, tmp_path, replay_only=True)


def test_a_sampling_block_that_sets_one_key_keeps_the_published_others() -> None:
    assert CandidateSettings(**{"sampling": {"max_tokens": 48}}).sampling == SamplingSettings(
        temperature=0.8, top_p=0.95, max_tokens=48
    )
    assert CandidateSettings(**{"sampling": {"temperature": 0.0}}).sampling.temperature == 0.0
    with pytest.raises(ValidationError, match=r"sampling\.temprature"):
        CandidateSettings(**{"sampling": {"temprature": 1}})


# --- judges -----------------------------------------------------------------------------------------------------------


def candidates(*answers: tuple[str, str | None, str]) -> pa.Table:
    """Rows of (prompt, response, finish_reason)."""
    rows = [
        {
            "candidate_id": f"c{n}",
            "prompt_id": prompt_id(user(prompt)),
            "k": n,
            "seed": n,
            "response": response,
            "finish_reason": reason,
            "generator": "g",
            "prompt_tokens": None,
            "completion_tokens": None,
        }
        for n, (prompt, response, reason) in enumerate(answers)
    ]
    return to_table(rows, CANDIDATES)


ANSWERS = candidates(
    ("one", "good answer", "stop"), ("one", None, "too_long"), ("two", None, "error"), ("two", "", "stop")
)


def judge_settings(*names: str, layout: Any = "shared_first", **asking: Any) -> Any:
    return judge._Judging(
        answers=("candidates",),
        rubrics=tuple(Rubric(name=n, text=f"about {n}") for n in names),
        template=TEXTS.judge,
        layout=layout,
        sampling=COLD,
        asking=JudgeAsking(**asking),
    )


def judge_input(*names: str, answers: pa.Table = ANSWERS, facts: Any = None, **settings: Any) -> Shard:
    tables = {"prompts": prompts("one", "two"), "candidates": answers}
    return Shard(tables, judge_settings(*names, **settings), **(facts or {}))


def by_rubric(messages: Any, sampling: Any) -> str:
    text = messages[-1]["content"]
    return json.dumps({"reason": "r", "score": 8 if "about helpfulness" in text else 3})


def test_every_judge_scores_every_answer_and_nothing_else(tmp_path: Path) -> None:
    engine = ScriptedEngine(by_rubric)
    shard = judge_input("helpfulness", "factuality")
    found = shard.run(JUDGES, engine, tmp_path)
    assert column(found, "candidate_id") == ["c0", "c0", "c1", "c1", "c2", "c2", "c3", "c3"]
    assert column(found, "judge") == ["helpfulness", "factuality"] * 4
    assert column(found, "score") == [8.0, 3.0, None, None, None, None, 8.0, 3.0]
    # What was never answered is not judged, and its verdict says why; an empty answer is an answer.
    assert column(found, "parse_status") == ["ok"] * 2 + ["too_long"] * 2 + ["error"] * 2 + ["ok"] * 2
    assert engine.calls == 4 and shard.ticks == 8
    assert sorted(shard.watched) == [("judge factuality", True)] * 2 + [("judge helpfulness", True)] * 2
    assert found.counts["helpfulness.ok"] == 2 and found.counts["factuality.too_long"] == 1


def test_one_judges_trouble_is_its_own_verdict(tmp_path: Path) -> None:
    def script(messages: Any, sampling: Any) -> Any:
        text = messages[-1]["content"]
        if "about error" in text:
            return EngineError("boom")
        if "about long" in text:
            return PromptTooLong(1, 1, 1)
        return "nonsense" if "about nonsense" in text else by_rubric(messages, sampling)

    shard = judge_input("error", "long", "nonsense", "fine", answers=ANSWERS.slice(0, 1))
    found = shard.run(JUDGES, ScriptedEngine(script), tmp_path)
    assert column(found, "parse_status") == ["error", "too_long", "unparsed", "ok"]
    assert column(found, "score") == [None, None, None, 3.0] and column(found, "raw")[2] == "nonsense"
    watched = [("judge error", False), ("judge fine", True), ("judge nonsense", False)]
    assert sorted(shard.watched) == watched  # a text that is too long is no fault of the judge


def test_an_added_judge_makes_only_its_own_calls(tmp_path: Path) -> None:
    judge_input("helpfulness").run(JUDGES, ScriptedEngine(by_rubric), tmp_path)
    engine = ScriptedEngine(by_rubric)
    judge_input("helpfulness", "clarity").run(JUDGES, engine, tmp_path)
    assert engine.calls == 2 and all("about clarity" in text for text in asked(engine))


def test_the_layout_comes_from_the_settings_or_from_its_stage(tmp_path: Path) -> None:
    def first_line(shard: Shard, root: str) -> str:
        engine = ScriptedEngine(by_rubric)
        shard.run(JUDGES, engine, tmp_path / root)
        return asked(engine)[0].lstrip().splitlines()[0]

    assert first_line(judge_input("a", layout="shared_first"), "1").startswith("<instruction ")
    assert first_line(judge_input("a", layout="rubric_first"), "2").startswith("Evaluate")
    facts = {"layout": {"layout": "rubric_first"}}
    assert first_line(judge_input("a", layout=None, facts=facts), "3").startswith("Evaluate")


def test_rubrics_are_joined_to_prompts_by_id(tmp_path: Path) -> None:
    engine = ScriptedEngine(by_rubric)
    shard = judge_input("a", answers=candidates(("two", "TWO", "stop"), ("one", "ONE", "stop")))
    shard.run(JUDGES, engine, tmp_path)
    for text in asked(engine):
        assert ("two" in text) == ("TWO" in text) and ("one" in text.split("<response ")[0]) == ("ONE" in text)


def rubrics(**block: Any) -> JudgeSettings:
    return JudgeSettings(**{"rubrics": [{"name": "a"}, {"name": "b"}], **block})


def test_a_rubrics_sampling_starts_from_the_stages() -> None:
    found = rubrics(
        sampling={"max_tokens": 64, "extra": {"top_k": 3}},
        rubrics=[{"name": "a", "sampling": {"temperature": 0.3}}, {"name": "b"}],
    )
    expected = SamplingSettings(temperature=0.3, max_tokens=64, extra={"top_k": 3})
    assert found.rubrics[0].sampling == expected and found.rubrics[1].sampling is None


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"rubrics": []}, "no judges: set judge.rubrics"),
        ({"rubrics": [{"name": "a"}, {"name": "a"}]}, "two judges have the same name: a"),
        ({"rubrics": "a"}, "rubrics"),
        (
            {"rubrics": [{"name": "a", "sampling": {"temprature": 1}}], "sampling": {"max_tokens": 5}},
            r"sampling\.temprature",
        ),
        ({"sampling": {"temprature": 1}}, r"sampling\.temprature"),
    ],
)
def test_judges_that_are_none(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rubrics(**block)


def nothing() -> Stage:
    return Stage("prompts", WholeWork(lambda _: {}), {})


@pytest.fixture
def model(tmp_path: Path) -> ModelSettings:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return ModelSettings(model=str(tmp_path / "model"))


def test_judges_on_two_models_are_two_stages(model: ModelSettings) -> None:
    settings = rubrics(rubrics=[{"name": "a"}, {"name": "b", "model": "other"}, {"name": "c"}], layout="auto")
    models, asked_ = {"judge": model, "other": model}, nothing()
    stages = judge.judges(settings, models, TEXTS, asked_, {"candidates": asked_})
    assert [s.name for s in stages] == ["judge-judge", "judge-other"] and {s.group_name for s in stages} == {"judge"}
    assert [[r.name for r in s.work.settings.rubrics] for s in stages] == [["a", "c"], ["b"]]
    assert [s.inputs["layout"].name for s in stages] == ["judge-judge-layout", "judge-other-layout"]


# --- the layout -------------------------------------------------------------------------------------------------------


class _Table:
    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def table(self) -> _Table:
        return self

    def read(self, shard: int) -> pa.Table:
        return self._table


def choose(root: Path, rubric: str, response: str = "a short answer", template: Any = TEXTS.judge) -> dict[str, Any]:
    settings = judge_layout._Layout(
        answers=("candidates",),
        rubrics=tuple(Rubric(name=n, text=rubric) for n in "abc"),
        template=template,
        weights={"model": "m"},
    )
    inputs: Any = {
        "prompts": _Table(prompts("one", "two")),
        "candidates": _Table(candidates(("one", response, "stop"), ("two", None, "error"))),
    }
    folder = Folder(str(root))
    return judge_layout.choose_layout(
        WholeInput(inputs, folder, folder, "f", 1, settings, lambda _: None, lambda *_: None)
    )


def test_the_layout_is_chosen_once_and_kept_beside_the_call_log(tmp_path: Path) -> None:
    assert choose(tmp_path / "short", "x", "long " * 500)["layout"] == "shared_first"
    first = choose(tmp_path / "long", "rubric " * 500)
    assert (first["layout"], first["chosen"]) == ("rubric_first", "now")
    # Calls were made under it: a shorter rubric, or more prompts, must still find them.
    again = choose(tmp_path / "long", "x", "long " * 500)
    assert (again["layout"], again["chosen"]) == ("rubric_first", "before")
    other = choose(tmp_path / "long", "x", "long " * 500, TEXTS.judge.model_copy(update={"system": "other"}))
    assert (other["layout"], other["chosen"]) == ("shared_first", "now")


# --- critic -----------------------------------------------------------------------------------------------------------


def test_critiques(tmp_path: Path) -> None:
    flawed = '{"reason": "so", "failure_type": "unsupported", "flawed": true}'
    engine = ScriptedEngine(lambda m, _: flawed if "good answer" in m[-1]["content"] else EngineError("boom"))
    settings = critic._Critic(template=TEXTS.critic, layout="rubric_first", sampling=COLD, asking=JudgeAsking())
    shard = Shard({"prompts": prompts("one", "two"), "candidates": ANSWERS}, settings)
    found = shard.run(CRITIC, engine, tmp_path)
    assert column(found, "candidate_id") == ["c0", "c1", "c2", "c3"]
    assert column(found, "parse_status") == ["ok", "too_long", "error", "error"]
    assert column(found, "flawed") == [True, None, None, None]
    assert column(found, "failure_type") == ["unsupported", None, None, None]
    assert column(found, "raw")[:3] == [flawed, None, None] and "boom" in column(found, "raw")[3]
    assert engine.calls == 2 and shard.ticks == 4
    assert sorted(shard.watched) == [("the critic", False), ("the critic", True)]
    assert found.counts == {"ok": 1, "too_long": 1, "error": 2}


@pytest.mark.parametrize("settings", [CriticSettings, EvaluateSettings])
def test_a_key_that_nothing_reads_is_refused(settings: Any) -> None:
    with pytest.raises(ValidationError, match="expected_score has no effect"):
        settings(asking=JudgeAsking(expected_score=True))


# --- responses and comparisons ----------------------------------------------------------------------------------------

MODES = (Mode(name="greedy", sampling=COLD), Mode(name="warm", sampling=SamplingSettings(temperature=0.8)))


def respond_as(label: Any, identity: str, root: Path, script: Any = echo) -> tuple[ShardOutput, ScriptedEngine, Shard]:
    table = pa.concat_tables([prompts("one", "two"), prompts("train only", split="train")])
    engine = ScriptedEngine(script, identity={"engine": "scripted", "model": identity})
    shard = Shard({"prompts": table}, compare._Respond(label=label, modes=MODES, seed=0))
    return shard.run(RESPOND, engine, root), engine, shard


def test_both_models_answer_the_held_out_prompts_with_the_same_seeds(tmp_path: Path) -> None:
    base, engine, _ = respond_as("base", "b", tmp_path)
    assert column(base, "mode") == ["greedy", "warm"] * 2 and set(column(base, "model")) == {"base"}
    assert set(column(base, "prompt_id")) == set(prompts("one", "two")["prompt_id"].to_pylist()) and engine.calls == 4
    policy, other, _ = respond_as("policy", "p", tmp_path)
    assert sorted(str(s.seed) for _, s in engine.asked) == sorted(str(s.seed) for _, s in other.asked)
    assert [s.seed is None for _, s in engine.asked] == [s.temperature == 0 for _, s in engine.asked]
    assert not set(column(base, "response_id")) & set(column(policy, "response_id"))


def test_one_responses_trouble_is_its_own_row(tmp_path: Path) -> None:
    def script(messages: Any, sampling: Any) -> Any:
        if messages[-1]["content"] == "one":
            return PromptTooLong(77, 1, 1)
        return EngineError("boom") if sampling.temperature else "fine"

    found, _, shard = respond_as("base", "b", tmp_path, script)
    assert column(found, "finish_reason") == ["too_long", "too_long", "stop", "error"]
    assert column(found, "response") == [None, None, "fine", None] and column(found, "prompt_tokens")[:2] == [77, 77]
    assert [read for _, read in shard.watched].count(False) == 1 and {n for n, _ in shard.watched} == {"the base model"}


def responses(label: str, *answers: tuple[str, str | None, str]) -> pa.Table:
    rows = [
        {
            "response_id": f"{label}-{text}-{mode}",
            "prompt_id": prompt_id(user(text)),
            "model": label,
            "mode": mode,
            "response": response if mode == "greedy" else "not to be compared",
            "finish_reason": reason,
            "prompt_tokens": None,
            "completion_tokens": None,
        }
        for text, response, reason in answers
        for mode in ("warm", "greedy")
    ]
    return to_table(rows, RESPONSES)


def compare_all(
    root: Path, script: Any, base: pa.Table, policy: pa.Table, texts: Sequence[str] = ("one", "two")
) -> tuple[ShardOutput, ScriptedEngine, Shard]:
    settings = compare._Compare(
        policies=("policy",),
        judge="judge",
        mode="greedy",
        template=TEXTS.pairwise,
        layout="shared_first",
        sampling=COLD,
        asking=JudgeAsking(),
    )
    shard = Shard({"prompts": prompts(*texts), "base": base, "policy": policy}, settings)
    engine = ScriptedEngine(script)
    return shard.run(COMPARE, engine, root), engine, shard


def prefers(word: str) -> Callable[..., str]:
    """A judge without position bias: the response that holds the word."""

    def script(messages: Any, sampling: Any) -> str:
        a, b = messages[-1]["content"].split("<response_b ")
        found = [x for x, text in (("A", a), ("B", b)) if word in text]
        return json.dumps({"reason": "r", "choice": found[0] if len(found) == 1 else "C"})

    return script


BASE = responses("base", ("two", "poor", "stop"), ("one", "excellent", "stop"))
POLICY = responses("policy", ("one", "poor", "stop"), ("two", "excellent", "stop"))


def test_both_orders_are_asked_and_votes_are_for_models(tmp_path: Path) -> None:
    found, engine, shard = compare_all(tmp_path, prefers("excellent"), BASE, POLICY)
    assert column(found, "order") == ["ab", "ba"] * 2 and engine.calls == shard.ticks == 4
    # Joined by prompt and mode, never by position: the base is better on "one", the policy on "two".
    assert column(found, "vote") == ["base", "base", "policy", "policy"]
    assert column(found, "choice") == ["B", "A", "A", "B"]
    assert column(found, "model_a") == ["policy", "base"] * 2 and column(found, "model_b") == ["base", "policy"] * 2
    ids = column(found, "pair_id")
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert not any("not to be compared" in text for text in asked(engine))


def test_several_policies_are_each_compared_with_the_base(tmp_path: Path) -> None:
    settings = compare._Compare(
        policies=("dpo-s0", "kto-s0"),
        judge="judge",
        mode="greedy",
        template=TEXTS.pairwise,
        layout="shared_first",
        sampling=COLD,
        asking=JudgeAsking(),
    )
    other = responses("kto-s0", ("one", "excellent", "stop"), ("two", "excellent", "stop"))
    tables = {"prompts": prompts("one", "two"), "base": BASE, "dpo-s0": POLICY, "kto-s0": other}
    found = Shard(tables, settings).run(COMPARE, ScriptedEngine(prefers("excellent")), tmp_path)
    named = list(zip(column(found, "model_a"), column(found, "model_b"), column(found, "vote"), strict=True))
    assert named[:4] == [
        ("policy", "base", "base"), ("base", "policy", "base"), ("kto-s0", "base", "tie"), ("base", "kto-s0", "tie"),
    ]  # fmt: skip
    assert [vote for _, _, vote in named[4:]] == ["policy"] * 4
    assert len(set(column(found, "pair_id"))) == 4


@pytest.mark.parametrize(
    ("choice", "votes"),
    [("A", ["policy", "base"]), ("B", ["base", "policy"]), ("C", ["tie", "tie"])],
)
def test_a_judge_with_position_bias_votes_for_both(tmp_path: Path, choice: str, votes: list[str]) -> None:
    found, _, _ = compare_all(tmp_path, json.dumps({"choice": choice}), BASE, POLICY, ["one"])
    assert column(found, "vote") == votes


@pytest.mark.parametrize(
    ("base", "policy", "status"),
    [
        ((None, "error"), ("x", "stop"), "error"),
        (("x", "stop"), (None, "too_long"), "too_long"),
        ((None, "too_long"), (None, "error"), "too_long"),
    ],
)
def test_what_was_never_answered_is_not_compared(tmp_path: Path, base: Any, policy: Any, status: str) -> None:
    found, engine, shard = compare_all(
        tmp_path, "never", responses("base", ("one", *base)), responses("policy", ("one", *policy)), ["one"]
    )
    assert column(found, "parse_status") == [status] * 2 and column(found, "vote") == [None, None]
    assert engine.calls == 0 and shard.watched == [] and shard.ticks == 2


def test_an_unread_comparison_is_no_vote(tmp_path: Path) -> None:
    found, _, shard = compare_all(tmp_path, "A and B are fine", BASE, POLICY, ["one"])
    assert column(found, "vote") == [None, None] and column(found, "parse_status") == ["unparsed"] * 2
    assert shard.watched == [("the comparing judge", False)] * 2


def test_modes_are_distinct() -> None:
    with pytest.raises(ValidationError, match="distinct names"):
        EvaluateSettings(modes=(MODES[0], MODES[0]))
    with pytest.raises(ValidationError, match="distinct names"):
        EvaluateSettings(modes=())
