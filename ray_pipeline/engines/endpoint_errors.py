"""The meaning of an endpoint's refusals. Servers agree on status codes, and on little else.

Bodies are read by `endpoint_error_bodies`. A prompt that is too long is recognised by its figures where the server
gives them, otherwise by the words of the servers below. A message that matches nothing means that the call failed.
"""

from __future__ import annotations

import datetime
import email.utils
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ray_pipeline.engines.base import EngineError, EngineStop, PromptTooLong, rejected
from ray_pipeline.engines.endpoint_error_bodies import MOST_SEARCHED, read_error
from ray_pipeline.engines.system_role import refuses_system
from ray_pipeline.store.outside import shown, token_count

_QUOTE = 300  # characters of a server's message that are shown

#: OpenAI, vLLM, llama.cpp and TGI; Mistral; Anthropic; Gemini; Vertex; xAI; DashScope; Moonshot; Cohere; GLM.
_TOO_LONG = re.compile(
    r"context[_ ](?:length|size|window)|maximum context|exceeds? the (?:available )?context|exceed context limit"
    r"|(?:prompt|input)[^.]{0,40} too long|`inputs` tokens \+ `max_new_tokens` must be"
    r"|too large for model with \d+ maximum"
    r"|input token count.{0,40} exceeds|input token count is .{0,60} only supports"
    r"|maximum prompt length|prompt exceeds (?:the )?max"
    r"|range of input length"
    r"|exceeded model token limit"
    r"|too many tokens"
    r"|(?:prompt|\u8f93\u5165|\u63d0\u793a\u8bcd).{0,20}(?:\u8d85\u957f|\u8fc7\u957f|\u8d85\u8fc7|\u8d85\u51fa)",
    re.IGNORECASE,
)
_TOO_LONG_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error", "1261"})  # the last is GLM's
#: A limit of a minute or a day, and not of the context.
_QUOTA = re.compile(r"per[ _-](?:min|minute|hour|day)\b|\b[TR]P[MD]\b", re.IGNORECASE)
#: In order of trust: "contains at least 9000 input tokens", "resulted in 9000 tokens", "(8000 in the messages",
#: `"n_prompt_tokens": 9000`, "Given: 4000 `inputs` tokens", "request (9000 tokens)".
_PROMPT_TOKENS = re.compile(
    r"contains (?:at least )?(\d+) input tokens|resulted in (\d+) tokens|\((\d+) in (?:the|your) (?:messages|prompt)"
    r"|n_prompt_tokens\W+(\d+)|given: (\d+) `inputs`|request \((\d+) tokens|input token count (?:is )?\(?(\d+)"
    r"|requested: (\d+)|received (\d+)|prompt contains (\d+) tokens|request contains (\d+) tokens"
    r"|prompt is too long: (\d+) tokens",
    re.IGNORECASE,
)
_CONTEXT_TOKENS = re.compile(
    r"(?:context length|context window|limit|maximum|prompt length) (?:is|of) (\d+)|n_ctx\W+(\d+)"
    r"|context size \((\d+)|must be <= (\d+)|tokens allowed \((\d+)|only supports up to (\d+)|> (\d+) maximum"
    r"|token limit ?: ?(\d+)|cannot exceed (\d+)|length should be \[\d+, (\d+)\]|limit for this model is (\d+)"
    r"|model with (\d+) maximum",
    re.IGNORECASE,
)
#: A sentence about tokens that compares two figures.
_COMPARES = re.compile(
    r"exceed|maximum|\blimit|larger|longer|greater|more than|at most|only supports|too (?:long|large|many)|up to|[<>]",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.]*\w)")
_NO_MODEL = re.compile(r"model\b.{0,160}?\b(?:not found|not exist|unknown|not available|not supported)", re.IGNORECASE)
_STRUCTURE = re.compile(
    r"response_format|json_?schema|structured|guided_|grammar|\bschema\b|xgrammar|\bregex\b", re.IGNORECASE
)
_QUOTED_WORD = re.compile(r"['\"`](\w+)['\"`]")
_DISLIKE = re.compile(r"unsupported|not support|unrecognized|unknown|unexpected|not permitted|forbidden|invalid", re.I)
#: A refusal of what the messages say.
_MODERATED = re.compile(
    r"content[ _-]?(?:policy|policies|filter|management)|moderation|responsible ?ai|data_inspection|guardrail"
    r"|(?:safety|usage|acceptable use)[ _-](?:filter|system|polic)"
    r"|\b(?:prompt|input|output|content|text|messages?|response)\b.{0,60}"
    r"\b(?:flagged|blocked|harmful|inappropriate|sensitive|unsafe|prohibited|violat\w*)"
    r"|\u654f\u611f|\u4e0d\u5b89\u5168|\u8fdd\u89c4|\u5ba1\u6838",
    re.IGNORECASE,
)
#: A chat template that raises, which llama.cpp answers with status 500.
_TEMPLATE = re.compile(r"\bjinja|chat[ _]template|template error", re.IGNORECASE)
_KEY = re.compile(r"\b(?:sk|pk|rk|gsk|xai|hf)[-_][\w*.-]{6,}|Bearer\s+\S+", re.IGNORECASE)

