"""What a reply says about itself, over a real HTTP server on loopback and the call log."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.agents.judges import JudgeAsking, Rubric, SamplingSettings, judge
from ray_pipeline.agents.templates import load_templates
from ray_pipeline.data.answers import unanswered
from ray_pipeline.data.candidates import reply_columns
from ray_pipeline.engines.base import Completion, Sampling
from ray_pipeline.engines.endpoint_replies import other_model
from ray_pipeline.engines.endpoint_settings import EndpointSettings, OpenAISpec
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.engines.usage import prompt_was_cut
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id
from tests.endpoint import Answer, Endpoint, said
from tests.scripted import logged_calls, user

THINKING = '<think>Score: 9?</think>\n{"score": 3}'


def engine_at(url: str, **options: Any) -> OpenAIEngine:
    keeps = options.pop("keeps_thoughts", False)
    model = options.pop("model", "m")
    given = EndpointSettings(base_url=url, api_key_env=None, **options)
    return OpenAIEngine(OpenAISpec(model, given, canary=False, keeps_thoughts=keeps))


def ask(root: Path, engine: OpenAIEngine, *texts: str, replay: bool = False) -> tuple[list[Completion], LoggedEngine]:
    """Replies to texts through the call log under `root`, and the log."""
    said_aloud: list[str] = []

    async def work() -> tuple[list[Completion], LoggedEngine]:
        try:
            log = LoggedEngine(engine, Folder(str(root)), 0, 1, replay_only=replay, warn=said_aloud.append)
            async with log:
                calls = [log.bound(prompt_id(user(t)), "judge/a").chat(user(t), Sampling()) for t in texts]
                return list(await asyncio.gather(*calls)), log
        finally:
            await engine.close()

    replies, log = asyncio.run(asyncio.wait_for(work(), 60))
    engine.notes += said_aloud
    return replies, log


def rows(root: Path) -> list[dict[str, Any]]:
    return logged_calls(Folder(str(root))).to_pylist()


@pytest.mark.parametrize(
    ("answer", "text", "thoughts", "finish"),
    [
        (said(THINKING), '{"score": 3}', "Score: 9?", "stop"),
        (said("3", reasoning_content="Score: 9?"), "3", "Score: 9?", "stop"),
        (said("3", reasoning="Score: 9?"), "3", "Score: 9?", "stop"),
        (
            said([{"type": "thinking", "thinking": [{"type": "text", "text": "9?"}]}, {"type": "text", "text": "3"}]),
            "3", "9?", "stop",
        ),
        (said("<think>Score: 9", "length"), "", "Score: 9", "length"),
        (said("<think>Score: 9"), "", "Score: 9", "length"),
        (said(None, "length", reasoning_content="Score: 9"), "", "Score: 9", "length"),
        (said("half of it", "MAX_TOKENS"), "half of it", None, "length"),
        (said("half of it", "content_filter"), "half of it", None, "content_filter"),
    ],
)  # fmt: skip
def test_thoughts_and_ends_are_the_same_fresh_and_replayed(
    tmp_path: Path, answer: Answer, text: str, thoughts: str | None, finish: str
) -> None:
    """K4.2: split when read, so that the log keeps the reply as it came."""
    with Endpoint(lambda body, n: answer) as server:
        (fresh,), _ = ask(tmp_path, engine_at(server.url), "q")
        (again,), _ = ask(tmp_path, engine_at(server.url), "q", replay=True)
        (kept,), _ = ask(tmp_path, engine_at(server.url, keeps_thoughts=True), "q", replay=True)
        assert len(server.asked) == 1
    for reply in (fresh, again):
        assert (reply.text, reply.thoughts, reply.finish_reason) == (text, thoughts, finish)
    (row,) = rows(tmp_path)
    sent = answer.body["choices"][0]["message"]
    assert row["text"] == (sent["content"] if isinstance(sent["content"], str) else text)
    assert (thoughts or "") in kept.text and kept.thoughts is None


def test_a_row_of_a_thought_without_an_answer_has_no_response(tmp_path: Path) -> None:
    with Endpoint(lambda body, n: said("<think>so")) as server:

        async def work() -> dict[str, Any]:
            engine = engine_at(server.url)
            try:
                return await reply_columns(engine, user("q"), Sampling())
            finally:
                await engine.close()

        row = asyncio.run(work())
    assert (row["response"], row["finish_reason"], row["thoughts"]) == (None, "length", "so")
    assert unanswered(row) == "truncated"


def test_kept_thoughts_stay_in_the_row_and_are_never_read_as_a_verdict(tmp_path: Path) -> None:
    """K4.2: "unless asked"."""
    with Endpoint(lambda body, n: said(THINKING)) as server:

        async def work() -> tuple[dict[str, Any], Any]:
            engine = engine_at(server.url, keeps_thoughts=True)
            try:
                async with LoggedEngine(engine, Folder(str(tmp_path / "calls")), 0, 1) as log:
                    row = await reply_columns(log.bound(prompt_id(user("q")), "candidate"), user("q"), Sampling())
                rubric, texts = Rubric(name="helpfulness", text="Does it help?"), load_templates("default")
                how = SamplingSettings(max_tokens=64), JudgeAsking(retries=0)
                return row, await judge(engine, user("q"), "a", rubric, texts.judge, *how)
            finally:
                await engine.close()

        row, verdict = asyncio.run(work())
    assert (row["response"], row["thoughts"], row["finish_reason"]) == (THINKING, None, "stop")
    assert (verdict.score, verdict.parse_status, verdict.raw) == (3, "ok", '{"score": 3}')


def test_who_answered_and_what_it_cost_is_in_the_log_and_another_model_is_told_once(tmp_path: Path) -> None:
    """K4.4"""
    answer = said("ok", prompt=12, new=9)
    details = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 7}}
    body = {**answer.body, "model": "cheaper", "usage": {**answer.body["usage"], **details}}
    with Endpoint(lambda _, n: Answer(body=body)) as server:
        engine = engine_at(server.url)
        (reply, _), _ = ask(tmp_path, engine, "q", "r")
    assert (reply.answered_by, reply.reasoning_tokens, reply.cached_tokens) == ("cheaper", 7, 4)
    assert [note for note in engine.notes if "another model: 'cheaper'" in note] == engine.notes
    assert {(row["answered_by"], row["reasoning_tokens"], row["cached_tokens"]) for row in rows(tmp_path)} == {
        ("cheaper", 7, 4)
    }


@pytest.mark.parametrize(
    ("asked", "answered_by", "other"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", False),
        ("gpt-4o", "gpt-4o-mini", True),
        ("gpt-4", "gpt-4-0613", False),
        ("gpt-4", "gpt-4.1", True),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct", False),
        ("/models/policy/", "policy", False),
        ("m", "", False),
        ("policy", "base", True),
        ("claude", "claude-20250514-1-2-v1", False),
        ("m", "m" + "-111" * 100_000 + "x", True),  # minutes for a name of 30 groups, were each read in every way
    ],
)
def test_other_names_of_a_model(asked: str, answered_by: str, other: bool) -> None:
    assert other_model(asked, answered_by) == other


def test_a_prompt_that_the_server_cut_is_told_once_marked_and_counted(tmp_path: Path) -> None:
    """K4.3"""
    long = "The quick brown fox jumps over the lazy dog. " * 1078
    with Endpoint(lambda body, n: said("ok", prompt=2048)) as server:
        engine = engine_at(server.url)
        replies, log = ask(tmp_path, engine, long, long + "again", "short")
        assert [reply.prompt_cut for reply in replies] == [True, True, False] and log.stats.cut_prompts == 2
        assert len(engine.notes) == 1 and "read 2048 tokens" in engine.notes[0]
        again, log = ask(tmp_path, engine_at(server.url), long, replay=True)
    assert again[0].prompt_cut and log.stats.cut_prompts == 1


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=9000), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_no_alarm_for_any_text_that_was_read_whole(text: str, runs: int) -> None:
    """Bounds of real tokenizers: never fewer tokens than words, nor than a fifth of the letters of a long word."""
    text = text + " " * runs * 100 + "-=" * runs * 50 + "x" * runs * 100
    words = [word for word in "".join(c if c.isalnum() else " " for c in text).split() if len(set(word)) > 1]
    tokens = max(1, sum(max(1, len(word) // 5) for word in words))
    assert not prompt_was_cut(user(text), tokens) or (len(text.encode()) > 60 * tokens > 0 and not words)


def test_a_server_that_moved_is_found_by_its_model(tmp_path: Path) -> None:
    """K5.6"""
    texts = [f"question {n}" for n in range(160)]
    with Endpoint(lambda body, n: said(f"reply {n}")) as first, Endpoint(lambda body, n: said("new")) as second:
        before, _ = ask(tmp_path, engine_at(first.url), *texts)
        moved = engine_at(second.url)
        after, log = ask(tmp_path, moved, *texts, "one more")
        assert [r.text for r in after] == [*(r.text for r in before), "new"]
        assert len(second.asked) == 1 and log.stats.calls_log == 160
        assert len(moved.notes) == 1 and first.url in moved.notes[0] and "endpoint.identity" in moved.notes[0]
        # Another name, other settings that change replies, or an identity of its own: other calls.
        for options in ({"model": "n"}, {"extra_body": {"top_k": 1}}, {"identity": "m, other weights"}):
            asked = len(second.asked)
            ask(tmp_path, engine_at(second.url, **options), texts[0])
            assert len(second.asked) == asked + 1


def test_an_identity_replaces_the_address_in_keys(tmp_path: Path) -> None:
    with Endpoint(lambda body, n: said("a")) as first, Endpoint(lambda body, n: said("b")) as second:
        ask(tmp_path, engine_at(first.url, identity="judge-1"), "q")
        ask(tmp_path, engine_at(second.url, identity="judge-1"), "q")
        old = engine_at(first.url)
        ask(tmp_path, old, "r")
        moved = engine_at(second.url, identity=f"m@{first.url}")
        assert moved.identity == old.identity
        ask(tmp_path, moved, "r")
        assert (len(first.asked), len(second.asked)) == (2, 0)
    assert json.loads(rows(tmp_path)[0]["model"])["model"].startswith("endpoint:")
