"""Any OpenAI-compatible endpoint behind ``ChatEngine``, through the `openai` client.

Errors and their handling:

- **Errors of one call** (a rejected message, a reply that is not JSON, a broken connection, a time-out, a 500) are
  retried with exponential back-off and jitter, ``retries`` times; then the call raises :class:`EngineError`.
- **Errors of the endpoint** (unreachable, 502, 503, 504, 429) are waited out, honouring ``Retry-After``. After
  ``patience_s`` seconds without any reply the engine stops, so that a wrong address does not cost a night.
- **Errors for the user** (rejected key, unknown model, no credit, unsupported parameter, spent budget) stop the engine
  immediately. A stopped engine refuses every later call with the same message.

Budget: the next call is made only if the amount spent, plus the maximum cost of the calls in progress, plus its own
maximum cost, is within ``budget``. The maximum is ``max_tokens`` new tokens and one prompt token for every three bytes,
so the budget holds to within the error of that estimate. The amount spent covers every engine that shares the call log
(see ``account``); the figures of other processes are up to two seconds old and exclude their calls in progress, so
several actors together may exceed the budget by what they spend in that time. Costs follow the server's ``usage`` (an
estimate if it is missing); calls without a reply (errors, time-outs) are not counted, though some servers charge them.

Chat templates: a server of open models renders messages into its template as text and tokenises the result (vLLM: its
renderers), so that a ``<|im_end|>`` in a candidate ends the judge's message there, unless the template prevents it. The
in-process engine can split such strings by token (`chat_template`), but an endpoint accepts only text:
``break_control_strings`` inserts an invisible space into every string that looks like one.

Parameters that the server adds change replies and are invisible to the client (a vLLM server takes ``top_k`` and others
from the model's generation_config.json): set them in ``extra_body`` where it matters.

The API key is read from the environment when the engine starts. It is in no setting, no identity and no message.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import json
import logging
import os
import random
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.account import Account, Prices
from ray_pipeline.engines.base import (
    BudgetSpent,
    Completion,
    EngineDead,
    EngineError,
    EngineStartError,
    EngineStop,
    Grammar,
    Message,
    PromptTooLong,
    Sampling,
    TokenLogprobs,
)
from ray_pipeline.engines.endpoint_errors import Again, Asked, Refused, clean, refusal
from ray_pipeline.store.files import Folder

logger = logging.getLogger("quorum.openai")

_BACKOFF_SECONDS = 0.5  # before the second try; doubles with every further one
_BACKOFF_MOST = 60.0
_LIMITED_MOST = 200  # attempts of one call that may end in 429 while others are answered
_CONNECT_SECONDS = 15.0
_NAMED_MODELS = 12  # names of an endpoint's models that a message lists

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
_STRUCTURED = frozenset({"response_format", "structured_outputs", "guided_json", "guided_choice", "guided_regex"})
_NEVER = frozenset({"model", "messages", "n", "stream", "stream_options", "tools", "tool_choice", "functions"})

#: Finish reasons of several servers -> the common ones.
_FINISHES = {"eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}

#: Control strings in the templates of common open models (ChatML, Llama, Gemma, Mistral, Phi, DeepSeek).
_CONTROL_STRINGS = re.compile(
    r"<(?=[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|/?s>|(?:start|end)_of_turn>|(?:bos|eos|pad|unk)>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\])"
)
_INVISIBLE = "\u200b"  # zero-width space

#: JSON Schema keywords that some servers reject; without them the format of a reply is still right.
_BOUNDS = frozenset({"minLength", "maxLength", "minimum", "maximum", "pattern", "minItems", "maxItems"})

_PROBE = Grammar.json(
    {
        "type": "object",
        "properties": {"verdict": {"type": "string", "enum": ["green", "blue"]}},
        "required": ["verdict"],
        "additionalProperties": False,
    }
)
_PROBE_MESSAGES: list[Message] = [
    {"role": "user", "content": 'Name a colour. Answer with one JSON object and nothing else: {"verdict": "green"}'}
]
_PROBE_TOKENS = 64
_AS_TEXT = "such replies are requested as text and read by the parsers"

T = TypeVar("T")


class EndpointSettings(Settings):
    """The `endpoint` block of a model on engine `openai`."""

    base_url: str = Field(description="address up to and with the version, for example https://api.openai.com/v1")
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
            problem = _extra_problem(name, "extra_body")
            if problem:
                raise ValueError(problem)
        return self

    @property
    def address(self) -> str:
        return self.base_url.rstrip("/")

    def identity(self, model: str) -> str:
        """The model's name and address. Needs no network."""
        return f"endpoint:{model}@{self.address}"

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
        share: actors that share the limits per minute.
    """

    model: str
    endpoint: EndpointSettings
    canary: bool = True
    share: int = 1


def validate_request_extra(extra: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> None:
    """Check the names in ``Sampling.extra`` for an endpoint, as far as possible without contacting it.

    Raises:
        EngineStartError: a name that ``Sampling`` has a field for, or one that the engine sets itself.
    """
    for name in dict(extra):
        problem = _extra_problem(name, "extra")
        if problem:
            raise EngineStartError(problem)


def _extra_problem(name: str, where: str) -> str | None:
    if name in _OURS:
        return f"parameter {name!r} under {where}: set the sampling's own key {_OURS[name]!r} instead"
    if name in _STRUCTURED:
        return f"parameter {name!r} under {where}: agents set structured output; use endpoint.structured instead"
    if name in _NEVER:
        return f"parameter {name!r} under {where} cannot be set: one call is one reply of the configured model"
    return None


@dataclasses.dataclass
class EndpointStats:
    """An engine's counters since its start: tokens of answered calls, and every HTTP request for a reply."""

    calls: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost: float = 0.0


