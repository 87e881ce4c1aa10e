"""Each type of source, and each way in which one can be wrong."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from ray_pipeline.data.sources import (
    CsvSource,
    HuggingFaceSource,
    InputError,
    JsonlSource,
    ParquetSource,
    PocketSource,
    Source,
    find_files,
    named_sources,
)
from ray_pipeline.store.schemas import MESSAGES

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "well"},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def values(source):
    return [row.value for row in source.rows()]


# --- what can be read -------------------------------------------------------------------------------------------------


def test_jsonl_with_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "one", "kind": "k", "n": 3}\n\n{"q": "two\xc3\xa9"}\n{"q": null}')
    rows = list(JsonlSource(path=str(path), column="q").rows())
    assert [r.value for r in rows] == ["one", "twoé", None]
    assert [r.place for r in rows] == [{"file": "a.jsonl", "row": n} for n in (1, 3, 4)]


def test_task_type_and_source_columns(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"q": "one", "kind": "k", "n": 3}, {"q": "two", "kind": None, "n": None}])
    rows = list(JsonlSource(path=path, column="q", task_type_column="kind", source_column="n").rows())
    assert [(r.task_type, r.source) for r in rows] == [("k", "3"), (None, None)]


def test_gzipped_jsonl(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"q": "one"}\n{"q": "two"}\n'))
    assert values(JsonlSource(path=str(path), column="q")) == ["one", "two"]


def test_parquet_over_several_batches(tmp_path):
    texts = [f"text {i}" for i in range(3000)]
    pq.write_table(pa.table({"q": texts, "other": [[1]] * 3000}), tmp_path / "a.parquet", row_group_size=700)
    rows = list(ParquetSource(path=str(tmp_path / "a.parquet"), column="q").rows())
    assert [r.value for r in rows] == texts
    assert [r.place["row"] for r in rows] == list(range(1, 3001))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_types(tmp_path, kind):
    pq.write_table(pa.table({"q": pa.array(["a", None, "a"], kind)}), tmp_path / "a.parquet")
    assert values(ParquetSource(path=str(tmp_path / "a.parquet"), column="q")) == ["a", None, "a"]


def test_csv_with_quoted_commas_lines_and_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,q,tail\n1,"one, ""two""\nthree",x\n2,42,y\nx3,,z\n')
    assert values(CsvSource(path=str(path), column="q")) == ['one, "two"\nthree', "42", ""]


def test_chats_end_with_a_user_turn(tmp_path):
    pq.write_table(pa.table({"chat": pa.array([CHAT, CHAT[:2], CHAT[:1], []], MESSAGES)}), tmp_path / "a.parquet")
    cut = values(ParquetSource(path=str(tmp_path / "a.parquet"), column="chat"))
    assert cut == [CHAT[:4], CHAT[:2], [], []]
    assert values(JsonlSource(path=jsonl(tmp_path / "a.jsonl", [{"chat": CHAT}]), column="chat")) == [CHAT[:4]]


def test_patterns_and_uris(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "deep/er/d.jsonl", "a.json"):
        jsonl(tmp_path / name, [{"q": name}])
    for pattern, names in (
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]),
        ("deep/?.jsonl", ["c.jsonl"]),
        ("[!a].jsonl", ["b.jsonl"]),
        ("*/er/*", ["deep/er/d.jsonl"]),
    ):
        for base in (str(tmp_path), tmp_path.as_uri()):
            found = find_files(f"{base}/{pattern}")
            assert [f.name.rsplit("/", 1)[-1] for f in found] == [n.rsplit("/", 1)[-1] for n in names], pattern
    assert values(JsonlSource(path=tmp_path.as_uri() + "/a.jsonl", column="q")) == ["a.jsonl"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    path = jsonl(tmp_path / "a[1].jsonl", [{"q": "x"}])
    assert values(JsonlSource(path=path, column="q")) == ["x"]


def test_pocket():
    rows = list(PocketSource(count=5, seed=1).rows())
    assert len({r.value for r in rows}) == 5 and all(r.task_type for r in rows)
    assert rows == list(PocketSource(count=5, seed=1).rows())


@pytest.fixture
def hub_like(tmp_path, monkeypatch):
    """A dataset folder of the shape that the hub serves, opened by the real `datasets` library."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    table = {"instruction": ["one", "two", "one"], "source": ["x", "y", "z"], "n": [1, 2, 3]}
    pq.write_table(pa.table(table), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def test_huggingface_data_set(hub_like):
    rows = list(HuggingFaceSource(name=str(hub_like), column="instruction", source_column="source").rows())
    assert [(r.value, r.source, r.place["row"]) for r in rows] == [("one", "x", 1), ("two", "y", 2), ("one", "z", 3)]


def test_a_moved_data_set_folder_keeps_its_identity(hub_like):
    source = HuggingFaceSource(name=str(hub_like), column="instruction")
    moved = HuggingFaceSource(name=str(hub_like.parent / "elsewhere" / "set"), column="instruction")
    before = source.decisive(), source.digest(), [row.place for row in source.rows()]
    assert str(hub_like) not in str(before) and source.label_in_tables == "set"
    assert source.pinned(source.digest()).name == source.name
    (hub_like.parent / "elsewhere").mkdir()
    hub_like.rename(moved.name)
    assert (moved.decisive(), moved.digest(), [row.place for row in moved.rows()]) == before
    (Path(moved.name) / "data" / "train-00000-of-00001.parquet").write_bytes(b"other")
    assert moved.decisive() == before[0] and moved.digest() != before[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "instructions"}, "no column 'instructions'; did you mean 'instruction'"),
        ({"column": "n"}, "column 'n' is int64"),
        ({"split": "test"}, "cannot be loaded.*check name, subset, split"),
        ({"name": "/nowhere/at/all"}, "cannot be loaded"),
    ],
)
def test_huggingface_mistakes(hub_like, change, message):
    source = HuggingFaceSource(**{"name": str(hub_like), "column": "instruction", **change})
    with pytest.raises(InputError, match=f"(?s){message}"):
        list(source.rows())


