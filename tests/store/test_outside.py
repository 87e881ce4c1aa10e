"""Whatever a model, a server or a user writes can be stored and shown, and takes nothing else with it."""

import asyncio
import contextlib
import dataclasses
import io
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from rich.console import Console

from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings, critique, judge
from ray_pipeline.agents.templates import load_templates
from ray_pipeline.agreement.human_labels import read_human_labels
from ray_pipeline.agreement.recorded import read_recorded
from ray_pipeline.bench.files import read_rows
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.imported import read_preferences
from ray_pipeline.data.preference_sources import PreferenceSource
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.sources import InputError, JsonlSource
from ray_pipeline.engines.base import Completion
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.usage import prompt_token_estimate, reply_token_estimate
from ray_pipeline.graph.failures import failed_again
from ray_pipeline.graph.log import RunLog
from ray_pipeline.store.calls import CallWriter, read_calls
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id
from ray_pipeline.store.outside import storable, storable_value, token_count, visible
from ray_pipeline.store.schemas import ITEMS, TABLES, to_table
from tests.planted import count_words
from tests.prompt_sets import load_prompts
from tests.scripted import ScriptedEngine, user
from tests.store.test_calls import row

#: All of Unicode, unpaired surrogates and NUL among it.
ANY = st.text(st.characters(codec=None), max_size=20)
NUMBERS = st.one_of(st.integers(), st.floats(), ANY, st.none(), st.booleans())
NASTY = "a\ud83d\0\x1b[31mb\u202e"


def value_of(kind: pa.DataType, text: str) -> Any:
    if pa.types.is_string(kind):
        return text
    if pa.types.is_struct(kind):
        return {field.name: value_of(field.type, text) for field in kind}
    if pa.types.is_list(kind):
        return [value_of(kind.value_type, text)]
    return True if pa.types.is_boolean(kind) else 1


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_every_table_takes_every_text(kind: str, tmp_path: Path) -> None:
    schema = TABLES[kind]
    rows = [{field.name: value_of(field.type, text) for field in schema} for text in (NASTY, "plain", "\ud83d")]
    table = to_table(rows, schema)
    Folder(str(tmp_path)).write_table("t.parquet", table, fingerprint="f")
    read = Folder(str(tmp_path)).read_table("t.parquet", schema=schema)
    assert read.num_rows == 3 and read.equals(table)
    assert not any("\ud83d" in text or "\0" in text for text in map(str, read.to_pylist()))


@given(ANY, ANY)
@example(NASTY, "\ud83d")
def test_text_changes_only_where_it_must(text: str, other: str) -> None:
    clean = storable(text)
    assert len(clean) == len(text) and storable(clean) == clean
    assert all(
        a == b or (b == "\ufffd" and (a == "\0" or "\ud800" <= a <= "\udfff")) for a, b in zip(text, clean, strict=True)
    )
    clean.encode()
    assert storable_value({text: [other, (1, text)]}) == {clean: [storable(other), [1, clean]]}
    visible(text).encode()
    assert "\x1b" not in visible(text) and "\0" not in visible(text)


def lines(folder: str, *rows: dict[str, Any]) -> Path:
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@settings(deadline=None, max_examples=60)
@given(ANY, NUMBERS)
@example(NASTY, 2**70)
@example(NASTY, 10**400)
def test_every_reader_of_files_gives_rows_that_can_be_stored(text: str, number: Any) -> None:
    """JSON escapes hold what UTF-8 cannot. Whatever a file says, it is read, or refused with its place."""
    said = f"q {text}"
    with tempfile.TemporaryDirectory() as folder:
        path = lines(folder, {"prompt": said, "id": number, text: text})
        from_file = JsonlSource(path=str(path), column="prompt", system=text or None)
        (row,) = load_prompts(PromptsConfig(sources=[from_file])).table.to_pylist()
        assert row["prompt_id"] == prompt_id(row["messages"])

        item = {"item_id": "i", "question": said, "response_a": text, "response_b": "b", "human_label": "A"}
        lines(folder, {**item, "model_a": text, "model_b": "m", "metric_10": {"reply_a": f"Score: 3\n{text}"}})
        with contextlib.suppress(InputError):  # a recording of unknown form
            to_table(read_recorded(str(path)).items, ITEMS)
        lines(folder, {**item, "model_a": text, "model_b": "m"})
        to_table(read_recorded(str(path)).items, ITEMS)

        lines(folder, {"prompt": said, "completion": text, "label": True, "score": number})
        source = TypeAdapter(PreferenceSource).validate_python(
            {"type": "jsonl", "path": str(path), "format": "unpaired", "label": "label"}
        )
        with contextlib.suppress(InputError):  # no row is left where the completion is empty
            read_preferences(source, DatasetsConfig(kinds=["kto"]), count_words, 0, 0.0, lambda *_: None)

        lines(folder, {"prompt": said, "chosen": "a", "rejected": "b", "better": number, "worse": 1})
        source = TypeAdapter(PreferenceSource).validate_python(
            {"type": "jsonl", "path": str(path), "chosen_score": "better", "rejected_score": "worse"}
        )
        with contextlib.suppress(InputError):  # the score is none
            read_preferences(source, DatasetsConfig(kinds=["dpo"]), count_words, 0, 0.0, lambda *_: None)

        person = {"instruction": said, "output_1": text, "output_2": "b", "annotator": number, "preference": number}
        for row in ({**person, "preference": 1}, person):
            lines(folder, row)
            with contextlib.suppress(InputError):  # the preference is none
                to_table(read_human_labels("alpaca_eval", str(path)), ITEMS)

        lines(folder, {"question_id": number, "turns": [said], text: [text]})
        (question,) = read_rows(str(path))
        assert json.dumps(question, ensure_ascii=False).encode()


