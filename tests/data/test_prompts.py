"""Prompts: normalising, deduplication, caps and splits that never reshuffle, shards."""

import collections
import itertools
import json
import unicodedata
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from ray_pipeline.data.prompts import PromptsConfig, make_prompts, read_prompts, source_digests
from ray_pipeline.data.sources import HuggingFaceSource, InputError, JsonlSource, ParquetSource, PocketSource, SourceRow
from ray_pipeline.data.spill import Spill
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id, shard_of, unit_hash
from ray_pipeline.store.schemas import PROMPTS
from tests.prompt_sets import load_prompts
from tests.published import DATA, needs

REAL_PROMPTS = DATA / "prompts" / "real_prompts.jsonl"


def write(path, prompts, **columns):
    rows = [{"prompt": p, **{k: v[i] for k, v in columns.items()}} for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlSource(path=str(path), column="prompt")


def texts(table: pa.Table) -> set[str]:
    return {messages[-1]["content"] for messages in table["messages"].to_pylist()}


def test_table_and_counts(tmp_path):
    source = write(tmp_path / "a.jsonl", ["one", " one\r\n", "", "  \n", "two  words", "two words", "three"])
    found = load_prompts(PromptsConfig(sources=[source], val_fraction=0.5))
    assert found.table.schema.equals(PROMPTS)
    ids = found.table["prompt_id"].to_pylist()
    assert ids == sorted(ids)
    assert ids == [prompt_id(m) for m in found.table["messages"].to_pylist()]
    assert texts(found.table) == {"one", "two  words", "three"}  # as the first of its spellings stood
    places = {r["messages"][0]["content"]: r["meta"] for r in found.table.to_pylist()}
    assert places["two  words"] == '{"file":"a.jsonl","row":5}'
    dropped = {
        "malformed": 0,
        "empty": 2,
        "duplicate": 2,
        "over_limit": 0,
        "duplicate_across_sources": 0,
        "over_max_prompts": 0,
    }
    val = found.table["split"].to_pylist().count("val")
    assert found.counts == {
        "read": 7, "dropped": dropped, "kept": 3, "train": 3 - val, "val": val,
        "sources": {"a.jsonl": {"read": 7, "dropped": dropped, "kept": 3}},
    }  # fmt: skip


AS_THEY_STOOD = [
    "Is 'a  b' the same as 'a b'?",
    "Is 'a b' the same as 'a b'?",
    "Bob\t\tRome",
    "Bob\tRome",
    "  led by blanks",
    "followed by blanks  \n",
    "two  spaces.  And two more",
    "one\r\ntwo",
    "a\n\n\n\nb",
    "Cafe\u0301",
    "```\nx = 1  \n\n\n\ny\n```\n",
    "zero\u200bwidth and no\u00a0break",
]


def test_texts_are_kept_as_they_stood(tmp_path):
    rows = [*AS_THEY_STOOD, *([{"role": "user", "content": text}] for text in ("in  a chat", "and\tthis"))]
    found = load_prompts(PromptsConfig(sources=[write(tmp_path / "a.jsonl", rows)]))
    assert texts(found.table) == {*AS_THEY_STOOD, "in  a chat", "and\tthis"}
    pq.write_table(pa.table({"prompt": AS_THEY_STOOD}), tmp_path / "a.parquet")
    found = load_prompts(PromptsConfig(sources=[ParquetSource(path=str(tmp_path / "a.parquet"), column="prompt")]))
    assert texts(found.table) == {*AS_THEY_STOOD}
    assert found.table["prompt_id"].to_pylist() == [prompt_id(m) for m in found.table["messages"].to_pylist()]


def test_what_no_table_can_hold_becomes_a_replacement_character(tmp_path):
    pq.write_table(pa.table({"prompt": ["a\0b"]}), tmp_path / "a.parquet")
    found = load_prompts(PromptsConfig(sources=[ParquetSource(path=str(tmp_path / "a.parquet"), column="prompt")]))
    (row,) = found.table.to_pylist()
    assert row["messages"] == [{"role": "user", "content": "a\ufffdb"}] and row["prompt_id"] == prompt_id(
        row["messages"]
    )


def test_the_first_source_wins(tmp_path):
    one = write(tmp_path / "one.jsonl", ["a", "b"])
    two = write(tmp_path / "two.jsonl", ["b ", "c", "b"])
    found = load_prompts(PromptsConfig(sources=[one, two]))
    counts = found.counts
    assert counts["sources"]["two.jsonl"]["dropped"]["duplicate_across_sources"] == 1
    assert counts["sources"]["two.jsonl"]["dropped"]["duplicate"] == 1
    sources = {r["messages"][0]["content"]: r["source"] for r in found.table.to_pylist()}
    assert sources == {"a": "one.jsonl", "b": "one.jsonl", "c": "two.jsonl"}
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())


