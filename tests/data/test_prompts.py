"""Prompts: normalising, deduplication, caps and splits that never reshuffle, shards."""

import collections
import itertools
import json
import unicodedata

import pyarrow as pa
import pytest
from pydantic import ValidationError

from ray_pipeline.data.prompts import PromptsConfig, load_prompts, source_digests
from ray_pipeline.data.rows import shard_rows
from ray_pipeline.data.sources import HuggingFaceSource, InputError, JsonlSource, PocketSource, SourceRow
from ray_pipeline.store.keys import prompt_id, shard_of, unit_hash
from ray_pipeline.store.schemas import PROMPTS
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
    assert texts(found.table) == {"one", "two words", "three"}
    places = {r["messages"][0]["content"]: r["meta"] for r in found.table.to_pylist()}
    assert places["two words"] == '{"file":"a.jsonl","row":5}'
    dropped = {"empty": 2, "duplicate": 2, "over_limit": 0, "duplicate_across_sources": 0, "over_max_prompts": 0}
    val = found.table["split"].to_pylist().count("val")
    assert found.counts == {
        "read": 7, "dropped": dropped, "kept": 3, "train": 3 - val, "val": val,
        "sources": {"a.jsonl": {"read": 7, "dropped": dropped, "kept": 3}},
    }  # fmt: skip


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
    assert rows[0]["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]


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
    shards = shard_rows(table, 128)
    assert len(shards) == 128 and all(s.schema.equals(PROMPTS) for s in shards)
    for number, shard in enumerate(shards):
        ids = shard["prompt_id"].to_pylist()
        assert ids == sorted(ids) and all(shard_of(p, 128) == number for p in ids)
    assert pa.concat_tables(shards).sort_by("prompt_id").to_pylist() == table.to_pylist()
    with pytest.raises(ValueError, match="must divide 1024"):
        shard_rows(table, 10)


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
