"""Requests to servers that never finish, send too much, or send the client elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines import endpoint_connection, endpoint_retry
from ray_pipeline.engines.base import Completion, EngineError, EngineStartError, EngineStop, Sampling
from ray_pipeline.engines.endpoint_transports import environment_proxy
from ray_pipeline.engines.openai import OpenAIEngine
from tests.endpoint import KEY, Answer, Endpoint, said, using
from tests.engines.test_openai_engine import COLD, ask, engine_at
from tests.scripted import user


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setattr(endpoint_retry, "_BACKOFF_SECONDS", 0.01)


@pytest.mark.parametrize(
    ("name", "value", "transport"),
    [
        ("ALL_PROXY", "socks5://user:hunter2@127.0.0.1:1", "aiohttp"),
        ("ALL_PROXY", "socks5://user:hunter2@127.0.0.1:1", "httpx"),
        ("SSL_CERT_FILE", "/no/such.pem", "httpx"),
        ("HTTPS_PROXY", "ftp://x", "httpx"),
    ],
)
def test_an_environment_that_allows_no_connection_is_named(
    name: str, value: str, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv(name, value)
    with Endpoint(lambda body, n: said()) as server:
        [error] = ask(engine_at(server.url, transport=transport))
    assert isinstance(error, EngineStartError) and server.asked == [] and "hunter2" not in str(error)
    assert f"no HTTP connection to {server.url} can be made here" in str(error) and name in str(error)


@pytest.mark.parametrize("status", [200, 500])
def test_a_dripping_body_ends_at_the_time_limit(status: int) -> None:
    drip = Answer(status, said("x" * 500).body, pause=0.05)
    with Endpoint(lambda body, n: drip if "slow" in body["messages"][0]["content"] else said()) as server:
        slow, fast = ask(engine_at(server.url, timeout_s=0.6, retries=1), "slow", "fast")
    assert server.sent < len(drip.bytes())  # in both attempts together
    assert isinstance(slow, EngineError) and "given up after 2 attempts" in str(slow)
    assert isinstance(fast, Completion)


def test_a_list_of_models_that_never_ends_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_connection, "_REPLY_BYTES", 1 << 20)
    drip = Answer(body={"data": [{"id": "judge" * 50}]}, pause=0.05)
    endless = Answer(body=b" " * (1 << 18), repeat=4000)
    for models in (drip, endless):
        with Endpoint(lambda body, n: said("fine"), models=models) as server:
            begin = time.monotonic()
            [reply] = ask(engine_at(server.url, timeout_s=0.6))
        assert isinstance(reply, Completion) and time.monotonic() - begin < 20 and server.sent < 100 << 20


@contextlib.asynccontextmanager
async def raw_server(piece: bytes, first: bytes = b"") -> AsyncIterator[str]:
    """The base URL of a server that answers every request with `first` and then `piece` for ever."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(first)
            while not writer.is_closing():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("piece", "first"),
    [
        (b"X-Header: 1\r\n", b"HTTP/1.1 200 OK\r\n"),
        (b"X", b"HTTP/1.1 200 OK\r\nX-Long: "),
        (b"HTTP/1.1 102 Processing\r\n\r\n", b""),
        (b"HTTP", b""),
    ],
    ids=["endless headers", "an endless header", "endless interim responses", "no HTTP"],
)
def test_endless_headers_end_at_the_time_limit(piece: bytes, first: bytes) -> None:
    async def work() -> Any:
        async with raw_server(piece, first) as url:
            engine = engine_at(url, timeout_s=0.5, retries=1, patience_s=1.5)
            try:
                return (await asyncio.gather(engine.chat(user("a"), COLD), return_exceptions=True))[0]
            finally:
                await engine.close()

    begin = time.monotonic()
    error = asyncio.run(asyncio.wait_for(work(), 20))
    assert isinstance(error, EngineError | EngineStop) and time.monotonic() - begin < 15


def test_a_body_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_connection, "_REPLY_BYTES", 1 << 20)
    endless = Answer(body=b" " * (1 << 18), repeat=4000)
    bomb = Answer(body=gzip.compress(b" " * (64 << 20)), headers={"Content-Encoding": "gzip"})
    for answer in (endless, bomb):
        with Endpoint(lambda body, n, answer=answer: answer) as server:
            [error] = ask(engine_at(server.url, retries=0))
        assert isinstance(error, EngineError) and "longer than" in str(error) and server.sent < 100 << 20
    long = Answer(400, b"x" * (1 << 20), repeat=1000)
    with Endpoint(lambda body, n: long) as server:
        [error] = ask(engine_at(server.url))
    assert type(error) is EngineError and str(error).startswith("HTTP 400: xxx") and server.sent < 100 << 20


