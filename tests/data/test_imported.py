"""Datasets of others, in the forms in which the hub has them, as training rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from ray_pipeline.audit.imported import _in_order
from ray_pipeline.data import spill
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.imported import read_preferences, tables_of
from ray_pipeline.data.preference_sources import PreferenceSource, source_records
from ray_pipeline.data.prompts import split_of
from ray_pipeline.data.sources import InputError
from ray_pipeline.store.keys import prompt_id
from ray_pipeline.store.schemas import DPO, KTO, SFT
from tests.planted import count_words

CONFIG = DatasetsConfig(kinds=["kto", "dpo", "sft"], max_length=40, max_prompt_length=16)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def source(path: Path | str, **options: Any) -> Any:
    kind = "parquet" if str(path).endswith(".parquet") else "jsonl"
    return TypeAdapter(PreferenceSource).validate_python({"type": kind, "path": str(path), **options})


def read(path: Path, config: DatasetsConfig = CONFIG, **options: Any) -> tuple[dict, dict]:
    parts: list[dict] = []
    counts = read_preferences(source(path, **options), config, count_words, 3, 0.25, lambda _, part: parts.append(part))
    return parts[0], counts


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        open_ = gzip.open if path.suffix == ".gz" else open
        with open_(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def ultrafeedback(i: int, gap: float = 2.0, **changes: Any) -> dict[str, Any]:
    """A row as HuggingFaceH4/ultrafeedback_binarized has them: the prompt as text and inside both conversations."""
    question = f"question {i}"
    return {
        "prompt": question,
        "prompt_id": f"{i:064x}",
        "chosen": [user(question), assistant(f"good {i}")],
        "rejected": [user(question), assistant(f"bad {i}")],
        "messages": [user(question), assistant(f"good {i}")],
        "score_chosen": 5.0 + gap,
        "score_rejected": 5.0,
        **changes,
    }


SCORED = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}


def test_ultrafeedback_binarized_gives_all_three_kinds(tmp_path: Path) -> None:
    path = write(tmp_path / "train_prefs.parquet", [ultrafeedback(i) for i in range(40)])
    tables, counts = read(path, **SCORED)
    assert tables["dpo"].schema.equals(DPO) and tables["kto"].schema.equals(KTO)
    first = next(r for r in tables["dpo"].to_pylist() if r["prompt"][0]["content"] == "question 0")
    assert (first["chosen"], first["rejected"]) == ([assistant("good 0")], [assistant("bad 0")])
    assert first["prompt"] == [user("question 0")] and first["prompt_id"] == prompt_id([user("question 0")])
    assert (first["score_chosen"], first["score_rejected"], first["score_gap"]) == (7.0, 5.0, 2.0)
    assert {r["prompt_id"]: r["split"] for r in tables["dpo"].to_pylist()} == {
        p: split_of(p, 3, 0.25) for p in tables["dpo"]["prompt_id"].to_pylist()
    }
    assert 0 < tables["dpo"]["split"].to_pylist().count("val") < 25
    assert tables["kto"].num_rows == 80 and sum(tables["kto"]["label"].to_pylist()) == 40
    assert counts["source"] == {"read": 40, "kept": 40, "dropped": dict.fromkeys(counts["source"]["dropped"], 0)}
    assert tables_of("paired", CONFIG) == ("kto", "dpo")


def test_scores_of_parquet_may_be_decimals(tmp_path: Path) -> None:
    """As in `judge.source`; they are stored as numbers, and found again by the audit."""
    rows = [ultrafeedback(0), ultrafeedback(1, score_chosen=5.0), ultrafeedback(2)]
    decimal = pa.Table.from_pylist(rows)
    for name in SCORED.values():
        place = decimal.schema.get_field_index(name)
        decimal = decimal.set_column(place, name, decimal[name].cast(pa.decimal128(5, 2)))
    pq.write_table(decimal, tmp_path / "rows.parquet")
    tables, counts = read(tmp_path / "rows.parquet", **SCORED)
    assert [row["score_gap"] for row in tables["dpo"].to_pylist()] == [2.0, 2.0]
    assert (counts["source"]["dropped"]["gap_not_positive"], counts["source"]["dropped"]["malformed"]) == (1, 0)
    given = source(tmp_path / "rows.parquet", **SCORED)
    assert [_in_order(given, record.row) for record in source_records(given)] == [True, False, True]


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path: Path) -> None:
    long = "word " * 20
    rows = [
        ultrafeedback(0),
        ultrafeedback(0),
        ultrafeedback(1, gap=0.0),
        ultrafeedback(2, rejected=[user("question 2"), assistant(" good  2 ")]),
        ultrafeedback(3, chosen=[]),
        ultrafeedback(4, chosen=[user("question 4")]),
        ultrafeedback(5, rejected=[user("another"), assistant("bad")]),
        ultrafeedback(6, prompt=long, chosen=[user(long), assistant("a")], rejected=[user(long), assistant("b")]),
        ultrafeedback(
            7, chosen=[user("q"), assistant(long * 2 + "a")], rejected=[user("q"), assistant(long * 2 + "b")]
        ),
    ]
    _, counts = read(write(tmp_path / "rows.jsonl.gz", rows), **SCORED)
    assert counts["source"]["kept"] == 1 and counts["source"]["read"] == 9
    assert counts["source"]["dropped"] == {
        "empty": 1, "not_an_answer": 1, "prompts_differ": 1, "gap_not_positive": 1, "equal_text": 1,
        "prompt_too_long": 1, "equal_after_truncation": 1, "repeated": 1, "malformed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [user("q")], "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    (pair,) = read(write(tmp_path / "rows.jsonl", [row]))[0]["dpo"].to_pylist()
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([user("q")], [assistant("good")], [assistant("bad")])
    assert pair["score_chosen"] is None and pair["score_gap"] is None


def test_turns_before_the_last_are_the_prompt(tmp_path: Path) -> None:
    before = [{"role": "system", "content": "s"}, user("one"), assistant("two"), user("three")]
    row = {"chosen": [*before, assistant("good")], "rejected": [*before, assistant("bad")]}
    (pair,) = read(write(tmp_path / "rows.jsonl", [row]))[0]["dpo"].to_pylist()
    assert pair["prompt"] == before


def test_unpaired_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q1", "completion": "good", "label": True},
        {"prompt": "q1", "completion": "bad", "label": False},
        {"prompt": [user("q2")], "completion": [assistant("torn")], "label": True},
        {"prompt": "q2", "completion": "torn", "label": False},
        {"prompt": "q3", "completion": "x", "label": None},
    ]
    tables, counts = read(write(tmp_path / "rows.jsonl", rows), format="unpaired")
    assert [(r["prompt"], r["completion"], r["label"]) for r in tables["kto"].to_pylist()] == [
        ([user("q1")], [assistant("good")], True),
        ([user("q1")], [assistant("bad")], False),
    ]
    assert tables["sft"].schema.equals(SFT) and tables["sft"].num_rows == 1
    dropped = counts["source"]["dropped"]
    assert (dropped["no_label"], dropped["repeated"], dropped["contradictory"]) == (1, 0, 2)
    assert counts["source"]["kept"] + sum(dropped.values()) == counts["source"]["read"] == 5


def test_answers_that_differ_in_blanks_alone_are_one(tmp_path: Path) -> None:
    """K5.4"""
    labelled = [("a  b", True), ("a b\n", True), ("c", True), ("c ", False), ("'x  y'", True), ("'x y'", False)]
    rows = [{"prompt": "q", "completion": text, "label": label} for text, label in labelled]
    tables, counts = read(write(tmp_path / "rows.jsonl", rows), format="unpaired")
    found = [(r["completion"][0]["content"], r["label"], r["copies"]) for r in tables["kto"].to_pylist()]
    assert found == [("a  b", True, 2), ("'x  y'", True, 1), ("'x y'", False, 1)]
    assert (counts["source"]["dropped"]["repeated"], counts["source"]["dropped"]["contradictory"]) == (1, 2)
    pairs = [{"prompt": "q", "chosen": c, "rejected": r} for c, r in (("a", "b"), ("a ", "b"), ("b ", "a"))]
    tables, counts = read(write(tmp_path / "pairs.jsonl", pairs))
    assert (tables["dpo"].num_rows, tables["kto"].num_rows, counts["source"]["dropped"]["repeated"]) == (2, 0, 1)
    assert counts["kto"]["dropped"]["contradictory"] == 4


@pytest.mark.parametrize("held", [spill.HELD, 100])
def test_equal_rows_are_one_with_their_number(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K5.4, whatever the blanks, and whatever shard they are in."""
    monkeypatch.setattr(spill, "HELD", held)
    rows = [
        {"prompt": f"question {i}", "chosen": f"good  {i}" if again else f"good {i}", "rejected": worse}
        for again in range(3)
        for i in range(20)
        for worse in ("bad", *(["worse"] if i < 5 and not again else []))
    ]
    shards: list[dict] = []
    path = write(tmp_path / "rows.jsonl", rows)
    counts = read_preferences(source(path), CONFIG, count_words, 3, 0.25, lambda _, part: shards.append(part), 8)
    pairs, kto = ([row for part in shards for row in part[kind].to_pylist()] for kind in ("dpo", "kto"))
    assert len(shards) == 8 and len(pairs) == 25 == counts["source"]["kept"]
    assert {row["rejected"][0]["content"]: row["copies"] for row in pairs} == {"bad": 3, "worse": 1}
    assert all(not row["chosen"][0]["content"].startswith("good  ") for row in pairs)
    assert counts["source"]["dropped"]["repeated"] == 40 and counts["source"]["read"] == 65
    good = [row["copies"] for row in kto if row["label"]]
    assert sorted(good) == [3] * 15 + [4] * 5 and counts["kto"]["dropped"]["repeated"] == 5


