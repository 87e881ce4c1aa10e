"""The user's own completions, in every layout and kind of file, as prompts and candidates of a run."""

from __future__ import annotations

import collections
import csv
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from ray_pipeline.data import spill
from ray_pipeline.data.candidate_sources import CandidatePrompts, CandidateSource, own_rows
from ray_pipeline.data.candidates import CandidateSettings
from ray_pipeline.data.own_candidates import own_candidates
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.prompts import prompts as prompts_stage
from ray_pipeline.data.sources import InputError
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import StageResult
from ray_pipeline.store.keys import prompt_id, shard_of
from ray_pipeline.store.schemas import cut_off
from tests.prompt_sets import load_prompts

SHARDS = 4


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def source(path: Path, **options: Any) -> Any:
    kind = path.suffix[1:] if path.suffix[1:] in ("parquet", "csv", "json") else "jsonl"
    return TypeAdapter(CandidateSource).validate_python({"type": kind, "path": str(path), **options})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def held(path: Path, **options: Any) -> dict[str, list[tuple[str, str | None, str | None]]]:
    """Text of the last turn of a prompt → text, model and label of its answers."""
    found: dict[str, list[Any]] = collections.defaultdict(list)
    for row in own_rows(source(path, **options)):
        assert row.fault is None
        found[row.messages[-1]["content"]] += [(a.text, a.model, a.label) for a in row.answers]
    return dict(found)


# --- layouts ----------------------------------------------------------------------------------------------------------

