"""Each type of source, and each way in which one can be wrong."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from ray_pipeline.agreement.human_labels import read_human_labels
from ray_pipeline.data.candidate_sources import CandidateSource, own_rows
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.sources import (
    CsvSource,
    HuggingFaceSource,
    InputError,
    JsonlSource,
    ParquetSource,
    PocketSource,
    Source,
    TextSource,
    files,
    find_files,
    named_sources,
)
from ray_pipeline.data.sources.chats import messages_of, turns_in_text, until_last_user
from ray_pipeline.store.schemas import MESSAGES
from tests.prompt_sets import load_prompts

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "well"},
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


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


def faults(source):
    return [row.fault for row in source.rows() if row.fault]


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
    "broken line": (b'{"q": \n', "line 2 is not JSON"),
    "nesting": (b'{"q": ' + b"[" * 99_999 + b"\n", "line 2 is not JSON .it is nested too deeply"),
    "a chat as nested JSON": (
        json.dumps({"q": '[{"role": ' * 99_999 + "]"}).encode() + b"\n",
        "line 2: column 'q': a chat as text that is not JSON .it is nested too deeply",
    ),
    "no object": (b'["q"]\n', "line 2 is not a JSON object"),
    "not UTF-8": (b'{"q": "\xff"}\n', "line 2 is not JSON"),
    "wrong type": (b'{"q": 7}\n', "line 2: column 'q': neither text nor a list of chat messages, but int"),
    "missing column": (b'{"Q1": "b"}\n', "line 2 has no column 'q'; did you mean 'Q1'"),
    "foreign chat": (b'{"q": [{"who": "human", "what": "x"}]}\n', "line 2: .*message 0 has no role and content"),
    "unknown role": (
        b'{"q": [{"role": "observation", "content": "x"}]}\n',
        "message 0 has role 'observation', not one",
    ),
    "images in a chat": (b'{"q": [{"role": "user", "content": [1]}]}\n', "line 2: .*message 0 must have text"),
    "a dictionary as content": (b'{"q": [{"role": "user", "content": {}}]}\n', "message 0 must have text as content"),
    "a picture": (
        b'{"q": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]}\n',
        "message 0 must have text as content, and a part of it is 'image_url'",
    ),
    "tool calls": (
        b'{"q": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null, "tool_calls": [{}]}]}\n',
        "message 1 calls tools",
    ),
    "Python for JSON": (
        b"{\"q\": \"[{'role': 'user', 'content': 'x'}]\"}\n",
        r"line 2: column 'q': a chat as text that is not JSON .*json\.dumps",
    ),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_a_bad_row_does_not_end_the_load(tmp_path, case):
    line, message = BAD_JSONL[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"q": "a"}\n' + line + b'{"q": "b"}\n')
    source = JsonlSource(path=str(path), column="q")
    assert values(source) == ["a", None, "b"]
    (fault,) = faults(source)
    assert re.search(message, fault) and fault.startswith(str(path))


def test_a_bad_line_among_thousands_is_dropped_and_counted_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"q": f"question {i}"}) for i in range(3000)]
    lines[1234] = lines[1234][:-4]
    path.write_text("\n".join(lines))
    found = load_prompts(PromptsConfig(sources=[JsonlSource(path=str(path), column="q")]))
    assert (found.counts["read"], found.counts["kept"], found.counts["dropped"]["malformed"]) == (3000, 2999, 1)
    assert len(found.faults) == 1 and found.faults[0].startswith(f"{path}: line 1235 is not JSON")


def test_when_all_rows_are_bad_the_load_ends_with_the_first(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"q": 1}, {"q": 2}, {"q": " "}])
    with pytest.raises(InputError, match=r"2 of 3 rows are malformed, the others empty.*line 1: column 'q': neither"):
        load_prompts(PromptsConfig(sources=[JsonlSource(path=path, column="q")]))


def test_many_bad_rows_are_all_counted_and_the_first_are_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"q": 1}] * 500 + [{"q": "x"}])
    found = load_prompts(PromptsConfig(sources=[JsonlSource(path=path, column="q")]))
    assert found.counts["dropped"]["malformed"] == 500 and len(found.faults) == 20


# --- optional columns, arrays, text -----------------------------------------------------------------------------------


def test_an_optional_column_may_be_missing_from_some_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"q": "one"}, {"q": "two", "kind": "k"}])
    assert [row.task_type for row in JsonlSource(path=path, column="q", task_type_column="kind").rows()] == [None, "k"]
    with pytest.raises(InputError, match=r"a\.jsonl has no column 'kinds'; did you mean 'kind'"):
        list(JsonlSource(path=path, column="q", task_type_column="kinds").rows())
    pq.write_table(pa.table({"q": ["one"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"q": ["two"], "kind": ["k"]}), tmp_path / "b.parquet")
    source = ParquetSource(path=f"{tmp_path}/*.parquet", column="q", task_type_column="kind")
    assert [row.task_type for row in source.rows()] == [None, "k"]
    (tmp_path / "a.csv").write_text("q\none\n")
    with pytest.raises(InputError, match=r"a\.csv has no column 'kind'; it has q"):
        list(CsvSource(path=f"{tmp_path}/a.csv", column="q", task_type_column="kind").rows())


@pytest.mark.parametrize("type", ["json", "jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path, type, indent):
    rows = [{"q": "one", "score": float("nan")}, {"q": 7}, "x", {"q": "two"}]
    path = tmp_path / "a.json"
    path.write_text("\ufeff\n" + json.dumps(rows, indent=indent))
    source = JsonlSource(type=type, path=str(path), column="q")
    assert values(source) == ["one", None, None, "two"]
    assert [row.place["row"] for row in source.rows()] == [1, 2, 3, 4]
    one, two = faults(source)
    assert "row 2: column 'q'" in one and "row 3 is not a JSON object" in two
    path.write_text(json.dumps(rows, indent=indent)[:-3])
    with pytest.raises(InputError, match=r"a\.json is an array that is not JSON"):
        list(source.rows())


def test_a_list_on_the_first_of_many_lines_is_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('["q"]\n{"q": "one"}\n')
    assert values(JsonlSource(path=str(path), column="q")) == [None, "one"]


def test_text_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone  \r\n\n  two é\n".encode() + b"\xff\nthree")
    source = TypeAdapter(Source).validate_python({"type": "text", "path": str(path), "limit": 9})
    assert isinstance(source, TextSource) and values(source) == ["one  ", "  two é", None, "three"]
    assert [row.place["row"] for row in source.rows()] == [1, 3, 4, 5]
    assert re.search("line 4 is not UTF-8", faults(source)[0])
    with pytest.raises(ValidationError):
        TextSource(path=str(path), column="q")


# --- forms of chats ---------------------------------------------------------------------------------------------------

FORMS = {
    "messages": CHAT,
    "other names of roles": [
        {**m, "role": {"user": " Human", "assistant": "GPT"}.get(m["role"], "system")} for m in CHAT
    ],
    "sharegpt": [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"), "value": m["content"]} for m in CHAT
    ],
    "parts": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT],
    "JSON text": json.dumps(CHAT),
    "sharegpt as JSON text": json.dumps([{"from": m["role"], "value": m["content"]} for m in CHAT], indent=1),
    "marks": "<extra_id_0>System\nbe brief\n<extra_id_1>User\nhello\n<extra_id_1>Assistant\nhi\n"
    "<extra_id_1>User\nhow are you?\n<extra_id_1>Assistant\nwell",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_chat_is_the_same_chat(tmp_path, form):
    assert values(JsonlSource(path=jsonl(tmp_path / "a.jsonl", [{"q": FORMS[form]}]), column="q")) == [CHAT[:4]]
    pq.write_table(pa.table({"q": [FORMS[form]]}), tmp_path / "a.parquet")
    assert values(ParquetSource(path=str(tmp_path / "a.parquet"), column="q")) == [CHAT[:4]]


def test_marks_of_helpsteer2():
    talk = "Hi<extra_id_1>Assistant\nHello<extra_id_1>User\nMore"
    assert turns_in_text(talk) == [user("Hi"), assistant("Hello"), user("More")]
    assert turns_in_text("Hi\n\n<extra_id_1>Assistant\n\n  x\n<extra_id_1>User\n") == [
        user("Hi\n"), assistant("\n  x"), user("")
    ]  # fmt: skip
    assert turns_in_text("What does the token <extra_id_1> mean in T5?") is None


def test_pairs_of_input_and_output():
    talk = [{"input": "one", "output": "1"}, {"input": "two", "output": "2"}]
    assert messages_of(talk) == [user("one"), assistant("1"), user("two"), assistant("2")]


def test_several_parts_are_joined_by_a_newline():
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}, "three"]
    assert messages_of([{"role": "user", "content": parts}]) == [user("one\ntwo\nthree")]


def test_content_that_is_null():
    turns = [
        {"role": "system", "content": None},
        user("one"),
        {"role": "assistant", "content": None, "tool_calls": None},
    ]
    assert messages_of(turns) == [user("one"), assistant("")]


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "x"}] is no JSON in Python, is it?',
        '[{"from": "a@b.org", "value": 3}]',
        '[{"input": 1, "output": 2}]',
        '[{"role": "cook"}, {"role": "waiter"}]',
        '{"role": "user", "content": "x"}',
        "[1, 2, 3]",
        "[]",
    ],
)
def test_a_prompt_that_holds_json_is_text(tmp_path, text):
    assert values(JsonlSource(path=jsonl(tmp_path / "a.jsonl", [{"q": text}]), column="q")) == [text]


TURN = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20).filter(
    lambda text: "<extra_id_" not in text
)


@given(first=TURN.filter(str.strip), later=st.lists(st.tuples(TURN, TURN), max_size=3), system=st.none() | TURN)
def test_any_chat_comes_back_from_every_form(first, later, system):
    chat = [user(first)] + [turn for reply, more in later for turn in (assistant(reply), user(more))]
    marked = first + "".join(f"\n<extra_id_1>{m['role'].title()}\n{m['content']}" for m in chat[1:])
    assert (turns_in_text(marked) or messages_of(marked)) == chat
    chat = chat if system is None else [{"role": "system", "content": system}, *chat]
    sharegpt = [{"from": m["role"], "value": m["content"]} for m in chat]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    for form in (chat, sharegpt, parts):
        assert messages_of(form) == messages_of(json.dumps(form)) == until_last_user(messages_of(form)) == chat


@given(TURN)
def test_any_other_text_stays_as_it_stands(text):
    assume(not text.lstrip().startswith("["))
    assert messages_of(text) == [user(text)]


@given(st.lists(TURN, min_size=1, max_size=6))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_same_texts_come_from_every_kind_of_file(tmp_path, texts):
    """As they stand, and each with its own place."""
    texts = [text for text in texts if not text.lstrip().startswith("[")] or ["x"]
    rows = [{"q": text} for text in texts]
    table = pa.table({"id": range(len(texts)), "q": texts})
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    pq.write_table(table, tmp_path / "a.parquet")
    pacsv.write_csv(table, tmp_path / "a.csv")
    sources = [
        JsonlSource(path=jsonl(tmp_path / "a.jsonl", rows), column="q"),
        JsonlSource(path=str(tmp_path / "a.json"), column="q"),
        ParquetSource(path=str(tmp_path / "a.parquet"), column="q"),
        CsvSource(path=str(tmp_path / "a.csv"), column="q"),
    ]
    for source in sources:
        assert [(row.place["row"], row.value) for row in source.rows()] == list(enumerate(texts, 1))
    one_line = [text for text in texts if text.strip() and "\n" not in text and text == text.strip("\r\ufeff")]
    (tmp_path / "a.txt").write_bytes("\n".join(one_line).encode())
    assert values(TextSource(path=str(tmp_path / "a.txt"))) == one_line


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "type"]) | st.text(max_size=3), inner
        )
    ),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=4))
def test_any_row_is_read_or_has_a_fault(rows):
    """No row ends a load, whatever it holds."""
    source = JsonlSource(path="a.jsonl", column="q")
    for number, value in enumerate(rows, 1):
        row = source.row({"row": number}, {"q": value}, f"a.jsonl: line {number}")
        assert row.fault is None or row.fault.startswith(f"a.jsonl: line {number}: column 'q': ")
        if isinstance(row.value, list) and row.value:
            assert row.value[-1]["role"] == "user" and all(isinstance(m["content"], str) for m in row.value)


@given(st.lists(st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=12)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_rows_or_one_clear_error(tmp_path, lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"q": "last"}']))
    for source in (JsonlSource(path=str(path), column="q"), TextSource(path=str(path))):
        try:
            rows = list(source.rows())
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert rows and all(row.fault is None or row.fault.startswith(f"{path}: line") for row in rows)


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
    ],
)
def test_bad_parquet(tmp_path, table, message):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(InputError, match=message) as error:
        list(ParquetSource(path=str(path), column="prompt").rows())
    assert str(path) in str(error.value)


def test_a_bad_row_of_a_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [[{"role": "user", "text": "x"}]]}), path)
    source = ParquetSource(path=str(path), column="prompt")
    assert re.search("row 1: .*has no role and content", faults(source)[0]) and faults(source)[0].startswith(str(path))
    with pytest.raises(InputError, match="1 of 1 rows are malformed"):
        load_prompts(PromptsConfig(sources=[source]))


def test_a_value_that_python_cannot_hold_is_a_bad_row(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pa.array([b"good", b"\xff bad", b"good too"], pa.binary()).view(pa.string())
    dates = pa.array([0, 0, 2**62]).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": texts, "response": texts, "when": dates}), path)
    prompts = ParquetSource(path=str(path), column="prompt", source_column="when")
    table = TypeAdapter(CandidateSource).validate_python({"type": "parquet", "path": str(path), "model": "when"})
    for found in (faults(prompts), [row.fault for row in own_rows(table) if row.fault]):
        assert [fault.split(" cannot")[0] for fault in found] == [
            f"{path}: row 2 has a value in column 'prompt' that", f"{path}: row 3 has a value in column 'when' that"
        ]  # fmt: skip
    with pytest.raises(InputError, match=r"a\.parquet: row 2 has a value in column 'prompt' that cannot be read"):
        read_human_labels("alpaca_eval", str(path))


def test_a_value_of_a_hub_dataset_that_python_cannot_hold_is_a_bad_row(hub_like):
    texts = pa.array([b"good", b"\xff bad", b"more", b"more", b"good too"], pa.binary()).view(pa.string())
    dates = pa.array([0, 0, 2**62, 2**62, 0]).cast(pa.timestamp("us"))
    columns = {"prompt": texts, "response": texts, "when": dates}
    pq.write_table(pa.table(columns), hub_like / "data" / "train-00000-of-00001.parquet")
    table = TypeAdapter(CandidateSource).validate_python(
        {"type": "huggingface", "name": str(hub_like), "model": "when"}
    )
    rows = list(own_rows(table))
    assert [(row.number, row.fault is None) for row in rows] == [
        (1, True),
        (2, False),
        (3, False),
        (4, False),
        (5, True),
    ]
    place = f"dataset {hub_like} (default, train): row"
    assert [row.fault.split(" that cannot be read (")[0] for row in rows if row.fault] == [
        f"{place} {number} has a value in column {column!r}"
        for number, column in ((2, "prompt"), (3, "when"), (4, "when"))
    ]
    assert rows[4].answers[0].text == "good too"


def test_a_csv_header_that_is_not_utf_8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"qu\xffestion\nx\n")
    with pytest.raises(InputError, match=r"a\.csv is not a readable CSV file \(.*; save it as UTF-8"):
        list(CsvSource(path=str(tmp_path / "a.csv"), column="question").rows())


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="is truncated or not a Parquet file"):
        list(ParquetSource(path=str(tmp_path / "a.parquet"), column="q").rows())


def test_bad_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,question\n1,a\n")
    with pytest.raises(InputError, match="no column 'questions'; did you mean 'question'"):
        list(CsvSource(path=str(path), column="questions").rows())
    path.write_text("id,question\n1,a\n2,b,c\n3\n4,d\n5,e,f\n")
    source = CsvSource(path=str(path), column="question")
    assert values(source) == ["a", None, None, "d", None]
    assert [row.place["row"] for row in source.rows()] == [1, 2, 3, 4, 5]
    assert re.search(r"row 2 has 3 columns, not 2; quote", faults(source)[0])
    assert [re.search(r"row \d", fault).group() for fault in faults(source)] == ["row 2", "row 3", "row 5"]


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path):
    names = ["prompt", "note", "note", "prompt"]
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 4, names), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(",".join(names) + "\n1,2,3,4\n")
    for source in (ParquetSource, CsvSource):
        with pytest.raises(InputError, match=r"a\.\w+ has several columns named 'prompt'; rename all but one"):
            list(source(path=str(tmp_path / f"a.{source.model_fields['type'].default}"), column="prompt").rows())
    (tmp_path / "a.csv").write_text("prompt,note,note\n1,2,3\n")
    assert values(CsvSource(path=str(tmp_path / "a.csv"), column="prompt")) == ["1"]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_delimiter_of_a_csv_file_is_that_of_its_header(tmp_path, mark):
    path = tmp_path / "a.csv"
    path.write_bytes(f"\ufeffid{mark}q\r\n1{mark}one; two\r\n".encode() if mark != ";" else b'id;q\r\n1;"one; two"\r\n')
    assert values(CsvSource(path=str(path), column="q")) == ["one; two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"PK\x03\x04\x14\x00\x06\x00",
            "an Excel or OpenDocument workbook, not a CSV file; save the sheet as CSV in UTF-8",
        ),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an Excel workbook, not a CSV file"),
        ("q\tr\n1\t2\n".encode("utf-16"), "UTF-16 text, not a CSV file"),
        ("q,r\ncafé,1\n".encode("latin-1"), "not a readable CSV file .*UTF8.*; save it as UTF-8"),
    ],
)
def test_what_spreadsheets_write_beside_csv_is_named(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.csv is {message}"):
        list(CsvSource(path=str(path), column="q").rows())


def test_bad_rows_of_a_csv_file_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 128)
    lines = ["id,q"] + [f'{i},"text\n{i}"' if i % 3 else f"{i},a,b" for i in range(1, 200)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows = list(CsvSource(path=str(tmp_path / "a.csv"), column="q").rows())
    assert [row.place["row"] for row in rows] == list(range(1, 200))
    assert all(
        row.value == f"text\n{i}" if i % 3 else f"row {i} has 3 columns" in row.fault for i, row in enumerate(rows, 1)
    )


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
    """Nothing listens where the hub should be; the local hub cache is empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_commit_without_a_network(no_hub):
    source = HuggingFaceSource(name="openbmb/UltraFeedback", column="instruction")
    with pytest.raises(
        InputError, match=r"(?s)could not resolve the commit of openbmb/UltraFeedback.*Connection refused.*hf download"
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
