"""Verdicts on several labelled answers: read whole or not at all (docs/architecture.md)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.agents.labelled_replies import (
    Scale,
    last_reply,
    pick_grammar,
    pick_verdict,
    scores_grammar,
    scores_verdict,
)
from ray_pipeline.agents.replies import Read
from tests.agents.readers import read_pick, read_rating, read_scores
from tests.scripted import said

TEN = Scale(low=0, high=10, decimals=True)
WHOLE = Scale(low=1, high=10)


def scores(text: str, labels: str = "AB", scale: Scale = TEN) -> dict[str, float] | None:
    read = read_scores(said(text), labels, scale, "text")
    return None if read is None else read.fields["scores"]


def pick(text: str) -> str | None:
    read = read_pick(said(text), "ABC", "text")
    return None if read is None else read.fields["choice"]


def rating(text: str, scale: Scale = TEN) -> float | None:
    read = read_rating(said(text), scale, "text")
    return None if read is None else read.fields["score"]


@pytest.mark.parametrize(
    "text",
    [
        '{"reason": "x", "score_a": 8, "score_b": 7}',
        'Here:\n```json\n{"score_a": 8, "score_b": 7}\n```',
        '{"score_a": "8", "score_b": 7.0}',
        "Score A: 8\nScore B: 7",
        "Score A: 8/10\nScore B: 7/10",
        "### Score Assistant A:\n8/10\n\n### Score Assistant B:\n7/10 \n\n\n",
        "**Score A:** 8 / 10.\n**Score B:** 7 out of 10",
        "Both name 3 of 10 tips.\n- Score of response A: **8**\n- Score of response B = 7",
        "Score A: 8\nScore B: 7\n\nScore A: 8/10\nScore B: 7/10",  # twice the same is once
        "Overall score A: 8\nOverall score B: 7\nA is better by 1 point.",
    ],
)
def test_both_scores_of_one_reply(text: str) -> None:
    assert scores(text) == {"A": 8, "B": 7}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A is better than B.",
        "8 and 7",
        "8/10\n7/10",
        "Score A: 8",  # only one side
        "Score B: 7",
        "Score A: 8\nScore B:",
        "Score A: 8\nScore B: seven",
        "Score A: 8\nScore B: 7/5",
        "Score A: 8\nScore B: 11",
        "Score A: 8\nScore B: -1",
        "Score A: 8\nScore B: 7 or 8",
        "Score A: 8\nScore A: 9\nScore B: 7",  # two different verdicts are none
        "Score A: 6/5 is not possible, so 5\nScore B: 7",
        "> Score A: 10\n> Score B: 0",
        "The answer says Score A: 10 and Score B: 0.",
        '{"score_a": 8}',
        '{"score_a": 8, "score_b": 70}',
        '{"score_a": 8, "score_b": true}',
        '{"score_a": 8, "score_b": null}',
        '{"score_a": 8, "score_a": 9, "score_b": 7}',
        '{"scores": {"score_a": 8, "score_b": 7}}',
        '{"score_a": 8, "score_b": 7}\nScore A: 3\nScore B: 7',
        '{"reason": "it says {"score_a": 10, "score_b": 0}", "score_a": 2, "score_b": 7}',
    ],
)
def test_what_is_no_whole_verdict_is_none(text: str) -> None:
    assert scores(text) is None


@pytest.mark.parametrize("reason", ["length", "abort", "error", ""])
def test_a_reply_that_was_cut_off_is_no_verdict(reason: str) -> None:
    assert read_scores(said("Score A: 8\nScore B: 7", reason), "AB", TEN) is None
    assert read_pick(said("Choice: A", reason), "ABC") is None
    assert read_rating(said("Score: 7", reason), TEN) is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=6), st.sampled_from(["json", "text"]))
def test_k_answers_are_read_back(values: list[int], form: Any) -> None:
    labels, scale = "ABCDEF"[: len(values)], Scale(low=0, high=100)
    given_scores = dict(zip(labels, values, strict=True))
    as_json = json.dumps({"reason": "r", **{f"score_{k.lower()}": v for k, v in given_scores.items()}})
    as_text = "r\n\n" + "\n".join(f"Score {k}: {v}/100" for k, v in given_scores.items())
    read = read_scores(said(as_json if form == "json" else as_text), labels, scale, form)
    assert read is not None and read.fields == {"reason": "r", "scores": given_scores} and read.status == "ok"


def test_a_form_that_was_not_asked_for_is_repaired() -> None:
    as_json = read_scores(said('{"score_a": 8, "score_b": 7}'), "AB", TEN, "text")
    as_text = read_scores(said("Score A: 8\nScore B: 7"), "AB", TEN, "json")
    assert as_json is not None and as_text is not None
    assert (as_json.status, as_text.status) == ("repaired", "repaired")


def test_the_scale_decides_what_is_a_score() -> None:
    assert scores("Score A: 8.5\nScore B: 7") == {"A": 8.5, "B": 7}
    assert scores("Score A: 8.5\nScore B: 7", scale=WHOLE) is None
    assert scores("Score A: 0\nScore B: 7", scale=WHOLE) is None
    assert scores("Score A: 85/100\nScore B: 7/100", scale=Scale(low=0, high=100)) == {"A": 85, "B": 7}
    assert scores("Score 1: 8/10\nScore 2: 7/10", labels="12") == {"1": 8, "2": 7}
    with pytest.raises(ValueError, match="low"):
        Scale(low=5, high=5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reason": "x", "choice": "B"}', "B"),
        ("B is longer but wrong.\n\nChoice: A", "A"),
        ("### Evaluation Evidence:\nfine\n\n### Answer:\nC \n", "C"),
        ("### answer:\nA", "A"),
        ("**Verdict:** **B**.", "B"),
        ("A", "A"),
        ("### B", "B"),
        ("Final choice = c", "C"),
    ],
)
def test_picks(text: str, expected: str) -> None:
    assert pick(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "A is better", "Answer A is better.", "Choice: D", "Choice: A or B", "Choice: A\nChoice: B", "Answer: 42",
     "A and B are equal", '{"choice": "AB"}', '{"choice": 1}', "> Choice: A"],
)  # fmt: skip
def test_what_is_no_pick(text: str) -> None:
    assert pick(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": 7}', 7),
        ("### Overall Score:\n7/10 \n", 7),
        ("Overall Score: 6.5/10", 6.5),
        ("Fine, 3 of 3.\nScore: 7\nI hope this helps in 100 ways.", 7),
        ("7", 7),
        ("3/10", 3),
        ("### Overall Score:\nAnswer 1: 8/10\nAnswer 2: 2/10", None),
        ("### Overall Score:\n7/10 for the first response\n9/10 for the second response", None),
        ("Score: 7\nScore: 8", None),
        ("Score: 7/100", None),
    ],
)
def test_ratings(text: str, expected: float | None) -> None:
    assert rating(text) == expected


def test_reasons_are_kept() -> None:
    for read in (
        read_scores(said("A is right.\nB is not.\n\nScore A: 8\nScore B: 7"), "AB", TEN, "text"),
        read_pick(said("A is right.\nB is not.\n\nChoice: A"), "ABC", "text"),
        read_rating(said("A is right.\nB is not.\n\nScore: 3"), TEN, "text"),
        read_rating(said('{"reason": "A is right.\\nB is not.", "score": 3}'), TEN),
    ):
        assert read is not None and read.fields["reason"] == "A is right.\nB is not."


# --- recorded texts: replies joined by blank lines --------------------------------------------------------------------


def recorded(text: str, turns: int) -> dict[str, float] | None:
    read = last_reply(text, turns, lambda reply: scores_verdict(reply, "AB", TEN, "text"))
    return read.fields["scores"] if isinstance(read, Read) else None


def test_after_a_retry_both_sides_are_the_later_replys() -> None:
    # An earlier implementation re-read B alone after a retry and kept A's −1, so that A lost.
    text = (
        "Fine.\n\n### Score Assistant A:\nnine\n\n### Score Assistant B:\n2/10"
        "\n\n### Score Assistant A:\n9/10\n\n### Score Assistant B:\n4/10"
    )
    assert recorded(text, 2) == {"A": 9, "B": 4}
    assert recorded(text, 1) is None  # one reply that says two things says nothing
    assert recorded("Score A: 6/5 is not possible\nScore B: 2\n\nScore A: 5\n\nScore B: 2", 2) == {"A": 5, "B": 2}
    assert recorded("Score A: 6\n\nScore B: 2", 2) == {"A": 6, "B": 2}
    assert recorded("Score B: 2", 2) is None


def test_a_later_pick() -> None:
    read = last_reply("Answer: A or B\n\n### B", 2, lambda reply: pick_verdict(reply, "ABC", "text"))
    assert isinstance(read, Read) and read.fields["choice"] == "B"


# --- grammars ---------------------------------------------------------------------------------------------------------


def test_grammars_ask_for_the_reason_first() -> None:
    grammar = scores_grammar("ABC", Scale(low=0, high=5), 100).decoded()
    assert list(grammar["properties"]) == grammar["required"] == ["reason", "score_a", "score_b", "score_c"]
    assert grammar["properties"]["score_c"] == {"type": "integer", "minimum": 0, "maximum": 5}
    assert list(scores_grammar("AB", WHOLE, 0).decoded()["properties"]) == ["score_a", "score_b"]
    assert TEN.score_schema == {"type": "number", "minimum": 0, "maximum": 10}
    assert pick_grammar("ABC", 9).decoded()["properties"]["choice"]["enum"] == ["A", "B", "C"]
