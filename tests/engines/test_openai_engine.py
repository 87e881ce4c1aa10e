"""The engine for endpoints against a real HTTP server on loopback that misbehaves by script."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
import types
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines import endpoint_retry
from ray_pipeline.engines.account import Prices
from ray_pipeline.engines.base import (
    BudgetSpent,
    CallFailed,
    ChatEngine,
    Completion,
    EngineDead,
    EngineError,
    EngineStartError,
    EngineStop,
    Grammar,
    Metered,
    PromptTooLong,
    Sampling,
)
from ray_pipeline.engines.endpoint_requests import broken_control_strings
from ray_pipeline.engines.endpoint_settings import EndpointSettings, OpenAISpec
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id
from tests.endpoint import KEY, Answer, Endpoint, refused, said, using
from tests.scripted import logged_calls, user

COLD = Sampling(max_tokens=20)
SCORE = Grammar.json(
    {
        "type": "object",
        "properties": {
            "reason": {"type": "string", "maxLength": 40},
            "score": {"type": "integer", "minimum": 1, "maximum": 10},
        },
        "required": ["reason", "score"],
        "additionalProperties": False,
    }
)
#: One unit of money a token, so that sums are easy to read.
PRICES = Prices(input=1e6, output=1e6)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setattr(endpoint_retry, "_BACKOFF_SECONDS", 0.01)


def engine_at(url: str, *, canary: bool = False, share: int = 1, **settings: Any) -> OpenAIEngine:
    endpoint = EndpointSettings(**{"base_url": url, "api_key_env": "LOOPBACK_KEY", **settings})
    return OpenAIEngine(OpenAISpec("judge", endpoint, canary=canary, share=share))


def ask(engine: OpenAIEngine, *texts: str, sampling: Sampling = COLD) -> list[Any]:
    """All texts at once; completions and exceptions."""
    return using(
        engine,
        lambda e: asyncio.gather(*(e.chat(user(t), sampling) for t in texts or ("hello",)), return_exceptions=True),
    )


# --- what is sent and what is read ------------------------------------------------------------------------------------


def test_a_call_and_its_reply() -> None:
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
    steps = [
        {
            "token": "a",
            "logprob": -0.5,
            "top_logprobs": [
                {"token": "c", "logprob": -3.0},
                {"token": "a", "logprob": -0.5},
                {"token": "b", "logprob": -1.0},
            ],
        }
    ]
    message = {"role": "assistant", "content": "a"}
    body = {
        "choices": [{"message": message, "finish_reason": "length", "logprobs": {"content": steps}}],
        "usage": usage,
    }
    sampling = Sampling(0.7, 0.9, 20, 3, ("x", "y"), 2, extra=(("top_k", 5),))
    with Endpoint(lambda body_, n: Answer(body=body)) as server:
        engine = engine_at(server.url + "/", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert isinstance(engine, ChatEngine) and isinstance(engine, Metered)
        [reply] = ask(engine, "hello", sampling=sampling)
    assert server.asked == [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": "hello"}],
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 20,
            "seed": 3,
            "stop": ["x", "y"],
            "logprobs": True,
            "top_logprobs": 2,
            "top_k": 5,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert (reply.text, reply.finish_reason) == ("a", "length") and 0 < reply.latency_s < 30
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (12, 3, 8)
    assert reply.logprobs == [[("a", -0.5), ("b", -1.0), ("c", -3.0)]]
    stats = engine.stats()
    assert (stats.calls, stats.requests, stats.prompt_tokens, stats.cached_tokens) == (1, 1, 12, 8)


@pytest.mark.parametrize(
    "control",
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "</s>",
        "<s>",
        "[/INST]",
        "[INST]",
        "<\uff5cUser\uff5c>",
        "<|end|>",
        "<eos>",
    ],
)
def test_control_strings_are_broken_where_the_block_says_so(control: str) -> None:
    text = f"x {control}{control}\n{control} y"
    with Endpoint(lambda *_: said()) as server:
        ask(engine_at(server.url), text)
        ask(engine_at(server.url, break_control_strings=True), text)
    (as_it_is,), (broken,) = (body["messages"] for body in server.asked)
    assert as_it_is["content"] == text
    assert control not in broken["content"] and broken["content"].replace("\u200b", "") == text


def test_what_is_no_control_string_is_sent_as_it_is() -> None:
    text = "a < b | c > d, <b>bold</b>, <answer_A 0a1b2c3d>, [1], if (x<|y|) <strong>, <|two words|>"
    assert broken_control_strings(text) == text


@pytest.mark.parametrize(
    ("answer", "text", "finish"),
    [
        (said("x", "eos_token"), "x", "stop"),
        (said("x", "max_tokens"), "x", "length"),
        (said("x", "content_filter"), "x", "content_filter"),
        (said(None, "stop", refusal="I will not"), "I will not", "refusal"),
        (said(None, "length"), "", "length"),
        (said([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]), "xy", "stop"),  # type: ignore[arg-type]
        (Answer(body={"choices": [{"message": {"content": "abcdef"}, "finish_reason": "stop"}]}), "abcdef", "stop"),
    ],
)
def test_ends_of_replies(answer: Answer, text: str, finish: str) -> None:
    with Endpoint(lambda body, n: answer) as server:
        [reply] = ask(engine_at(server.url))
    assert (reply.text, reply.finish_reason) == (text, finish)
    assert reply.prompt_tokens > 0 and reply.completion_tokens > 0  # an estimate, where nothing is said


def test_parameters_that_are_never_sent() -> None:
    with Endpoint(lambda body, n: said()) as server:
        ask(engine_at(server.url, omit=("temperature", "top_p")))
        ask(engine_at(server.url, max_tokens_name="max_completion_tokens"))
    assert set(server.asked[0]) == {"model", "messages", "max_tokens"}
    assert set(server.asked[1]) == {"model", "messages", "temperature", "top_p", "max_completion_tokens"}


# --- one call's trouble -----------------------------------------------------------------------------------------------

PASSING = {
    "500": refused(500),
    "502": Answer(502, b"<html>bad gateway</html>"),
    "503": refused(503),
    "429": refused(429),
    "408": refused(408),
    "cut": Answer(**{**vars(said("x" * 500)), "cut": True}),
    "cut error": Answer(500, b"x" * 500, cut=True),
    "slow": Answer(**{**vars(said()), "delay": 3.0}),
    "no JSON": Answer(body=b"<html>hello</html>"),
    "half JSON": Answer(body=b'{"choices": [{"mess'),
    "no bytes": Answer(body=b""),
    "no choices": Answer(body={"choices": []}),
    "another form": Answer(body={"hello": "world"}),
    "a list": Answer(body=[1, 2]),
    "no message": Answer(body={"choices": [{"text": "x"}]}),
    "text is a number": Answer(body={"choices": [{"message": {"content": 7}}]}),
    "an error as a reply": Answer(body={"error": {"code": 502, "message": "upstream"}}),
    "ended by an error": said("", "error"),
}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_a_trouble_that_passes(trouble: Answer) -> None:
    with Endpoint(lambda body, n: trouble if n == 1 else said("fine")) as server:
        [reply] = ask(engine_at(server.url, timeout_s=1.0))
    assert isinstance(reply, Completion), reply
    assert reply.text == "fine" and len(server.asked) == 2


@pytest.mark.parametrize("name", ["500", "cut", "no JSON", "another form", "slow"])
def test_a_call_that_fails_for_ever_fails_alone(name: str) -> None:
    def script(body: dict[str, Any], n: int) -> Answer:
        return PASSING[name] if "bad" in body["messages"][0]["content"] else said("fine")

    with Endpoint(script) as server:
        first, bad, last = ask(engine_at(server.url, retries=2, timeout_s=0.5), "good", "bad", "better")
    assert isinstance(bad, EngineError) and "given up after 3 attempts" in str(bad)
    assert first.text == last.text == "fine" and len(server.asked) == 5


def test_a_refused_message_is_not_asked_again() -> None:
    with Endpoint(lambda body, n: refused(400, "content management policy", "content_filter")) as server:
        [error] = ask(engine_at(server.url))
    assert type(error) is EngineError and "content management policy" in str(error) and len(server.asked) == 1


def test_retry_after_holds_back_every_call() -> None:
    times: list[float] = []

    def script(body: dict[str, Any], n: int) -> Answer:
        times.append(time.monotonic())
        return refused(429, Retry_After="1") if n == 1 else said()

    async def work(engine: OpenAIEngine) -> list[Any]:
        first = asyncio.create_task(engine.chat(user("a"), COLD))
        while not times:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        return [await engine.chat(user("b"), COLD), await first]

    with Endpoint(script) as server:
        assert all(reply.text == "ok" for reply in using(engine_at(server.url), work))
    assert len(times) == 3 and all(1.0 <= t - times[0] < 4 for t in times[1:])


def test_an_overloaded_server_says_when_to_come_back() -> None:
    times: list[float] = []

    def script(body: dict[str, Any], n: int) -> Answer:
        times.append(time.monotonic())
        return refused(503, Retry_After="0.8") if n == 1 else said()

    with Endpoint(script) as server:
        assert ask(engine_at(server.url))[0].text == "ok"
    assert 0.8 <= times[1] - times[0] < 3


def test_names_that_an_engine_sets_itself() -> None:
    with Endpoint(lambda body, n: said()) as server:
        for name in ("seed", "n", "response_format"):
            [error] = ask(engine_at(server.url), sampling=Sampling(extra=((name, 1),)))
            assert type(error) is EngineError and name in str(error)
    assert server.asked == []


# --- the user's trouble -----------------------------------------------------------------------------------------------


def test_a_key_that_is_not_taken_stops_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Endpoint(lambda body, n: refused(401, f"Incorrect API key provided: {KEY[:9]}*****{KEY[-4:]}")) as server:
        engine = engine_at(server.url)

        async def work(engine: OpenAIEngine) -> list[Any]:
            first = await asyncio.gather(engine.chat(user("a"), COLD), return_exceptions=True)
            return first + await asyncio.gather(
                *(engine.chat(user("b"), COLD) for _ in range(5)), return_exceptions=True
            )

        errors = using(engine, work)
    assert len(server.asked) == 1 and {type(e) for e in errors} == {EngineStop}
    assert "LOOPBACK_KEY" in str(errors[0]) and server.url in str(errors[0])
    assert "sk-" not in caplog.text + "".join(map(repr, errors))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            refused(404, "The model `judge` does not exist", "model_not_found"),
            "does not serve 'judge'.*serves judgement",
        ),
        (refused(400, "model judge not found, try pulling it first"), "does not serve 'judge'.*serves judgement"),
        (Answer(404, b"404 page not found"), "404 page not found"),
        (refused(402, "Insufficient Balance"), "no credit left.*top it up"),
        (refused(429, "You exceeded your current quota", "insufficient_quota"), "no credit left"),
        (refused(405), "Check that base_url is the address"),
        (
            refused(400, "Unsupported value: 'temperature' does not support 0 with this model.", param="temperature"),
            r"'temperature'.*endpoint\.omit",
        ),
        (refused(429, "slow down", Retry_After="86400"), "requests a wait of 86400 s.*patience_s"),
    ],
)
def test_what_every_call_would_run_into_stops_the_engine(answer: Answer, message: str) -> None:
    with Endpoint(lambda body, n: answer, models=[{"id": "judgement"}]) as server:
        [error] = ask(engine_at(server.url))
        assert isinstance(error, EngineStop) and len(server.asked) == 1
        with pytest.raises(EngineStartError, match=message):
            using(engine_at(server.url, canary=True), lambda e: e.start())
    assert re.search(message, str(error)) and server.url in str(error)


def test_a_key_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with Endpoint(lambda body, n: said()) as server:
        monkeypatch.delenv("LOOPBACK_KEY")
        [error] = ask(engine_at(server.url))
        assert isinstance(error, EngineStartError) and "LOOPBACK_KEY is not set" in str(error)
        [reply] = ask(engine_at(server.url, api_key_env=None))
        assert reply.text == "ok"
        monkeypatch.setenv("LOOPBACK_KEY", f"{KEY} {KEY}")
        [error] = ask(engine_at(server.url))
        assert isinstance(error, EngineStartError) and KEY not in str(error)
        monkeypatch.setenv("LOOPBACK_KEY", f" {KEY}\n")  # as files of keys end
        [reply] = ask(engine_at(server.url))
        assert reply.text == "ok" and server.headers[-1]["Authorization"] == f"Bearer {KEY}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_an_address_where_nobody_is() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    begin = time.monotonic()
    errors = ask(engine_at(url, patience_s=1.0), *"abc")
    assert time.monotonic() - begin < 10
    assert {type(e) for e in errors} == {EngineStartError}
    assert url in str(errors[0]) and "Check base_url" in str(errors[0])


def test_an_address_that_never_answers() -> None:
    silent = Answer(**{**vars(said()), "delay": 30.0})
    with Endpoint(lambda body, n: silent) as server:
        begin = time.monotonic()
        with pytest.raises(EngineStartError, match="no reply in time"):
            using(engine_at(server.url, canary=True, timeout_s=20, patience_s=0.7, retries=99), lambda e: e.start())
        assert time.monotonic() - begin < 10


def test_an_endpoint_that_goes_away_stops_the_engine_and_no_row_is_blamed() -> None:
    gone = refused(503)
    with Endpoint(lambda body, n: said() if n <= 3 else gone) as server:
        engine = engine_at(server.url, retries=1, patience_s=1.5, concurrency=3)
        replies = ask(engine, *map(str, range(9)))
    stops = [str(r) for r in replies if type(r) is EngineStop]
    assert len(stops) == 6 and sum(isinstance(r, Completion) for r in replies) == 3
    assert "has not responded for" in stops[0] and "rerun the same command" in stops[0]


def test_a_web_page_is_no_endpoint() -> None:
    with Endpoint(lambda body, n: Answer(body=b"<html>welcome</html>")) as server:
        engine = engine_at(server.url, canary=True, retries=1)
        with pytest.raises(EngineStartError, match=r"<html>welcome.*Check that base_url is the address.*/v1"):
            using(engine, lambda e: e.start())


def test_a_closed_engine() -> None:
    with Endpoint(lambda body, n: said()) as server:
        engine = engine_at(server.url)
        ask(engine)
        [error] = ask(engine)
    assert isinstance(error, EngineDead)


# --- the form of replies ----------------------------------------------------------------------------------------------


def schemas(server: Endpoint) -> list[Any]:
    return [b["response_format"]["json_schema"]["schema"] if "response_format" in b else None for b in server.asked]


def test_a_schema_is_sent_as_it_is() -> None:
    with Endpoint(lambda body, n: said()) as server:
        ask(engine_at(server.url), sampling=Sampling(grammar=SCORE))
    assert schemas(server) == [SCORE.decoded()] and list(schemas(server)[0]["properties"]) == ["reason", "score"]
    assert server.asked[0]["response_format"]["json_schema"]["strict"] is True


def test_a_schema_that_is_refused_is_loosened_and_then_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def script(body: dict[str, Any], n: int) -> Answer:
        if "maxLength" in json.dumps(body):
            return refused(400, "Invalid schema for response_format 'reply': 'maxLength' is not permitted", param="x")
        return said()

    with Endpoint(script) as server:
        replies = ask(engine_at(server.url), *"abcd", sampling=Sampling(grammar=SCORE))
    assert all(r.text == "ok" for r in replies)
    loose = schemas(server)[-1]["properties"]
    assert loose == {"reason": {"type": "string"}, "score": {"type": "integer"}}
    assert caplog.text.count("without the schema's bounds") == 1

    caplog.clear()
    answer = refused(400, "response_format json_schema is not supported by this model")
    with Endpoint(lambda body, n: answer if "response_format" in body else said()) as server:
        engine = engine_at(server.url)
        replies = ask(engine, *"abcd", sampling=Sampling(grammar=SCORE))
        assert all(r.text == "ok" for r in replies) and schemas(server)[-1] is None
        assert caplog.text.count("are requested as text") == 1
        assert len(engine.notes) == 2 and "are requested as text" in engine.notes[-1]
        [error] = ask(engine_at(server.url, structured="schema"), sampling=Sampling(grammar=SCORE))
    assert (
        isinstance(error, EngineStop) and "rejects structured output" in str(error) and "structured: text" in str(error)
    )


def test_a_server_that_does_not_obey_is_found_out_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with Endpoint(lambda body, n: said("Sure! Green.")) as server:
        ask(engine_at(server.url, canary=True), sampling=Sampling(grammar=SCORE))
        assert schemas(server)[0] is not None and schemas(server)[1] is None
        assert "does not obey structured output" in caplog.text
        [error] = ask(engine_at(server.url, canary=True, structured="schema"))
        assert isinstance(error, EngineStartError) and "does not obey" in str(error)
    # A refusal in words that nobody has foreseen, and a model that was still thinking.
    with Endpoint(lambda body, n: refused(422, "nope") if "response_format" in body else said("Green.")) as server:
        [reply] = ask(engine_at(server.url, canary=True), sampling=Sampling(grammar=SCORE))
        assert reply.text == "Green." and [s is None for s in schemas(server)] == [False, True, True]
    with Endpoint(lambda body, n: said("", "length")) as server:
        ask(engine_at(server.url, canary=True), sampling=Sampling(grammar=SCORE))
        assert None not in schemas(server)
    with Endpoint(lambda body, n: said('{"verdict": "blue"}')) as server:
        ask(engine_at(server.url, canary=True), sampling=Sampling(grammar=SCORE))
        ask(engine_at(server.url, canary=True, structured="text"), sampling=Sampling(grammar=SCORE))
        assert [s is None for s in schemas(server)] == [False, False, True, True]


def test_choices_and_patterns_are_for_vllm() -> None:
    choice, regex = Grammar.choice(["yes", "no"]), Grammar.regex("[0-9]+")
    with Endpoint(lambda body, n: said(), models=[{"id": "judge", "owned_by": "vllm", "max_model_len": 64}]) as server:
        for grammar in (choice, regex):
            ask(engine_at(server.url), sampling=Sampling(grammar=grammar))
        ask(engine_at(server.url, structured="text"), sampling=Sampling(grammar=choice))
        assert [b.get("structured_outputs") for b in server.asked] == [
            {"choice": ["yes", "no"]},
            {"regex": "[0-9]+"},
            None,
        ]
        server.models = [{"id": "judge", "owned_by": "somebody"}]
        ask(engine_at(server.url), sampling=Sampling(grammar=choice))
        ask(engine_at(server.url, structured="vllm"), sampling=Sampling(grammar=choice))
        assert ["structured_outputs" in b for b in server.asked[3:]] == [False, True]


def test_the_name_of_the_limit_is_found_out() -> None:
    def script(body: dict[str, Any], n: int) -> Answer:
        if "max_tokens" in body:
            return refused(
                400,
                "Unsupported parameter: 'max_tokens' is not supported with this model. "
                "Use 'max_completion_tokens' instead.",
                param="max_tokens",
            )
        return said()

    with Endpoint(script) as server:
        replies = ask(engine_at(server.url), *"abc")
        assert [r.text for r in replies] == ["ok"] * 3 and server.asked[-1]["max_completion_tokens"] == 20
        [error] = ask(engine_at(server.url, max_tokens_name="max_tokens"))
        assert isinstance(error, EngineStop) and "'max_tokens'" in str(error)


TOO_LONG = (
    "This model's maximum context length is 64 tokens. However, you requested 20 output tokens and your prompt "
    "contains at least 70 input tokens, for a total of at least 90 tokens."
)


def test_a_prompt_that_is_too_long() -> None:
    with Endpoint(lambda body, n: refused(400, TOO_LONG)) as server:
        [error] = ask(engine_at(server.url))
    assert isinstance(error, PromptTooLong)
    assert (error.prompt_tokens, error.max_tokens, error.limit) == (70, 20, 64) and len(server.asked) == 1


def test_a_refusal_of_gemini_keeps_its_words(tmp_path: Path) -> None:
    words = "The input token count (90) exceeds the maximum number of tokens allowed (64)."
    body = [{"error": {"code": 400, "message": words, "status": "INVALID_ARGUMENT"}}]

    async def run(engine: OpenAIEngine) -> Any:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            call = log.bound(prompt_id(user("a")), "judge").chat(user("a"), COLD)
            return (await asyncio.gather(call, return_exceptions=True))[0]

    with Endpoint(lambda *_: Answer(400, body)) as server:
        error = using(engine_at(server.url), run)
    assert isinstance(error, PromptTooLong) and (error.prompt_tokens, error.limit) == (90, 64) and words in str(error)
    [row] = logged_calls(Folder(str(tmp_path))).to_pylist()
    assert (row["finish_reason"], row["prompt_tokens"], row["cached_tokens"]) == ("too_long", 90, 64)
    assert words in row["text"]


XAI = "This model's maximum prompt length is 64 but the request contains 90 tokens."
VERTEX = "Unable to submit request because the input token count is 90 but model only supports up to 64."
COHERE = "too many tokens: total number of tokens in the prompt cannot exceed 64 - received 90."
LONG_WORDS = {
    "xAI": (400, {"code": "invalid argument", "error": XAI}),
    "Vertex": (400, [{"error": {"code": 400, "message": VERTEX}}]),
    "GLM": (400, {"error": {"code": "1261", "message": "Prompt \u8d85\u957f"}}),
    "DashScope": (400, {"code": "InvalidParameter", "message": "Range of input length should be [1, 64]"}),
    "Moonshot": (400, {"error": {"message": "Your request exceeded model token limit: 64 (requested: 90)"}}),
    "Cohere": (400, {"message": COHERE}),
    "nginx": (413, b"<html><head><title>413</title></head><body><h1>413 Request Entity Too Large</h1></body></html>"),
    "text": (413, b"payload too large"),
    "other words": (400, b"your 90 tokens are more than the 64 that fit"),
}


@pytest.mark.parametrize("name", LONG_WORDS)
def test_a_prompt_that_is_too_long_for_many_servers(name: str, tmp_path: Path) -> None:
    status, body = LONG_WORDS[name]
    asked = user("x" * 300)

    async def run(engine: OpenAIEngine) -> Any:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            call = log.bound(prompt_id(asked), "judge").chat(asked, COLD)
            return (await asyncio.gather(call, return_exceptions=True))[0]

    with Endpoint(lambda *_: Answer(status, body), models=[{"id": "judge", "max_model_len": 64}]) as server:
        error = using(engine_at(server.url), run)
        assert len(server.asked) == 1
    assert isinstance(error, PromptTooLong) and error.limit == 64 and error.prompt_tokens >= 90
    [row] = logged_calls(Folder(str(tmp_path))).to_pylist()
    assert row["finish_reason"] == "too_long" and f"HTTP {status}" in row["text"]


# --- limits and money -------------------------------------------------------------------------------------------------


def test_no_more_at_once_than_allowed() -> None:
    with Endpoint(lambda body, n: Answer(**{**vars(said()), "delay": 0.05})) as server:
        assert len(ask(engine_at(server.url, concurrency=3), *map(str, range(12)))) == 12
    assert server.most_at_once == 3


class Clock:
    """Stands in for time in the module that spreads requests: it advances by what is slept there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(endpoint_retry, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(endpoint_retry, "asyncio", types.SimpleNamespace(**{**vars(asyncio), "sleep": self.sleep}))

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("settings", "share", "seconds"),
    [
        ({"requests_per_minute": 600}, 1, 9 * 0.1),
        ({"requests_per_minute": 1200}, 2, 9 * 0.1),
        # 36 tokens may be used and 15 are, which is known when the reply is there: gaps of 15 / 75 s, not of 36 / 75 s.
        ({"tokens_per_minute": 4500}, 1, 9 * 15 / 75),
    ],
)
def test_limits_per_minute(
    settings: dict[str, Any], share: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, times = Clock(monkeypatch), []

    def script(body: dict[str, Any], n: int) -> Answer:
        times.append(clock.now)  # with one call at a time, nobody sleeps while a request is under way
        return said()

    with Endpoint(script) as server:
        ask(engine_at(server.url, share=share, concurrency=1, **settings), *"abcdefghij")
    assert len(times) == 10 and times[-1] - times[0] == pytest.approx(seconds)


def test_the_budget_stops_cleanly_and_a_bigger_one_goes_on(tmp_path: Path) -> None:
    """Replies cost 15 each, and may cost 40; a budget of 100 leaves room for five and not for the sixth."""

    async def run(engine: OpenAIEngine) -> list[Any]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1, flush_seconds=0.05) as log:
            calls = (log.bound(prompt_id(user(str(i))), "judge").chat(user(str(i)), COLD) for i in range(12))
            return await asyncio.gather(*calls, return_exceptions=True)

    def answered(replies: list[Any]) -> int:
        assert {type(r) for r in replies} <= {Completion, BudgetSpent}
        return sum(isinstance(r, Completion) for r in replies)

    slow = Answer(**{**vars(said()), "delay": 0.05})
    with Endpoint(lambda body, n: slow) as server:

        def again(**settings: Any) -> tuple[OpenAIEngine, list[Any]]:
            engine = engine_at(server.url, prices=PRICES, concurrency=4, **settings)
            return engine, using(engine, run)

        engine, replies = again(budget=100.0)
        assert answered(replies) == len(server.asked) == 5 and engine.stats().cost == 75
        # Everything that was sent was answered, and everything that was answered is in the log.
        assert logged_calls(Folder(str(tmp_path))).num_rows == 5
        error = str(next(r for r in replies if isinstance(r, BudgetSpent)))
        assert "75 of 100 USD spent (5 calls" in error and "raise endpoint.budget" in error

        # The same budget is spent already: nothing is asked, and the log still answers.
        engine, replies = again(budget=100.0)
        assert answered(replies) == 5 and len(server.asked) == 5 and engine.stats().requests == 0

        _, replies = again(budget=150.0)
        assert answered(replies) == len(server.asked) == 8
        _, replies = again()
        assert answered(replies) == len(server.asked) == 12
    total = sum(json.loads(f.read_text())["calls"] for f in tmp_path.glob("spent-*/*.json"))
    assert total == 12


