"""What an endpoint's refusals mean. Servers agree on status codes, and hardly on anything behind them.

Read from the messages of OpenAI, vLLM, llama.cpp, TGI, OpenRouter and Azure; where a message is not understood, the
call failed and nothing else is said.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray_pipeline.engines.base import EngineError, EngineStop, PromptTooLong
from ray_pipeline.store.outside import shown

_QUOTE = 300  # characters of a server's message that are shown

_TOO_LONG = re.compile(
    r"context[_ ](?:length|size|window)|maximum context|exceeds? the (?:available )?context"
    r"|(?:prompt|input)[^.]{0,40} too long|`inputs` tokens \+ `max_new_tokens` must be",
    re.IGNORECASE,
)
#: In order of trust: "contains at least 9000 input tokens", "resulted in 9000 tokens", "(8000 in the messages",
#: `"n_prompt_tokens": 9000`, "Given: 4000 `inputs` tokens", "request (9000 tokens)".
_PROMPT_TOKENS = re.compile(
    r"contains (?:at least )?(\d+) input tokens|resulted in (\d+) tokens|\((\d+) in (?:the|your) (?:messages|prompt)"
    r"|n_prompt_tokens\W+(\d+)|given: (\d+) `inputs`|request \((\d+) tokens",
    re.IGNORECASE,
)
_CONTEXT_TOKENS = re.compile(
    r"(?:context length|context window|limit|maximum) (?:is|of) (\d+)|n_ctx\W+(\d+)|context size \((\d+)"
    r"|must be <= (\d+)",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(r"model\b.{0,160}?\b(?:not found|not exist|unknown|not available|not supported)", re.IGNORECASE)
_STRUCTURE = re.compile(
    r"response_format|json_?schema|structured|guided_|grammar|\bschema\b|xgrammar|\bregex\b", re.IGNORECASE
)
_QUOTED_WORD = re.compile(r"['\"`](\w+)['\"`]")
_DISLIKE = re.compile(r"unsupported|not support|unrecognized|unknown|unexpected|not permitted|forbidden|invalid", re.I)
_KEY = re.compile(r"\b(?:sk|pk|rk|gsk|xai|hf)[-_][\w*.-]{6,}|Bearer\s+\S+", re.IGNORECASE)

#: Statuses of gateways and overloaded servers, which are not the call's fault.
_ENDPOINT_STATUSES = frozenset({502, 503, 504, 520, 521, 522, 523, 524, 529})


class Again(Exception):
    """A request that may succeed when retried.

    Args:
        blame: `call`: possibly this call's own fault; `endpoint`: the endpoint is down; `limit`: too many requests.
        wait: seconds to wait, if the server gives them.
    """

    def __init__(self, reason: str, blame: Literal["call", "endpoint", "limit"], wait: float | None = None) -> None:
        super().__init__(reason)
        self.blame, self.wait = blame, wait


class Refused(Exception):
    """The server rejects a parameter of the request (`response_format` stands for all structured output)."""

    def __init__(self, reason: str, parameter: str) -> None:
        super().__init__(reason)
        self.parameter = parameter


@dataclass(frozen=True)
class Asked:
    """The properties of a rejected request that the meaning of the rejection depends on.

    Attributes:
        parameters: names in the request's body, beside model and messages.
        structured: whether structured output was requested.
        prompt_tokens: an estimate.
        limit: context of the model in tokens; 0: unknown.
        answered: whether the endpoint has answered any request.
    """

    parameters: Collection[str]
    structured: bool
    prompt_tokens: int
    max_tokens: int
    limit: int = 0
    answered: bool = False


def clean(text: str, key: str | None) -> str:
    """A server's message, shortened and without the API key, whole or masked."""
    if key:
        text = text.replace(key, "***")
    text = " ".join(shown(_KEY.sub("***", text)).split())
    return text if len(text) <= _QUOTE else text[:_QUOTE] + "…"


def refusal(status: int, headers: Mapping[str, str], body: str, asked: Asked, key: str | None) -> Exception:
    """The exception for a rejected request: Again, Refused, PromptTooLong, EngineError or EngineStop."""
    message, code, parameter = _error_of(body)
    said = clean(message or body or "no reason given", key)
    told = f"HTTP {status}: {said}"
    if status == 401:
        # The text is left out: here servers may repeat the key, or half of it.
        return EngineStop("the endpoint rejected the API key (HTTP 401)")
    if status == 402 or code == "insufficient_quota":
        return EngineStop(f"the account at the endpoint has no credit left ({told}); top it up, then rerun")
    if status == 429 and "request too large" in message.lower():  # over the limit of a minute by itself
        return EngineError(told)
    if status == 429:
        return Again(told, "limit", retry_after(headers))
    if status in _ENDPOINT_STATUSES:
        return Again(told, "endpoint", retry_after(headers))
    if status in (408, 409, 425, 500):
        return Again(told, "call", retry_after(headers))
    if status == 403 and asked.answered:  # some moderate this way
        return EngineError(told)
    if status == 405 or 300 <= status < 400:
        return EngineStop(
            f"{told}. Check that base_url is the address of an OpenAI-compatible endpoint; it usually ends with /v1"
        )
    if status in (403, 404) or code == "model_not_found":
        return EngineStop(told)
    if code == "context_length_exceeded" or _TOO_LONG.search(message or ""):
        prompt = _figure(_PROMPT_TOKENS, body) or asked.prompt_tokens
        return PromptTooLong(prompt, asked.max_tokens, _figure(_CONTEXT_TOKENS, body) or asked.limit)
    if status in (400, 422, 501):
        name = _wrong_parameter(message, parameter, asked)
        if name is not None:
            return Refused(told, name)
        if _NO_MODEL.search(message or ""):
            return EngineStop(told)
    return EngineError(told)


def _error_of(body: str) -> tuple[str, str, str]:
    """(message, code, param) of an error body; empty if missing."""
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return "", "", ""
    if isinstance(value, Mapping):
        error = value.get("error", value)
        if isinstance(error, Mapping):
            message = error.get("message") or error.get("detail") or error.get("msg") or json.dumps(error)
            code = error.get("code") or error.get("type") or error.get("error_type") or ""
            return str(message), str(code), str(error.get("param") or "")
        return str(error), str(value.get("error_type") or ""), ""
    return "", "", ""


def _wrong_parameter(message: str, parameter: str, asked: Asked) -> str | None:
    """The sent parameter that the server names as the reason of the rejection, if any."""
    named = [re.split(r"[.\[]", parameter)[0]] if parameter else []
    if _DISLIKE.search(message):
        named += _QUOTED_WORD.findall(message)
    for name in named:
        if name in asked.parameters and name not in ("response_format", "structured_outputs"):
            return name
    if asked.structured and _STRUCTURE.search(f"{parameter} {message}"):
        return "response_format"
    return None


def _figure(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return int(next(group for group in found.groups() if group)) if found else 0


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by `Retry-After` (seconds or a date, RFC 9110 §10.2.3) or `retry-after-ms`; None if missing."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / scale
        except ValueError:
            try:
                then = email.utils.parsedate_to_datetime(value)
            except (TypeError, ValueError):
                continue
            if then.tzinfo is None:
                then = then.replace(tzinfo=datetime.UTC)
            seconds = (then - datetime.datetime.now(datetime.UTC)).total_seconds()
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
