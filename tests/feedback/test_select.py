"""Selection: the true best is accepted on planted scores in every order, whatever the strategy."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from ray_pipeline.agents.debate import DebateSettings, load_debate_templates
from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.agents.jurors import JuryRule
from ray_pipeline.agents.ranking import Ranking, rank, rank_by_debate
from ray_pipeline.agents.strategies import LABELS, Strategy, StrategyAsking, load_strategy_templates
from ray_pipeline.agreement.ask import LiveJudge
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.engines.base import PromptTooLong
from ray_pipeline.feedback.pick import accept_best
from ray_pipeline.feedback.select import RANK, SelectSettings, _judging, _Rank
from ray_pipeline.store.schemas import DECISIONS, VERDICTS
from tests.data.test_llm_stages import Shard
from tests.planted import World, count_words, make_world
from tests.scripted import ScriptedEngine, failing, user

TEXTS = load_strategy_templates("default")
ROLES = load_debate_templates("default")
COLD = SamplingSettings(max_tokens=64)
LIMITS = DatasetsConfig(max_length=60, max_prompt_length=20, min_gap=0)


def labels(*scores: float | None) -> list[str]:
    """What becomes of the responses of one prompt with these scores of one judge."""
    world = make_world({"q": [(f"answer {n}", [score], False) for n, score in enumerate(scores)]}, ["judge"])
    return accept_best(world.candidates, world.verdicts, ["judge"])["label"].to_pylist()


D, U, X, I = "desirable", "undesirable", "discard", "incomplete"  # noqa: E741


@pytest.mark.parametrize("scores", list(itertools.permutations([2, 5, 9])))
def test_best_of_three_is_the_best_in_every_order(scores: tuple[int, ...]) -> None:
    assert labels(*scores) == [D if score == 9 else U for score in scores]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((7, 7, 3), [D, X, U]),  # of equals the first; nobody called the other one worse
        ((3, 7, 7), [U, D, X]),
        ((7, 3, 7), [D, U, X]),
        ((3, 3, 7), [U, U, D]),
        ((5, 5, 5), [X, X, X]),
        ((5,), [X]),
        ((5, None), [X, I]),
        ((5, None, 6), [U, I, D]),
        ((None, None), [I, I]),
        ((0.1 + 0.2, 0.3), [D, U]),  # scores are compared as they are
    ],
)
def test_ties_and_unread_scores(scores: tuple[float | None, ...], expected: list[str]) -> None:
    assert labels(*scores) == expected


def test_the_mean_of_all_judges_decides_whatever_the_order_of_the_rows() -> None:
    answers = {
        "q": [("a", [9, 1], False), ("b", [6, 6], False), ("c", [2, 2], False)],
        "r": [("a", [1, 1], False), ("b", [1, 2], False)],
    }
    world = make_world(answers, ["x", "y"])
    found = accept_best(world.candidates, world.verdicts, ["x", "y"])
    assert found.schema.equals(DECISIONS)
    assert found["label"].to_pylist() == [U, D, U, U, D] and found["final_score"].to_pylist() == [5, 6, 2, 1, 1.5]
    assert "5 is below 6, the best of 3" in found["why"].to_pylist()
    by_id = dict(zip(found["candidate_id"].to_pylist(), found.to_pylist(), strict=True))
    for seed in range(5):
        mixed: World = world.shuffled(seed)
        again = accept_best(mixed.candidates, mixed.verdicts, ["x", "y"]).to_pylist()
        assert {row["candidate_id"]: row for row in again} == by_id
    only_x = accept_best(world.candidates, world.verdicts, ["x"])["label"].to_pylist()
    assert only_x == [D, U, U, X, X]
    with pytest.raises(ValueError, match="each named once"):
        accept_best(world.candidates, world.verdicts, ["x", "x"])


JURY = {"q": [("a", [9, 1, 1], False), ("b", [5, 6, 2], False), ("c", [4, 6, 6], False)]}


@pytest.mark.parametrize(
    ("rule", "expected", "final"),
    [
        ({"pool": "mean"}, [U, U, D], [11 / 3, 13 / 3, 16 / 3]),
        ({"pool": "median"}, [U, U, D], [1, 5, 6]),
        ({"pool": "weighted_mean", "weights": {"x": 8, "y": 1, "z": 1}}, [D, U, U], [7.4, 4.8, 4.4]),
        ({"pool": "mode"}, [X, X, X], [1, 1, 1]),
        ({"pool": "weighted", "weights": {"x": 3, "y": 1, "z": 1}}, [D, U, U], [1, 0, 0]),
        ({"pool": "weighted", "weights": {"x": 1, "y": 3, "z": 1}}, [U, D, X], [0, 1, 1]),
    ],
)
def test_the_rule_of_the_jury_decides(rule: dict[str, Any], expected: list[str], final: list[float]) -> None:
    world = make_world(JURY, ["x", "y", "z"])
    found = accept_best(world.candidates, world.verdicts, ["x", "y", "z"], JuryRule.model_validate(rule))
    assert found["label"].to_pylist() == expected and found["final_score"].to_pylist() == pytest.approx(final)
    # How the judges scored stays what it was.
    assert found["mean_score"].to_pylist() == pytest.approx([11 / 3, 13 / 3, 16 / 3])


def test_a_score_that_was_not_read_leaves_its_answer_out_of_the_vote() -> None:
    world = make_world({"q": [("a", [9, None], False), ("b", [5, 6], False), ("c", [4, 3], False)]}, ["x", "y"])
    found = accept_best(world.candidates, world.verdicts, ["x", "y"], JuryRule(pool="mode"))
    assert found["label"].to_pylist() == [I, D, U] and found["final_score"].to_pylist() == [None, 1, 0]


# --- training rows of a selection -------------------------------------------------------------------------------------


def rows(every: bool, min_gap: float = 0.0, **answers: list[Any]) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    world = make_world(answers, ["judge"])
    decisions = accept_best(world.candidates, world.verdicts, ["judge"])
    tables = (world.prompts, world.candidates, world.verdicts, decisions)
    config = LIMITS.model_copy(update={"min_gap": min_gap})
    pairs, counts = dpo_rows(*tables, config, count_words, every)
    return kto_rows(*tables, config, count_words)[0], pairs, counts


def test_one_accepted_and_all_others_rejected() -> None:
    planted = [("bad", [2], False), ("best", [9], False), ("fair", [6], False)]
    kto, pairs, counts = rows(True, q=planted, r=[("same", [4], False), ("as good", [4], False)])
    assert {(r["completion"][0]["content"], r["label"]) for r in kto.to_pylist()} == {
        ("best", True), ("bad", False), ("fair", False),
    }  # fmt: skip
    shown = [(r["chosen"][0]["content"], r["rejected"][0]["content"], r["score_gap"]) for r in pairs.to_pylist()]
    assert shown == [("best", "bad", 7.0), ("best", "fair", 3.0)]
    assert counts["kept"] == 2 and counts["dropped"]["no_desirable_or_undesirable"] == 1
    _, worst, _ = rows(False, q=planted)
    assert [r["rejected"][0]["content"] for r in worst.to_pylist()] == ["bad"]


def test_the_guards_of_pairs_hold_for_every_pair() -> None:
    planted = [("bad", [2], False), ("best", [9], False), ("good", [8], False), (" best ", [5], False)]
    _, pairs, counts = rows(True, 1.5, q=planted)
    assert [r["rejected"][0]["content"] for r in pairs.to_pylist()] == ["bad"]
    assert (counts["dropped"]["gap_too_small"], counts["dropped"]["equal_text"]) == (1, 1)


# --- strategies over several answers ----------------------------------------------------------------------------------


def reader(worth: dict[str, float], flaw: str = "") -> ScriptedEngine:
    """A judge who sees through everything: it scores the answers that stand between the tags by their worth."""

    def reply(messages: Any, _: Any) -> Any:
        text = messages[-1]["content"]
        if flaw and flaw in text:
            return "no idea"
        shown = re.findall(r"<answer(?:_([A-Z]))? \w+>\n(.*?)\n</answer", text, re.DOTALL)
        values = {label: worth[answer] for label, answer in shown}
        if "" in values:
            return json.dumps({"reason": "r", "score": values[""]})
        if '"choice"' in text:
            a, b = values["A"], values["B"]
            return json.dumps({"reason": "r", "choice": "A" if a > b else "B" if b > a else "C"})
        return json.dumps({"reason": "r", **{f"score_{label.lower()}": v for label, v in values.items()}})

    return ScriptedEngine(reply)


def ranked(engine: ScriptedEngine, answers: Sequence[str], kind: str, **more: Any) -> Ranking:
    asking = StrategyAsking(retries=0)
    strategy = Strategy(kind=kind, **more)
    return asyncio.run(rank(engine, user("q"), answers, strategy, TEXTS, COLD, asking))


@pytest.mark.parametrize("order", list(itertools.permutations(["bad", "fair", "best"])))
@pytest.mark.parametrize(
    ("kind", "more", "calls"),
    [
        ("direct", {}, 3),
        ("direct", {"orders": "both"}, 6),
        ("independent", {}, 3),
        ("combined", {}, 1),
        ("combined", {"orders": "both", "conflict": "mean"}, 2),
        ("combined", {"orders": "both", "high": 100}, 2),
    ],
)
def test_every_strategy_finds_the_best_in_every_order(
    order: tuple[str, ...], kind: str, more: dict[str, Any], calls: int
) -> None:
    engine = reader({"bad": 2, "fair": 5, "best": 9})
    found = ranked(engine, order, kind, **more)
    assert found.scores is not None and engine.calls == calls and found.parse_status == "ok"
    assert sorted(order, key=lambda a: found.scores[order.index(a)]) == ["bad", "fair", "best"]  # type: ignore[index]
    if kind == "direct":
        assert sorted(found.scores) == [0, 0.5, 1]


def test_a_tied_pair_is_half_a_win_each() -> None:
    assert ranked(reader({"a": 5, "b": 5, "c": 1}), ["a", "b", "c"], "direct").scores == (0.75, 0.75, 0)


def test_equal_texts_are_shown_once_and_share_a_score() -> None:
    engine = reader({"a": 3, "b": 7})
    assert ranked(engine, ["a", "b", " a "], "combined").scores == (3, 7, 3)
    assert engine.asked[0][0][-1]["content"].count("</answer_") == 2
    nobody = reader({})
    assert ranked(nobody, ["a", "a "], "combined") == Ranking(None, None, "skipped", None) and nobody.calls == 0
    assert ranked(nobody, ["a"], "direct").parse_status == "skipped"


def test_orders_that_differ_are_a_tie_where_the_rule_says_so() -> None:
    def first_wins(messages: Any, _: Any) -> str:
        shown = re.findall(r"<answer_([A-Z])", messages[-1]["content"])
        return json.dumps({f"score_{label.lower()}": 9 - 3 * n for n, label in enumerate(shown)})

    found = ranked(ScriptedEngine(first_wins), ["a", "b", "c"], "combined", orders="both")
    assert found.scores == (6, 6, 6)
    assert ranked(ScriptedEngine(first_wins), ["a", "b"], "combined", orders="given").scores == (9, 6)


def test_one_unread_reply_leaves_the_ranking_unread() -> None:
    engine = reader({"a": 1, "b": 2, "c": 3}, flaw="<answer_B")
    assert ranked(engine, ["a", "b", "c"], "direct") == Ranking(None, None, "unparsed", "no idea\n\n" * 2 + "no idea")
    assert ranked(ScriptedEngine(PromptTooLong(1, 1, 1)), ["a", "b"], "combined").parse_status == "too_long"
    assert ranked(ScriptedEngine(failing()), ["a", "b"], "combined").scores is None


def debated(engine: ScriptedEngine, answers: Sequence[str], **rules: Any) -> Ranking:
    settings = DebateSettings(**rules)
    return asyncio.run(rank_by_debate(engine, user("q"), answers, settings, ROLES, COLD, StrategyAsking(retries=0)))


@pytest.mark.parametrize("order", list(itertools.permutations(["bad", "fair", "best"])))
@pytest.mark.parametrize(
    ("rules", "calls"),
    [({"rounds": 1}, 6), ({"rounds": 0, "orders": "both"}, 6), ({"rounds": 1, "pool": "vote", "orders": "both"}, 12)],
)
def test_a_debate_finds_the_best_in_every_order(order: tuple[str, ...], rules: dict[str, Any], calls: int) -> None:
    engine = reader({"bad": 2, "fair": 5, "best": 9})
    found = debated(engine, order, **rules)
    assert found.scores is not None and engine.calls == calls and found.parse_status == "ok"
    best, lower = (found.scores[order.index(a)] for a in ("best", "fair"))
    assert (best, lower) == ((1, 0) if rules.get("pool") == "vote" else (9, 5))
    assert found.reason is not None and "critic: r" in found.reason


def test_the_voices_of_a_debate_vote_where_the_rules_say_so() -> None:
    worth = {"general_public": {"a": 9, "b": 1}, "psychologist": {"a": 5, "b": 6}, "critic": {"a": 5, "b": 6}}

    def says(messages: Any, _: Any) -> str:
        text = messages[-1]["content"]
        role = next(role.name for role in ROLES.roles if f"You are: {role.title}" in text)
        return json.dumps({"score_a": worth[role]["a"], "score_b": worth[role]["b"]})

    engine = ScriptedEngine(says)
    assert debated(engine, ["a", "b"], rounds=0).scores == pytest.approx((19 / 3, 13 / 3))
    assert debated(engine, ["a", "b", " b "], rounds=0, pool="vote").scores == (0, 1, 1)
    assert debated(engine, ["a", "a "], rounds=0).parse_status == "skipped"
    silent = ScriptedEngine("I cannot say")
    assert debated(silent, ["a", "b"], rounds=0, pool="vote") == Ranking(
        None, None, "unparsed", "\n\n".join(["I cannot say"] * 3)
    )


# --- the stage --------------------------------------------------------------------------------------------------------


def test_verdicts_are_by_candidate_and_by_judge(tmp_path: Path) -> None:
    world = make_world(
        {
            "q": [("bad", [0], None), ("best", [0], None), (None, [0], None)],
            "alone": [("best", [0], None)],
        },
        ["x"],
    )
    judges = (LiveJudge(name="one"), LiveJudge(name="two", rubric="brevity"))
    given = _Rank(
        answers=("candidates",),
        judges=judges,
        strategy=Strategy(kind="combined"),
        templates=TEXTS,
        layout="shared_first",
        sampling=COLD,
        asking=StrategyAsking(),
    )
    shard = Shard({"prompts": world.prompts, "candidates": world.candidates}, given)
    engine = reader({"bad": 2, "best": 9})
    found = shard.run(RANK, engine, tmp_path)
    table = found.tables["verdicts"]
    assert table.schema.equals(VERDICTS) and table.num_rows == 8 and engine.calls == 2
    names = {row["candidate_id"]: row["response"] for row in world.candidates.to_pylist()}
    scores = {(r["judge"], names[r["candidate_id"]], r["parse_status"]): r["score"] for r in table.to_pylist()}
    assert scores["one", "bad", "ok"] == scores["two", "bad", "ok"] == 2 and scores["one", None, "error"] is None
    assert scores["one", "best", "skipped"] is None  # the only response of its prompt
    assert {read for _, read in shard.watched} == {True} and len(shard.watched) == 2
    assert "brevity" in engine.asked[1][0][-1]["content"]
    decisions = accept_best(world.candidates, table, ["one", "two"])
    kept = {names[r["candidate_id"]]: r["label"] for r in decisions.to_pylist() if r["label"] in (D, U)}
    assert kept == {"best": D, "bad": U}


def test_a_debate_gives_verdicts_like_a_strategy(tmp_path: Path) -> None:
    world = make_world({"q": [("bad", [0], None), ("best", [0], None), ("fair", [0], None)]}, ["x"])
    settings = SelectSettings(debate={"rounds": 1}, judges=[{"name": "one"}], sampling={"max_tokens": 9})  # type: ignore[arg-type]
    given = _judging(settings, ("candidates",), settings.judges)
    shard = Shard({"prompts": world.prompts, "candidates": world.candidates}, given)
    engine = reader({"bad": 2, "best": 9, "fair": 5})
    table = shard.run(RANK, engine, tmp_path).tables["verdicts"]
    assert table.schema.equals(VERDICTS) and engine.calls == 6
    assert accept_best(world.candidates, table, ["one"])["label"].to_pylist() == [U, D, U]
    nobody = reader({})
    assert shard.run(RANK, nobody, tmp_path).tables["verdicts"].equals(table) and nobody.calls == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": {"kind": "combined"}}, "set strategy and judges together"),
        ({"judges": [{"name": "a"}]}, "set strategy and judges together"),
        ({"strategy": {"kind": "combined"}, "judges": [{"name": "a"}, {"name": "a"}]}, "same name: a"),
        ({"sampling": {"max_tokens": 5}}, "sampling has no effect without a strategy or a debate"),
        ({"debate": {}}, "or debate and judges"),
        ({"debate": {}, "strategy": {"kind": "direct"}, "judges": [{"name": "a"}]}, "keep one of them"),
        ({"debate": {}, "judges": [{"name": "a"}], "templates": "x"}, "templates has no effect without a strategy"),
        ({"debate": {}, "judges": [{"name": "a", "rubric": "x"}]}, "a judge in a debate has no rubric"),
        ({"debate_templates": "x"}, "debate_templates has no effect without a debate"),
        ({"jury": {"pool": "mode"}, "pairs": "best_worst"}, "but not the worst"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SelectSettings(**changes)


def test_there_are_labels_for_as_many_responses_as_a_loop_may_have() -> None:
    assert len(LABELS) == 26