def test_the_budget_counts_all_engines_on_a_call_log(tmp_path: Path) -> None:
    async def run(server: Endpoint) -> list[Any]:
        engines = [engine_at(server.url, prices=PRICES, budget=300.0, concurrency=1) for _ in range(2)]

        async def use(engine: OpenAIEngine, shard: int) -> list[Any]:
            done = []
            async with LoggedEngine(engine, Folder(str(tmp_path)), shard, 2, flush_seconds=0.05) as log:
                for i in range(20):
                    call = log.bound(prompt_id(user(str(i))), "judge").chat(user(f"{shard} {i}"), COLD)
                    done += await asyncio.gather(call, return_exceptions=True)
            return done

        found = await asyncio.gather(*(use(engine, shard) for shard, engine in enumerate(engines)))
        for engine in engines:
            await engine.close()
        return [reply for replies in found for reply in replies]

    with Endpoint(lambda body, n: Answer(**{**vars(said()), "delay": 0.3})) as server:
        replies = asyncio.run(asyncio.wait_for(run(server), 60))
    answered = sum(isinstance(r, Completion) for r in replies)
    assert {type(r) for r in replies} == {Completion, BudgetSpent}
    # Alone each would have made 17; what the other spends within two seconds is all that it may go over by.
    assert 17 <= answered == len(server.asked) <= 17 + 14