#: Shaped as openbmb/UltraFeedback, without its annotations.
ULTRAFEEDBACK = [
    {
        "source": "evol_instruct",
        "instruction": f"question {i}",
        "models": ["alpaca-7b", "gpt-4"],
        "completions": [
            {"annotations": {"helpfulness": {"Rating": "4"}}, "model": model, "response": f"{model} on {i}",
             "overall_score": 7.5}
            for model in ("alpaca-7b", "gpt-4")
        ],
    }
    for i in range(2)
]  # fmt: skip
#: Shaped as HuggingFaceH4/ultrafeedback_binarized: the prompt as text and inside both conversations.
BINARIZED = [
    {
        "prompt": "why?",
        "chosen": [user("why?"), assistant("because")],
        "rejected": [user("why?"), assistant("no idea")],
        "score_chosen": 8.0,
    }
]
PAIR = {"why?": [("because", None, "chosen"), ("no idea", None, "rejected")]}
TWO = {"why?": [("because", None, None), ("no idea", None, None)]}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ULTRAFEEDBACK, {f"question {i}": [(f"{m} on {i}", m, None) for m in ("alpaca-7b", "gpt-4")] for i in (0, 1)}),
        (BINARIZED, PAIR),
        ([{"prompt": "why?", "chosen": "because", "rejected": "no idea"}], PAIR),
        ([{"chosen": [user("why?"), assistant("because")], "rejected": [user("why?"), assistant("no idea")]}], PAIR),
        ([{"prompt": [user("why?")], "chosen": [assistant("because")], "rejected": [assistant("no idea")]}], PAIR),
        ([{"prompt": "why?", "responses": ["because", "no idea"]}], TWO),
        ([{"prompt": "why?", "responses": [[assistant("because")], [assistant("no idea")]]}], TWO),
        ([{"prompt": "why?", "responses": [assistant("because"), assistant("no idea")]}], TWO),
        (
            [{"prompt": "why?", "responses": ["because", "no idea"], "model": ["a", "b"]}],
            {"why?": [("because", "a", None), ("no idea", "b", None)]},
        ),
        ([{"prompt": "why?", "response": "because"}, {"prompt": "why?", "response": "no idea"}], TWO),
        (
            [{"instruction": "why?", "completion": f"{i}", "model": "m", "other": i} for i in range(3)],
            {"why?": [(f"{i}", "m", None) for i in range(3)]},
        ),
    ],
)
def test_every_layout_is_read(
    rows: list[dict[str, Any]], expected: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    assert held(write(tmp_path / f"a{suffix}", rows)) == expected


def test_csv_holds_lists_and_chats_as_json_text(tmp_path: Path) -> None:
    rows = [{"prompt": "why, oh\nwhy?", "responses": json.dumps(["because", "no, idea"])}]
    expected = {"why, oh\nwhy?": [("because", None, None), ("no, idea", None, None)]}
    assert held(write(tmp_path / "lists.csv", rows)) == expected
    pairs = [{"prompt": "why?", "chosen": "because", "rejected": "no idea"}]
    assert held(write(tmp_path / "pairs.csv", pairs)) == PAIR
    chats = [
        {name: json.dumps([user("why?"), assistant(t)]) for name, t in (("chosen", "because"), ("rejected", "no idea"))}
    ]
    assert held(write(tmp_path / "chats.csv", chats)) == PAIR
    one = [{"prompt": "why?", "response": "[1] is a footnote", "model": "m"}]
    assert held(write(tmp_path / "rows.csv", one)) == {"why?": [("[1] is a footnote", "m", None)]}


def test_columns_have_any_names(tmp_path: Path) -> None:
    rows = [{"q": "why?", "good": "because", "bad": "no idea", "by": "m", "than": "n"}]
    names = {"prompt": "q", "chosen": "good", "rejected": "bad", "chosen_model": "by", "rejected_model": "than"}
    expected = {"why?": [("because", "m", "chosen"), ("no idea", "n", "rejected")]}
    assert held(write(tmp_path / "a.jsonl", rows), **names) == expected
    several = [{"prompt": "why?", "response": "r", "responses": ["because", "no idea"]}]
    assert held(write(tmp_path / "b.jsonl", several)) == TWO
    assert held(write(tmp_path / "c.jsonl", several), response="response") == {"why?": [("r", None, None)]}


def test_a_local_data_set_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.parquet", ULTRAFEEDBACK)
    own = TypeAdapter(CandidateSource).validate_python({"type": "huggingface", "name": str(folder)})
    rows = list(own_rows(own, own.digests()))
    assert [[a.model for a in row.answers] for row in rows] == [["alpaca-7b", "gpt-4"]] * 2
    assert own.decisive() == {"type": "huggingface", "label": "set"}


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"prompt": "q", "answers": "a"},
            {},
            "no column of answers; it has prompt, answers. Set candidates.source.responses or chosen or rejected or",
        ),
        (
            {"prompt": "q", "answers": "a"},
            {"responses": "answrs"},
            "no column 'answrs'; it has prompt, answers. Set candidates.source.responses to the right one",
        ),
        (
            {"prompt": "q", "good": "a", "bad": "b"},
            {"chosen": "good"},
            "no column 'rejected'; it has .*source.rejected to",
        ),
        ({"question": "q", "response": "a"}, {}, "no column 'prompt'; it has .*Set candidates.source.prompt to"),
        ({"prompt": "q", "response": "a"}, {"model": "by"}, "no column 'by'; .*Correct or remove candidates.source.m"),
    ],
)
def test_a_missing_column_is_one_clear_error(
    row: dict[str, Any], options: dict[str, Any], message: str, suffix: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a{suffix}", [row, row])
    with pytest.raises(InputError, match=message) as refused:
        load_prompts(PromptsConfig.model_construct(**of_config(path, **options)))
    assert str(path) in str(refused.value)


def of_config(path: Path, **options: Any) -> dict[str, Any]:
    return {**PromptsConfig(sources=[{"type": "pocket", "count": 1}]).__dict__,
            "sources": [CandidatePrompts(source=source(path, **options))]}  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no rows; check that it was written"),
        (['{"prompt": "q", "responses": []}'], "none of 1 rows has a prompt and an answer. All are empty"),
        (
            ['{"prompt": "q", "responses": [7]}'] * 2,
            "none of 2 rows .*line 1: column 'responses': neither text nor a l",
        ),
    ],
)
def test_a_source_without_any_answer_is_an_error(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=f"candidates.source: {re.escape(str(path))}.*{message}"):
        load_prompts(PromptsConfig.model_construct(**of_config(path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "q"}', "line 2 has no column of answers; it has prompt"),
        ('{"prompt": 3, "responses": ["a"]}', "line 2: column 'prompt': neither text nor"),
        ('{"prompt": "q", "responses": "a"}', "line 2: column 'responses' must be a list, and its text is not JSON"),
        ('{"prompt": "q", "responses": {"a": 1}}', "line 2: column 'responses' must be a list of answers, not dict"),
        ('{"prompt": "q", "responses": [{"text_": "a"}]}', "line 2: column 'responses': an answer has no `response`"),
        ('{"prompt": "q", "responses": [[{"role": "user", "content": "x"}]]}', "line 2: .*must end with the answer"),
        ('{"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}], "rejected": '
         '[{"role": "user", "content": "y"}, {"role": "assistant", "content": "a"}]}', "line 2: .*different prompts"),
        ('{"chosen": "a", "rejected": "b"}', "line 2: column 'chosen': plain text without a prompt"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_dropped_and_named_by_its_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one", "responses": ["a", "b"]}\n' + line + '\n{"prompt": "two", "responses": ["c"]}\n')
    found = load_prompts(PromptsConfig.model_construct(**of_config(path)))
    assert (found.counts["read"], found.counts["kept"], found.counts["dropped"]["malformed"]) == (3, 2, 1)
    assert len(found.faults) == 1 and re.search(message, found.faults[0]) and str(path) in found.faults[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"source": {"type": "jsonl", "path": "a", "responses": "r", "chosen": "c"}},
            "responses and chosen name answers",
        ),
        ({"source": {"type": "jsonl", "path": "a"}, "k": 4}, "k has no effect on the completions of a source"),
        ({"source": {"type": "text", "path": "a"}}, "type"),
        ({"generators": []}, "generators is empty"),
        ({"generators": ["a", "a"]}, "two generators have the same name: a"),
        ({"generators": ["a"], "model": "b"}, "set model or generators, not both"),
        ({"generators": {"a": 1}, "k": 4}, "k has no effect where generators gives the number of each"),
        ({"generators": {"a": 0}}, "greater than or equal to 1"),
    ],
)
def test_settings_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CandidateSettings.model_validate(values)