SYSTEM_ROLE = "system role"  # in the place of a parameter's name

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
    """The server rejects a parameter of the request.

    Args:
        parameter: its name; `response_format` stands for all structured output, and `SYSTEM_ROLE` for system messages.
    """

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
        roles: of the messages.
    """

    parameters: Collection[str]
    structured: bool
    prompt_tokens: int
    max_tokens: int
    limit: int = 0
    roles: Sequence[str] = ()


def clean(text: str, key: str | None) -> str:
    """A server's message, shortened and without the API key, whole or masked."""
    if key:
        text = text.replace(key, "***")
    text = " ".join(shown(_KEY.sub("***", text)).split())
    return text if len(text) <= _QUOTE else text[:_QUOTE] + "…"


def refusal(status: int, headers: Mapping[str, str], body: str, asked: Asked, key: str | None) -> Exception:
    """The exception for a rejected request: Again, Refused, PromptTooLong, EngineError or EngineStop."""
    message, code, parameter = read_error(body)
    said = clean(message or "no reason given", key)
    told = f"HTTP {status}: {said}"
    if status == 401:
        # The text is left out: here servers may repeat the key, or half of it.
        return EngineStop("the endpoint rejected the API key (HTTP 401)")
    if status == 402 or code == "insufficient_quota":
        return EngineStop(f"the account at the endpoint has no credit left ({told}); top it up, then rerun")
    too_large = status == 413 or "request too large" in message.lower()
    if status in (413, 429) and too_large and _QUOTA.search(message):  # one request exceeds the limit of a minute
        return EngineError(told)
    if status == 429:
        return Again(told, "limit", retry_after(headers))
    if status in _ENDPOINT_STATUSES:
        return Again(told, "endpoint", retry_after(headers))
    moderated = _MODERATED.search(f"{code} {message}") is not None
    figures = _too_long(status, message, code, body, asked)
    if status in (400, 422, 500, 501) and not moderated and figures is None and refuses_system(message, asked.roles):
        return Refused(told, SYSTEM_ROLE)
    if status in (408, 409, 425, 500) and not _TEMPLATE.search(message):
        return Again(told, "call", retry_after(headers))
    if 300 <= status < 400:
        target = clean(headers.get("location", ""), key)
        return EngineStop(
            f"the address redirects{f' to {target}' if target else ''} (HTTP {status}), and redirects are not "
            "followed; set base_url to the address that it redirects to, if you trust that with the prompts"
        )
    if status == 405:
        return EngineStop(
            f"{told}. Check that base_url is the address of an OpenAI-compatible endpoint; it usually ends with /v1"
        )
    if status == 404 or code == "model_not_found":
        return EngineStop(told)
    if figures is not None and status != 403:
        return PromptTooLong(figures[0], asked.max_tokens, figures[1], told)
    understood = status in (400, 422, 501)
    name = _wrong_parameter(message, parameter, asked) if understood else None
    if name is not None:
        return Refused(told, name)
    if moderated:
        return EngineError(told)
    return EngineStop(told) if understood and _NO_MODEL.search(message) else rejected(told)


def _too_long(status: int, message: str, code: str, body: str, asked: Asked) -> tuple[int, int] | None:
    """(prompt tokens, limit) if the prompt is too long; what the server does not report is the client's own figure."""
    if status == 413 or code in _TOO_LONG_CODES or _TOO_LONG.search(message):
        text = _without_commas(f"{message}\n{body[:MOST_SEARCHED]}")
        return _figure(_PROMPT_TOKENS, text) or asked.prompt_tokens, _figure(_CONTEXT_TOKENS, text) or asked.limit
    return _compared(message, asked)


def _compared(message: str, asked: Asked) -> tuple[int, int] | None:
    """(prompt tokens, limit) of a message that compares them, in whatever words.

    The larger figure must be plausible as the tokens of this prompt, with or without those of the reply: a limit of
    `max_tokens` itself is about the setting and not about the prompt.
    """
    if not re.search("token", message, re.IGNORECASE) or not _COMPARES.search(message):
        return None
    figures = sorted({int(n) for n in _NUMBER.findall(_without_commas(message)) if len(n) < 10} - {asked.max_tokens})
    # The estimate is high: at most three bytes are one token, at least a quarter of its tokens are real.
    low, high = asked.prompt_tokens // 4, 3 * asked.prompt_tokens + asked.max_tokens
    prompts = [n for n in figures if low <= n <= high]
    if not prompts:
        return None
    prompt = prompts[-1]
    limits = [n for n in figures if 16 <= n < prompt]
    return (prompt, asked.limit if asked.limit in limits else limits[-1]) if limits else None


def _without_commas(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)


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
    digits = next(group for group in found.groups() if group) if found else "0"
    return token_count(int(digits)) if len(digits) < 12 else 0


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
            except (TypeError, ValueError, OverflowError):
                continue
            if then.tzinfo is None:
                then = then.replace(tzinfo=datetime.UTC)
            seconds = (then - datetime.datetime.now(datetime.UTC)).total_seconds()
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