@given(ANY)
@example(NASTY)
def test_json_files_take_every_text(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Folder(folder).write_json("x.json", {"error": text})
        # A NUL is escaped in JSON and comes back as it was.
        expected = storable(text.replace("\0", "")) if "\0" in text else storable(text)
        assert Folder(folder).read_json("x.json")["error"].replace("\0", "") == expected


@given(NUMBERS)
@example(2**40)
@example(-(10**9))
@example(float("inf"))
@example("12")
@example(True)
def test_a_token_count_fits_its_column(value: Any) -> None:
    count = token_count(value)
    assert 0 <= count < 2**31
    fits = type(value) is int and 0 <= value < 2**31
    assert count == (value if fits else 0) and token_count(value, 7) == (value if fits else 7)


@given(ANY, NUMBERS, NUMBERS)
@example(NASTY, 2**40, None)
def test_a_reply_is_logged_whatever_it_says_about_itself(text: str, prompt: Any, completion: Any) -> None:
    reply = Completion(text, text, prompt, completion, prompt, logprobs=[[(text, -0.5)]])

    async def ask(root: str) -> tuple[Completion, Completion]:
        engine = ScriptedEngine(lambda messages, sampling: reply)
        async with LoggedEngine(engine, Folder(root), 0, 1) as log:
            first = await log.bound("0" * 32, "judge/a").chat(user("q"), SamplingSettings().sampling())
        async with LoggedEngine(engine, Folder(root), 0, 1, replay_only=True) as log:
            again = await log.bound("0" * 32, "judge/a").chat(user("q"), SamplingSettings().sampling())
        return first, again

    with tempfile.TemporaryDirectory() as root:
        first, again = asyncio.run(ask(root))
    estimates = prompt_token_estimate(user("q")), reply_token_estimate(text)
    assert first.text == storable(text)
    assert first.prompt_tokens == token_count(prompt, estimates[0]) and estimates[0] > 0
    assert first.completion_tokens == token_count(completion, estimates[1]) and estimates[1] > 0
    same = {"latency_s": 0.0, "from_log": False, "logprobs": None}
    assert dataclasses.replace(first, **same) == dataclasses.replace(again, **same)


def test_a_call_that_cannot_be_stored_takes_no_other_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Folder(str(tmp_path))
    rows = [row(n) for n in range(5)]
    rows[1]["prompt_tokens"], rows[3]["text"] = 2**40, None
    with caplog.at_level(logging.WARNING, "quorum.calls"):
        CallWriter(folder, 0, 1).flush(rows)
    assert sorted(read_calls(folder, 0, 1)["call_key"].to_pylist()) == [rows[n]["call_key"] for n in (0, 2, 4)]
    assert [rows[n]["call_key"] in caplog.text for n in range(5)] == [False, True, False, True, False]


def test_a_judge_and_a_critic_may_write_half_a_character() -> None:
    async def ask() -> tuple[Any, Any]:
        templates, asking = load_templates("default"), JudgeAsking()
        scored = ScriptedEngine(lambda messages, sampling: r'{"reason": "nice \ud83d", "score": 8}')
        flawed = ScriptedEngine(
            lambda messages, sampling: r'{"reason": "no \u0000", "failure_type": "circular", "flawed": true}'
        )
        rubric, sampling = Rubric(name="a"), SamplingSettings()
        return (
            await judge(scored, user("q"), "r", rubric, templates.judge, sampling, asking),
            await critique(flawed, user("q"), "r", templates.critic, sampling, asking),
        )

    verdict, remark = asyncio.run(ask())
    ids = {"candidate_id": "c", "prompt_id": "p"}
    (stored,) = to_table([{**ids, "judge": "a", **vars(verdict)}], TABLES["verdicts"]).to_pylist()
    assert (stored["score"], stored["reason"]) == (8.0, "nice \ufffd")
    (stored,) = to_table([{**ids, **vars(remark)}], TABLES["critiques"]).to_pylist()
    assert (stored["flawed"], stored["reason"]) == (True, "no \ufffd")


def test_terminal_log_and_failures_show_control_characters(tmp_path: Path) -> None:
    out = io.StringIO()
    line = f"judge: shard 0 failed: HTTP 403: {NASTY}"
    with RunLog(Folder(str(tmp_path)), Console(file=out, soft_wrap=True)) as log:
        log.say(line)
    (file,) = (tmp_path / "logs").iterdir()
    for text in (out.getvalue(), file.read_text(), failed_again(None, 0, line, 3).error):
        assert "\\x1b[31mb\\u202e" in text and "\\ud83d" in text and "\x1b" not in text
    json.dumps(failed_again(None, 0, line, 3).error).encode()