# --- the stage --------------------------------------------------------------------------------------------------------


def imported(folder: Path, own: Any, **prompts: Any) -> dict[str, StageResult]:
    config = PromptsConfig(sources=[CandidatePrompts(source=own)], num_shards=SHARDS, val_fraction=0.5, **prompts)
    asked = prompts_stage(pickle.loads(pickle.dumps(config)))
    stages, results = [asked, own_candidates(own, asked)], dict[str, StageResult]()
    make_here(stages, Session(str(folder), str(folder / "calls"), SHARDS), results, print)
    return results


def test_candidates_are_those_of_the_source_in_the_shards_of_their_prompts(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"question {i}",
            "responses": [{"response": f"answer {i}.{j}", "model": f"m{j}"} for j in range(i % 5)],
        }
        for i in range(40)
    ]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": "question 1", "responses": ["late", "late", " ", None]}])
    results = imported(tmp_path / "run", source(path))
    prompts, table = results["prompts"], results["candidates"]
    assert prompts.facts["counts"]["dropped"] == {
        "malformed": 0, "empty": 8, "duplicate": 0, "over_limit": 0, "duplicate_across_sources": 0,
        "over_max_prompts": 0,
    }  # fmt: skip
    assert prompts.rows == {"prompts": 32} and table.rows == {"candidates": 82}
    assert table.facts["counts"] == {"unknown": 82} and table.facts["source"] == {
        "rows": 41, "malformed_rows": 0, "answers": 84, "kept": 82, "empty": 2, "of_no_prompt": 0,
    }  # fmt: skip
    found = []
    for shard in range(SHARDS):
        part = table.table().read(shard).to_pylist()
        assert {shard_of(row["prompt_id"], SHARDS) for row in part} <= {shard}
        assert [(row["prompt_id"], row["k"]) for row in part] == sorted((row["prompt_id"], row["k"]) for row in part)
        found += part
    assert len({row["candidate_id"] for row in found}) == 82
    assert {(row["seed"], row["finish_reason"], row["prompt_tokens"]) for row in found} == {(-1, "unknown", None)}
    own = [row for row in found if row["prompt_id"] == prompt_id([user("question 1")])]
    assert [(row["k"], row["response"], row["model"], row["generator"]) for row in own] == [
        (0, "answer 1.0", "m0", "m0"), (1, "late", None, "a.jsonl"), (2, "late", None, "a.jsonl"),
    ]  # fmt: skip


