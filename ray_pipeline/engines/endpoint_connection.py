"""HTTP requests to one endpoint, through the `openai` client.

The API key is read from the environment when the engine starts. It is in no setting, no identity and no message.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray_pipeline.engines.base import EngineError, EngineStartError, EngineStop, Sampling
from ray_pipeline.engines.endpoint_errors import Again, Asked, clean, refusal
from ray_pipeline.engines.endpoint_replies import ServedModels
from ray_pipeline.engines.endpoint_settings import STRUCTURED, OpenAISpec
from ray_pipeline.engines.lifetime import Lifetime

_CONNECT_SECONDS = 15.0


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
        self._client: Any = None  # openai.AsyncOpenAI
        self.key: str | None = None
        self.requests = self.answered = 0
        self.models = ServedModels()

    def open(self) -> None:
        """Read the key and load the client; no request is made. Raises EngineStartError."""
        self.key = self._read_key()
        try:
            from openai import AsyncOpenAI, Timeout
        except ImportError as error:
            raise EngineStartError(f"cannot import the openai client ({error}); run: pip install openai") from error
        timeout = self._settings.timeout_s
        self._client = AsyncOpenAI(
            api_key=self.key or "none",  # the client requires one; a server without keys ignores it
            base_url=self._settings.address,
            max_retries=0,  # `endpoint_retry` retries, within limits, budget and patience
            timeout=Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout)),
        )

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
        if self._client is not None:
            await self._client.close()

    async def post(self, body: Mapping[str, Any], sampling: Sampling, prompt_tokens: int, *, starting: bool) -> Any:
        """One request for a reply; `starting` marks the short call at the start."""
        parameters = body.keys() - {"messages"}
        asked = Asked(
            parameters=parameters,
            structured=bool(STRUCTURED & parameters),
            prompt_tokens=prompt_tokens,
            max_tokens=sampling.max_tokens,
            limit=self.models.context,
            answered=self.answered > 0,
        )
        refused = functools.partial(self._refusal, asked)
        self.requests += 1
        completions = self._client.chat.completions.with_raw_response
        # The short call at the start is limited by the patience, not by the time limit of a long reply.
        timeout = {"timeout": min(self._settings.timeout_s, self._settings.patience_s)} if starting else {}
        extra = {name: value for name, value in body.items() if name != "messages"}
        send = completions.create(model=self._spec.model, messages=body["messages"], extra_body=extra, **timeout)
        value = await self._received(send, refused)
        if isinstance(value, Mapping) and not value.get("choices") and isinstance(value.get("error"), Mapping):
            # Some gateways send upstream errors as replies.
            code = value["error"].get("code")
            raise refused(code if isinstance(code, int) else 500, {}, json.dumps(value))
        return value

    async def list_models(self) -> Any:
        """One request for the list of models. Raises EngineError if there is none."""
        timeout = min(self._settings.timeout_s, self._settings.patience_s)
        return await self._received(self._client.models.with_raw_response.list(timeout=timeout), self._no_list)

    async def _received(self, send: Awaitable[Any], refused: Callable[[int, Mapping[str, str], str], Exception]) -> Any:
        """The JSON reply to a request of the client; raises the matching exception otherwise."""
        import openai

        try:
            raw = await send
        except openai.APIStatusError as error:
            raise refused(error.status_code, error.response.headers, error.response.text) from None
        except openai.APITimeoutError:
            raise Again("no reply in time", "call" if self.answered else "endpoint") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            unreachable = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "PoolTimeout")
            reason = clean(f"{type(cause).__name__}: {cause}" if cause else str(error), self.key)
            raise Again(reason, "endpoint" if unreachable else "call") from None
        except Exception as error:  # what the client cannot encode, decode or send
            self._lifetime.check_open()
            raise EngineError(clean(f"{type(error).__name__}: {error}", self.key)) from None
        try:
            return json.loads(raw.content)
        except (ValueError, RecursionError):
            start = clean(raw.content[:80].decode("utf-8", "replace"), self.key)
            raise Again(f"the reply is not JSON: {start!r}", "call") from None

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
