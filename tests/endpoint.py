"""An OpenAI-compatible server on loopback whose replies come from a script: for tests of what goes wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import threading
import zlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import ClientSession, TCPConnector, web

from ray_pipeline.engines.openai import OpenAIEngine

KEY = "sk-loopback-0123456789abcdef"


@dataclasses.dataclass
class Answer:
    """One HTTP response.

    Attributes:
        cut: the connection is closed after half of the body.
        pause: seconds between two bytes of the body.
        repeat: how often the body is sent.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False
    pause: float = 0.0
    repeat: int = 1

    def bytes(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


#: (request body, number of this request from 1) → the answer; None: what the script does not say is forwarded.
Script = Callable[[dict[str, Any], int], Answer | None]


def said(text: str | None = "ok", finish: str = "stop", prompt: int = 10, new: int = 5, **message: Any) -> Answer:
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return Answer(body={"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


def opinion(body: dict[str, Any], number: int) -> Answer:
    """A stand-in for models: a generator whose responses have 2 to 10 words, and judges who like many words.

    Every reply follows from the request alone: a score is the number of words of the response, at most 10, for some
    judges one less.
    """
    text = "\n".join(str(message["content"]) for message in body["messages"])
    chance = zlib.crc32(f"{text}{body.get('seed')}".encode())
    if "response_format" not in body:
        return said(" ".join(["Answer", f"{chance % 1000}", *["indeed"] * (chance % 9)]))
    response = re.search(r"<response [^>]*>\n(.*?)\n</response", text, re.DOTALL)
    words = len((response[1] if response else text).split())
    score = max(1, min(10, words) - zlib.crc32(text[-320:].encode()) % 2)
    values = {"string": "by its number of words", "boolean": False, "integer": score}
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    return said(
        json.dumps({name: field.get("enum", [values.get(field["type"])])[-1] for name, field in fields.items()})
    )


def refused(status: int, message: str = "no", code: Any = None, param: str | None = None, **headers: str) -> Answer:
    error = {"message": message, "type": "invalid_request_error", "code": code, "param": param}
    return Answer(status, {"error": error}, {k.replace("_", "-"): v for k, v in headers.items()})


def using(engine: OpenAIEngine, work: Callable[[OpenAIEngine], Awaitable[Any]], seconds: float = 60) -> Any:
    """What some work with an engine gives; the engine is closed afterwards, on the same event loop."""

    async def go() -> Any:
        try:
            return await asyncio.wait_for(work(engine), seconds)
        finally:
            await engine.close()

    return asyncio.run(go())


class Endpoint:
    """Serves `/v1/chat/completions` and `/v1/models` from a thread of its own, so that other processes can ask too.

    Args:
        script: what a request for a reply is answered with.
        models: entries of the list of models; an Answer instead; None: there is no such list.
        behind: base URL of a server that gets what the script leaves to it: then this is a proxy.
        host: the address at which it serves.
    """

    def __init__(
        self, script: Script, *, models: Any = None, behind: str | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.script, self.models, self.behind, self._host = script, models, behind, host
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.clients: set[str | None] = set()  # addresses
        self.sent = 0  # bytes of bodies that drip or repeat
        self.most_at_once = self._at_once = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._port = 0
        self._end: asyncio.Event | None = None

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._end is not None and self._loop is not None
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        self._route(app.router)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, self._host, 0)
        await site.start()
        self._port = runner.addresses[0][1]
        # One connection a request: the server behind may close an idle one just as it would be used again.
        async with ClientSession(connector=TCPConnector(force_close=True)) as self._session:
            self._started.set()
            await self._end.wait()
        await runner.cleanup()

    def _route(self, router: web.UrlDispatcher) -> None:
        router.add_post("/v1/chat/completions", self._chat)
        router.add_get("/v1/models", self._list)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        self.clients.add(request.remote)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = self.script(body, len(self.asked))
            if answer is None:
                answer = await self._forward(body)
            await asyncio.sleep(answer.delay)
            return await self._send(request, answer)
        finally:
            self._at_once -= 1

    async def _forward(self, body: dict[str, Any]) -> Answer:
        assert self.behind is not None, "the script has no answer, and there is no server behind"
        async with self._session.post(f"{self.behind}/chat/completions", json=body) as response:
            return Answer(response.status, await response.read())

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if isinstance(self.models, Answer):
            return await self._send(request, self.models)
        if self.models is None and self.behind is not None:
            async with self._session.get(f"{self.behind}/models") as response:
                return await self._send(request, Answer(response.status, await response.read()))
        if self.models is None:
            return web.Response(status=404, text="404 page not found")
        return await self._send(request, Answer(body={"object": "list", "data": self.models}))

    async def _send(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        body = answer.bytes()
        if answer.pause or answer.repeat > 1:
            return await self._drip(request, answer)
        if not answer.cut:
            return web.Response(
                status=answer.status, body=body, headers={"Content-Type": "application/json", **answer.headers}
            )
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": "application/json"})
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    async def _drip(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        body = answer.bytes()
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": "application/json"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(answer.repeat):
                for piece in [bytes([byte]) for byte in body] if answer.pause else [body]:
                    await response.write(piece)
                    self.sent += len(piece)
                    await asyncio.sleep(answer.pause)
        return response