@pytest.mark.parametrize("row", [{"prompt": "q", "completion": "a"}, {"messages": [user("q"), assistant("a")]}])
def test_demonstrations(tmp_path: Path, row: dict[str, Any]) -> None:
    tables, _ = read(write(tmp_path / "rows.parquet", [row]), format="demonstrations")
    assert list(tables) == ["sft"]
    assert [(r["prompt"], r["completion"]) for r in tables["sft"].to_pylist()] == [([user("q")], [assistant("a")])]


def test_what_a_format_cannot_give_is_said_at_once() -> None:
    with pytest.raises(InputError, match="unpaired rows cannot provide dpo data, which needs pairs"):
        tables_of("unpaired", CONFIG)
    assert tables_of("unpaired", DatasetsConfig(kinds=["kto", "sft"])) == ("kto", "sft")


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        (
            {"question": "q", "chosen": "a", "rejected": "b"},
            {},
            r"line 1: column 'chosen': plain text without a prompt",
        ),
        (
            {"prompt": "q", "good": "a", "bad": "b"},
            {},
            r"rows.jsonl has no column 'chosen', which paired rows need; it has",
        ),
        (
            {"prompt": "q", "chosen": 7, "rejected": "b"},
            {},
            r"line 1: column 'chosen': neither text nor a list of chat messages, but int",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "s": "high"},
            {"chosen_score": "s"},
            r"score must be a number",
        ),
        (
            {"prompt": "q", "completion": "a", "label": "yes"},
            {"format": "unpaired"},
            r"must be true or false, not 'yes'",
        ),
        (
            {"prompt": "q", "chosen": [{"from": "x"}], "rejected": [{"from": "x"}]},
            {},
            r"message 0 has no role and content",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=words) as error:
        read(path, **options)
    assert str(path) in str(error.value)


