"""The message in the body of a refused request, in the dialects of many servers.

OpenAI, vLLM and most others: ``{"error": {"message", "code", "param"}}``. Gemini: a list of one such object. TGI:
``{"error": text, "error_type"}``. FastAPI (Mistral): ``{"detail": text or [{"loc", "msg"}]}``. DashScope, Cohere and
Bedrock: ``{"code", "message"}``. OpenRouter: the upstream body as text in ``error.metadata.raw``. Gateways: text or
HTML.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray_pipeline.store.outside import json_integer

_MESSAGES = ("message", "Message", "detail", "msg", "error_message", "errorMessage", "title")
_CODES = ("code", "type", "error_type", "status")
_DEPTH = 4  # of errors inside errors
MOST_SEARCHED = 16_000  # characters of a text; some servers repeat the prompt in their message

_HIDDEN_HTML = re.compile(r"<(script|style|head)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[!/]?[a-zA-Z][^<>]{0,1000}>")


class ErrorBody(NamedTuple):
    """What a server wrote about an error; "" for what is missing."""

    message: str
    code: str
    parameter: str


def read_error(body: str) -> ErrorBody:
    """The error in a body of any form, cut to what is worth searching. The message is "" only if the body is blank."""
    try:
        value: Any = json.loads(body, parse_int=json_integer)
    except (ValueError, RecursionError):
        body = text = body[:MOST_SEARCHED]
        if _TAG.search(text):
            text = html.unescape(_TAG.sub(" ", _HIDDEN_HTML.sub(" ", text)))
        return ErrorBody(" ".join(text.split()) or " ".join(body.split()), "", "")
    found = _read(value, _DEPTH)
    message = found.message or (body if value else "")
    return ErrorBody(message[:MOST_SEARCHED], found.code[:MOST_SEARCHED], found.parameter[:MOST_SEARCHED])


def _read(value: Any, depth: int) -> ErrorBody:
    if isinstance(value, str | int | float):
        return ErrorBody(str(value), "", "")
    if isinstance(value, list):
        read = [_read(item, depth - 1) for item in value[:8]] if depth else []
        read = [error for error in read if error.message]
        if not read:
            return ErrorBody("", "", "")
        return ErrorBody("; ".join(error.message for error in read), read[0].code, read[0].parameter)
    if not isinstance(value, Mapping) or not depth:
        return ErrorBody("", "", "")
    inner = ErrorBody("", "", "")
    for name in ("error", "errors", *_MESSAGES):
        if value.get(name) and not inner.message:
            inner = _read(value[name], depth - 1)
    code = next((str(value[name]) for name in _CODES if isinstance(value.get(name), str | int)), "")
    where = value.get("loc")
    parameter = where[1] if isinstance(where, list) and len(where) > 1 and where[0] == "body" else value.get("param")
    metadata = value.get("metadata")
    if isinstance(metadata, Mapping) and isinstance(metadata.get("raw"), str):
        upstream = read_error(metadata["raw"])
        inner = ErrorBody(f"{inner.message}: {upstream.message}", upstream.code, upstream.parameter)
    return ErrorBody(inner.message, inner.code or code, inner.parameter or str(parameter or ""))
