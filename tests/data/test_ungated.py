"""Best and worst of k on planted scores, in every order."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.data import decisions as stage
from ray_pipeline.data.dataset_rows import DatasetsConfig, dpo_rows, kto_rows
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.ungated import best_and_worst
from ray_pipeline.graph.stage import ShardInput
from ray_pipeline.store.schemas import DECISIONS
from tests.planted import JUDGES, Planted, count_words, ended, make_world

ANY_GAP = DatasetsConfig(max_length=60, max_prompt_length=20, min_gap=0)


def labels(*scores: tuple[float | None, ...], judges: list[str] = JUDGES) -> list[str]:
    """Labels of candidates 0, 1, … of one prompt with these scores."""
    answers: list[Planted] = [(f"answer {i}", given, None) for i, given in enumerate(scores)]
    world = make_world({"question": answers})
    table = best_and_worst(world.candidates, world.verdicts, judges)
    assert table.schema.equals(DECISIONS)
    assert table["candidate_id"].to_pylist() == world.candidates["candidate_id"].to_pylist()
    return table["label"].to_pylist()


def test_best_and_worst_wherever_they_stand() -> None:
    for order in itertools.permutations([9, 6, 5, 2]):
        expected = {9: "desirable", 2: "undesirable"}
        assert labels(*((s, s, s) for s in order)) == [expected.get(s, "discard") for s in order]


def test_a_text_that_was_cut_off_is_never_the_best() -> None:
    """K4.1"""
    answers: list[Planted] = [(f"answer {s}", (s, s, s), None) for s in (9, 6, 5, 2)]
    world = ended(make_world({"question": answers}), "length", "stop", "stop", "content_filter")
    for cut, expected in {
        "exclude": ["incomplete", "desirable", "undesirable", "incomplete"],
        "undesirable": ["discard", "desirable", "discard", "undesirable"],
        "keep": ["desirable", "discard", "discard", "undesirable"],
    }.items():
        table = best_and_worst(world.candidates, world.verdicts, JUDGES, cut)
        assert table["label"].to_pylist() == expected
        assert (table["why"][0].as_py() == "cut off: length") == (cut == "exclude")
    all_cut = best_and_worst(ended(world, "length").candidates, world.verdicts, JUDGES, "undesirable")
    assert set(all_cut["label"].to_pylist()) == {"incomplete"}


def test_one_judge_ranks_alone() -> None:
    assert labels((9, 1, 1), (2, 8, 8), (3, 9, 9), judges=["helpfulness"]) == ["desirable", "undesirable", "discard"]


@given(st.lists(st.integers(1, 10), min_size=2, max_size=6), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_a_random_rejected_response_is_any_below_the_best(scores: list[int], prompt: int) -> None:
    world = make_world({f"question {prompt}": [(f"answer {i}", (s, s, s), None) for i, s in enumerate(scores)]})
    arguments = (world.candidates, world.verdicts, JUDGES)
    worst, drawn = (best_and_worst(*arguments, rejected=how).to_pylist() for how in ("worst", "random"))
    assert drawn == best_and_worst(*arguments, rejected="random").to_pylist()
    assert [r["label"] == "desirable" for r in drawn] == [r["label"] == "desirable" for r in worst]
    below = [r["mean_score"] for r in drawn if r["label"] == "undesirable"]
    assert len(below) == (len(set(scores)) > 1) and all(score < max(scores) for score in below)


def test_a_random_rejected_response_is_not_always_the_worst() -> None:
    scores = [9, 7, 5, 3]
    answers: list[Planted] = [(f"answer {s}", (s, s, s), None) for s in scores]
    world = make_world({f"question {i}": answers for i in range(200)})
    table = best_and_worst(world.candidates, world.verdicts, JUDGES, rejected="random")
    found = [row["mean_score"] for row in table.to_pylist() if row["label"] == "undesirable"]
    assert all(40 < found.count(score) < 95 for score in (7, 5, 3))


def test_a_gap_is_needed_and_unread_scores_are_no_scores() -> None:
    assert labels((5, 5, 5), (4, 5, 6)) == ["discard", "discard"]
    assert labels((9, None, 9), (5, 5, 5), (6, 6, 6)) == ["incomplete", "undesirable", "desirable"]
    assert labels((9, 9, 9)) == ["discard"]


def test_disagreement_and_flaws_cost_nothing() -> None:
    world = make_world({"q": [("a", (10, 10, 1), True), ("b", (6, 6, 6), False)]})
    first, second = best_and_worst(world.candidates, world.verdicts, JUDGES).to_pylist()
    assert (first["label"], first["penalty"], first["final_score"]) == ("desirable", 0.0, 7.0)
    assert second["label"] == "undesirable"


@given(st.lists(st.lists(st.integers(1, 10) | st.none(), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_one_pair_at_most_and_always_with_a_gap(scores: list[list[float | None]]) -> None:
    world = make_world({"q": [(f"answer {i}", s, None) for i, s in enumerate(scores)]})
    decisions = best_and_worst(world.candidates, world.verdicts, JUDGES)
    read = [sum(s) / 3 for s in scores if None not in s]  # type: ignore[arg-type]
    arguments = (world.prompts, world.candidates, world.verdicts, decisions, ANY_GAP, count_words)
    pairs, kto = dpo_rows(*arguments)[0].to_pylist(), kto_rows(*arguments)[0].to_pylist()
    assert len(pairs) == int(len(set(read)) > 1)
    assert len(kto) == 2 * len(pairs)
    for pair in pairs:
        assert (pair["score_chosen"], pair["score_rejected"]) == pytest.approx((max(read), min(read)))
        assert pair["score_gap"] > 0
        assert {row["candidate_id"]: row["label"] for row in kto} == {
            pair["chosen_id"]: True,
            pair["rejected_id"]: False,
        }


@pytest.mark.parametrize("gated", [True, False])
def test_only_the_first_k_count(gated: bool) -> None:
    world = make_world({"q": [("a", (8, 8, 8), False), ("b", (2, 2, 2), False), ("c", (10, 10, 10), False)]})
    given_ = ShardInput(
        shard=0,
        num_shards=1,
        tables={"candidates": world.candidates, "verdicts/judge": world.verdicts, "critiques": world.critiques},
        facts={},
        engine=None,
        settings=stage._GateGiven(gate=GateConfig() if gated else None, judges=tuple(JUDGES), first=2),
        tick=lambda rows: None,
        watch=lambda judge, read: None,
    )
    table: pa.Table = stage.decide_shard(given_).tables["decisions"]
    assert table["label"].to_pylist() == ["desirable", "undesirable"]