def test_the_first_short_call_is_paid_from_the_budget_too() -> None:
    with Endpoint(lambda body, n: said('{"verdict": "blue"}')) as server:
        engine = engine_at(server.url, canary=True, prices=PRICES, budget=60.0)
        [error] = ask(engine)
        assert isinstance(error, BudgetSpent) and server.asked == []
        engine = engine_at(server.url, canary=True, prices=PRICES, budget=1000.0)
        ask(engine)
    assert engine.stats().cost == 30 and engine.cost(Completion("", "stop", 10, 5, 4)) == 15


UNREAD = {
    "filtered": (Answer(body={"choices": [], "usage": {"prompt_tokens": 300, "completion_tokens": 73}}), 373),
    "no choices": (Answer(body={"choices": []}), None),
    "null choices": (Answer(body={"choices": None, "usage": {"prompt_tokens": 12, "completion_tokens": 0}}), 12),
    "no JSON": (Answer(body=b"<html>hello</html>"), None),
    "half JSON": (Answer(body=b'{"choices": [{"mess'), None),
    "a list": (Answer(body=[1, 2]), None),
    "cut": (Answer(**{**vars(said("x" * 500)), "cut": True}), None),
    "an error as a reply": (Answer(body={"error": {"code": 500, "message": "upstream"}}), 0),
    "an error with usage": (
        Answer(body={"error": {"code": 500, "message": "up"}, "usage": {"prompt_tokens": 9, "completion_tokens": 1}}),
        10,
    ),
    "500": (refused(500), 0),
}
MOST = 16 + 20  # what a call may cost: the estimate of a prompt of two letters, and max_tokens