def test_labels_task_types_and_system(tmp_path):
    source = write(tmp_path / "a.jsonl", ["a", "b"], kind=["sum", None], origin=["x", None])
    source = source.model_copy(
        update={"task_type_column": "kind", "source_column": "origin", "label": "mine", "system": "be  brief"}
    )
    rows = sorted(load_prompts(PromptsConfig(sources=[source])).table.to_pylist(), key=lambda r: r["meta"])
    assert [(r["task_type"], r["source"]) for r in rows] == [("sum", "x"), ("general", "mine")]
    assert rows[0]["messages"] == [{"role": "system", "content": "be  brief"}, {"role": "user", "content": "a"}]


def test_a_chat_keeps_its_own_system_message(tmp_path):
    answer = {"role": "assistant", "content": "a"}
    chat = [{"role": "System", "content": "own"}, {"role": "user", "content": "q"}, answer]
    blank = [{"role": "user", "content": " "}, answer]
    source = write(tmp_path / "a.jsonl", [chat, blank]).model_copy(update={"system": "other"})
    found = load_prompts(PromptsConfig(sources=[source]))
    assert found.table["messages"].to_pylist() == [
        [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    ]
    assert found.counts["dropped"]["empty"] == 1


# --- nothing reshuffles -----------------------------------------------------------------------------------------------


def test_more_prompts_never_reshuffle(tmp_path):
    """A cap keeps the smallest hashes: what was kept and is displaced goes, nothing else moves; splits stay."""
    few, many = [f"prompt {i}" for i in range(200)], [f"prompt {i}" for i in range(500)]
    config = PromptsConfig(sources=[write(tmp_path / "few.jsonl", few)], seed=5, max_prompts=80)
    small = load_prompts(config).table
    big = load_prompts(config.model_copy(update={"sources": [write(tmp_path / "many.jsonl", many)]})).table
    assert small.num_rows == big.num_rows == 80
    assert texts(big) & set(few) <= texts(small)
    smallest = sorted(many, key=lambda t: unit_hash(5, prompt_id([{"role": "user", "content": t}])))[:80]
    assert texts(big) == set(smallest)

    splits = dict(zip(small["prompt_id"].to_pylist(), small["split"].to_pylist(), strict=True))
    for name, split in zip(big["prompt_id"].to_pylist(), big["split"].to_pylist(), strict=True):
        assert splits.get(name, split) == split


def test_a_higher_cap_only_adds(tmp_path):
    source = write(tmp_path / "a.jsonl", [f"prompt {i}" for i in range(300)])
    kept = [
        texts(load_prompts(PromptsConfig(sources=[source], max_prompts=cap)).table) for cap in (10, 50, 299, 300, 400)
    ]
    assert [len(k) for k in kept] == [10, 50, 299, 300, 300]
    assert all(a <= b for a, b in itertools.pairwise(kept))


def test_the_order_of_rows_does_not_matter_for_the_caps(tmp_path):
    prompts = [f"prompt {i}" for i in range(100)]
    one = write(tmp_path / "a.jsonl", prompts).model_copy(update={"limit": 30})
    two = write(tmp_path / "b.jsonl", prompts[::-1]).model_copy(update={"limit": 30})
    found = [load_prompts(PromptsConfig(sources=[s])) for s in (one, two)]
    assert texts(found[0].table) == texts(found[1].table)
    assert found[0].counts["dropped"]["over_limit"] == 70


def test_a_limit_is_applied_within_its_source_after_its_duplicates(tmp_path):
    one = write(tmp_path / "a.jsonl", ["x", "x", "y", "z"]).model_copy(update={"limit": 3})
    two = write(tmp_path / "b.jsonl", ["x", "p", "q"]).model_copy(update={"limit": 2})
    counts = load_prompts(PromptsConfig(sources=[one, two])).counts["sources"]
    assert counts["a.jsonl"]["dropped"] == {**dict.fromkeys(counts["a.jsonl"]["dropped"], 0), "duplicate": 1}
    assert counts["b.jsonl"]["dropped"]["over_limit"] == 1


def test_split_share_and_seed(tmp_path):
    source = write(tmp_path / "a.jsonl", [f"prompt {i}" for i in range(2000)])
    one, two = (load_prompts(PromptsConfig(sources=[source], seed=s, val_fraction=0.1)) for s in (1, 2))
    assert 140 < one.counts["val"] < 260
    assert one.table["split"].to_pylist() != two.table["split"].to_pylist()
    assert load_prompts(PromptsConfig(sources=[source], val_fraction=0)).counts["val"] == 0


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards(tmp_path):
    source = write(tmp_path / "a.jsonl", [f"prompt {i}" for i in range(100)])
    table = load_prompts(PromptsConfig(sources=[source])).table
    shards: list[pa.Table] = []
    read_prompts(PromptsConfig(sources=[source]), lambda _, part: shards.append(part), 128)
    assert len(shards) == 128 and all(s.schema.equals(PROMPTS) for s in shards)
    for number, shard in enumerate(shards):
        ids = shard["prompt_id"].to_pylist()
        assert ids == sorted(ids) and all(shard_of(p, 128) == number for p in ids)
    assert pa.concat_tables(shards).sort_by("prompt_id").to_pylist() == table.to_pylist()
    with pytest.raises(ValueError, match="must divide 1024"):
        Spill(PROMPTS, 10)


def test_settings():
    names = [s.name for s in PromptsConfig().sources if isinstance(s, HuggingFaceSource)]
    assert names == ["openbmb/UltraFeedback", "nvidia/HelpSteer2"]
    for bad in ({"num_shards": 12}, {"val_fraction": 1.0}, {"max_prompts": 0}, {"sources": []}, {"max_prompt": 1}):
        with pytest.raises(ValidationError):
            PromptsConfig(**bad)


# --- nothing to work with ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.csv", "", "a.csv has no rows"),
        ("a.csv", "prompt,b\n", "a.csv has no rows"),
        ("a.jsonl", '{"prompt": " "}\n{"prompt": null}\n', "all 2 rows of column 'prompt' are empty"),
    ],
)
def test_sources_without_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    source = {"type": name[2:], "path": str(tmp_path / name), "column": "prompt"}
    with pytest.raises(InputError, match=message):
        load_prompts(PromptsConfig(sources=[source]))