# --- what cannot be read ----------------------------------------------------------------------------------------------

BAD_JSONL = {
    "broken line": ('{"q": "a"}\n{"q": \n', "line 2 is not JSON"),
    "no object": ('{"q": "a"}\n\n["q"]\n', "line 3 is not a JSON object"),
    "not UTF-8": (b'{"q": "a"}\n{"q": "\xff"}\n', "line 2 is not JSON"),
    "wrong type": ('{"q": "a"}\n{"q": 7}\n', "line 2: column 'q' holds a int"),
    "missing column": ('{"q": "a"}\n{"Q1": "b"}\n', "line 2 has no column 'q'; did you mean 'Q1'"),
    "foreign chat": ('{"q": [{"from": "human", "value": "x"}]}\n', "line 1: .*message 0 has no role and content"),
    "images in a chat": ('{"q": [{"role": "user", "content": [1]}]}\n', "line 1: .*message 0 must have text"),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_bad_jsonl(tmp_path, case):
    text, message = BAD_JSONL[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as error:
        list(JsonlSource(path=str(path), column="q").rows())
    assert str(path) in str(error.value)


def test_a_gzip_file_that_is_cut_short(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"q": "one"}\n' * 1000)[:-20])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz is truncated or corrupt"):
        list(JsonlSource(path=str(path), column="q").rows())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"prompts": ["x"]}, "no column 'prompt'; did you mean 'prompts'"),
        ({"zzz": ["x"]}, "no column 'prompt'; it has zzz"),
        ({"prompt": [1]}, "column 'prompt' is int64"),
        ({"prompt": [["x"]]}, "column 'prompt' is list"),
        ({"prompt": [[{"role": "user", "text": "x"}]]}, "row 1: .*has no role and content"),
    ],
)
def test_bad_parquet(tmp_path, table, message):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(InputError, match=message) as error:
        list(ParquetSource(path=str(path), column="prompt").rows())
    assert str(path) in str(error.value)


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="is truncated or not a Parquet file"):
        list(ParquetSource(path=str(tmp_path / "a.parquet"), column="q").rows())


def test_bad_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,question\n1,a\n")
    with pytest.raises(InputError, match="no column 'questions'; did you mean 'question'"):
        list(CsvSource(path=str(path), column="questions").rows())
    path.write_text("id,question\n1,a\n2,b,c\n")
    with pytest.raises(InputError, match=r"not a readable CSV.*Row #3.*quote"):
        list(CsvSource(path=str(path), column="question").rows())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "none.jsonl does not exist"),
        ("none/*.jsonl", "matches no file"),
        ("*.parquet", "matches no file"),
        (".", "is a folder; name its files"),
        ("nosuchscheme://a/b", "cannot be listed"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", [{"q": "x"}])
    source = JsonlSource(path=path, column="q")
    with pytest.raises(InputError, match=message):
        list(source.rows())
    with pytest.raises(InputError, match=message):
        source.digest()


def test_the_pocket_world_is_finite(monkeypatch):
    from ray_pipeline.pocket import tasks

    def too_many(n, seed):
        raise ValueError("ran out of distinct prompts")

    monkeypatch.setattr(tasks, "make_prompts", too_many)
    with pytest.raises(InputError, match="pocket source: ran out"):
        list(PocketSource(count=5).rows())


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "jsonl", "path": "a"},
        {"type": "jsonl", "path": "a", "column": "q", "colum": "q"},
        {"type": "xml", "path": "a", "column": "q"},
        {"type": "pocket", "count": 0},
        {"type": "huggingface", "name": "a/b", "column": "q", "trust_remote_code": True},
        {"path": "a", "column": "q"},
    ],
)
def test_settings_that_are_refused(bad):
    with pytest.raises(ValidationError):
        TypeAdapter(Source).validate_python(bad)