@pytest.mark.parametrize(("answer", "price"), UNREAD.values(), ids=UNREAD)
def test_a_reply_that_cannot_be_read_is_charged(answer: Answer, price: int | None, tmp_path: Path) -> None:
    """As the server says, or the most that it may have cost; also in what the stage and the run count."""
    price = MOST if price is None else price

    async def run(engine: OpenAIEngine) -> Any:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            replies = []
            for name in ("a", "b"):
                call = log.bound(prompt_id(user(name)), "judge").chat(user(name), COLD)
                replies += await asyncio.gather(call, return_exceptions=True)
            return [*replies, log.stats.cost]

    with Endpoint(lambda body, n: said("fine") if n == 2 else answer) as server:
        engine = engine_at(server.url, prices=PRICES, retries=1)
        reply, failed, cost = using(engine, run)
    assert reply.text == "fine" and isinstance(failed, EngineError)
    spent = engine.stats().cost
    assert spent == cost == 15 + 3 * price
    assert sum(PRICES.of(r["prompt_tokens"], 0, r["completion_tokens"]) for r in spent_files(tmp_path)) == spent


def spent_files(root: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in root.glob("spent-*/*.json")]


@pytest.mark.parametrize("name", ["filtered", "no JSON", "cut"])
def test_replies_that_cannot_be_read_stop_at_the_budget(name: str) -> None:
    """The server charges each of its replies as if it were read, and never more than the budget."""
    answer, price = UNREAD[name]
    with Endpoint(lambda body, n: answer) as server:
        engine = engine_at(server.url, prices=PRICES, budget=1000.0, retries=99, concurrency=4)
        errors = ask(engine, *map(str, range(20)))
        assert {type(e) for e in errors} == {BudgetSpent}
        charged = engine.stats().cost
        assert charged == len(server.asked) * (price or MOST)
    assert 500 < charged <= 1000 + (price or 0) * 4  # a server that charges more than the request allows


