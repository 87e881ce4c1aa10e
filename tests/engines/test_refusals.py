"""Refusals that concern every call stop the engine with the server's words; those of one row stay the row's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.engines import endpoint_retry
from ray_pipeline.engines.base import (
    Completion,
    EngineError,
    EngineStartError,
    EngineStop,
    Grammar,
    PromptTooLong,
    Sampling,
    rejected,
)
from ray_pipeline.engines.lifetime import Lifetime
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.engines.refusals import Refusals
from tests.endpoint import KEY, Answer, Endpoint, refused, said, using
from tests.engines.test_openai_engine import COLD, ask, engine_at
from tests.scripted import user


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setattr(endpoint_retry, "_BACKOFF_SECONDS", 0.01)


def one_by_one(engine: OpenAIEngine, *texts: str, sampling: Sampling = COLD) -> list[Any]:
    async def work(engine: OpenAIEngine) -> list[Any]:
        found: list[Any] = []
        for text in texts:
            found += await asyncio.gather(engine.chat(user(text), sampling), return_exceptions=True)
        return found

    return using(engine, work)


EVERY_CALL = {
    "403": refused(403, "Country not supported"),
    "a field": Answer(422, {"detail": [{"loc": ["body", "extra", "x"], "msg": "Extra inputs are not permitted"}]}),
    "a parameter in words": refused(400, "This deployment cannot sample; set do_sample to false"),
    "a limit of the reply": refused(400, "max_tokens is too large: 5000. This model supports at most 4096."),
    "a template": refused(400, "chat template: 'dict object' has no attribute 'documents'"),
    "a template with status 500": refused(500, "Jinja Exception: tools are missing"),
    "Gemini": Answer(400, [{"error": {"code": 400, "message": 'Invalid JSON payload received. Unknown name "seed"'}}]),
    "text": Answer(400, b"upstream says no"),
    "request ids": None,
}


@pytest.mark.parametrize("name", EVERY_CALL)
@pytest.mark.parametrize("at_once", [False, True])
def test_a_refusal_of_every_call_stops_the_engine(name: str, at_once: bool) -> None:
    def script(body: dict[str, Any], n: int) -> Answer:
        said_no = f"no such field (request id: {n}f{n}e{n}, prompt '{body['messages'][0]['content']}')"
        return EVERY_CALL[name] or refused(400, said_no)

    with Endpoint(script) as server:
        run = ask if at_once else one_by_one
        errors = run(engine_at(server.url, concurrency=4), *map(str, range(30)))
        assert len(server.asked) <= 12
        assert {type(e) for e in errors[:2] if not isinstance(e, EngineStop)} <= {EngineError}
        stop = errors[-1]
        assert type(stop) is EngineStop and server.url in str(stop)
        words = "no such field" if name == "request ids" else str(errors[0])
        assert at_once or (words in str(stop) and "refused 3 prompts and answered none" in str(stop))
        assert "rerun the same command" in str(stop) and "endpoint.omit" in str(stop)
        with pytest.raises(EngineStartError) as start:
            using(engine_at(server.url, canary=True), lambda e: e.start())
        assert server.url in str(start.value)


ONE_ROW = {
    "content filter": refused(400, "The response was filtered due to our content management policy", "content_filter"),
    "moderation": refused(403, 'Your chosen model requires moderation on OpenAI. Your input was flagged for "x"'),
    "usage policy": refused(400, "Invalid prompt: your prompt was flagged as potentially violating our usage policy."),
    "DashScope": Answer(
        400, {"code": "data_inspection_failed", "message": "Output data may contain inappropriate content."}
    ),
    "GLM": refused(
        400,
        "\u7cfb\u7edf\u68c0\u6d4b\u5230\u8f93\u5165\u5185\u5bb9\u53ef\u80fd\u5305\u542b\u654f\u611f\u5185\u5bb9",
        "1301",
    ),
    "too long": refused(400, "Prompt is too long"),
    "more than a minute's tokens": refused(429, "Request too large on tokens per min (TPM): Limit 9, Requested 10"),
    "HTML": Answer(413, b"<html><h1>413 Request Entity Too Large</h1></html>"),
}


@pytest.mark.parametrize("answer", ONE_ROW.values(), ids=ONE_ROW)
def test_a_refusal_of_a_text_stays_the_rows(answer: Answer) -> None:
    with Endpoint(lambda body, n: answer) as server:
        errors = one_by_one(engine_at(server.url), *map(str, range(12)))
    assert {type(e) for e in errors} <= {EngineError, PromptTooLong} and len(server.asked) == 12


def test_rows_that_are_refused_among_others_are_their_own() -> None:
    """Refusals come before the first reply, and a prompt that is asked again with other seeds is one prompt."""

    def script(body: dict[str, Any], n: int) -> Answer:
        if "bad" in body["messages"][0]["content"]:
            return refused(400, "Conversation roles must alternate")
        return Answer(**{**vars(said()), "delay": 0.4})

    texts = [f"{'bad' if i % 3 else 'good'} {i}" for i in range(30)]
    with Endpoint(script) as server:
        replies = ask(engine_at(server.url, concurrency=8), *texts)
        for text, reply in zip(texts, replies, strict=True):
            assert type(reply) is (EngineError if "bad" in text else Completion)

        async def seeds(engine: OpenAIEngine) -> list[Any]:
            calls = [engine.chat(user("bad"), Sampling(max_tokens=20, seed=seed)) for seed in range(9)]
            return await asyncio.gather(*calls, engine.chat(user("bad 2"), COLD), return_exceptions=True)

        assert {type(e) for e in using(engine_at(server.url), seeds)} == {EngineError}


def test_another_kind_of_call_is_judged_by_itself() -> None:
    """One judge of a panel sends what the server does not take; the others are answered."""
    script = lambda body, n: refused(400, "sampling by temperature is off") if body["temperature"] else said()  # noqa: E731

    async def work(engine: OpenAIEngine) -> list[Any]:
        fine = [await engine.chat(user(str(i)), COLD) for i in range(3)]
        warm = [engine.chat(user(str(i)), Sampling(0.7, max_tokens=20, seed=i)) for i in range(6)]
        return fine + await asyncio.gather(*warm, return_exceptions=True)

    with Endpoint(script) as server:
        replies = using(engine_at(server.url), work)
    assert {type(r) for r in replies[:3]} == {Completion} and EngineStop in {type(r) for r in replies[3:]}


# --- the rule ---------------------------------------------------------------------------------------------------------


def stops(*calls: tuple[str, str | None], kind: Sampling = COLD) -> bool:
    """Whether calls one after another, (prompt, words of the refusal), stop the engine."""
    refusals = Refusals("a model", "Do something.", Lifetime())
    for prompt, words in calls:
        try:
            with refusals.watch(user(prompt), kind):
                if words is not None:
                    raise rejected(words)
        except EngineStop as stop:
            assert words is not None and words in str(stop) and "Do something." in str(stop)
            return True
        except EngineError:
            pass
    return False


def test_when_refusals_stop_an_engine() -> None:
    no = [(prompt, "no") for prompt in "abcdefgh"]
    assert stops(*no[:3]) and not stops(*no[:2])
    assert not stops(("a", None), *no)
    assert not stops(*[("a", "no")] * 9)
    assert not stops(("a", "this"), ("b", "that"), ("c", "those"))
    assert stops(("a", "at 'x' 1 no"), ("b", "at 'y' 22 no"), ("c", "at 'z z' 0x7f no"))
    judges = [Sampling(grammar=Grammar.choice([prompt, "tie"])) for prompt in "abc"]
    refusals = Refusals("a model", "", Lifetime())
    with pytest.raises(EngineStop):
        for prompt, sampling in zip("abc", judges, strict=True):
            try:
                with refusals.watch(user(prompt), sampling):
                    raise rejected("no grammar of this kind")
            except EngineError:
                pass


@given(st.lists(st.tuples(st.text(max_size=3), st.none() | st.sampled_from(["no", "never", ""]))))
def test_an_answer_ends_all_suspicion(calls: list[tuple[str, str | None]]) -> None:
    assert not stops(("x", None), *calls)
    assert not stops(*[(prompt, words) for prompt, words in calls if not words])