def test_files_have_digests_and_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [ultrafeedback(0)])
    before = source(path).digests()
    assert list(before) == ["rows.jsonl"]
    write(path, [ultrafeedback(1)])
    assert source(path).digests() != before
    with pytest.raises(InputError, match="does not exist"):
        source(tmp_path / "nothing.jsonl").digests()
    with pytest.raises(InputError, match="has no rows"):
        read(write(tmp_path / "empty.jsonl", []))


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [ultrafeedback(i) for i in range(10)])
    assert read(path, limit=4)[1]["source"]["read"] == 4


def test_a_bad_row_is_dropped_and_counted_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [ultrafeedback(i) for i in range(1000)])
    lines = path.read_text().splitlines()
    lines[100] = lines[100][:-1]
    lines[200] = json.dumps(ultrafeedback(200, chosen=[{"role": "user", "content": 7}]))
    lines[300] = json.dumps({"prompt": "q", "rejected": "b"})
    lines[400] = json.dumps(ultrafeedback(400, score_chosen="high"))
    lines[500] = json.dumps({k: v for k, v in ultrafeedback(500).items() if not k.startswith("score")})
    path.write_text("\n".join(lines))
    _, counts = read(path, **SCORED)
    found = counts["source"]
    assert (found["read"], found["kept"], found["dropped"]["malformed"]) == (1000, 996, 4)
    for fault, line in zip(found["faults"], (101, 201, 301, 401), strict=True):
        assert fault.startswith(f"{path}: line {line}")
    with pytest.raises(InputError, match=r"rows\.jsonl has no column 'score', which paired rows need"):
        read(path, chosen_score="score")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": [{"from": "gpt", "value": "good"}], "rejected": [{"from": "gpt", "value": "bad"}]},
        {"chosen": [{"input": "q", "output": "good"}], "rejected": [{"input": "q", "output": "bad"}]},
        {"chosen": json.dumps([user("q"), assistant("good")]), "rejected": json.dumps([user("q"), assistant("bad")])},
        {"chosen": "q<extra_id_1>Assistant\ngood", "rejected": "q<extra_id_1>Assistant\nbad"},
    ],
)
def test_pairs_in_the_forms_of_public_datasets(tmp_path: Path, row: dict[str, Any]) -> None:
    (pair,) = read(write(tmp_path / "rows.jsonl", [row]))[0]["dpo"].to_pylist()
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([user("q")], [assistant("good")], [assistant("bad")])


