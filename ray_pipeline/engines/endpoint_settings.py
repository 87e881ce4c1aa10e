"""A model at an OpenAI-compatible endpoint: its settings, and the request parameters that they may set.

Parameters that the server adds change replies and are invisible to the client (a vLLM server takes ``top_k`` and others
from the model's generation_config.json): set them in ``extra_body`` where it matters.
"""

from __future__ import annotations

import dataclasses
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.account import Prices
from ray_pipeline.engines.base import EngineStartError

#: Request parameter -> the field of ``Sampling`` that sets it.
_OURS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "seed": "seed",
    "stop": "stop",
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
}
#: Request parameters that carry a grammar.
STRUCTURED = frozenset({"response_format", "structured_outputs", "guided_json", "guided_choice", "guided_regex"})
_NEVER = frozenset({"model", "messages", "n", "stream", "stream_options", "tools", "tool_choice", "functions"})


class BatchSettings(Settings):
    """The `batch` block of an endpoint on engine `openai_batch`."""

    requests: int = Field(50_000, ge=1, description="maximum number of calls in a batch; of each actor, in flight")
    quiet_s: float = Field(
        10.0, gt=0, description="a batch is sent once no further call has come for so many seconds, or when it is full"
    )
    poll_s: float = Field(30.0, gt=0, description="seconds between two looks at a batch")
    form: Literal["openai", "together"] = Field(
        "openai", description="how files are uploaded: as at OpenAI and most servers, or as at Together"
    )
    window: str = Field("24h", description="completion window that is asked for")
    price: float = Field(0.5, ge=0, description="share of `prices` (or of list prices) that calls in batches cost")


class EndpointSettings(Settings):
    """The `endpoint` block of a model on engine `openai` or `openai_batch`."""

    base_url: str = Field(description="address up to and with the version, for example https://api.openai.com/v1")
    identity: str | None = Field(
        None,
        min_length=1,
        description="name under which calls of the model are stored, wherever it is served; default: its name and "
        "base_url (`MODEL@BASE_URL`), and calls stored for the same name at another address are used as well. Set it "
        "to keep other weights under the same name apart, or to the old `MODEL@BASE_URL` to keep the results of a run "
        "whose server has moved",
    )
    api_key_env: str | None = Field(
        "OPENAI_API_KEY", description="environment variable with the API key, on every node; null: no key"
    )
    concurrency: int = Field(64, ge=1, description="requests in flight per actor")
    timeout_s: float = Field(300.0, gt=0, description="time limit of one request, in seconds")
    retries: int = Field(6, ge=0, description="retries of a call that failed by itself")
    patience_s: float = Field(120.0, gt=0, description="seconds without any reply after which the run stops")
    requests_per_minute: float | None = Field(
        None, gt=0, description="maximum of a stage, shared evenly by its actors; default: no limit"
    )
    tokens_per_minute: float | None = Field(
        None, gt=0, description="maximum of prompt and reply tokens of a stage, shared evenly; default: no limit"
    )
    transport: Literal["aiohttp", "httpx"] = Field(
        "aiohttp", description="HTTP client; httpx takes more CPU time, and SOCKS proxies with httpx[socks] installed"
    )
    structured: Literal["auto", "schema", "vllm", "text"] = Field(
        "auto",
        description="how a reply's format is enforced: schema (JSON schema), vllm (vLLM's own fields) or text (not at "
        "all, read by the parsers); auto tries, and falls back to text with a warning, while schema and vllm stop if "
        "the server rejects them",
    )
    max_tokens_name: Literal["auto", "max_tokens", "max_completion_tokens"] = Field(
        "auto", description="the server's name for the limit of a reply; auto switches if the name is rejected"
    )
    omit: tuple[str, ...] = Field((), description="parameters that are never sent (reasoning models: temperature)")
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="sent with every request, e.g. {chat_template_kwargs: {enable_thinking: false}}",
    )
    break_control_strings: bool = Field(
        False,
        description="insert a zero-width space into text that looks like a control token of a chat template, so that "
        "no response ends the message that contains it; for servers of open models (vLLM), whose tokenizers take such "
        "text for the token",
    )
    prices: Prices | None = Field(None, description="prices of tokens, for costs and budgets")
    budget: float | None = Field(
        None, gt=0, description="maximum cost of this model at this endpoint, over all runs that share the call log"
    )

    batch: BatchSettings | None = Field(
        None,
        description="only for engine openai_batch: how calls are put together, and what they cost",
        exclude_if=lambda block: block is None,
    )

    @model_validator(mode="after")
    def _check(self) -> EndpointSettings:
        # Not at the fields: an error at a field shows its value, which might be a password or a key.
        address = urllib.parse.urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("base_url must be an address like https://api.openai.com/v1")
        if "@" in address.netloc or address.query or address.fragment:
            raise ValueError("base_url must have no password and no query; set api_key_env to the key's variable")
        if address.path.rstrip("/").endswith(("/completions", "/models", "/responses")):
            raise ValueError("base_url must end before the name of the call, usually with /v1")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env must be the NAME of an environment variable, never the key itself")
        if self.budget is not None and self.prices is None:
            raise ValueError("budget needs prices (per million tokens); set them as well")
        for name in self.extra_body:
            problem = extra_problem(name, "extra_body")
            if problem:
                raise ValueError(problem)
        return self

    @property
    def address(self) -> str:
        return self.base_url.rstrip("/")

    def known_as(self, model: str) -> str:
        """The model's part of call keys: its identity, or else its name and address. Needs no network."""
        return f"endpoint:{self.identity or f'{model}@{self.address}'}"

    def answers(self) -> dict[str, Any]:
        """The settings that change replies, as JSON values."""
        body = json.loads(json.dumps(self.extra_body, sort_keys=True, default=str))
        found = {"structured": self.structured, "omit": sorted(self.omit), "extra_body": body}
        # Only if it is on: otherwise calls keep the keys of runs before this setting existed.
        return {**found, "break_control_strings": True} if self.break_control_strings else found


@dataclasses.dataclass(frozen=True)
class OpenAISpec:
    """A model at an endpoint; plain values only, so that it can be pickled.

    Args:
        canary: check at the start, with one short call, that the model answers and obeys structured output.
        share: number of actors that share the limits per minute.
        keeps_thoughts: whether thoughts stay in the text of a reply.
        batch: how calls are put together; None: each is a request.
    """

    model: str
    endpoint: EndpointSettings
    canary: bool = True
    share: int = 1
    keeps_thoughts: bool = False
    batch: BatchSettings | None = None


def validate_request_extra(extra: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> None:
    """Check the names in ``Sampling.extra`` for an endpoint, as far as possible without contacting it.

    Raises:
        EngineStartError: a name that ``Sampling`` has a field for, or one that the engine sets itself.
    """
    for name in dict(extra):
        problem = extra_problem(name, "extra")
        if problem:
            raise EngineStartError(problem)


def extra_problem(name: str, where: str) -> str | None:
    """Why a request parameter must not be set under the key `where`; None if it may."""
    if name in _OURS:
        return f"parameter {name!r} under {where}: set the sampling's own key {_OURS[name]!r} instead"
    if name in STRUCTURED:
        return f"parameter {name!r} under {where}: agents set structured output; use endpoint.structured instead"
    if name in _NEVER:
        return f"parameter {name!r} under {where} cannot be set: one call is one reply of the configured model"
    return None