def test_a_reply_with_many_alternatives_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_connection, "_REPLY_BYTES", 0)
    other = [{"token": "x" * 20, "logprob": -1.0, "bytes": list(range(20))}] * 20
    steps = [{"token": "y", "logprob": -0.1, "top_logprobs": other}] * 50
    body = said("y" * 50).body
    body["choices"][0]["logprobs"] = {"content": steps}
    with Endpoint(lambda *_: Answer(body=body)) as server:
        [reply] = ask(engine_at(server.url), sampling=Sampling(max_tokens=50, logprobs=20))
    assert isinstance(reply, Completion) and reply.logprobs is not None and len(reply.logprobs) == 50


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("canary", [False, True])
def test_no_prompt_follows_a_redirect(status: int, canary: bool) -> None:
    with Endpoint(lambda body, n: said()) as elsewhere:
        target = f"{elsewhere.url}/chat/completions"
        there = Answer(status, headers={"Location": target})
        with Endpoint(lambda body, n: there, models=Answer(status, headers={"Location": elsewhere.url})) as server:
            [error] = ask(engine_at(server.url, canary=canary), "private")
        assert elsewhere.asked == []
    assert isinstance(error, EngineStop) and target in str(error) and "base_url" in str(error)


def test_the_account_of_openai_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "")
    with Endpoint(lambda body, n: said()) as server:
        ask(engine_at(server.url))
    assert server.headers[0]["OpenAI-Organization"] == "org-1" and "OpenAI-Project" not in server.headers[0]


def test_a_server_without_keys_gets_none() -> None:
    with Endpoint(lambda body, n: said()) as server:
        ask(engine_at(server.url, api_key_env=None))
    assert "Authorization" not in server.headers[0]


def test_numbers_of_any_length_are_read() -> None:
    body = json.dumps(said("fine").body)[:-1] + ', "created": ' + "9" * 5000 + "}"

    async def work(engine: OpenAIEngine) -> Any:
        return await engine.chat(user("a"), COLD)

    with Endpoint(lambda *_: Answer(body=body.encode())) as server:
        assert using(engine_at(server.url), work).text == "fine"


@pytest.mark.parametrize("transport", ["aiohttp", "httpx"])
def test_the_proxy_is_that_of_the_environment(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    settings = {"transport": transport, "patience_s": 0.5, "timeout_s": 2}
    with Endpoint(lambda body, n: said("from the proxy")) as server:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
        [reply] = ask(engine_at("http://model.invalid/v1", **settings))
        assert isinstance(reply, Completion) and reply.text == "from the proxy"
        assert server.headers[0]["Host"] == "model.invalid" and server.headers[0]["Authorization"] == f"Bearer {KEY}"
        monkeypatch.setenv("no_proxy", "model.invalid")
        [error] = ask(engine_at("http://model.invalid/v1", **settings))
        assert isinstance(error, EngineStop) and len(server.asked) == 1


def test_proxies_by_scheme_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert environment_proxy("https://example.org/v1") is None
    monkeypatch.setenv("https_proxy", "proxy.local:3128")
    assert environment_proxy("https://example.org/v1") == "http://proxy.local:3128"
    assert environment_proxy("http://example.org/v1") is None
    monkeypatch.setenv("no_proxy", "localhost,.example.org,::1")
    assert environment_proxy("https://api.example.org/v1") is None
    assert environment_proxy("https://[::1]:8000/v1") is None
    monkeypatch.setenv("all_proxy", "socks5://proxy.local:1080")
    with pytest.raises(ValueError, match=r"socks5 proxy for .*; set endpoint\.transport: httpx"):
        environment_proxy("http://other.org/v1")


def test_an_entry_of_netrc_does_not_replace_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with Endpoint(lambda body, n: said()) as server:
        ask(engine_at(server.url), "a")
        ask(engine_at(server.url, api_key_env=None), "b")
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}" and "Authorization" not in server.headers[1]


def test_the_other_client_obeys_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_connection, "_REPLY_BYTES", 1 << 20)
    endless = Answer(body=b" " * (1 << 18), repeat=4000)
    with Endpoint(lambda body, n: endless if n == 1 else said("x" * 500)) as server:
        [error] = ask(engine_at(server.url, transport="httpx", retries=0))
        assert isinstance(error, EngineError) and "longer than" in str(error)
        [reply] = ask(engine_at(server.url, transport="httpx"))
        assert reply.text == "x" * 500
    first, second = server.asked
    assert first == second and server.headers[0]["Content-Type"] == "application/json"
