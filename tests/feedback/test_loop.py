"""The feedback loop as stages: the turns, what ends a loop, and that it is the loop of the coroutine."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from ray_pipeline.agents.feedback_loop import Loop, Reviewer, feedback_loop
from ray_pipeline.engines.logged import CallNotLogged
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.feedback.loop import (
    LoopSettings,
    ReviewerSettings,
    feedback_stages,
    join_shard,
    reviews_by_prompt,
    what_next,
)
from ray_pipeline.graph.stage import ShardInput, Stage, WholeWork
from ray_pipeline.store.keys import derived_seed, prompt_id
from ray_pipeline.store.schemas import CANDIDATES, REVIEWS
from tests.data.test_llm_stages import Shard, prompts
from tests.scripted import ScriptedEngine, echo, failing, user

TWO = LoopSettings(
    reviewers=(ReviewerSettings(name="facts", focus="facts"), ReviewerSettings(name="style", focus="style"))
)


def says(feedback: str) -> str:
    return json.dumps({"reason": "r", "feedback": feedback})


def worker(messages: Any, sampling: Any) -> Any:
    """Generator and reviewer of a small world: what a question says of itself happens to it."""
    text = messages[-1]["content"]
    if "You review one answer" not in text:  # the generator
        if len(messages) == 3 and "lost" in messages[0]["content"]:
            return failing()
        return f"{messages[0]['content']}/{len(messages)}/{echo(messages, sampling)}"
    who = "facts" if "facts" in text else "style"
    if "good at once" in text:
        return says("")
    if "good later" in text and "/3/" in text:
        return says("")
    if "stubborn" in text:
        return says(f"{who} again")
    if "mumbling" in text:
        return "hm"
    return says(f"{who} on {echo(messages, sampling)}")


class Run:
    """All stages of a loop on one shard, in the order of the DAG, as a run would feed them."""

    def __init__(self, settings: LoopSettings, *texts: str, root: Path, engine: Any = None, **options: Any) -> None:
        self.engine = engine or ScriptedEngine(worker)
        model = ModelSettings(engine="openai", model="m", endpoint={"base_url": "http://127.0.0.1:1/v1"})
        keys = {settings.generator, *settings.review_models}
        asked = prompts(*texts)
        joined, made, reviews = feedback_stages(settings, dict.fromkeys(keys, model), _prompts_stage())
        self.order = [*made, *reviews]
        done: dict[str, Any] = {"prompts": asked}
        self.outputs: dict[str, Any] = {}
        while len(self.outputs) < len(self.order):
            for step in self.order:
                if step.name in self.outputs or not all(s.name in done for s in step.inputs.values()):
                    continue
                tables = {role: done[s.name] for role, s in step.inputs.items()}
                shard = Shard(tables, step.work.settings)
                output = shard.run(step.work.function, self.engine, root, **options)
                (done[step.name],) = output.tables.values()
                self.outputs[step.name] = output
        self.joined = join_shard(_columnar({role: done[s.name] for role, s in joined.inputs.items()}))

    @property
    def candidates(self) -> list[dict[str, Any]]:
        return self.joined.tables["candidates"].to_pylist()

    @property
    def reviews(self) -> list[dict[str, Any]]:
        names = [name for name in self.outputs if name.startswith("review-")]
        return [row for name in names for row in self.outputs[name].tables["reviews"].to_pylist()]


def _columnar(tables: dict[str, pa.Table]) -> Any:
    return ShardInput(0, 1, tables, {}, None, None, lambda rows: None, lambda name, read: None)


def _prompts_stage() -> Any:
    return Stage(name="prompts", work=WholeWork(function=lambda given: {}, tables=("prompts",)), config=None)


QUESTIONS = ("plain", "good at once", "good later", "stubborn", "mumbling", "lost")


#: The two reviewers named above what they say, and no turn of the conversation dropped.
KEPT = TWO.model_copy(update={"attributed": True, "history": "all", "responses": 4})


@pytest.mark.parametrize("rules", [TWO, KEPT], ids=["last", "all"])
def test_the_stages_are_the_loop_of_the_coroutine(rules: LoopSettings, tmp_path: Path) -> None:
    run = Run(rules, *QUESTIONS, root=tmp_path)
    texts = rules.texts()
    for question in QUESTIONS:
        pid = prompt_id(user(question))
        engine = ScriptedEngine(worker)
        loop: Loop = asyncio.run(
            feedback_loop(
                engine,
                {r.name: Reviewer(engine, rules.reviewing, r.focus) for r in rules.reviewers},
                user(question),
                rules.responses,
                texts,
                lambda k, pid=pid: rules.sampling.sampling(seed=derived_seed("response", rules.seed, pid, k)),  # type: ignore[misc]
                rules.asking,
                rules.attributed,
                rules.history,
            )
        )
        rows = [row for row in run.candidates if row["prompt_id"] == pid]
        assert [row["response"] for row in rows if row["response"] is not None] == [r.text for r in loop.responses]
        assert [row["k"] for row in rows] == list(range(len(rows)))
        said = reviews_by_prompt(run.reviews, rules.names).get(pid, [])
        assert said == [list(by.values()) for by in loop.reviews]
        assert what_next(rows[-1], said)[1] == loop.stop


def test_earlier_turns_are_kept_and_each_feedback_has_its_reviewers_name(tmp_path: Path) -> None:
    run = Run(KEPT, "plain", root=tmp_path)
    asked = [m for m, _ in run.engine.asked if "You review one answer" not in m[-1]["content"]]
    assert [len(messages) for messages in asked] == [1, 3, 5, 7]
    last, responses = asked[-1], [row["response"] for row in run.candidates]
    assert [m["content"] for m in last[1::2]] == responses[:3]
    for k, shown in enumerate(last[2::2]):
        said = {r["reviewer"]: r["feedback"] for r in run.reviews if r["iteration"] == k}
        assert "\n\n".join(f"{name}:\n{said[name]}" for name in KEPT.names) in shown["content"]
    before = {stage.name: stage.fingerprint for stage in Run(TWO, "plain", root=tmp_path / "two").order}
    after = {stage.name: stage.fingerprint for stage in run.order}
    assert after["generate-1"] == before["generate-1"] and after["generate-2"] != before["generate-2"]


def test_each_loop_ends_where_it_should_and_the_counts_say_so(tmp_path: Path) -> None:
    run = Run(TWO, *QUESTIONS, root=tmp_path)
    number = {q: sum(row["prompt_id"] == prompt_id(user(q)) for row in run.candidates) for q in QUESTIONS}
    assert number == {"plain": 3, "good at once": 1, "good later": 2, "stubborn": 2, "mumbling": 1, "lost": 2}
    counts = {name: dict(output.counts) for name, output in run.outputs.items()}
    assert counts["generate-1"] == {"stop": 6}
    assert counts["generate-2"] == {"ended.empty": 1, "ended.unread": 1, "stop": 3, "error": 1}
    assert counts["generate-3"] == {"ended.empty": 1, "ended.repeated": 1, "ended.no_response": 1, "stop": 1}
    assert counts["review-1"]["facts.nothing_to_improve"] == 1 and counts["review-1"]["facts.unparsed"] == 1
    assert run.joined.counts == {"response_1": 6, "response_2": 4, "response_3": 1}
    assert run.joined.tables["candidates"].schema.equals(CANDIDATES)
    assert all(run.outputs[n].tables["reviews"].schema.equals(REVIEWS) for n in ("review-1", "review-2"))
    keys = [(row["prompt_id"], row["k"]) for row in run.candidates]
    assert keys == sorted(keys) and len({row["candidate_id"] for row in run.candidates}) == 11
    assert len({row["review_id"] for row in run.reviews}) == len(run.reviews)
    by_id = {row["candidate_id"]: row for row in run.candidates}
    assert all(by_id[row["candidate_id"]]["k"] == row["iteration"] for row in run.reviews)


def test_a_second_run_asks_nothing_and_a_cut_off_one_asks_only_the_rest(tmp_path: Path) -> None:
    first = Run(TWO, *QUESTIONS[:5], root=tmp_path)
    again = Run(TWO, *QUESTIONS[:5], root=tmp_path, engine=ScriptedEngine(failing("asked again")), replay_only=True)
    assert again.candidates == first.candidates and again.reviews == first.reviews
    with pytest.raises(CallNotLogged):
        Run(TWO, "another", root=tmp_path, replay_only=True)
    more = Run(TWO.model_copy(update={"responses": 4}), "plain", root=tmp_path)
    assert more.engine.calls == 3  # two reviews of the third response and a fourth response


def test_models_are_stages_of_their_own_and_their_reviews_are_joined_by_key(tmp_path: Path) -> None:
    settings = LoopSettings(
        reviewers=(
            ReviewerSettings(name="style", focus="style", model="b"),
            ReviewerSettings(name="facts", focus="facts", model="a"),
        ),
        responses=2,
    )
    run = Run(settings, "plain", root=tmp_path)
    assert [stage.name for stage in run.order] == ["generate-1", "generate-2", "review-1-b", "review-1-a"]
    asked = [m for m, _ in run.engine.asked if len(m) == 3]
    (revision,) = asked
    feedback = re.findall(r"(style|facts) on", revision[-1]["content"])
    assert feedback == ["style", "facts"]  # in the order of the configuration, not of the stages' names


def test_reviews_that_do_not_fit_together_are_refused() -> None:
    row = {"prompt_id": "p", "iteration": 0, "reviewer": "facts", "feedback": "x"}
    row |= dict.fromkeys(("score", "reason", "raw")) | {"parse_status": "ok"}
    with pytest.raises(ValueError, match="not reviewed by all"):
        reviews_by_prompt([row], ["facts", "style"])
    with pytest.raises(KeyError):
        reviews_by_prompt([row], ["style"])


def test_fingerprints_follow_from_what_a_stage_asks() -> None:
    model = ModelSettings(engine="openai", model="m", endpoint={"base_url": "http://127.0.0.1:1/v1"})

    def prints(**changes: Any) -> dict[str, str]:
        settings = LoopSettings(**changes)
        joined, made, reviews = feedback_stages(settings, {"generator": model, "reviewer": model}, _prompts_stage())
        return {s.name: s.fingerprint for s in (*made, *reviews, joined)}

    before = prints()
    assert list(before) == ["generate-1", "generate-2", "generate-3", "review-1", "review-2", "candidates"]
    more, other = prints(responses=4), prints(reviewers=[{"name": "reviewer", "focus": "facts"}])
    assert {n for n in before if more[n] == before[n]} == set(before) - {"candidates"}
    assert {n for n in before if other[n] == before[n]} == {"generate-1"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reviewers": []}, "at least 1 item"),
        ({"reviewers": [{"name": "a"}, {"name": "a", "focus": "x"}]}, "same name: a"),
        ({"reviewers": [{"name": "a"}, {"name": "b"}]}, "a and b are the same"),
        ({"reviewers": [{"name": "A b"}]}, "name"),
        ({"responses": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LoopSettings(**changes)
