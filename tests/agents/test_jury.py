"""Pooling rules by hand and by property, and all juries at once."""

from __future__ import annotations

import collections
import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.agents.jurors import JuryRule, jury_scores, pool_judgements
from ray_pipeline.agents.jury import (
    MISSING,
    VOTES,
    compare_scores,
    jury_names,
    pool_scores,
    pool_votes,
    pooled_vote,
    subsets,
    vote_codes,
)
from ray_pipeline.agents.strategies import Judgement, Look

BALLOT = st.sampled_from(["A", "B", "tie", None])


def mode_by_hand(votes: list[str | None], weights: list[float]) -> str | None:
    support: dict[str, float] = collections.defaultdict(float)
    for said, weight in zip(votes, weights, strict=True):
        if said is not None:
            support[said] += weight
    top = max(support.values(), default=0.0)
    if top == 0:
        return None
    leaders = [said for said, weight in support.items() if weight == top]
    return leaders[0] if len(leaders) == 1 else "tie"


@settings(deadline=None)
@given(st.lists(st.lists(BALLOT, min_size=4, max_size=4), min_size=1, max_size=8))
def test_all_juries_at_once_are_each_jury_by_hand(items: list[list[str | None]]) -> None:
    codes = np.stack([vote_codes(column) for column in zip(*items, strict=True)])
    members = subsets(4, [1, 2, 3, 4])
    weights = [1.0, 2.0, 1.0, 4.0]
    plain, weighted = pool_votes(codes, members), pool_votes(codes, members, weights)
    for row, jury in enumerate(members):
        chosen = np.flatnonzero(jury)
        for column, ballots in enumerate(items):
            own = [ballots[j] for j in chosen]
            for pooled, by_weight in ((plain, [1.0] * len(own)), (weighted, [weights[j] for j in chosen])):
                expected = mode_by_hand(own, by_weight)
                code = pooled[row, column]
                assert (None if code == MISSING else VOTES[code]) == expected


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["A", "A", "B"], "A"),
        (["A", "B"], "tie"),
        (["A", "tie"], "tie"),
        (["A", "A", "tie", "tie"], "tie"),
        (["B", None], "B"),
        ([None, None], None),
        (["A", "B", "tie"], "tie"),
    ],
)
def test_one_vote(votes: list[str | None], expected: str | None) -> None:
    assert pooled_vote(votes) == expected


def test_weights_decide() -> None:
    assert pooled_vote(["A", "A", "B"], [1, 1, 3]) == "B"
    assert pooled_vote(["A", "B"], [2, 2]) == "tie"
    assert pooled_vote(["A", "B"], [0.1 + 0.2, 0.3]) == "tie"  # equal but for rounding
    with pytest.raises(ValueError, match="unknown vote 'C'; use A, B or tie"):
        vote_codes(["C"])


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 10), st.integers(0, 10))), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_score_rules_are_what_they_say(items: list[list[tuple[int, int] | None]]) -> None:
    scores = np.array(
        [[[np.nan if s is None else s[side] for s in judge] for judge in zip(*items, strict=True)] for side in (0, 1)]
    )
    members = subsets(3, [1, 2, 3])
    weights = [1.0, 3.0, 2.0]
    found = {rule: pool_scores(scores, members, rule, weights) for rule in ("mean", "median", "weighted_mean")}  # type: ignore[arg-type]
    for (row, jury), (column, ballots) in itertools.product(enumerate(members), enumerate(items)):
        read = [(ballots[j], weights[j]) for j in np.flatnonzero(jury) if ballots[j] is not None]
        for side in (0, 1):
            values = [b[side] for b, _ in read if b is not None]
            if not values:
                assert all(np.isnan(pooled[side, row, column]) for pooled in found.values())
                continue
            shares = [w for _, w in read]
            assert found["mean"][side, row, column] == pytest.approx(statistics.mean(values))
            assert found["median"][side, row, column] == pytest.approx(statistics.median(values))
            assert found["weighted_mean"][side, row, column] == pytest.approx(
                sum(v * w for v, w in zip(values, shares, strict=True)) / sum(shares)
            )


def test_rules_that_do_not_fit_are_refused() -> None:
    scores, members = np.zeros((2, 2, 1)), subsets(2, [2])
    with pytest.raises(ValueError, match="pools votes"):
        pool_scores(scores, members, "mode")
    with pytest.raises(ValueError, match="needs a weight"):
        pool_scores(scores, members, "weighted_mean")


