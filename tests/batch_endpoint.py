"""An OpenAI-compatible server on loopback that also takes batches: `/v1/files` and `/v1/batches`, from a script."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from aiohttp import web

from tests.endpoint import Endpoint


@dataclasses.dataclass
class Made:
    """A batch that the server was asked for.

    Attributes:
        calls: `custom_id`s and bodies, in the order of the file.
        looks: how often its state was asked for.
    """

    id: str
    calls: list[tuple[str, dict[str, Any]]]
    file: str
    looks: int = 0
    answered: set[str] = dataclasses.field(default_factory=set)
    status: str = "validating"
    output: str | None = None
    errors: str | None = None


class BatchEndpoint(Endpoint):
    """Its script answers the calls of batches too, numbered on. Replies are in reverse order.

    Attributes:
        batches: those that were made.
        paid: calls of batches that were answered.
        ends: status with which a batch ends, by its number from 0; default: completed.
        looks: how often a batch is looked at before it ends.
        skip: calls by number from 0 over all batches that a batch leaves out (it then ends as expired).
        fault: what a batch that ends as failed says.
        lists: whether there is a list of batches.
        together: whether it is like Together: another upload, capital letters, a job in an object, no pages.
        hide: batches whose making is answered with a broken connection, by number from 0.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.batches: list[Made] = []
        self.files: dict[str, bytes] = {}
        self.paid: list[dict[str, Any]] = []
        self.ends: dict[int, str] = {}
        self.looks = 1
        self.skip: set[int] = set()
        self.fault: dict[str, Any] = {}
        self.lists = True
        self.together = False
        self.hide: set[int] = set()
        self._names = itertools.count(1)

    def _route(self, router: web.UrlDispatcher) -> None:
        super()._route(router)
        router.add_post("/v1/files/upload" if self.together else "/v1/files", self._upload)
        router.add_get("/v1/files/{id}/content", self._download)
        router.add_post("/v1/batches", self._make)
        router.add_get("/v1/batches", self._list_batches)
        router.add_get("/v1/batches/{id}", self._look)

    def _file(self, content: bytes) -> str:
        name = f"file-{next(self._names)}"
        self.files[name] = content
        return name

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        file = form["file"]
        if self.together:
            assert (form["file_name"], form["file_type"]) == (getattr(file, "filename", ""), "jsonl")
        assert (
            form["purpose"] == ("batch-api" if self.together else "batch")
            and isinstance(file, web.FileField)
            and file.filename.endswith(".jsonl")
        )
        return web.json_response({"id": self._file(file.file.read()), "object": "file"})

    async def _download(self, request: web.Request) -> web.StreamResponse:
        content = self.files.get(request.match_info["id"])
        if content is None:
            return web.json_response({"error": {"message": "no such file"}}, status=404)
        return web.Response(body=content, content_type="application/octet-stream")

    async def _make(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        calls = []
        for line in self.files[asked["input_file_id"]].decode().splitlines():
            row = json.loads(line)
            assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
            calls.append((row["custom_id"], row["body"]))
        assert len({name for name, _ in calls}) == len(calls)
        made = Made(f"batch_{len(self.batches)}", calls, asked["input_file_id"])
        self.batches.append(made)
        if len(self.batches) - 1 in self.hide:
            assert request.transport is not None
            request.transport.close()
        return web.json_response({"job": self._shown(made)} if self.together else self._shown(made))

    async def _list_batches(self, request: web.Request) -> web.StreamResponse:
        if not self.lists:
            return web.Response(status=404, text="404 page not found")
        if self.together:
            return web.json_response([self._shown(made) for made in self.batches])
        after = request.query.get("after")
        ids = [made.id for made in self.batches]
        rest = self.batches[ids.index(after) + 1 if after else 0 :]
        page = rest[:1]  # pages of one
        return web.json_response({"data": [self._shown(made) for made in page], "has_more": len(rest) > 1})

    async def _look(self, request: web.Request) -> web.StreamResponse:
        made = next((made for made in self.batches if made.id == request.match_info["id"]), None)
        if made is None:
            return web.json_response({"error": {"message": "no such batch"}}, status=404)
        made.looks += 1
        made.status = "in_progress" if made.looks <= self.looks else made.status
        if made.looks > self.looks and made.output is None and made.errors is None:
            self._end_batch(made)
        return web.json_response(self._shown(made))

    def _end_batch(self, made: Made) -> None:
        number = self.batches.index(made)
        before = sum(len(other.calls) for other in self.batches[:number])
        made.status = self.ends.get(
            number, "expired" if self.skip & set(range(before, before + len(made.calls))) else ""
        )
        made.status = made.status or "completed"
        good, bad = list[dict[str, Any]](), list[dict[str, Any]]()
        for place, (name, body) in enumerate(made.calls):
            if made.status == "failed" or before + place in self.skip:
                continue
            answer = self.script(body, len(self.asked) + len(self.paid) + 1)
            assert answer is not None
            row = {"id": "r", "custom_id": name, "response": {"status_code": answer.status, "body": answer.body}}
            (good if answer.status == 200 else bad).append({**row, "error": None})
            if answer.status == 200:
                self.paid.append(body)
        lines = ("\n".join(json.dumps(row) for row in reversed(rows)).encode() for rows in (good, bad))
        made.output, made.errors = (self._file(content) if content else None for content in lines)

    def _shown(self, made: Made) -> dict[str, Any]:
        return {
            "id": made.id,
            "object": "batch",
            "status": made.status.upper() if self.together else made.status,
            "input_file_id": made.file,
            "output_file_id": made.output,
            "error_file_id": made.errors,
            "errors": {"object": "list", "data": [self.fault]} if made.status == "failed" else None,
        }
