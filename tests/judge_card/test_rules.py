"""Each set's own rule on verdicts of every kind."""

from __future__ import annotations

import itertools

import pytest

from ray_pipeline.judge_card.rules import BEST_OF_MANY, BOTH_ORDERS, EACH_ORDER, HUMAN_LABEL, HUMAN_VOTES

VERDICTS = ("A", "B", "AB", None)


def published_judgebench(first: str | None, second: str | None, label: str) -> bool:
    """`compute_final_metrics` of JudgeBench, on verdicts by answer: the counter over both orders is positive."""
    counter = 0
    for decision in (first, second):
        if decision == label:
            counter += 1
        elif decision == {"A": "B", "B": "A"}[label]:
            counter -= 1
    return counter > 0


@pytest.mark.parametrize("label", ["A", "B"])
def test_judgebench_counts_as_its_authors_do(label: str) -> None:
    for verdicts in itertools.product(VERDICTS, repeat=2):
        assert BOTH_ORDERS.credit(verdicts, [label], 2) == published_judgebench(*verdicts, label), verdicts
    assert BOTH_ORDERS.credit(("A", "AB"), ["A"], 2) == 1.0  # one order names the winner, the other ties
    assert BOTH_ORDERS.credit(("A", "B"), ["A"], 2) == 0.0


def test_llmbar_is_the_mean_over_orders_without_ties() -> None:
    assert [EACH_ORDER.credit(v, ["B"], 2) for v in (("B", "B"), ("B", "A"), ("AB", "B"), (None, None))] == [
        1,
        0.5,
        0.5,
        0,
    ]


def test_rewardbench_shares_ties_and_takes_an_unread_reply_as_one() -> None:
    credits = [BEST_OF_MANY.credit([best], ["C"], 4) for best in ("C", "A", "BC", "ABCD", None)]
    assert credits == [1.0, 0.0, 0.5, 0.25, 0.25]


def test_orders_that_differ_are_a_tie_against_people() -> None:
    cases = {("A", "A"): "A", ("A", "B"): "tie", ("A", "AB"): "tie", ("AB", "AB"): "tie", ("A", None): None}
    for verdicts, settled in cases.items():
        for label in ("A", "B", "tie"):
            assert HUMAN_LABEL.credit(verdicts, [label], 2) == (settled == label)
    assert HUMAN_VOTES.credit(("A", "A"), ["A", "A", "tie", "B"], 2) == 0.5
    assert HUMAN_VOTES.credit(("A", "B"), ["A", "A", "tie", "B"], 2) == 0.25
    assert HUMAN_VOTES.credit((None, "B"), ["B"], 2) == 0.0