def test_scores_become_votes() -> None:
    assert compare_scores([8, 3, 5, np.nan], [3, 8, 5, 1]).tolist() == [0, 2, 1, MISSING]
    assert compare_scores([(7 + 8 + 8) / 3], [7 / 3 + 8 / 3 + 8 / 3]).tolist() == [1]  # thirds


def test_subsets_are_all_of_their_sizes() -> None:
    assert len(subsets(6, range(2, 7))) == 57
    assert list(jury_names(["x", "y", "z"], subsets(3, [2]))) == [("x", "y"), ("x", "z"), ("y", "z")]


# --- judgements of several answers ------------------------------------------------------------------------------------


def judgement(best: tuple[int, ...], scores: tuple[float, ...] | None = None) -> Judgement:
    status = "ok" if best else "unparsed"
    return Judgement(scores, best, status, (Look((0, 1), scores, best, "because", status, None),))


@settings(deadline=None)
@given(st.lists(st.sampled_from([(0,), (1,), (0, 1), ()]), min_size=1, max_size=7))
def test_a_sitting_jury_is_the_pooled_vote(best: list[tuple[int, ...]]) -> None:
    names = {(0,): "A", (1,): "B", (0, 1): "tie", (): None}
    found = pool_judgements({str(n): judgement(b) for n, b in enumerate(best)})
    assert names[found.best] == pooled_vote([names[b] for b in best])
    assert len(found.looks) == len(best)


def test_rules_of_a_sitting_jury() -> None:
    members = {"x": judgement((0,), (9, 1, 2)), "y": judgement((1,), (5, 6, 2)), "z": judgement((1,), (5, 6, 2))}
    assert pool_judgements(members).best == (1,)
    assert pool_judgements(members, "mean").best == (0,)
    assert pool_judgements(members, "mean").scores == pytest.approx((19 / 3, 13 / 3, 2))
    assert pool_judgements(members, "median").scores == (5, 6, 2)
    assert pool_judgements(members, "weighted", {"x": 3, "y": 1, "z": 1}).best == (0,)
    assert pool_judgements(members, "weighted_mean", {"x": 0, "y": 1, "z": 1}).best == (1,)
    assert pool_judgements({**members, "w": judgement(())}, "mean").scores == pytest.approx((19 / 3, 13 / 3, 2))
    assert pool_judgements({"w": judgement(())}).parse_status == "unparsed"
    with pytest.raises(ValueError, match="pool mean needs scores, but w has none"):
        pool_judgements({**members, "w": judgement((0,))}, "mean")
    with pytest.raises(ValueError, match="at least one"):
        pool_judgements({})


GIVEN = {"x": (9, 1, 2), "y": (5, 6, 2), "z": (4, 6, 6)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, (6, 13 / 3, 10 / 3)),
        ({"pool": "median"}, (5, 6, 2)),
        ({"pool": "weighted_mean", "weights": {"x": 1, "y": 1, "z": 2}}, (22 / 4, 19 / 4, 16 / 4)),
        ({"pool": "mode"}, (1, 1, 1)),  # the first, the second, and the second and third as equals: nothing leads
        ({"pool": "weighted", "weights": {"x": 1, "y": 3, "z": 1}}, (0, 1, 0)),
        ({"pool": "weighted", "weights": {"x": 1, "y": 1, "z": 3}}, (0, 1, 1)),
    ],
)
def test_a_jurys_scores_of_several_answers(rule: dict[str, object], expected: tuple[float, ...]) -> None:
    assert jury_scores(GIVEN, JuryRule.model_validate(rule)) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6))
def test_votes_on_two_answers_are_the_unique_mode_else_a_tie(scores: list[tuple[int, int]]) -> None:
    said = ["A" if a > b else "B" if b > a else "tie" for a, b in scores]
    found = jury_scores({f"j{n}": pair for n, pair in enumerate(scores)}, JuryRule(pool="mode"))
    assert {(1, 0): "A", (0, 1): "B", (1, 1): "tie"}[found] == pooled_vote(said)


def test_weights_are_of_the_judges() -> None:
    for wrong, words in (
        ({"pool": "weighted"}, "needs weights"),
        ({"weights": {"x": 1}}, "no effect with pool mean; remove it, or set pool to weighted or weighted_mean"),
        ({"pool": "weighted_mean", "weights": {"x": 0}}, "must be greater than 0"),
    ):
        with pytest.raises(ValueError, match=words):
            JuryRule.model_validate(wrong)
    rule = JuryRule(pool="weighted", weights={"x": 1, "y": 1})
    with pytest.raises(ValueError, match="weights has no entry for z"):
        jury_scores(GIVEN, rule)
    with pytest.raises(ValueError, match="weights: unknown judge y; choose from x"):
        rule.check(["x"])