# --- digests ----------------------------------------------------------------------------------------------------------


def test_file_digests_follow_the_content_and_not_the_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "a.jsonl", [{"q": "x"}])
        jsonl(tmp_path / folder / "b.jsonl", [{"q": "y"}])
    one, two = (JsonlSource(path=f"{tmp_path}/{f}/*.jsonl", column="q").digest() for f in ("one", "two"))
    assert one == two and list(one) == ["a.jsonl", "b.jsonl"]
    jsonl(tmp_path / "two" / "b.jsonl", [{"q": "z"}])
    changed = JsonlSource(path=f"{tmp_path}/two/*.jsonl", column="q").digest()
    assert changed["a.jsonl"] == one["a.jsonl"] and changed["b.jsonl"] != one["b.jsonl"]


def test_a_gzip_file_is_digested_as_it_lies_there(tmp_path):
    import hashlib

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"q": "one"}\n'))
    digest = JsonlSource(path=str(path), column="q").digest()["a.jsonl.gz"]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_pocket_digest():
    assert PocketSource(count=5, seed=1).digest() == PocketSource(count=5, seed=1).digest()
    assert PocketSource(count=5, seed=1).digest() != PocketSource(count=5, seed=2).digest()


def test_local_data_set_digest(hub_like):
    source = HuggingFaceSource(name=str(hub_like), column="instruction")
    before = source.digest()
    (hub_like / "README.md").write_text("changed")
    assert source.digest() != before


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """The hub does not answer; the local hub cache is empty."""
    import httpx
    from huggingface_hub import HfApi, constants

    def refuse(*args, **kwargs):
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_commit_without_a_network(no_hub):
    source = HuggingFaceSource(name="openbmb/UltraFeedback", column="instruction")
    with pytest.raises(
        InputError, match=r"(?s)could not resolve the commit of openbmb/UltraFeedback.*no route.*hf download"
    ):
        source.digest()
    refs = no_hub / "datasets--openbmb--UltraFeedback" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    assert source.digest() == {"openbmb/UltraFeedback": COMMIT}
    with pytest.raises(InputError, match="could not resolve the commit"):
        source.model_copy(update={"revision": "v2"}).digest()
    assert source.model_copy(update={"revision": COMMIT[::-1]}).digest() == {source.name: COMMIT[::-1]}


def test_hub_commit_from_the_hub(monkeypatch):
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    class Info:
        sha = COMMIT

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, revision=None, timeout=None: Info)
    source = HuggingFaceSource(name="a/b", column="q")
    assert source.digest() == {"a/b": COMMIT}

    def missing(self, name, revision=None, timeout=None):
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))

    monkeypatch.setattr(HfApi, "dataset_info", missing)
    with pytest.raises(InputError, match="no dataset a/b"):
        source.digest()


def test_a_cache_of_another_commit_is_not_taken_for_the_one_asked_for(monkeypatch):
    """Offline, `datasets` opens the newest cached version of a dataset whatever the revision."""
    import datasets

    asked = []

    class Cached:
        column_names = ("q",)
        cache_files = ({"filename": f"/cache/a___b/default/0.0.0/{COMMIT}/b-train.arrow"},)

    def load(name, subset, split, revision):
        asked.append(revision)
        return Cached

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=f"holds commit {COMMIT}, not {COMMIT[::-1]}"):
        source = HuggingFaceSource(name="a/b", column="q", revision="main")
        list(source.pinned({"a/b": COMMIT[::-1]}).rows())
    assert asked == [COMMIT[::-1]]


def test_names_of_sources_are_distinct():
    sources = [PocketSource(count=1), JsonlSource(path="x/a.jsonl", column="q"), PocketSource(count=2)]
    assert [name for name, _ in named_sources(sources)] == ["pocket", "a.jsonl", "pocket #2"]