def test_a_candidate_keeps_its_id_wherever_it_stands(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 5}", "response": f"a{i % 7}", "model": "mn"[i % 2]} for i in range(40)]

    def ids(name: str, some: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
        table = imported(tmp_path / name, source(write(tmp_path / f"{name}.jsonl", some)))["candidates"].table()
        return {r["candidate_id"]: (r["prompt_id"], r["response"], r["model"]) for r in table.read_all().to_pylist()}

    whole = ids("whole", rows)
    assert len(whole) == 40 and ids("back", rows[::-1]) == whole
    assert set(ids("half", rows[:20])) < set(whole)


def test_columns_for_checkers_are_in_the_meta_of_the_prompts(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": "a", "tests": ["assert 1"], "level": 3},
        {"prompt": "p", "response": "b", "tests": ["assert 2"]},
        {"prompt": "q", "response": "c", "tests": None},
    ]
    own = source(write(tmp_path / "rows.jsonl", rows), meta_columns=["tests", "level"])
    made = imported(tmp_path, own)
    found = made["prompts"].table().read_all().to_pylist()
    metas = {row["messages"][0]["content"]: json.loads(row["meta"]) for row in found}
    kept = {name: {key: meta[key] for key in meta.keys() & {"tests", "level"}} for name, meta in metas.items()}
    assert kept == {"p": {"tests": ["assert 1"], "level": 3}, "q": {}}  # of the first row of a prompt
    assert made["candidates"].table().read_all().num_rows == 3
    table = write(tmp_path / "rows.parquet", rows)
    with pytest.raises(InputError, match=r"has no column 'test'; it has .*Correct candidates\.source\.meta_columns"):
        list(own_rows(source(table, meta_columns=["test"])))


def test_prompts_over_a_limit_take_their_candidates_with_them(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    own = source(write(tmp_path / "a.jsonl", rows), limit=8)
    results = imported(tmp_path / "run", own, max_prompts=6)
    assert results["prompts"].rows == {"prompts": 6} and results["candidates"].rows == {"candidates": 12}
    assert results["candidates"].facts["source"]["of_no_prompt"] == 28
    labels = results["candidates"].table().read_all()["source_label"].to_pylist()
    assert labels == ["chosen", "rejected"] * 6


def test_a_moved_file_keeps_its_fingerprint_and_a_changed_one_does_not(tmp_path: Path) -> None:
    def fingerprint(path: Path, **options: Any) -> str:
        own = source(path, **options)
        asked = prompts_stage(PromptsConfig(sources=[CandidatePrompts(source=own)]))
        return own_candidates(own, asked).fingerprint

    rows = [{"prompt": "q", "responses": ["a"], "response": "b"}]
    (tmp_path / "there").mkdir()
    here, there = (write(folder / "a.jsonl", rows) for folder in (tmp_path, tmp_path / "there"))
    assert fingerprint(here) == fingerprint(there) != fingerprint(here, response="response")
    write(there, rows * 2)
    assert fingerprint(here) != fingerprint(there)


def test_what_is_held_in_memory_does_not_change_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"q{i % 30}", "response": f"{i} " + "x" * (i % 50)} for i in range(300)]
    own = source(write(tmp_path / "a.jsonl", rows))
    whole = imported(tmp_path / "whole", own)["candidates"].table().read_all()
    monkeypatch.setattr(spill, "HELD", 300)
    monkeypatch.setattr(spill, "BATCH_ROWS", 7)
    assert imported(tmp_path / "parts", own)["candidates"].table().read_all().equals(whole)


