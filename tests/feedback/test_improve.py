"""Preferences over revisions given the feedback, and over reviews: what is drawn, and what is chosen over what."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from ray_pipeline.agents.feedback_loop import ReviewAsking, load_feedback_templates, review_messages, revision_messages
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jurors import MEAN, JuryRule
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.feedback.improve import DRAW_REVIEWS, REVISE, ImproveSettings, _Draw, _Revise
from ray_pipeline.feedback.improvement_rows import Preferences, over_reviews, over_revisions, preference_rows
from ray_pipeline.feedback.loop import ReviewerSettings
from ray_pipeline.store.keys import candidate_id, prompt_id
from ray_pipeline.store.schemas import CANDIDATES, DPO, KTO, PROMPTS, REVIEWS, REVISIONS, VERDICTS, to_table
from tests.data.test_llm_stages import Shard
from tests.planted import count_words
from tests.scripted import ScriptedEngine, echo, failing, user

TEXTS = load_feedback_templates("default")
WARM = SamplingSettings(temperature=0.8, max_tokens=64)
LIMITS = DatasetsConfig(max_length=400, max_prompt_length=300, min_gap=0)


def answer(question: str, response: str | None, split: str = "train") -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt and its first response."""
    prompt = prompt_id(user(question))
    messages = {"prompt_id": prompt, "messages": user(question), "source": "s", "task_type": "t", "meta": "{}"}
    row = {"candidate_id": candidate_id(prompt, {}, {}, 0), "prompt_id": prompt, "k": 0, "seed": 0}
    return {**messages, "split": split}, {**row, "response": response, "finish_reason": "stop", "generator": "g"}