def test_an_answer_that_is_a_chat_as_json_stays_text(tmp_path: Path) -> None:
    text = json.dumps([user("q"), assistant("good")])
    (pair,) = read(write(tmp_path / "r.jsonl", [{"prompt": "p", "chosen": text, "rejected": "no"}]))[0][
        "dpo"
    ].to_pylist()
    assert pair["chosen"] == [assistant(text)]


def test_prompts_are_kept_as_they_stood(tmp_path: Path) -> None:
    one, other = ({"prompt": f"Is 'a{gap}b' one word?\n", "chosen": "good", "rejected": "bad"} for gap in (" ", "  "))
    pairs = read(write(tmp_path / "rows.jsonl", [one, other]))[0]["dpo"].to_pylist()
    assert sorted(pair["prompt"][0]["content"] for pair in pairs) == sorted([one["prompt"], other["prompt"]])
    assert len({pair["prompt_id"] for pair in pairs}) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_answers_that_were_cut_off_are_left_out_and_counted(suffix: str, tmp_path: Path) -> None:
    """K4.1: as `candidates.source` reads it, in a column or in the answer's message."""
    ends = ["stop", "MAX_TOKENS", "content_filter", "unknown", None, "end_turn"]
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": True, "end": end} for i, end in enumerate(ends)]
    path = write(tmp_path / f"rows.{suffix}", rows)
    tables, counts = read(path, format="unpaired", finish_reason="end")
    found = counts["source"]
    assert sorted(row["completion"][0]["content"] for row in tables["kto"].to_pylist()) == ["a0", "a3", "a4", "a5"]
    assert (found["dropped"]["cut_off"], found["read"]) == (2, found["kept"] + sum(found["dropped"].values()))
    assert "cut_off" not in read(path, format="unpaired")[1]["source"]["dropped"]
    with pytest.raises(InputError, match="has no column 'ends'"):
        read(path, format="unpaired", finish_reason="ends")
    usual = [{"messages": [user("q"), assistant("a")], "finish_reason": end} for end in ("length", "stop")]
    only = DatasetsConfig(kinds=["sft"], max_length=40, max_prompt_length=16)
    _, counts = read(write(tmp_path / f"usual.{suffix}", usual), only, format="demonstrations")
    assert (counts["source"]["kept"], counts["source"]["dropped"]["cut_off"]) == (1, 1)
    sides = [("stop", "stop"), ("stop", "length"), ("length", "stop"), (None, "stop")]
    pairs = [
        {
            "prompt": f"q{i}",
            "chosen": [{**assistant("good"), "finish_reason": good}],
            "rejected": [{**assistant("bad"), "finish_reason": bad}],
        }
        for i, (good, bad) in enumerate(sides)
    ]
    _, counts = read(write(tmp_path / f"pairs.{suffix}", pairs))
    assert (counts["source"]["kept"], counts["source"]["dropped"]["cut_off"]) == (2, 2)
    in_text = [{**pair, **{side: json.dumps(pair[side]) for side in ("chosen", "rejected")}} for pair in pairs]
    _, counts = read(write(tmp_path / f"text.{suffix}", in_text))
    assert (counts["source"]["kept"], counts["source"]["dropped"]["cut_off"]) == (2, 2)
    chats = [[user("q"), {**assistant("a"), "finish_reason": end}] for end in ("length", "stop")]
    chats_as_text = write(tmp_path / f"chats.{suffix}", [{"messages": json.dumps(chat)} for chat in chats])
    _, counts = read(chats_as_text, only, format="demonstrations")
    assert (counts["source"]["kept"], counts["source"]["dropped"]["cut_off"]) == (1, 1)
    with pytest.raises(ValueError, match="a paired row has two"):
        source(path, finish_reason="end")