def test_malformed_rows_are_in_the_log_and_in_the_last_lines_of_the_run(tmp_path):
    source = write(tmp_path / "a.jsonl", ["one", 2, 3, "four"])
    given = SimpleNamespace(
        settings=SimpleNamespace(prompts=PromptsConfig(sources=[source]), digests=None),
        folder=Folder(str(tmp_path / "out")),
        num_shards=4,
        fingerprint="0" * 16,
        log=(log := []).append,
    )
    facts = make_prompts(given)
    first = f"{tmp_path}/a.jsonl: line 2: column 'prompt': neither text nor a list of chat messages, but int"
    assert facts["warnings"] == [f"dropped 2 malformed of 4 rows (the log names 2): {first}"]
    assert log[0] == "2 kept of 4 read; dropped: 2 malformed"
    assert log[1] == f"dropped as malformed: {first}" and "a.jsonl: line 3" in log[2] and len(log) == 3
    assert facts["counts"]["dropped"]["malformed"] == 2 and facts["counts"]["kept"] == 2


def test_an_empty_file_among_others_is_fine(tmp_path):
    write(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.jsonl").write_text("")
    source = JsonlSource(path=f"{tmp_path}/*.jsonl", column="prompt")
    assert load_prompts(PromptsConfig(sources=[source])).counts["kept"] == 1


# --- digests ----------------------------------------------------------------------------------------------------------


def test_digests_of_all_sources_are_kept_apart(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    sources = [write(one / "a.jsonl", ["x"]), write(two / "a.jsonl", ["y"]), PocketSource(count=3)]
    assert list(source_digests(PromptsConfig(sources=sources))) == ["a.jsonl", "a.jsonl #2: a.jsonl", "pocket"]


def test_hub_data_is_read_at_the_commit_of_the_digests(monkeypatch):
    asked = []

    def rows(source):
        asked.append((source.name, source.revision))
        yield SourceRow({"row": 1}, "text")

    monkeypatch.setattr(HuggingFaceSource, "rows", rows)
    monkeypatch.setattr(HuggingFaceSource, "digest", lambda source: {source.name: f"commit of {source.name}"})
    config = PromptsConfig()
    load_prompts(config, source_digests(config))
    assert asked == [(s.name, f"commit of {s.name}") for s in config.sources]


# --- real prompts -----------------------------------------------------------------------------------------------------


@needs("prompts")
def test_real_prompts():
    rows = [json.loads(line) for line in REAL_PROMPTS.read_text().splitlines()]
    # Independent of our normaliser: these texts differ only in blanks at the ends of lines and between words.
    plain = [" ".join(unicodedata.normalize("NFC", r["prompt"]).split()) for r in rows]
    exact = collections.Counter(r["prompt"] for r in rows)
    source = JsonlSource(path=str(REAL_PROMPTS), column="prompt", source_column="source")
    found = load_prompts(PromptsConfig(sources=[source]))
    assert found.counts["read"] == len(rows) == 871
    assert found.counts["dropped"]["duplicate"] == len(rows) - len(set(plain))
    assert found.counts["dropped"]["duplicate"] >= sum(n - 1 for n in exact.values()) > 0
    assert found.counts["dropped"]["empty"] == 0
    assert {" ".join(t.split()) for t in texts(found.table)} == set(plain)
    assert set(found.table["source"].to_pylist()) == {r["source"] for r in rows}