def world(*answers: tuple[dict[str, Any], dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    return to_table([p for p, _ in answers], PROMPTS), to_table([c for _, c in answers], CANDIDATES)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_every_review_is_drawn_several_times_and_revised_several_times(tmp_path: Path) -> None:
    prompts, responses = world(answer("q", "first"), answer("lost", None))

    def worker(messages: Any, sampling: Any) -> str:
        if len(messages) == 1:
            return json.dumps({"reason": "r", "feedback": "" if sampling.seed % 2 else echo(messages, sampling)})
        return echo(messages, sampling)

    engine = ScriptedEngine(worker)
    reviewers = (ReviewerSettings(name="facts", focus="facts"), ReviewerSettings(name="style"))
    draw = _Draw(reviewers=reviewers, sampling=WARM, template=TEXTS.review, asking=ReviewAsking(), number=8)
    found = Shard({"prompts": prompts, "responses": responses}, draw).run(DRAW_REVIEWS, engine, tmp_path)
    reviews = found.tables["reviews"]
    assert reviews.schema.equals(REVIEWS) and reviews.num_rows == 16 == engine.calls
    assert len({s.seed for _, s in engine.asked}) == 16 == len(set(reviews["review_id"].to_pylist()))
    empty = reviews["feedback"].to_pylist().count("")
    assert 0 < empty < 16
    assert sum(n for name, n in found.counts.items() if name.endswith("nothing_to_improve")) == empty

    revise = _Revise(revise=TEXTS.revise, sampling=WARM, seed=0, number=3)
    tables = {"prompts": prompts, "responses": responses, "reviews/a": reviews}
    made = Shard(tables, revise).run(REVISE, engine, tmp_path).tables["revisions"]
    assert made.schema.equals(REVISIONS) and made.num_rows == 3 * (16 - empty)
    assert len(set(made["candidate_id"].to_pylist())) == len(set(made["response"].to_pylist())) == made.num_rows
    assert sorted(made["k"].to_pylist()) == list(range(1, made.num_rows + 1))
    said = {row["review_id"]: row["feedback"] for row in reviews.to_pylist()}
    assert all(said[name] for name in made["review_id"].to_pylist())
    broken = Shard(tables, revise).run(REVISE, ScriptedEngine(failing()), tmp_path / "b").tables["revisions"]
    assert broken.num_rows == made.num_rows and set(broken["finish_reason"].to_pylist()) == {"error"}


@pytest.mark.parametrize("block", ["sampling", "reviewing"])
def test_a_cold_draw_of_several_is_refused(block: str) -> None:
    with pytest.raises(ValidationError, match=f"{block}.temperature is 0"):
        ImproveSettings(**{block: {"temperature": 0}})
    one = {"sampling": "revisions", "reviewing": "reviews"}[block]
    assert ImproveSettings(**{block: {"temperature": 0}, one: 1})
    assert ImproveSettings(sampling={"max_tokens": 5}).sampling.temperature == 0.8


# --- planted scores ---------------------------------------------------------------------------------------------------


class Planted:
    """One prompt, its response, reviews with their feedback, and revisions with their scores."""

    def __init__(self, reviews: dict[str, list[float | None]], first: float = 4, split: str = "train") -> None:
        prompt, response = answer("q", "first", split)
        self.prompt, self.response = prompt, response
        self.prompts, self.responses = world((prompt, response))
        ids = {"candidate_id": response["candidate_id"], "prompt_id": prompt["prompt_id"]}
        self.reviews: list[dict[str, Any]] = []
        revisions = []
        scores: dict[str, float | None] = {response["candidate_id"]: first}
        for place, (feedback, planted) in enumerate(reviews.items()):
            name = f"review-{place}"
            raw = json.dumps({"feedback": feedback.strip("!")})
            said = {"feedback": feedback.strip("!"), "parse_status": "ok", "raw": raw, "score": None, "reason": None}
            self.reviews.append({"review_id": name, **ids, "reviewer": "r", "iteration": 0, **said})
            for score in planted:
                k = len(revisions) + 1
                row = {**response, "candidate_id": f"revision-{k}", "k": k, "response": f"text of {k}"}
                revisions.append({**row, "review_id": name})
                scores[row["candidate_id"]] = score
        self.revisions = to_table(revisions, REVISIONS)
        made = [
            {"candidate_id": name, "prompt_id": prompt["prompt_id"], "judge": "j", "score": score}
            | {"parse_status": "unparsed" if score is None else "ok"}
            for name, score in scores.items()
        ]
        self.verdicts = to_table(made, VERDICTS)

    def over_revisions(self) -> Preferences:
        return over_revisions(self.prompts, self.responses, self.reviews, self.revisions, self.verdicts, TEXTS.revise)

    def over_reviews(self, jury: JuryRule = MEAN) -> Preferences:
        tables = (self.prompts, self.responses, self.reviews, self.revisions, self.verdicts)
        return over_reviews(*tables, ["j"], jury, question)


def question(messages: Any, response: str, reviewer: str) -> Any:
    return review_messages(messages, response, TEXTS.review, ReviewAsking(), reviewer)


def pairs(made: Preferences, judge: str, every: bool = True) -> list[dict[str, Any]]:
    tables, counts = preference_rows(made, [judge], MEAN, LIMITS, count_words, every)
    assert tables["kto"].schema.equals(KTO) and tables["dpo"].schema.equals(DPO)
    assert counts["dpo.kept"] == tables["dpo"].num_rows
    return tables["dpo"].to_pylist()


@pytest.mark.parametrize("scores", list(itertools.permutations([2, 5, 9])))
def test_the_best_revision_of_a_review_is_chosen_in_every_order(scores: tuple[float, ...]) -> None:
    planted = Planted({"shorter": list(scores), "longer": [7, 8, 6]}, split="val")
    found = pairs(planted.over_revisions(), "j")
    best = {f"text of {1 + scores.index(9)}", "text of 5"}
    assert {row["chosen"][0]["content"] for row in found} == best and len(found) == 4
    for row in found:
        feedback = "shorter" if row["chosen"][0]["content"] != "text of 5" else "longer"
        assert row["prompt"] == revision_messages(user("q"), "first", feedback, TEXTS.revise)
        assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
        assert row["prompt_id"] == planted.prompt["prompt_id"] and row["split"] == "val"
        assert row["score_chosen"] > row["score_rejected"]
    assert len(pairs(planted.over_revisions(), "j", every=False)) == 2


def test_equal_feedback_is_one_question() -> None:
    found = pairs(Planted({"shorter": [2], "shorter!": [9]}).over_revisions(), "j")
    assert [(r["chosen_id"], r["rejected_id"]) for r in found] == [("revision-2", "revision-1")]
    assert pairs(Planted({"shorter": [2], "longer": [9]}).over_revisions(), "j") == []  # different questions


@pytest.mark.parametrize("order", list(itertools.permutations([("bad", [2, 3]), ("best", [7, 9]), ("fair", [9, 1])])))
def test_a_review_is_better_when_its_revisions_score_higher(order: Any) -> None:
    planted = Planted(dict(order))
    found = pairs(planted.over_reviews(), "revisions")
    said = [(json.loads(r["chosen"][0]["content"])["feedback"], r["score_chosen"]) for r in found]
    assert said == [("best", 8.0)] * 2
    assert {json.loads(r["rejected"][0]["content"])["feedback"]: r["score_rejected"] for r in found} == {
        "bad": 2.5, "fair": 5.0,
    }  # fmt: skip
    assert all(r["prompt"] == question(user("q"), "first", "r") for r in found)
    assert all(r["prompt_id"] == planted.prompt["prompt_id"] for r in found)


def test_where_judges_vote_a_review_is_better_when_more_of_its_revisions_are_best() -> None:
    planted = Planted({"often": [9, 2], "never": [8, 8]})
    (pair,) = pairs(planted.over_reviews(JuryRule(pool="mode")), "revisions")
    assert json.loads(pair["chosen"][0]["content"])["feedback"] == "often" and pair["score_chosen"] == 0.5
    (pair,) = pairs(planted.over_reviews(JuryRule(pool="median")), "revisions")
    assert json.loads(pair["chosen"][0]["content"])["feedback"] == "never" and pair["score_chosen"] == 8


@pytest.mark.parametrize(("first", "chosen"), [(9, ""), (3, "shorter")])
def test_a_review_that_asks_for_nothing_has_the_responses_score(first: float, chosen: str) -> None:
    (pair,) = pairs(Planted({"": [], "shorter": [6, 6]}, first).over_reviews(), "revisions")
    assert json.loads(pair["chosen"][0]["content"])["feedback"] == chosen


def test_equal_reviews_are_one_and_unread_ones_none() -> None:
    made = Planted({"shorter": [2], "shorter!": [6], "longer": [3]}).over_reviews()
    (pair,) = pairs(made, "revisions")
    assert (pair["score_chosen"], pair["score_rejected"], pair["chosen_id"]) == (4.0, 3.0, "review-0")
    assert made.times == {"review-0": 2, "review-2": 1} and pair["copies"] == 1
    (pair,) = pairs(Planted({"shorter": [2], "shorter!": [2], "longer": [3]}).over_reviews(), "revisions")
    assert (pair["rejected_id"], pair["copies"]) == ("review-0", 2)
    assert pairs(Planted({"shorter": [9, None], "longer": [3]}).over_reviews(), "revisions") == []
    planted = Planted({"shorter": [9], "longer": [3]})
    planted.reviews[0] |= {"parse_status": "unparsed", "feedback": None}
    assert pairs(planted.over_reviews(), "revisions") == []