def test_thoughts_are_split_off_imported_answers_and_counted(tmp_path: Path) -> None:
    thinking = "<think>hm</think>"
    pairs = [
        {"prompt": "a", "chosen": f"{thinking}good", "rejected": "bad"},
        {"prompt": "b", "chosen": "good", "rejected": "<think>never"},
        {"prompt": "c", "chosen": f"{thinking}same", "rejected": "same"},
    ]
    tables, counts = read(write(tmp_path / "p.jsonl", pairs))
    assert [row["chosen"][0]["content"] for row in tables["dpo"].to_pylist()] == ["good"]
    found = counts["source"]
    assert (found["thoughts"], found["dropped"]["unfinished_thought"], found["dropped"]["equal_text"]) == (1, 1, 1)
    assert found["read"] == found["kept"] + sum(found["dropped"].values())
    shown = [{"messages": [user("a"), assistant(f"{thinking}yes")]}, {"messages": [user("b"), assistant("<think>")]}]
    only = DatasetsConfig(kinds=["sft"], max_length=40, max_prompt_length=16)
    path = write(tmp_path / "s.jsonl", shown)
    tables, counts = read(path, only, format="demonstrations")
    assert [row["completion"][0]["content"] for row in tables["sft"].to_pylist()] == ["yes"]
    assert counts["source"]["dropped"]["unfinished_thought"] == counts["source"]["thoughts"] == 1
    tables, counts = read(path, only, format="demonstrations", thoughts="keep")
    assert [row["completion"][0]["content"] for row in tables["sft"].to_pylist()] == [f"{thinking}yes", "<think>"]
    assert "thoughts" not in counts["source"] and "unfinished_thought" not in counts["source"]["dropped"]