def test_why_an_own_answer_ended_is_kept_where_its_row_says_it(tmp_path: Path) -> None:
    """K4.1"""
    rows = [
        {"prompt": "a", "responses": [{"response": "one", "finish_reason": "MAX_TOKENS"}, {"response": "two"}]},
        {"prompt": "b", "responses": ["three", "four"], "finish_reason": ["stop", "length"]},
        {"prompt": "c", "responses": ["five", "six"], "finish_reason": ["stop"]},
    ]
    expected = {
        "one": "length",
        "two": "unknown",
        "three": "stop",
        "four": "length",
        "five": "unknown",
        "six": "unknown",
    }
    results = imported(tmp_path / "lists", source(write(tmp_path / "a.jsonl", rows)))
    table = results["candidates"].table().read_all()
    assert dict(zip(table["response"].to_pylist(), table["finish_reason"].to_pylist(), strict=True)) == expected
    assert results["candidates"].facts["counts"] == {"length": 2, "unknown": 3, "stop": 1}
    assert cut_off(table["finish_reason"]).to_pylist().count(True) == 2
    path = write(
        tmp_path / "b.csv", [{"prompt": "a", "response": f"{i}", "end": end} for i, end in enumerate(("eos", ""))]
    )
    (table,) = [imported(tmp_path / "rows", source(path, finish_reason="end"))["candidates"].table().read_all()]
    assert table["finish_reason"].to_pylist() == ["stop", "unknown"]
    good, bad = ([{"role": "assistant", "content": text, "finish_reason": "MAX_TOKENS"}] for text in ("0", "1"))
    path = write(tmp_path / "c.csv", [{"prompt": "a", "chosen": json.dumps(good), "rejected": json.dumps(bad)}])
    (table,) = [imported(tmp_path / "text", source(path))["candidates"].table().read_all()]
    assert table["finish_reason"].to_pylist() == ["length", "length"]
    path = write(tmp_path / "d.csv", [{"prompt": "a", "response": json.dumps(good)}])  # a text that is wanted as such
    (table,) = [imported(tmp_path / "one", source(path))["candidates"].table().read_all()]
    assert table["finish_reason"].to_pylist() == ["unknown"]


def test_thoughts_are_split_off_own_answers_too(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "responses": ["<think>easy</think>one", "<think>no end", "two", "say <think>x</think>"]},
        {"prompt": "b", "responses": ["<think>only</think>", "plain"]},
    ]
    results = imported(tmp_path / "split", source(write(tmp_path / "a.jsonl", rows)))
    table = results["candidates"].table().read_all().to_pylist()
    assert sorted((row["response"], row["thoughts"]) for row in table) == sorted(
        [("one", "easy"), ("two", None), ("say <think>x</think>", None), ("plain", None)]
    )
    counts = results["candidates"].facts["source"]
    assert (counts["answers"], counts["kept"], counts["thoughts"]) == (6, 4, 1)
    assert (counts["empty"], counts["unfinished_thought"]) == (1, 1)
    kept = imported(tmp_path / "kept", source(tmp_path / "a.jsonl", thoughts="keep"))
    texts = [row["response"] for row in kept["candidates"].table().read_all().to_pylist()]
    assert sorted(texts) == sorted(text for row in rows for text in row["responses"])


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(TEXTS.filter(str.strip), st.lists(TEXTS.filter(str.strip), max_size=5)), min_size=1, max_size=8
    ).filter(lambda rows: any(answers for _, answers in rows)),
    layout=st.sampled_from(["responses", "response"]),
)
def test_no_answer_is_lost(rows: list[tuple[str, list[str]]], layout: str, tmp_path: Path) -> None:
    """Whatever the texts: each answer is one candidate, unchanged, of the prompt that it stood with."""
    path = tmp_path / "a.jsonl"
    if layout == "responses":
        write(path, [{"prompt": f"? {prompt}", "responses": answers} for prompt, answers in rows])
    else:
        write(path, [{"prompt": f"? {prompt}", "response": answer} for prompt, answers in rows for answer in answers])
    own = source(path)
    found = [(prompt_id(row.messages), answer.text) for row in own_rows(own) for answer in row.answers]
    assert found == [(prompt_id([user(f"? {prompt}")]), answer) for prompt, answers in rows for answer in answers]
