"""The format of recorded judgements: what it may hold, and errors that name file, line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.agreement.recorded import Recorded, read_recorded
from ray_pipeline.data.sources import InputError
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table

ITEM = {"item_id": "x/1", "question": "Q?", "response_a": "one", "response_b": "two", "human_label": "A"}
COMBINED = {"text": "Fine.\n\nScore A: 8/10\nScore B: 7/10", "stored_a": 8.0, "stored_b": 7.0, "turns": 1}
RETRIED = {
    "text": "Score A: ?\nScore B: 2/10\n\nScore A: 9/10\n\nScore B: 4/10",
    "stored_a": -1,
    "stored_b": 4.0,
    "turns": 2,
}


def written(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def read(folder: Path, replay: Any = "text", **recordings: Any) -> Recorded:
    found = read_recorded(written(folder, {**ITEM, **recordings}), replay)
    to_table(found.items, ITEMS), to_table(found.ballots, BALLOTS)  # every row fits its table
    return found


def brief(found: Recorded) -> list[tuple[Any, ...]]:
    keys = ("strategy", "judge", "voice", "order", "score_a", "score_b", "vote", "parse_status")
    return [tuple(b[k] for k in keys) for b in found.ballots]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_plain_and_packed_files(tmp_path: Path, name: str) -> None:
    rows = [ITEM, {**ITEM, "item_id": "x/2", "human_label": None, "question": None}, ""]
    found = read_recorded(written(tmp_path, *rows, name=name))
    assert [i["item_id"] for i in found.items] == ["x/1", "x/2"] and found.ballots == []
    assert found.items[0]["prompt_id"] != found.items[1]["prompt_id"]


def test_judges_and_strategies_are_discovered(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        direct={"m 1": {"text": "Because.\n\nAnswer: C", "stored_pick": "A", "turns": 1}},
        independent_10={"m": {"text_a": "Score: 7", "text_b": "Score: 6.5/10", "stored_a": 7, "stored_b": 6.5}},
        combined_5={"m": {**COMBINED, "text": "Score A: 3/5\nScore B: 3/5"}},
        combined_10={"m": COMBINED, "n": RETRIED},
        category="generic",
    )
    assert brief(found) == [
        ("direct", "m 1", "", "ab", None, None, "tie", "ok"),
        ("independent_10", "m", "", "ab", 7.0, 6.5, "A", "ok"),
        ("combined_5", "m", "", "ab", 3.0, 3.0, "tie", "ok"),
        ("combined_10", "m", "", "ab", 8.0, 7.0, "A", "ok"),
        ("combined_10", "n", "", "ab", 9.0, 4.0, "A", "repaired"),
    ]
    assert found.ballots[3]["reason"] == "Fine." and found.ballots[3]["raw"] == COMBINED["text"]


def test_stored_takes_what_the_original_made_of_it(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "stored",
        direct={"m": {"text": "Answer: C", "stored_pick": "A", "turns": 1}},
        combined_10={"n": RETRIED},
        versus={"x-vs-y": {"text": None, "winner": "gemma"}, "y-vs-x": {"text": None, "winner": "agent"}},
    )
    assert [(b[0], b[4], b[6]) for b in brief(found)] == [
        ("direct", None, "A"),
        ("combined_10", -1.0, "B"),  # the lost retry: −1 < 4
        ("versus", None, "B"),
        ("versus", None, "A"),
    ]


def test_what_cannot_be_read_is_missing_and_not_a_number(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        combined_10={
            "half": {"text": "Score A: 8", "turns": 1},
            "null": {"text": None},
            "high": {"text": "Score A: 12/10\nScore B: 7/10"},
        },
        independent_10={"m": {"text_a": "Score: 7", "text_b": "no"}},
        versus={"x-vs-y": {"text": None, "winner": "agent"}},
    )
    assert [(b[1], b[4], b[5], b[6], b[7]) for b in brief(found)] == [
        ("half", None, None, None, "unparsed"),
        ("null", None, None, None, "error"),
        ("high", None, None, None, "unparsed"),
        ("m", 7.0, None, None, "unparsed"),
        ("x-vs-y", None, None, None, "error"),
    ]


@pytest.mark.parametrize(
    ("replay", "recording", "message"),
    [
        ("text", {"combined_9-3": {"m": COMBINED}}, "combined_9-3 names a scale from 9 to 3"),
        ("stored", {"independent_5-5": {"m": COMBINED}}, "independent_5-5 names a scale from 5 to 5"),
        (
            "stored",
            {"combined_10": {"m": {**COMBINED, "stored_a": float("inf")}}},
            "stored_a must be a number, not inf",
        ),
        ("stored", {"combined_10": {"m": {**COMBINED, "stored_b": 10**400}}}, "stored_b must be a number, not inf"),
    ],
)
def test_scales_and_scores_that_are_none_are_refused(
    tmp_path: Path, replay: Any, recording: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, replay, **recording)


def test_debates(tmp_path: Path) -> None:
    by_letter = {"m": {"final": {"critic": "Score A: 2/10\nScore B: 1/10"}}}
    assert brief(read(tmp_path, debate=by_letter)) == [("debate", "m", "critic", "ab", 2.0, 1.0, "A", "ok")]
    final = {"critic": "Well.\n\nScore Assistant 1: 8/10\nScore Assistant 2: 9/10", "public": "no"}
    debate = {"m": {"final": final, "stored_mean_1": 4.0, "stored_mean_2": 4.5, "rounds": []}}
    assert brief(read(tmp_path, debate=debate)) == [
        ("debate", "m", "critic", "ab", 8.0, 9.0, "B", "ok"),
        ("debate", "m", "public", "ab", None, None, None, "unparsed"),
    ]
    assert brief(read(tmp_path, "stored", debate=debate)) == [("debate", "m", "", "ab", 4.0, 4.5, "B", "ok")]
    # Without the means the original's rule is applied to the texts: an unread agent counts (0, 0).
    texts = brief(read(tmp_path, "stored", debate={"m": {"final": final}}))
    assert texts[1] == ("debate", "m", "public", "ab", 0.0, 0.0, "tie", "ok")


def test_a_debater_that_was_asked_again_is_read_by_its_later_reply(tmp_path: Path) -> None:
    final = {"critic": RETRIED["text"], "public": COMBINED["text"]}
    for turns in ({"critic": 2}, 2):
        found = brief(read(tmp_path, debate={"m": {"final": final, "turns": turns}}))
        assert [(b[2], b[4:7]) for b in found] == [("critic", (9.0, 4.0, "A")), ("public", (8.0, 7.0, "A"))]
    (critic, _) = brief(read(tmp_path, debate={"m": {"final": final}}))
    assert critic[4:] == (None, None, None, "unparsed")  # one reply that says two things


def test_a_swapped_recording_is_brought_back_to_the_items_order(tmp_path: Path) -> None:
    swapped = {"text": "Score A: 2/10\nScore B: 9/10", "stored_a": 2, "stored_b": 9}
    for replay in ("text", "stored"):
        found = brief(read(tmp_path, replay, combined_10={"m": {**COMBINED, "swapped": swapped}}))
        assert [(b[3], b[4], b[5], b[6]) for b in found] == [("ab", 8.0, 7.0, "A"), ("ba", 9.0, 2.0, "A")]
    pick = {"text": "Choice: A", "swapped": {"text": "Choice: A"}}
    assert [b[6] for b in brief(read(tmp_path, direct={"m": pick}))] == ["A", "B"]


def test_other_fields_of_an_item_are_passed_over(tmp_path: Path) -> None:
    found = read(tmp_path, category="generic", meta={"source": {"page": 3}}, tags=["x"])
    assert found.ballots == []


def test_pairwise_verdicts_by_scores_or_by_choice(tmp_path: Path) -> None:
    runs = {
        "a-vs-b": {"text": "Score A: 3/10\nScore B: 8/10"},
        "b-vs-a": {"text": "Because.\n\nChoice: A"},
        "c": {"text": "?"},
    }
    found = brief(read(tmp_path, versus=runs))
    assert [(b[1], b[6], b[7]) for b in found] == [
        ("a-vs-b", "B", "ok"), ("b-vs-a", "A", "ok"), ("c", None, "unparsed"),
    ]  # fmt: skip


def test_replies_in_house_styles(tmp_path: Path) -> None:
    """One file may hold several: `auto` reads each, and a named format reads its own alone."""
    texts = {
        "mt_bench": "Fine.\n\n[[B]]",
        "arena_hard": "Fine.\n\n[[A>>B]]",
        "llmbar": "Output (a) is better.",
        "json": '{"winner": "Two"}',
        "ranks": '[{"model": "two", "rank": 1}, {"model": "one", "rank": 2}]',
        "planted": "Answer A ends with:\n[[A]]",
    }
    judges = {name: {"text": text, "swapped": {"text": text}} for name, text in texts.items()}
    path = written(tmp_path, {**ITEM, "model_a": "one", "model_b": "two", "direct": judges})
    found = {(b["judge"], b["order"]): b for b in read_recorded(path).ballots}
    assert {judge: found[judge, "ab"]["vote"] for judge in judges} == {
        "mt_bench": "B", "arena_hard": "A", "llmbar": "A", "json": "B", "ranks": "B", "planted": None,
    }  # fmt: skip
    # A model's name means the same answer in either order; a label means the answer in that place.
    assert [found[judge, "ba"]["vote"] for judge in ("mt_bench", "llmbar", "json", "ranks")] == ["A", "B", "B", "B"]
    assert found["planted", "ab"]["reason"] == "unread: quoted" and found["planted", "ab"]["parse_status"] == "unparsed"
    only = {b["judge"]: b["vote"] for b in read_recorded(path, format="arena_hard").ballots if b["order"] == "ab"}
    assert only == {**dict.fromkeys(judges), "arena_hard": "A"}


def test_a_scale_may_begin_above_zero(tmp_path: Path) -> None:
    texts = {"low": {"text": "Score A: 0\nScore B: 3"}, "high": {"text": "Score A: 1/5\nScore B: 5/5"}}
    assert [b[4:] for b in brief(read(tmp_path, **{"combined_1-5": texts}))] == [
        (None, None, None, "unparsed"),
        (1.0, 5.0, "B", "ok"),
    ]
    assert [b[0] for b in brief(read(tmp_path, **{"independent_1-5": {"m": {"text_a": "5", "text_b": "1"}}}))] == [
        "independent_1-5"
    ]


def test_labels_under_other_names(tmp_path: Path) -> None:
    labels = {"model_a": "A", "a": "A", 1: "A", 2.0: "B", "Response B": "B", "Tie (bothbad)": "tie", "draw": "tie"}
    for given, label in labels.items():
        found = read_recorded(written(tmp_path, {**ITEM, "human_label": given, "human_votes": {"x": given}}))
        assert found.items[0]["human_label"] == label == found.items[0]["human_votes"][0]["label"]
        stored = read(tmp_path, "stored", direct={"m": {"text": "?", "stored_pick": given}})
        assert stored.ballots[0]["vote"] == label


@pytest.mark.parametrize("label", ["C", "c", 0, 3, 1.5, True, "AB", "", ["A"]])
def test_labels_that_are_none_or_mean_two_things(tmp_path: Path, label: Any) -> None:
    with pytest.raises(InputError, match=r"line 1: human_label must be one of A, B, tie, or null, not"):
        read_recorded(written(tmp_path, {**ITEM, "human_label": label}))


def test_what_the_original_run_could_not_read_is_unread(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "stored",
        direct={"m": {"text": "?", "stored_pick": None}},
        combined_10={"m": {"text": "?", "stored_a": None, "stored_b": 3}},
        versus={"m": {"text": "?", "winner": None}},
        debate={"m": {"final": {"critic": "?"}, "stored_mean_1": None, "stored_mean_2": 4}},
    )
    assert [(b["vote"], b["parse_status"]) for b in found.ballots] == [(None, "unparsed")] * 4


def test_human_votes(tmp_path: Path) -> None:
    found = read(tmp_path, human_votes={"b": "tie", "a": "A", "c": None})
    assert found.items[0]["human_votes"] == [{"annotator": "a", "label": "A"}, {"annotator": "b", "label": "tie"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "row 1 is not a JSON object"),
        ({**ITEM, "item_id": ""}, "line 1: item_id must be text and not empty"),
        ({**ITEM, "question": 3}, "line 1: question must be text or null, not int"),
        ({**ITEM, "human_label": "C"}, "line 1: human_label must be one of A, B, tie, or null, not 'C'"),
        ({k: v for k, v in ITEM.items() if k != "human_label"}, "line 1: human_label is missing"),
        ({**ITEM, "human_votes": {"a": "B wins"}}, r"line 1: human_votes\.a must be one of"),
        ({**ITEM, "pairwise": {"m": {"text": "x"}}}, "line 1: unknown kind of recording pairwise; there are direct"),
        ({**ITEM, "combined": {}}, "line 1: unknown kind of recording combined; did you mean 'combined_"),
        ({**ITEM, "response_c": "three"}, "line 1: response_c: an item has two responses; for best of k, judge with"),
        ({**ITEM, "best_4": {"m": {"text": "D"}}}, "line 1: unknown kind of recording best_4; there are direct"),
        ({**ITEM, "combined_0": {}}, "unknown kind of recording combined_0"),
        ({**ITEM, "combined_10": {"m": "text"}}, r"line 1: combined_10\.m must be an object, not str"),
        ({**ITEM, "combined_10": {"m": {}}}, r"line 1: combined_10\.m\.text is missing"),
        ({**ITEM, "combined_10": {"m": {"text": 3}}}, r"combined_10\.m\.text must be text or null, not int"),
        (
            {**ITEM, "combined_10": {"m": {"text": "x", "turns": 0}}},
            r"m\.turns must be a whole number from 1 on, not 0",
        ),
        ({**ITEM, "combined_10": {"m": {"text": "x", "swapped": 1}}}, r"m\.swapped must be an object"),
        ({**ITEM, "independent_10": {"m": {"text_a": "7"}}}, r"independent_10\.m\.text_b is missing"),
        (
            {**ITEM, "debate": {"m": {"final": {"x": "y"}, "turns": {"x": 0}}}},
            r"turns must be a whole number from 1 on",
        ),
        ({**ITEM, "debate": {"m": {}}}, r"debate\.m\.final is missing"),
        ({**ITEM, "debate": {"m": {"final": {}}}}, r"debate\.m\.final is empty"),
    ],
)
def test_a_mistake_is_told_by_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    path = written(tmp_path, row)
    with pytest.raises(InputError, match=message) as caught:
        read_recorded(path)
    assert "data.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("recordings", "message"),
    [
        ({"combined_10": {"m": {"text": "x", "stored_a": 1}}}, r"m\.stored_b must be a number, not None"),
        ({"combined_10": {"m": {"stored_a": "1", "stored_b": 2}}}, r"m\.stored_a must be a number, not '1'"),
        ({"direct": {"m": {"text": "x"}}}, r"direct\.m\.stored_pick is missing; replay: stored needs it"),
        (
            {"direct": {"m": {"stored_pick": "C"}}},
            r"stored_pick must be one of A, B, tie, or null, not 'C'; a tie in some files",
        ),
        ({"versus": {"m": {"text": "x"}}}, r"versus\.m\.winner is missing"),
    ],
)
def test_stored_fields_that_are_not_there(tmp_path: Path, recordings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, "stored", **recordings)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_recorded(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(InputError, match="holds no item"):
        read_recorded(written(tmp_path, ""))
    with pytest.raises(InputError, match=r"line 3: item_id 'x/1' is on .*line 1 too"):
        read_recorded(written(tmp_path, ITEM, "", ITEM))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress((json.dumps(ITEM) + "\n").encode() * 3000)[:-30])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz"):
        read_recorded(str(cut))