class OpenAIEngine:
    """A :class:`~ray_pipeline.engines.base.ChatEngine` over an endpoint; the module's docstring has its rules.

    The constructor makes no request; :meth:`start`, or the first :meth:`chat`, does. The engine belongs to the event
    loop that it was started on.
    """

    def __init__(self, spec: OpenAISpec) -> None:
        self.spec = spec
        self._settings = settings = spec.endpoint
        self._account = Account(settings.address, spec.model)
        self._requests = 0
        self._client: Any = None  # openai.AsyncOpenAI
        self._key: str | None = None
        self._starting: asyncio.Task[None] | None = None
        self._ready = False
        self._closed = False
        self._halted: EngineStop | None = None
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._request_pace = _Pace(settings.requests_per_minute, spec.share)
        self._token_pace = _Pace(settings.tokens_per_minute, spec.share)
        self._pause_until = 0.0  # after a 429 with a waiting time
        self._answered = 0
        self._silent_since: float | None = None  # time of the first sign since the last reply that the endpoint is down
        self._reserved = 0.0  # maximum cost of the calls in progress
        self._under_way = 0
        self._released = asyncio.Event()
        self._offered: list[str] = []  # names of models, if the endpoint lists them
        self._is_vllm = False
        self._limit = 0  # context in tokens; 0: unknown
        self._text_only = settings.structured == "text"
        self._step: dict[Grammar, int] = {}  # how far a grammar had to be relaxed
        self.notes: list[str] = []  # messages for the user, each once: the engine's log is not on the terminal
        name = settings.max_tokens_name
        openai_itself = urllib.parse.urlsplit(settings.base_url).hostname == "api.openai.com"
        self._max_tokens = name if name != "auto" else "max_completion_tokens" if openai_itself else "max_tokens"
        self._renamed = False

    @property
    def identity(self) -> Mapping[str, Any]:
        """Address, model name and the settings that change replies; never the API key. Needs no network."""
        return {
            "engine": "openai",
            "model": self._settings.identity(self.spec.model),
            **self._settings.answers(),
        }

    async def start(self) -> None:
        """Contact the endpoint and check that the model answers; only once, however often it is called.

        Raises:
            EngineStartError: the check failed; the message says what to change. Later calls raise it again.
            BudgetSpent: not even the first short call is within the budget.
        """
        if self._starting is None:
            # A separate task: the first caller may be cancelled while others wait for the same start.
            self._starting = asyncio.create_task(self._start(), name="openai-start")
        try:
            await asyncio.shield(self._starting)
        except asyncio.CancelledError:
            if self._closed and self._starting.cancelled():
                raise EngineDead("the engine was closed") from None
            raise

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """Draw one reply; see :class:`~ray_pipeline.engines.base.ChatEngine` for what is raised."""
        for name, _ in sampling.extra:
            problem = _extra_problem(name, "extra")
            if problem:
                raise EngineError(problem)
        begin = time.monotonic()
        async with self._slots:
            self._check_open()
            if not self._ready:
                # The start makes a call, which a spent budget must prevent.
                self._check_budget(messages, sampling)
                await self.start()
            reply = await self._paid(messages, sampling)
        return dataclasses.replace(reply, latency_s=time.monotonic() - begin)

    def cost(self, completion: Completion) -> float:
        prices = self._settings.prices
        if prices is None:
            return 0.0
        return prices.of(completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens)

    async def settle(self, root: Folder) -> None:
        await self._account.settle(root)

    def stats(self) -> EndpointStats:
        """Totals so far, including the short call at the start."""
        own, prices = self._account.own, self._settings.prices
        return EndpointStats(
            calls=own.calls,
            requests=self._requests,
            prompt_tokens=own.prompt_tokens,
            completion_tokens=own.completion_tokens,
            cached_tokens=own.cached_tokens,
            cost=own.price(prices) if prices else 0.0,
        )

    async def close(self) -> None:
        """Close the connections. Later chats raise EngineDead."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
        if self._client is not None:
            await self._client.close()

    # -- starting ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        try:
            await asyncio.to_thread(self._connect)  # importing the client takes a second
            await self._look_around()
            if self.spec.canary:
                await self._prove()
        except (BudgetSpent, EngineStartError) as error:
            raise self._halt(error) from None
        except EngineStop as error:
            raise self._halt(EngineStartError(str(error))) from None
        self._ready = True
        form = "none (text)" if self._text_only else "vLLM's fields" if self._speaks_vllm else "JSON schema"
        logger.info("%s at %s answers; structured output: %s", self.spec.model, self._settings.address, form)

    def _connect(self) -> None:
        self._key = self._read_key()
        try:
            from openai import AsyncOpenAI, Timeout
        except ImportError as error:
            raise EngineStartError(f"cannot import the openai client ({error}); run: pip install openai") from error
        timeout = self._settings.timeout_s
        self._client = AsyncOpenAI(
            api_key=self._key or "none",  # the client requires one; a server without keys ignores it
            base_url=self._settings.address,
            max_retries=0,  # retries are made by this class, which knows limits, budget and patience
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

    async def _look_around(self) -> None:
        """Read the list of models, if there is one: whether the model is served, by vLLM or not, and its context."""
        try:
            listed = await self._persist(self._list, retries=1)
        except EngineError as error:  # many endpoints have no such list
            logger.debug("%s lists no models: %s", self._settings.address, error)
            return
        models = listed.get("data") if isinstance(listed, Mapping) else listed
        for entry in models if isinstance(models, list) else []:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), str):
                continue
            self._offered.append(entry["id"])
            if entry["id"] == self.spec.model:
                self._is_vllm = entry.get("owned_by") == "vllm"
                limit = entry.get("max_model_len")
                self._limit = limit if isinstance(limit, int) else 0
        if self._offered and self.spec.model not in self._offered and not self.spec.canary:
            # Not an error yet: aliases and deployments may be served without being listed.
            self._warn_once(self._no_model("it is not in the list of models"))

    async def _prove(self) -> None:
        """Make one short call to check address, key, model and structured output."""
        at = f"{self.spec.model!r} at {self._settings.address}"
        plain = Sampling(max_tokens=_PROBE_TOKENS)
        try:
            try:
                reply = await self._paid(_PROBE_MESSAGES, dataclasses.replace(plain, grammar=_PROBE))
            except EngineError as error:
                if self._text_only or self._settings.structured != "auto" or not str(error).startswith("HTTP 4"):
                    raise
                # Rejected with an unknown message: structured output is the most likely reason.
                self._text_only = True
                reply = await self._paid(_PROBE_MESSAGES, plain)
                self._warn_once(f"{at} rejects structured output ({error}); {_AS_TEXT}")
        except PromptTooLong as error:
            raise EngineStartError(f"even a short prompt does not fit {at}: {error}") from None
        except EngineError as error:
            raise EngineStartError(
                f"the first call to {at} failed: {error}. Check that base_url is the address of an OpenAI-compatible "
                "endpoint; it usually ends with /v1"
            ) from None
        if self._text_only:
            return
        if self._step.get(_PROBE, 0) >= len(self._forms(_PROBE)):
            self._text_only = True  # _adapt has warned already
        elif reply.finish_reason != "length" and not _obeys(reply.text):
            # A model that thinks first may have used up the tokens; that would prove nothing.
            text = clean(reply.text[:80], self._key)
            said = f"{at} does not obey structured output (it replied {text!r} instead of a JSON object)"
            if self._settings.structured != "auto":
                raise EngineStartError(f"{said}; set endpoint.structured: text to read replies without it")
            self._text_only = True
            self._warn_once(f"{said}; {_AS_TEXT}")

    @property
    def _speaks_vllm(self) -> bool:
        mode = self._settings.structured
        return mode == "vllm" or (mode == "auto" and self._is_vllm)

    # -- money -------------------------------------------------------------------------------------------------------

    async def _paid(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """One reply; its maximum cost is reserved while the call is in progress."""
        most = self._most(messages, sampling)
        while not self._fits(most):
            if not self._under_way:
                raise self._halt(self._budget_spent(most))
            self._released.clear()
            await self._released.wait()
            self._check_open()
        if not self._under_way:  # time without requests does not count as silence
            self._silent_since = None
        self._reserved += most
        self._under_way += 1
        try:
            return await self._ask(messages, sampling)
        finally:
            self._under_way -= 1
            self._reserved = self._reserved - most if self._under_way else 0.0
            self._released.set()

    def _check_budget(self, messages: Sequence[Message], sampling: Sampling) -> None:
        most = self._most(messages, sampling)
        if not self._under_way and not self._fits(most):
            raise self._halt(self._budget_spent(most))

    def _most(self, messages: Sequence[Message], sampling: Sampling) -> float:
        prices = self._settings.prices
        return prices.of(_prompt_tokens(messages), 0, sampling.max_tokens) if prices else 0.0

    def _fits(self, most: float) -> bool:
        budget, prices = self._settings.budget, self._settings.prices
        if budget is None or prices is None:
            return True
        return self._account.total().price(prices) + self._reserved + most <= budget

    def _budget_spent(self, most: float) -> BudgetSpent:
        prices, budget, used = self._settings.prices, self._settings.budget, self._account.total()
        assert prices is not None and budget is not None
        return BudgetSpent(
            f"the budget for {self.spec.model} at {self._settings.address} is spent: {used.price(prices):.6g} of "
            f"{budget:g} {prices.currency} spent ({used.calls} calls, {used.prompt_tokens} prompt and "
            f"{used.completion_tokens} new tokens, all runs on this call log), and the next call may cost "
            f"{most:.2g}. All replies are in the call log: raise endpoint.budget of the model and rerun the same "
            "command to resume"
        )

    # -- answering ---------------------------------------------------------------------------------------------------

    async def _ask(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """One reply, by a form of the request that the server accepts."""
        while True:
            body = self._body(messages, sampling)
            try:
                completion = await self._persist(
                    functools.partial(self._post, body, messages, sampling),
                    tokens=_prompt_tokens(messages) + sampling.max_tokens,
                )
            except Refused as refused:
                self._adapt(refused, body, sampling)
                continue
            self._account.charge(completion)
            return completion

    def _body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        """The request beside model and messages."""
        body: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._max_tokens: sampling.max_tokens,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        if sampling.grammar is not None:
            forms, step = self._forms(sampling.grammar), self._step.get(sampling.grammar, 0)
            body |= forms[step] if step < len(forms) else {}
        body |= self._settings.extra_body
        body |= dict(sampling.extra)
        return {name: value for name, value in body.items() if name not in self._settings.omit}

    def _forms(self, grammar: Grammar) -> list[dict[str, Any]]:
        """Forms of requesting a grammar from this server, strictest first; plain text follows the last."""
        if self._text_only:
            return []
        if grammar.kind != "json":
            if self._speaks_vllm:
                return [{"structured_outputs": {grammar.kind: grammar.decoded()}}]
            self._warn_once(
                f"{self._settings.address} is not a vLLM server and supports no {grammar.kind} grammar; {_AS_TEXT}"
            )
            return []
        schema = grammar.decoded()
        loose = _without_bounds(schema)
        return [
            {"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": s, "strict": True}}}
            for s in ([schema] if loose == schema else [schema, loose])
        ]

    def _adapt(self, refused: Refused, body: Mapping[str, Any], sampling: Sampling) -> None:
        """Adapt the next request to a rejection, or stop if there is nothing left to change."""
        name, at = refused.parameter, f"{self.spec.model!r} at {self._settings.address}"
        if name == "response_format":
            self._loosen(refused, body, sampling)
            return
        if name in ("max_tokens", "max_completion_tokens") and self._settings.max_tokens_name == "auto":
            if name != self._max_tokens:  # another call has adapted it meanwhile
                return
            if not self._renamed:
                self._renamed = True
                self._max_tokens = "max_tokens" if name == "max_completion_tokens" else "max_completion_tokens"
                return
        raise self._halt(
            EngineStop(
                f"{at} rejects the parameter {name!r} ({refused}); change the sampling, or add it to endpoint.omit so "
                "that it is never sent"
            )
        )

    def _loosen(self, refused: Refused, body: Mapping[str, Any], sampling: Sampling) -> None:
        grammar, at = sampling.grammar, f"{self.spec.model!r} at {self._settings.address}"
        assert grammar is not None  # otherwise no structured output was requested
        forms, step = self._forms(grammar), self._step.get(grammar, 0)
        if step >= len(forms) or any(body.get(key) != value for key, value in forms[step].items()):
            return  # another call has adapted it meanwhile
        last = step + 1 == len(forms)
        if last and self._settings.structured != "auto":
            raise self._halt(
                EngineStop(
                    f"{at} rejects structured output ({refused}); set endpoint.structured: text to read replies "
                    "without it (auto falls back to that)"
                )
            )
        self._step[grammar] = step + 1
        fallback = _AS_TEXT if last else "retrying without the schema's bounds"
        self._warn_once(f"{at} rejects structured output ({refused}); {fallback}")

    async def _persist(self, request: Callable[[], Awaitable[T]], *, retries: int | None = None, tokens: int = 0) -> T:
        """Retry a request until it is answered or rejected, has failed too often, or the endpoint counts as down."""
        retries = self._settings.retries if retries is None else retries
        failures = limited = answered = 0
        while True:
            self._check_open()
            await self._request_pace.wait(1)
            await self._token_pace.wait(tokens)
            while (left := self._pause_until - time.monotonic()) > 0:
                await asyncio.sleep(left + random.uniform(0, min(1.0, left)))
            self._check_open()
            try:
                answer = await request()
            except Again as error:
                trouble = Again(clean(str(error), self._key), error.blame, error.wait)
                if not failures and not limited:
                    answered = self._answered
                if trouble.blame == "limit":
                    limited += 1
                else:
                    failures += 1
                own_fault = trouble.blame == "call" or self._answered > answered
                if (own_fault and failures > retries) or limited > _LIMITED_MOST:
                    raise EngineError(f"given up after {failures + limited} attempts: {trouble}") from None
                await self._wait(trouble, failures + limited)
            else:
                self._silent_since = None
                return answer

    async def _wait(self, trouble: Again, tries: int) -> None:
        """Wait before the next attempt, or stop if the endpoint has been silent for too long."""
        wait = min(_BACKOFF_MOST, _BACKOFF_SECONDS * 2 ** min(tries - 1, 10)) * random.uniform(0.5, 1.0)
        if trouble.wait is not None:
            wait = trouble.wait + random.uniform(0, min(1.0, 0.1 + trouble.wait / 10))
        now, patience = time.monotonic(), self._settings.patience_s
        if trouble.blame == "call":
            wait = min(wait, max(patience, _BACKOFF_MOST))
        else:
            if self._silent_since is None:
                self._silent_since = now
            left = self._silent_since + patience - now
            if left <= 0 or (trouble.wait is not None and trouble.wait > left):
                raise self._halt(self._nobody_there(trouble, now - self._silent_since))
            if trouble.wait is None:
                wait = min(wait, left)
            elif trouble.blame == "limit":
                self._pause_until = max(self._pause_until, now + trouble.wait)
        logger.debug("%s: again in %.1f s (%s)", self._settings.address, wait, trouble)
        await asyncio.sleep(wait)

    def _nobody_there(self, trouble: Again, silent: float) -> EngineStop:
        asks = f", and requests a wait of {trouble.wait:.0f} s" if trouble.wait is not None else ""
        remedy = (
            "Lower endpoint.requests_per_minute, tokens_per_minute or concurrency, or raise patience_s"
            if trouble.blame == "limit"
            else "Check base_url, the network (and its proxy settings), and that the server runs"
        )
        return EngineStop(
            f"{self._settings.address} has not responded for {silent:.0f} s ({trouble}){asks}; endpoint.patience_s "
            f"is {self._settings.patience_s:g}. {remedy}. All replies are in the call log: rerun the same command to "
            "resume"
        )

    async def _post(self, body: Mapping[str, Any], messages: Sequence[Message], sampling: Sampling) -> Completion:
        """One HTTP request for a reply."""
        prompt_tokens = _prompt_tokens(messages)
        asked = Asked(
            parameters=body.keys(),
            structured=bool(_STRUCTURED & body.keys()),
            prompt_tokens=prompt_tokens,
            max_tokens=sampling.max_tokens,
            limit=self._limit,
            answered=self._answered > 0,
        )
        self._requests += 1
        completions = self._client.chat.completions.with_raw_response
        # The short call at the start is limited by the patience, not by the time limit of a long reply.
        timeout = {} if self._ready else {"timeout": min(self._settings.timeout_s, self._settings.patience_s)}
        send = completions.create(
            model=self.spec.model, messages=self._sent(messages), extra_body=dict(body), **timeout
        )
        value = await self._received(send, functools.partial(self._refusal, asked))
        if isinstance(value, Mapping) and not value.get("choices") and isinstance(value.get("error"), Mapping):
            # Some gateways send upstream errors as replies.
            code = value["error"].get("code")
            raise self._refusal(asked, code if isinstance(code, int) else 500, {}, json.dumps(value))
        completion = _completion(value, sampling, prompt_tokens)
        self._answered += 1
        self._token_pace.give_back(
            prompt_tokens + sampling.max_tokens - completion.prompt_tokens - completion.completion_tokens
        )
        return completion

    def _sent(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        if not self._settings.break_control_strings:
            return [dict(m) for m in messages]
        return [{**m, "content": broken_control_strings(m["content"])} for m in messages]

    async def _list(self) -> Any:
        """One HTTP request for the list of models. Raises EngineError if there is none."""
        timeout = min(self._settings.timeout_s, self._settings.patience_s)
        return await self._received(self._client.models.with_raw_response.list(timeout=timeout), self._no_list)

    def _no_list(self, status: int, headers: Mapping[str, str], body: str) -> Exception:
        """The exception for a failed request of the list: it may be missing, but a rejected key is an error."""
        asked = Asked((), False, 0, 0)
        error = refusal(status, headers, body, asked, self._key)
        return (
            error
            if isinstance(error, Again)
            else (self._refusal(asked, status, headers, body) if status == 401 else EngineError(str(error)))
        )

    async def _received(self, send: Awaitable[Any], refused: Callable[[int, Mapping[str, str], str], Exception]) -> Any:
        """The JSON reply to a request of the client; raises the matching exception otherwise."""
        import openai

        try:
            raw = await send
        except openai.APIStatusError as error:
            raise refused(error.status_code, error.response.headers, error.response.text) from None
        except openai.APITimeoutError:
            raise Again("no reply in time", "call" if self._answered else "endpoint") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            unreachable = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "PoolTimeout")
            reason = clean(f"{type(cause).__name__}: {cause}" if cause else str(error), self._key)
            raise Again(reason, "endpoint" if unreachable else "call") from None
        except Exception as error:  # what the client cannot encode, decode or send
            self._check_open()
            raise EngineError(clean(f"{type(error).__name__}: {error}", self._key)) from None
        try:
            return json.loads(raw.content)
        except (ValueError, RecursionError):
            start = clean(raw.content[:80].decode("utf-8", "replace"), self._key)
            raise Again(f"the reply is not JSON: {start!r}", "call") from None

    def _refusal(self, asked: Asked, status: int, headers: Mapping[str, str], body: str) -> Exception:
        """The exception for a rejected request; a stop names the endpoint and the fix."""
        error = refusal(status, headers, body, asked, self._key)
        if not isinstance(error, EngineStop):
            return error
        if status == 401:
            name = self._settings.api_key_env
            fix = (
                f"check that the environment variable {name} has the key of this endpoint"
                if name
                else "no key was sent: set endpoint.api_key_env"
            )
            return self._halt(EngineStop(f"{self._settings.address}: {error}; {fix}"))
        if status in (400, 404, 422):
            return self._halt(EngineStop(self._no_model(str(error))))
        return self._halt(EngineStop(f"{self.spec.model!r} at {self._settings.address}: {error}"))

    def _no_model(self, reason: str) -> str:
        names = difflib.get_close_matches(self.spec.model, self._offered, n=3, cutoff=0.5)
        names += [name for name in sorted(self._offered) if name not in names]
        offers = f"; it serves {', '.join(names[:_NAMED_MODELS])}" if names else ""
        more = f" and {len(names) - _NAMED_MODELS} more" if len(names) > _NAMED_MODELS else ""
        hint = "" if names else ". Check the model's name, and the end of base_url (often /v1)"
        return f"{self._settings.address} does not serve {self.spec.model!r} ({reason}){offers}{more}{hint}"

    # -- ending ------------------------------------------------------------------------------------------------------

    def _halt(self, error: EngineStop) -> EngineStop:
        """Record why the engine stops; the first reason counts."""
        if self._halted is None:
            self._halted = error
            self._released.set()  # wake the calls that wait for budget
        return error

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDead("the engine was closed")
        if self._halted is not None:
            raise type(self._halted)(str(self._halted))

    def _warn_once(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)
            logger.warning("%s", message)


class _Pace:
    """Spreads requests evenly over time, so that no minute exceeds its share of a limit.

    There are no bursts and unused capacity is lost, since servers count in their own windows, some of them seconds.
    """

    def __init__(self, per_minute: float | None, share: int) -> None:
        self._gap = 0.0 if per_minute is None else 60.0 * share / per_minute  # seconds a unit
        self._next = 0.0
        self._turn = asyncio.Lock()

    async def wait(self, amount: int) -> None:
        """Wait for the turn of a request of that size, in order of arrival."""
        if not self._gap:
            return
        async with self._turn:
            while (left := self._next - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.05))  # short, because `give_back` may move the turn forward
            self._next = max(self._next, time.monotonic()) + amount * self._gap

    def give_back(self, amount: int) -> None:
        """Correct for a request that used less (or more) than estimated."""
        self._next -= amount * self._gap


def broken_control_strings(text: str) -> str:
    """The text with a zero-width space after the first character of everything that looks like a control token."""
    return _CONTROL_STRINGS.sub(lambda match: match.group() + _INVISIBLE, text)


def _prompt_tokens(messages: Sequence[Message]) -> int:
    """An estimate on the high side: most tokenizers make less than one token of three bytes."""
    return sum(len(m["content"].encode("utf-8", "replace")) // 3 + 8 for m in messages) + 8


def _without_bounds(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        properties = schema.get("properties")
        kept = {name: _without_bounds(value) for name, value in schema.items() if name not in _BOUNDS}
        if isinstance(properties, Mapping):  # its keys are names, not keywords
            kept["properties"] = {name: _without_bounds(value) for name, value in properties.items()}
        return kept
    return [_without_bounds(item) for item in schema] if isinstance(schema, list) else schema


def _obeys(text: str) -> bool:
    try:
        return json.loads(text) in ({"verdict": "green"}, {"verdict": "blue"})
    except (ValueError, RecursionError):
        return False


def _completion(value: Any, sampling: Sampling, prompt_tokens: int) -> Completion:
    """The completion in a server's reply. Raises Again if it has another form."""
    try:
        choice = value["choices"][0]
        message = choice["message"]
        finish = str(choice.get("finish_reason") or "unknown")
        text, said = message.get("content"), message.get("refusal")
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        if text is None and said:
            text, finish = said, "refusal"
        if not isinstance(text, str | None) or finish == "error":
            raise TypeError("no text")
        usage = value.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0
        prompt = int(usage.get("prompt_tokens") or prompt_tokens)
        new = usage.get("completion_tokens")
        return Completion(
            text=text or "",
            finish_reason=_FINISHES.get(finish, finish),
            prompt_tokens=prompt,
            completion_tokens=len((text or "").encode("utf-8", "replace")) // 3 + 1 if new is None else int(new),
            cached_tokens=min(int(cached), prompt),
            logprobs=None if sampling.logprobs is None else _token_logprobs(choice.get("logprobs"), sampling.logprobs),
        )
    except (TypeError, ValueError, LookupError, AttributeError):
        holds = ", ".join(sorted(map(str, value))[:8]) if isinstance(value, Mapping) else type(value).__name__
        raise Again(f"the reply is not a chat completion (it contains {holds})", "call") from None


def _token_logprobs(logprobs: Any, most: int) -> TokenLogprobs | None:
    """Per generated token the sampled one first, then up to `most` others by falling probability."""
    if not logprobs or logprobs.get("content") is None:
        return None
    tokens: TokenLogprobs = []
    for step in logprobs["content"]:
        others = [
            (str(other["token"]), float(other["logprob"]))
            for other in step.get("top_logprobs") or []
            if other["token"] != step["token"] or other["logprob"] != step["logprob"]
        ]
        others.sort(key=lambda pair: -pair[1])
        tokens.append([(str(step["token"]), float(step["logprob"])), *others[:most]])
    return tokens
