"""HTTP requests to one endpoint.

- ``timeout_s`` bounds a whole request, from connecting to the last byte of the reply.
- Bodies are read up to a limit.
- Redirects are not followed: they would take prompts and the API key to another address.
- The API key is read from the environment when the engine starts. It is in no setting, no identity and no message.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from ray_pipeline.engines.account import Used
from ray_pipeline.engines.base import EngineError, EngineStartError, EngineStop, Sampling
from ray_pipeline.engines.endpoint_errors import Again, Asked, clean, refusal
from ray_pipeline.engines.endpoint_replies import Charge, ServedModels, reported_usage
from ray_pipeline.engines.endpoint_settings import STRUCTURED, OpenAISpec
from ray_pipeline.engines.endpoint_transports import Response, Transport, transport
from ray_pipeline.engines.lifetime import Lifetime
from ray_pipeline.store.files import Folder
from ray_pipeline.store.outside import json_integer

_REPLY_BYTES = 16 << 20  # limit of a body beside the reply's tokens, and of the list of models
_TOKEN_BYTES = 1 << 10  # limit for each token and each of its alternatives
_ERROR_BYTES = 1 << 20  # what is read of an error body

#: Request header -> environment variable, as OpenAI's own client sends them.
_ACCOUNT_HEADERS = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}

Refuse = Callable[[int, Mapping[str, str], str], Exception]
"""The exception for a refused request, from status, headers and body."""


class _TooLarge(Exception):
    """A body exceeds its limit."""


class Connection:
    """Sends requests and returns JSON; raises the exception that fits whatever else comes back.

    Attributes:
        key: the API key; None if there is none, or before :meth:`open`.
        requests: number of requests for replies.
        answered: number of replies.
        models: the endpoint's list of models, once read.
    """

    def __init__(self, spec: OpenAISpec, lifetime: Lifetime) -> None:
        self._spec, self._settings, self._lifetime = spec, spec.endpoint, lifetime
        self._transport: Transport | None = None
        self.key: str | None = None
        self.requests = self.answered = 0
        self.models = ServedModels()

    def open(self) -> None:
        """Read the key and prepare the client; no request is made.

        Raises:
            EngineStartError: no key, or no client can be made with the proxies and certificates of the environment.
        """
        self.key = self._read_key()
        headers = {header: os.environ[name] for header, name in _ACCOUNT_HEADERS.items() if os.environ.get(name)}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            self._transport = transport(self._settings, headers)
        except Exception as error:  # of the environment: a proxy without its package, a missing file of certificates
            raise EngineStartError(
                f"no HTTP connection to {self._settings.address} can be made here "
                f"({clean(f'{type(error).__name__}: {error}', self.key)}); check the environment variables HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR where the engine runs"
            ) from None

    def _read_key(self) -> str | None:
        name = self._settings.api_key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            raise EngineStartError(
                f"the environment variable {name} is not set where the engine runs; set it to the API key of "
                f"{self._settings.address} before the run (on a cluster: before `ray start` on every node, or in the "
                "job's runtime environment), or set endpoint.api_key_env: null for a server without keys"
            )
        if not re.fullmatch(r"[!-~]+", key):  # an HTTP library's error would quote the header, and so the key
            raise EngineStartError(
                f"the environment variable {name} contains blanks or other characters that no API key has; fix it"
            )
        return key

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.close()

    async def post(
        self, body: Mapping[str, Any], sampling: Sampling, prompt_tokens: int, charge: Charge, *, starting: bool
    ) -> Any:
        """One request for a reply; `starting` marks the short call at the start."""
        parameters = body.keys() - {"messages"}
        asked = Asked(
            parameters=parameters,
            structured=bool(STRUCTURED & parameters),
            prompt_tokens=prompt_tokens,
            max_tokens=sampling.max_tokens,
            limit=self.models.context,
            roles=[message["role"] for message in body["messages"]],
        )
        refused = functools.partial(self._refusal, asked)
        self.requests += 1
        value = await self._reply(
            {"model": self._spec.model, **body},
            refused,
            starting=starting,
            most_bytes=_REPLY_BYTES + _TOKEN_BYTES * sampling.max_tokens * (1 + (sampling.logprobs or 0)),
            unread=lambda: charge(Used(1, prompt_tokens, 0, sampling.max_tokens)),
        )
        if isinstance(value, Mapping) and not value.get("choices") and value.get("error"):
            # Some gateways send upstream errors as replies.
            if value.get("usage") is not None:
                charge(reported_usage(value, prompt_tokens, sampling.max_tokens, lambda _: None))
            error = value["error"]
            code = error.get("code") if isinstance(error, Mapping) else None
            raise refused(code if type(code) is int and 400 <= code < 600 else 500, {}, json.dumps(value))
        return value

    async def _reply(
        self, body: Mapping[str, Any], refused: Refuse, *, starting: bool, most_bytes: int, unread: Callable[[], None]
    ) -> Any:
        """The JSON reply to one call; arguments as of `post` and `_exchange`."""
        timeout, patience = self._settings.timeout_s, self._settings.patience_s
        # The short call at the start is limited by the patience, not by the time limit of a long reply.
        seconds = min(timeout, patience) if starting else timeout
        return await self._exchange(
            "POST", "chat/completions", body, refused, seconds=seconds, most_bytes=most_bytes, unread=unread
        )

    async def settle(self, root: Folder) -> None:
        """Take up what is known under `root`, the call log's folder; of single requests, nothing is."""

    async def list_models(self) -> Any:
        """One request for the list of models. Raises EngineError if there is none."""
        seconds = min(self._settings.timeout_s, self._settings.patience_s)
        return await self._exchange("GET", "models", None, self._no_list, seconds=seconds, most_bytes=_REPLY_BYTES)

    async def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None,
        refused: Refuse,
        *,
        unread: Callable[[], None] = lambda: None,
        **limits: Any,
    ) -> Any:
        """The JSON reply to one request; arguments and exceptions as of `_content`."""
        content = await self._content(method, path, body, refused, unread=unread, **limits)
        try:
            return json.loads(content, parse_int=json_integer)
        except (ValueError, RecursionError):
            unread()
            start = clean(content[:80].decode("utf-8", "replace"), self.key)
            raise Again(f"the reply is not JSON: {start!r}", "call") from None

    async def _content(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None,
        refused: Refuse,
        *,
        seconds: float,
        most_bytes: int,
        unread: Callable[[], None] = lambda: None,
        content_type: str = "application/json",
    ) -> bytes:
        """The body of the reply to one request; raises the matching exception otherwise.

        Args:
            body: plain data, which is sent as JSON, or bytes of `content_type`.
            seconds: limit of the whole request.
            unread: called if a reply was sent that cannot be read.
        """
        http = self._transport
        if http is None:
            raise EngineError("the connection was not opened")
        status, content = 0, b""
        headers: Mapping[str, str] = {}
        try:
            sent = body if body is None or isinstance(body, bytes) else encoded(body)
            async with (
                asyncio.timeout(seconds),
                http.stream(method, f"{self._settings.address}/{path}", sent, content_type) as response,
            ):
                status, headers = response.status, response.headers
                content = await _read(response, most_bytes)
        except Exception as error:
            if 200 <= status < 300:
                unread()
            if status < 300:  # an error body may end anywhere
                raise self._failure(http, error, method) from None
        if not 200 <= status < 300:
            raise refused(status, headers, content.decode("utf-8", "replace"))
        return content

    def _failure(self, http: Transport, error: Exception, method: str) -> Exception:
        """The exception for a request that ended without a whole reply."""
        if isinstance(error, _TooLarge):
            return Again(str(error), "call")
        trouble = http.trouble(error)
        if trouble == "timeout":
            # A list of models that never ends does not show that calls are not answered.
            return Again("no reply in time", "call" if self.answered or method == "GET" else "endpoint")
        reason = clean(f"{type(error).__name__}: {error}", self.key)
        if trouble is not None:
            return Again(reason, "endpoint" if trouble == "unreachable" else "call")
        self._lifetime.check_open()
        return EngineError(reason)  # what the client cannot encode or send

    def _no_list(self, status: int, headers: Mapping[str, str], body: str) -> Exception:
        """The exception for a failed request of the list: it may be missing, but a rejected key is an error."""
        error = self._refusal(Asked((), False, 0, 0), status, headers, body)
        return error if isinstance(error, Again) or status == 401 else EngineError(str(error))

    def _refusal(self, asked: Asked, status: int, headers: Mapping[str, str], body: str) -> Exception:
        """The exception for a rejected request; a stop names the endpoint and the fix."""
        error = refusal(status, headers, body, asked, self.key)
        if not isinstance(error, EngineStop):
            return error
        address = self._settings.address
        if status == 401:
            name = self._settings.api_key_env
            fix = (
                f"check that the environment variable {name} has the key of this endpoint"
                if name
                else "no key was sent: set endpoint.api_key_env"
            )
            return EngineStop(f"{address}: {error}; {fix}")
        if status in (400, 404, 422):
            return EngineStop(self.models.unknown(self._spec.model, address, str(error)))
        return EngineStop(f"{self._spec.model!r} at {address}: {error}")


def encoded(body: Mapping[str, Any]) -> bytes:
    """A body as JSON. Raises ValueError for text or numbers that JSON cannot hold."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


async def _read(response: Response, most: int) -> bytes:
    """The body, decompressed. Of an error, the first bytes; raises _TooLarge for a reply longer than `most` bytes."""
    success = 200 <= response.status < 300
    most = most if success else _ERROR_BYTES
    content = bytearray()
    async for chunk in response.chunks:
        content += chunk
        if len(content) > most:
            if success:
                raise _TooLarge(f"the reply is longer than {most} bytes")
            return bytes(content[:most])
    return bytes(content)