USAGES: list[Any] = [2**40, -(10**9), "1e400", "12", None, True, [], {}, 0.5e300, -0.5, "NaN"]


@pytest.mark.parametrize("value", USAGES, ids=repr)
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "cached_tokens"])
def test_usage_that_no_server_can_mean_is_replaced_and_noted(value: Any, name: str, tmp_path: Path) -> None:
    cached = {"prompt_tokens_details": {name: value}} if name == "cached_tokens" else {name: value}
    usage = json.dumps({"prompt_tokens": 10, "completion_tokens": 5, **cached})
    usage = usage.replace('"1e400"', "1e400").replace('"NaN"', "NaN")
    body = f'{{"choices": [{{"message": {{"content": "abcdef"}}, "finish_reason": "stop"}}], "usage": {usage}}}'

    async def run(engine: OpenAIEngine) -> list[Any]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            calls = (log.bound(prompt_id(user(t)), "judge").chat(user(t), COLD) for t in ("hello", "world"))
            return await asyncio.gather(*calls, return_exceptions=True)

    with Endpoint(lambda *_: Answer(body=body.encode())) as server:
        engine = engine_at(server.url, prices=PRICES)
        replies = using(engine, run)
    for reply in replies:
        assert isinstance(reply, Completion), reply
        assert (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (
            17 if name == "prompt_tokens" else 10,
            3 if name == "completion_tokens" else 5,
            0,
        )
    assert logged_calls(Folder(str(tmp_path))).num_rows == 2 and engine.stats().cost > 0
    noted = [note for note in engine.notes if name in note]
    assert len(noted) == (0 if name == "cached_tokens" and value is None else 1)


@pytest.mark.parametrize("usage", [[], "12", 7, [{"prompt_tokens": 1}]], ids=repr)
def test_usage_in_another_form_is_replaced_and_noted_once(usage: Any) -> None:
    body = {"choices": [{"message": {"content": "abcdef"}}], "usage": usage}
    with Endpoint(lambda *_: Answer(body=body)) as server:
        engine = engine_at(server.url, prices=PRICES)
        replies = ask(engine, "hello", "world")
    assert {(r.prompt_tokens, r.completion_tokens) for r in replies} == {(17, 3)} and engine.stats().cost == 40
    assert len(engine.notes) == 1 and "usage" in engine.notes[0]


def test_zero_tokens_of_a_reply_with_text_are_no_figure() -> None:
    zero = {"prompt_tokens": 0, "completion_tokens": 0}
    with Endpoint(lambda body, n: Answer(body={**said("abcdef" if n == 1 else "").body, "usage": zero})) as server:
        engine = engine_at(server.url, concurrency=1)
        replies = ask(engine, "hello", "world")
    assert [(r.prompt_tokens, r.completion_tokens) for r in replies] == [(17, 3), (17, 0)]


def test_an_error_with_impossible_usage_is_charged_the_most() -> None:
    error = {"error": {"code": 400, "message": "no"}, "usage": {"prompt_tokens": -5, "completion_tokens": 2**40}}
    with Endpoint(lambda *_: Answer(body=error)) as server:
        engine = engine_at(server.url, prices=PRICES)
        [failed] = ask(engine, "a")
    assert type(failed) is EngineError and failed.unread_cost == engine.stats().cost == MOST


@pytest.mark.parametrize("logprob", [float("nan"), 1e400, 1000.0, "x", None, True, [], {"a": 1}, 2**40, 0.5], ids=repr)
@pytest.mark.parametrize("where", ["sampled", "other", "missing"])
def test_log_probabilities_that_are_none_are_left_out_and_the_reply_is_kept(logprob: Any, where: str) -> None:
    other = {"token": "8", "logprob": logprob if where == "other" else -1.0}
    step = {"token": "7", "logprob": logprob if where == "sampled" else -0.1, "top_logprobs": [other]}
    if where == "missing":
        del step["token"]
    body = said("7").body
    body["choices"][0]["logprobs"] = {"content": [step]}
    with Endpoint(lambda *_: Answer(body=json.dumps(body).replace("Infinity", "1e400").encode())) as server:
        engine = engine_at(server.url)
        replies = ask(engine, "a", "b", sampling=Sampling(max_tokens=20, logprobs=2))
        assert len(server.asked) == 2
    assert [(r.text, r.logprobs) for r in replies] == [("7", None)] * 2
    assert len(engine.notes) == 1 and "log-probabilities" in engine.notes[0]


def test_log_probabilities_at_the_ends_of_their_range() -> None:
    steps = [
        {"token": "7", "logprob": 1e-6, "top_logprobs": [{"token": "8", "logprob": -(10**400)}]},
        {"token": "x", "logprob": -1e400, "top_logprobs": None},
    ]
    body = said("7").body
    body["choices"][0]["logprobs"] = {"content": steps}
    text = json.dumps(body).replace("-Infinity", "-1e400")
    with Endpoint(lambda *_: Answer(body=text.encode())) as server:
        [reply] = ask(engine_at(server.url), sampling=Sampling(max_tokens=20, logprobs=2))
    assert reply.logprobs == [[("7", 0.0), ("8", -9999.0)], [("x", -9999.0)]]


def test_the_bill_of_a_server_with_every_fault_is_exact(tmp_path: Path) -> None:
    """What the server charges is what the engine, the stage and the account count, within the budget."""
    faults = [
        UNREAD["filtered"],
        UNREAD["null choices"],
        UNREAD["an error with usage"],
        (refused(500), 0),
        (refused(429, Retry_After="0.01"), 0),
        (refused(400, "content management policy", "content_filter"), 0),
        (refused(400, TOO_LONG), 0),
        (said("fine"), 15),
        (said("fine", prompt=30, new=1), 31),
    ]
    bill: list[int] = []

    def script(body: dict[str, Any], n: int) -> Answer:
        # One prompt fails at every attempt; which attempts of the others meet which fault depends on their timing.
        answer, price = (refused(500), 0) if body["messages"][-1]["content"] == "7" else faults[n % len(faults)]
        bill.append(price)
        return answer

    async def run(engine: OpenAIEngine) -> Any:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            calls = (log.bound(prompt_id(user(str(i))), "judge").chat(user(str(i)), COLD) for i in range(80))
            return await asyncio.gather(*calls, return_exceptions=True), log.stats.cost

    with Endpoint(script) as server:
        engine = engine_at(server.url, prices=PRICES, budget=3000.0, retries=2, concurrency=4)
        replies, cost = using(engine, run)
    assert {type(r) for r in replies} == {Completion, CallFailed, EngineError, PromptTooLong, BudgetSpent}
    spent = sum(PRICES.of(r["prompt_tokens"], 0, r["completion_tokens"]) for r in spent_files(tmp_path))
    assert sum(bill) == engine.stats().cost == spent
    # A call that the budget ended between two attempts has no row to carry its cost; the account has it.
    assert cost <= spent <= 3000 + 4 * 373


def test_figures_in_another_type_are_read() -> None:
    usage = {
        "prompt_tokens": 12.0,
        "completion_tokens": 3,
        "prompt_tokens_details": None,
        "prompt_cache_hit_tokens": 99,
    }
    body = {"choices": [{"message": {"content": "abc"}}], "usage": usage}
    with Endpoint(lambda *_: Answer(body=body)) as server:
        engine = engine_at(server.url)
        [reply] = ask(engine)
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (12, 3, 12) and engine.notes == []


def test_cached_tokens_have_their_price() -> None:
    prices = Prices(input=2.0, cached_input=0.5, output=8.0)
    assert prices.of(1_000_000, 400_000, 250_000) == pytest.approx(0.6 * 2 + 0.4 * 0.5 + 0.25 * 8)


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_log_no_file_and_no_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    """A server that throws the key back at us in everything that it says about errors."""
    caplog.set_level(logging.DEBUG)
    echo = f"Authorization was Bearer {KEY}"
    troubles = [
        refused(500, echo),
        Answer(body=echo.encode()),
        Answer(body={echo: echo}),
        refused(429, echo),
        refused(503, echo),
        Answer(502, echo.encode()),
        said("fine"),
        refused(400, echo),
        refused(400, f"{TOO_LONG} {echo}"),
        refused(400, f"response_format is not supported. {echo}"),
        refused(400, f"response_format is not supported. {echo}"),
        said("finer"),
        refused(404, echo),
    ]

    async def run(engine: OpenAIEngine) -> list[Any]:
        found: list[Any] = []
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1, flush_seconds=0.05) as log:
            for i in range(6):
                call = log.bound(prompt_id(user(str(i))), "judge").chat(user(str(i)), Sampling(grammar=SCORE))
                found += await asyncio.gather(call, return_exceptions=True)
        return found

    with Endpoint(lambda body, n: troubles[n - 1], models=Answer(500, echo.encode())) as server:
        engine = engine_at(server.url)
        found = using(engine, run)
        assert len(server.asked) == len(troubles)
    kinds = [Completion, EngineError, PromptTooLong, Completion, EngineStop, EngineStop]
    assert [type(f) for f in found] == kinds
    shown = [caplog.text, *capfd.readouterr(), repr(engine), repr(engine.spec), str(engine.spec), repr(engine.identity)]
    for error in found:
        while error is not None:
            shown += [repr(error), str(error)]
            error = getattr(error, "__cause__", None)
    rows = logged_calls(Folder(str(tmp_path))).to_pylist()
    assert [row["text"] for row in rows if row["finish_reason"] == "stop"] == ["fine", "finer"]
    files = [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    assert KEY not in "\n".join([*shown, repr(rows), *files])
    assert "***" in caplog.text  # it would have been there


# --- with the call log in front ---------------------------------------------------------------------------------------


def test_a_second_pass_asks_nobody(tmp_path: Path) -> None:
    async def run(engine: OpenAIEngine) -> list[Any]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            calls = (log.bound(prompt_id(user(t)), "judge").chat(user(t), COLD) for t in "abc")
            return [reply.text for reply in await asyncio.gather(*calls)] + [log.stats.calls_engine, log.stats.cost]

    with Endpoint(lambda body, n: said(body["messages"][0]["content"].upper())) as server:
        assert using(engine_at(server.url, prices=PRICES), run) == ["A", "B", "C", 3, 45.0]
    # The server is gone, the key too, and another key or limit is no other model.
    assert using(engine_at(server.url, api_key_env="ELSEWHERE", retries=0), run) == ["A", "B", "C", 0, 0.0]
